"""A probe's processes: what they measure, how each of them may fail, and that none of them is ever left."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pytest_gpulayout.adapters import collective_probe, collective_worker, device_lock
from pytest_gpulayout.adapters.collective_probe import TorchProbe, probe_environment, worker_config
from pytest_gpulayout.adapters.device_lock import DeviceLocks
from pytest_gpulayout.adapters.model_facts import hidden_size_of
from pytest_gpulayout.collectives import ProbePlan, ProbeRun, probe_groups, wire_bytes
from pytest_gpulayout.errors import DevicesBusy, MeasurementError
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.ports import Platform, ProbeSpec, Progress
from pytest_gpulayout.testing import FakeGpuProcess, FakeGpuProcesses
from pytest_gpulayout.topology import Device
from tests.support.processes import FAKE_VLLM, ROOT, processes_marked, wait_until

pytestmark = pytest.mark.end_to_end

PLAN = ProbePlan(hidden_size=64, rounds=3, decode_iterations=5, prefill_iterations=2)
HOLD = """
import sys
from pathlib import Path
from pytest_gpulayout.adapters import device_lock
from pytest_gpulayout.adapters.collective_probe import TorchProbe
from tests.unit.test_collective_probe import probe_spec
device_lock.LOCK_FOLDER = sys.argv[2]
TorchProbe(Path(sys.argv[1])).run(probe_spec(), lambda text: print(text, flush=True))
"""


def probe_spec(layout: str = "tp2", platform: Platform = "cpu", plan: ProbePlan = PLAN) -> ProbeSpec:
    """GPUs that are only names, or cores that this process may use."""
    parsed, cores = parse_layout(layout), sorted(os.sched_getaffinity(0))
    devices = tuple(
        Device(rank, uuid=f"GPU-probe-{rank}", cpu_affinity=str(cores[rank % len(cores)]))
        for rank in range(parsed.gpus)
    )
    return ProbeSpec(parsed, probe_groups(parsed), devices, platform, sys.executable, plan)


@dataclass
class Here:
    """A machine where nothing of a probe may be left. :param temporary: folder of temporary files and locks."""

    temporary: Path
    logs: Path
    monkeypatch: pytest.MonkeyPatch

    def fake(self, **behaviour: object) -> None:
        """Let the ranks use the fake PyTorch. :param behaviour: see ``fake_vllm/torch/distributed.py``."""
        self.monkeypatch.setenv("PYTHONPATH", str(FAKE_VLLM))
        self.monkeypatch.setenv("FAKE_TORCH", json.dumps(behaviour))

    def run(
        self, spec: ProbeSpec | None = None, progress: Progress = lambda text: None, **behaviour: object
    ) -> ProbeRun:
        """Run one start."""
        self.fake(**behaviour)
        return TorchProbe(self.logs).run(spec or probe_spec(), progress)

    def error(self, spec: ProbeSpec | None = None, **behaviour: object) -> list[str]:
        """The lines of the message of a start that fails."""
        self.fake(**behaviour)
        with pytest.raises(MeasurementError) as error:
            TorchProbe(self.logs).run(spec or probe_spec(), lambda text: None)
        return str(error.value).splitlines()

    def remains(self) -> list[str]:
        """Processes, temporary files and locks."""
        processes = processes_marked(f"TEST_MARKER={self.temporary.name}")
        return [f"{pid} {title}" for pid, title in processes.items()] + os.listdir(self.temporary)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    with tempfile.TemporaryDirectory(prefix="gl-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setattr(device_lock, "LOCK_FOLDER", folder)
        monkeypatch.setattr(collective_probe, "_POLL_S", 0.02)
        monkeypatch.setattr(collective_probe, "_TERM_TIMEOUT_S", 2.0)
        monkeypatch.setenv("TEST_MARKER", Path(folder).name)
        found = Here(Path(folder), tmp_path, monkeypatch)
        yield found
        assert found.remains() == []


# -- a probe that works ----------------------------------------------------------------------------------------------


def test_ranks_on_cores_measure_every_round(here: Here) -> None:
    said: list[str] = []
    run = here.run(progress=said.append)
    (group,) = run.groups
    assert group.ranks == (0, 1)
    assert len(group.rounds) == PLAN.rounds
    assert all(set(one) == {"batch1", "batch8", "batch64", "prefill"} for one in group.rounds)
    assert all(time_us > 0 for one in group.rounds for time_us in one.values())
    assert (run.backend, dict(run.transports)) == ("gloo of torch 2.9.0+fake", {"CPU/GLOO": 2})
    assert run.duration_s > 0
    assert said[0] == "tp2: probing the links, loading PyTorch and connecting"


def test_ranks_on_gpus_time_captured_rows_and_leave_nccls_log(here: Here) -> None:
    run = here.run(probe_spec("tp4", "cuda"), latency_us=12.5, gb_per_s=100.0, nccl="SHM/direct/direct")
    expected = {m.name: 12.5 + wire_bytes(m.size_bytes, 4) / 100.0 / 1e3 for m in PLAN.messages()}
    (group,) = run.groups
    assert group.ranks == (0, 1, 2, 3)
    assert [dict(one) for one in group.rounds] == [pytest.approx(expected)] * 3
    assert (run.backend, dict(run.transports)) == ("nccl 2.27.5 of torch 2.9.0+fake", {"SHM/direct/direct": 8})
    assert len(list((here.logs / "probe-1-tp4" / "nccl").iterdir())) == 4


def test_groups_measure_at_the_same_time_each_for_itself(here: Here) -> None:
    run = here.run(probe_spec("tp2x2", "cuda"))
    assert [group.ranks for group in run.groups] == [(0, 1), (2, 3)]
    assert [len(group.rounds) for group in run.groups] == [3, 3]


def test_every_start_has_a_folder_of_its_own(here: Here) -> None:
    here.fake()
    probe = TorchProbe(here.logs)
    for _ in range(2):
        probe.run(probe_spec(), lambda text: None)
    assert sorted(path.name for path in here.logs.iterdir()) == ["probe-1-tp2", "probe-2-tp2"]


# -- what the ranks get ----------------------------------------------------------------------------------------------


def test_connections_are_those_of_a_server_and_gloo_stays_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    run_dir, nccl_dir = Path("/run-dir"), Path("/nccl")
    on_gpu = probe_environment(probe_spec(platform="cuda"), run_dir, nccl_dir)
    assert on_gpu["CUDA_VISIBLE_DEVICES"] == "GPU-probe-0,GPU-probe-1"
    assert on_gpu["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert (on_gpu["NCCL_DEBUG"], on_gpu["NCCL_DEBUG_FILE"]) == ("INFO", "/nccl/nccl.%h.%p.log")
    assert on_gpu["TMPDIR"] == "/run-dir"
    assert "GLOO_SOCKET_IFNAME" not in on_gpu
    on_cpu = probe_environment(probe_spec(), run_dir, nccl_dir)
    assert on_cpu["GLOO_SOCKET_IFNAME"] == "lo"
    assert "NCCL_DEBUG" not in on_cpu


def test_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert probe_environment(probe_spec(platform="cuda"), Path("/a"), Path("/b"))["NCCL_DEBUG"] == "WARN"
    assert probe_environment(probe_spec(), Path("/a"), Path("/b"))["GLOO_SOCKET_IFNAME"] == "eth7"


def test_each_rank_on_cores_is_bound_to_its_own() -> None:
    config = worker_config(probe_spec("tp2x2"), Path("/logs"), Path("/run-dir"))
    assert [(w["rank"], w["group"], w["member"], w["size"]) for w in config["workers"]] == [
        (0, 0, 0, 2),
        (1, 0, 1, 2),
        (2, 1, 0, 2),
        (3, 1, 1, 2),
    ]
    assert all(len(worker["cpus"]) == 1 for worker in config["workers"])
    assert worker_config(probe_spec(platform="cuda"), Path("/a"), Path("/b"))["workers"][0]["cpus"] == []


def test_script_needs_nothing_of_this_package() -> None:
    tree = ast.parse(Path(str(collective_worker.__file__)).read_text())
    imported = {
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"hidden_size": 4096}, 4096),
        ({"n_embd": 768}, 768),
        ({"d_model": 1024}, 1024),
        ({"hidden_size": 1280, "text_config": {"hidden_size": 2560}}, 2560),
        ({"hidden_size": 0}, None),
        ({"hidden_size": "many"}, None),
        ({}, None),
    ],
)
def test_hidden_size_is_that_of_the_language_model(
    tmp_path: Path, config: dict[str, object], size: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert hidden_size_of(str(tmp_path), ()) == size


# -- a probe that fails ----------------------------------------------------------------------------------------------


def test_rank_that_fails_is_named_with_its_last_lines(here: Here) -> None:
    lines = here.error(fail=1)
    assert lines[0] == (
        "the ranks of layout tp2 were to add up messages over gloo, and rank 1 failed first, with exit code 1"
    )
    place = lines.index("  rank 1, warming up; its last lines:")
    assert "    RuntimeError: NCCL error: unhandled system error" in lines[place:]
    folder = here.logs / "probe-1-tp2"
    assert lines[-2:] == [f"  in {folder}", f"  read all of it: less {folder}/rank-*.log"]


def test_rank_that_is_killed_ends_the_others(here: Here) -> None:
    lines = here.error(probe_spec("tp4", "cuda"), die=2)
    assert lines[0] == (
        "the ranks of layout tp4 were to add up messages over nccl, and rank 2 failed first, ended by SIGKILL"
    )


def test_rank_that_hangs_is_ended_when_the_time_is_over(here: Here) -> None:
    here.fake(hang=1)
    ready = here.logs / "probe-1-tp2" / "rank-1.jsonl"

    def clock() -> float:
        return 1000.0 if ready.exists() and ready.read_text() else 0.0

    with pytest.raises(MeasurementError) as error:
        TorchProbe(here.logs, clock=clock).run(probe_spec(), lambda text: None)
    lines = str(error.value).splitlines()
    assert lines[0] == "the ranks of layout tp2 were to add up messages over gloo, and were not done within 180 s"
    assert "  rank 1, warming up, and said nothing" in lines
    assert lines[-1] == ("  give it more time: let the fixture gpu_probe_plan return a plan with timeout_s above 180")


def test_wrong_sum_is_no_measurement(here: Here) -> None:
    lines = here.error(probe_spec(platform="cuda"), wrong=0)
    assert lines == [
        "the sum of an all-reduce over ranks 0,1 must be right, and it is not: in the message batch1 rank 0 got 1.0 "
        "to 1.0, 3 was due",
        f"  layout tp2, in {here.logs / 'probe-1-tp2'}",
        "  data between devices is lost or changed: look for IOMMU and ACS (GPU Direct: NCCL's manual, "
        "Troubleshooting); NCCL_P2P_DISABLE=1 shows whether direct access between the GPUs is to blame",
    ]


def test_python_without_pytorch_says_how_to_get_it(here: Here) -> None:
    lines = here.error(missing=True)
    assert lines[-1] == (
        f"  install PyTorch for {sys.executable}, such as with vLLM: pip install 'pytest-gpulayout[vllm]'"
    )


def test_python_that_is_not_there(here: Here) -> None:
    lines = here.error(replace(probe_spec(), python="/no/such/python"))
    assert lines[0].endswith(" over gloo, and the process above them went away")


def test_somebody_else_on_a_gpu_is_told_before_anything_starts(here: Here) -> None:
    processes = FakeGpuProcesses(others=[FakeGpuProcess(1)])
    devices = tuple(Device(rank, uuid=f"GPU-00000000-0000-0000-0000-{rank:012x}") for rank in range(2))
    probe = TorchProbe(here.logs, processes, clock=processes.clock, sleep=processes.sleep)
    with pytest.raises(DevicesBusy, match="idle GPUs were required for layout tp2"):
        probe.run(replace(probe_spec(platform="cuda"), devices=devices), lambda text: None)


# -- nothing is left -------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_all_ranks(here: Here) -> None:
    def interrupt(text: str) -> None:
        if text.endswith("warming up"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here.run(progress=interrupt, hang=1)


def test_locks_are_those_of_servers(here: Here) -> None:
    """A server holds its devices; the probe waits, and says for whom."""
    held = DeviceLocks(["cpu"], "pytest, layout tp2", lambda text: None)
    said: list[str] = []
    waits = threading.Event()
    runs: list[ProbeRun] = []

    def note(text: str) -> None:
        said.append(text)
        if text.startswith("waiting for cpu, held by pytest, layout tp2"):
            waits.set()

    here.fake()
    thread = threading.Thread(target=lambda: runs.append(TorchProbe(here.logs).run(probe_spec(), note)))
    thread.start()
    assert waits.wait(10)
    assert not runs
    held.release()
    thread.join(30)
    assert len(runs) == 1


@pytest.fixture
def hold(here: Here, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start a process that is pytest as far as the probe can tell; its ranks wait for ever."""
    started: list[subprocess.Popen[str]] = []

    def hold() -> subprocess.Popen[str]:
        here.fake(hang=1)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(FAKE_VLLM), str(ROOT)])}
        environment |= {"TMPDIR": str(here.temporary)}
        command = [sys.executable, "-c", HOLD, str(tmp_path), str(here.temporary)]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_kill_9_of_pytest_leaves_nothing(here: Here, hold: Callable[[], subprocess.Popen[str]]) -> None:
    process = hold()
    output = process.stdout
    assert output is not None
    wait_until(lambda: "warming up" in output.readline(), "the ranks", 30)
    titles = processes_marked(f"TEST_MARKER={here.temporary.name}").values()
    workers = [title for title in titles if "collective_worker.py" in title and "keeper.py" not in title]
    assert len(workers) == 3  # two ranks and the process above them
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: not here.remains(), "the end of all that was started", 30)
