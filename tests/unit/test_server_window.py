from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.server_window import (
    EngineDelta,
    EngineSnapshot,
    HistogramDelta,
    ServerWindow,
    deltas,
    parse_metrics,
    ttft_split,
)
from pytest_gpulayout.trace import ServerTimings
from tests.support.prometheus import metrics_text
from tests.support.traces import FAST, SLOW, failed

REPLICA = "http://127.0.0.1:8000"


def parse(*engines: dict[str, float], started: float | None = 5.0, **samples: float) -> dict[str, EngineSnapshot]:
    return parse_metrics(metrics_text(*(engines or (samples,)), started=started), REPLICA)


# -- reading -----------------------------------------------------------------------------------------------------


def test_metrics_as_vllm_writes_them() -> None:
    (engine,) = parse(
        prompt_tokens_total=640, generation_tokens_total=320, stop=1, length=9, running=2, waiting=1
    ).values()
    assert (engine.replica, engine.engine, engine.process_start_s, engine.in_flight) == (REPLICA, "0", 5.0, 3)
    assert engine.counters["vllm:prompt_tokens_total"] == 640
    assert engine.counters["vllm:generation_tokens_total"] == 320
    assert engine.finished == {"stop": 1, "length": 9, "abort": 0, "error": 0}


def test_engines_of_one_server_are_kept_apart() -> None:
    found = parse({"generation_tokens_total": 7}, {"generation_tokens_total": 11})
    assert {name: engine.counters["vllm:generation_tokens_total"] for name, engine in found.items()} == {
        "0": 7,
        "1": 11,
    }


def test_several_api_servers_do_not_say_when_they_started() -> None:
    (engine,) = parse(started=None).values()
    assert engine.process_start_s is None


def test_several_names_of_one_model_are_summed() -> None:
    text = (
        metrics_text({"generation_tokens_total": 7}) + 'vllm:generation_tokens_total{engine="0",model_name="b"} 5.0\n'
    )
    assert parse_metrics(text, REPLICA)["0"].counters["vllm:generation_tokens_total"] == 12


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "none called vllm:prompt_tokens_total, vllm:generation_tokens_total, vllm:request_success_total"),
        ("python_gc_objects_collected_total 3.0\n", "none called vllm:prompt_tokens_total"),
        ('vllm:generation_tokens_total{engine="0"} 1.0\nvllm:request_success_total{engine="0"} 1.0\n', "none called"),
        ("<html>hi</html>\n", "invalid metric name"),
        ('{"detail": "Not Found"}', "found: "),
        ("vllm:prompt_tokens_total many\n", "could not convert"),
    ],
)
def test_what_is_no_server_of_vllm(text: str, found: str) -> None:
    with pytest.raises(MeasurementError) as caught:
        parse_metrics(text, REPLICA)
    required, second, place, advice = str(caught.value).splitlines()
    assert required.startswith("the server's side of a measurement needs ")
    assert found in second
    assert place == f"  at {REPLICA}/metrics"
    assert "vLLM" in advice


def test_numbers_that_are_none_are_left_out() -> None:
    text = metrics_text({}) + 'vllm:num_preemptions_total{engine="0",model_name="b"} NaN\n'
    assert parse_metrics(text, REPLICA)["0"].counters["vllm:num_preemptions_total"] == 0


# -- growth ------------------------------------------------------------------------------------------------------


