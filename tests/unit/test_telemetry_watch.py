from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_gpulayout.adapters.cpu_telemetry import CpuReader
from pytest_gpulayout.adapters.telemetry_process import Timetable
from pytest_gpulayout.adapters.telemetry_watch import TelemetryWatch, cpu_telemetry, gpu_telemetry
from pytest_gpulayout.telemetry import CPU, DeviceTelemetry, Telemetry, slowdowns, summarize
from pytest_gpulayout.topology import Device, NvLinks
from tests.native.build import (
    DRIVER_NOT_LOADED,
    FakeGpu,
    FakeMachine,
    build_fake_nvml,
    fake_nvml_environment,
    uuid_of,
    write_machine,
)

pytestmark = pytest.mark.end_to_end

SECOND = 10**9
ONLY_THE_ENDS_S = 3600.0
TIMEOUT = 10  # nvmlReturn_t
BUSY: dict[str, Any] = {
    "utilization": 95,
    "memory_utilization": 60,
    "sm_clock": 1755,
    "memory_clock": 3201,
    "power_mw": 687_500,
    "power_limit_mw": 700_000,
    "default_power_limit_mw": 700_000,
    "temperature": 66,
    "reasons": 0x4,
    "pcie_rx_kb": 12_000,
    "pcie_tx_kb": 3_000,
    "pcie_replays": 3,
    "ecc_corrected": 1,
    "ecc_uncorrected": 0,
    "fields": {"138": 1000, "139": 2000, "161:2": 0, "162:2": 0, "163:2": 0, "161:5": 7, "162:5": 0, "163:5": 0},
}
NVLINKS = (NvLinks((2, 5), True), NvLinks((1,), False))

During = Callable[[], object]


def nothing() -> None:
    """What happens while nothing happens."""


def samplers() -> list[psutil.Process]:
    """The sampling processes of this one."""
    return [child for child in psutil.Process().children() if any("telemetry_process" in w for w in child.cmdline())]


def wait_for_samples() -> None:
    """Wait until the sampling process has been woken up by its timetable, however busy this machine is."""
    (sampler,) = samplers()
    before = sampler.num_ctx_switches().voluntary
    deadline = time.monotonic() + 60
    while sampler.num_ctx_switches().voluntary < before + 5:
        assert time.monotonic() < deadline
        with contextlib.suppress(psutil.TimeoutExpired):
            sampler.wait(timeout=0.01)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def watch(library: Path, tmp_path: Path) -> Callable[..., Telemetry]:
    """Sample a fake machine before and after something happens."""

    def watch(machine: FakeMachine, devices: list[Device], during: During = nothing, **more: Any) -> Telemetry:
        environ = os.environ | fake_nvml_environment(library, machine, tmp_path)
        options = {"interval_s": ONLY_THE_ENDS_S} | more
        with TelemetryWatch("cuda", devices, environ=environ, **options) as watch:
            during()
        return watch.seen

    return watch


def device(index: int, **facts: Any) -> Device:
    return Device(index, uuid=uuid_of(index), **facts)


def of(telemetry: Telemetry, name: str) -> DeviceTelemetry:
    return next(device for device in telemetry.devices if device.name == name)


# ---- What follows from readings ----


