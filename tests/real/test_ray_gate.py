"""The gate of ``tp2@2`` through a real Ray cluster of two nodes on this host, whose GPUs are only described.

Real are Ray, the agents, the placement, the processes and the calls of NVML; the GPUs are those of the fake NVML
(``tests/native``), and vLLM is a fake whose workers a real Ray starts (``tests/support/ray_vllm``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.native.build import FakeGpu, FakeMachine, build_fake_nvml, fake_nvml_environment
from tests.support.processes import FAKE_VLLM, processes_marked, wait_until
from tests.support.ray_cluster import ADDRESSES, GPUS, NEEDS_RAY, RayHosts, import_path

pytestmark = NEEDS_RAY

RAY_VLLM = Path(__file__).parents[1] / "support" / "ray_vllm"

HIDDEN = ("CUDA_", "NCCL_", "VLLM_", "PYTEST_", "RAY_", "CI")
GATE = ["-p", "no:cacheprovider", "-p", "unwatched", "--gpu-layout=tp2@2", "--gpu-model=org/model"]
HOLD = """
import signal
from pathlib import Path

def test_hold(vllm_server, measure):
    Path("holding").touch()
    while True:
        measure()
"""


@dataclass
class GpuHosts:
    """Two nodes with GPUs. :param environment: of a run on the first of them. :param uuids: of all GPUs, by node.

    :param identity: what nobody else has in its environment.
    """

    folder: Path
    cluster: RayHosts
    environment: dict[str, str]
    uuids: dict[str, list[str]]
    identity: str

    def start(self, *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", *GATE, "--gpu-baseline=off", "--gpu-results=results.json", *options],
            cwd=self.folder,
            env=self.environment | {"RAY_ADDRESS": self.cluster.address},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *options: str) -> tuple[int, str]:
        with self.start(*options) as process:
            output, _ = process.communicate(timeout=240)
        return process.returncode, output

    @contextmanager
    def hold(self) -> Iterator[subprocess.Popen[str]]:
        """A run that measures again and again, once it does."""
        (self.folder / "test_suite.py").write_text(HOLD)
        (self.folder / "pytest.ini").write_text("[pytest]\n")
        held = self.folder / "holding"
        with self.start("test_suite.py") as process:
            wait_until(lambda: held.exists() or process.poll() is not None, "a server", timeout_s=120)
            assert process.poll() is None, process.communicate()[0]
            yield process

    def processes(self, *words: str) -> list[psutil.Process]:
        """Those of these nodes whose title has one of these words."""
        marked = processes_marked(f"TEST_MARKER={self.identity}")
        return [psutil.Process(pid) for pid, title in marked.items() if any(word in title for word in words)]

    def records(self, kind: str) -> list[dict[str, Any]]:
        document = json.loads((self.folder / "results.json").read_text())
        return [record for record in document["records"] if record["kind"] == kind]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[GpuHosts]:
    library = build_fake_nvml(tmp_path)
    identity = uuid.uuid4().hex[:12]
    with tempfile.TemporaryDirectory(prefix="gl-", dir="/tmp") as temporary:
        base = {name: value for name, value in os.environ.items() if not name.startswith(HIDDEN)}
        base |= {"TMPDIR": temporary, "PYTEST_DEBUG_TEMPROOT": str(tmp_path), "TEST_MARKER": identity}
        base["FAKE_VLLM"] = json.dumps({"nccl": "NET/IB/0"})
        cluster, environments, uuids = RayHosts(tmp_path), dict[str, dict[str, str]](), dict[str, list[str]]()
        for number, address in enumerate(ADDRESSES[:2]):
            folder = tmp_path / address
            (folder / "contexts").mkdir(parents=True)
            names = [f"GPU-{number}{index:07x}-0000-4000-8000-{identity}" for index in range(GPUS)]
            machine = FakeMachine([FakeGpu(uuid=name, cpus=("0-1023",)) for name in names])
            node = base | fake_nvml_environment(library, machine, folder)
            node["FAKE_NVML_CONTEXTS"] = str(folder / "contexts")
            environments[address], uuids[address] = import_path(node, RAY_VLLM, FAKE_VLLM), names
        try:
            for address in ADDRESSES[:2]:
                cluster.start(address, environments[address])
            yield GpuHosts(tmp_path, cluster, environments[ADDRESSES[0]], uuids, identity)
        finally:
            cluster.stop()
        assert [name for name in os.listdir(temporary) if name.startswith("gpulayout")] == []
        assert [name for name in os.listdir("/tmp") if name.startswith("gpulayout-nccl-")] == []
        assert [name for name in os.listdir("/tmp") if name.startswith("gpulayout-") and identity in name] == []


def test_the_gate_proves_a_layout_whose_ranks_ray_has_placed(hosts: GpuHosts) -> None:
    code, text = hosts.run("--pyargs", "pytest_gpulayout.gates", "-k", "not performance and not collectives")

    assert code == 0, text
    (transport,) = hosts.records("transport")
    assert transport["transports"] == {"NET/IB/0": 8}, text
    (processes,) = hosts.records("processes")
    assert sorted(rank["uuid"] for rank in processes["ranks"]) == sorted(names[0] for names in hosts.uuids.values())
    (server,) = hosts.records("server")
    assert "--distributed-executor-backend ray" in " ".join(server["command"])
    assert "--nnodes" not in server["command"]


def test_a_node_that_ray_loses_ends_the_run_with_its_name_within_30_s(hosts: GpuHosts) -> None:
    with hosts.hold() as process:
        began = time.monotonic()
        hosts.cluster.kill(ADDRESSES[1])
        output, _ = process.communicate(timeout=120)

    assert time.monotonic() - began < 30, output
    assert process.returncode == 1, output
    assert f"node {ADDRESSES[1]} must stay while a layout runs on it, and is lost" in output, output


def test_a_worker_that_ends_ends_the_run_with_its_node_s_name_within_30_s(hosts: GpuHosts) -> None:
    with hosts.hold() as process:
        workers = hosts.processes("ray::RayWorkerProc")
        assert len(workers) == 2
        on_second = [
            worker
            for worker in workers
            if worker.environ()["FAKE_NVML_CONFIG"] == str(hosts.folder / ADDRESSES[1] / "fake_nvml.json")
        ]
        began = time.monotonic()
        on_second[0].kill()
        output, _ = process.communicate(timeout=120)

    assert time.monotonic() - began < 30, output
    assert process.returncode == 1, output
    assert f"on node {ADDRESSES[1]} (host " in output, output


def test_a_run_that_is_killed_leaves_nothing_on_any_node(hosts: GpuHosts) -> None:
    ours = ("ray_agent", "ray_driver.py", "vllm.entrypoints", "RayWorkerProc", "EngineCore")
    with hosts.hold() as process:
        assert len(hosts.processes(*ours)) >= 7
        process.kill()
        process.communicate()
        wait_until(lambda: not hosts.processes(*ours), "the end of all that the run had", timeout_s=60)
