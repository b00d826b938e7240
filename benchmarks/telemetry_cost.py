"""What sampling the devices costs: CPU time of the sampling process per second, and the time to start and end it.

With ``--platform=cuda`` all GPUs of this machine are sampled, too. Usage: python benchmarks/telemetry_cost.py
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import psutil

from pytest_gpulayout.adapters.cpu_host import cpu_model
from pytest_gpulayout.adapters.nvml import NvmlTopology
from pytest_gpulayout.adapters.telemetry_watch import TelemetryWatch
from pytest_gpulayout.ports import Platform
from pytest_gpulayout.telemetry import summarize
from pytest_gpulayout.topology import Device


def cpu_s(process: psutil.Process) -> float:
    """CPU time that a process has used, exact to a nanosecond where the kernel has ``schedstat``."""
    try:
        with open(f"/proc/{process.pid}/schedstat", encoding="ascii") as file:
            return int(file.read().split()[0]) / 1e9
    except OSError:
        times = process.cpu_times()
        return float(times.user + times.system)


def measure(where: Platform, devices: Sequence[Device], interval_s: float, seconds: float) -> None:
    """Sample for a while and print a row."""
    began = time.perf_counter()
    with TelemetryWatch(where, devices, server_pids=[os.getpid()], interval_s=interval_s) as watch:
        started = time.perf_counter()
        (sampler,) = psutil.Process().children()
        before = cpu_s(sampler)
        time.sleep(seconds)
        used = cpu_s(sampler) - before
        ending = time.perf_counter()
    ended = time.perf_counter()
    count = len(watch.seen.sample_ns) - 2
    print(
        f"{interval_s:8.2f} s {count:8} {used / seconds * 1000:12.2f} ms/s {used / max(1, count) * 1000:12.2f} ms"
        f" {(started - began) * 1000:8.0f} ms {(ended - ending) * 1000:8.0f} ms"
    )
    print(f"    {summarize(watch.seen)}")


def main() -> None:
    """Measure at several intervals and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--platform", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    devices = NvmlTopology().probe().devices if options.platform == "cuda" else ()
    names = ", ".join(str(device.name) for device in devices) or "no GPU"
    print(f"{cpu_model()}, {os.cpu_count()} CPUs, {len(psutil.pids())} processes, {names}")
    print(f"Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}")
    print("  interval  samples         CPU time      per sample       start         end")
    for interval_s in (0.5, 0.1):
        measure(options.platform, devices, interval_s, options.seconds)


if __name__ == "__main__":
    main()
