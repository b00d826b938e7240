"""``--gpu-server-url`` and ``--gpu-nccl-log``: the gate of a server that somebody else runs."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.adapters.attached_server import KEY_VARIABLE
from pytest_gpulayout.adapters.vllm_process import free_port
from pytest_gpulayout.testing import FakeServer, FakeTopologySource
from pytest_gpulayout.topology_document import topology_to_document
from tests.plugin.test_gpu_server import RESULTS, Host, host, library  # noqa: F401 - the last two are fixtures
from tests.support.processes import end_with_segments, server_spec, somebody_computes, wait_until
from tests.support.running_vllm import RunningVllm
from tests.support.suite import Suite

CONFTEST = """
from pytest_gpulayout.errors import *
from pytest_gpulayout.testing import *
from pytest_gpulayout.trace import *
from pytest_gpulayout.telemetry import *

def pytest_gpulayout_load_driver(settings):
    return FakeLoadDriver({driver})
"""
SUITE = "from pytest_gpulayout.gates.test_gate import test_layout, test_links, test_performance, test_transport\n"
SPEED = ("-k", "performance")
NEW = ("--gpu-baseline=new", "--gpu-write-in-ci=yes")


class Gate:
    """The built-in gate on a server that runs, with a load driver that computes its numbers."""

    def __init__(self, pytester: pytest.Pytester, vllm: RunningVllm) -> None:
        self.suite = Suite(pytester, model=None)
        self.vllm = vllm
        self.driver()
        self.suite.write(test_it=SUITE)

    def driver(self, arguments: str = "") -> None:
        self.suite.pytester.makeconftest(CONFTEST.format(driver=arguments))

    def run(self, *arguments: str, layout: str = "tp2") -> pytest.RunResult:
        url = f"--gpu-server-url={self.vllm.url}"
        return self.suite.run(f"--gpu-layout={layout}", url, "--gpu-results=results.json", *arguments)

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.suite.read_results()["records"] if record["kind"] == kind]


@pytest.fixture
def gate(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with RunningVllm() as vllm:
        yield Gate(pytester, vllm)


@pytest.fixture
def logs(pytester: pytest.Pytester) -> Path:
    """NCCL's logs of a healthy tp2."""
    FakeServer(server_spec(platform="cuda"), pytester.path / "there", transport="P2P/CUMEM")
    return pytester.path / "there" / "nccl"


# -- the gate --------------------------------------------------------------------------------------------------------


def test_a_healthy_server_is_recorded_then_judged_and_what_is_not_proved_is_listed(gate: Gate, logs: Path) -> None:
    recorded = gate.run(f"--gpu-nccl-log={logs}/*.log", *NEW)
    recorded.assert_outcomes(passed=3)
    recorded.stdout.fnmatch_lines(["*1 baseline recorded*"])
    gate.suite.settle()

    result = gate.run("--gpu-nccl-log=there/nccl/*.log")

    result.assert_outcomes(passed=4)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(
        [
            f"gpu layout: tp2 on cuda, vLLM 0.32.0 at {gate.vllm.url}, which serves org/tiny",
            "gpu layout: nothing is started here: the server is judged by what it says and shows",
            f"tp2: attached to vLLM 0.32.0 at {gate.vllm.url}",
            f"tp2: worst link unknown, transport P2P/CUMEM x*, vLLM 0.32.0, attached at {gate.vllm.url}",
            "  not proved: its topology (record it on its host: gpulayout topo --json > topology.json; then *",
            "  not proved: its arguments",
            "  smoke: pass, 1 server start  [[]*",
            "    not proved of the server, which somebody else runs: its topology; that it runs on GPUs, *",
            "    it is one server start, which is not repeated: *",
            "    its hardware is unknown: the baseline is of whatever answers at 127.0.0.1:*",
        ]
    )
    [server] = gate.records("server")
    assert (server["attached"], server["start_s"], server["command"]) == (gate.vllm.url, None, [])
    assert "its arguments" in server["not_proved"]
    assert server["proved"][0] == "its layout (system_fingerprint vllm-0.32.0-tp2-abcdef12)"
    [performance] = gate.records("performance")
    assert performance["identity"]["key"]["hardware"]["device"].startswith("unknown GPU at 127.0.0.1:")
    assert performance["identity"]["sut"] == {"vllm": "0.32.0"}
    assert any(reason.startswith("not proved of the server") for reason in performance["reasons"])


