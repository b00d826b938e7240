"""Asks NVML, and remembers what is not answered and why, so that it can be said once for all GPUs.

A missing answer has many reasons: an old driver lacks the function, a virtual machine or a container refuses it, the
hardware has no such thing, or the GPU fell off the bus and answers nothing any more.

Source: NVML API reference, ``nvmlReturn_t``; the words for an error are those of ``pynvml``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from pytest_gpulayout.adapters.cpu_host import format_cpus

_INVALID_ARGUMENT, _NOT_SUPPORTED, _NO_PERMISSION = 2, 3, 4
_INSUFFICIENT_POWER, _IRQ_ISSUE, _FUNCTION_NOT_FOUND = 8, 11, 13
_GPU_IS_LOST, _RESET_REQUIRED, _UNKNOWN = 15, 16, 999

NOT_OF_THIS_HARDWARE = frozenset({_INVALID_ARGUMENT, _NOT_SUPPORTED})
"""Errors that say no more than that the hardware lacks what was asked for."""

NOT_OF_THIS_DRIVER = frozenset({_FUNCTION_NOT_FOUND})
"""The driver is older than the function, and often than the hardware that has what it tells."""

BROKEN = frozenset({_INSUFFICIENT_POWER, _IRQ_ISSUE, _GPU_IS_LOST, _RESET_REQUIRED})
"""Errors after which a GPU cannot be used."""

CLOSED = frozenset({_NO_PERMISSION, _UNKNOWN})
"""Errors that say the same where not even a GPU's name is told."""

_FAULTS = {
    _NO_PERMISSION: "this user or this container may not use it",
    _INSUFFICIENT_POWER: "its power cables are not attached properly",
    _IRQ_ISSUE: "the kernel cannot handle its interrupts",
    _GPU_IS_LOST: "it has fallen off the bus or become inaccessible",
    _RESET_REQUIRED: "it must be reset before it can be used",
    _UNKNOWN: "the driver does not say what is wrong with it",
}


class GpuFault(Exception):
    """A GPU that cannot be used any more; it ends the reading of this GPU and never leaves the adapter.

    :param gpus: index of the GPU, or both of the pair that was asked about.
    :param words: what is wrong, NVML's words first.
    """

    def __init__(self, gpus: tuple[int, ...], words: str) -> None:
        self.gpus = gpus
        self.words = words
        super().__init__(words)


@dataclass(frozen=True, slots=True)
class Answer:
    """:param value: ``None`` where there is none. :param error: then the ``nvmlReturn_t``, and NVML's words."""

    value: Any = None
    error: int | None = None
    words: str = ""


@dataclass(slots=True)
class Inquiry:
    """Asks NVML about GPUs and pairs of them (by index), and remembers what was not answered and why.

    :param driver_version: ``None`` where the driver does not tell it.
    """

    nvml: Any
    driver_version: str | None = None
    _unanswered: dict[tuple[str, str], list[tuple[int, ...]]] = field(default_factory=dict)

    def attempt(
        self,
        gpus: tuple[int, ...],
        call: Callable[..., Any],
        *arguments: object,
        broken: Collection[int] = BROKEN,
    ) -> Answer:
        """Return the answer or the error.

        :param gpus: what is asked about: nothing for the driver, one GPU, or a pair.
        :param broken: errors after which the GPU cannot be used.
        :raises GpuFault: the error is one of these.
        """
        try:
            return Answer(call(*arguments))
        except self.nvml.NVMLError as error:
            if gpus and error.value in broken:
                raise GpuFault(gpus, fault_words(error)) from error
            return Answer(None, error.value, str(error))

    def ask(
        self,
        subject: str,
        gpus: tuple[int, ...],
        call: Callable[..., Any],
        *arguments: object,
        usual: Collection[int] = (),
        broken: Collection[int] = BROKEN,
    ) -> Any:
        """Return the answer, ``None`` where there is none; that is remembered.

        :param subject: what is asked for, such as ``"NUMA node"``.
        :param usual: errors that are no news, and are not remembered.
        :raises GpuFault: the GPU cannot be used.
        """
        answer = self.attempt(gpus, call, *arguments, broken=broken)
        if answer.error is not None and answer.error not in usual:
            self.remember(subject, gpus, answer, call.__name__)
        return answer.value

    def remember(self, subject: str, gpus: tuple[int, ...], answer: Answer, function: str) -> None:
        """Keep in mind that a function did not tell something about these GPUs."""
        if answer.error == _FUNCTION_NOT_FOUND:
            version = f" ({self.driver_version})" if self.driver_version else ""
            reason = f"not known, this driver{version} has no {function}"
        elif answer.error in NOT_OF_THIS_HARDWARE:
            reason = f"the driver does not say ({answer.words})"
        else:
            reason = f"not known, {function} says {answer.words!r}"
        self.remark(subject, gpus, reason)

    def remark(self, subject: str, gpus: tuple[int, ...], reason: str) -> None:
        """Keep in mind why something is not known about these GPUs."""
        known = self._unanswered.setdefault((subject, reason), [])
        if gpus not in known[-1:]:
            known.append(gpus)

    def notes(self, indices: Collection[int]) -> tuple[str, ...]:
        """Return a sentence for each thing and reason, in the order of asking.

        :param indices: of the GPUs to speak of.
        """
        notes = []
        for (subject, reason), found in self._unanswered.items():
            spoken_of = [gpus for gpus in found if set(gpus) <= set(indices)]
            if spoken_of:
                notes.append(f"{subject}{_of_gpus(spoken_of)}: {reason}")
        return tuple(notes)


