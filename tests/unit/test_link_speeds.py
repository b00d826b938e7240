from __future__ import annotations

import pytest

from pytest_gpulayout.gpu_specs import find_gpu
from pytest_gpulayout.link_speeds import (
    LinkSpeed,
    Network,
    all_gather,
    all_reduce,
    all_to_all,
    link_speed,
    network_speed,
    reduce_scatter,
    send,
    worst_speed,
)
from pytest_gpulayout.links import parse_link_class

H200, A10G, RTX_4090 = find_gpu("H200"), find_gpu("A10G"), find_gpu("RTX-4090")


def between(gpu: str, link: str, *, peer_access: bool | None = None) -> LinkSpeed:
    return link_speed(parse_link_class(link), find_gpu(gpu), peer_access=peer_access)


NVLINK, PCIE, NETWORK = between("H200", "NV18"), between("H200", "PHB"), network_speed(Network(10), H200)


@pytest.mark.parametrize(
    ("gpu", "link", "gb_per_s", "direct"),
    [
        ("H200", "NV18", 18 * 20.6, True),
        ("A100-SXM", "NV12", 240, True),
        ("RTX-A6000", "NV4", 48, True),
        ("B200", "NV18", 18 * 40.1, True),
        ("H200", "PIX", 48, True),
        ("A10G", "PIX", 24, True),
        ("A10G", "PHB", 12, True),
        ("A10G", "SYS", 10, True),
        ("T4", "SYS", 6, True),
        ("RTX-4090", "PIX", 12, False),
        ("RTX-4090", "SYS", 10, False),
    ],
)
def test_what_a_link_gives(gpu: str, link: str, gb_per_s: float, direct: bool) -> None:
    found = between(gpu, link)
    assert found.gb_per_s == pytest.approx(gb_per_s)
    assert found.direct is direct


def test_the_driver_knows_better_whether_gpus_reach_each_other() -> None:
    assert not between("A10G", "PIX", peer_access=False).direct
    assert between("A10G", "PIX", peer_access=False).gb_per_s == 12
    assert between("RTX-4090", "PIX", peer_access=True).direct


def test_the_worst_link_counts() -> None:
    assert worst_speed([]) is None
    worst = worst_speed([NVLINK, PCIE, NVLINK])
    assert worst is not None
    assert (worst.name, worst.switched) == (PCIE.name, False)


# -- when vLLM uses its own kernel -----------------------------------------------------------------------------------

KIB, MIB = 1024, 2**20


@pytest.mark.parametrize(
    ("ranks", "size", "speed", "by"),
    [
        (2, 64 * KIB, NVLINK, "vLLM one-shot"),
        (2, 4 * MIB, NVLINK, "vLLM one-shot"),
        (4, 512 * KIB - 16, NVLINK, "vLLM one-shot"),
        (4, 512 * KIB, NVLINK, "vLLM two-shot"),
        (8, 256 * KIB - 16, NVLINK, "vLLM one-shot"),
        (6, 512 * KIB - 16, NVLINK, "vLLM two-shot"),
        # Hopper on NVSwitch: from 256 KiB for 8 and 512 KiB for 6 GPUs on, others take over.
        (8, 256 * KIB, NVLINK, "NCCL"),
        (6, 512 * KIB, NVLINK, "NCCL"),
        (4, 8 * MIB, NVLINK, "NCCL"),
        (8, 256 * KIB, between("A100-SXM", "NV12"), "vLLM two-shot"),
        (3, 64 * KIB, NVLINK, "NCCL"),
        (16, 64 * KIB, NVLINK, "NCCL"),
        (2, 64 * KIB + 2, NVLINK, "NCCL"),  # no multiple of 16 bytes
        (2, 64 * KIB, between("A10G", "PIX"), "vLLM one-shot"),
        (4, 64 * KIB, between("A10G", "PIX"), "NCCL"),  # more than two PCIe-only GPUs
        (2, 64 * KIB, between("RTX-4090", "PIX"), "NCCL"),  # no peer access
        (2, 64 * KIB, NETWORK, "NCCL"),
    ],
)
def test_who_does_an_all_reduce(ranks: int, size: int, speed: LinkSpeed, by: str) -> None:
    assert all_reduce(ranks, size, speed).by.startswith(by)