def test_the_server_is_asked_and_never_changed(gate: Gate) -> None:
    gate.run(*SPEED, *NEW)

    assert {asked for asked in gate.vllm.asked if asked.startswith("POST")} == {"POST /v1/completions"}


def test_without_logs_the_transport_fails_as_missing_evidence_and_says_what_to_type(gate: Gate) -> None:
    result = gate.run("-k", "transport or links")

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["transports allowed between ranks: *", "*NCCL_DEBUG=INFO*--gpu-nccl-log='/shared/nccl.[*].log'*"]
    )


def test_a_test_that_does_not_ask_for_the_transport_needs_no_logs(gate: Gate) -> None:
    gate.run("-k", "layout").assert_outcomes(passed=1)


def test_one_rank_needs_no_logs_and_is_not_proved_to_be_one(gate: Gate) -> None:
    gate.vllm.fingerprint = "vllm-0.32.0-abcdef12"

    result = gate.run("-k", "transport or layout", layout="tp1")

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["  not proved: that it has 1 rank and no more (--fingerprint-mode=hash *"])


def test_how_many_nodes_it_spans_is_not_told_by_its_fingerprint(gate: Gate) -> None:
    gate.vllm.fingerprint = "vllm-0.32.0-tp8-pp2-abcdef12"

    result = gate.run("-k", "links or layout", layout="tp8pp2@2")

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["  not proved: that it spans 2 nodes"])


def test_replicas_are_refused(gate: Gate) -> None:
    result = gate.run("-k", "layout", layout="tp2x2")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["a layout of one server was required with --gpu-server-url, found tp2x2"])
    assert "POST /v1/completions" not in gate.vllm.asked


def test_logs_with_a_socket_fail_the_gate(gate: Gate, pytester: pytest.Pytester) -> None:
    FakeServer(server_spec(platform="cuda"), pytester.path / "bad", transport="NET/Socket/0")

    result = gate.run("--gpu-nccl-log=bad/nccl/*", "-k", "transport")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*ranks 0 -> 1: transport NET/Socket/0, allowed: *"])


def test_another_layout_fails_each_test_that_needs_the_server(gate: Gate) -> None:
    gate.vllm.fingerprint = "vllm-0.32.0-tp4-abcdef12"

    result = gate.run()

    result.assert_outcomes(passed=1, errors=3)
    result.stdout.fnmatch_lines(
        [
            "the server is not the layout that was asked for: the server says it is tp4, tp2 was asked for *",
            f"  where: system_fingerprint of POST {gate.vllm.url}/v1/completions",
            "  ask for what it is: --gpu-layout=tp4; *",
        ]
    )


def test_links_that_are_required_need_a_topology(gate: Gate, pytester: pytest.Pytester) -> None:
    unknown = gate.run("--gpu-link=nvlink", "-k", "links")
    unknown.assert_outcomes(failed=1)
    unknown.stdout.fnmatch_lines(
        [
            "links of class nvlink or better are required *",
            "  rank 0 - rank 1: unknown *",
            "  layout tp2 on 2 x unknown GPU at 127.0.0.1:*, topology from not known from here",
            "  the topology of a server that runs elsewhere is not known from here: record it on its host: *",
        ]
    )
    document = topology_to_document(FakeTopologySource(gpus=2).probe())
    (pytester.path / "topology.json").write_text(json.dumps(document))

    known = gate.run("--gpu-link=nvlink", "--gpu-topology=topology.json", "-k", "links or performance", *NEW)

    known.assert_outcomes(passed=1)
    known.stdout.fnmatch_lines(["tp2: worst link NV18 (recorded in topology.json), *", "*1 baseline recorded*"])
    [performance] = gate.records("performance")
    assert performance["identity"]["key"]["hardware"]["device"] == "NVIDIA H200"
    assert not any("hardware is unknown" in reason for reason in performance["reasons"])


