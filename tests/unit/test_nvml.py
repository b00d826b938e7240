from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.native.build import (
    DRIVER_NOT_LOADED,
    MEMORY_UNKNOWN,
    FakeGpu,
    FakeMachine,
    FakePair,
    build_fake_nvml,
    fake_nvml_environment,
    uuid_of,
)

PROBE = """
import json
from pytest_gpulayout.adapters.nvml import NvmlTopology
from pytest_gpulayout.adapters.nvml_processes import gpu_processes
from pytest_gpulayout.errors import TopologyError
from pytest_gpulayout.topology_document import topology_to_document
try:
    {statement}
except TopologyError as error:
    print(json.dumps({{"error": str(error)}}))
"""
TOPOLOGY = "print(json.dumps(topology_to_document(NvmlTopology().probe())))"
PROCESSES = "print(json.dumps(gpu_processes()))"

Ask = Callable[..., Any]

NODE_1 = FakeGpu(nodes=(1,), cpus=("14-27", "42-55"))
SWITCHED = FakeGpu(switch_links=18)
SWITCHED_PAIR = FakePair(level="SYS", p2p={0: 0, 1: 0, 2: 0})


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def ask(library: Path, tmp_path: Path) -> Ask:
    """Run a statement in a new process that sees the fake machine; the answer is what it prints as JSON."""

    def ask(machine: FakeMachine, statement: str = TOPOLOGY, **variables: str) -> Any:
        environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        environ |= fake_nvml_environment(library, machine, tmp_path) | variables
        command = [sys.executable, "-c", PROBE.format(statement=statement)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


def classes(document: dict[str, Any]) -> dict[tuple[int, int], str | None]:
    return {(link["a"], link["b"]): link["class"] for link in document["links"]}


def test_one_gpu(ask: Ask) -> None:
    document = ask(FakeMachine())
    (gpu,) = document["gpus"]
    assert (
        gpu
        | {
            "index": 0,
            "name": "NVIDIA H100 80GB HBM3",
            "uuid": uuid_of(0),
            "pci_bus_id": "00000000:0A:00.0",
            "memory_bytes": 85_520_809_984,
            "numa_node": 0,
            "cpu_affinity": "0-13,28-41",
        }
        == gpu
    )
    assert (document["links"], document["worst"], document["all_nvlink"]) == ([], None, False)
    assert document["source"] == "NVML"
    assert (document["driver_version"], document["cuda_version"]) == ("570.86.10", "12.8")


@pytest.mark.parametrize("level", ["PIX", "PXB", "PHB", "NODE", "SYS"])
def test_pcie_classes(ask: Ask, level: str) -> None:
    document = ask(FakeMachine(gpus=[FakeGpu(), NODE_1], default_pair=FakePair(level=level)))
    assert classes(document) == {(0, 1): level}
    assert [gpu["numa_node"] for gpu in document["gpus"]] == [0, 1]


def test_direct_nvlinks_are_counted_per_pair(ask: Ask) -> None:
    pairs = {(0, 1): FakePair(nvlinks=4), (0, 2): FakePair(nvlinks=2), (1, 2): FakePair(level="NODE")}
    document = ask(FakeMachine(gpus=[FakeGpu()] * 3, pairs=pairs))
    assert classes(document) == {(0, 1): "NV4", (0, 2): "NV2", (1, 2): "NODE"}
    assert document["worst"] == "NODE"


def test_links_that_are_down_do_not_count(ask: Ask) -> None:
    pairs = {(0, 1): FakePair(level="PHB", nvlinks_down=4), (0, 2): FakePair(nvlinks=3, nvlinks_down=1)}
    document = ask(FakeMachine(gpus=[FakeGpu()] * 3, pairs=pairs))
    assert classes(document)[0, 1] == "PHB"
    assert classes(document)[0, 2] == "NV3"


@pytest.mark.parametrize("missing", [(), ("nvmlDeviceGetNvLinkRemoteDeviceType",)])
def test_nvlinks_through_switches(ask: Ask, missing: tuple[str, ...]) -> None:
    document = ask(FakeMachine(gpus=[SWITCHED] * 4, default_pair=SWITCHED_PAIR, missing=missing))
    assert set(classes(document).values()) == {"NV18"}
    assert document["all_nvlink"]


def test_a_gpu_with_fewer_switch_links_is_the_worse_end(ask: Ask) -> None:
    document = ask(FakeMachine(gpus=[SWITCHED, replace(SWITCHED, switch_links=16)]))
    assert document["worst"] == "NV16"


def test_p2p_status(ask: Ask) -> None:
    pair = FakePair(nvlinks=4, p2p={0: 0, 1: 4, 2: 5})
    document = ask(FakeMachine(gpus=[FakeGpu()] * 2, default_pair=pair))
    assert {p["capability"]: p["status"] for p in document["p2p"]} == {"r": "OK", "w": "DR", "n": "NS"}


def test_numa_nodes_of_several_are_a_range(ask: Ask) -> None:
    document = ask(FakeMachine(gpus=[FakeGpu(nodes=(0, 1, 2, 3), cpus=("0-0", "64-64", "4000-4001"))]))
    assert document["gpus"][0]["numa_node"] == "0-3"
    assert document["gpus"][0]["cpu_affinity"] == "0,64,4000-4001"


def test_what_an_old_driver_does_not_answer_is_null(ask: Ask) -> None:
    missing = (
        "nvmlSystemGetCudaDriverVersion_v2",
        "nvmlDeviceGetMemoryAffinity",
        "nvmlDeviceGetCpuAffinity",
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetNvLinkState",
        "nvmlDeviceGetTopologyCommonAncestor",
        "nvmlDeviceGetP2PStatus",
    )
    document = ask(FakeMachine(gpus=[FakeGpu()] * 2, missing=missing))
    gpu = document["gpus"][0]
    assert (gpu["numa_node"], gpu["cpu_affinity"], gpu["memory_bytes"]) == (None, None, None)
    assert (document["links"], document["worst"], document["cuda_version"]) == ([], None, None)
    assert document["p2p"] == []


def test_a_virtual_machine_can_hide_the_ancestor_of_one_pair(ask: Ask) -> None:
    pairs = {(0, 1): FakePair(level=None), (0, 2): FakePair(level="PHB"), (1, 2): FakePair(level="PHB")}
    document = ask(FakeMachine(gpus=[FakeGpu()] * 3, pairs=pairs))
    assert classes(document) == {(0, 1): None, (0, 2): "PHB", (1, 2): "PHB"}
    assert document["worst"] is None


@pytest.mark.parametrize(
    ("variable", "indices"),
    [("2,0", [0, 2]), ("1", [1]), (uuid_of(2), [2]), ("GPU-00000001", [1]), (" 0 , 2 ", [0, 2])],
)
def test_visible_devices_restrict(ask: Ask, variable: str, indices: list[int]) -> None:
    document = ask(FakeMachine(gpus=[FakeGpu()] * 3), CUDA_VISIBLE_DEVICES=variable)
    assert [gpu["index"] for gpu in document["gpus"]] == indices
    assert all({link["a"], link["b"]} <= set(indices) for link in document["links"])


@pytest.mark.parametrize(
    ("variable", "found"),
    [("7", "found '7'"), ("0,GPU-ffff", "found 'GPU-ffff'"), ("", "found that it is empty"), ("-1", "found '-1'")],
)
def test_visible_devices_that_do_not_exist(ask: Ask, variable: str, found: str) -> None:
    error = ask(FakeMachine(gpus=[FakeGpu()] * 2), CUDA_VISIBLE_DEVICES=variable)["error"]
    assert found in error
    assert f"CUDA_VISIBLE_DEVICES={variable}; NVML lists 0 ({uuid_of(0)}), 1 ({uuid_of(1)})" in error
    assert "unset it" in error


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        (FakeMachine(init_error=DRIVER_NOT_LOADED), "NVML says 'Driver Not Loaded'"),
        (FakeMachine(gpus=[]), "the driver is loaded and lists no GPU"),
    ],
)
def test_no_gpu(ask: Ask, machine: FakeMachine, why: str) -> None:
    error = ask(machine)["error"]
    assert "no NVIDIA GPU was found" in error
    assert why in error
    assert "type --gpu-platform=cpu to run vLLM's CPU build, or --gpu-topology=FILE" in error


