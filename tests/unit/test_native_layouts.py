"""Native factors started for real, on the fake vLLM: the command, the processes, what proves them, what does not."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_gpulayout.adapters import device_lock, vllm_process
from pytest_gpulayout.adapters.vllm_process import VllmLauncher, VllmServer
from pytest_gpulayout.errors import ServerStartFailed
from pytest_gpulayout.transport_cpu import judge_cpu
from pytest_gpulayout.vllm_log import parse_vllm_log
from tests.support.processes import command_line, processes_marked, server_spec, use_fake_vllm

pytestmark = pytest.mark.end_to_end

Launch = Callable[..., VllmServer]


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """Launch a fake server; whatever happens to it, nothing of it is left after the test."""
    servers: list[VllmServer] = []
    with tempfile.TemporaryDirectory(prefix="gl-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setattr(device_lock, "LOCK_FOLDER", folder)
        monkeypatch.setattr(vllm_process, "_POLL_S", 0.05)
        monkeypatch.setattr(vllm_process, "TERM_TIMEOUT_S", 3.0)
        monkeypatch.setattr(vllm_process, "_DYING_S", 0.1)
        monkeypatch.setenv("TEST_MARKER", Path(folder).name)
        launcher = VllmLauncher(tmp_path)

        def launch(layout: str, **fake: object) -> VllmServer:
            use_fake_vllm(monkeypatch, **fake)
            servers.append(launcher.launch(server_spec(layout), lambda _: None))
            return servers[-1]

        yield launch
        for server in servers:
            server.stop()
        assert processes_marked(f"TEST_MARKER={Path(folder).name}") == {}
        assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("layout", "moe", "fingerprint", "titles"),
    [
        ("pp2", False, "-pp2", ["PP0", "PP1"]),
        ("tp2pp2", False, "-tp2-pp2", ["PP0_TP0", "PP0_TP1", "PP1_TP0", "PP1_TP1"]),
        ("dp2", False, "-dp2", ["", ""]),
        ("dp2tp2", False, "-tp2-dp2", ["TP0", "TP1", "TP0", "TP1"]),
        ("dp2", True, "-dp2", ["DP0", "DP1"]),
        ("dp2tp2ep", True, "-tp2-dp2-ep", ["DP0_TP0_EP0", "DP0_TP1_EP1", "DP1_TP0_EP2", "DP1_TP1_EP3"]),
        ("tp2ep", True, "-tp2-ep", ["TP0_EP0", "TP1_EP1"]),
        ("tp4dcp2", False, "-tp4", ["TP0_DCP0", "TP1_DCP1", "TP2_DCP0", "TP3_DCP1"]),
        ("tp2pcp2", False, "-tp2", ["PCP0_TP0", "PCP0_TP1", "PCP1_TP0", "PCP1_TP1"]),
        ("pcp2dcp2", False, "", ["PCP0_DCP0", "PCP1_DCP1"]),
    ],
)
def test_layout_is_proved(launch: Launch, layout: str, moe: bool, fingerprint: str, titles: list[str]) -> None:
    server = launch(layout, moe=moe, server_info={})
    proof = server.proof
    assert proof.fingerprint == f"vllm-0.32.0{fingerprint}-abcdef12"
    assert [command_line(proof.rank_pids[rank]) for rank in range(len(titles))] == [
        "_".join(filter(None, ["VLLM::Worker", title])) for title in titles
    ]
    assert proof.info is not None
    assert str(proof.info.layout) == layout
    assert (proof.moe, proof.api_servers) == (moe and server.spec.layout.dp > 1, 1)


def test_dense_ranks_lie_below_their_engines(launch: Launch) -> None:
    server = launch("dp2tp2")
    engines = {title.partition("_DP")[2]: pid for pid, title in server.pids().items() if "EngineCore_DP" in title}
    parents = [int(Path(f"/proc/{server.proof.rank_pids[rank]}/stat").read_text().split()[3]) for rank in range(4)]
    assert parents == [engines["0"], engines["0"], engines["1"], engines["1"]]
    assert "VLLM::DPCoordinator" in server.pids().values()


def test_command_names_every_factor(launch: Launch) -> None:
    command = launch("dp2tp2ep", moe=True).command
    first = command.index("--tensor-parallel-size")
    assert command[first:] == ["--tensor-parallel-size", "2", "--data-parallel-size", "2", "--enable-expert-parallel"]


@pytest.mark.parametrize("layout", ["tp2dcp2", "pcp2"])
def test_without_development_mode_titles_prove_what_no_fingerprint_names(launch: Launch, layout: str) -> None:
    assert launch(layout).proof.info is None


def test_server_says_another_factor_than_was_asked_for(launch: Launch) -> None:
    with pytest.raises(ServerStartFailed) as caught:
        launch("tp4dcp2", server_info={"decode_context_parallel_size": 1})
    first, where, advice = str(caught.value).splitlines()
    assert (
        first == "the server is not the layout that was asked for: the server says it is tp4, tp4dcp2 was asked for"
    )
    assert where.startswith("  where: GET http://127.0.0.1:")
    assert where.endswith("/server_info?config_format=json")
    assert advice == "  leave it to --gpu-layout: take what changes its factors out of the server's arguments"


def test_server_info_is_asked_only_where_the_fingerprint_leaves_something_open(launch: Launch) -> None:
    assert launch("tp2", server_info={}).proof.info is None


def test_engine_that_cannot_compute_is_found_before_the_server_is_used(launch: Launch) -> None:
    with pytest.raises(ServerStartFailed) as caught:
        launch("dp2", dead_engine=1)
    headline, cause, *_ = str(caught.value).splitlines()
    assert headline == "vLLM loaded layout dp2 and then failed at the first request"
    assert cause.startswith("  cause: engine 1: HTTP 500 ")


def test_missing_rank_of_the_second_engine(launch: Launch) -> None:
    with pytest.raises(ServerStartFailed) as caught:
        launch("dp2tp2", missing_worker=3)
    first, table, *_ = str(caught.value).splitlines()
    assert first == "layout dp2tp2 needs 4 worker processes, found none for rank 3"
    assert table == (
        "  process table of the server: VLLM::DPCoordinator, VLLM::EngineCore_DP0, VLLM::EngineCore_DP1, "
        "VLLM::Worker_TP0, VLLM::Worker_TP0, VLLM::Worker_TP1"
    )


@pytest.mark.parametrize(
    ("layout", "moe", "verdict", "transports"),
    [
        ("dp2", False, "ok", {}),
        ("dp2tp2", False, "ok", {"CPU/SHM": 4}),
        ("tp2pp2", False, "ok", {"CPU/SHM": 8}),
        ("tp2ep", True, "ok", {"CPU/SHM": 2}),
        ("dp2", True, "socket", {"CPU/GLOO": 2}),
        ("dp2ep", True, "socket", {"CPU/GLOO": 2}),
        ("dp2tp2ep", True, "socket", {"CPU/GLOO": 12, "CPU/SHM": 4}),
    ],
)
def test_transports_of_the_groups(
    launch: Launch, layout: str, moe: bool, verdict: str, transports: dict[str, int]
) -> None:
    server = launch(layout, moe=moe)
    facts = parse_vllm_log(server.log.read_text().splitlines())
    report = judge_cpu(server.spec.layout, facts, server.mapped_segments(), moe=server.proof.moe)
    assert (report.verdict, report.transports, report.gap) == (verdict, transports, None)
