"""Only these GPUs: what a user reads when a process computes where it must not, and ``--gpu-wait``."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_gpulayout import occupancy
from pytest_gpulayout.schemas import validate
from tests.support.processes import use_fake_vllm
from tests.support.suite import GATE, Suite

UUID = "GPU-00000000-0000-0000-0000-00000000000"
SERVED = "def test_it(vllm_server): pass"


def processes(suite: Suite, arguments: str, more: str = "") -> None:
    """Describe the process lists of the machine."""
    suite.fakes(launcher=f"wait_s=settings.wait_s, processes=FakeGpuProcesses({arguments})", more=more)


def test_proof_is_recorded_once_per_server_and_summed_up(suite: Suite) -> None:
    suite.write(
        test_it="""
        def test_it(vllm_server):
            report = vllm_server.gpu_processes
            assert [found.gpu.index for found in report.ranks] == [0, 1]
            assert not report.violations
        def test_again(vllm_server): pass
        def test_measure(measure): measure()
        """
    )

    result = suite.run("--gpu-layout=tp2", "--gpu-results=results.json")

    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["tp2: *", "  processes: each rank on its GPU and no other (process list)"])
    document = suite.read_results()
    assert validate(document, "results") == []
    (record,) = [record for record in document["records"] if record["kind"] == "processes"]
    assert record["ok"]
    assert [(rank["rank"], rank["index"], rank["uuid"]) for rank in record["ranks"]] == [
        (0, 0, f"{UUID}0"),
        (1, 1, f"{UUID}1"),
    ]


def test_rank_on_the_wrong_gpu(suite: Suite) -> None:
    processes(suite, "contexts={0: [1], 1: [0]}")
    suite.write(test_it=SERVED)

    result = suite.run("--gpu-layout=tp2", "--gpu-results=results.json")

    result.assert_outcomes(failed=1)
    start = result.outlines.index("each rank is required on its own GPU, on no other, and with nobody else beside it")
    pids = {rank: f"(pid {4194305 + rank} VLLM::Worker_TP{rank})" for rank in (0, 1)}
    assert result.outlines[start + 1 : start + 7] == [
        f"  found: rank 0 {pids[0]} has no context on GPU 0 ({UUID}0)",
        f"  found: rank 1 {pids[1]} has no context on GPU 1 ({UUID}1)",
        f"  found: rank 0 {pids[0]} holds a context on GPU 1 ({UUID}1), 16.0 GiB; its own is GPU 0 ({UUID}0)",
        f"  found: rank 1 {pids[1]} holds a context on GPU 0 ({UUID}0), 16.0 GiB; its own is GPU 1 ({UUID}1)",
        "  layout tp2 on GPU 0, 1, by the driver's lists (process list)",
        "  look for yourself: nvidia-smi --query-compute-apps=gpu_uuid,pid,used_memory --format=csv; end processes "
        "of others, or choose other GPUs: --gpu-devices=...",
    ]
    result.stdout.fnmatch_lines(["  processes: rank 0 * and 3 more (process list) FAILED"])
    document = suite.read_results()
    assert validate(document, "results") == []
    assert [record["ok"] for record in document["records"] if record["kind"] == "processes"] == [False]
    assert suite.events == ["start tp2 org/tiny", "stop tp2 org/tiny"]


def test_every_test_on_such_a_server_fails(suite: Suite) -> None:
    processes(suite, "contexts={0: [0, 3]}")
    suite.write(test_it="def test_a(vllm_server): pass\ndef test_b(vllm_server): pass")

    result = suite.run("--gpu-layout=tp1")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [f"  found: rank 0 (pid * VLLM::EngineCore) holds a context on GPU 3 ({UUID}3), 16.0 GiB; its own is GPU 0 *"]
    )
    result.stdout.fnmatch_lines(["  (told in full by test_it.py::test_a[[]tp1[]]*)"])


@pytest.mark.parametrize(
    ("gpu", "outcome", "line"),
    [
        (5, "failed", "  found: pid * VLLM::EngineCore holds a context on GPU 5 (*) outside the layout, 16.0 GiB"),
        (1, "passed", "    pid * VLLM::EngineCore is no rank and holds a context on GPU 1 (*), 16.0 GiB"),
    ],
)
def test_engine_core_with_a_context(suite: Suite, gpu: int, outcome: str, line: str) -> None:
    processes(suite, f"contexts={{'VLLM::EngineCore': [{gpu}]}}")
    suite.write(test_it=SERVED)

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(**{outcome: 1})
    result.stdout.fnmatch_lines([line])


def test_in_a_container_new_processes_are_the_proof(suite: Suite) -> None:
    processes(suite, "hidden=True, others=[FakeGpuProcess(6)]")
    suite.write(test_it=SERVED)

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "  processes: each rank on its GPU and no other (new processes)",
            "    the driver lists process ids of the host, unknown here: docker run --pid=host shows them",
        ]
    )


def test_without_lists_memory_is_the_proof(suite: Suite) -> None:
    processes(suite, "gpus=3, listed=False")
    suite.write(test_it=SERVED)

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "  processes: memory in use has grown on the GPU of each rank; other GPUs not proved (device memory)",
            f"    not proved: GPU 2 ({UUID}2): that the server has no context there",
        ]
    )


COMES_WHILE_IT_RUNS = """
@pytest.fixture
def visitor(vllm_server):
    vllm_server.server.processes.others.append(FakeGpuProcess(0))