def test_rates_and_growth_of_a_gpu() -> None:
    times = [0, SECOND // 2, 2 * SECOND]
    readings: list[dict[str, float]] = [
        {"nvlink_rx_kib": 0, "ecc_uncorrected": 5, "power_w": 80.0, "reasons": 1},
        {"nvlink_rx_kib": 1_000_000, "reasons": 0x44},
        {"nvlink_rx_kib": 4_000_000, "ecc_uncorrected": 7, "power_w": 600.0, "reasons": 0x4},
    ]
    found = gpu_telemetry("GPU 4", times, readings)

    assert found.series == {
        "nvlink_rx_mb_per_s": (None, pytest.approx(2048.0), pytest.approx(2048.0)),
        "power_w": (80.0, None, 600.0),
    }
    assert found.counters == {"ecc_uncorrected": 2}
    assert found.throttled == {"sw_power_cap": pytest.approx(2 / 3), "hw_thermal_slowdown": pytest.approx(1 / 3)}


def test_counter_that_was_set_back_is_not_known() -> None:
    found = gpu_telemetry("GPU 0", [0, SECOND], [{"pcie_replays": 9, "nvlink_tx_kib": 9}, {"pcie_replays": 0}])

    assert found.counters == {}
    assert found.series == {}


def test_shares_of_the_cpus() -> None:
    readings = [
        {"all_s": 100, "busy_s": 50, "programs_s": 40, "steal_s": 1, "own_s": 30, "throttled_us": 10.0},
        {"all_s": 104, "busy_s": 53, "programs_s": 42, "steal_s": 1.2, "own_s": 31, "throttled_us": 30.4},
    ]
    found = cpu_telemetry(readings)

    assert found.name == CPU
    assert found.counters == {"cgroup_throttled_us": 20}
    shares = {name: values[1] for name, values in found.series.items()}
    assert shares == {
        "busy_percent": pytest.approx(75),
        "steal_percent": pytest.approx(5),
        "others_busy_percent": pytest.approx(25),
    }


def test_own_processes_that_end_are_no_foreign_time_less_than_none() -> None:
    readings = [
        {"all_s": 0, "programs_s": 0, "own_s": 30},
        {"all_s": 10, "programs_s": 5, "own_s": 10},
        {"all_s": 20, "programs_s": 6, "own_s": 20},
    ]

    assert cpu_telemetry(readings).series["others_busy_percent"] == (None, 50.0, 0.0)


def test_nothing_read_is_nothing_known() -> None:
    assert cpu_telemetry([]) == DeviceTelemetry(name=CPU)
    assert cpu_telemetry([{}]) == DeviceTelemetry(name=CPU)
    assert gpu_telemetry("GPU 0", [], []) == DeviceTelemetry(name="GPU 0")


def test_timetable_leaves_out_what_has_passed() -> None:
    table = Timetable(100, 50)

    assert [table.next_after(now) for now in (100, 101, 149, 150, 275)] == [150, 150, 150, 200, 300]


# ---- CPUs ----


def test_cpu_samples_begin_and_end_with_the_window() -> None:
    begin_ns = time.monotonic_ns()
    with TelemetryWatch("cpu", (), server_pids=[os.getpid()], interval_s=ONLY_THE_ENDS_S) as watch:
        pass
    seen = watch.seen

    assert seen.source == "/proc"
    first, last = seen.sample_ns
    assert begin_ns < first < last < time.monotonic_ns()
    assert [device.name for device in seen.devices] == [CPU]
    assert len(of(seen, CPU).series["load_1min"]) == 2
    assert summarize(seen).startswith("CPU: ")
    assert seen.notes == ()


def test_samples_between_begin_and_end() -> None:
    with TelemetryWatch("cpu", (), interval_s=0.001) as watch:
        wait_for_samples()

    assert len(watch.seen.sample_ns) > 2
    assert list(watch.seen.sample_ns) == sorted(watch.seen.sample_ns)


def test_a_watch_can_be_used_again() -> None:
    watch = TelemetryWatch("cpu", (), interval_s=ONLY_THE_ENDS_S)
    with watch:
        pass
    first = watch.seen
    with watch:
        pass

    assert watch.seen.sample_ns[0] > first.sample_ns[-1]
    assert samplers() == []


def test_without_the_server_nobody_is_foreign() -> None:
    with TelemetryWatch("cpu", (), interval_s=ONLY_THE_ENDS_S) as watch:
        pass

    assert "others_busy_percent" not in of(watch.seen, CPU).series
    assert watch.seen.notes == ("CPU time of other processes: not known, since the server's processes are not known",)


def test_our_own_work_is_our_own() -> None:
    reader = CpuReader([os.getpid()], os.getpid())
    before = reader.read(at_an_end=True)
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    after = reader.read(at_an_end=True)

    assert after["own_s"] - before["own_s"] >= 0.09  # ticks are 10 ms
    assert after["all_s"] > before["all_s"]


def test_children_that_ended_stay_ours() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    reader = CpuReader([os.getpid()], os.getpid())
    before = reader.read(at_an_end=True)
    subprocess.run([sys.executable, "-c", burn], check=True, timeout=60)
    after = reader.read(at_an_end=True)

    assert after["own_s"] - before["own_s"] >= 0.28


def test_foreign_process_is_seen_and_named() -> None:
    """Its parent has ended, so it belongs to nobody here."""
    code = (
        "import os, sys, time\n"
        "if os.fork(): os._exit(0)\n"
        "print(os.getpid(), flush=True)\n"
        "sys.stdin.readline()\n"
        "while time.process_time() < 0.5: pass\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        stranger = int(parent.stdout.readline())
        parent.wait(timeout=30)
        with TelemetryWatch("cpu", (), server_pids=[os.getpid()], interval_s=ONLY_THE_ENDS_S) as watch:
            parent.stdin.write("\n")
            parent.stdin.flush()
            parent.stdout.readline()
    seen = watch.seen

    share = seen.mean(of(seen, CPU), "others_busy_percent")
    assert share is not None
    assert share * (os.cpu_count() or 1) * seen.seconds / 100 >= 0.4  # seconds of CPU; ticks are 10 ms
    busy = [name for name, percent in seen.others.items() if percent >= 40 / seen.seconds / (os.cpu_count() or 1)]
    # On a busy machine three others may be busier still.
    assert any(f"pid {stranger}" in name for name in busy) or len(busy) == 3


@pytest.mark.parametrize(
    ("cgroup", "files", "stopped_us", "periods"),
    [
        ("0::/pod/box\n", {"pod/box/cpu.stat": "usec", "pod/cpu.stat": "usec"}, 3000, 4),
        ("5:memory:/x\n4:cpu,cpuacct:/pod\n0::/\n", {"cpu,cpuacct/pod/cpu.stat": "ns"}, 1.5, 2),
        ("0::/../../of/the/host\n", {"cpu.stat": "usec"}, 1500, 2),
    ],
)
def test_quota_of_the_server_at_each_level(
    cgroup: str, files: dict[str, str], stopped_us: float, periods: int, tmp_path: Path
) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "7").mkdir(parents=True)
    (proc / "7" / "cgroup").write_text(cgroup)
    (proc / "pressure").mkdir()
    (proc / "pressure" / "cpu").write_text("some avg10=0.61 avg60=0.53 avg300=0.35 total=2259\nfull total=0\n")
    for name, unit in files.items():
        file = groups / name
        file.parent.mkdir(parents=True, exist_ok=True)
        time_line = "throttled_usec 1500" if unit == "usec" else "throttled_time 1500"
        file.write_text(f"nr_periods 9\nnr_throttled 2\n{time_line}\n")
    reading = CpuReader([7], os.getpid(), proc=proc, cgroups=groups).read(at_an_end=False)

    assert reading["throttled_us"] == stopped_us
    assert reading["throttled_periods"] == periods
    assert reading["pressure_us"] == 2259


def test_host_without_cgroups_and_pressure(tmp_path: Path) -> None:
    reading = CpuReader([7], os.getpid(), proc=tmp_path, cgroups=tmp_path).read(at_an_end=True)

    assert not {"throttled_us", "throttled_periods", "pressure_us"} & set(reading)


# ---- The sampling process ----


def test_sampler_that_is_killed_is_a_note() -> None:
    with TelemetryWatch("cpu", ()) as watch:
        (sampler,) = samplers()
        sampler.kill()

    assert watch.seen.sample_ns == ()
    assert watch.seen.notes == ("not sampled to the end: the sampling process ended with code -9",)


def test_sampler_that_cannot_start_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with TelemetryWatch("cpu", ()) as watch:
        pass

    assert "not sampled to the end: [Errno 2]" in watch.seen.notes[0]
    assert summarize(watch.seen) == "CPU: not sampled"


def test_sampler_that_fails_at_once_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "psutil.py").write_text("raise SystemExit('no psutil today')")
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    with TelemetryWatch("cpu", (), environ=environ) as watch:
        pass

    assert watch.seen.notes == ("not sampled to the end: the sampling process ended with code 1: no psutil today",)