@dataclass(frozen=True, slots=True)
class GpuInquiry:
    """Asks about one GPU; its methods are those of :class:`Inquiry` without the GPU and its handle."""

    inquiry: Inquiry
    index: int
    handle: Any

    @property
    def nvml(self) -> Any:
        """The ``pynvml`` module."""
        return self.inquiry.nvml

    def attempt(self, call: Callable[..., Any], *arguments: object) -> Answer:
        """Return the answer or the error; raises :class:`GpuFault`."""
        return self.inquiry.attempt((self.index,), call, self.handle, *arguments)

    def ask(
        self,
        subject: str,
        call: Callable[..., Any],
        *arguments: object,
        usual: Collection[int] = (),
        broken: Collection[int] = BROKEN,
    ) -> Any:
        """Return the answer, ``None`` where there is none; raises :class:`GpuFault`."""
        return self.inquiry.ask(subject, (self.index,), call, self.handle, *arguments, usual=usual, broken=broken)

    def remember(self, subject: str, answer: Answer, function: str) -> None:
        """Keep in mind that a function did not tell something about this GPU."""
        self.inquiry.remember(subject, (self.index,), answer, function)


def fault_words(error: Any) -> str:
    """``"GPU is lost: it has fallen off the bus or become inaccessible"``: NVML's words, and plain ones."""
    words = str(error).rstrip(".")
    return f"{words}: {_FAULTS[error.value]}" if error.value in _FAULTS else words


def _of_gpus(found: Iterable[tuple[int, ...]]) -> str:
    """``" of GPU 0-7"``, ``" of GPU 0 and GPU 1"``, ``" of GPU 0-3 and GPU 4-7"``; ``""`` for the driver."""
    groups = sorted(set(found))
    if groups == [()]:
        return ""
    single = [group[0] for group in groups if len(group) == 1]
    pairs = [(group[0], group[1]) for group in groups if len(group) == 2]
    named = [f"GPU {format_cpus(single)}"] if single else []
    return " of " + ", ".join([*named, *_name_pairs(pairs)])


def _name_pairs(pairs: Sequence[tuple[int, int]]) -> list[str]:
    """Few words for many pairs: those among the same GPUs, or with the same partners, are named together."""
    members = sorted({index for pair in pairs for index in pair})
    if len(members) > 2 and len(pairs) == len(list(combinations(members, 2))):
        return [f"GPU {format_cpus(members)} among each other"]
    partners: dict[int, list[int]] = {}
    for a, b in pairs:
        partners.setdefault(a, []).append(b)
    peers: dict[tuple[int, ...], list[int]] = {}
    for a, others in partners.items():
        peers.setdefault(tuple(others), []).append(a)
    return [f"GPU {format_cpus(these)} and GPU {format_cpus(others)}" for others, these in peers.items()]
