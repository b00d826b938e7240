"""A server that somebody else runs: what it says, what is seen of it, and that it is let be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from pytest_gpulayout.adapters.attached_server import CLOCKS_S, KEY_VARIABLE, AttachedServer, Attachment
from pytest_gpulayout.adapters.recorded_topology import RecordedTopology
from pytest_gpulayout.adapters.vllm_process import free_port
from pytest_gpulayout.errors import (
    GpuLayoutError,
    MeasurementError,
    ServerError,
    ServerExited,
    ServerStartFailed,
    TopologyError,
    UnsupportedLayoutError,
)
from pytest_gpulayout.evidence import collect_transport
from pytest_gpulayout.gate import PlacedLayout, place_layout
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_requirement
from pytest_gpulayout.occupancy import GpuProcess, GpuUse, Occupancy
from pytest_gpulayout.ports import Platform, ServerSpec
from pytest_gpulayout.proofs import NOT_KNOWN_HERE
from pytest_gpulayout.testing import FakeServer, FakeTopologySource
from tests.support.processes import FAKE_VLLM, end_with_segments, server_spec, wait_until
from tests.support.running_vllm import RunningVllm

TP1, TP2 = parse_layout("tp1"), parse_layout("tp2")
STARTED_S = 1_763_700_000.0


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def vllm() -> Iterator[RunningVllm]:
    with RunningVllm() as running:
        yield running


def quiet(text: str) -> None:
    """Show no progress."""


def attach(vllm: RunningVllm, layout: str = "tp2", *, nccl_logs: str = "", model: str = "org/tiny") -> AttachedServer:
    spec = server_spec(layout, platform="cuda", model=model)
    return Attachment(vllm.url, "cuda", nccl_logs=nccl_logs).launch(spec, quiet)


# -- what it says ----------------------------------------------------------------------------------------------------


def test_a_server_that_says_it_is_the_layout_is_attached_to(vllm: RunningVllm) -> None:
    server = attach(vllm)

    assert server.proof.is_attached
    assert (server.proof.vllm_version, server.proof.fingerprint) == ("0.32.0", vllm.fingerprint)
    assert (server.proof.start_s, server.proof.rank_pids, server.started_s) == (None, {}, STARTED_S)
    assert (server.endpoint.url, server.endpoint.model) == (vllm.url, "org/tiny")
    assert "its arguments" in server.proof.not_proved
    assert (server.log, server.command, server.nccl_logs(), server.mapped_segments()) == (None, (), [], {})
    assert server.gpu_processes() is None
    assert server.surroundings().ranks == {}
    assert server.parts() == (server,)


def test_it_is_neither_stopped_nor_changed(vllm: RunningVllm) -> None:
    server = attach(vllm)
    server.stop()
    server.stop()

    server.check_alive()
    assert {asked for asked in vllm.asked if asked.startswith("POST")} == {"POST /v1/completions"}
    assert vllm.asked.count("POST /v1/completions") == 1


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_address_may_be_that_of_the_api(vllm: RunningVllm, suffix: str) -> None:
    server = Attachment(vllm.url + suffix, "cuda").launch(server_spec(platform="cuda", model="org/tiny"), quiet)

    assert server.endpoint.url == vllm.url


@pytest.mark.parametrize(
    ("fingerprint", "message"),
    [
        (None, "the server does not say which layout it runs: system_fingerprint is 'None', "),
        ("fp_44709d6fcb", "the server does not say which layout it runs: system_fingerprint is 'fp_44709d6fcb', "),
        ("vllm-0.32.0-tp4-abcdef12", "the server is not the layout that was asked for: the server says it is tp4, "),
        ("vllm-0.32.0-abcdef12", "the server is not the layout that was asked for: the server says it is tp1, "),
    ],
)
def test_a_server_that_does_not_confirm_the_layout_is_refused(
    vllm: RunningVllm, fingerprint: str | None, message: str
) -> None:
    vllm.fingerprint = fingerprint

    with pytest.raises(ServerStartFailed) as error:
        attach(vllm)

    assert str(error.value).startswith(message)
    assert f"POST {vllm.url}/v1/completions" in str(error.value)


def test_a_configuration_that_is_told_is_evidence_also_against_a_fingerprint_without_sizes(vllm: RunningVllm) -> None:
    vllm.fingerprint = "vllm-0.32.0-abcdef12"
    vllm.info = {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "data_parallel_size": 1}
    with pytest.raises(ServerStartFailed, match="the server says it is tp2, tp1 was asked for"):
        attach(vllm, "tp1")

    vllm.info["tensor_parallel_size"] = 1
    server = attach(vllm, "tp1")
    assert server.proof.info is not None
    assert not [text for text in server.proof.not_proved if "and no more" in text]


def test_context_parallelism_needs_the_configuration(vllm: RunningVllm) -> None:
    vllm.fingerprint = "vllm-0.32.0-tp4-abcdef12"
    with pytest.raises(ServerStartFailed, match="a server that tells whether it is tp4dcp2 was required"):
        attach(vllm, "tp4dcp2")

    sizes = {"tensor_parallel_size": 4, "pipeline_parallel_size": 1, "data_parallel_size": 1}
    vllm.info = {**sizes, "decode_context_parallel_size": 2}
    assert attach(vllm, "tp4dcp2").proof.info is not None


def test_replicas_are_refused(vllm: RunningVllm) -> None:
    with pytest.raises(UnsupportedLayoutError, match="a layout of one server was required"):
        attach(vllm, "tp2x2")


def test_a_server_that_cannot_compute_is_refused(vllm: RunningVllm) -> None:
    vllm.completion = 500

    with pytest.raises(ServerStartFailed, match=r"found HTTP 500: engine is dead\n  where: .*model org/tiny\n"):
        attach(vllm)


def test_several_servers_behind_one_address_are_refused(vllm: RunningVllm) -> None:
    vllm.starts = [STARTED_S, STARTED_S + 60]

    with pytest.raises(ServerStartFailed) as error:
        attach(vllm)

    first, second, third = str(error.value).split("\n")
    assert first == (
        "one server was required, found 2 behind one address: started 2025-11-21T04:40:00Z, 2025-11-21T04:41:00Z"
    )
    assert second == f"  where: {vllm.url}/metrics, asked on 4 connections"
    assert "give the address of one of them" in third


def test_a_server_that_does_not_tell_its_start_may_be_several_and_that_is_listed(vllm: RunningVllm) -> None:
    vllm.starts = [None]

    server = attach(vllm)

    assert server.started_s is None
    assert "that one server alone answers there (let its /metrics be reached)" in server.proof.not_proved
    server.check_alive()


# -- models and the key ----------------------------------------------------------------------------------------------


def card(name: str, root: str, parent: str | None = None) -> dict[str, object]:
    return {"id": name, "root": root, "parent": parent}


@pytest.mark.parametrize(
    ("models", "wanted", "name"),
    [
        ([card("chat", "org/tiny")], None, "chat"),
        ([card("chat", "org/tiny")], "chat", "chat"),
        ([card("chat", "org/tiny")], "org/tiny", "chat"),
        ([card("chat", "/models/x"), card("x", "/models/x")], None, "chat"),
        ([card("chat", "/models/x"), card("lora", "/loras/a", "chat")], None, "chat"),
        ([card("chat", "/models/x"), card("lora", "/loras/a", "chat")], "lora", "lora"),
        ([{"id": "m"}], None, "m"),
    ],
)
def test_the_model_is_what_the_server_names(
    vllm: RunningVllm, models: list[dict[str, object]], wanted: str | None, name: str
) -> None:
    vllm.models = models

    assert Attachment(vllm.url, "cuda").served(wanted) == name


@pytest.mark.parametrize(
    ("models", "wanted", "required"),
    [
        ([card("a", "org/a"), card("b", "org/b")], None, "one model was required of the server, found a, b"),
        ([card("a", "org/a")], "org/b", "the model org/b was required of the server, found a"),
    ],
)
def test_another_model_is_refused_with_what_it_serves(
    vllm: RunningVllm, models: list[dict[str, object]], wanted: str | None, required: str
) -> None:
    vllm.models = models

    with pytest.raises(ServerError) as error:
        Attachment(vllm.url, "cuda").served(wanted)

    assert str(error.value).split("\n") == [
        required,
        f"  at {vllm.url}/v1/models",
        "  ask for what it serves: --gpu-model=a",
    ]


def test_its_key_comes_from_the_environment_and_is_never_shown(
    vllm: RunningVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm.key = "hush"
    with pytest.raises(MeasurementError, match=rf"it asks for a key\n.*\n  put its key into .* {KEY_VARIABLE}$"):
        Attachment(vllm.url, "cuda").check(None)
    monkeypatch.setenv(KEY_VARIABLE, "wrong-one")
    with pytest.raises(MeasurementError, match="it refuses the key") as error:
        Attachment(vllm.url, "cuda").check(None)
    monkeypatch.setenv(KEY_VARIABLE, "hush")

    server = attach(vllm)

    assert "wrong-one" not in str(error.value)
    assert server.endpoint.api_key == "hush"
    assert "hush" not in repr(server)


def test_nobody_there_is_told() -> None:
    attachment = Attachment(f"http://127.0.0.1:{free_port()}", "cuda")

    with pytest.raises(MeasurementError, match="a server that takes connections is needed"):
        attachment.check(None)
    assert attachment.summary() == "a server that takes connections is needed"
    with pytest.raises(ServerStartFailed, match="a server that takes connections is needed"):
        attachment.launch(server_spec(platform="cuda"), quiet)


def test_a_line_says_what_will_be_gated(vllm: RunningVllm) -> None:
    assert Attachment(vllm.url, "cuda").summary() == f"vLLM 0.32.0 at {vllm.url}, which serves org/tiny"
    vllm.version = None
    assert Attachment(vllm.url, "cuda").summary().startswith("vLLM of unknown version at ")


# -- while it is used ------------------------------------------------------------------------------------------------


def test_a_server_that_goes_away_or_comes_back_anew_is_told(vllm: RunningVllm) -> None:
    server = attach(vllm)
    server.check_alive()
    vllm.health = 503
    with pytest.raises(ServerExited, match=r"went away while it was in use\n  found: HTTP 503\n  at http"):
        server.check_alive()
    vllm.health, vllm.starts = 404, [STARTED_S]
    server.check_alive()
    vllm.starts = [STARTED_S + 1]
    with pytest.raises(ServerExited, match="found: another process answers: it was started anew"):
        server.check_alive()


def test_a_server_that_does_not_listen_any_more_is_told() -> None:
    with RunningVllm() as vllm:
        server = attach(vllm)
    with pytest.raises(ServerExited, match=r"(?s)went away while it was in use\n  found: .*\n  look at its log"):
        server.check_alive()


# -- logs of NCCL ----------------------------------------------------------------------------------------------------


def nccl_logs(folder: Path, transport: str = "P2P/CUMEM") -> str:
    """Logs of some tp2 server, as a pattern."""
    FakeServer(server_spec(platform="cuda"), folder, transport=transport)
    return str(folder / "nccl" / "*.log")


def unknown_place(server: AttachedServer) -> PlacedLayout:
    layout = server.spec.layout
    topology = Attachment(server.endpoint.url, "cuda").topology_of(layout)
    return place_layout(topology, layout, tuple(map(str, range(layout.ranks))), parse_requirement("any"))


@pytest.mark.parametrize(
    ("transport", "verdict"), [("P2P/CUMEM", "ok"), ("NET/Socket/0", "socket"), ("SHM/direct/direct", "shm")]
)
def test_given_logs_prove_the_transport(vllm: RunningVllm, tmp_path: Path, transport: str, verdict: str) -> None:
    server = attach(vllm, nccl_logs=nccl_logs(tmp_path, transport))

    report = collect_transport(server, unknown_place(server))

    assert (report.verdict, set(report.transports)) == (verdict, {transport})
    assert server.nccl_log_obstacle() is None
    assert "that the NCCL logs are of this server and of no other" in server.proof.not_proved


def test_without_logs_the_transport_is_not_proved_and_it_is_said_what_to_type(vllm: RunningVllm) -> None:
    server = attach(vllm)

    report = collect_transport(server, unknown_place(server))

    assert report.verdict == "no-evidence"
    [finding] = [one for one in report.findings if "no line of NCCL" in one.cause]
    assert finding.advice.startswith("start the server with NCCL_DEBUG=INFO ")
    assert finding.advice.endswith("--gpu-nccl-log='/shared/nccl.*.log'")


def test_one_rank_needs_no_logs(vllm: RunningVllm) -> None:
    vllm.fingerprint = "vllm-0.32.0-abcdef12"
    server = attach(vllm, "tp1")

    assert collect_transport(server, unknown_place(server)).verdict == "ok"


def test_a_pattern_that_matches_nothing_is_told(vllm: RunningVllm, tmp_path: Path) -> None:
    (tmp_path / "nccl.folder").mkdir()
    server = attach(vllm, nccl_logs=f"{tmp_path}/nccl.*")

    assert server.nccl_logs() == []
    assert server.nccl_log_obstacle() == (
        f"--gpu-nccl-log={tmp_path}/nccl.* matches no file: name those that the server's processes write"
    )


def test_logs_that_are_older_than_the_server_are_of_another_one(vllm: RunningVllm, tmp_path: Path) -> None:
    pattern = nccl_logs(tmp_path)
    old, new = sorted((tmp_path / "nccl").iterdir())
    os.utime(old, (STARTED_S - CLOCKS_S - 1,) * 2)
    os.utime(new, (STARTED_S - CLOCKS_S + 1,) * 2)
    server = attach(vllm, nccl_logs=pattern)

    assert server.nccl_logs() == [new]
    obstacle = server.nccl_log_obstacle()
    assert obstacle is not None
    assert obstacle.startswith(f"1 of 2 files of --gpu-nccl-log, such as {old}, were last written before the server")
    assert collect_transport(server, unknown_place(server)).verdict == "no-evidence"


# -- devices ---------------------------------------------------------------------------------------------------------


def test_of_a_server_elsewhere_the_devices_are_unknown(vllm: RunningVllm) -> None:
    attachment = Attachment(vllm.url, "cuda")

    topology = attachment.topology_of(TP2)

    assert (topology.source, len(topology.devices)) == (NOT_KNOWN_HERE, 2)
    assert attachment.devices_of(TP2, topology) == ("0", "1")
    assert not attachment.sees_devices


def test_a_recorded_topology_says_which_they_are_where_there_is_no_choice(vllm: RunningVllm) -> None:
    attachment = Attachment(vllm.url, "cuda", recorded=FakeTopologySource(gpus=2))
    topology = attachment.topology_of(TP2)

    assert attachment.devices_of(TP2, topology) == ("0", "1")
    server = attachment.launch(server_spec(platform="cuda", model="org/tiny"), quiet)
    assert not [text for text in server.proof.not_proved if text.startswith("its topology")]
    many = FakeTopologySource(gpus=8).probe()
    with pytest.raises(TopologyError, match=r"2 devices .* required, found 8\n.*\n.*: --gpu-devices=0,1$"):
        attachment.devices_of(TP2, many)


def test_a_recorded_topology_that_cannot_be_read_is_told(vllm: RunningVllm, tmp_path: Path) -> None:
    attachment = Attachment(vllm.url, "cuda", recorded=RecordedTopology(tmp_path / "missing.json"))

    with pytest.raises(TopologyError, match="a recorded topology was expected, found none"):
        attachment.topology_of(TP2)


# -- on this host ----------------------------------------------------------------------------------------------------


@contextmanager
def somebody_s_server(layout_size: int = 2, *, model: str = "org/tiny", **behaviour: object) -> Iterator[str]:
    """A fake vLLM that somebody else has started; its address."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    environment = {
        **os.environ,
        "PYTHONPATH": str(FAKE_VLLM),
        "FAKE_VLLM": json.dumps(behaviour),
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(layout_size))),
    }
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--tensor-parallel-size", str(layout_size)],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(url) or process.poll() is not None, "the fake vLLM answers")
        assert process.poll() is None
        yield url
        assert process.poll() is None, "it was ended by somebody else"
    finally:
        end_with_segments(process)


