"""Real vLLM, CPU build, over the nodes of a real Ray cluster: its Ray executor refuses CPUs, its native way not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.real.conftest import Gate
from tests.support.processes import processes_marked
from tests.support.ray_cluster import ADDRESSES, NEEDS_RAY, RayHosts, import_path

pytestmark = [*NEEDS_RAY, pytest.mark.real_vllm]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RayHosts]:
    hidden = ("PYTEST_", "VLLM_", "RAY_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    cluster = RayHosts(tmp_path)
    try:
        for address in ADDRESSES[:2]:
            cluster.start(address, import_path(kept | {"TEST_MARKER": tmp_path.name}))
        yield cluster
    finally:
        cluster.stop()


def test_nodes_come_from_ray_and_vllm_runs_over_them_in_its_native_way(
    cluster: RayHosts, make_gate: Callable[[], Gate], tmp_path: Path
) -> None:
    gate = make_gate()
    lists = "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    result = gate.run(
        *("--pyargs", "pytest_gpulayout.gates", "-k", "test_layout", "--gpu-layout=tp2@2", "--gpu-baseline=off"),
        "--gpu-results=results.json",
        RAY_ADDRESS=cluster.address,
        VLLM_CPU_OMP_THREADS_BIND=lists,
    )

    assert result.returncode == 0, result.stdout
    (server,) = gate.records("server")
    assert "--nnodes 2" in " ".join(server["command"])
    assert [node["name"] for node in server["nodes"]] == list(ADDRESSES[:2]), server
    left = [title for title in processes_marked(f"TEST_MARKER={tmp_path.name}").values() if "vllm" in title.lower()]
    assert left == []