@pytest.mark.parametrize(
    ("ranks", "size", "measured_us"),
    [
        *((2, 512, 3.7), (4, 512, 4.8), (8, 512, 5.9)),
        *((2, 4 * KIB, 3.9), (4, 4 * KIB, 3.7), (8, 4 * KIB, 5.7)),
        *((2, 32 * KIB, 4.5), (4, 32 * KIB, 4.8), (8, 32 * KIB, 7.8)),
        *((2, 256 * KIB, 7.9), (4, 256 * KIB, 13.9), (8, 256 * KIB, 16.7)),
        *((2, 512 * KIB, 12.5), (4, 512 * KIB, 20.2), (8, 512 * KIB, 22.1)),
        *((2, MIB, 19.9), (4, MIB, 31.1), (8, MIB, 33.8)),
    ],
)
def test_the_kernel_is_estimated_as_it_was_measured(ranks: int, size: int, measured_us: float) -> None:
    """sgl-project/sglang#2904, H100; on A100's limits, so that no other way is taken at these sizes."""
    speed = LinkSpeed("NVLink", "nvlink", 450, direct=True, switched=False, capability="9.0")
    assert all_reduce(ranks, size, speed).us == pytest.approx(measured_us, rel=0.35)


# -- NCCL's model ----------------------------------------------------------------------------------------------------


def test_a_small_all_reduce_over_pcie_is_latency() -> None:
    """Ring and tree with LL: 6.6 and 6.8 us, and 2 x 3 hops of 1 us."""
    found = all_reduce(4, 16, PCIE)
    assert found.us == pytest.approx(12.6, abs=0.01)
    assert found.by == "NCCL ring LL"


def test_a_large_all_reduce_over_pcie_is_bandwidth() -> None:
    """2 x 3 / 4 of the bytes over each link, at 24 GB/s."""
    size = 1 << 30
    found = all_reduce(4, size, PCIE)
    assert found.by == "NCCL ring Simple"
    assert found.us == pytest.approx(1.5 * size / 24e3 + 8.4 + 6 * 5.7)


def test_an_all_gather_takes_half_the_steps() -> None:
    size = 1 << 30
    assert all_gather(4, size, PCIE).us == pytest.approx(0.75 * size / 24e3 + 8.4 + 3 * 5.7)
    assert reduce_scatter(4, size, PCIE) == all_gather(4, size, PCIE)


def test_a_network_has_the_latency_of_networks() -> None:
    """10 Gbit/s are 1.25 GB/s; a hop takes 2.7 us with LL over RDMA, and some 30 us more over TCP."""
    rdma = network_speed(Network(10, rdma=True), H200)
    assert all_reduce(2, 16, rdma).us == pytest.approx(6.6 + 2 * 2.7, abs=0.05)
    assert all_reduce(2, 16, NETWORK).us == pytest.approx(6.6 + 2 * 32.7, abs=0.05)
    assert all_reduce(2, 1 << 30, NETWORK).us == pytest.approx((1 << 30) / 1.25e3, rel=0.01)
    assert (rdma.name, NETWORK.name) == ("RDMA of 10 Gbit/s", "sockets of 10 Gbit/s")


def test_a_send_is_one_hop() -> None:
    assert send(24_000, PCIE).us == pytest.approx(8.4 + 5.7 + 1)
    assert all_to_all(4, 24_000, PCIE).us == pytest.approx(8.4 + 5.7 + 1)


@pytest.mark.parametrize("speed", [NVLINK, PCIE, NETWORK, between("RTX-4090", "SYS")])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_more_bytes_never_take_less_time(speed: LinkSpeed, ranks: int) -> None:
    for collective in (all_reduce, all_gather, all_to_all):
        times = [collective(ranks, 16 << power, speed).us for power in range(8)]
        assert times == sorted(times)


def test_worse_links_take_longer() -> None:
    size = 100 * 2048 * 2  # a decoding step of 100 sequences of a model 2048 wide
    times = [all_reduce(4, size, speed).us for speed in (NVLINK, between("H200", "PIX"), PCIE, NETWORK)]
    assert times == sorted(times)
    assert times[-1] > 20 * times[0]