def test_of_a_larger_recorded_machine_the_gpus_must_be_named(gate: Gate, pytester: pytest.Pytester) -> None:
    document = topology_to_document(FakeTopologySource(gpus=8).probe())
    (pytester.path / "topology.json").write_text(json.dumps(document))

    unnamed = gate.run("--gpu-topology=topology.json", "-k", "links")
    named = gate.run("--gpu-topology=topology.json", "--gpu-devices=6,2", "-k", "links")

    unnamed.assert_outcomes(errors=0, failed=1)
    unnamed.stdout.fnmatch_lines(["the 2 devices that the server uses were required, found 8"])
    named.assert_outcomes(passed=1)
    [topology] = gate.records("topology")
    assert [device["index"] for device in topology["devices"]] == [6, 2]


# -- one start -------------------------------------------------------------------------------------------------------


def test_an_open_verdict_never_advises_more_starts_or_pairs(gate: Gate) -> None:
    gate.driver("noise=0.2, seed=3")
    gate.run(*SPEED, *NEW)

    result = gate.run(*SPEED)

    result.stdout.fnmatch_lines(
        ["  smoke: inconclusive, 1 server start  *", "*cannot be ruled out with 1 start now *"]
    )
    result.stdout.no_fnmatch_line("*--gpu-starts*")
    [performance] = gate.records("performance")
    assert len(performance["runs"]) == 1
    reasons = performance["reasons"]
    assert not any("allow more starts" in one or "(--gpu-base)" in one or "10 starts" in one for one in reasons)


def test_a_regression_is_called_on_its_one_start(gate: Gate) -> None:
    gate.run(*SPEED, *NEW)
    gate.suite.settle()
    gate.driver("slow_down=1.5")

    result = gate.run(*SPEED)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["regression: median_ttft_ms 30.0 ms, *", "*n = 1 start against *"])


def test_what_disturbed_the_one_start_is_measured_again_on_the_same_server(gate: Gate) -> None:
    gate.driver(
        "observations=Observations(telemetry=Telemetry("
        "source='NVML', interval_s=0.5, sample_ns=(0, 10**9), devices=("
        "DeviceTelemetry(name='GPU 0', throttled={'hw_slowdown': 1.0}),)))"
    )

    result = gate.run(*SPEED, *NEW)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*server start 1 was disturbed, and is measured anew *", "tp2: smoke: once more on the same server"]
    )
    assert gate.vllm.asked.count("POST /v1/completions") == 1


def test_a_server_that_goes_away_is_told_and_nothing_is_tried_to_bring_it_back(gate: Gate) -> None:
    gate.suite.write(
        test_it="""
        def test_it(vllm_server, measure):
            measure()
        """
    )
    gate.driver("errors={1: MeasurementError('all requests failed')}")
    gate.vllm.health = 503

    result = gate.run()

    result.stdout.fnmatch_lines(
        ["the server that was attached to went away while it was in use", "  found: HTTP 503"]
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_a_fresh_start_is_refused(gate: Gate) -> None:
    gate.suite.write(test_it="def test_it(vllm_server, gpu_session): gpu_session.servers.restart()")

    result = gate.run()

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["a fresh start of the server was required, and somebody else runs it: *"])


def test_its_log_is_not_at_hand(gate: Gate) -> None:
    gate.suite.write(test_it="def test_it(vllm_server): vllm_server.log")

    result = gate.run()

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["the log of the server was required, and it is not at hand: *"])


