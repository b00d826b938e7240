"""What NVIDIA GPUs do at one moment, as NVML tells it: load, clocks, power, heat, transfers and error counters.

Knows which NVML call tells what, and stops asking for what a GPU or its driver does not have. Leaves the timetable to
:mod:`~pytest_gpulayout.adapters.telemetry_process`, rates and growth to
:mod:`~pytest_gpulayout.adapters.telemetry_watch`.

Sources: NVML API reference, "Device Queries", "Field Value Queries", ``nvmlClocksEventReasons``; ``nvml.h`` of CUDA
13 for the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypedDict

from pytest_gpulayout.adapters.nvml_inquiry import (
    BROKEN,
    CLOSED,
    NOT_OF_THIS_DRIVER,
    NOT_OF_THIS_HARDWARE,
    Answer,
    GpuFault,
    GpuInquiry,
    Inquiry,
)

Reading = dict[str, float]
"""Quantity -> value; what is not known is left out."""

REASONS = {
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
"""Bits of ``nvmlClocksEventReasons``, by ``nvidia-smi``'s names; 0x001, idle, is no reason to be slow."""

_PERMANENT = NOT_OF_THIS_HARDWARE | NOT_OF_THIS_DRIVER | CLOSED
_CLOCK_SM, _CLOCK_MEMORY = 1, 2  # nvmlClockType_t
_PCIE_TX, _PCIE_RX = 0, 1  # nvmlPcieUtilCounter_t
_PCIE_CALL_S = 0.02  # nvmlDeviceGetPcieThroughput: "over a time interval of 20 ms"
_CORRECTED, _UNCORRECTED, _VOLATILE = 0, 1, 0  # nvmlMemoryErrorType_t, nvmlEccCounterType_t
_TEMPERATURE_GPU = 0  # nvmlTemperatureSensors_t
_ALL_LINKS = 0xFFFFFFFF  # a scope: "UINT_MAX for the aggregate value of all links"
_VALUES = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")  # members by nvmlValueType_t

# NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX and _TX, KiB since the driver was loaded.
_NVLINK_BYTES = {"nvlink_rx_kib": (139, _ALL_LINKS), "nvlink_tx_kib": (138, _ALL_LINKS)}
# NVML_FI_DEV_NVLINK_ERROR_DL_CRC, _REPLAY, _RECOVERY, one link each: Hopper and later.
_NVLINK_ERRORS_OF_LINK = {"nvlink_crc_errors": 163, "nvlink_replays": 161, "nvlink_recoveries": 162}
# NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL, _CRC_DATA_, _REPLAY_, _RECOVERY_, all links: before Hopper.
_NVLINK_ERRORS = {"nvlink_crc_errors": (38, 45), "nvlink_replays": (52,), "nvlink_recoveries": (59,)}


class WantedGpu(TypedDict):
    """A GPU to sample. ``links``: numbers of its NVLinks that are up."""

    index: int
    uuid: str | None
    pci_bus_id: str | None
    links: list[int]


@dataclass(frozen=True, slots=True)
class _Question:
    """:param calls: functions that tell it, newest name first, with their arguments after the handle."""

    subject: str
    calls: tuple[tuple[Any, ...], ...]
    read: Callable[[Any], Reading]


def _single(subject: str, quantity: str, *calls: tuple[Any, ...], unit: float = 1) -> _Question:
    """A question whose answer is a number. :param unit: what the number is multiplied with."""
    return _Question(subject, calls, lambda value: {quantity: value * unit})


