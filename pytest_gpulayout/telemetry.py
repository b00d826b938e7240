"""How the devices fared in the window of a measurement: series, counters, and what slowed them down.

Knows quantities, their units, and from where on they matter. Leaves sampling to the adapters, and what follows for
the measurement to :mod:`~pytest_gpulayout.validity`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Series = Sequence[float | None]
"""(n_samples,), ``None`` where the source had no answer."""

CPU = "CPU"
"""Name of the device that stands for all CPUs of the host."""

THROTTLED_SHARE = 0.05
"""A GPU whose clock was lowered in more of its samples than this was slowed down."""

CGROUP_THROTTLED_SHARE = 0.05
"""Processes that a CPU quota stopped for more of the window than this were slowed down."""

STEAL_PERCENT = 5.0
"""More CPU time than this taken by other virtual machines slows the host down."""

OTHERS_PERCENT = 20.0
"""Processes that take more of the host's CPUs than this, and are neither the server's nor ours, disturb."""

# What the health watches of NVIDIA's DCGM call a failure (dcgm_gpu_hardware_limits.h, DcgmHealthWatch.cpp): CRC
# errors "only matter at rates of 100+ per second", "8 replays per minute is the maximum" for PCIe, and an NVLink that
# had to replay or recover once is one too many.
_NVLINK_CRC_PER_S = 100.0
_PCIE_REPLAYS_PER_MINUTE = 8.0

# NVML API reference, nvmlClocksEventReasons. Idle clocks are no slow-down; a power cap and clocks that somebody chose
# hold a GPU back in every run alike, and are remarks.
_SLOWING_REASONS = {
    "hw_slowdown": "its hardware halved the clocks or worse, for heat, power draw or the board's power brake",
    "hw_thermal_slowdown": "it is too hot and its hardware halved the clocks or worse: look after the cooling",
    "sw_thermal_slowdown": "it is hotter than it may be and the driver lowered the clocks: look after the cooling",
    "hw_power_brake_slowdown": "the board's power brake held it back: look after the power supply",
    "sync_boost": "it waits for a slower GPU of its sync boost group: the clocks of the others tell which",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTelemetry:
    """One device, or the host's CPUs.

    :param name: ``GPU 0`` (index of the driver), or :data:`CPU`.
    :param series: by name with its unit: of a GPU ``utilization_percent``, ``memory_utilization_percent``,
        ``sm_clock_mhz``, ``memory_clock_mhz``, ``power_w``, ``temperature_c``, ``pcie_rx_mb_per_s``,
        ``pcie_tx_mb_per_s``, ``nvlink_rx_mb_per_s``, ``nvlink_tx_mb_per_s``, ``memory_used_mib``; of the CPUs
        ``busy_percent``, ``steal_percent``, ``others_busy_percent`` (of all CPUs, by processes that are neither the
        server's nor ours), ``load_1min``, ``frequency_mhz``. A share or rate is that since the sample before, and so
        has no first value. A series without any value is left out.
    :param counters: growth in the window: of a GPU ``ecc_corrected``, ``ecc_uncorrected``, ``pcie_replays``,
        ``nvlink_crc_errors``, ``nvlink_replays``, ``nvlink_recoveries``, of the CPUs ``cgroup_throttled_us``,
        ``cgroup_throttled_periods``, ``cpu_pressure_us``; those that are known only.
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
    :param sample_ns: (n_samples,), ``CLOCK_MONOTONIC``, inside the window, the first at its begin, the last at its
        end.
    :param devices: those of the layout, in rank order, then the CPUs.
    :param others: the busiest processes that are neither the server's nor ours: description -> percent of all CPUs.
    :param notes: what could not be read, and why.
    :param node: the host that this is of, where the layout spans several; then it is the head,
    :param followers: and these are the others.
    """

    source: Literal["NVML", "/proc"]
    interval_s: float
    sample_ns: Sequence[int] = ()
    devices: tuple[DeviceTelemetry, ...] = ()
    others: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    node: str = ""
    followers: tuple[Telemetry, ...] = ()

    @property
    def on_nodes(self) -> tuple[Telemetry, ...]:
        """That of each host, the head first; of one host, this alone."""
        return (self, *self.followers)

    @property
    def seconds(self) -> float:
        """From the first sample to the last."""
        return (self.sample_ns[-1] - self.sample_ns[0]) / 1e9 if self.sample_ns else 0.0

    def mean(self, device: DeviceTelemetry, name: str) -> float | None:
        """Mean of a series, each value weighted with the time since the sample before; ``None`` without any.

        The first sample describes the moment before the window, and does not count.
        """
        gaps = [after - before for before, after in zip(self.sample_ns, self.sample_ns[1:], strict=False)]
        pairs = list(zip(device.series.get(name, ())[1:], gaps, strict=False))
        known = [(value, gap) for value, gap in pairs if value is not None]
        total = sum(gap for _, gap in known)
        return sum(value * gap for value, gap in known) / total if total else None


def summarize(telemetry: Telemetry) -> str:
    """Return one line: ``GPU 0,1: 93-97 % busy, SM 1755-1980 MHz, 612-688 W, 61-66 C, NVLink 41 GB/s; CPU: ...``.

    Ranges of the GPUs go from the 10th to the 90th percentile of the samples of all of them, without the first
    sample; figures of the CPUs are means, the load is the last. Of several nodes each has its own.
    """
    if telemetry.followers:
        return "; ".join(f"node {own.node}: {_summarize(own)}" for own in telemetry.on_nodes)
    return _summarize(telemetry)


def _summarize(telemetry: Telemetry) -> str:
    gpus = [device for device in telemetry.devices if device.name != CPU]
    cpus = [device for device in telemetry.devices if device.name == CPU]
    parts = [_summarize_gpus(telemetry, gpus)] if gpus else []
    parts += [_summarize_cpus(telemetry, device) for device in cpus]
    return "; ".join(parts) or "no device was sampled"


def slowdowns(telemetry: Telemetry) -> tuple[str, ...]:
    """Return a sentence for each thing that slowed a device down in the window; nothing when all was well.

    Clocks lowered for heat, power supply or by the board, uncorrected memory errors, links that had to repeat, a CPU
    quota that stopped processes, and CPU time taken by other virtual machines. A power cap is none: it is the normal
    state of a GPU under full load (:func:`remarks`).
    """
    return tuple(
        _named(own, sentence)
        for own in telemetry.on_nodes
        for device in own.devices
        for sentence in _slowdowns(own, device)
    )


def remarks(telemetry: Telemetry) -> tuple[str, ...]:
    """Return a sentence for each thing that is worth knowing and makes no measurement unfit.

    NVML: under ``sw_power_cap`` the clocks are "below requested clocks because the GPU is consuming too much power".
    Kernels that load the GPU fully reach that limit in every run, and how far the clock falls follows from the work;
    what could differ from run to run is the limit itself, which is named where it is not the default.
    """
    found = []
    for device in telemetry.devices:
        share = device.throttled.get("sw_power_cap", 0.0)
        if share > THROTTLED_SHARE:
            clocks = _span(_settled([device], "sm_clock_mhz")) or "?"
            found.append(
                f"{device.name}: sw_power_cap in {share:.0%} of the samples, SM clock {clocks} MHz: it reached its "
                "power limit, which is normal under full load"
            )
        if device.throttled.get("applications_clocks_setting", 0.0) > THROTTLED_SHARE:
            found.append(
                f"{device.name}: its clocks are held down by a setting (applications or locked clocks); "
                "'nvidia-smi -q -d CLOCK' shows it, 'nvidia-smi -rac' and '-rgc' undo it"
            )
        corrected = device.counters.get("ecc_corrected", 0)
        if corrected:
            found.append(f"{device.name}: {corrected} memory errors were corrected (ECC)")
        found += _few_errors(telemetry, device)
    return tuple(found)


def foreign_load(telemetry: Telemetry) -> str | None:
    """Return a sentence when processes that are neither the server's nor ours took many CPUs; else ``None``."""
    return next((_named(own, text) for own in telemetry.on_nodes if (text := _foreign_load(own))), None)


def _named(telemetry: Telemetry, sentence: str) -> str:
    return f"node {telemetry.node}: {sentence}" if telemetry.node else sentence


def _foreign_load(telemetry: Telemetry) -> str | None:
    for device in telemetry.devices:
        percent = telemetry.mean(device, "others_busy_percent")
        if percent is not None and percent > OTHERS_PERCENT:
            names = ", ".join(f"{name} {share:.0f} %" for name, share in telemetry.others.items())
            return (
                f"other processes used {percent:.0f} % of this machine's CPUs, allowed are {OTHERS_PERCENT:.0f} %"
                f"{': ' + names if names else ''}; end them, or measure on a machine that does nothing else"
            )
    return None


def _summarize_gpus(telemetry: Telemetry, gpus: Sequence[DeviceTelemetry]) -> str:
    named = "GPU " + ",".join(device.name.removeprefix("GPU ") for device in gpus)
    ranges = (
        ("", "utilization_percent", " % busy"),
        ("SM ", "sm_clock_mhz", " MHz"),
        ("", "power_w", " W"),
        ("", "temperature_c", " C"),
    )
    parts = []
    for before, series, after in ranges:
        span = _span(_settled(gpus, series))
        parts += [f"{before}{span}{after}"] if span else []
    for title, kind in (("NVLink", "nvlink"), ("PCIe", "pcie")):
        rates = [_both_ways(telemetry, device, kind) for device in gpus]
        span = _span([rate / 1000 for rate in rates if rate is not None], digits=1)
        parts += [f"{title} {span} GB/s"] if span else []
    reasons = sorted({reason for gpu in gpus for reason, share in gpu.throttled.items() if share > THROTTLED_SHARE})
    parts += reasons
    return f"{named}: {', '.join(parts) or 'not sampled'}"


def _both_ways(telemetry: Telemetry, device: DeviceTelemetry, kind: str) -> float | None:
    """Received and sent, MB/s."""
    rates = [telemetry.mean(device, f"{kind}_{way}_mb_per_s") for way in ("rx", "tx")]
    known = [rate for rate in rates if rate is not None]
    return sum(known) if known else None


def _summarize_cpus(telemetry: Telemetry, device: DeviceTelemetry) -> str:
    means = {name: telemetry.mean(device, name) for name in device.series}
    loads = [load for load in device.series.get("load_1min", ()) if load is not None]
    means["load_1min"] = loads[-1] if loads else None
    texts = (
        ("busy_percent", "{:.0f} % busy"),
        ("steal_percent", "steal {:.1f} %"),
        ("others_busy_percent", "others {:.0f} %"),
        ("load_1min", "load {:.1f}"),
        ("frequency_mhz", "{:.0f} MHz"),
    )
    parts = [text.format(value) for name, text in texts if (value := means.get(name)) is not None]
    return f"{device.name}: {', '.join(parts) or 'not sampled'}"


def _settled(devices: Iterable[DeviceTelemetry], name: str) -> list[float]:
    """All values of a series but the first of each device, which describes the moment before the window."""
    series = (device.series.get(name, ()) for device in devices)
    return [value for values in series for value in (values[1:] or values) if value is not None]


def _span(values: Sequence[float], digits: int = 0) -> str:
    """``"93-97"``, ``"95"`` when both ends are alike, ``""`` without values.

    From the 10th to the 90th percentile, nearest rank.
    """
    if not values:
        return ""
    ordered = sorted(values)
    low, high = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.1, 0.9))
    first, last = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return first if first == last else f"{first}-{last}"