def test_growth_of_everything() -> None:
    before = parse(prompt_tokens_total=100, length=2, e2e_request_latency_seconds_sum=1.0)
    after = parse(
        prompt_tokens_total=740.0,
        prompt_tokens_cached_total=16.0,
        generation_tokens_total=320.0,
        prefix_cache_queries_total=640.0,
        prefix_cache_hits_total=16.0,
        num_preemptions_total=2.0,
        length=11.0,
        stop=1.0,
        e2e_request_latency_seconds_sum=3.5,
        e2e_request_latency_seconds_count=10.0,
    )
    (engine,) = deltas(before, after)
    assert engine == EngineDelta(
        replica=REPLICA,
        engine="0",
        prompt_tokens=640,
        cached_prompt_tokens=16,
        generation_tokens=320,
        finished={"length": 9, "stop": 1},
        preemptions=2,
        prefix_queries=640,
        prefix_hits=16,
        histograms=engine.histograms,
    )
    assert engine.histograms["e2e_request_latency"] == HistogramDelta(2.5, 10)
    assert engine.histograms["e2e_request_latency"].mean_ms == 250
    assert engine.histograms["request_queue_time"].mean_ms is None
    assert set(engine.histograms) == {
        *("time_to_first_token", "inter_token_latency", "request_time_per_output_token", "e2e_request_latency"),
        *("request_queue_time", "request_prefill_time", "request_decode_time", "request_inference_time"),
    }


def test_each_engine_grows_for_itself_and_the_window_sums_up() -> None:
    before = parse({"generation_tokens_total": 5}, {"generation_tokens_total": 50})
    after = parse(
        {"generation_tokens_total": 9, "e2e_request_latency_seconds_sum": 1, "e2e_request_latency_seconds_count": 1},
        {"generation_tokens_total": 60, "e2e_request_latency_seconds_sum": 5, "e2e_request_latency_seconds_count": 3},
    )
    window = ServerWindow(engines=deltas(before, after))
    assert [engine.generation_tokens for engine in window.engines] == [4, 10]
    assert window.generation_tokens == 14
    assert window.mean_ms("e2e_request_latency") == 1500
    assert window.mean_ms("request_queue_time") is None


def test_an_engine_that_joined_counts_from_0() -> None:
    found = deltas(parse({}), parse({}, {"generation_tokens_total": 60}))
    assert [engine.generation_tokens for engine in found] == [0, 60]


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (
            parse(generation_tokens_total=9),
            parse(generation_tokens_total=3),
            "vllm:generation_tokens_total went back: the server was restarted",
        ),
        (parse(length=9), parse(length=1), "vllm:request_success_total went back: the server was restarted"),
        (parse(), parse(started=6.0), "another process answered after it"),
        (parse({}, {}), parse({}), "engine 1 gone"),
    ],
)
def test_a_restart_is_no_growth(
    before: dict[str, EngineSnapshot], after: dict[str, EngineSnapshot], found: str
) -> None:
    with pytest.raises(MeasurementError) as caught:
        deltas(before, after)
    assert str(caught.value).splitlines()[1] == f"  found: {found}"


# -- TTFT --------------------------------------------------------------------------------------------------------

TIMED_FAST = replace(FAST, sent_ns=FAST.send_ns + 2_000_000, server=ServerTimings(queue_ms=10, prefill_ms=80))
TIMED_SLOW = replace(SLOW, server=ServerTimings(queue_ms=190, prefill_ms=90))


def test_ttft_is_split_into_parts_that_add_up() -> None:
    split = ttft_split([TIMED_FAST, TIMED_SLOW, failed(2)])
    assert split == {"client": 1, "network_and_frontend": 14, "queue": 100, "prefill": 85}
    assert sum(split.values()) == 200


def test_a_server_that_claims_more_than_the_client_saw_leaves_a_negative_rest() -> None:
    split = ttft_split([replace(FAST, server=ServerTimings(queue_ms=60, prefill_ms=60))])
    assert split is not None
    assert split["network_and_frontend"] == -20


@pytest.mark.parametrize(
    "requests",
    [
        [],
        [FAST],
        [failed(0)],
        [TIMED_FAST, SLOW],
        [replace(FAST, server=ServerTimings(queue_ms=1))],
        [replace(FAST, server=ServerTimings(prefill_ms=1))],
    ],
)
def test_no_split_unless_the_server_timed_every_request(requests: list[object]) -> None:
    assert ttft_split(requests) is None  # type: ignore[arg-type]