def test_no_library() -> None:
    command = [sys.executable, "-c", PROBE.format(statement=f"import pynvml; {FORGET}; {TOPOLOGY}")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    error = json.loads(done.stdout)["error"]
    assert "no NVIDIA GPU was found: NVML says 'NVML Shared Library Not Found'" in error


# A machine that runs the tests may have a driver; the loader of pynvml is made to find none.
FORGET = "pynvml.CDLL = lambda name: (_ for _ in ()).throw(OSError(name))"


def test_nvml_fails_later(ask: Ask) -> None:
    error = ask(FakeMachine(missing=["nvmlDeviceGetName"]))["error"]
    assert "NVML says 'Function Not Found'" in error
    assert "look at 'nvidia-smi'" in error


def test_processes_of_all_gpus(ask: Ask) -> None:
    gpus = [FakeGpu(processes=[(4242, 1 << 30), (77, MEMORY_UNKNOWN)]), FakeGpu(), FakeGpu(processes=[(5, 0)])]
    processes = ask(FakeMachine(gpus=gpus), PROCESSES, CUDA_VISIBLE_DEVICES="1")
    assert processes == [[uuid_of(0), 4242, 1 << 30], [uuid_of(0), 77, None], [uuid_of(2), 5, 0]]


def test_processes_without_a_driver(ask: Ask) -> None:
    assert "no NVIDIA GPU was found" in ask(FakeMachine(init_error=DRIVER_NOT_LOADED), PROCESSES)["error"]
