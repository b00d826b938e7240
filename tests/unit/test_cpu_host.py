from __future__ import annotations

import os

import pytest

from pytest_gpulayout.adapters import cpu_host
from pytest_gpulayout.adapters.cpu_host import (
    CpuTopology,
    binding_of,
    cpu_model,
    format_cpus,
    numa_nodes,
    parse_cpus,
)
from pytest_gpulayout.errors import TopologyError

TWO_NODES = {core: core // 4 for core in range(8)}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Eight cores on two NUMA nodes, all ours."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(TWO_NODES))
    monkeypatch.setattr(cpu_host, "numa_nodes", lambda: TWO_NODES)
    return monkeypatch


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("", []),
        ("0", [0]),
        ("0-2,5", [0, 1, 2, 5]),
        ("3-3", [3]),
        (" 0-1 , 8 ", [0, 1, 8]),
        ("5,0", [5, 0]),
        ("0,,1", [0, 1]),
    ],
)
def test_parse_cpus(text: str, cpus: list[int]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["a", "1-", "-1", "3-1", "0-2-4", "0;1", "0x1", "all"])
def test_text_that_is_no_list_of_cores(text: str) -> None:
    with pytest.raises(TopologyError) as caught:
        parse_cpus(text)
    assert str(caught.value).splitlines() == [
        f"a list of cores such as 0-3,8 was expected, found {text!r}",
        "  in the environment: VLLM_CPU_OMP_THREADS_BIND",
        "  write numbers and ranges, one list per rank: 0-3|4-7",
    ]


@pytest.mark.parametrize(
    ("cpus", "text"),
    [([], ""), ([3], "3"), ([0, 1, 2, 5], "0-2,5"), ([5, 4, 4, 0], "0,4-5"), (list(range(64)), "0-63")],
)
def test_format_cpus(cpus: list[int], text: str) -> None:
    assert format_cpus(cpus) == text
    assert parse_cpus(text) == sorted(set(cpus))


@pytest.mark.parametrize(
    ("ranks", "bind", "cores", "nodes", "link"),
    [
        (1, None, ["0-7"], ["0-1"], None),
        (2, None, ["0-3", "4-7"], [0, 1], "SYS"),
        (3, None, ["0-1", "2-3", "4-5"], [0, 0, 1], "NODE"),
        (8, None, ["0", "1", "2", "3", "4", "5", "6", "7"], [0, 0, 0, 0, 1, 1, 1, 1], "NODE"),
        (2, "0-1|2-3", ["0-1", "2-3"], [0, 0], "NODE"),
        (2, "4|0", ["4", "0"], [1, 0], "SYS"),
        (2, "0-1|2-3|4-5", ["0-1", "2-3"], [0, 0], "NODE"),
        (2, "nobind", ["0-7", "0-7"], ["0-1", "0-1"], "NODE"),
        (2, "auto", ["0-7", "0-7"], ["0-1", "0-1"], "NODE"),
    ],
)
@pytest.mark.usefixtures("machine")
def test_ranks_are_devices(
    ranks: int, bind: str | None, cores: list[str], nodes: list[int | str], link: str | None
) -> None:
    topology = CpuTopology(ranks, bind).probe()
    assert [device.cpu_affinity for device in topology.devices] == cores
    assert [device.numa_node for device in topology.devices] == nodes
    assert [device.name for device in topology.devices] == [f"cores {text}" for text in cores]
    assert (str(topology.links[0, 1]) if ranks > 1 else None) == link
    assert len(topology.links) == ranks * (ranks - 1) // 2
    assert (topology.platform, topology.source, topology.recorded) == ("cpu", "/proc and /sys", False)
    assert binding_of(topology.devices) == "|".join(cores)


def test_cores_of_a_rank_lie_on_one_node_when_numbers_alternate(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(cpu_host, "numa_nodes", lambda: {core: core % 2 for core in range(8)})
    topology = CpuTopology(2, None).probe()
    assert [device.cpu_affinity for device in topology.devices] == ["0,2,4,6", "1,3,5,7"]
    assert [device.numa_node for device in topology.devices] == [0, 1]


def test_only_cores_that_we_may_use(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(os, "sched_getaffinity", lambda _: {2, 3})
    assert [device.cpu_affinity for device in CpuTopology(2, None).probe().devices] == ["2", "3"]


@pytest.mark.usefixtures("machine")
def test_fewer_cores_than_ranks() -> None:
    with pytest.raises(TopologyError) as caught:
        CpuTopology(9, None).probe()
    assert str(caught.value).splitlines() == [
        "9 ranks need at least 9 cores, found 8 (0-7)",
        "  on this machine, as far as this process may use it",
        "  choose a smaller layout, such as --gpu-layout=tp8",
    ]


@pytest.mark.usefixtures("machine")
def test_fewer_lists_than_ranks() -> None:
    with pytest.raises(TopologyError) as caught:
        CpuTopology(2, "0-3").probe()
    assert str(caught.value).splitlines() == [
        "2 ranks need 2 lists of cores, found 1",
        "  in the environment: VLLM_CPU_OMP_THREADS_BIND=0-3",
        "  unset it to spread the cores evenly, or write one list per rank, such as 0-3|4-7",
    ]


@pytest.mark.parametrize("bind", ["0|", "|0", "0||1"])
@pytest.mark.usefixtures("machine")
def test_rank_without_cores(bind: str) -> None:
    with pytest.raises(TopologyError, match="a list of cores such as 0-3,8 was expected"):
        CpuTopology(2, bind).probe()


def test_this_machine() -> None:
    assert set(os.sched_getaffinity(0)) <= set(numa_nodes()) or numa_nodes() == {}
    assert cpu_model().strip()
