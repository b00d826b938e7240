"""Devices, the links between them, and which devices suit a layout.

Knows link classes and their order, requirements, placements, and the document of a recorded topology. Leaves asking
NVML and reading files to the adapters, and the text of ``nvidia-smi topo`` to :mod:`~pytest_gpulayout.topology_text`.
Whatever a source does not say is ``None``; nothing is guessed.

Link classes are those of ``nvidia-smi topo -m``, from best to worst: ``NV#`` (# bonded NVLinks), ``PIX``, ``PXB``,
``PHB``, ``NODE``, ``SYS``. AMD's tools print ``XGMI`` (their NVLink) and ``PCIE`` (some PCIe path, which may cross
sockets). NCCL's path types (NVL, PXN, ...) are another vocabulary and do not appear here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import total_ordering
from itertools import combinations
from typing import Any, Literal

from pytest_gpulayout.errors import LayoutSyntaxError, TopologyError, TopologyFormatError
from pytest_gpulayout.layout import Layout

SCHEMA_VERSION = 1

Platform = Literal["cuda", "rocm", "cpu"]

_WORST_TO_BEST = ("SYS", "PCIE", "NODE", "PHB", "PXB", "PIX", "XGMI", "NV")
_FORMER_NAMES = {"SOC": "SYS"}
_LINK_CLASS = re.compile(r"(?P<name>NV)(?P<nvlinks>[1-9][0-9]*)|(?P<other>[A-Z]+)")
_EXACT_UP_TO_DEVICES = 8


@total_ordering
@dataclass(frozen=True, slots=True)
class LinkClass:
    """How two devices are connected; ``a > b`` means that ``a`` is the better link.

    :param name: ``NV``, ``XGMI``, ``PIX``, ``PXB``, ``PHB``, ``NODE``, ``PCIE`` or ``SYS``.
    :param nvlinks: number of bonded NVLinks, 0 for other classes.
    :param printed: the cell as it was printed, where it differs: drivers before 2018 say ``SOC`` for ``SYS``.
    """

    name: str
    nvlinks: int = 0
    printed: str | None = field(default=None, compare=False)

    @property
    def is_nvlink(self) -> bool:
        """Whether the link is made of NVLinks."""
        return self.name == "NV"

    @property
    def quality(self) -> int:
        """A number that is larger for a better link; its differences mean nothing."""
        return _WORST_TO_BEST.index(self.name) + 1 + self.nvlinks

    def __lt__(self, other: LinkClass) -> bool:
        return self.quality < other.quality

    def __str__(self) -> str:
        if self.printed is not None:
            return self.printed
        return f"NV{self.nvlinks}" if self.is_nvlink else self.name


def parse_link_class(text: str) -> LinkClass:
    """Read a cell such as ``NV12`` or ``PHB``.

    :raises LayoutSyntaxError: the text is not a link class.
    """
    match = _LINK_CLASS.fullmatch(text)
    if match and match["name"]:
        return LinkClass("NV", int(match["nvlinks"]))
    name = _FORMER_NAMES.get(text, text)
    if name not in _WORST_TO_BEST or name == "NV":
        raise LayoutSyntaxError(text, 1, "link class: expected NV#, PIX, PXB, PHB, NODE, SYS, XGMI or PCIE")
    return LinkClass(name, printed=text if text != name else None)


@dataclass(frozen=True, slots=True)
class LinkRequirement:
    """The class that the worst link between communicating devices must reach.

    :param text: canonical form, as a user types it.
    :param least: the worst class that is good enough; ``None`` accepts everything, an unknown link too.
    """

    text: str
    least: LinkClass | None

    def accepts(self, link: LinkClass | None) -> bool:
        """Return whether a link of this class, ``None`` for unknown, is good enough."""
        return self.least is None or (link is not None and link >= self.least)

    def __str__(self) -> str:
        return self.text


_REQUIREMENTS = {
    "nvlink": LinkClass("NV", 1),
    "pix": LinkClass("PIX"),
    "pxb": LinkClass("PXB"),
    "phb": LinkClass("PHB"),
    "node": LinkClass("NODE"),
    "any": None,
}


def parse_requirement(text: str) -> LinkRequirement:
    """Read ``nvlink``, ``nvN`` (at least N NVLinks), ``pix``, ``pxb``, ``phb``, ``node`` or ``any``, in any case.

    :raises LayoutSyntaxError: with the column of the first character that does not fit.
    """
    word = text.lower()
    if word in _REQUIREMENTS:
        return LinkRequirement(word, _REQUIREMENTS[word])
    known = next((name for name in _REQUIREMENTS if word.startswith(name)), None)
    if known is not None:
        column = len(known) + 1
        raise LayoutSyntaxError(text, column, f"link requirement: expected nothing after {known!r}")
    if not word.startswith("nv"):
        raise LayoutSyntaxError(
            text, 1, f"link requirement: expected nvlink, nvN, pix, pxb, phb, node or any, found {text!r}"
        )
    digits = re.match(r"[1-9][0-9]*", word[2:], re.ASCII)
    if digits is None or digits.end() < len(word) - 2:
        column = 3 + (digits.end() if digits else 0)
        raise LayoutSyntaxError(
            text, column, "link requirement: expected a number of NVLinks after 'nv', such as nv4"
        )
    return LinkRequirement(word, LinkClass("NV", int(digits.group())))


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or one set of cores on the CPU platform.

    :param index: as the source numbers it; not a rank.
    :param pci_bus_id: ``domain:bus:device.function`` as the source prints it.
    :param numa_node: the node, or a range such as ``"0-3"`` where the source gives one.
    :param cpu_affinity: list of CPUs such as ``"0-13,28-41"``; ``""`` where the source prints an empty cell.
    """

    index: int
    name: str | None = None
    uuid: str | None = None
    pci_bus_id: str | None = None
    numa_node: int | str | None = None
    cpu_affinity: str | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class P2pStatus:
    """What the driver says about peer access between two devices, as ``nvidia-smi topo -p2p`` prints it.

    :param capability: ``r`` read, ``w`` write, ``n`` NVLink, ``a`` atomics, ``p`` PCIe; ``None`` if not said.
    :param status: ``OK``, ``CNS``, ``GNS``, ``TNS``, ``DR``, ``NS`` or ``U``.
    """

    a: int
    b: int
    capability: str | None
    status: str