_EACH_TIME = (
    _Question(
        "utilisation",
        (("nvmlDeviceGetUtilizationRates",),),
        lambda rates: {"utilization_percent": rates.gpu, "memory_utilization_percent": rates.memory},
    ),
    _single("SM clock", "sm_clock_mhz", ("nvmlDeviceGetClockInfo", _CLOCK_SM)),
    _single("memory clock", "memory_clock_mhz", ("nvmlDeviceGetClockInfo", _CLOCK_MEMORY)),
    _single("power", "power_w", ("nvmlDeviceGetPowerUsage",), unit=1e-3),
    _single(
        "temperature",
        "temperature_c",
        ("nvmlDeviceGetTemperature", _TEMPERATURE_GPU),
        ("nvmlDeviceGetTemperatureV1", _TEMPERATURE_GPU),
    ),
    _single(
        "reasons for low clocks",
        "reasons",
        ("nvmlDeviceGetCurrentClocksEventReasons",),
        ("nvmlDeviceGetCurrentClocksThrottleReasons",),
    ),
    _Question(
        "memory", (("nvmlDeviceGetMemoryInfo",),), lambda memory: {"memory_used_mib": round(memory.used / 2**20, 1)}
    ),
)
_AT_BOTH_ENDS = (
    _single("ECC errors", "ecc_corrected", ("nvmlDeviceGetTotalEccErrors", _CORRECTED, _VOLATILE)),
    _single("ECC errors", "ecc_uncorrected", ("nvmlDeviceGetTotalEccErrors", _UNCORRECTED, _VOLATILE)),
    _single("PCIe replays", "pcie_replays", ("nvmlDeviceGetPcieReplayCounter",)),
    _single("power limit", "power_limit_w", ("nvmlDeviceGetEnforcedPowerLimit",), unit=1e-3),
    _single("power limit", "default_power_limit_w", ("nvmlDeviceGetPowerManagementDefaultLimit",), unit=1e-3),
)
_SLOW = (
    _single("PCIe throughput", "pcie_rx_mb_per_s", ("nvmlDeviceGetPcieThroughput", _PCIE_RX), unit=1e-3),
    _single("PCIe throughput", "pcie_tx_mb_per_s", ("nvmlDeviceGetPcieThroughput", _PCIE_TX), unit=1e-3),
)


class NvmlReader:
    """Reads GPUs again and again, NVML being initialised.

    :param nvml: the ``pynvml`` module. :param interval_s: between two readings; it bounds what may take long.
    """

    def __init__(self, nvml: Any, wanted: Sequence[WantedGpu], interval_s: float) -> None:
        self._inquiry = Inquiry(nvml)
        self._inquiry.driver_version = self._inquiry.attempt((), nvml.nvmlSystemGetDriverVersion).value
        self._gpus = [_open_gpu(self._inquiry, gpu) for gpu in wanted]
        self._indices = [gpu["index"] for gpu in wanted]
        # A quarter of the interval for the calls that wait: with many GPUs they take turns.
        self._slow_gpus = max(1, int(interval_s / 4 / (len(_SLOW) * _PCIE_CALL_S)))
        self._turn = 0

    def read(self, *, at_an_end: bool) -> list[Reading]:
        """Return a reading of each GPU, in the order they were asked for.

        :param at_an_end: of the window: error counters are read, and calls that take long are not made.
        """
        readings = [gpu.read((*_EACH_TIME, *(_AT_BOTH_ENDS if at_an_end else ()))) for gpu in self._gpus]
        for gpu, reading in zip(self._gpus, readings, strict=True):
            reading |= gpu.read_nvlinks(with_errors=at_an_end)
        for position in () if at_an_end else self._whose_turn():
            readings[position] |= self._gpus[position].read(_SLOW)
        return readings

    def notes(self) -> list[str]:
        """Return what was not told, and why, a sentence for each thing and reason."""
        return list(self._inquiry.notes(self._indices))

    def _whose_turn(self) -> Iterator[int]:
        count = min(self._slow_gpus, len(self._gpus))
        first, self._turn = self._turn, self._turn + count
        return islice(((first + i) % len(self._gpus) for i in range(count)), count)


