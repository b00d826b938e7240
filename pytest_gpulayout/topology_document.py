"""The JSON document of a topology, as ``gpulayout topo --json`` prints it and ``--gpu-topology`` reads it back.

``schemas/topology.schema.json`` describes it. What a source does not say is ``null``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pytest_gpulayout.errors import TopologyFormatError
from pytest_gpulayout.links import LinkClass, parse_link_class
from pytest_gpulayout.topology import Device, Fabric, NvLinks, P2pStatus, PcieLink, Topology

SCHEMA_VERSION = 1


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
        "nvml_version": topology.nvml_version,
        "gpus": [_device_to_document(device) for device in topology.devices],
        "links": links if topology.links else [],
        "worst": _text(topology.worst()),
        "all_nvlink": topology.all_nvlink,
        "nvlink_islands": [list(island) for island in topology.nvlink_islands],
        "p2p": [{"a": p.a, "b": p.b, "capability": p.capability, "status": p.status} for p in topology.p2p],
        "notes": list(topology.notes),
        "placement": chosen,
    }


def _device_to_document(device: Device) -> dict[str, Any]:
    groups = [{**asdict(group), "links": list(group.links)} for group in device.nvlinks]
    return {**asdict(device), "nvlinks": groups}


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
        devices=tuple(_device_from_document(gpu) for gpu in document["gpus"]),
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
        nvml_version=document.get("nvml_version"),
        p2p=tuple(P2pStatus(**status) for status in document.get("p2p", ())),
        notes=tuple(document.get("notes", ())),
    )


def _device_from_document(gpu: Mapping[str, Any]) -> Device:
    parts: dict[str, Any] = dict(gpu)
    parts["nvlinks"] = tuple(NvLinks(**{**group, "links": tuple(group["links"])}) for group in gpu.get("nvlinks", ()))
    for name, kind in (("pcie", PcieLink), ("fabric", Fabric)):
        if gpu.get(name) is not None:
            parts[name] = kind(**gpu[name])
    return Device(**parts)


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