@dataclass(frozen=True, slots=True)
class Topology:
    """The devices of one machine and their links.

    :param links: index pairs (a, b), a < b; a pair that is missing is unknown.
    :param source: ``"NVML"``, or the name of the file.
    :param recorded: it was read from a file, and not probed on this machine.
    """

    devices: tuple[Device, ...]
    links: Mapping[tuple[int, int], LinkClass]
    source: str
    recorded: bool
    platform: Platform = "cuda"
    driver_version: str | None = None
    cuda_version: str | None = None
    p2p: tuple[P2pStatus, ...] = ()

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Index pairs (a, b), a < b, of all devices."""
        return tuple(combinations(sorted(device.index for device in self.devices), 2))

    @property
    def settles_links(self) -> bool:
        """Whether every link is known."""
        return all(pair in self.links for pair in self.pairs)

    @property
    def all_nvlink(self) -> bool:
        """Whether there are at least two devices, and NVLink between any two of them."""
        links = [self.link(a, b) for a, b in self.pairs]
        return bool(links) and all(link is not None and link.is_nvlink for link in links)

    def device(self, index: int) -> Device:
        """Return the device with this index.

        :raises TopologyError: there is none.
        """
        for device in self.devices:
            if device.index == index:
                return device
        raise TopologyError(_unknown_device(self, str(index)))

    def find(self, text: str) -> Device | None:
        """Return the device with this index or UUID; a UUID may be cut, as CUDA allows, while it is unique."""
        if re.fullmatch(r"[0-9]+", text):
            return next((device for device in self.devices if device.index == int(text)), None)
        if not text.startswith("GPU-"):
            return next((device for device in self.devices if device.uuid == text), None)
        found = [device for device in self.devices if (device.uuid or "").startswith(text)]
        return found[0] if len(found) == 1 else None

    def link(self, a: int, b: int) -> LinkClass | None:
        """Return the link between two devices (indices), ``None`` if it is unknown."""
        return self.links.get((min(a, b), max(a, b)))

    def worst(self, pairs: Iterable[tuple[int, int]] | None = None) -> LinkClass | None:
        """Return the worst link of these index pairs (all by default).

        :returns: ``None`` when there is no pair, and when one of the links is unknown.
        """
        links = [self.link(a, b) for a, b in (self.pairs if pairs is None else pairs)]
        known = [link for link in links if link is not None]
        return min(known) if known and len(known) == len(links) else None

    def p2p_status(self, a: int, b: int, capability: str) -> str | None:
        """Return the status of a capability between two devices, ``None`` if it is unknown."""
        wanted = {(a, b), (b, a)}
        return next((p.status for p in self.p2p if (p.a, p.b) in wanted and p.capability == capability), None)


@dataclass(frozen=True, slots=True)
class LinkViolation:
    """Two ranks whose devices are not connected as required.

    :param device_a: index of the device of ``rank_a``. :param device_b: of ``rank_b``.
    :param found: the link, ``None`` if it is unknown.
    :param nvlink_status: the driver's status for NVLink where that is what fails, else ``None``.
    """

    rank_a: int
    rank_b: int
    device_a: int
    device_b: int
    found: LinkClass | None
    required: LinkRequirement
    nvlink_status: str | None = None

    def __str__(self) -> str:
        found = "unknown" if self.found is None else str(self.found)
        if self.nvlink_status is not None:
            found += f", but the driver says {self.nvlink_status} for NVLink"
        return (
            f"ranks {self.rank_a} and {self.rank_b} (GPUs {self.device_a} and {self.device_b}): "
            f"link {found}, {self.required} required"
        )


def check_links(
    topology: Topology,
    placement: Sequence[int],
    pairs: Iterable[tuple[int, int]],
    requirement: LinkRequirement,
) -> tuple[LinkViolation, ...]:
    """Return the rank pairs whose link is not good enough, in the order of ``pairs``.

    An unknown link violates every requirement except ``any``. Where NVLink is required, links that are up are not
    enough: the driver can refuse peer access over them (``nvmlDeviceGetP2PStatus``), and that violates too.

    :param placement: index of the device of each rank, in rank order.
    :param pairs: rank pairs that communicate, as :meth:`Layout.communicating_pairs` returns them.
    """
    violations = []
    for rank_a, rank_b in pairs:
        a, b = placement[rank_a], placement[rank_b]
        link = topology.link(a, b)
        status = _refused_nvlink(topology, a, b, requirement)
        if not requirement.accepts(link) or status is not None:
            violations.append(LinkViolation(rank_a, rank_b, a, b, link, requirement, status))
    return tuple(violations)


def _refused_nvlink(topology: Topology, a: int, b: int, requirement: LinkRequirement) -> str | None:
    link = topology.link(a, b)
    if requirement.least is None or not requirement.least.is_nvlink or link is None or not link.is_nvlink:
        return None
    status = topology.p2p_status(a, b, "n")
    return None if status == "OK" else status


def choose_placement(topology: Topology, layout: Layout, requested: Sequence[str] | None = None) -> tuple[int, ...]:
    """Return the device index of each rank, in rank order.

    What is requested is used exactly as given. Else the placement with the best worst link between communicating
    ranks wins, then the best sum of links, the fewest NUMA nodes, the lowest indices. The search is exact for up to
    8 devices and greedy, but deterministic, above.

    :param requested: indices or UUIDs, one per rank in rank order.
    :raises TopologyError: too few devices, or a request that does not fit layout and machine.
    """
    if requested is not None:
        return _requested_placement(topology, layout, requested)
    if len(topology.devices) < layout.gpus:
        raise TopologyError(_too_few(topology, layout))
    search = _PlacementSearch(topology, layout.communicating_pairs(), layout.gpus)
    return search.exact() if len(topology.devices) <= _EXACT_UP_TO_DEVICES else search.greedy()


def _requested_placement(topology: Topology, layout: Layout, requested: Sequence[str]) -> tuple[int, ...]:
    given = ",".join(requested)
    where = f"  in --gpu-devices={given} (source {topology.source})"
    if len(requested) != layout.gpus:
        raise TopologyError(
            f"layout {layout} needs exactly {layout.gpus} GPUs, {len(requested)} are given\n{where}\n"
            f"  name {layout.gpus}, or leave --gpu-devices out to have the best ones chosen"
        )
    placement = []
    for text in requested:
        device = topology.find(text)
        if device is None:
            raise TopologyError(_unknown_device(topology, text))
        if device.index in placement:
            raise TopologyError(
                f"layout {layout} needs {layout.gpus} different GPUs, GPU {device.index} is given twice\n{where}\n"
                f"  name each GPU once; type 'gpulayout topo' to see them"
            )
        placement.append(device.index)
    return tuple(placement)


def _unknown_device(topology: Topology, text: str) -> str:
    return (
        f"GPU {text!r} was asked for, found {_device_list(topology)}\n  in {topology.source}\n"
        f"  name a GPU by its index or by its whole UUID; type 'gpulayout topo' to see them"
    )


def _too_few(topology: Topology, layout: Layout) -> str:
    found = len(topology.devices)
    unit = "GPU" if layout.gpus == 1 else "GPUs"
    smaller = f"choose a layout that needs at most {found}, such as --gpu-layout=tp{found}, or "
    return (
        f"layout {layout} needs {layout.gpus} {unit}, found {found} (source {topology.source}): "
        f"{_device_list(topology)}\n"
        f"  {smaller if found else ''}run on a machine with at least {layout.gpus} {unit}"
    )


def _device_list(topology: Topology) -> str:
    names = [f"{device.index} {device.name or ''}".strip() for device in topology.devices]
    return ", ".join(names) or "no GPU at all"


class _PlacementSearch:
    """Finds devices for ranks; the objective is the tuple (worst link, sum of links, - NUMA nodes)."""

    def __init__(self, topology: Topology, pairs: Sequence[tuple[int, int]], ranks: int) -> None:
        self._ranks = ranks
        self._devices = sorted(device.index for device in topology.devices)
        self._numa = {device.index: device.numa_node for device in topology.devices}
        self._quality = {}
        for a, b in topology.pairs:
            link = topology.link(a, b)
            self._quality[a, b] = self._quality[b, a] = link.quality if link else 0
        self._top = max(self._quality.values(), default=0)
        self._peers = [[a for a, b in pairs if b == rank] for rank in range(ranks)]
        self._follows = [rank > 0 and _exchangeable(rank - 1, rank, pairs) for rank in range(ranks)]
        self._best: tuple[int, int, int] | None = None
        self._placement: tuple[int, ...] = ()

    def exact(self) -> tuple[int, ...]:
        """Branch and bound in the order of indices, so that the first of equal placements has the lowest."""
        self._extend([], self._top, 0)
        return self._placement

    def greedy(self) -> tuple[int, ...]:
        """From every device, add the device that suits the next rank best; keep the best start."""
        for start in self._devices:
            chosen = [start]
            while len(chosen) < self._ranks:
                free = [device for device in self._devices if device not in chosen]
                chosen.append(max(free, key=lambda device: self._suits(device, chosen)))
            links = [q for rank, device in enumerate(chosen) for q in self._links(device, chosen[:rank])]
            self._keep(chosen, min(links, default=self._top), sum(links))
            if all(link == self._top for link in links):
                break
        return self._placement

    def _suits(self, device: int, chosen: Sequence[int]) -> tuple[int, int, int, int]:
        links = self._links(device, chosen)
        neighbours = sum(self._numa[other] == self._numa[device] for other in chosen)
        return min(links, default=self._top), sum(links), neighbours, -device

    def _links(self, device: int, chosen: Sequence[int]) -> list[int]:
        """Qualities of the links from the next rank, on this device, to the ranks it talks to."""
        return [self._quality[chosen[peer], device] for peer in self._peers[len(chosen)]]

    def _extend(self, chosen: list[int], worst: int, total: int) -> None:
        rank = len(chosen)
        if rank == self._ranks:
            self._keep(chosen, worst, total)
            return
        links_left = sum(map(len, self._peers[rank + 1 :]))
        for device in self._devices:
            if device in chosen or (self._follows[rank] and device < chosen[-1]):
                continue
            links = self._links(device, chosen)
            new_worst, new_total = min([worst, *links]), total + sum(links)
            bound = (new_worst, new_total + links_left * self._top, -self._nodes([*chosen, device]))
            if self._best is None or bound > self._best:
                self._extend([*chosen, device], new_worst, new_total)

    def _keep(self, chosen: Sequence[int], worst: int, total: int) -> None:
        score = (worst, total, -self._nodes(chosen))
        if self._best is None or score > self._best:
            self._best, self._placement = score, tuple(chosen)

    def _nodes(self, chosen: Sequence[int]) -> int:
        return len({self._numa[device] for device in chosen})


def _exchangeable(a: int, b: int, pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether the ranks talk to the same ranks, so that only one order of their devices need be tried."""
    swap = {a: b, b: a}
    swapped = {tuple(sorted((swap.get(x, x), swap.get(y, y)))) for x, y in pairs}
    return swapped == set(pairs)


