"""What is wrong with the GPUs of a machine and their links, in plain sentences, as far as the source shows it.

Each sentence rests on something that was read; what a source does not say gives none. A machine without a bridge, an
idle GPU that lowered its PCIe generation and GPUs that never had NVLink are in good health.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pytest_gpulayout.topology import SWITCH, Device, Fabric, Topology, normal_bus_id

_MOST_PAIRS = 4

_Fact = tuple[int, str]
"""Index of a device, and what follows its name in the sentence."""


def describe_faults(topology: Topology) -> tuple[str, ...]:
    """Return a sentence per fault; GPUs that share one share the sentence. Nothing for a healthy machine.

    That some NVLinks of a GPU are up and some down is told although a card with fewer bridges than it has room for
    looks the same, which only its owner can know.
    """
    facts = [
        fact
        for device in sorted(topology.devices, key=lambda device: device.index)
        for fact in (*_unusable(device), *_links_down(device), *_narrow_pcie(device), *_fabric_not_ready(device))
    ]
    facts += _slow_links(topology)
    indices_by_text: dict[str, list[int]] = {}
    for index, text in facts:
        indices_by_text.setdefault(text, []).append(index)
    sentences = [name_gpus(indices) + text for text, indices in indices_by_text.items()]
    return (*sentences, *_refused_nvlinks(topology), *_uneven_ends(topology))


def name_gpus(indices: Sequence[int]) -> str:
    """``GPU 3``, ``GPUs 0 and 2``, ``GPUs 0-3 and 6``. :param indices: (n_gpus,), ascending."""
    return f"{'GPU' if len(indices) == 1 else 'GPUs'} {_name_numbers(indices)}"


def name_pairs(pairs: Sequence[tuple[int, int]], among: Sequence[tuple[int, int]]) -> str:
    """``GPUs 0 and 1, 0 and 2``; ``all pairs`` if these are all of ``among``, which are several."""
    if len(among) > 1 and set(pairs) == set(among):
        return "all pairs"
    named = ", ".join(f"{a} and {b}" for a, b in pairs[:_MOST_PAIRS])
    more = len(pairs) - _MOST_PAIRS
    return f"GPUs {named}" + (f" and {more} more pair{'s' * (more > 1)}" if more > 0 else "")


def _name_numbers(numbers: Iterable[int]) -> str:
    """``4``, ``4 and 7``, ``0-3, 5 and 8``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [
        word
        for run in runs
        for word in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(number) for number in run])
    ]
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), *words[-1:]])


def _unusable(device: Device) -> Iterator[_Fact]:
    if device.fault is not None:
        yield device.index, f" cannot be used: {device.fault}"
    elif device.mig:
        yield device.index, " cannot be used whole: MIG is on, and its instances have no peer access"


def _links_down(device: Device) -> Iterator[_Fact]:
    """All of them down is what a GPU without a bridge looks like."""
    up = [link for group in device.nvlinks if group.active for link in group.links]
    down = [link for group in device.nvlinks if not group.active for link in group.links]
    if up and down:
        yield (
            device.index,
            f": {len(up)} of {len(up) + len(down)} NVLinks are up, {_name_numbers(down)} "
            f"{'is' if len(down) == 1 else 'are'} down",
        )


def _narrow_pcie(device: Device) -> Iterator[_Fact]:
    pcie = device.pcie
    if pcie is None or pcie.width is None or pcie.max_width is None:
        return
    if pcie.width < pcie.max_width:
        yield device.index, f": PCIe x{pcie.width}, x{pcie.max_width} is possible"


def _fabric_not_ready(device: Device) -> Iterator[_Fact]:
    if device.fabric is not None and not device.fabric.is_ready:
        yield device.index, f": NVLink through switches is not ready, {_fabric_words(device.fabric)}"


def _fabric_words(fabric: Fabric) -> str:
    if fabric.state == "completed":
        return f"the fabric manager ended the registration with: {fabric.status}"
    return f"the registration at the fabric manager is {fabric.state}"


def _slow_links(topology: Topology) -> Iterator[_Fact]:
    """Links below the fastest one of the same model; a GPU of unknown model is compared with itself."""
    fastest: dict[str | int, int] = {}
    for device in topology.devices:
        speeds = [group.speed_mbps or 0 for group in device.nvlinks if group.active]
        model = device.name or device.index
        fastest[model] = max([fastest.get(model, 0), *speeds])
    for device in topology.devices:
        most = fastest[device.name or device.index]
        for group in device.nvlinks:
            if group.active and group.speed_mbps is not None and group.speed_mbps < most:
                links = f"NVLink{'s' * (len(group.links) > 1)} {_name_numbers(group.links)}"
                yield (
                    device.index,
                    f": {links} at {gb_per_s(group.speed_mbps)}, the fastest of this model at {gb_per_s(most)}",
                )


def gb_per_s(speed_mbps: int) -> str:
    """``25.0 GB/s``"""
    return f"{speed_mbps / 1000:.1f} GB/s"


def _refused_nvlinks(topology: Topology) -> Iterator[str]:
    """Pairs with NVLinks that are up and that the driver does not let use; why so of a MIG GPU is told already."""
    usable = {device.index for device in topology.usable}
    refused: dict[str, list[tuple[int, int]]] = {}
    for status in topology.p2p:
        link = topology.link(status.a, status.b)
        if status.capability != "n" or status.refusal is None or link is None or not link.is_nvlink:
            continue
        if {status.a, status.b} <= usable:
            pair = (min(status.a, status.b), max(status.a, status.b))
            refused.setdefault(f"{link} connects them, no peer access over NVLink ({status.refusal})", []).append(
                pair
            )
    for text, pairs in refused.items():
        yield f"{name_pairs(sorted(set(pairs)), topology.pairs)}: {text}"


def _uneven_ends(topology: Topology) -> Iterator[str]:
    """Pairs of which one GPU counts more links to the other than the other to it."""
    for a, b in topology.pairs:
        one, other = topology.device(a), topology.device(b)
        from_one, from_other = _links_between(one, other), _links_between(other, one)
        if from_one is not None and from_other is not None and from_one != from_other:
            yield (
                f"GPUs {a} and {b}: of the NVLinks between them {from_one} are up as GPU {a} counts, "
                f"{from_other} as GPU {b} does"
            )


def _links_between(device: Device, peer: Device) -> int | None:
    """Active links of ``device`` that end at ``peer``; ``None`` where that cannot be told."""
    active = [group for group in device.nvlinks if group.active]
    wanted = normal_bus_id(peer.pci_bus_id or "")
    if not device.nvlinks or wanted is None or any(group.remote is None for group in active):
        return None
    return sum(len(g.links) for g in active if g.remote not in (None, SWITCH) and normal_bus_id(g.remote) == wanted)