# -- the model and the key -------------------------------------------------------------------------------------------


def test_the_model_may_be_named_by_what_its_weights_came_from(gate: Gate) -> None:
    gate.vllm.models = [{"id": "chat", "root": "/models/there"}]
    gate.suite.write(
        test_it="""
        import pytest

        @pytest.mark.gpu_model("/models/there")
        def test_marked(vllm_server): assert vllm_server.model == "chat"

        def test_left_out(vllm_server): assert vllm_server.model == "chat"
        """
    )

    gate.run().assert_outcomes(passed=2)
    gate.run("--gpu-model=/models/there").assert_outcomes(passed=2)


def test_another_model_is_refused_before_anything_is_measured(gate: Gate) -> None:
    result = gate.run("--gpu-model=org/other")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: the model org/other was required of the server, found org/tiny", "*", "*--gpu-model=org/tiny"]
    )


def test_the_key_comes_from_the_environment_and_is_nowhere_shown(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester
) -> None:
    gate.vllm.key = "hush-hush"
    refused = gate.run()
    monkeypatch.setenv(KEY_VARIABLE, "hush-hush")
    accepted = gate.run("-k", "layout", "-vv", "--showlocals")

    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["ERROR: a server to gate that answers was required, found HTTP 401: it asks *"])
    accepted.assert_outcomes(passed=1)
    accepted.stdout.no_fnmatch_line("*hush-hush*")
    assert "hush-hush" not in gate.suite.results.read_text()


def test_arguments_of_a_fixture_are_refused(gate: Gate) -> None:
    gate.suite.write(
        test_it="""
        import pytest

        @pytest.fixture
        def gpu_vllm_args(): return ("--enforce-eager",)

        def test_it(vllm_server): pass
        """
    )

    result = gate.run()

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["no arguments were required for a server that already runs, found --enforce-eager", "*gpu_vllm_args"]
    )


# -- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-base=http://h"], "--gpu-server-url and --gpu-base were both asked for: *"),
        (["--gpu-base-vllm-args="], "--gpu-server-url and --gpu-base-vllm-args were both asked for: *"),
        (["--gpu-vllm-args=--seed 1"], "--gpu-server-url and --gpu-vllm-args were both asked for: *no arguments"),
        (["--gpu-devices=0,1"], "--gpu-server-url and --gpu-devices were both asked for: *--gpu-topology=FILE*"),
        (["--gpu-nodes=a,b"], "--gpu-server-url and --gpu-nodes were both asked for: *"),
        (["--gpu-starts=3"], "--gpu-starts *: 1 start was expected with --gpu-server-url, found 3: *"),
        (["--gpu-layout=tp1"], "one layout was expected with --gpu-server-url, found tp2,tp1"),
    ],
)
def test_what_cannot_go_with_it_is_told_before_anything_is_asked(
    gate: Gate, arguments: list[str], message: str
) -> None:
    result = gate.run(*arguments)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {message}"])
    assert gate.vllm.asked == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:secret@h:1", "*: a URL without user, key and query was expected"),
        ("me:secret@h:1", "*: a URL without user, key and query was expected"),
        ("http://h:1?key=secret", "*: a URL without user, key and query was expected"),
        ("h:1", "*: a URL such as http://HOST:8000 was expected, found 'h:1'"),
        ("http://", "*: a URL with a host was expected, found 'http://'"),
    ],
)
def test_an_address_is_checked_and_a_secret_in_it_not_repeated(suite: Suite, url: str, message: str) -> None:
    suite.write(test_it="def test_it(): pass")

    result = suite.run("--gpu-layout=tp1", f"--gpu-server-url={url}")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --gpu-server-url (ini: gpulayout_server_url){message}"])
    result.stderr.no_fnmatch_line("*secret*")


