"""The whole plugin on a machine with GPUs that is only described: real processes, real NVML calls, no GPU.

The gate runs as a user runs it. It finds the GPUs through ``pynvml`` in the fake NVML, and starts the fake vLLM,
whose workers hold contexts that the fake NVML lists, and write NCCL's log.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.adapters import vllm_process
from tests.native.build import FakeGpu, FakeMachine, FakePair, build_fake_nvml, fake_nvml_environment, write_machine
from tests.support.processes import FAKE_VLLM, processes_marked, somebody_computes, wait_until

pytestmark = pytest.mark.end_to_end

PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "unwatched"]
GATE = [*PYTEST, "--pyargs", "pytest_gpulayout.gates"]
OPTIONS = ["--gpu-model=org/model", "--gpu-baseline=off"]
RESULTS = "--gpu-results=results.json"
NOT_SPEED = ["-k", "not performance and not collectives"]
PYTHON = Path(sys.executable).name
GPU_IS_LOST = 15  # nvmlReturn_t
HOLD = """
import signal
from pathlib import Path

def test_hold(vllm_server):
    Path("holding").touch()
    signal.pause()
"""
HIDDEN = ("CUDA_", "NCCL_", "VLLM_", "PYTEST_")


@dataclass
class Run:
    """A pytest of a user. :param output: the file that it writes to."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def text(self) -> str:
        """What it has written so far."""
        return self.output.read_text()

    def wait(self, timeout_s: float = 45) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(timeout_s)


@dataclass
class Host:
    """A machine, and a folder to work in.

    :param temporary: where the runs put their temporary files. :param identity: what no other test's UUIDs contain,
        since locks are for all processes of the real machine.
    """

    folder: Path
    temporary: Path
    environment: dict[str, str]
    identity: str
    machine: FakeMachine
    runs: list[Run] = field(default_factory=list)

    @property
    def uuids(self) -> list[str]:
        return [str(gpu.uuid) for gpu in self.machine.gpus]

    def become(self, machine: FakeMachine) -> None:
        """Show another machine from now on."""
        self.machine = machine
        write_machine(machine, self.folder)

    def start(
        self, *options: str, command: list[str] = GATE, env: dict[str, str] | None = None, **fake: object
    ) -> Run:
        """Start pytest. :param fake: how the fake vLLM behaves."""
        environment = {**self.environment, "FAKE_VLLM": json.dumps(fake), **(env or {})}
        output = self.folder / f"output-{len(self.runs)}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*command, *OPTIONS, *options],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.runs.append(Run(process, output))
        return self.runs[-1]

    def run(self, *options: str, env: dict[str, str] | None = None, **fake: object) -> tuple[int, str]:
        """Run the gate: exit code and output."""
        run = self.start(*options, command=GATE, env=env, **fake)
        return run.wait(), run.text

    def record(self, kind: str) -> Any:
        """The only record of its kind that the run with :data:`RESULTS` wrote."""
        records = json.loads((self.folder / "results.json").read_text())["records"]
        (found,) = (record for record in records if record["kind"] == kind)
        return found

    def kill_runs(self) -> bool:
        """Kill the runs that have not ended. :returns: whether there were any."""
        alive = [run.process for run in self.runs if run.process.poll() is None]
        for process in alive:
            process.kill()
            process.wait()
        return bool(alive)

    def computed(self) -> dict[int, dict[str, Any]]:
        """Every process that ever held a context here: process id -> its GPUs and its CUDA variables."""
        files = Path(self.environment["FAKE_NVML_CONTEXTS"]).glob("*.json")
        return {int(file.stem): json.loads(file.read_text()) for file in files}

    def visible_to_workers(self) -> set[str]:
        return {held["environment"]["CUDA_VISIBLE_DEVICES"] for held in self.computed().values()}

    def locks(self) -> list[str]:
        return [name for name in os.listdir("/tmp") if name.startswith("gpulayout-") and self.identity in name]

    def remains(self) -> list[str]:
        """What nobody should have left: processes, locks, temporary files."""
        processes = [f"{pid} {title}" for pid, title in processes_marked(f"TEST_MARKER={self.identity}").items()]
        return processes + self.locks() + [name for name in os.listdir(self.temporary) if "gpulayout" in name]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def host(library: Path, tmp_path: Path) -> Iterator[Host]:
    """Four GPUs, the last two with a bridge between them. Whatever happens on it, nothing may be left."""
    identity = uuid.uuid4().hex[:12]
    gpus = [FakeGpu(uuid=f"GPU-{index:08x}-0000-4000-8000-{identity}", cpus=("0-1023",)) for index in range(4)]
    machine = FakeMachine(gpus, {(2, 3): FakePair(level="PHB", nvlinks=4)})
    contexts = tmp_path / "contexts"
    contexts.mkdir()
    with tempfile.TemporaryDirectory(prefix="gl-", dir="/tmp") as temporary:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(HIDDEN)}
        environment |= fake_nvml_environment(library, machine, tmp_path)
        environment |= {"FAKE_NVML_CONTEXTS": str(contexts), "PYTHONPATH": str(FAKE_VLLM), "TMPDIR": temporary}
        environment |= {"TEST_MARKER": identity, "PYTEST_DEBUG_TEMPROOT": str(tmp_path)}
        host = Host(tmp_path, Path(temporary), environment, identity, machine)
        yield host
        if host.kill_runs():  # only where the test has failed already
            wait_until(lambda: not host.remains(), "the end of all that was started", 45)
        assert host.remains() == []


