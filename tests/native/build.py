"""Builds the fake ``libnvidia-ml.so.1`` of ``fake_nvml.c`` and describes the machine it shows.

A process sees the fake when it is started with the variables of :func:`fake_nvml_environment`. Lines of the file::

    driver 570.86.10                    cuda 12080
    init_error 9                        nvmlInit returns this nvmlReturn_t
    missing nvmlDeviceGetP2PStatus      the function returns NVML_ERROR_FUNCTION_NOT_FOUND
    gpu 0 name | uuid | bus_id | memory | node | cpus A-B | switch_links | process PID BYTES
    pair 0 1 ancestor LEVEL | nvlinks N | nvlinks_down N | p2p CAPABILITY STATUS
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import pytest

MEMORY_UNKNOWN = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE
LEVELS = {"PIX": 10, "PXB": 20, "PHB": 30, "NODE": 40, "SYS": 50}  # nvmlGpuTopologyLevel_t
DRIVER_NOT_LOADED = 9  # nvmlReturn_t


@dataclass(frozen=True)
class FakeGpu:
    """:param cpus: ranges such as ``"0-13"``. :param processes: (pid, bytes used)."""

    name: str = "NVIDIA H100 80GB HBM3"
    nodes: Sequence[int] = (0,)
    cpus: Sequence[str] = ("0-13", "28-41")
    memory_bytes: int = 85_520_809_984
    switch_links: int = 0
    processes: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class FakePair:
    """:param level: class of the nearest common ancestor. :param p2p: nvmlGpuP2PStatus_t by capability index."""

    level: str | None = "SYS"
    nvlinks: int = 0
    nvlinks_down: int = 0
    p2p: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FakeMachine:
    """:param pairs: what connects GPUs a < b; ``default_pair`` for the others."""

    gpus: Sequence[FakeGpu] = (FakeGpu(),)
    pairs: Mapping[tuple[int, int], FakePair] = field(default_factory=dict)
    default_pair: FakePair = FakePair()
    driver_version: str = "570.86.10"
    cuda_version: int = 12080
    init_error: int = 0
    missing: Sequence[str] = ()

    def configuration(self) -> str:
        """Text of the file that the library reads."""
        return "\n".join([*self._lines(), ""])

    def _lines(self) -> Iterator[str]:
        yield f"driver {self.driver_version}"
        yield f"cuda {self.cuda_version}"
        yield f"init_error {self.init_error}"
        yield from (f"missing {function}" for function in self.missing)
        for i, gpu in enumerate(self.gpus):
            yield f"gpu {i} name {gpu.name}"
            yield f"gpu {i} uuid {uuid_of(i)}"
            yield f"gpu {i} bus_id 00000000:{0x0A + i:02X}:00.0"
            yield f"gpu {i} memory {gpu.memory_bytes}"
            yield f"gpu {i} switch_links {gpu.switch_links}"
            yield from (f"gpu {i} node {node}" for node in gpu.nodes)
            yield from (f"gpu {i} cpus {cpus}" for cpus in gpu.cpus)
            yield from (f"gpu {i} process {pid} {used}" for pid, used in gpu.processes)
        for a, b in combinations(range(len(self.gpus)), 2):
            pair = self.pairs.get((a, b), self.default_pair)
            if pair.level is not None:
                yield f"pair {a} {b} ancestor {LEVELS[pair.level]}"
            yield f"pair {a} {b} nvlinks {pair.nvlinks}"
            yield f"pair {a} {b} nvlinks_down {pair.nvlinks_down}"
            yield from (f"pair {a} {b} p2p {cap} {status}" for cap, status in pair.p2p.items())


def uuid_of(index: int) -> str:
    """UUID of a fake GPU."""
    return f"GPU-{index:08x}-0000-4000-8000-000000000000"


def build_fake_nvml(directory: Path) -> Path:
    """Compile the library into a directory and return its path; skips the test without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("the fake NVML needs a C compiler: install gcc, as 'cc' in PATH")
    library = directory / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("fake_nvml.c")
    options = ["-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run([compiler, *options, "-o", str(library), str(source)], check=True, timeout=60)
    return library


def fake_nvml_environment(library: Path, machine: FakeMachine, directory: Path) -> dict[str, str]:
    """Write the machine's file into a directory and return the variables that show it to a new process."""
    configuration = directory / "fake_nvml.txt"
    configuration.write_text(machine.configuration())
    paths = [str(library.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"LD_LIBRARY_PATH": os.pathsep.join(paths), "FAKE_NVML_CONFIG": str(configuration)}
