from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pytest_gpulayout.links import parse_link_class
from pytest_gpulayout.topology import Device, Fabric, NvLinks, P2pStatus, PcieLink, Topology
from pytest_gpulayout.topology_faults import describe_faults, name_gpus, name_pairs

SWITCHED = NvLinks(tuple(range(18)), active=True, remote="switch", version="4.0", speed_mbps=26562)
READY = Fabric("completed", "Success")


def gpus(count: int = 4, link: str | None = "NV18", only: int | None = None, **facts: Any) -> Topology:
    """GPUs that all have these facts, or of which one has them."""
    devices = [Device(index=i, name="NVIDIA H100", pci_bus_id=f"00000000:{i + 10:02X}:00.0") for i in range(count)]
    devices = [replace(d, **facts) if only in (None, d.index) else d for d in devices]
    topology = Topology(tuple(devices), {}, "NVML", recorded=False)
    return (
        topology if link is None else replace(topology, links=dict.fromkeys(topology.pairs, parse_link_class(link)))
    )


def links(
    up: str, down: str = "", *, remote: str | None = None, speed_mbps: int | None = None
) -> tuple[NvLinks, ...]:
    """Numbers of links that are up, and of those that are down, separated by spaces."""
    return tuple(
        NvLinks(
            tuple(map(int, text.split())), active=active, remote=remote if active else None, speed_mbps=speed_mbps
        )
        for text, active in ((up, True), (down, False))
        if text
    )


def p2p(topology: Topology, status: str, capability: str | None = "n") -> Topology:
    return replace(topology, p2p=tuple(P2pStatus(a, b, capability, status) for a, b in topology.pairs))


HEALTHY = {
    "no facts": gpus(),
    "one GPU": gpus(1),
    "no GPU": gpus(0),
    "links unknown": gpus(link=None),
    "switches": p2p(gpus(nvlinks=(SWITCHED,), fabric=READY, mig=False, pcie=PcieLink(5, 16, 5, 16)), "OK"),
    "idle PCIe": gpus(pcie=PcieLink(1, 16, 5, 16)),
    "PCIe not said": gpus(pcie=PcieLink(None, None, 5, 16)),
    "most of PCIe not said": gpus(pcie=PcieLink(5, 8, None, None)),
    "no bridge": p2p(gpus(2, "PHB", nvlinks=links("", "0 1 2 3")), "NS"),
    "read refused over PCIe": p2p(gpus(2, "SYS"), "CNS", "r"),
    "p2p of unknown kind": p2p(gpus(2), "NS", None),
    "two models": replace(
        gpus(2),
        devices=(
            Device(0, name="A", nvlinks=links("0 1", speed_mbps=25781)),
            Device(1, name="B", nvlinks=links("0 1", speed_mbps=50000)),
        ),
    ),
    "bridge": replace(
        gpus(2),
        devices=(
            Device(0, pci_bus_id="00000000:0A:00.0", nvlinks=links("0 1", remote="0000:0b:00.0")),
            Device(1, pci_bus_id="0000:0b:00.0", nvlinks=links("2 3", remote="00000000:0A:00.0")),
        ),
    ),
    "other ends not said": gpus(2, nvlinks=links("0 1")),
    "a speed not said": gpus(2, only=1, nvlinks=(replace(SWITCHED, speed_mbps=None),)),
}


@pytest.mark.parametrize("topology", HEALTHY.values(), ids=HEALTHY)
def test_no_sentence_about_a_healthy_machine(topology: Topology) -> None:
    assert describe_faults(topology) == ()


