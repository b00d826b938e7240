from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.vllm_result import vllm_result
from pytest_gpulayout.workload import RampUp, Workload
from tests.support.traces import FAST, MS, SLOW, failed, request, run_of

WORKLOAD = Workload(name="three", input_tokens=10, output_tokens=3, concurrency=2, requests=2, batches=1)
OPEN = Workload(name="open", input_tokens=10, output_tokens=3, rate=4.0, burstiness=0.5, requests=2, batches=1)


def result_of(run: RunTrace, workload: Workload = WORKLOAD, **options: Any) -> dict[str, Any]:
    return vllm_result(run, workload, model="m", **options)


# `vllm bench serve --save-result --save-detailed --max-concurrency 2
#  --percentile-metrics ttft,tpot,itl,e2el,client_queue_time`, vLLM 0.32.
VLLM_SCALARS_AND_LISTS = """
    date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency
    duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput
    output_throughput total_token_throughput input_lens output_lens ttfts itls latencies start_times queue_times
    generated_texts errors max_output_tokens_per_s max_concurrent_requests rtfx
"""
VLLM_KEYS = set(VLLM_SCALARS_AND_LISTS.split()) | {
    f"{word}_{x}_ms"
    for word in ("mean", "median", "std", "p99")
    for x in ("ttft", "tpot", "itl", "e2el", "client_queue_time")
}


def test_keys_and_values_are_vllm_s() -> None:
    result = result_of(run_of((FAST, SLOW), (failed(2, batch=1), FAST)))
    assert VLLM_KEYS | {"gpulayout"} == {name for name in result if not name.startswith(("p50_", "p90_", "p95_"))}
    assert (result["completed"], result["failed"], result["num_prompts"]) == (3, 1, 4)
    assert (result["duration"], result["request_rate"], result["max_concurrency"]) == (4.0, "inf", 2)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 9)
    assert (result["request_throughput"], result["total_token_throughput"]) == (0.75, 9.75)
    assert result["ttfts"] == [0.1, 0.3, 0.0, 0.1]
    assert result["itls"] == [[0.01, 0.02], [0.03, 0.07], [], [0.01, 0.02]]
    assert result["output_lens"] == [3, 3, 0, 3]
    assert result["errors"] == ["", "", "HTTP 500: boom", ""]
    assert result["mean_itl_ms"] == pytest.approx(80 / 3)
    assert result["std_ttft_ms"] == pytest.approx(math.sqrt(80_000 / 9))
    assert result["p50_e2el_ms"] == result["median_e2el_ms"] == 130.0
    assert (result["max_output_tokens_per_s"], result["max_concurrent_requests"]) == (9.0, 3)
    assert result["request_goodput"] is None


def test_it_is_json_without_numbers_of_numpy_and_without_infinity() -> None:
    text = json.dumps(result_of(run_of((FAST, SLOW)), replace(OPEN, burstiness=math.inf)), allow_nan=False)
    assert json.loads(text)["burstiness"] == "inf"


@pytest.mark.parametrize(("api", "backend"), [("completions", "openai"), ("chat", "openai-chat")])
def test_backend_is_the_workload_s_api(api: Any, backend: str) -> None:
    result = result_of(run_of((FAST, SLOW)), replace(WORKLOAD, api=api))
    assert (result["backend"], result["endpoint_type"]) == (backend, backend)
    assert result_of(run_of((FAST, SLOW)), backend="vllm")["backend"] == "vllm"


def test_one_token_has_no_tpot_and_no_itl() -> None:
    result = result_of(run_of((request(0, 1000, 1100, output_tokens=1),)))
    assert result["median_tpot_ms"] is result["p99_itl_ms"] is None


def test_nothing_completed_is_an_error() -> None:
    with pytest.raises(MeasurementError, match="1 of 1 requests failed, the first with: HTTP 500: boom"):
        result_of(run_of((failed(0),)))


def test_a_closed_loop_waits_for_places_as_vllm_s_does() -> None:
    # vLLM starts all tasks at once; the second of these got its place 500 ms later.
    second = request(1, 1500, 1700, 1710, 1720)
    result = result_of(run_of((FAST, second)))
    assert result["queue_times"] == [0.0, 0.5]
    assert result["median_client_queue_time_ms"] == 250.0
    assert "median_e2el_including_client_queue_ms" not in result


def test_open_arrivals_have_their_rate_and_say_what_waited_in_the_client() -> None:
    run = run_of((replace(FAST, queued_ns=20 * MS, intended_ns=980 * MS), replace(SLOW, intended_ns=1000 * MS)))
    free, limited = result_of(run, OPEN), result_of(run, replace(OPEN, concurrency=2))
    assert (free["request_rate"], free["burstiness"], free["max_concurrency"]) == (4.0, 0.5, None)
    assert free["queue_times"] == [0.02, 0.0]
    assert not [name for name in free if "queue" in name and name.endswith("_ms")]
    assert limited["mean_client_queue_time_ms"] == 10.0
    assert limited["mean_e2el_including_client_queue_ms"] == (150 + 400) / 2


def test_a_ramp_has_vllm_s_keys() -> None:
    ramp = replace(OPEN, rate=None, ramp_up=RampUp("linear", 1.0, 20.0))
    result = result_of(run_of((FAST, SLOW)), ramp)
    assert (result["request_rate"], result["ramp_up_strategy"]) == ("inf", "linear")
    assert (result["ramp_up_start_rps"], result["ramp_up_end_rps"]) == (1.0, 20.0)


def test_goodput_counts_requests_within_all_limits() -> None:
    result = result_of(run_of((FAST, SLOW, failed(2))), replace(WORKLOAD, goodput={"ttft": 200, "tpot": 20}))
    assert result["request_goodput"] == 0.5


def vllm_peaks(result: dict[str, Any]) -> tuple[float, int]:
    """The loop of vLLM 0.32's ``calculate_metrics``, on the arrays of a result."""
    ok = [index for index, error in enumerate(result["errors"]) if not error]
    first = min(result["start_times"][i] for i in ok)
    last = max(result["start_times"][i] + result["latencies"][i] for i in ok)
    seconds = int(np.ceil(last - first)) + 1
    tokens, active = np.zeros(seconds), np.zeros(seconds)
    for i in ok:
        at = result["start_times"][i] + result["ttfts"][i]
        for gap in [0.0, *result["itls"][i]]:
            at += gap
            tokens[int(at - first)] += 1
        begin = int(result["start_times"][i] - first)
        for second in range(begin, int(result["start_times"][i] + result["latencies"][i] - first) + 1):
            active[second] += 1
    return float(tokens.max()), int(active.max())


def test_peaks_are_those_of_vllm_s_own_loop() -> None:
    random = np.random.default_rng(3)
    requests = []
    for index in range(60):
        send = int(random.integers(0, 9000))
        chunks = send + np.cumsum(random.integers(1, 400, size=random.integers(2, 20)))
        requests.append(request(index, send, *map(int, chunks)))
    result = result_of(run_of((*requests, failed(60))))
    assert (result["max_output_tokens_per_s"], result["max_concurrent_requests"]) == vllm_peaks(result)
