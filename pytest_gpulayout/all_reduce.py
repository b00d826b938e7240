"""Whether vLLM's own all-reduce is off where it should be on.

Tensor parallelism ends every layer with an all-reduce, and vLLM serves each call with the first of several backends
that takes it: its own kernel (``CUSTOM``), symmetric memory, FlashInfer, NCCL. NCCL's log is healthy while the others
are off, and decoding is slower. So what vLLM says about them is compared with what the machine could do.

Knows when vLLM 0.32 turns a backend off (``vllm/distributed/device_communicators/custom_all_reduce.py`` and
``symm_mem.py``). Leaves reading the log to :mod:`~pytest_gpulayout.vllm_log`, and NCCL's transports to
:mod:`~pytest_gpulayout.transport`. A backend that is off for a good reason is no finding:

==================================================  ==================================================================
vLLM says                                           expected when
==================================================  ==================================================================
unsupported world size: N                           N is the layout's tp
not supported on more than two PCIe-only GPUs       not all GPUs of a tp group have NVLink (or XGMI), or it is unknown
lacks GPU P2P capability or P2P test failed         the GPUs have no NVLink, and the driver does not say OK
... multi-node group ..., spans across nodes        a tp group of the layout lies on several nodes
missing custom allreduce library                    never
SymmMemCommunicator: ... multicast, initialization  the GPUs hang on no NVSwitch
nothing                                             the option ``--disable-custom-all-reduce``
==================================================  ==================================================================
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from pytest_gpulayout.causes import Finding
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.nccl_log import LogLine
from pytest_gpulayout.topology import SWITCH, P2pStatus, Topology
from pytest_gpulayout.vllm_log import BackendOffFact, VllmLogFacts

_SUPPORTED_SIZES = (2, 4, 6, 8, 16)  # CustomAllreduce._SUPPORTED_WORLD_SIZES
_OFF = "vLLM's own all-reduce is off"
_WORLD_SIZE = re.compile(r"unsupported world size: (\d{1,9})")
_NODES = re.compile(r"multi-node|spans across nodes")
_NEEDS_MULTICAST = re.compile(r"multicast|initialization failed")


def judge_all_reduce(
    facts: VllmLogFacts,
    layout: Layout,
    topology: Topology | None,
    placement: Sequence[int],
    arguments: Sequence[str],
    environment: Mapping[str, str],
) -> tuple[Finding, ...]:
    """Return what is off, or not used, although layout and machine allow it; in the order of the log.

    :param topology: of one node; ``None`` where it is unknown, which makes most reasons good ones.
    :param placement: index of the device of each rank on that node, in rank order.
    :param arguments: of the server. What its log says about the option counts more.
    :param environment: of the server.
    """
    if layout.tp == 1 or (topology is not None and topology.platform == "cpu"):
        return ()
    groups = _Groups(layout, topology or _UNKNOWN, placement)
    findings = []
    if not _is_switched_off(facts, arguments):
        for off in facts.all_reduce_off:
            if off.backend == "CUSTOM" and (finding := _judge_custom(off, groups, environment)):
                findings.append(finding)
        findings += _judge_only_nccl(facts, groups)
    findings += _judge_missing_nccl(facts, environment)
    findings += _judge_symmetric_memory(facts, groups, environment)
    return tuple(sorted(findings, key=lambda finding: (finding.file or "", finding.line or 0)))


def _is_switched_off(facts: VllmLogFacts, arguments: Sequence[str]) -> bool:
    """Whether somebody asked for it: the engine's option if it was logged, else the last argument of that name."""
    if facts.custom_all_reduce_disabled is not None:
        return facts.custom_all_reduce_disabled.value
    named = [text.replace("_", "-").removeprefix("--") for text in arguments if text.startswith("--")]
    options = [name for name in named if name.removeprefix("no-") == "disable-custom-all-reduce"]
    return bool(options) and not options[-1].startswith("no-")


# -- what the machine allows -----------------------------------------------------------------------------------------


_UNKNOWN = Topology(devices=(), links={}, source="nowhere", recorded=False)