# -- a machine in order ----------------------------------------------------------------------------------------------


def test_gate_passes_on_the_pair_with_nvlink(host: Host) -> None:
    code, text = host.run("--gpu-layout=tp2", "--gpu-link=nvlink", RESULTS)

    assert code == 0, text
    assert "3 passed, 2 not judged" in text
    assert "tp2: worst link NV4, transport P2P/CUMEM x4, vLLM 0.32.0, ready in " in text
    assert "  processes: each rank on its GPU and no other (process list)\n" in text
    found = host.record("processes")
    assert [(rank["index"], rank["uuid"]) for rank in found["ranks"]] == [(2, host.uuids[2]), (3, host.uuids[3])]
    variables = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(host.uuids[2:])}
    assert host.computed() == {
        rank["pid"]: {"gpus": {rank["uuid"]: 16 * 2**30}, "environment": variables} for rank in found["ranks"]
    }


def test_one_rank_needs_one_gpu_and_no_transport(host: Host) -> None:
    code, text = host.run("--gpu-layout=tp1", *NOT_SPEED)

    assert code == 0, text
    assert "tp1: worst link none needed, transport none needed, " in text
    assert [held["gpus"] for held in host.computed().values()] == [{host.uuids[0]: 16 * 2**30}]


def test_gpus_of_others_are_avoided_where_there_are_equal_ones(host: Host) -> None:
    with somebody_computes(host.folder, host.uuids[:1], host.environment) as other:
        code, text = host.run("--gpu-layout=tp1", *NOT_SPEED)

    assert code == 0, text
    assert [list(held["gpus"]) for pid, held in host.computed().items() if pid != other.pid] == [host.uuids[1:2]]


# -- processes that are where they must not be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contexts", "found"),
    [
        pytest.param({1: [3, 0]}, ["holds a context on {0}, 512 MiB; its own is {3}"], id="one more"),
        pytest.param(
            {1: [2]}, ["has no context on {3}", "holds a context on {2}, 16.0 GiB; its own is {3}"], id="another's"
        ),
        pytest.param(
            {1: [0]}, ["has no context on {3}", "holds a context on {0}, 16.0 GiB; its own is {3}"], id="elsewhere"
        ),
    ],
)
def test_rank_on_a_gpu_that_is_not_its_own(host: Host, contexts: dict[int, list[int]], found: list[str]) -> None:
    uuids = {str(rank): [host.uuids[index] for index in indices] for rank, indices in contexts.items()}

    code, text = host.run("--gpu-layout=tp2", "--gpu-link=nvlink", RESULTS, *NOT_SPEED, contexts=uuids)

    pid = host.record("server")["rank_pids"]["1"]
    gpus = [f"GPU {index} ({name})" for index, name in enumerate(host.uuids)]
    assert code == pytest.ExitCode.TESTS_FAILED, text
    assert "2 failed, 1 passed" in text
    assert [line for line in text.splitlines() if line.startswith("  found: ")] == [
        f"  found: rank 1 (pid {pid} VLLM::Worker_TP1) {sentence.format(*gpus)}" for sentence in found
    ]


def test_somebody_else_on_a_gpu_fails_before_anything_is_started(host: Host) -> None:
    with somebody_computes(host.folder, host.uuids[2:3], host.environment) as other:
        code, text = host.run("--gpu-layout=tp2", "--gpu-link=nvlink", *NOT_SPEED)

    assert code == pytest.ExitCode.TESTS_FAILED, text
    assert "idle GPUs were required for layout tp2, found other processes on them" in text
    assert f"  GPU 2 ({host.uuids[2]}): pid {other.pid} {PYTHON} train.py (user " in text
    assert "), 16.0 GiB\n" in text
    assert "wait for them with --gpu-wait=600" in text
    assert list(host.computed()) == [other.pid]


