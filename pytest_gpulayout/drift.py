"""What a baseline keeps of the wiring it was measured on, and in which ways the wiring is another one now.

The key of a baseline has the links only; a socket, a PCIe slot or the speed of an NVLink may change beneath it. Both
are told in one line, before any number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gpulayout.gate import PlacedLayout
    from pytest_gpulayout.topology import Device


def wiring_document(placed: PlacedLayout) -> dict[str, Any]:
    """Return what a session stores of its topology: facts by rank and rank pair; what is not known is left out.

    :returns: ``links`` {"0-1": "NV12"} of the pairs that communicate, and by rank {"0": ...} ``numa_node``, ``pcie``
        (most lanes and generation, and the lanes now) and ``nvlinks``.
    """
    pairs = placed.pairs
    document: dict[str, dict[str, Any]] = {
        "links": {f"{a}-{b}": str(link) for (a, b), link in zip(pairs, placed.links, strict=True) if link is not None}
    }
    for name, fact in (("numa_node", _numa_node), ("pcie", _pcie), ("nvlinks", _nvlinks)):
        known = {str(rank): fact(device) for rank, device in enumerate(placed.devices)}
        document[name] = {rank: value for rank, value in known.items() if value is not None}
    return {name: facts for name, facts in document.items() if facts}


def _numa_node(device: Device) -> str | None:
    return None if device.numa_node is None else str(device.numa_node)


def _pcie(device: Device) -> str | None:
    """Without the generation now, which an idle GPU lowers."""
    if device.pcie is None or device.pcie.width is None:
        return None
    return f"x{device.pcie.width}" + (f" gen{device.pcie.max_generation}" if device.pcie.max_generation else "")


def _nvlinks(device: Device) -> str | None:
    """``18 up at 26562 MB/s``, one part for each speed; ``None`` where the device has no NVLinks."""
    if not device.nvlinks:
        return None
    speeds: dict[int | None, int] = {}
    for group in device.nvlinks:
        if group.active:
            speeds[group.speed_mbps] = speeds.get(group.speed_mbps, 0) + len(group.links)
    parts = [f"{count} up" + (f" at {speed} MB/s" if speed else "") for speed, count in speeds.items()]
    return " and ".join(parts) or "none up"


_WORDS = {
    "links": "ranks {} {}",
    "numa_node": "rank {} NUMA node {}",
    "pcie": "rank {} PCIe {}",
    "nvlinks": "rank {} NVLinks {}",
}


def describe_drift(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return one line that names every difference, ``""`` where there is none.

    Only what is known on both sides is compared, but for links: a link that is no longer known is another one.
    """
    changes = []
    for name, words in _WORDS.items():
        before, after = stored.get(name, {}), now.get(name, {})
        for place in sorted(
            set(before) | set(after) if name == "links" and before and after else set(before) & set(after)
        ):
            old, new = before.get(place, "unknown"), after.get(place, "unknown")
            if old != new:
                changes.append(words.format(place, f"{old} -> {new}"))
    return f"wiring differs from the baseline's: {'; '.join(changes)}" if changes else ""
