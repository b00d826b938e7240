from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pytest

from pytest_gpulayout.telemetry import (
    CPU,
    DeviceTelemetry,
    Series,
    Telemetry,
    foreign_load,
    remarks,
    slowdowns,
    summarize,
)

SECOND = 10**9


def window(
    *devices: DeviceTelemetry,
    source: Literal["NVML", "/proc"] = "NVML",
    seconds: tuple[float, ...] = (0, 0.5, 1.0, 1.5, 2.0),
    others: Mapping[str, float] | None = None,
) -> Telemetry:
    times = tuple(round(7 * SECOND + second * SECOND) for second in seconds)
    return Telemetry(source=source, interval_s=0.5, sample_ns=times, devices=devices, others=others or {})


def gpu(
    index: int = 0,
    *,
    series: Mapping[str, Series] | None = None,
    counters: Mapping[str, int] | None = None,
    throttled: Mapping[str, float] | None = None,
) -> DeviceTelemetry:
    return DeviceTelemetry(
        name=f"GPU {index}", series=series or {}, counters=counters or {}, throttled=throttled or {}
    )


def cpu(series: Mapping[str, Series] | None = None, **counters: int) -> DeviceTelemetry:
    return DeviceTelemetry(name=CPU, series=series or {}, counters=counters)


def test_mean_weighs_each_value_with_the_time_before_it() -> None:
    device = cpu({"busy_percent": (None, 100.0, 100.0, None, 0.0)})
    telemetry = window(device, seconds=(0, 1, 2, 3, 5))

    assert telemetry.mean(device, "busy_percent") == pytest.approx(50.0)
    assert telemetry.mean(device, "steal_percent") is None
    assert telemetry.seconds == 5.0


def test_first_sample_is_before_the_load_and_does_not_count() -> None:
    device = gpu(series={"utilization_percent": (0.0, 90.0, 90.0, 90.0, 90.0)})

    assert window(device).mean(device, "utilization_percent") == pytest.approx(90.0)
    assert summarize(window(device)) == "GPU 0: 90 % busy"


def test_summary_of_gpus_and_cpus() -> None:
    first = gpu(
        0,
        series={
            "utilization_percent": (0, 93, 95, 96, 97),
            "sm_clock_mhz": (345, 1980, 1755, 1980, 1980),
            "power_w": (80, 612.4, 650, 687.6, 660),
            "temperature_c": (40, 61, 62, 62, 63),
            "nvlink_rx_mb_per_s": (None, 20_000, 20_000, 20_000, 20_000),
            "nvlink_tx_mb_per_s": (None, 21_000, 21_000, 21_000, 21_000),
        },
        throttled={"sw_power_cap": 0.8, "sync_boost": 0.01},
    )
    second = gpu(1, series={"temperature_c": (41, 64, 65, 66, 66)})
    host = cpu(
        {
            "busy_percent": (None, 97.0, 97.0, 97.0, 97.0),
            "steal_percent": (None, 0.3, 0.3, 0.3, 0.3),
            "others_busy_percent": (None, 2.0, 2.0, 2.0, 2.0),
            "load_1min": (1.9, 2.0, 2.0, 2.1, 2.1),
            "frequency_mhz": (2000.0, 2445.0, None, None, 2445.0),
        }
    )

    assert summarize(window(first, second, host)) == (
        "GPU 0,1: 93-97 % busy, SM 1755-1980 MHz, 612-688 W, 61-66 C, NVLink 41.0 GB/s, sw_power_cap; "
        "CPU: 97 % busy, steal 0.3 %, others 2 %, load 2.1, 2445 MHz"
    )


def test_summary_of_nothing_says_so() -> None:
    assert summarize(window(gpu(), cpu(), seconds=())) == "GPU 0: not sampled; CPU: not sampled"
    assert summarize(window()) == "no device was sampled"


@pytest.mark.parametrize(
    "reason", ["hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown", "sync_boost"]
)
def test_lowered_clocks_slow_down_from_a_share_on(reason: str) -> None:
    clocks = {"sm_clock_mhz": (1980, 990, 990, 990, 990)}
    (sentence,) = slowdowns(window(gpu(series=clocks, throttled={reason: 0.4})))

    assert sentence.startswith(f"GPU 0: {reason} in 40% of the samples, SM clock 990 MHz; ")
    assert slowdowns(window(gpu(throttled={reason: 0.05}))) == ()


def test_power_cap_and_chosen_clocks_are_remarks() -> None:
    telemetry = window(gpu(throttled={"sw_power_cap": 1.0, "applications_clocks_setting": 1.0}))

    assert slowdowns(telemetry) == ()
    cap, clocks = remarks(telemetry)
    assert "sw_power_cap in 100% of the samples" in cap
    assert "nvidia-smi -q -d CLOCK" in clocks


@pytest.mark.parametrize(
    ("counters", "expected"),
    [
        ({"ecc_uncorrected": 1}, "1 memory errors could not be corrected"),
        ({"nvlink_replays": 1}, "NVLink had to repeat or to retrain (1 replays)"),
        ({"nvlink_recoveries": 2, "nvlink_replays": 1}, "(1 replays, 2 recoveries)"),
        ({"nvlink_crc_errors": 200}, "100 NVLink CRC errors/s"),
        ({"pcie_replays": 9}, "9 PCIe replays in 2 s"),
    ],
)
def test_faults_of_memory_and_links(counters: dict[str, int], expected: str) -> None:
    (sentence,) = slowdowns(window(gpu(3, counters=counters)))

    assert sentence.startswith("GPU 3: ")
    assert expected in sentence


@pytest.mark.parametrize("counters", [{"nvlink_crc_errors": 199}, {"pcie_replays": 8}, {"ecc_corrected": 1}])
def test_few_errors_are_remarks(counters: dict[str, int]) -> None:
    telemetry = window(gpu(counters=counters))

    assert slowdowns(telemetry) == ()
    assert len(remarks(telemetry)) == 1


def test_pcie_replays_are_allowed_by_the_minute() -> None:
    ten_minutes = window(gpu(counters={"pcie_replays": 80}), seconds=(0, 600))

    assert slowdowns(ten_minutes) == ()


def test_quota_and_steal() -> None:
    steal = {"steal_percent": (None, 6.0, 6.0, 6.0, 6.0)}
    quota, stolen = slowdowns(window(cpu(steal, cgroup_throttled_us=100_001), source="/proc"))

    assert "a CPU quota stopped the server or the client for 0.1 s of 2.0 s" in quota
    assert "other virtual machines took 6 % of the CPU time" in stolen
    fine = {"steal_percent": (None, 5.0, 5.0, 5.0, 5.0)}
    assert slowdowns(window(cpu(fine, cgroup_throttled_us=100_000), source="/proc")) == ()


def test_foreign_load_names_who_it_is() -> None:
    busy = cpu({"others_busy_percent": (None, 40.0, 40.0, 40.0, 40.0)})
    sentence = foreign_load(window(busy, others={"python train.py (user bob), pid 7": 38.0}))

    assert sentence is not None
    assert sentence.startswith(
        "other processes used 40 % of this machine's CPUs, allowed are 20 %: python train.py (user bob), pid 7 38 %; "
    )
    assert foreign_load(window(cpu({"others_busy_percent": (None, 20.0, 20.0, 20.0, 20.0)}))) is None
    assert foreign_load(window(cpu())) is None