def test_somebody_else_who_leaves_is_waited_for(host: Host) -> None:
    with somebody_computes(host.folder, host.uuids[2:3], host.environment) as other:
        run = host.start("--gpu-layout=tp2", "--gpu-link=nvlink", "--gpu-wait=60", *NOT_SPEED)
        waiting = f"tp2: waiting for pid {other.pid} {PYTHON} train.py (user "
        wait_until(lambda: waiting in run.text, "the line that says who is waited for", 45)
        assert list(host.computed()) == [other.pid]

    assert run.wait() == 0, run.text
    assert len(host.computed()) == 3


# -- transports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "options"), [("NET/Socket/0", []), ("SHM/direct/direct", ["--gpu-transport=p2p"])]
)
def test_transport_that_is_not_allowed_is_shown_where_it_stands(
    host: Host, transport: str, options: list[str]
) -> None:
    code, text = host.run("--gpu-layout=tp2", *options, *NOT_SPEED, nccl=transport)

    assert code == pytest.ExitCode.TESTS_FAILED, text
    assert "1 failed, 2 passed" in text
    pattern = (
        rf"  found: ranks (\d) -> (\d): transport {transport}, allowed: .*\n  in (/.*/nccl\..*\.log), line (\d+)\n"
    )
    found = re.findall(pattern, text)
    assert {(src, dst) for src, dst, _, _ in found} == {("0", "1"), ("1", "0")}
    for src, dst, file, line in found:
        evidence = Path(file).read_text().splitlines()[int(line) - 1]
        assert re.search(rf"Channel 00.* : {src}\[\d\] -> {dst}\[\d\] .*via {transport}$", evidence)


def test_no_log_of_nccl_is_no_evidence(host: Host) -> None:
    code, text = host.run("--gpu-layout=tp2", *NOT_SPEED, nccl=None)

    assert code == pytest.ExitCode.TESTS_FAILED, text
    assert "1 failed, 2 passed" in text
    assert "  found: no-evidence, no evidence\n  no line of NCCL\n" in text
    assert "NCCL_DEBUG=INFO" in text


# -- which GPUs ------------------------------------------------------------------------------------------------------


def test_cuda_visible_devices_limits_the_choice(host: Host) -> None:
    visible = f"2,{host.uuids[0]}"

    code, text = host.run("--gpu-layout=tp2", *NOT_SPEED, env={"CUDA_VISIBLE_DEVICES": visible})

    assert code == 0, text
    assert "gpu layout: tp2 on cuda, 2 x NVIDIA H100 80GB HBM3, worst link SYS" in text
    assert host.visible_to_workers() == {f"{host.uuids[0]},{host.uuids[2]}"}


def test_gpus_are_named_by_uuid_in_rank_order(host: Host) -> None:
    code, text = host.run("--gpu-layout=tp2", f"--gpu-devices={host.uuids[3]},{host.uuids[0]}", *NOT_SPEED)

    assert code == 0, text
    assert "tp2: worst link SYS, " in text
    assert "each rank on its GPU and no other (process list)" in text
    assert host.visible_to_workers() == {f"{host.uuids[3]},{host.uuids[0]}"}


def test_lost_gpu_is_told_and_the_others_are_used(host: Host) -> None:
    host.become(replace(host.machine, errors={"nvmlDeviceGetHandleByIndex_v2": {"0": GPU_IS_LOST}}))

    code, text = host.run("--gpu-layout=tp3", *NOT_SPEED)

    assert code == 0, text
    assert "tp3: worst link SYS, transport P2P/CUMEM x6, " in text
    assert "  GPU 0 cannot be used: GPU is lost: " in text
    assert "  processes: each rank on its GPU and no other (process list)" in text
    assert host.visible_to_workers() == {",".join(host.uuids[1:])}


# -- two runs --------------------------------------------------------------------------------------------------------


def test_second_run_waits_for_the_first_until_it_is_killed(host: Host) -> None:
    (host.folder / "test_hold.py").write_text(HOLD)
    first = host.start("--gpu-layout=tp2", "--gpu-link=nvlink", command=[*PYTEST, "test_hold.py"])
    wait_until((host.folder / "holding").exists, "the server of the first run", 45)
    assert len(host.locks()) == 2
    second = host.start("--gpu-layout=tp2", "--gpu-link=nvlink", *NOT_SPEED)
    waiting = f"waiting for {host.uuids[2]}, held by pytest, layout tp2 (pid {first.process.pid})\n"
    wait_until(lambda: waiting in second.text, "the line that says who is waited for", 45)
    assert len(host.computed()) == 2

    first.process.send_signal(signal.SIGKILL)

    wait_until(lambda: len(host.computed()) == 4, "the server of the second run", vllm_process.TERM_TIMEOUT_S)
    assert first.wait() == -signal.SIGKILL
    assert second.wait() == 0, second.text
