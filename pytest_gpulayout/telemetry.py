"""How the devices fared in the window of a measurement: series, counters, and what slowed them down.

Knows quantities and their units. Leaves sampling to the adapters, and what follows for the measurement to
:mod:`~pytest_gpulayout.validity`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Series = Sequence[float | None]
"""(n_samples,), ``None`` where the source had no answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTelemetry:
    """One device, or the host's CPUs.

    :param name: ``GPU 0`` (index of the driver), or ``CPU``.
    :param series: by name with its unit: of a GPU ``utilization_percent``, ``memory_utilization_percent``,
        ``sm_clock_mhz``, ``memory_clock_mhz``, ``power_w``, ``temperature_c``, ``pcie_rx_mb_per_s``,
        ``pcie_tx_mb_per_s``, ``nvlink_rx_mb_per_s``, ``nvlink_tx_mb_per_s``, ``memory_used_mib``; of the CPUs
        ``busy_percent``, ``steal_percent``, ``load_1min``, ``frequency_mhz``.
    :param counters: growth in the window: ``ecc_corrected``, ``ecc_uncorrected``, ``pcie_replays``,
        ``nvlink_errors``, ...
    :param throttled: reason -> share of the samples (0 to 1) in which the driver named it, e.g. ``sw_power_cap``,
        ``hw_slowdown``, ``sw_thermal_slowdown``, ``hw_thermal_slowdown``, ``hw_power_brake_slowdown``.
    """

    name: str
    series: Mapping[str, Series] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)
    throttled: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """All devices of one window.

    :param source: ``NVML`` or ``/proc``. :param interval_s: between samples, as asked for.
    :param sample_ns: (n_samples,), ``CLOCK_MONOTONIC``, inside the window.
    :param devices: those of the layout, in rank order. :param notes: what could not be read, and why.
    """

    source: Literal["NVML", "/proc"]
    interval_s: float
    sample_ns: Sequence[int] = ()
    devices: tuple[DeviceTelemetry, ...] = ()
    notes: tuple[str, ...] = ()
