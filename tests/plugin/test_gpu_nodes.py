"""The gate over two machines with GPUs that are only described: agents, NVML calls and NCCL's logs of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.native.build import FakeGpu, FakeMachine, FakePair, build_fake_nvml, fake_nvml_environment
from tests.support.processes import FAKE_VLLM, ROOT, processes_marked, wait_until

pytestmark = pytest.mark.end_to_end

HIDDEN = ("CUDA_", "NCCL_", "VLLM_", "PYTEST_", "RAY_")


@dataclass
class Cluster:
    """Two machines, ``a`` and ``b``. :param identity: what no other test's UUIDs contain."""

    folder: Path
    environment: dict[str, str]
    identity: str

    def run(self, layout: str, *options: str, **fake: object) -> tuple[int, str]:
        """Run the gate but for its speeds: exit code and output."""
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"),
                *("--pyargs", "pytest_gpulayout.gates", "-k", "not performance and not collectives"),
                *(f"--gpu-layout={layout}", "--gpu-model=org/model", "--gpu-nodes=a,b"),
                f"--gpu-node-command=env FAKE_NVML_CONFIG={self.folder}/{{node}}/fake_nvml.json",
                *("--gpu-master-addr=127.0.0.1", "--gpu-results=results.json", *options),
            ],
            cwd=self.folder,
            env={**self.environment, "FAKE_VLLM": json.dumps(fake)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def records(self, kind: str) -> list[dict[str, Any]]:
        records = json.loads((self.folder / "results.json").read_text())["records"]
        return [record for record in records if record["kind"] == kind]

    def uuid(self, node: str, index: int) -> str:
        return uuid_of(self.identity, node, index)


def uuid_of(identity: str, node: str, index: int) -> str:
    return f"GPU-{index:08x}-000{node}-4000-8000-{identity}"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def cluster(library: Path, tmp_path: Path) -> Iterator[Cluster]:
    """Two GPUs with a bridge on each of two machines, and nothing of a test left on either."""
    identity = uuid.uuid4().hex[:12]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(HIDDEN)}
    for node in ("a", "b"):
        (tmp_path / node).mkdir()
        gpus = [FakeGpu(uuid=uuid_of(identity, node, index), cpus=("0-1023",)) for index in range(2)]
        machine = FakeMachine(gpus, {(0, 1): FakePair(level="PHB", nvlinks=4)})
        environment |= fake_nvml_environment(library, machine, tmp_path / node)
    (tmp_path / "contexts").mkdir()
    with tempfile.TemporaryDirectory(prefix="gl-", dir="/tmp") as temporary:
        environment |= {"FAKE_NVML_CONTEXTS": str(tmp_path / "contexts"), "TMPDIR": temporary}
        environment |= {"PYTHONPATH": os.pathsep.join([str(FAKE_VLLM), str(ROOT)])}
        environment |= {"TEST_MARKER": identity, "PYTEST_DEBUG_TEMPROOT": str(tmp_path)}
        del environment["FAKE_NVML_CONFIG"]  # this host has none
        yield Cluster(tmp_path, environment, identity)
        wait_until(lambda: processes_marked(f"TEST_MARKER={identity}") == {}, "the end of all processes", 45)
        assert [name for name in os.listdir(temporary) if "gpulayout" in name] == []
        assert [name for name in os.listdir("/tmp") if name.startswith("gpulayout-") and identity in name] == []


def test_gate_passes_over_two_machines_with_a_network(cluster: Cluster) -> None:
    code, text = cluster.run("tp4@2", "--gpu-link=nvlink", nccl="NET/IB/0/GDRDMA")

    assert code == 0, text
    assert "gpu layout: tp4@2 on cuda, nodes a, b" in text
    assert "tp4@2: node a: worst link NV4, node b: worst link NV4, transport NET/IB/0/GDRDMA x16, vLLM 0.32.0" in text
    assert "  processes: each rank on its GPU and no other (process list)\n" in text
    (processes,) = cluster.records("processes")
    assert [rank["uuid"] for rank in processes["ranks"]] == [
        cluster.uuid(node, index) for node in ("a", "b") for index in range(2)
    ]
    (transport,) = cluster.records("transport")
    assert transport["nodes"] == processes["nodes"] == {"0": "a", "1": "a", "2": "b", "3": "b"}
    assert [(edge["src"], edge["dst"]) for edge in transport["edges"]] == [(0, 1), (1, 2), (2, 3), (3, 0)]


def test_sockets_between_machines_fail_the_gate(cluster: Cluster) -> None:
    code, text = cluster.run("tp4@2", nccl="NET/Socket/0")

    assert code == 1, text
    assert "1 failed, 2 passed" in text, text
    assert "transport NET/Socket/0, allowed: all but NET/Socket and CPU/GLOO" in text


def test_rank_on_a_gpu_of_another_is_found_on_its_node(cluster: Cluster) -> None:
    code, text = cluster.run("tp4@2", contexts={"3": [cluster.uuid("b", 0)]}, nccl="NET/IB/0")

    assert code == 1, text
    assert f"GPU 0 ({cluster.uuid('b', 0)}) of node b" in text
    assert "rank 3" in text