def topology_to_document(
    topology: Topology, placement: Sequence[int] | None = None, pairs: Iterable[tuple[int, int]] = ()
) -> dict[str, Any]:
    """Return the JSON document of a topology; ``schemas/topology.schema.json`` describes it.

    :param placement: index of the device of each rank, ``None`` where no layout was asked for.
    :param pairs: rank pairs that communicate; the placement's worst link is among them.
    """
    chosen = None
    if placement is not None:
        worst = topology.worst([(placement[a], placement[b]) for a, b in pairs])
        chosen = {"gpus": list(placement), "worst": _text(worst)}
    # A listing that says nothing about links has none; in one that does, a link left open is null.
    links = [{"a": a, "b": b, "class": _text(topology.link(a, b))} for a, b in topology.pairs]
    return {
        "schema_version": SCHEMA_VERSION,
        "platform": topology.platform,
        "source": topology.source,
        "driver_version": topology.driver_version,
        "cuda_version": topology.cuda_version,
        "gpus": [_device_to_document(device) for device in topology.devices],
        "links": links if topology.links else [],
        "worst": _text(topology.worst()),
        "all_nvlink": topology.all_nvlink,
        "p2p": [{"a": p.a, "b": p.b, "capability": p.capability, "status": p.status} for p in topology.p2p],
        "placement": chosen,
    }


