"""A topology in text: the table of ``nvidia-smi topo -m``, and what ``gpulayout topo`` says below it.

Gives lines and prints nothing; colours are put on finished lines, so that they cannot move a column. The table is
read back by :func:`~pytest_gpulayout.topology_text.parse_topology_text`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pytest_gpulayout.layout import Layout
from pytest_gpulayout.links import LinkClass
from pytest_gpulayout.report import aligned
from pytest_gpulayout.topology import P2P_CAPABILITIES, Device, NvLinks, PcieLink, Topology
from pytest_gpulayout.topology_faults import describe_faults, gb_per_s, name_gpus, name_pairs

_UNKNOWN_LINK = "???"
_NOT_SAID = "N/A"
_AFFINITIES = ("CPU Affinity", "NUMA Affinity", "GPU NUMA ID")

_LEGEND = {
    "NV#": "# bonded NVLinks",
    "XGMI": "AMD's Infinity Fabric",
    "PIX": "at most one PCIe bridge",
    "PXB": "several PCIe bridges, no host bridge",
    "PHB": "a PCIe host bridge, which is usually the CPU",
    "NODE": "PCIe host bridges of one NUMA node",
    "PCIE": "PCIe, perhaps from one socket to another",
    "SYS": "from one NUMA node to another (QPI, UPI)",
    "SOC": "SYS as drivers before 2018 print it",
    _UNKNOWN_LINK: "unknown",
}

_COLOUR_CODES = {"good": "32", "fair": "33", "poor": "31", "unknown": "1;31"}
_COLOURED_WORD = re.compile(
    r"(?<![\w-])(?:(?P<good>NV(?:\d+|#)|XGMI)|(?P<fair>PIX|PXB)|(?P<poor>PHB|NODE|PCIE|SYS|SOC|fault:)"
    r"|(?P<unknown>\?\?\?|unknown))(?![\w-])"
)


def topology_to_text(topology: Topology) -> str:
    """Return the table of ``nvidia-smi topo -m``, aligned with spaces: a row per GPU, and a header.

    ``X`` is where a GPU meets itself, ``???`` an unknown link, ``N/A`` an affinity that is not known.
    """
    devices = sorted(topology.devices, key=lambda device: device.index)
    names = [f"GPU{device.index}" for device in devices]
    rows = [("", *names, *_AFFINITIES)]
    for name, a in zip(names, devices, strict=True):
        cells = (" X" if a is b else str(topology.link(a.index, b.index) or _UNKNOWN_LINK) for b in devices)
        affinities = (a.cpu_affinity, a.numa_node, a.gpu_numa_id)
        rows.append((name, *cells, *(_NOT_SAID if fact is None else str(fact) for fact in affinities)))
    return "".join(f"{line}\n" for line in aligned(rows))


def topology_lines(topology: Topology) -> Iterator[str]:
    """Return everything that ``gpulayout topo`` says about a machine: table, legend, devices, links, faults."""
    yield ", ".join(_origin(topology))
    yield ""
    yield from topology_to_text(topology).splitlines()
    yield from _legend(topology)
    yield from _device_list(topology.devices)
    yield ""
    yield f"worst link: {_worst(topology, topology.pairs)}"
    if topology.pairs:
        yield f"{'XGMI' if topology.platform == 'rocm' else 'NVLink'} islands: {_islands(topology)}"
    yield from _peer_access(topology)
    if topology.busy:
        yield f"busy: somebody computes on {name_gpus(sorted(topology.busy))} right now"
    yield from (f"fault: {sentence}" for sentence in describe_faults(topology))
    yield from (f"note: {note}" for note in topology.notes)


def placement_line(topology: Topology, layout: Layout, placement: Sequence[int]) -> str:
    """Return which GPUs are best for a layout, and their worst link.

    :param placement: index of the device of each rank of one node, in rank order.
    """
    pairs = [(placement[a], placement[b]) for a, b in layout.node_pairs()]
    where = " on this node" if layout.nodes > 1 else ""
    gpus = ", ".join(map(str, placement))
    return f"best placement of {layout}{where}: GPU {gpus}; worst link {_worst(topology, pairs)}"


def colour_links(line: str) -> str:
    """Return a line with terminal codes around its link classes: green, yellow or red, unknown bold red."""

    def paint(match: re.Match[str]) -> str:
        return f"\x1b[{_COLOUR_CODES[match.lastgroup or 'unknown']}m{match.group()}\x1b[0m"

    return _COLOURED_WORD.sub(paint, line)


def _origin(topology: Topology) -> Iterator[str]:
    yield f"{'recorded in' if topology.recorded else 'from'} {topology.source}"
    if topology.driver_version is not None:
        yield f"driver {topology.driver_version}"
    if topology.cuda_version is not None:
        yield f"CUDA {topology.cuda_version}"


def _legend(topology: Topology) -> Iterator[str]:
    shown = {_legend_key(topology.link(a, b)) for a, b in topology.pairs}
    if shown:
        yield ""
        yield "Legend:"
        yield from aligned([("", key, words) for key, words in _LEGEND.items() if key in shown])


def _legend_key(link: LinkClass | None) -> str:
    if link is None:
        return _UNKNOWN_LINK
    return "NV#" if link.is_nvlink else str(link)


def _device_list(devices: Sequence[Device]) -> Iterator[str]:
    """What is known beside the links; a column that is empty for all devices is left out."""
    titles = ("GPU", "name", "memory", "UUID", "PCI bus id", "PCIe", "NVLinks", "MIG")
    rows = [_device_cells(device) for device in sorted(devices, key=lambda device: device.index)]
    shown = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    if len(shown) > 1:
        yield ""
        yield from aligned([[row[i] or "-" for i in shown] for row in (titles, *rows)])


def _device_cells(device: Device) -> tuple[str, ...]:
    return (
        str(device.index),
        device.name or "",
        "" if device.memory_bytes is None else f"{device.memory_bytes / 2**30:.1f} GiB",
        device.uuid or "",
        device.pci_bus_id or "",
        "" if device.pcie is None else _pcie_text(device.pcie),
        _nvlinks_text(device.nvlinks),
        "" if device.mig is None else ("on" if device.mig else "off"),
    )


def _pcie_text(pcie: PcieLink) -> str:
    """``gen4 x8 (of gen5 x16)``; an idle GPU lowers its generation, so that alone is put as ``up to``."""
    now = _generation_and_width(pcie.generation, pcie.width)
    most = _generation_and_width(pcie.max_generation, pcie.max_width)
    if _is_less(pcie.width, pcie.max_width):
        return f"{now} (of {most})"
    return f"{now} (up to {most})" if _is_less(pcie.generation, pcie.max_generation) else now


def _generation_and_width(generation: int | None, width: int | None) -> str:
    parts = ("" if generation is None else f"gen{generation}", "" if width is None else f"x{width}")
    return " ".join(filter(None, parts))


def _is_less(value: int | None, most: int | None) -> bool:
    return value is not None and most is not None and value < most


def _nvlinks_text(groups: Sequence[NvLinks]) -> str:
    """``12 up, 25.0 GB/s each (v3.0)``, ``10 of 12 up``, ``0 of 12 up``; empty where there are none."""
    active = [group for group in groups if group.active]
    up, count = (sum(len(group.links) for group in part) for part in (active, groups))
    if not count:
        return ""
    text = f"{up} up" if up == count else f"{up} of {count} up"
    speeds = {group.speed_mbps for group in active}
    slowest = min((speed for speed in speeds if speed is not None), default=None)
    if slowest is not None:
        text += f", {gb_per_s(slowest)} each" if len(speeds) == 1 else f", {gb_per_s(slowest)} the slowest"
    versions = sorted({group.version for group in active if group.version is not None})
    return text + (f" (v{', v'.join(versions)})" if versions else "")


def _worst(topology: Topology, pairs: Sequence[tuple[int, int]]) -> str:
    """``SYS (GPUs 0 and 2)``: the worst link and who has it; where some are unknown, the worst of the others too."""
    unknown = [pair for pair in pairs if topology.link(*pair) is None]
    known = [pair for pair in pairs if topology.link(*pair) is not None]
    parts = [f"unknown ({name_pairs(unknown, pairs)})"] if unknown else []
    if (worst := topology.worst(known)) is not None:
        those = [pair for pair in known if topology.link(*pair) == worst]
        parts.append(f"{worst} ({name_pairs(those, pairs)})")
    return ", of the others ".join(parts) or "none needed"


def _islands(topology: Topology) -> str:
    islands = topology.nvlink_islands
    indices = tuple(sorted(device.index for device in topology.devices))
    if islands == (indices,):
        pairs = [topology.link(a, b) for a, b in topology.pairs]
        direct = all(link is not None and (link.is_nvlink or link.name == "XGMI") for link in pairs)
        return "all GPUs" if direct else "all GPUs, some of them only over others"
    return ", ".join(map(_island, islands)) or ("none" if topology.settles_links else "none known")


def _island(indices: tuple[int, ...]) -> str:
    """``0-3``, or ``0+3`` where the numbers do not follow each other."""
    first, last = indices[0], indices[-1]
    return f"{first}-{last}" if last - first + 1 == len(indices) else "+".join(map(str, indices))


def _peer_access(topology: Topology) -> Iterator[str]:
    """What the driver says about peer access; capabilities of which it says the same share a line."""
    pairs_by_answer: dict[tuple[str | None, str | None], list[tuple[int, int]]] = {}
    for p in topology.p2p:
        pairs_by_answer.setdefault((p.capability, p.refusal), []).append((min(p.a, p.b), max(p.a, p.b)))
    words_by_line: dict[tuple[str | None, str], list[str]] = {}
    for (capability, refusal), pairs in pairs_by_answer.items():
        where = name_pairs(sorted(set(pairs)), topology.pairs)
        words_by_line.setdefault((refusal, where), []).append(
            P2P_CAPABILITIES.get(capability or "", "(kind not recorded)")
        )
    for (refusal, where), words in words_by_line.items():
        answer = f"OK for {where}" if refusal is None else f"refused for {where} ({refusal})"
        yield f"peer access: {', '.join(words)} {answer}"
