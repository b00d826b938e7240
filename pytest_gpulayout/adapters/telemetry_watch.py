"""Watches the devices of a layout and the host's CPUs while a workload runs.

Knows how to start and end the sampling process, and how rates, shares and growth follow from what it read. Leaves
reading to :mod:`~pytest_gpulayout.adapters.telemetry_process`, judging to :mod:`~pytest_gpulayout.telemetry`.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest_gpulayout
from pytest_gpulayout.adapters.nvml_telemetry import REASONS, WantedGpu
from pytest_gpulayout.adapters.telemetry_process import SamplerConfig
from pytest_gpulayout.ports import Platform
from pytest_gpulayout.telemetry import CPU, DeviceTelemetry, Series, Telemetry, remarks
from pytest_gpulayout.topology import Device

Reading = Mapping[str, float]

# NVML without its persistence mode loads the driver first, which takes seconds.
_START_TIMEOUT_S = 30.0
_BEGIN_TIMEOUT_S = 10.0
_END_TIMEOUT_S = 10.0
_MODULE = "pytest_gpulayout.adapters.telemetry_process"
_PACKAGE_FOLDER = Path(pytest_gpulayout.__file__).parents[1]

_GAUGES = (
    "utilization_percent",
    "memory_utilization_percent",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "power_w",
    "temperature_c",
    "memory_used_mib",
    "pcie_rx_mb_per_s",
    "pcie_tx_mb_per_s",
)
# Series -> total it follows from, and MB in its unit.
_RATES = {"nvlink_rx_mb_per_s": ("nvlink_rx_kib", 1024 / 1e6), "nvlink_tx_mb_per_s": ("nvlink_tx_kib", 1024 / 1e6)}
_GPU_COUNTERS = (
    *("ecc_corrected", "ecc_uncorrected", "pcie_replays"),
    *("nvlink_crc_errors", "nvlink_replays", "nvlink_recoveries"),
)
_CPU_COUNTERS = {
    "cgroup_throttled_us": "throttled_us",
    "cgroup_throttled_periods": "throttled_periods",
    "cpu_pressure_us": "pressure_us",
}
_CLOSE_W = 1.0  # power limits that differ by less are the same


class TelemetryWatch:
    """Samples devices from entering to leaving; neither fails because something cannot be sampled.

    Entering returns when the first sample is taken (about 0.3 s); it may be entered again.

    :param platform: on ``cpu`` the CPUs alone are sampled. :param devices: those of the layout, in rank order.
    :param server_pids: the server's processes on this host, or those at the top of its tree; without one the CPU time
        of foreign processes is not told.
    :param interval_s: between samples.
    :param environ: of the sampling process; ``None`` for that of this one.
    """

    def __init__(
        self,
        platform: Platform,
        devices: Sequence[Device],
        *,
        server_pids: Sequence[int] = (),
        interval_s: float = 0.5,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._source: Literal["NVML", "/proc"] = "NVML" if platform == "cuda" else "/proc"
        self._devices = tuple(devices) if platform == "cuda" else ()
        self._server_pids = list(server_pids)
        self._interval_s = interval_s
        self._environ = os.environ if environ is None else environ
        self._child: _Child | None = None
        self._begin_ns = 0
        self._trouble = ""
        self._seen = Telemetry(source=self._source, interval_s=interval_s)

    def __enter__(self) -> TelemetryWatch:
        """Start sampling; return when the first sample is taken."""
        self._trouble = ""
        self._seen = Telemetry(source=self._source, interval_s=self._interval_s)
        try:
            self._child = _Child(self._config(), self._environ)
            self._child.expect("ready", _START_TIMEOUT_S)
            self._begin_ns = time.monotonic_ns()
            self._child.say("begin")
            self._child.expect("began", _BEGIN_TIMEOUT_S)
        except (OSError, _NoAnswer) as error:
            self._trouble = str(error)
            self._end_child()
        except BaseException:  # Ctrl-C: nobody is going to leave what was never entered
            self._end_child()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Take the last sample and end the sampling process."""
        lines: list[str] = []
        try:
            if self._child is not None:
                lines = self._child.finish()
        except (OSError, _NoAnswer) as error:
            self._trouble = str(error)
        finally:
            self._end_child()
        self._seen = self._assemble(lines, time.monotonic_ns())

    @property
    def seen(self) -> Telemetry:
        """What was sampled between entering and leaving."""
        return self._seen

    def _config(self) -> SamplerConfig:
        return {
            "gpus": [_wanted(device) for device in self._devices],
            "server_pids": self._server_pids,
            "parent_pid": os.getpid(),
            "interval_s": self._interval_s,
        }

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()

    def _assemble(self, lines: Sequence[str], end_ns: int) -> Telemetry:
        found = list(map(json.loads, lines))
        samples = [sample for sample in found if self._begin_ns <= sample.get("ns", 0) <= end_ns]
        last: Mapping[str, Any] = next((line for line in reversed(found) if "notes" in line), {})
        times = [int(sample["ns"]) for sample in samples]
        gpus = [
            gpu_telemetry(f"GPU {device.index}", times, [_nth(sample["gpus"], rank) for sample in samples])
            for rank, device in enumerate(self._devices)
        ]
        limits = [
            note
            for rank, device in enumerate(self._devices)
            for note in _power_limit(device, [_nth(sample["gpus"], rank) for sample in samples])
        ]
        trouble = [f"not sampled to the end: {self._trouble}"] if self._trouble else []
        telemetry = Telemetry(
            source=self._source,
            interval_s=self._interval_s,
            sample_ns=tuple(times),
            devices=(*gpus, cpu_telemetry([sample["cpu"] for sample in samples])),
            others=last.get("others", {}),
            notes=(*trouble, *last.get("notes", ())),
        )
        return replace(telemetry, notes=(*telemetry.notes, *limits, *remarks(telemetry)))