def _device_to_document(device: Device) -> dict[str, Any]:
    return {
        "index": device.index,
        "name": device.name,
        "uuid": device.uuid,
        "pci_bus_id": device.pci_bus_id,
        "memory_bytes": device.memory_bytes,
        "numa_node": device.numa_node,
        "cpu_affinity": device.cpu_affinity,
    }


def _text(link: LinkClass | None) -> str | None:
    return None if link is None else str(link)


def topology_from_document(document: Any, source: str) -> Topology:
    """Return the topology of a document that :func:`topology_to_document` made; it counts as recorded.

    What follows from the links (``worst``, ``all_nvlink``) and the placement are not read.

    :param document: parsed JSON.
    :param source: name of the file it came from.
    :raises TopologyFormatError: it does not follow the schema, or contradicts itself.
    """
    from pytest_gpulayout.schemas import validate

    problems = validate(document, "topology") or _contradictions(document)
    if problems:
        raise TopologyFormatError(
            "a topology document was expected (gpulayout topo --json), found one with "
            f"{len(problems)} fault{'s' if len(problems) > 1 else ''}:\n    " + "\n    ".join(problems[:5]) + "\n"
            "  record it again: gpulayout topo --json > topology.json",
            source=source,
        )
    return Topology(
        devices=tuple(Device(**gpu) for gpu in document["gpus"]),
        links={
            (min(link["a"], link["b"]), max(link["a"], link["b"])): parse_link_class(link["class"])
            for link in document["links"]
            if link["class"] is not None
        },
        source=source,
        recorded=True,
        platform=document.get("platform", "cuda"),
        driver_version=document.get("driver_version"),
        cuda_version=document.get("cuda_version"),
        p2p=tuple(P2pStatus(**status) for status in document.get("p2p", ())),
    )


def _contradictions(document: Mapping[str, Any]) -> list[str]:
    """What a schema cannot say: indices and pairs are unique, and pairs name devices that are there."""
    problems = []
    indices = [gpu["index"] for gpu in document["gpus"]]
    problems += [f"$.gpus[{i}].index: GPU {n} is listed twice" for i, n in enumerate(indices) if n in indices[:i]]
    seen: set[frozenset[int]] = set()
    for i, link in enumerate(document["links"]):
        pair = frozenset((link["a"], link["b"]))
        if len(pair) == 1 or pair - set(indices):
            problems.append(f"$.links[{i}]: {link['a']} and {link['b']} are not two GPUs of $.gpus")
        elif pair in seen:
            problems.append(f"$.links[{i}]: the link of {link['a']} and {link['b']} is listed twice")
        seen.add(pair)
    return problems