def answers(url: str) -> bool:
    try:
        Attachment(url, "cuda").find()
    except MeasurementError:
        return False
    return True


def spec_on(attachment: Attachment, layout: str, platform: Platform) -> tuple[ServerSpec, PlacedLayout]:
    wanted = parse_layout(layout)
    topology = attachment.topology_of(wanted)
    requested = attachment.devices_of(wanted, topology)
    placed = place_layout(topology, wanted, requested, parse_requirement("any"))
    return ServerSpec(wanted, "org/tiny", (), platform, placed.devices, sys.executable, 10), placed


class Driver:
    """Lists the processes on GPUs. :param contexts: indices of GPUs by process id."""

    def __init__(self, contexts: Mapping[int, int]) -> None:
        self.contexts = dict(contexts)

    def snapshot(self) -> Occupancy:
        gpus = [device.uuid or "" for device in FakeTopologySource(gpus=4).probe().devices]
        return Occupancy(
            tuple(GpuUse(index, uuid, 0) for index, uuid in enumerate(gpus)),
            tuple(GpuProcess(gpus[index], pid, 2**30) for pid, index in self.contexts.items()),
        )

    def describe(self, pid: int) -> str:
        return "python train.py (user bob)" if pid in self.contexts else ""


@pytest.mark.end_to_end
def test_on_this_host_ranks_cores_and_shared_memory_are_evidence() -> None:
    with somebody_s_server() as url:
        attachment = Attachment(url, "cpu")
        spec, placed = spec_on(attachment, "tp2", "cpu")
        server = attachment.launch(spec, quiet)

        assert attachment.sees_devices
        assert [device.cpu_affinity for device in placed.devices] == ["0", "1"]
        assert sorted(server.proof.rank_pids) == [0, 1]
        report = collect_transport(server, placed)
        assert (report.verdict, report.transports) == ("ok", {"CPU/SHM": 2})
        assert not [text for text in server.proof.not_proved if "cores" in text or "ranks" in text]
        assert server.gpu_processes() is None
        assert set(server.surroundings().ranks) == {0, 1}
        server.stop()
        server.check_alive()


