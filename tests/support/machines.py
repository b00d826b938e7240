"""Machines for tests of topologies."""

from __future__ import annotations

from itertools import combinations

from pytest_gpulayout.links import parse_link_class
from pytest_gpulayout.topology import Device, Topology


def machine(count: int, links: dict[tuple[int, int], str], default: str | None = "SYS") -> Topology:
    """GPUs 0 to count - 1, the first half on NUMA node 0, the second on node 1."""
    classes = {pair: links.get(pair, default) for pair in combinations(range(count), 2)}
    return Topology(
        devices=tuple(
            Device(index=i, name="NVIDIA H100", uuid=f"GPU-{i}{i}-abc", numa_node=2 * i // count)
            for i in range(count)
        ),
        links={pair: parse_link_class(text) for pair, text in classes.items() if text is not None},
        source="NVML",
        recorded=False,
    )


PAIRS_OF_NVLINK = machine(4, {(0, 3): "NV12", (1, 2): "NV12"}, default="NODE")
