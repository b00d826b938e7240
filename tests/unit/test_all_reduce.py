from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import pytest

from pytest_gpulayout.all_reduce import judge_all_reduce
from pytest_gpulayout.causes import Finding
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_link_class
from pytest_gpulayout.topology import SWITCH, Device, NvLinks, P2pStatus, Topology
from pytest_gpulayout.vllm_log import parse_vllm_log

SILENCE = " To silence this warning, specify disable_custom_all_reduce=True explicitly."
PCIE_ONLY = "Custom allreduce is disabled because it's not supported on more than two PCIe-only GPUs." + SILENCE
NO_P2P = "Custom allreduce is disabled because your platform lacks GPU P2P capability or P2P test failed." + SILENCE
DISAGREE = "Two processes do not agree on the P2P access status on 0 -> 1, treat as disabled."
WORLD_SIZE = (
    "Custom allreduce is disabled due to an unsupported world size: 3. Supported world sizes: [2, 4, 6, 8, 16]."
    + SILENCE
)
NODES = (
    "Custom collectives are disabled because this multi-node group does not have MNNVL-capable GPUs on every rank."
)
OLDER_NODES = "Custom allreduce is disabled because this process group spans across nodes."
NO_LIBRARY = "Custom allreduce is disabled because of missing custom allreduce library"
NEW_REASON = "Custom allreduce is disabled because the moon is full."
NO_MULTICAST = "SymmMemCommunicator: symmetric memory multicast operations are not supported."
OLD_GPU = "SymmMemCommunicator: Device capability 8.0 not supported, communicator is not available."

SOURCES = {
    "Custom ": "custom_all_reduce.py",
    "Two ": "all_reduce_utils.py",
    "Symm": "symm_mem.py",
    "Using ": "cuda_communicator.py",
    "Initializing ": "core.py",
}


def only(*backends: str, group: str = "tp:0", potential: str = "'CUSTOM', 'PYNCCL'") -> str:
    names = ", ".join(f"'{name}'" for name in backends)
    return (
        f"Using [{names}] all-reduce backends (in dispatch order) for group '{group}' "
        f"out of potential backends: [{potential}]."
    )


def option(value: object) -> str:
    return f"Initializing a V1 LLM engine (v0.32.0) with config: model='m', disable_custom_all_reduce={value}, seed=0"


def machine(link: str | None, gpus: int = 8, *, p2p: str | None = None, switch: bool = False) -> Topology:
    """A machine whose GPUs are all linked alike. :param p2p: such as ``"r:OK,n:NS"``, of every pair."""
    nvlinks = (NvLinks((0, 1), active=True, remote=SWITCH),) if switch else ()
    pairs = list(combinations(range(gpus), 2))
    said = [item.split(":") for item in (p2p or "").split(",") if item]
    return Topology(
        devices=tuple(Device(index, nvlinks=nvlinks) for index in range(gpus)),
        links=dict.fromkeys(pairs, parse_link_class(link)) if link else {},
        source="test",
        recorded=True,
        p2p=tuple(P2pStatus(a, b, letter, status) for a, b in pairs for letter, status in said),
    )


