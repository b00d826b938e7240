"""The GPUs of the machine that the fake NVML shows, as CUDA would see them, and contexts on them.

A context is listed by the fake NVML (``tests/native/README.md``) for as long as its process lives. The file that says
so stays, so that a test can read afterwards who computed where, and under which variables.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MODEL_BYTES = 16 * 2**30
_BARE_CONTEXT_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class VisibleGpu:
    """A GPU that ``CUDA_VISIBLE_DEVICES`` leaves. :param index: NVML's. :param bus_id: as NVML writes it."""

    index: int
    uuid: str
    bus_id: str


def own_gpu(local_rank: int) -> VisibleGpu | None:
    """The GPU of a rank: ``cuda:LOCAL_RANK``; ``None`` on a machine without GPUs."""
    return visible_gpus()[local_rank] if "FAKE_NVML_CONFIG" in os.environ else None


def visible_gpus() -> list[VisibleGpu]:
    """The GPUs that CUDA numbers from 0, by UUID or index (CUDA C++ Programming Guide, "Environment Variables")."""
    document: Any = json.loads(Path(os.environ["FAKE_NVML_CONFIG"]).read_text(encoding="utf-8"))
    gpus = [VisibleGpu(index, gpu["uuid"], gpu["bus_id"]) for index, gpu in enumerate(document["gpus"])]
    names = {name: gpu for gpu in gpus for name in (gpu.uuid, str(gpu.index))}
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus if chosen is None else [names[name.strip()] for name in chosen.split(",")]


def use_gpus(uuids: Sequence[str]) -> None:
    """Hold contexts until this process ends: a model on the first of these GPUs, nothing much on the others."""
    held = {
        "gpus": {uuid: _BARE_CONTEXT_BYTES if number else _MODEL_BYTES for number, uuid in enumerate(uuids)},
        "environment": {name: value for name, value in os.environ.items() if name.startswith("CUDA_")},
    }
    path = Path(os.environ["FAKE_NVML_CONTEXTS"], f"{os.getpid()}.json")
    unfinished = path.with_suffix(".tmp")
    file = os.open(unfinished, os.O_RDWR | os.O_CREAT)  # stays open: the lock is what keeps the contexts alive
    fcntl.flock(file, fcntl.LOCK_EX)
    os.write(file, json.dumps(held).encode())
    unfinished.rename(path)
