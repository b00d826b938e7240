from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_gpulayout.adapters.nvml_processes import NvmlProcesses
from tests.native.build import (
    DRIVER_NOT_LOADED,
    MEMORY_UNKNOWN,
    FakeGpu,
    FakeMachine,
    build_fake_nvml,
    fake_nvml_environment,
    uuid_of,
)

SNAPSHOT = """
import dataclasses, json, psutil
from pytest_gpulayout.adapters.nvml_processes import NvmlProcesses
from pytest_gpulayout.errors import TopologyError
names = {names}
psutil.Process = lambda pid: type("Process", (), {{"name": lambda self: names.get(pid, "python")}})()
try:
    found = dataclasses.asdict(NvmlProcesses().snapshot())
except TopologyError as error:
    found = {{"error": str(error)}}
print(json.dumps(found))
"""
COMPUTE, MPS = "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetMPSComputeRunningProcesses_v3"
NOT_SUPPORTED, GPU_IS_LOST, UNKNOWN = 3, 15, 999  # nvmlReturn_t
GIB = 1 << 30

Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def ask(library: Path, tmp_path: Path) -> Ask:
    """Take a snapshot in a new process that sees the fake machine. :param names: of processes, by id."""

    def ask(machine: FakeMachine, *, names: dict[int, str] | None = None, **variables: str) -> Any:
        environ = os.environ | fake_nvml_environment(library, machine, tmp_path) | variables
        command = [sys.executable, "-c", SNAPSHOT.format(names=names or {})]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


def processes(found: dict[str, Any]) -> list[tuple[str, int, int | None]]:
    return [(process["uuid"], process["pid"], process["memory_bytes"]) for process in found["processes"]]


def test_all_gpus_whatever_cuda_may_use(ask: Ask) -> None:
    gpus = [FakeGpu(processes=[(4242, GIB), (77, MEMORY_UNKNOWN)], memory_used=2 * GIB), FakeGpu(processes=[(5, 0)])]
    found = ask(FakeMachine(gpus=gpus), CUDA_VISIBLE_DEVICES="1")
    assert processes(found) == [(uuid_of(0), 4242, GIB), (uuid_of(0), 77, None), (uuid_of(1), 5, 0)]
    assert found["gpus"] == [
        {"index": 0, "uuid": uuid_of(0), "used_bytes": 2 * GIB, "listed": True},
        {"index": 1, "uuid": uuid_of(1), "used_bytes": 0, "listed": True},
    ]


def test_clients_of_mps_are_listed_once_and_its_server_is_not(ask: Ask) -> None:
    gpu = FakeGpu(processes=[(10, GIB // 32), (11, GIB)], mps=[(11, GIB), (12, GIB)])
    found = ask(FakeMachine(gpus=[gpu]), names={10: "nvidia-cuda-mps-server"})
    assert processes(found) == [(uuid_of(0), 11, GIB), (uuid_of(0), 12, GIB)]


def test_what_only_draws_does_not_compute(ask: Ask) -> None:
    found = ask(FakeMachine(gpus=[FakeGpu(graphics=[(900, GIB)])]))
    assert processes(found) == []
    assert found["gpus"][0]["listed"]


@pytest.mark.parametrize(
    "machine",
    [
        FakeMachine(gpus=[FakeGpu(memory_used=7)], missing=[COMPUTE, MPS]),
        FakeMachine(gpus=[FakeGpu(memory_used=7)], errors={COMPUTE: NOT_SUPPORTED, MPS: NOT_SUPPORTED}),
    ],
    ids=["old driver", "virtual GPU"],
)
def test_no_lists_is_not_the_same_as_no_process(ask: Ask, machine: FakeMachine) -> None:
    found = ask(machine)
    assert found == {
        "gpus": [{"index": 0, "uuid": uuid_of(0), "used_bytes": 7, "listed": False}],
        "processes": [],
    }


def test_lists_without_mps(ask: Ask) -> None:
    machine = FakeMachine(gpus=[FakeGpu(processes=[(5, GIB)])], errors={MPS: NOT_SUPPORTED})
    assert processes(ask(machine)) == [(uuid_of(0), 5, GIB)]


def test_memory_that_is_not_told(ask: Ask) -> None:
    assert ask(FakeMachine(missing=["nvmlDeviceGetMemoryInfo"]))["gpus"][0]["used_bytes"] is None


@pytest.mark.parametrize(
    "machine",
    [
        FakeMachine(gpus=[FakeGpu()] * 2, errors={"nvmlDeviceGetHandleByIndex_v2": {"0": GPU_IS_LOST}}),
        FakeMachine(gpus=[FakeGpu()] * 2, errors={COMPUTE: {"0": GPU_IS_LOST}}),
    ],
    ids=["at once", "later"],
)
def test_a_lost_gpu_is_left_out(ask: Ask, machine: FakeMachine) -> None:
    assert [gpu["index"] for gpu in ask(machine)["gpus"]] == [1]


@pytest.mark.parametrize(
    ("machine", "told"),
    [
        (FakeMachine(init_error=DRIVER_NOT_LOADED), "no NVIDIA GPU was found: NVML says 'Driver Not Loaded'"),
        (FakeMachine(errors={COMPUTE: UNKNOWN}), "found that NVML says 'Unknown Error'"),
        (FakeMachine(missing=["nvmlDeviceGetUUID"]), "found that NVML says 'Function Not Found'"),
    ],
)
def test_a_driver_that_fails(ask: Ask, machine: FakeMachine, told: str) -> None:
    assert told in ask(machine)["error"]


# -- names -------------------------------------------------------------------------------------------------------


class OtherProcess:
    """Stands in for psutil's view of a process."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def cmdline(self) -> list[str]:
        return self.words

    def name(self) -> str:
        return "kernel-thread"

    def username(self) -> str:
        return "bob"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["/usr/bin/python3", "-u", "/home/bob/train.py", "--token=secret"], "python3 train.py"),
        (["python", "-m", "vllm.entrypoints.openai.api_server", "--api-key", "secret"], None),
        (["ollama", "runner", "--model", "/secret"], "ollama"),
        (["VLLM::Worker_TP0"], "VLLM::Worker_TP0"),
        (["VLLM::Worker TP0  "], "VLLM::Worker TP0"),
        (["postgres: bob secret [local]"], "postgres:"),
        ([], "kernel-thread"),
    ],
)
def test_a_process_is_named_without_its_secrets(
    monkeypatch: pytest.MonkeyPatch, words: list[str], text: str | None
) -> None:
    monkeypatch.setattr(psutil, "Process", lambda pid: OtherProcess(words))
    wanted = text or "python vllm.entrypoints.openai.api_server"
    assert NvmlProcesses().describe(5) == f"{wanted} (user bob)"


def test_a_process_that_cannot_be_seen() -> None:
    assert NvmlProcesses().describe(2**22 + 1) == ""