def judge(
    *messages: str,
    layout: str = "tp4",
    on: Topology | None = None,
    placement: tuple[int, ...] | None = None,
    arguments: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> tuple[Finding, ...]:
    lines = [
        f"(Worker pid=5) INFO 11-21 03:43:41 [{source}:7] {message}"
        for message in messages
        for start, source in SOURCES.items()
        if message.startswith(start)
    ]
    assert len(lines) == len(messages)
    parsed = parse_layout(layout)
    placement = tuple(range(parsed.gpus_per_node)) if placement is None else placement
    facts = parse_vllm_log(lines, "server.log")
    return judge_all_reduce(facts, parsed, on, placement, arguments, environment or {})


NVSWITCH = machine("NV18", switch=True)

UNEXPECTED = [
    pytest.param(
        *(PCIE_ONLY, "tp4", machine("NV12")),
        "vLLM's own all-reduce is off, it sees more than two PCIe-only GPUs, but NV12 links GPUs 0,1,2,3",
        "nvidia-smi topo -p2p n",
        id="NVLink everywhere",
    ),
    pytest.param(
        *(PCIE_ONLY, "tp4", machine("NV18", p2p="r:OK,n:NS")),
        "vLLM's own all-reduce is off, it sees more than two PCIe-only GPUs, but NV18 links GPUs 0,1,2,3; the driver "
        "refuses P2P between 0 and 1 (NS: not supported)",
        "restart nvidia-fabricmanager",
        id="NVLink that the driver refuses",
    ),
    pytest.param(
        *(NO_P2P, "tp2", machine("NV4")),
        "vLLM's own all-reduce is off, its P2P check failed, but NV4 links GPUs 0,1",
        "nvidia-smi topo -p2p r",
        id="no P2P over NVLink",
    ),
    pytest.param(
        *(NO_P2P, "tp2", machine("PIX", p2p="r:OK,w:OK")),
        "vLLM's own all-reduce is off, its P2P check failed, but PIX links GPUs 0,1, the driver says OK for P2P",
        "look for a VM, IOMMU and ACS",
        id="no P2P though the driver says OK",
    ),
    pytest.param(
        *(DISAGREE, "tp2", machine(None, p2p="r:OK")),
        "vLLM's own all-reduce is off, its P2P check failed, but an unknown link links GPUs 0,1, the driver says OK "
        "for P2P",
        "IOMMU",
        id="processes disagree",
    ),
    pytest.param(
        *(WORLD_SIZE, "tp4", machine("NV18")),
        "vLLM's own all-reduce is off in a group of 3 ranks, layout tp4 has groups of 4",
        "this log is of another server",
        id="another size",
    ),
    pytest.param(
        *(NODES, "tp8pp2@2", machine("NV18")),
        "vLLM's own all-reduce is off, its ranks see several nodes, but layout tp8pp2@2 keeps a tensor-parallel "
        "group on one",
        "share /dev/shm",
        id="nodes where the group has one",
    ),
    pytest.param(
        *(OLDER_NODES, "tp2x2@2", None),
        "vLLM's own all-reduce is off, its ranks see several nodes, but layout tp2x2@2 keeps a tensor-parallel group "
        "on one",
        "--ipc=host",
        id="nodes, older words",
    ),
    pytest.param(
        *(NO_LIBRARY, "tp2", None),
        "vLLM's own all-reduce is off: its kernels are missing from this vLLM",
        "install a vLLM that is built for this CUDA",
        id="no library",
    ),
    pytest.param(
        *(NEW_REASON, "tp2", None),
        "vLLM's own all-reduce is off: the moon is full",
        "--disable-custom-all-reduce",
        id="a reason of a newer release",
    ),
    pytest.param(
        *(only("PYNCCL"), "tp4", machine("NV12")),
        "group tp:0 has NCCL as its only all-reduce, but NV12 links GPUs 0,1,2,3",
        "compare vLLM's version and arguments",
        id="only NCCL, and no reason",
    ),
    pytest.param(
        *(only("PYNCCL", potential=""), "tp2", machine("PHB", p2p="r:OK")),
        "group tp:0 has NCCL as its only all-reduce, but PHB links GPUs 0,1",
        "if it is wanted, say --disable-custom-all-reduce",
        id="only NCCL on a pair with P2P",
    ),
    pytest.param(
        *(only(), "tp2", None),
        "group tp:0 has no all-reduce of vLLM, not even NCCL's: torch.distributed serves it",
        "VLLM_NCCL_SO_PATH",
        id="not even NCCL",
    ),
    pytest.param(
        *(NO_MULTICAST, "tp8", NVSWITCH),
        "all-reduce over symmetric memory is off: symmetric memory multicast operations are not supported; but GPUs "
        "0,1,2,3,4,5,6,7 share an NVSwitch",
        "grep -A3 Fabric",
        id="no multicast on an NVSwitch",
    ),
]


@pytest.mark.parametrize(("message", "layout", "on", "cause", "advice"), UNEXPECTED)
def test_unexpected(message: str, layout: str, on: Topology | None, cause: str, advice: str) -> None:
    (finding,) = judge(message, layout=layout, on=on)

    assert finding.cause == cause
    assert advice in finding.advice
    assert "\n" not in finding.advice
    assert (finding.file, finding.line, finding.text) == ("server.log", 1, message)


EXPECTED = [
    pytest.param(PCIE_ONLY, "tp4", machine("PHB"), id="PCIe only"),
    pytest.param(PCIE_ONLY, "tp4", None, id="unknown machine"),
    pytest.param(PCIE_ONLY, "tp4", machine(None), id="unknown links"),
    pytest.param(NO_P2P, "tp2", machine("PHB"), id="no P2P, and the driver was not asked"),
    pytest.param(NO_P2P, "tp2", machine("PHB", p2p="r:OK,w:CNS"), id="no P2P, and the driver says so"),
    pytest.param(NO_P2P, "tp2", machine("SYS", p2p="n:OK"), id="only NVLink was asked for"),
    pytest.param(WORLD_SIZE, "tp3", machine("NV18"), id="size of the layout"),
    pytest.param(WORLD_SIZE, "tp3pp2", machine("NV18"), id="size of each of its groups"),
    pytest.param(NODES, "tp8@2", machine("NV18"), id="group over two nodes"),
    pytest.param(OLDER_NODES, "tp2pp3@2", machine("NV18"), id="one of the groups over two nodes"),
    pytest.param(only("PYNCCL"), "tp4", machine("SYS"), id="only NCCL over PCIe"),
    pytest.param(only("PYNCCL"), "tp3", machine("NV18"), id="only NCCL for three"),
    pytest.param(only("PYNCCL"), "tp8@2", machine("NV18"), id="only NCCL over two nodes"),
    pytest.param(only("PYNCCL"), "tp2", None, id="only NCCL on an unknown machine"),
    pytest.param(only("PYNCCL", group="pp:0"), "tp4pp2", NVSWITCH, id="a group that no other serves"),
    pytest.param(only("PYNCCL", potential="'PYNCCL'"), "tp4", NVSWITCH, id="a vLLM without the others"),
    pytest.param(only("FLASHINFER", "PYNCCL"), "tp4", NVSWITCH, id="another one serves"),
    pytest.param(only("CUSTOM", "PYNCCL"), "tp4", NVSWITCH, id="it is on"),
    pytest.param(NO_MULTICAST, "tp4", machine("NV4"), id="bridges cannot multicast"),
    pytest.param(NO_MULTICAST, "tp4", None, id="multicast on an unknown machine"),
    pytest.param(OLD_GPU, "tp4", NVSWITCH, id="GPU before Hopper"),
    pytest.param(NO_LIBRARY, "tp1", NVSWITCH, id="nothing to reduce"),
    pytest.param(NO_LIBRARY, "dp2", NVSWITCH, id="no tensor parallelism"),
]


@pytest.mark.parametrize(("message", "layout", "on"), EXPECTED)
def test_expected(message: str, layout: str, on: Topology | None) -> None:
    assert judge(message, layout=layout, on=on) == ()


@pytest.mark.parametrize(
    ("arguments", "options", "found"),
    [
        ((), (), 1),
        (("--disable-custom-all-reduce",), (), 0),
        (("--disable_custom_all_reduce",), (), 0),
        (("--disable-custom-all-reduce", "--no-disable-custom-all-reduce"), (), 1),
        (("--seed", "1", "disable-custom-all-reduce"), (), 1),
        ((), (option(True),), 0),
        ((), (option(False),), 1),
        (("--disable-custom-all-reduce",), (option(False),), 1),
    ],
)
@pytest.mark.parametrize("message", [NO_P2P, only("PYNCCL")])
def test_switched_off_on_purpose(
    message: str, arguments: tuple[str, ...], options: tuple[str, ...], found: int
) -> None:
    assert len(judge(message, *options, on=NVSWITCH, arguments=arguments)) == found


@pytest.mark.parametrize(
    ("message", "environment", "found"),
    [
        (only(), {"VLLM_DISABLE_PYNCCL": "True"}, 0),
        (only(), {"VLLM_DISABLE_PYNCCL": "0"}, 1),
        (NO_MULTICAST, {"VLLM_BATCH_INVARIANT": "1"}, 0),
        (NO_MULTICAST, {"VLLM_BATCH_INVARIANT": "0"}, 1),
    ],
)
def test_switched_off_by_the_environment(message: str, environment: Mapping[str, str], found: int) -> None:
    assert len(judge(message, on=NVSWITCH, environment=environment)) == found


def test_missing_nccl_is_found_also_where_the_other_is_switched_off() -> None:
    (finding,) = judge(only(), option(True), on=NVSWITCH)
    assert "not even NCCL's" in finding.cause


def test_stale_answer_of_a_p2p_test_is_named_where_it_can_be_the_cause() -> None:
    (tested,) = judge(NO_P2P, on=NVSWITCH, environment={"VLLM_SKIP_P2P_CHECK": "0"})
    (skipped,) = judge(NO_P2P, on=NVSWITCH)

    assert tested.advice.endswith("rm ~/.cache/vllm/gpu_p2p_access_cache_for_*.json")
    assert "cache" not in skipped.advice


def test_only_links_within_groups_count() -> None:
    pairs = machine("NV4", gpus=4)
    links = {pair: parse_link_class("NV4" if pair in ((0, 1), (2, 3)) else "SYS") for pair in pairs.links}
    pairs = Topology(pairs.devices, links, "test", recorded=True)

    (finding,) = judge(NO_P2P, layout="tp2pp2", on=pairs)

    assert finding.cause.endswith("but NV4 links GPUs 0,1,2,3")
    assert judge(NO_P2P, layout="tp2pp2", on=pairs, placement=(0, 2, 1, 3)) == ()


def test_several_findings_stand_in_the_order_of_the_log() -> None:
    findings = judge(NO_MULTICAST, NO_P2P, only("PYNCCL"), on=NVSWITCH)

    # The last line is what the second one leads to.
    assert [finding.line for finding in findings] == [1, 2]


def test_worst_of_different_links_is_named() -> None:
    mixed = Topology(
        tuple(Device(index) for index in range(3)),
        {(0, 1): parse_link_class("NV12"), (0, 2): parse_link_class("NV4"), (1, 2): parse_link_class("NV4")},
        "test",
        recorded=True,
    )
    (finding,) = judge(PCIE_ONLY, layout="tp3", on=mixed)
    assert finding.cause.endswith("but NV4 or better links GPUs 0,1,2")


def test_cpu_platform_has_none_of_this() -> None:
    cores = Topology((Device(0), Device(1)), {}, "/proc", recorded=False, platform="cpu")
    assert judge(NO_LIBRARY, layout="tp2", on=cores) == ()