def test_modules_in_the_users_folder_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "select.py").write_text("raise SystemExit('wrong select')")
    monkeypatch.chdir(tmp_path)
    with TelemetryWatch("cpu", (), interval_s=ONLY_THE_ENDS_S) as watch:
        pass

    assert len(watch.seen.sample_ns) == 2


def test_nothing_is_left_when_the_parent_is_killed() -> None:
    code = (
        "import psutil, time\n"
        "from pytest_gpulayout.adapters.telemetry_watch import TelemetryWatch\n"
        "with TelemetryWatch('cpu', ()):\n"
        "    print(psutil.Process().children()[0].pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        sampler = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    sampler.wait(timeout=30)

    assert not sampler.is_running()


# ---- GPUs, through the real pynvml ----


def test_gpu_samples(watch: Callable[..., Telemetry]) -> None:
    gpus = [FakeGpu(telemetry=BUSY, memory_used=10 * 2**20), FakeGpu(telemetry=BUSY)]
    seen = watch(FakeMachine(gpus), [device(1, nvlinks=NVLINKS), device(0)])

    assert seen.source == "NVML"
    assert [device.name for device in seen.devices] == ["GPU 1", "GPU 0", CPU]
    values = {name: series[-1] for name, series in of(seen, "GPU 0").series.items()}
    assert values == {
        "utilization_percent": 95,
        "memory_utilization_percent": 60,
        "sm_clock_mhz": 1755,
        "memory_clock_mhz": 3201,
        "power_w": 687.5,
        "temperature_c": 66,
        "memory_used_mib": 10.0,
    }
    assert of(seen, "GPU 0").throttled == {"sw_power_cap": 1.0}
    assert of(seen, "GPU 0").counters == {"ecc_corrected": 0, "ecc_uncorrected": 0, "pcie_replays": 0}
    assert of(seen, "GPU 1").series["nvlink_rx_mb_per_s"] == (None, 0)
    assert of(seen, "GPU 1").counters.items() >= {"nvlink_replays": 0, "nvlink_recoveries": 0}.items()
    assert [note for note in seen.notes if "sw_power_cap" not in note and "CPU time" not in note] == []


def test_growth_in_the_window(watch: Callable[..., Telemetry], tmp_path: Path) -> None:
    fields = BUSY["fields"] | {"139": 2000 + 10**9, "161:5": 9, "163:2": 1, "163:5": 1}
    later = BUSY | {"pcie_replays": 4, "ecc_corrected": 4, "ecc_uncorrected": 2, "fields": fields}
    seen = watch(
        FakeMachine([FakeGpu(telemetry=BUSY)]),
        [device(0, nvlinks=NVLINKS)],
        lambda: write_machine(FakeMachine([FakeGpu(telemetry=later)]), tmp_path),
    )
    gpu = of(seen, "GPU 0")

    assert gpu.counters == {
        "ecc_corrected": 3,
        "ecc_uncorrected": 2,
        "pcie_replays": 1,
        "nvlink_crc_errors": 2,
        "nvlink_replays": 2,
        "nvlink_recoveries": 0,
    }
    first, last = seen.sample_ns
    assert gpu.series["nvlink_rx_mb_per_s"][1] == pytest.approx(10**9 * 1024 / 1e6 / ((last - first) / SECOND))
    assert gpu.series["nvlink_tx_mb_per_s"][1] == 0
    assert len(slowdowns(seen)) >= 2


def test_error_counters_before_hopper(watch: Callable[..., Telemetry], tmp_path: Path) -> None:
    def machine(flits: int) -> FakeMachine:
        fields = {"38": flits, "45": 1, "52": 0, "59": 0}
        return FakeMachine([FakeGpu(telemetry=BUSY | {"fields": fields})])

    seen = watch(machine(5), [device(0, nvlinks=NVLINKS)], lambda: write_machine(machine(8), tmp_path))

    counters = of(seen, "GPU 0").counters
    assert {name: count for name, count in counters.items() if "nvlink" in name} == {
        "nvlink_crc_errors": 3,
        "nvlink_replays": 0,
        "nvlink_recoveries": 0,
    }


def test_pcie_throughput_is_asked_between_the_ends(watch: Callable[..., Telemetry]) -> None:
    seen = watch(FakeMachine([FakeGpu(telemetry=BUSY)]), [device(0)], wait_for_samples, interval_s=0.005)
    received = of(seen, "GPU 0").series["pcie_rx_mb_per_s"]

    assert received[0] is None
    assert received[-1] is None
    assert set(received[1:-1]) == {12.0}


def test_what_a_gpu_lacks_is_one_note(watch: Callable[..., Telemetry]) -> None:
    lacking = {"utilization": 95, "memory_utilization": 60}
    gpus = [FakeGpu(telemetry=lacking), FakeGpu(telemetry=lacking)]
    seen = watch(FakeMachine(gpus), [device(0), device(1)], interval_s=0.01)

    assert of(seen, "GPU 0").series.keys() == {
        "utilization_percent",
        "memory_utilization_percent",
        "memory_used_mib",
    }
    assert "power of GPU 0-1: the driver does not say (Not Supported)" in seen.notes
    assert len(seen.notes) == len(set(seen.notes))


def test_old_driver_is_asked_by_old_names(watch: Callable[..., Telemetry]) -> None:
    missing = ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetTemperature"]
    seen = watch(FakeMachine([FakeGpu(telemetry=BUSY)], missing=missing), [device(0)])

    assert of(seen, "GPU 0").throttled == {"sw_power_cap": 1.0}
    assert of(seen, "GPU 0").series["temperature_c"] == (66, 66)
    assert not [note for note in seen.notes if "low clocks" in note or "temperature" in note]


def test_driver_without_any_name_is_a_note(watch: Callable[..., Telemetry]) -> None:
    missing = ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"]
    seen = watch(FakeMachine([FakeGpu(telemetry=BUSY)], missing=missing), [device(0)])

    assert of(seen, "GPU 0").throttled == {}
    assert any(note.startswith("reasons for low clocks of GPU 0: not known, this driver") for note in seen.notes)


def test_passing_trouble_is_asked_again(watch: Callable[..., Telemetry], tmp_path: Path) -> None:
    gpu = FakeGpu(telemetry=BUSY)
    sick = FakeMachine([gpu], errors={"nvmlDeviceGetPowerUsage": TIMEOUT})
    seen = watch(sick, [device(0)], lambda: write_machine(FakeMachine([gpu]), tmp_path))

    assert of(seen, "GPU 0").series["power_w"] == (None, 687.5)
    assert any(note.startswith("power of GPU 0: not known, nvmlDeviceGetPowerUsage says") for note in seen.notes)


def test_lost_gpu_is_a_note_and_the_others_go_on(watch: Callable[..., Telemetry]) -> None:
    gpus = [FakeGpu(telemetry=BUSY, lost_after=16), FakeGpu(telemetry=BUSY)]
    seen = watch(FakeMachine(gpus), [device(0), device(1)])

    assert of(seen, "GPU 0").series["power_w"] == (687.5, None)
    assert of(seen, "GPU 1").series["power_w"] == (687.5, 687.5)
    assert any(note.startswith("samples of GPU 0: none (any more), GPU is lost") for note in seen.notes)


def test_unknown_gpu_is_a_note(watch: Callable[..., Telemetry]) -> None:
    seen = watch(FakeMachine(), [Device(5, uuid="GPU-of-another-machine"), Device(0, pci_bus_id="00000000:0A:00.0")])

    assert of(seen, "GPU 5") == DeviceTelemetry(name="GPU 5")
    assert "memory_used_mib" in of(seen, "GPU 0").series
    assert any(note.startswith("samples of GPU 5: none") for note in seen.notes)


def test_without_a_driver_the_cpus_are_sampled(watch: Callable[..., Telemetry]) -> None:
    seen = watch(FakeMachine(init_error=DRIVER_NOT_LOADED), [device(0)])

    assert of(seen, "GPU 0") == DeviceTelemetry(name="GPU 0")
    assert "load_1min" in of(seen, CPU).series
    assert any(note.startswith("GPUs: not sampled, ") for note in seen.notes)


def test_lowered_power_limit_is_a_remark(watch: Callable[..., Telemetry]) -> None:
    seen = watch(FakeMachine([FakeGpu(telemetry=BUSY | {"power_limit_mw": 400_000})]), [device(0)])

    assert "GPU 0: its power limit is 400 W, by default 700 W; 'nvidia-smi -i 0 -pl 700' restores it" in seen.notes


def test_seen_goes_into_json(watch: Callable[..., Telemetry]) -> None:
    seen = watch(FakeMachine([FakeGpu(telemetry=BUSY)]), [device(0, nvlinks=NVLINKS)])

    assert json.loads(json.dumps([dict(device.series) for device in seen.devices]))