def _slowdowns(telemetry: Telemetry, device: DeviceTelemetry) -> Iterator[str]:
    for reason, words in _SLOWING_REASONS.items():
        share = device.throttled.get(reason, 0.0)
        if share > THROTTLED_SHARE:
            clocks = _span(_settled([device], "sm_clock_mhz"))
            yield f"{device.name}: {reason} in {share:.0%} of the samples, SM clock {clocks or '?'} MHz; {words}"
    errors = device.counters.get("ecc_uncorrected", 0)
    if errors:
        yield f"{device.name}: {errors} memory errors could not be corrected (ECC); take it out of service"
    yield from _link_faults(telemetry, device)
    yield from _cpu_slowdowns(telemetry, device)


def _link_faults(telemetry: Telemetry, device: DeviceTelemetry) -> Iterator[str]:
    repaired = {name: device.counters.get(f"nvlink_{name}", 0) for name in ("replays", "recoveries")}
    if any(repaired.values()):
        counts = ", ".join(f"{count} {name}" for name, count in repaired.items() if count)
        yield f"{device.name}: NVLink had to repeat or to retrain ({counts}); check its bridge, switch or seat"
    if _is_crc_flood(telemetry, device):
        rate = device.counters["nvlink_crc_errors"] / telemetry.seconds
        yield f"{device.name}: {rate:.0f} NVLink CRC errors/s, {_NVLINK_CRC_PER_S:.0f} are too many; check its links"
    if _is_replay_flood(telemetry, device):
        count = device.counters["pcie_replays"]
        yield f"{device.name}: {count} PCIe replays in {telemetry.seconds:.0f} s; check its slot, riser or cable"


