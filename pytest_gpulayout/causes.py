"""Why NCCL chose a slow transport: causes, each with its evidence and one line of advice.

Knows which cause is the most decisive, and what could be better although nothing is slow. Leaves the other rules to
:mod:`~pytest_gpulayout.causes_settings`, :mod:`~pytest_gpulayout.causes_places` and
:mod:`~pytest_gpulayout.causes_devices`, reading ``/proc`` and ``/sys`` to
:mod:`~pytest_gpulayout.adapters.surroundings`, and what is slow or missing to :mod:`~pytest_gpulayout.transport`.

Each rule yields findings only for what it can show; what is unknown is no cause. A log in which nothing is slow or
missing gives none of them, however odd its settings are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from pytest_gpulayout import causes_devices, causes_places, causes_settings
from pytest_gpulayout.causes_case import Case, Finding, SlowUse, at
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.links import LinkClass
from pytest_gpulayout.nccl_log import LogLine, NcclLog, is_shm, is_socket
from pytest_gpulayout.surroundings import Surroundings
from pytest_gpulayout.topology import SWITCH, Device, Topology

__all__ = ["Finding", "SlowUse", "explain_transports"]


def explain_transports(
    log: NcclLog,
    slow: Sequence[SlowUse],
    *,
    layout: Layout | None = None,
    surroundings: Surroundings | None = None,
    topology: Topology | None = None,
    placement: Sequence[int] = (),
    server_lines: Sequence[LogLine] = (),
) -> tuple[Finding, ...]:
    """Say why transports are slow or missing, the most decisive cause first, and then which ones are.

    :param log: NCCL's logs of all processes of one server.
    :param slow: the uses to explain; their ranks are those of ``surroundings`` and ``placement``.
    :param surroundings: of ranks on this machine, ``None`` for a log from elsewhere.
    :param placement: index of the device of each rank, in rank order.
    :param server_lines: lines of the server's own log, where CUDA's errors stand.
    """
    case = Case(log, tuple(slow), layout, surroundings or Surroundings(), topology, placement, tuple(server_lines))
    found: dict[str, Finding] = {}
    for rule in _RULES if case.is_troubled else _REMARKS:
        for finding in rule(case):
            found.setdefault(finding.cause, finding)
    return tuple(found.values())


# -- what is slow ----------------------------------------------------------------------------------------------------

_SOCKET_ADVICE = (
    "on one host: give the processes one /dev/shm and one host name (docker: --ipc=host) and unset "
    "NCCL_P2P_DISABLE and NCCL_SHM_DISABLE; between hosts: make the InfiniBand or plugin devices visible"
)
_SHM_ADVICE = (
    "normal between GPUs at PHB, NODE or SYS; between GPUs at NV#, PIX or PXB it is a loss: compare "
    "`gpulayout topo --layout SPEC`, then look for ACS, IOMMU and NCCL_P2P_* settings"
)


def _slow_uses(case: Case) -> Iterator[Finding]:
    for is_slow in (is_socket, is_shm):
        uses = [(use, use.first) for use in case.slow if use.first is not None and is_slow(use.transport or "")]
        pairs = len({(use.src, use.dst) for use, _ in uses})
        for use, where in uses[:1]:
            cause = f"ranks {use.src} -> {use.dst} use {use.transport}" + f", {pairs} pairs in all" * (pairs > 1)
            advice = _SOCKET_ADVICE if is_slow is is_socket else _shm_advice(case, [use for use, _ in uses])
            yield at(cause, where, advice)


def _shm_advice(case: Case, uses: Sequence[SlowUse]) -> str:
    links = [case.link(use) for use in uses]
    best = max((link for link in links if link is not None), default=None)
    if best is None or None in links:
        return _SHM_ADVICE
    if best >= LinkClass("PXB"):
        return f"a loss: the GPUs are linked by {best}, where NCCL uses P2P unless something forbids it"
    return f"NCCL's default: the GPUs are linked by {best}; use GPUs with a better link, or try NCCL_P2P_LEVEL=SYS"


# -- remarks: nothing is wrong, something could be better ------------------------------------------------------------

_IB_WITHOUT_GDR = re.compile(r"NET/IB[A-Za-z0-9_]*/\d+(?:\(\d+\))?(?:/Shared)?")


def _no_gpudirect(case: Case) -> Iterator[Finding]:
    """One direction of a pair may do without (NCCL_NET_GDR_READ), so a pair must have no channel with it."""
    direct = {(src, dst) for src, dst, transport in case.log.links if "/GDRDMA" in transport}
    for (src, dst, transport), seen in case.log.links.items():
        if dst is not None and _IB_WITHOUT_GDR.fullmatch(transport) and not direct & {(src, dst), (dst, src)}:
            yield at(
                f"ranks {src} -> {dst} use {transport} without GPUDirect RDMA: data is copied through host memory",
                seen.first,
                "load nvidia-peermem or enable DMA-BUF, and use the NIC nearest to the GPU: nvidia-smi topo -m",
            )
            return


def _nvls_off(case: Case) -> Iterator[Finding]:
    """Only GPUs behind NVSwitch that register at a fabric manager (Hopper and later) have NVLS."""
    if case.log.nvls_lines or not case.log.edges or case.topology is None:
        return
    used = [device for device in case.topology.devices if device.index in set(case.placement)]
    if len(used) < 2 or not all(_has_nvls(device) for device in used):
        return
    for name in ("NCCL_NVLS_ENABLE", "NCCL_CUMEM_ENABLE"):
        setting = next((found for found in causes_settings.settings_of(case, name) if found.value == "0"), None)
        if setting is not None:
            yield at(f"NVLS is switched off: {setting}", setting.where, setting.advice)
            return
    if line := case.line(r"NVLS multicast support is not available"):
        advice = "look at nvidia-smi -q (Fabric) and whether the virtual machine was given the whole switch"
        yield at("NVLS is not available, though NVSwitch connects the GPUs", line, advice)


def _has_nvls(device: Device) -> bool:
    switched = any(group.active and group.remote == SWITCH for group in device.nvlinks)
    return switched and device.fabric is not None and device.fabric.is_ready


_Rule = Callable[[Case], Iterator[Finding]]
_REMARKS: tuple[_Rule, ...] = (_no_gpudirect, _nvls_off)
_RULES: tuple[_Rule, ...] = (
    causes_settings.left_over_on_one_host,
    causes_places.shm_too_small,
    causes_places.no_interface,
    causes_places.told_by_a_line,
    causes_devices.fabric_manager_down,
    causes_devices.fabric_not_ready,
    causes_places.separate_containers,
    causes_places.different_hosts,
    causes_places.one_host_as_several,
    causes_devices.nvlink_refused,
    causes_devices.p2p_refused,
    causes_devices.nvlinks_down,
    causes_devices.iommu_or_acs,
    causes_settings.left_over_between_hosts,
    causes_places.no_rdma,
    causes_places.no_plugin,
    causes_places.no_numa_memory,
    _slow_uses,
    *_REMARKS,
)
