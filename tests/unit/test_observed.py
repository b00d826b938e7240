"""What else is seen of a server start: taken from what was observed, and left out where nobody looked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pytest_gpulayout.evidence import communication, startup_facts
from pytest_gpulayout.gate import place_layout
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_requirement
from pytest_gpulayout.observed import OBSERVED, observe_start
from pytest_gpulayout.ports import Platform, ServerSpec
from pytest_gpulayout.server_window import EngineDelta, HistogramDelta, ServerWindow, StepTimes
from pytest_gpulayout.telemetry import CPU, DeviceTelemetry, Telemetry
from pytest_gpulayout.testing import FakeServer, FakeTopologySource
from pytest_gpulayout.trace import Observations, RequestTrace, RunTrace, ServerTimings
from pytest_gpulayout.vllm_log import parse_vllm_log
from tests.support.traces import FAST, MS, SLOW, failed, run_of


def timed(request: RequestTrace, queue_ms: float, prefill_ms: float) -> RequestTrace:
    timings = ServerTimings(queue_ms=queue_ms, prefill_ms=prefill_ms)
    return replace(request, server=timings, sent_ns=request.send_ns + 2 * MS)


def seen(run: RunTrace, **parts: object) -> RunTrace:
    return replace(run, observations=Observations(**parts))  # type: ignore[arg-type]


def window(requests: int, queue_s: float = 0.1, prefill_s: float = 0.2) -> ServerWindow:
    """A window of two engines that finished so many requests together."""
    one = {
        "request_queue_time": HistogramDelta(queue_s, requests - 1),
        "request_prefill_time": HistogramDelta(prefill_s, requests - 1),
    }
    other = {name: HistogramDelta(0.0, 1) for name in one}
    return ServerWindow(
        engines=(
            EngineDelta(replica="r", engine="0", histograms=one, preemptions=2),
            EngineDelta(replica="r", engine="1", histograms=other, preemptions=3),
        )
    )


def test_a_run_alone_tells_decode_and_nothing_more() -> None:
    assert observe_start(run_of((FAST, SLOW))) == {"decode_per_token_ms": 32.5}


def test_the_start_of_the_server_is_as_it_is_given() -> None:
    found = observe_start(run_of((FAST,)), start_s=41.23456789, kv_cache_tokens=1_048_576)
    assert found == {"start_s": 41.2346, "kv_cache_tokens": 1_048_576, "decode_per_token_ms": 15}


def test_the_server_s_own_timings_split_ttft() -> None:
    requests = (timed(FAST, 10, 60), timed(SLOW, 30, 200), failed(2))
    assert observe_start(run_of(requests)) == {
        "client_ms": 2,
        "queue_ms": 20,
        "prefill_ms": 130,
        "network_and_frontend_ms": 48,
        "decode_per_token_ms": 32.5,
    }


def test_without_them_the_server_s_histograms_do() -> None:
    requests = (replace(FAST, sent_ns=FAST.send_ns + 2 * MS), replace(SLOW, sent_ns=SLOW.send_ns + 4 * MS))
    found = observe_start(seen(run_of(requests), server=window(2)))
    assert found == {
        "client_ms": 3,
        "queue_ms": 50,
        "prefill_ms": 100,
        "network_and_frontend_ms": 47,
        "decode_per_token_ms": 32.5,
        "preemptions": 5,
    }


def test_histograms_of_other_requests_are_left_out() -> None:
    found = observe_start(seen(run_of((FAST, SLOW)), server=window(3)))
    assert found == {"decode_per_token_ms": 32.5, "preemptions": 5}


def test_a_server_that_claims_more_time_than_the_client_saw_leaves_nothing_below_zero() -> None:
    assert observe_start(run_of((timed(FAST, 60, 60),)))["network_and_frontend_ms"] == 0


def test_answers_of_one_token_have_no_decode() -> None:
    assert observe_start(run_of((replace(FAST, output_tokens=1, chunk_ns=FAST.chunk_ns[:1]),))) == {}


def test_a_run_without_an_answer_tells_nothing() -> None:
    assert observe_start(seen(run_of((failed(0),)), server=ServerWindow())) == {}


def test_steps_are_those_of_the_slowest_engine() -> None:
    steps = tuple(
        StepTimes(engine=str(n), steps=9, decode_steps=5, dummy_steps=0, requests=4, median_ms=ms, p99_ms=99.0)
        for n, ms in enumerate((7.5, 8.25))
    )
    assert observe_start(seen(run_of((FAST,)), server=ServerWindow(steps=steps)))["step_ms"] == 8.25


def test_devices_are_looked_at_under_load() -> None:
    def gpu(clock: float, power: float, temperature: float) -> DeviceTelemetry:
        idle, unknown = 210.0, None
        series = {
            "sm_clock_mhz": (idle, clock, unknown, clock, 9999.0),
            "power_w": (idle, power, power, power, power),
            "temperature_c": (30.0, temperature, temperature, temperature, temperature),
        }
        return DeviceTelemetry(name="GPU 0", series=series)

    cpu = DeviceTelemetry(name=CPU, series={"frequency_mhz": (800.0, 3000.0, 3100.0, 3200.0, 3100.0)})
    telemetry = Telemetry(source="NVML", interval_s=0.5, devices=(gpu(1980, 600, 61), gpu(1755, 650, 66), cpu))
    found = observe_start(seen(run_of((FAST,)), telemetry=telemetry))
    assert {name: value for name, value in found.items() if name != "decode_per_token_ms"} == {
        "sm_clock_mhz": 1755,
        "cpu_clock_mhz": 3100,
        "power_w": 1250,
        "temperature_c": 66,
    }


def test_power_of_some_gpus_is_no_sum() -> None:
    known = DeviceTelemetry(name="GPU 0", series={"power_w": (100.0, 600.0)})
    telemetry = Telemetry(source="NVML", interval_s=0.5, devices=(known, DeviceTelemetry(name="GPU 1")))
    assert "power_w" not in observe_start(seen(run_of((FAST,)), telemetry=telemetry))


def test_names_end_with_their_units() -> None:
    units = {"ms": "_ms", "s": "_s", "MHz": "_mhz", "W": "_w", "C": "_c", "tokens": "_tokens"}
    assert [name for name, item in OBSERVED.items() if item.unit and not name.endswith(units[item.unit])] == []


# -- what the server shows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "tokens"), [("CPU", 1_048_576), ("GPU", 1_048_576), ("GPU + host", 1_048_576), ("cpu_utils", None)]
)
def test_room_in_the_kv_cache_as_vllm_logs_it(device: str, tokens: int | None) -> None:
    source = "kv_cache_utils.py" if device != "cpu_utils" else "cpu_utils.py"
    line = (
        f"(EngineCore pid=5808) INFO 11-21 12:44:40 [{source}:2327] {device} KV cache size: {{}} tokens, "
        "Maximum concurrency for 2,048 tokens per request: 512.00x"
    )
    facts = parse_vllm_log([line.format("2,097,152"), line.format("1,048,576")])
    assert facts.kv_cache_tokens == tokens


def fake_server(
    folder: Path, layout: str, platform: Platform = "cuda", transport: str | None = "P2P/CUMEM"
) -> FakeServer:
    topology = FakeTopologySource(platform=platform).probe()
    placed = place_layout(topology, parse_layout(layout), None, parse_requirement("any"))
    spec = ServerSpec(placed.layout, "org/tiny", (), platform, placed.devices, "python", 1.0)
    return FakeServer(spec, folder, transport=transport)


def talks_over(server: FakeServer) -> dict[str, str]:
    topology = FakeTopologySource(platform=server.spec.platform).probe()
    return communication(server, place_layout(topology, server.spec.layout, None, parse_requirement("any")))


@pytest.mark.parametrize(
    ("layout", "platform", "transport", "found"),
    [
        ("tp2", "cuda", "P2P/CUMEM", {"transport": "P2P/CUMEM"}),
        ("tp2", "cuda", "NET/Socket/0", {"transport": "NET/Socket/0"}),
        ("tp2", "cuda", None, {}),
        ("tp2", "cpu", "P2P/CUMEM", {"transport": "CPU/SHM"}),
        ("tp2", "cpu", "CPU/GLOO", {"transport": "CPU/GLOO"}),
        ("tp1", "cuda", "P2P/CUMEM", {}),
    ],
)
def test_what_ranks_talk_over(
    tmp_path: Path, layout: str, platform: Platform, transport: str | None, found: dict[str, str]
) -> None:
    assert talks_over(fake_server(tmp_path, layout, platform, transport)) == found


def test_the_all_reduce_of_the_tensor_parallel_group(tmp_path: Path) -> None:
    server = fake_server(tmp_path, "tp2")
    head = "(Worker_TP0 pid=7) INFO 11-21 04:07:12 [cuda_communicator.py:412] Using"
    before = f"{head} ['CUSTOM', 'PYNCCL'] all-reduce backends (in dispatch order) for group 'tp:0'\n"
    server.log.write_text(before + server.log.read_text() + before.replace("'CUSTOM', ", ""))
    assert talks_over(server) == {"transport": "P2P/CUMEM", "all_reduce": "CUSTOM, PYNCCL"}


def test_evidence_that_cannot_be_read_is_a_fact_less_and_no_error(tmp_path: Path) -> None:
    server = fake_server(tmp_path, "tp2")
    server.log.unlink()
    assert talks_over(server) == {}
    assert startup_facts(server).kv_cache_tokens is None


def test_a_request_cannot_tell_the_size_of_the_kv_cache(tmp_path: Path) -> None:
    server = fake_server(tmp_path, "tp1")
    line = "(EngineCore pid=8) INFO 11-21 12:44:40 [kv_cache_utils.py:2327] GPU KV cache size: {} tokens, Maximum\n"
    server.log.write_text(line.format("4,096") + server.log.read_text() + line.format("1"))
    assert startup_facts(server).kv_cache_tokens == 4096
