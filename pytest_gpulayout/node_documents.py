"""What an agent on a node found, as JSON, and back: who is on its GPUs, what surrounds its ranks, telemetry.

JSON knows neither tuples nor numbers as keys; each pair of functions here is the identity otherwise. Topologies have
their own form (:mod:`~pytest_gpulayout.topology_document`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pytest_gpulayout.nccl_log import LogLine
from pytest_gpulayout.occupancy import GpuUse, OccupancyReport, OccupancyViolation, RankOccupancy
from pytest_gpulayout.surroundings import PciSlot, RankSurroundings, Surroundings
from pytest_gpulayout.telemetry import DeviceTelemetry, Telemetry


def occupancy_to_document(report: OccupancyReport) -> dict[str, Any]:
    """Return on which GPUs ranks compute as JSON."""
    return asdict(report)


def occupancy_from_document(document: Mapping[str, Any]) -> OccupancyReport:
    """Return on which GPUs ranks compute from JSON."""
    ranks = [RankOccupancy(**{**rank, "gpu": GpuUse(**rank["gpu"])}) for rank in document["ranks"]]
    return OccupancyReport(
        proved_by=document["proved_by"],
        ranks=tuple(ranks),
        violations=tuple(OccupancyViolation(**violation) for violation in document["violations"]),
        not_proved=tuple(document["not_proved"]),
        remarks=tuple(document["remarks"]),
    )


def surroundings_to_document(surroundings: Surroundings) -> dict[str, Any]:
    """Return what surrounds ranks as JSON."""
    ranks = {str(rank): asdict(own) for rank, own in surroundings.ranks.items()}
    slots = {name: asdict(slot) for name, slot in surroundings.slots.items()}
    return {
        "ranks": ranks,
        "slots": slots,
        "rdma_devices": surroundings.rdma_devices,
        "kernel_command_line": surroundings.kernel_command_line,
        "iommu_groups": surroundings.iommu_groups,
    }


def surroundings_from_document(document: Mapping[str, Any], *, first_rank: int = 0) -> Surroundings:
    """Return what surrounds ranks from JSON. :param first_rank: of the layout, which is 0 on this node."""
    return Surroundings(
        ranks={int(rank) + first_rank: _rank(own) for rank, own in document["ranks"].items()},
        rdma_devices=_tuple(document["rdma_devices"]),
        kernel_command_line=document["kernel_command_line"],
        iommu_groups=document["iommu_groups"],
        slots={
            name: PciSlot(slot["iommu"], _tuple(slot["acs_redirects"])) for name, slot in document["slots"].items()
        },
    )


def _rank(document: Mapping[str, Any]) -> RankSurroundings:
    parts = dict(document)
    parts["configuration"] = tuple(LogLine(**line) for line in document["configuration"])
    parts["verbs"] = _tuple(document["verbs"])
    return RankSurroundings(**parts)


def _tuple(names: Any) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


def telemetry_to_document(telemetry: Telemetry) -> dict[str, Any]:
    """Return the telemetry of one node as JSON."""
    return asdict(telemetry)


def telemetry_from_document(document: Mapping[str, Any]) -> Telemetry:
    """Return the telemetry of one node from JSON."""
    parts = dict(document)
    parts["sample_ns"] = tuple(document["sample_ns"])
    parts["devices"] = tuple(map(_device, document["devices"]))
    parts["notes"] = tuple(document["notes"])
    parts["followers"] = tuple(map(telemetry_from_document, document["followers"]))
    return Telemetry(**parts)


def _device(document: Mapping[str, Any]) -> DeviceTelemetry:
    series = {name: tuple(values) for name, values in document["series"].items()}
    return DeviceTelemetry(**{**document, "series": series})