@pytest.mark.parametrize(
    ("topology", "told"),
    [
        (gpus(only=3, fault="GPU is lost"), "GPU 3 cannot be used: GPU is lost"),
        (gpus(2, only=1, fault="GPU is lost", mig=True), "GPU 1 cannot be used: GPU is lost"),
        (gpus(mig=True), "GPUs 0-3 cannot be used whole: MIG is on, and its instances have no peer access"),
        (
            gpus(only=0, nvlinks=links("0 1 2 3 5 6 8 9 10 11", "4 7")),
            "GPU 0: 10 of 12 NVLinks are up, 4 and 7 are down",
        ),
        (gpus(2, nvlinks=links("0 1 2", "3")), "GPUs 0 and 1: 3 of 4 NVLinks are up, 3 is down"),
        (gpus(only=2, pcie=PcieLink(5, 8, 5, 16)), "GPU 2: PCIe x8, x16 is possible"),
        (
            gpus(fabric=Fabric("not started", "Success")),
            "GPUs 0-3: NVLink through switches is not ready, the registration at the fabric manager is not started",
        ),
        (
            gpus(only=1, fabric=Fabric("in progress", "Success")),
            "GPU 1: NVLink through switches is not ready, the registration at the fabric manager is in progress",
        ),
        (
            gpus(only=1, fabric=Fabric("completed", "Insufficient Resources")),
            "GPU 1: NVLink through switches is not ready, the fabric manager ended the registration with: "
            "Insufficient Resources",
        ),
        (
            gpus(only=0, nvlinks=links("0 1 2", speed_mbps=26562) + links("3 4", speed_mbps=20000)),
            "GPU 0: NVLinks 3 and 4 at 20.0 GB/s, the fastest of this model at 26.6 GB/s",
        ),
        (
            p2p(gpus(), "NS"),
            "all pairs: NV18 connects them, no peer access over NVLink (NS: not supported)",
        ),
        (
            replace(gpus(), p2p=(P2pStatus(3, 1, "n", "DR"), P2pStatus(0, 1, "n", "OK"))),
            "GPUs 1 and 3: NV18 connects them, no peer access over NVLink "
            "(DR: disabled by a registry key of the driver)",
        ),
    ],
)
def test_a_sentence_for_each_fault(topology: Topology, told: str) -> None:
    assert describe_faults(topology) == (told,)


def test_a_slow_link_is_slow_beside_the_same_model_only() -> None:
    fast, slow = links("0", speed_mbps=26562), links("0 1", speed_mbps=25781)
    same = gpus(2)
    same = replace(
        same, devices=tuple(replace(d, nvlinks=n) for d, n in zip(same.devices, (fast, slow), strict=True))
    )
    assert describe_faults(same) == ("GPU 1: NVLinks 0 and 1 at 25.8 GB/s, the fastest of this model at 26.6 GB/s",)
    unknown = replace(same, devices=tuple(replace(device, name=None) for device in same.devices))
    assert describe_faults(unknown) == ()


@pytest.mark.parametrize("remote", ["00000000:0A:00.0", "0000:0a:00.0"])
def test_both_ends_of_a_bridge_must_count_alike(remote: str) -> None:
    topology = gpus(2, "NV3")
    ends = (links("0 1 2 3", remote="00000000:0B:00.0"), links("0 1 2", remote=remote))
    topology = replace(
        topology, devices=tuple(replace(d, nvlinks=n) for d, n in zip(topology.devices, ends, strict=True))
    )
    assert describe_faults(topology) == (
        "GPUs 0 and 1: of the NVLinks between them 4 are up as GPU 0 counts, 3 as GPU 1 does",
    )


def test_a_gpu_with_mig_is_not_blamed_for_its_peer_access_too() -> None:
    assert len(describe_faults(p2p(gpus(2, only=0, mig=True), "NS"))) == 1


@pytest.mark.parametrize(
    ("indices", "name"),
    [
        ((3,), "GPU 3"),
        ((0, 1), "GPUs 0 and 1"),
        ((0, 1, 2), "GPUs 0-2"),
        ((0, 2, 5), "GPUs 0, 2 and 5"),
        ((0, 1, 2, 3, 6), "GPUs 0-3 and 6"),
        ((0, 1, 4, 5, 6, 9), "GPUs 0, 1, 4-6 and 9"),
    ],
)
def test_names_of_gpus(indices: tuple[int, ...], name: str) -> None:
    assert name_gpus(indices) == name


def test_names_of_pairs() -> None:
    every = gpus(4).pairs
    assert name_pairs(every[:1], every) == "GPUs 0 and 1"
    assert name_pairs(every[:2], every) == "GPUs 0 and 1, 0 and 2"
    assert name_pairs(every[:5], every) == "GPUs 0 and 1, 0 and 2, 0 and 3, 1 and 2 and 1 more pair"
    assert name_pairs(every, every) == "all pairs"
    assert name_pairs([(0, 1)], [(0, 1)]) == "GPUs 0 and 1"