@dataclass(slots=True)
class _Gpu:
    """One GPU, and what it is no use to ask it for any more.

    :param asking: ``None`` when it cannot be used.
    """

    inquiry: Inquiry
    wanted: WantedGpu
    asking: GpuInquiry | None
    _settled: dict[str, tuple[Any, ...] | None] = field(default_factory=dict)
    _noted: set[tuple[str, int]] = field(default_factory=set)
    _error_fields: dict[tuple[int, int], str] | None = None

    def read(self, questions: Sequence[_Question]) -> Reading:
        """Return the answers to those questions that can be answered."""
        reading: Reading = {}
        for question in questions:
            answer = self._ask(question)
            if answer is not None and answer.error is None:
                reading |= question.read(answer.value)
        return reading

    def read_nvlinks(self, *, with_errors: bool) -> Reading:
        """Return what crossed the NVLinks so far, and their errors."""
        if not self.wanted["links"]:
            return {}
        reading: Reading = {}
        found = self._fields("NVLink throughput", list(_NVLINK_BYTES.values()))
        for quantity, key in _NVLINK_BYTES.items():
            reading |= {quantity: found[key]} if key in found else {}
        if with_errors:
            if self._error_fields is None:
                self._error_fields = self._find_error_fields()
            found = self._fields("NVLink errors", list(self._error_fields))
            for key, value in found.items():
                quantity = self._error_fields[key]
                reading[quantity] = reading.get(quantity, 0) + value
        return reading

    def _ask(self, question: _Question) -> Answer | None:
        """Try the names of a function in turn, and keep to the one that exists."""
        key = str(question.calls[0])
        for call in question.calls if key not in self._settled else filter(None, [self._settled[key]]):
            is_last = call is question.calls[-1]
            answer = self._attempt(question.subject, call[0], *call[1:], usual=() if is_last else NOT_OF_THIS_DRIVER)
            if answer is None:
                return None
            if is_last or answer.error not in NOT_OF_THIS_DRIVER:
                self._settled[key] = None if answer.error in _PERMANENT else call
                return answer
        return None

    def _attempt(self, subject: str, name: str, *arguments: object, usual: Collection[int] = ()) -> Answer | None:
        """Return the answer, ``None`` from a GPU that has gone; a missing answer is noted once for each reason.

        :param usual: errors that are no news.
        """
        if self.asking is None:
            return None
        try:
            answer = self.asking.attempt(_function(self.asking.nvml, name), *arguments)
        except GpuFault as fault:
            self.lose(fault.words)
            return None
        if answer.error is not None and answer.error not in usual:
            self._note(subject, answer, name)
        return answer

    def _note(self, subject: str, answer: Answer, name: str) -> None:
        if self.asking is not None and (subject, answer.error or 0) not in self._noted:
            self._noted.add((subject, answer.error or 0))
            self.asking.remember(subject, answer, name)

    def lose(self, words: str) -> None:
        """Ask no more of a GPU that cannot be used."""
        self.asking = None
        self.inquiry.remark("samples", (self.wanted["index"],), f"none (any more), {words}")

    def _fields(self, subject: str, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], float]:
        """:param keys: (field, scope). :returns: those that were answered."""
        answer = self._attempt(subject, "nvmlDeviceGetFieldValues", list(keys)) if keys else None
        if answer is None or answer.value is None:
            return {}
        errors = {value.nvmlReturn for value in answer.value} - {0}
        for error in errors:
            self._note(subject, _refusal(self.inquiry.nvml, error), "nvmlDeviceGetFieldValues")
        return {
            key: getattr(value.value, _VALUES[value.valueType])
            for key, value in zip(keys, answer.value, strict=True)
            if value.nvmlReturn == 0
        }

    def _find_error_fields(self) -> dict[tuple[int, int], str]:
        """Those error counters that the GPU has: one for each link, or one for all."""
        of_link = {
            (number, link): quantity
            for quantity, number in _NVLINK_ERRORS_OF_LINK.items()
            for link in self.wanted["links"]
        }
        of_all = {(number, 0): quantity for quantity, numbers in _NVLINK_ERRORS.items() for number in numbers}
        answer = self._attempt("NVLink errors", "nvmlDeviceGetFieldValues", [*of_link, *of_all])
        if answer is None or answer.value is None:
            return {}
        known = {(value.fieldId, value.scopeId) for value in answer.value if value.nvmlReturn == 0}
        answered = {key: quantity for key, quantity in of_link.items() if key in known}
        # Where the driver knows both, they count the same errors.
        return answered or {key: quantity for key, quantity in of_all.items() if key in known} or of_link


def _function(nvml: Any, name: str) -> Callable[..., Any]:
    """A function of pynvml; one that this pynvml is too old for fails as if the driver did not have it."""

    def missing(*_arguments: object) -> Any:
        raise nvml.NVMLError(nvml.NVML_ERROR_FUNCTION_NOT_FOUND)

    return getattr(nvml, name, missing)


def _refusal(nvml: Any, error: int) -> Answer:
    return Answer(None, error, str(nvml.NVMLError(error)))


def _open_gpu(inquiry: Inquiry, wanted: WantedGpu) -> _Gpu:
    """Find a GPU by what stays the same when indices change: UUID, then PCI bus id, then its index."""
    nvml = inquiry.nvml
    call: Callable[..., Any] = nvml.nvmlDeviceGetHandleByIndex
    argument: str | int = wanted["index"]
    if wanted["uuid"]:
        call, argument = nvml.nvmlDeviceGetHandleByUUID, wanted["uuid"]
    elif wanted["pci_bus_id"]:
        call, argument = nvml.nvmlDeviceGetHandleByPciBusId, wanted["pci_bus_id"]
    try:
        answer = inquiry.attempt((wanted["index"],), call, argument, broken=BROKEN)
    except GpuFault as fault:
        answer = Answer(None, 0, fault.words)
    if answer.error is not None:
        gpu = _Gpu(inquiry, wanted, None)
        gpu.lose(answer.words)
        return gpu
    return _Gpu(inquiry, wanted, GpuInquiry(inquiry, wanted["index"], answer.value))