class _NoAnswer(Exception):
    """The sampling process is of no use; never leaves this module."""


class _Child:
    """The sampling process."""

    def __init__(self, config: SamplerConfig, environ: Mapping[str, str]) -> None:
        folders = [*filter(None, [environ.get("PYTHONPATH")]), str(_PACKAGE_FOLDER)]
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                _MODULE,
                json.dumps(config),
            ],  # -P: a user's ./select.py is none of its modules
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**environ, "PYTHONPATH": os.pathsep.join(folders)},
        )

    def say(self, word: str) -> None:
        """Write a command."""
        assert self._process.stdin is not None
        os.write(self._process.stdin.fileno(), f"{word}\n".encode())

    def expect(self, word: str, timeout_s: float) -> None:
        """Wait for a line, before which it says nothing else."""
        assert self._process.stdout is not None
        deadline, text = time.monotonic() + timeout_s, b""
        while not text.endswith(b"\n"):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._process.stdout], [], [], left_s)[0]:
                raise _NoAnswer(f"the sampling process did not say {word!r} within {timeout_s:.0f} s")
            chunk = os.read(self._process.stdout.fileno(), 4096)
            if not chunk:
                self._communicate(None)
                raise _NoAnswer("the sampling process ended at once")
            text += chunk
        if not text.startswith(f'{{"{word}"'.encode()):
            raise _NoAnswer(f"the sampling process said {text[:80]!r}, not {word!r}")

    def finish(self) -> list[str]:
        """Let it take the last sample and end; return all lines."""
        return self._communicate(b"end\n").decode().splitlines()

    def kill(self) -> None:
        """End it, if it has not ended, and close its pipes."""
        self._process.kill()
        with suppress(OSError, ValueError):  # a pipe that is broken or closed already
            self._process.communicate()

    def _communicate(self, text: bytes | None) -> bytes:
        try:
            output, errors = self._process.communicate(text, timeout=_END_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise _NoAnswer(f"the sampling process did not end within {_END_TIMEOUT_S:.0f} s") from error
        if self._process.returncode != 0:
            lines = errors.decode(errors="replace").strip().splitlines()
            last = f": {lines[-1]}" if lines else ""
            raise _NoAnswer(f"the sampling process ended with code {self._process.returncode}{last}")
        return output


def gpu_telemetry(name: str, sample_ns: Sequence[int], readings: Sequence[Reading]) -> DeviceTelemetry:
    """Return what a GPU's readings tell.

    :param sample_ns: (n_samples,). :param readings: (n_samples,), as of
        :class:`~pytest_gpulayout.adapters.nvml_telemetry.NvmlReader`.
    """
    series: dict[str, Series] = {name: [reading.get(name) for reading in readings] for name in _GAUGES}
    seconds = [(after - before) / 1e9 for before, after in pairwise(sample_ns)]
    for quantity, (total, megabytes) in _RATES.items():
        steps = zip(_growths(readings, total), seconds, strict=True)
        series[quantity] = [
            None,
            *(None if growth is None or not gap else growth * megabytes / gap for growth, gap in steps),
        ]
    reasons = [int(reading["reasons"]) for reading in readings if "reasons" in reading]
    shares = {name: sum(bool(seen & bit) for seen in reasons) / max(1, len(reasons)) for bit, name in REASONS.items()}
    return DeviceTelemetry(
        name=name,
        series=_known(series),
        counters=_counters(readings, {counter: counter for counter in _GPU_COUNTERS}),
        throttled={reason: share for reason, share in shares.items() if share > 0},
    )


def cpu_telemetry(readings: Sequence[Reading]) -> DeviceTelemetry:
    """Return what the CPUs' readings tell.

    Shares are of the time of all CPUs::

        busy   = (user + nice + system + irq + softirq) / all        steal = steal / all
        others = (user + nice + system - own) / all                  own: server's and client's processes

    :param readings: (n_samples,), as of :class:`~pytest_gpulayout.adapters.cpu_telemetry.CpuReader`.
    """
    totals = _growths(readings, "all_s")
    series: dict[str, Series] = {name: [reading.get(name) for reading in readings] for name in _CPU_GAUGES}
    for quantity, total in {"busy_percent": "busy_s", "steal_percent": "steal_s"}.items():
        series[quantity] = [None, *map(_percent, _growths(readings, total), totals)]
    # The tail of a process that ended unwaited for is missed once: that is no foreign time less than none.
    own = [None if growth is None else max(0.0, growth) for growth in _growths(readings, "own_s", may_fall=True)]
    programs = _growths(readings, "programs_s")
    foreign = [None if a is None or b is None else max(0.0, a - b) for a, b in zip(programs, own, strict=True)]
    series["others_busy_percent"] = [None, *map(_percent, foreign, totals)]
    return DeviceTelemetry(name=CPU, series=_known(series), counters=_counters(readings, _CPU_COUNTERS))


_CPU_GAUGES = ("load_1min", "frequency_mhz")


def _percent(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else 100 * part / whole


def _growths(readings: Sequence[Reading], total: str, *, may_fall: bool = False) -> list[float | None]:
    """(n_samples - 1,), from each reading to the next; ``None`` where it is not known or was set back."""
    values = [reading.get(total) for reading in readings]
    pairs = pairwise(values)
    growths = [None if before is None or after is None else after - before for before, after in pairs]
    return [growth if may_fall or growth is None or growth >= 0 else None for growth in growths]


def _counters(readings: Sequence[Reading], names: Mapping[str, str]) -> dict[str, int]:
    """Growth from the first reading to the last; one that was set back in the window (a reset) is left out."""
    if len(readings) < 2:
        return {}
    first, last = readings[0], readings[-1]
    growths = {name: last[total] - first[total] for name, total in names.items() if total in first and total in last}
    return {name: round(growth) for name, growth in growths.items() if growth >= 0}


def _known(series: Mapping[str, Series]) -> dict[str, Series]:
    return {name: tuple(values) for name, values in series.items() if any(value is not None for value in values)}


def _nth(readings: Sequence[Reading], rank: int) -> Reading:
    """A device's reading; nothing where NVML could not be opened."""
    return readings[rank] if rank < len(readings) else {}


def _power_limit(device: Device, readings: Sequence[Reading]) -> list[str]:
    """A remark on a power limit that somebody lowered or raised."""
    for reading in readings[:1]:
        now, usual = reading.get("power_limit_w"), reading.get("default_power_limit_w")
        if now is not None and usual is not None and abs(now - usual) > _CLOSE_W:
            return [
                f"GPU {device.index}: its power limit is {now:.0f} W, by default {usual:.0f} W; "
                f"'nvidia-smi -i {device.index} -pl {usual:.0f}' restores it"
            ]
    return []


def _wanted(device: Device) -> WantedGpu:
    links = [number for group in device.nvlinks if group.active for number in group.links]
    return {"index": device.index, "uuid": device.uuid, "pci_bus_id": device.pci_bus_id, "links": links}
