"""A fake of PyTorch for the ranks of a probe: what ``adapters/collective_worker.py`` calls, and no more.

A tensor is one number. Sums go through files beside the one by which the ranks find each other; a sum of zeros is not
exchanged, so that rows of them take no time. On a GPU time is a number that a captured row moves on. What goes wrong
is told in JSON through the variable ``FAKE_TORCH`` (:mod:`.distributed`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__version__ = "2.9.0+fake"

bfloat16, float16, float32 = 2, 2, 4
"""A dtype is the bytes of a number."""

BEHAVIOUR: dict[str, Any] = {"latency_us": 10.0, "gb_per_s": 370.0} | json.loads(os.environ.get("FAKE_TORCH") or "{}")
if BEHAVIOUR.get("missing"):
    raise ModuleNotFoundError("No module named 'torch'")


@dataclass(eq=False)
class Tensor:
    """As many numbers as it says, all alike."""

    elements: int
    element_bytes: int
    device: str
    value: float = 0.0

    @property
    def size_bytes(self) -> int:
        """Of all its numbers."""
        return self.elements * self.element_bytes

    def fill_(self, value: float) -> None:
        """Set all numbers."""
        self.value = float(value)

    def zero_(self) -> None:
        """Set all numbers to 0."""
        self.value = 0.0

    def min(self) -> float:
        """The least of them."""
        return self.value

    def max(self) -> float:
        """The greatest of them."""
        return self.value


def zeros(elements: int, *, dtype: int, device: str) -> Tensor:
    """Return a tensor of zeros."""
    return Tensor(elements, dtype, device)


def set_num_threads(number: int) -> None:
    """Do nothing with at least one thread."""
    assert number > 0


class CUDAGraph:
    """A captured row. :ivar work_us: how long it takes."""

    def __init__(self) -> None:
        self.work_us = 0.0

    def replay(self) -> None:
        """Let its time pass."""
        assert self.work_us > 0, "nothing was captured"
        cuda.now_us += self.work_us


class Event:
    """An instant of the GPU."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at_us = 0.0

    def record(self) -> None:
        """Note the time."""
        self.at_us = cuda.now_us

    def synchronize(self) -> None:
        """Return at once."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds to a later event."""
        return (end.at_us - self.at_us) / 1e3


_Graph = CUDAGraph


class _Nccl:
    @staticmethod
    def version() -> tuple[int, int, int]:
        return 2, 27, 5


class _Cuda:
    """``torch.cuda``. :ivar now_us: the GPU's clock. :ivar capturing: the graph that is being captured."""

    CUDAGraph = CUDAGraph  # as torch.cuda has it
    Event = Event
    nccl = _Nccl()

    def __init__(self) -> None:
        self.now_us = 0.0
        self.capturing: _Graph | None = None
        self.device: int | None = None

    def set_device(self, device: int) -> None:
        visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        assert 0 <= device < len(visible), f"no GPU {device} among {visible}"
        self.device = device

    def synchronize(self) -> None:
        assert self.capturing is None, "operation not permitted when stream is capturing"

    @contextmanager
    def graph(self, graph: _Graph, *, capture_error_mode: str = "global") -> Iterator[None]:
        assert capture_error_mode == "thread_local", "the watchdog asks for events"
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None


cuda = _Cuda()
