"""Builds the fake ``libnvidia-ml.so.1`` of ``fake_nvml.c`` and describes the machine it shows.

A machine is a :class:`FakeMachine`, or a JSON document such as those in ``machines/``; ``README.md`` describes it.
A process sees the fake when it is started with the variables of :func:`fake_nvml_environment`.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

MEMORY_UNKNOWN = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE
LEVELS = {"PIX": 10, "PXB": 20, "PHB": 30, "NODE": 40, "SYS": 50}  # nvmlGpuTopologyLevel_t
DRIVER_NOT_LOADED = 9  # nvmlReturn_t
P2P_OK, P2P_NOT_SUPPORTED = 0, 5  # nvmlGpuP2PStatus_t
VERSION_4_0, H100_MBPS = 6, 26_562  # NVML_NVLINK_VERSION_4_0; what an H100 says of each link

Document = dict[str, Any]


@dataclass(frozen=True)
class FakeLink:
    """Equal NVLinks of one GPU.

    :param remote: index of a GPU, ``"switch"``, a bus id, or ``None`` where the driver does not tell.
    :param kind: what the driver says the other end is (0 GPU, 2 switch, 255 unknown); follows from ``remote``.
    :param errors: nvmlReturn_t by function, for these links alone.
    """

    remote: int | str | None = "switch"
    count: int = 1
    active: bool = True
    version: int | None = VERSION_4_0
    speed: int | None = H100_MBPS
    kind: int | None = None
    errors: Mapping[str, int] = field(default_factory=dict)

    def document(self) -> Document:
        return {
            "count": self.count,
            "state": int(self.active),
            "remote": self.remote,
            "version": self.version,
            "speed": self.speed,
            "type": self.kind,
            "errors": dict(self.errors),
        }


@dataclass(frozen=True)
class FakeFabric:
    """:param state: nvmlGpuFabricState_t. :param status: nvmlReturn_t."""

    state: int = 3
    status: int = 0
    clique_id: int = 0
    cluster_uuid: str = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True)
class FakeGpu:
    """What is ``None`` or empty is not supported; ``uuid`` and ``bus_id`` follow from the index.

    :param cpus: ranges such as ``"0-13"``. :param pcie: generation and width now, then the most.
    :param switch_links: links to a switch, before ``nvlinks`` and those of the pairs.
    :param processes: (pid, bytes used), of compute; ``mps`` and ``graphics`` likewise.
    :param telemetry: what it does now, by the keys of the README. :param lost_after: number of calls after which the
        GPU is lost.
    """

    name: str = "NVIDIA H100 80GB HBM3"
    nodes: Sequence[int] = (0,)
    cpus: Sequence[str] = ("0-13", "28-41")
    memory_bytes: int = 85_520_809_984
    switch_links: int = 0
    processes: Sequence[tuple[int, int]] = ()
    uuid: str | None = None
    bus_id: str | None = None
    memory_used: int = 0
    mig: bool | None = False
    numa_id: int | None = None
    pcie: tuple[int, int, int, int] | None = (5, 16, 5, 16)
    nvlinks: Sequence[FakeLink] = ()
    fabric: FakeFabric | None = None
    mps: Sequence[tuple[int, int]] = ()
    graphics: Sequence[tuple[int, int]] = ()
    telemetry: Mapping[str, Any] = field(default_factory=dict)
    lost_after: int | None = None

    def document(self, index: int, links: Sequence[FakeLink]) -> Document:
        """:param links: that the pairs of the machine add."""
        switches = [FakeLink(count=self.switch_links)] if self.switch_links else []
        names = ("generation", "width", "max_generation", "max_width")
        return {
            "name": self.name,
            "uuid": self.uuid or uuid_of(index),
            "bus_id": self.bus_id or f"00000000:{0x0A + index:02X}:00.0",
            "memory_total": self.memory_bytes,
            "memory_used": self.memory_used,
            "nodes": ",".join(map(str, self.nodes)) or None,
            "cpus": ",".join(self.cpus) or None,
            "mig": self.mig,
            "numa_id": self.numa_id,
            "pcie": dict(zip(names, self.pcie, strict=True)) if self.pcie else None,
            "nvlinks": [link.document() for link in (*switches, *self.nvlinks, *links)],
            **({"fabric": vars(self.fabric)} if self.fabric else {}),
            "compute": _processes(self.processes),
            "mps": _processes(self.mps),
            "graphics": _processes(self.graphics),
            **({"telemetry": dict(self.telemetry)} if self.telemetry else {}),
            **({"lost_after": self.lost_after} if self.lost_after is not None else {}),
        }


def _processes(processes: Sequence[tuple[int, int]]) -> list[Document]:
    return [{"pid": pid, "bytes": None if used == MEMORY_UNKNOWN else used} for pid, used in processes]


@dataclass(frozen=True)
class FakePair:
    """:param level: class of the nearest common ancestor.
    :param p2p: nvmlGpuP2PStatus_t by capability index; ``None`` for what the links suggest, ``{}`` for no answer.
    """

    level: str | None = "SYS"
    nvlinks: int = 0
    nvlinks_down: int = 0
    p2p: Mapping[int, int] | None = None

    def document(self, *, switched: bool) -> Document:
        """:param switched: both GPUs have links to switches."""
        nvlink = P2P_OK if self.nvlinks or switched else P2P_NOT_SUPPORTED
        p2p = {0: P2P_OK, 1: P2P_OK, 2: nvlink} if self.p2p is None else self.p2p
        return {
            "ancestor": None if self.level is None else LEVELS[self.level],
            "p2p": {str(capability): status for capability, status in p2p.items()},
        }

    def links(self, other: int) -> Iterator[FakeLink]:
        """Yield the links to a GPU with this index."""
        if self.nvlinks:
            yield FakeLink(other, self.nvlinks)
        if self.nvlinks_down:
            yield FakeLink(other, self.nvlinks_down, active=False)


@dataclass(frozen=True)
class FakeMachine:
    """:param pairs: what connects GPUs a < b; ``default_pair`` for the others.
    :param errors: nvmlReturn_t by function, for all GPUs or by ``"3"`` or ``"0-1"``. :param field_errors: by field.
    """

    gpus: Sequence[FakeGpu] = (FakeGpu(),)
    pairs: Mapping[tuple[int, int], FakePair] = field(default_factory=dict)
    default_pair: FakePair = FakePair()
    driver_version: str = "570.86.10"
    cuda_version: int = 12080
    init_error: int = 0
    missing: Sequence[str] = ()
    errors: Mapping[str, int | Mapping[str, int]] = field(default_factory=dict)
    field_errors: Mapping[int, int] = field(default_factory=dict)

    def document(self) -> Document:
        """Return what the library reads."""
        return {
            "driver": self.driver_version,
            "nvml": f"{self.cuda_version // 1000}.{self.driver_version}",
            "cuda": self.cuda_version,
            "init_error": self.init_error,
            "missing": list(self.missing),
            "errors": dict(self.errors),
            "field_errors": {str(number): error for number, error in self.field_errors.items()},
            "gpus": [gpu.document(i, list(self._links(i))) for i, gpu in enumerate(self.gpus)],
            "pairs": self._pair_documents(),
        }

    def configuration(self) -> str:
        """Text of the file that the library reads."""
        return json.dumps(self.document())

    def _pair_documents(self) -> Document:
        """The most frequent pair is the default, so that the file of a large machine stays small."""
        documents = {
            f"{a}-{b}": self._pair(a, b).document(switched=self._is_switched(a) and self._is_switched(b))
            for a, b in combinations(range(len(self.gpus)), 2)
        }
        counts = Counter(map(json.dumps, documents.values()))
        default = json.loads(counts.most_common(1)[0][0]) if counts else {}
        return {"default": default} | {pair: found for pair, found in documents.items() if found != default}

    def _pair(self, a: int, b: int) -> FakePair:
        return self.pairs.get((min(a, b), max(a, b)), self.default_pair)

    def _links(self, index: int) -> Iterator[FakeLink]:
        for other in range(len(self.gpus)):
            if other != index:
                yield from self._pair(index, other).links(other)

    def _is_switched(self, index: int) -> bool:
        gpu = self.gpus[index]
        return gpu.switch_links > 0 or any(link.remote == "switch" and link.active for link in gpu.nvlinks)


def nvl72() -> FakeMachine:
    """Return an NVL72 rack whose 72 GPUs one NVML sees: 18 trays of 4 GB200 on 2 Grace CPUs each."""
    fabric = FakeFabric(clique_id=32766, cluster_uuid="0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9")
    gpus = [
        FakeGpu(
            name="NVIDIA GB200",
            nodes=(i // 2,),
            cpus=(f"{i // 2 * 72}-{i // 2 * 72 + 71}",),
            memory_bytes=198_642_237_440,
            numa_id=36 + 8 * i,
            nvlinks=[FakeLink(count=18, version=7, speed=50_000)],
            bus_id=f"{i:08X}:01:00.0",
            fabric=fabric,
        )
        for i in range(72)
    ]
    return FakeMachine(gpus, driver_version="580.65.06", cuda_version=13000)


def machine_document(name: str) -> Document:
    """Return the description of ``machines/NAME.json``."""
    document: Document = json.loads(Path(__file__).with_name("machines").joinpath(f"{name}.json").read_text())
    return document


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
    options = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run([compiler, *options, "-o", str(library), str(source)], check=True, timeout=60)
    return library


def fake_nvml_environment(library: Path, machine: FakeMachine | Document, directory: Path) -> dict[str, str]:
    """Write the machine's file into a directory and return the variables that show it to a new process."""
    configuration = write_machine(machine, directory)
    paths = [str(library.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"LD_LIBRARY_PATH": os.pathsep.join(paths), "FAKE_NVML_CONFIG": str(configuration)}


def write_machine(machine: FakeMachine | Document, directory: Path) -> Path:
    """Write, or exchange at once, the file that the library reads."""
    document = machine.document() if isinstance(machine, FakeMachine) else machine
    configuration = directory / "fake_nvml.json"
    unfinished = configuration.with_suffix(".tmp")
    unfinished.write_text(json.dumps(document))
    unfinished.replace(configuration)
    return configuration


def load_fake_nvml(library: Path, configuration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ``pynvml`` of this process use the fake, whatever it has used before."""
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(library)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setenv("FAKE_NVML_CONFIG", str(configuration))