"""


def test_somebody_who_comes_while_the_server_runs(suite: Suite) -> None:
    processes(suite, "", COMES_WHILE_IT_RUNS)
    suite.write(
        test_it="""
        def test_before(measure): measure()
        def test_during(visitor, measure): measure()
        """
    )

    result = suite.run("--gpu-layout=tp1")

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "  found: pid 4242 python train.py (user bob) is not of the server and computes on "
            f"GPU 0 ({UUID}0), 8.0 GiB"
        ]
    )


def test_nothing_is_stored_of_a_run_that_somebody_disturbed(suite: Suite) -> None:
    """Not even when it was a fresh start within the gate, after a first one without fault."""
    suite.fakes(
        launcher="processes=SecondServerStrays(contexts=CONTEXTS)",
        more="""
CONTEXTS = {}
class SecondServerStrays(FakeGpuProcesses):
    def remove(self, server):
        super().remove(server)
        CONTEXTS[0] = [0, 7]
""",
    )
    suite.write(test_it=GATE)

    result = suite.run("--gpu-layout=tp1", "--gpu-baseline=new")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["  found: rank 0 * holds a context on GPU 7 (*"])
    assert suite.starts == 2
    assert suite.baselines == []


def test_others_on_the_gpus_before_the_start(suite: Suite) -> None:
    processes(suite, "others=[FakeGpuProcess(0), FakeGpuProcess(1, 77, None, name='')]")
    suite.write(test_it=SERVED)

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "idle GPUs were required for layout tp2, found other processes on them",
            f"  GPU 0 ({UUID}0): pid 4242 python train.py (user bob), 8.0 GiB",
            f"  GPU 1 ({UUID}1): pid 77 (not visible from here), memory unknown",
            "  in the process list of the NVIDIA driver, 5 s after they were first looked for",
            "  end them, choose other GPUs with --gpu-devices, or wait for them with --gpu-wait=600",
        ],
        consecutive=True,
    )
    assert suite.events == []


def test_others_on_other_gpus_disturb_nobody(suite: Suite) -> None:
    processes(suite, "others=[FakeGpuProcess(0)]")
    suite.write(test_it=SERVED)

    suite.run("--gpu-layout=tp2", "--gpu-devices=2,3").assert_outcomes(passed=1)


@pytest.mark.parametrize(("wait", "outcome"), [("30", "errors"), ("60", "passed")])
def test_wait_for_others_to_leave(suite: Suite, wait: str, outcome: str) -> None:
    processes(suite, "others=[FakeGpuProcess(0, leaves_after_s=45)]")
    suite.write(test_it=SERVED)

    result = suite.run("--gpu-layout=tp1", f"--gpu-wait={wait}")

    result.assert_outcomes(**{outcome: 1})
    result.stdout.fnmatch_lines(
        [f"tp1: waiting for pid 4242 python train.py (user bob) to leave the GPUs, 0 of {wait} s"]
    )


def test_cpu_platform_has_no_gpus_to_prove(suite: Suite) -> None:
    processes(suite, "others=[FakeGpuProcess(0)]")
    suite.write(test_it="def test_it(vllm_server): assert vllm_server.gpu_processes is None")

    result = suite.run("--gpu-layout=tp1", "--gpu-platform=cpu", "--gpu-results=results.json")

    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("  processes: *")
    assert "processes" not in {record["kind"] for record in suite.read_results()["records"]}


def test_launcher_that_proves_nothing_is_no_pass(suite: Suite) -> None:
    suite.fakes(more="FakeServer.gpu_processes = lambda self: None")
    suite.write(test_it=SERVED)

    result = suite.run("--gpu-layout=tp1", subprocess=True)

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "evidence of the GPUs that the server's processes use was required, found none",
            "  from the launcher of layout tp1: FakeServer.gpu_processes()",
        ]
    )


@pytest.mark.parametrize(
    ("option", "source"),
    [
        ("--gpu-link=any", "NvmlProcesses"),
        ("--gpu-topology=old.txt", "NvmlProcesses"),
        ("--gpu-platform=cpu", "None"),
    ],
)
def test_nvml_is_asked_even_when_the_topology_is_recorded(suite: Suite, option: str, source: str) -> None:
    Path("old.txt").write_text("\tGPU0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \t0-3\t0\n")
    suite.write(test_it="def test_it(gpu_session): print('source', gpu_session._wiring.gpu_processes())")

    result = suite.run("--gpu-layout=tp1", option, "-s")

    result.stdout.fnmatch_lines([f"*source *{source}*"])


def test_hook_gives_the_lists_to_vllm_s_own_launcher(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_fake_vllm(monkeypatch)
    monkeypatch.setattr(occupancy, "GRACE_S", 0)
    monkeypatch.setattr("pytest_gpulayout.adapters.device_lock.LOCK_FOLDER", str(tmp_path))
    suite.pytester.makeconftest(
        """
        from pytest_gpulayout.testing import FakeGpuProcess, FakeGpuProcesses, FakeTopologySource

        def pytest_gpulayout_topology_source(settings, layout):
            return FakeTopologySource()

        def pytest_gpulayout_gpu_processes(settings):
            return FakeGpuProcesses(others=[FakeGpuProcess(0)])
        """
    )
    suite.write(test_it=SERVED)

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["idle GPUs were required for layout tp2, found other processes on them"])