@pytest.mark.end_to_end
def test_a_server_here_with_more_ranks_than_it_says_is_refused() -> None:
    with somebody_s_server(fingerprint="vllm-0.32.0-abcdef12") as url:
        attachment = Attachment(url, "cpu")
        spec, _ = spec_on(attachment, "tp1", "cpu")

        with pytest.raises(ServerStartFailed, match=r"tp1 has 1 ranks?, found 2 that compute\n  where: below pid "):
            attachment.launch(spec, quiet)


@pytest.mark.end_to_end
def test_on_this_host_the_gpus_of_its_ranks_are_seen_and_so_is_everybody_else_there() -> None:
    with somebody_s_server() as url:
        driver = Driver({})
        attachment = Attachment(url, "cuda", gpus=lambda: FakeTopologySource(gpus=4), gpu_processes=lambda: driver)
        elsewhere, _ = spec_on(attachment, "tp2", "cuda")
        pids = attachment.launch(elsewhere, quiet).proof.rank_pids
        assert (attachment.sees_devices, elsewhere.devices[0].uuid) == (False, None)

        driver.contexts = {pids[0]: 3, pids[1]: 1}
        seeing = Attachment(url, "cuda", gpus=lambda: FakeTopologySource(gpus=4), gpu_processes=lambda: driver)
        spec, placed = spec_on(seeing, "tp2", "cuda")
        server = seeing.launch(spec, quiet)
        assert (placed.placement, seeing.sees_devices) == ((3, 1), True)
        report = server.gpu_processes()
        assert report is not None
        assert (report.proved_by, report.violations) == ("process list", ())

        driver.contexts[2**22 + 7] = 1
        report = server.gpu_processes()
        assert report is not None
        assert [violation.kind for violation in report.violations] == ["foreign"]


@pytest.mark.end_to_end
def test_a_host_whose_gpus_cannot_be_asked_tells_of_processes_alone() -> None:
    def broken() -> FakeTopologySource:
        return FakeTopologySource(error=TopologyError("no NVIDIA driver was found"))

    with somebody_s_server() as url:
        attachment = Attachment(url, "cuda", gpus=broken, gpu_processes=lambda: Driver({}))
        spec, placed = spec_on(attachment, "tp2", "cuda")
        server = attachment.launch(spec, quiet)

        assert placed.topology.source == NOT_KNOWN_HERE
        assert sorted(server.proof.rank_pids) == [0, 1]
        assert server.gpu_processes() is None


def test_errors_are_of_this_package(vllm: RunningVllm) -> None:
    vllm.models = []

    with pytest.raises(GpuLayoutError, match="no list of models"):
        Attachment(vllm.url, "cuda").check(None)