def test_logs_without_a_server_are_misuse(suite: Suite) -> None:
    suite.write(test_it="def test_it(): pass")

    result = suite.run("--gpu-layout=tp1", "--gpu-nccl-log=nccl.*")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --gpu-nccl-log: the logs of a server that somebody else runs were given*"])


def test_an_option_of_the_ini_file_can_be_emptied(gate: Gate) -> None:
    gate.suite.ini("gpulayout_vllm_args = --seed 1")

    refused = gate.run("-k", "layout")
    accepted = gate.run("-k", "layout", "--gpu-vllm-args=")

    refused.stderr.fnmatch_lines(["*  leave one of them out; * has gpulayout_vllm_args, empty it: --gpu-vllm-args="])
    accepted.assert_outcomes(passed=1)


def test_nobody_there_is_told_before_any_test(gate: Gate, pytester: pytest.Pytester) -> None:
    with RunningVllm() as gone:
        url = gone.url

    result = gate.suite.run("--gpu-layout=tp2", f"--gpu-server-url={url}")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: a server that takes connections is needed"])


# -- on a machine with GPUs, where the server's processes are seen ---------------------------------------------------


@contextmanager
def somebody_s_server(host: Host, gpus: list[int]) -> Iterator[str]:  # noqa: F811
    """A fake vLLM on these GPUs, which nobody of us has started; its address."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "org/model"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--tensor-parallel-size", str(len(gpus))]
    environment = {
        **host.environment,
        "CUDA_VISIBLE_DEVICES": ",".join(host.uuids[index] for index in gpus),
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_FILE": str(host.folder / "nccl.%h.%p.log"),
    }
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: listens(port), "the fake vLLM listens")
            yield f"http://127.0.0.1:{port}"
            assert process.poll() is None, "it was ended by the gate"
        finally:
            end_with_segments(process)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_its_gpus_are_those_that_its_ranks_compute_on_and_not_the_best_ones(host: Host) -> None:  # noqa: F811
    with somebody_s_server(host, [1, 3]) as url:
        code, text = host.run("--gpu-layout=tp2", f"--gpu-server-url={url}", "--gpu-nccl-log=nccl.*", RESULTS)

    assert code == 0, text
    assert f"tp2: worst link SYS, transport P2P/CUMEM x4, vLLM 0.32.0, attached at {url}\n" in text
    assert "  processes: each rank on its GPU and no other (process list)\n" in text
    ranks = host.record("processes")["ranks"]
    assert [(rank["rank"], rank["index"]) for rank in ranks] == [(0, 1), (1, 3)]
    assert [device["index"] for device in host.record("topology")["devices"]] == [1, 3]
    server = host.record("server")
    assert {str(rank["rank"]): rank["pid"] for rank in ranks} == server["rank_pids"]
    assert "its topology (NVML)" in server["proved"]
    assert not [text for text in server["not_proved"] if "GPUs" in text or "devices" in text]


def test_somebody_else_on_its_gpus_fails_the_gate_and_is_named(host: Host) -> None:  # noqa: F811
    with (
        somebody_s_server(host, [1, 3]) as url,
        somebody_computes(host.folder, host.uuids[3:], host.environment) as other,
    ):
        code, text = host.run("--gpu-layout=tp2", f"--gpu-server-url={url}", "-k", "layout")

    assert code == pytest.ExitCode.TESTS_FAILED, text
    assert f"  found: pid {other.pid} " in text
    assert f"is not of the server and computes on GPU 3 ({host.uuids[3]}), 16.0 GiB" in text


def test_its_links_are_judged_as_they_are(host: Host) -> None:  # noqa: F811
    with somebody_s_server(host, [1, 3]) as url:
        code, text = host.run("--gpu-layout=tp2", f"--gpu-server-url={url}", "--gpu-link=nvlink", "-k", "links")

    assert code == pytest.ExitCode.TESTS_FAILED, text
    assert "  rank 0 - rank 1: SYS (GPU 1 - GPU 3)" in text