def _is_crc_flood(telemetry: Telemetry, device: DeviceTelemetry) -> bool:
    errors = device.counters.get("nvlink_crc_errors", 0)
    return errors > 0 and errors >= _NVLINK_CRC_PER_S * telemetry.seconds


def _is_replay_flood(telemetry: Telemetry, device: DeviceTelemetry) -> bool:
    # Within a window of seconds one replay is a high rate and says nothing: at least a minute's allowance is granted.
    return device.counters.get("pcie_replays", 0) > _PCIE_REPLAYS_PER_MINUTE * max(1.0, telemetry.seconds / 60)


def _few_errors(telemetry: Telemetry, device: DeviceTelemetry) -> Iterator[str]:
    crc, replays = device.counters.get("nvlink_crc_errors", 0), device.counters.get("pcie_replays", 0)
    if crc and not _is_crc_flood(telemetry, device):
        yield f"{device.name}: {crc} NVLink CRC errors, too few to matter"
    if replays and not _is_replay_flood(telemetry, device):
        yield f"{device.name}: {replays} PCIe replays, too few to matter"


def _cpu_slowdowns(telemetry: Telemetry, device: DeviceTelemetry) -> Iterator[str]:
    stopped_s = device.counters.get("cgroup_throttled_us", 0) / 1e6
    if stopped_s > CGROUP_THROTTLED_SHARE * telemetry.seconds:
        yield (
            f"{device.name}: a CPU quota stopped the server or the client for {stopped_s:.1f} s of "
            f"{telemetry.seconds:.1f} s (cgroup cpu.stat); raise the container's CPU limit"
        )
    steal = telemetry.mean(device, "steal_percent")
    if steal is not None and steal > STEAL_PERCENT:
        yield (
            f"{device.name}: other virtual machines took {steal:.0f} % of the CPU time (steal), allowed are "
            f"{STEAL_PERCENT:.0f} %; use a machine with CPUs of its own"
        )