@dataclass(frozen=True, slots=True)
class _Groups:
    """The tensor-parallel groups, and how the GPUs in them are linked."""

    layout: Layout
    topology: Topology
    placement: Sequence[int]

    @property
    def span_nodes(self) -> bool:
        """Whether a group has ranks on several nodes; nodes hold consecutive ranks, and so do groups."""
        tp, per_node = self.layout.tp, self.layout.gpus_per_node
        return any(first // per_node != (first + tp - 1) // per_node for first in range(0, self.layout.gpus, tp))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Device indices of all pairs within a group; none where groups span nodes."""
        tp = self.layout.tp
        starts = range(0, 0 if self.span_nodes else len(self.placement) - tp + 1, tp)
        return [pair for at in starts for pair in combinations(sorted(self.placement[at : at + tp]), 2)]

    @property
    def devices(self) -> str:
        """``"0,1,2,3"``."""
        return ",".join(map(str, sorted({index for pair in self.pairs for index in pair})))

    @property
    def have_nvlink(self) -> bool:
        """Whether NVLink, or AMD's XGMI, links all pairs."""
        links = [self.topology.link(a, b) for a, b in self.pairs]
        return bool(links) and all(link is not None and (link.is_nvlink or link.name == "XGMI") for link in links)

    @property
    def have_p2p(self) -> bool:
        """Whether the driver says OK for all pairs, and never anything else."""
        said = [self._statuses(pair, ("r", "w", None)) for pair in self.pairs]
        return bool(said) and all(statuses and {s.status for s in statuses} == {"OK"} for statuses in said)

    @property
    def have_switch(self) -> bool:
        """Whether NVLinks of all GPUs end at an NVSwitch."""
        if not self.have_nvlink:
            return False
        devices = [self.topology.device(index) for pair in self.pairs for index in pair]
        return all(any(link.active and link.remote == SWITCH for link in device.nvlinks) for device in devices)

    @property
    def links_text(self) -> str:
        """``"NV18 links GPUs 0,1"``, with what the driver refuses."""
        worst = self.topology.worst(self.pairs) or "an unknown link"
        better = " or better" if len({str(self.topology.link(a, b)) for a, b in self.pairs}) > 1 else ""
        text = f"{worst}{better} links GPUs {self.devices}"
        statuses = [status for pair in self.pairs for status in self._statuses(pair, ("r", "w", "n", None))]
        refused = next((status for status in statuses if status.refusal), None)
        if refused is None:
            return text
        return f"{text}; the driver refuses P2P between {refused.a} and {refused.b} ({refused.refusal})"

    def _statuses(self, pair: tuple[int, int], capabilities: Collection[str | None]) -> list[P2pStatus]:
        return [s for s in self.topology.p2p if {s.a, s.b} == set(pair) and s.capability in capabilities]


# -- vLLM's own kernel -----------------------------------------------------------------------------------------------


def _judge_custom(off: BackendOffFact, groups: _Groups, environment: Mapping[str, str]) -> Finding | None:
    """Say why this reason is not a good one here; ``None`` when it is."""
    layout = groups.layout
    if match := _WORLD_SIZE.search(off.reason):
        if int(match[1]) == layout.tp:
            return None
        cause = f"{_OFF} in a group of {match[1]} ranks, layout {layout} has groups of {layout.tp}"
        return _finding(cause, off.evidence, "this log is of another server: pass the log of the layout")
    if "PCIe-only" in off.reason:
        return _judge_pcie_only(off, groups)
    if "P2P" in off.reason:
        return _judge_p2p(off, groups, environment)
    if _NODES.search(off.reason):
        return _judge_nodes(off, groups)
    if "missing custom allreduce library" in off.reason:
        advice = "install a vLLM that is built for this CUDA and torch: python -c 'import vllm._C' must work"
        return _finding(f"{_OFF}: its kernels are missing from this vLLM", off.evidence, advice)
    advice = "find the reason in vLLM's custom_all_reduce.py; if it is wanted, say --disable-custom-all-reduce"
    return _finding(f"{_OFF}: {off.reason}", off.evidence, advice)


def _judge_pcie_only(off: BackendOffFact, groups: _Groups) -> Finding | None:
    if not groups.have_nvlink:
        return None
    return _finding(
        f"{_OFF}, it sees more than two PCIe-only GPUs, but {groups.links_text}",
        off.evidence,
        "vLLM asks the driver for NVLink's P2P status: compare `nvidia-smi topo -p2p n` as the server's user and in "
        "its container; anything but OK: restart nvidia-fabricmanager, or look at the bridges",
    )


def _judge_p2p(off: BackendOffFact, groups: _Groups, environment: Mapping[str, str]) -> Finding | None:
    if not groups.have_nvlink and not groups.have_p2p:
        return None
    found = groups.links_text + ("" if groups.have_nvlink else ", the driver says OK for P2P")
    advice = (
        "compare `nvidia-smi topo -p2p r` in the server's container; look for a VM, IOMMU and ACS between the GPUs"
    )
    if environment.get("VLLM_SKIP_P2P_CHECK", "1") != "1":
        advice += "; VLLM_SKIP_P2P_CHECK lets vLLM test it once: rm ~/.cache/vllm/gpu_p2p_access_cache_for_*.json"
    return _finding(f"{_OFF}, its P2P check failed, but {found}", off.evidence, advice)


def _judge_nodes(off: BackendOffFact, groups: _Groups) -> Finding | None:
    if groups.span_nodes:
        return None
    return _finding(
        f"{_OFF}, its ranks see several nodes, but layout {groups.layout} keeps a tensor-parallel group on one",
        off.evidence,
        "ranks are on one node when they share /dev/shm: run them in one container, or with --ipc=host",
    )


def _judge_missing_nccl(facts: VllmLogFacts, environment: Mapping[str, str]) -> Iterable[Finding]:
    if environment.get("VLLM_DISABLE_PYNCCL", "").lower() in ("1", "true"):
        return
    for fact in facts.all_reduce:
        if not fact.backends:
            yield _finding(
                f"group {fact.group} has no all-reduce of vLLM, not even NCCL's: torch.distributed serves it",
                fact.evidence,
                "look in the log for `Failed to load NCCL library`; VLLM_NCCL_SO_PATH names the library",
            )


def _judge_only_nccl(facts: VllmLogFacts, groups: _Groups) -> Iterable[Finding]:
    """Groups that have nothing but NCCL, and no line says why."""
    if any(off.backend == "CUSTOM" for off in facts.all_reduce_off) or not _custom_is_possible(groups):
        return
    for fact in facts.all_reduce:
        is_known = not fact.potential or "CUSTOM" in fact.potential
        if fact.group.partition(":")[0] == "tp" and fact.backends == ("PYNCCL",) and is_known:
            yield _finding(
                f"group {fact.group} has NCCL as its only all-reduce, but {groups.links_text}",
                fact.evidence,
                "compare vLLM's version and arguments with those of a good run; if it is wanted, say "
                "--disable-custom-all-reduce",
            )


def _custom_is_possible(groups: _Groups) -> bool:
    if groups.layout.tp not in _SUPPORTED_SIZES:
        return False
    return groups.have_nvlink or (groups.layout.tp == 2 and groups.have_p2p)


# -- symmetric memory ------------------------------------------------------------------------------------------------


def _judge_symmetric_memory(
    facts: VllmLogFacts, groups: _Groups, environment: Mapping[str, str]
) -> Iterable[Finding]:
    """NVSwitches can multicast, from Hopper on; vLLM names GPUs before that as unsupported, and asks no further."""
    if environment.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0") or not groups.have_switch:
        return
    for off in facts.all_reduce_off:
        if off.backend == "SYMM_MEM" and _NEEDS_MULTICAST.search(off.reason):
            yield _finding(
                f"all-reduce over symmetric memory is off: {off.reason}; but GPUs {groups.devices} share an NVSwitch",
                off.evidence,
                "multicast needs a fabric manager that is ready: nvidia-smi -q | grep -A3 Fabric; to do without: "
                "VLLM_ALLREDUCE_USE_SYMM_MEM=0",
            )


def _finding(cause: str, where: LogLine, advice: str) -> Finding:
    return Finding(cause, where.file, where.line or None, where.text, advice)
