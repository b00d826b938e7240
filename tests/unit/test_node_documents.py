"""What an agent found comes back as it was, through JSON."""

from __future__ import annotations

import json
from typing import Any

from pytest_gpulayout.nccl_log import LogLine
from pytest_gpulayout.node_documents import (
    occupancy_from_document,
    occupancy_to_document,
    surroundings_from_document,
    surroundings_to_document,
    telemetry_from_document,
    telemetry_to_document,
)
from pytest_gpulayout.occupancy import GpuUse, OccupancyReport, OccupancyViolation, RankOccupancy
from pytest_gpulayout.surroundings import PciSlot, RankSurroundings, Surroundings
from pytest_gpulayout.telemetry import DeviceTelemetry, Telemetry


def through_json(document: Any) -> Any:
    return json.loads(json.dumps(document))


def test_occupancy() -> None:
    gpu = GpuUse(3, "GPU-3", 2**30, listed=False)
    report = OccupancyReport(
        "device memory",
        (RankOccupancy(0, gpu, 17, 2**20), RankOccupancy(1, gpu)),
        (OccupancyViolation("foreign", "GPU 3", pid=9, title="python train.py"),),
        ("something",),
        ("a remark",),
    )
    assert occupancy_from_document(through_json(occupancy_to_document(report))) == report


def test_surroundings() -> None:
    rank = RankSurroundings(
        42,
        host="h",
        environment={"NCCL_DEBUG": "INFO"},
        configuration=(LogLine("/etc/nccl.conf", 3, "NCCL_P2P_DISABLE=1"),),
        namespaces={"ipc": "ipc:[1]"},
        shm_device=5,
        shm_bytes=2**26,
        verbs=("uverbs0",),
        container="/.dockerenv",
    )
    slots = {"0000:01:00.0": PciSlot("DMA", ("0000:00:01.0",)), "0000:02:00.0": PciSlot()}
    whole = Surroundings({0: rank, 1: RankSurroundings(43)}, ("mlx5_0",), "quiet", 0, slots)
    assert surroundings_from_document(through_json(surroundings_to_document(whole))) == whole


def test_ranks_of_a_node_become_those_of_the_layout() -> None:
    document = through_json(surroundings_to_document(Surroundings({0: RankSurroundings(42)})))
    assert list(surroundings_from_document(document, first_rank=4).ranks) == [4]


def test_telemetry() -> None:
    device = DeviceTelemetry(
        name="GPU 0",
        series={"power_w": (None, 612.5)},
        counters={"ecc_corrected": 1},
        throttled={"sw_power_cap": 0.5},
    )
    telemetry = Telemetry(
        source="NVML", interval_s=0.5, sample_ns=(1, 2), devices=(device,), others={"train.py": 3.0}, notes=("n",)
    )
    assert telemetry_from_document(through_json(telemetry_to_document(telemetry))) == telemetry
