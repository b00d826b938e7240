from __future__ import annotations

import json
import math
from typing import Any

import pytest

from pytest_gpulayout.bench_result import bench_result_lines, read_bench_result, read_bench_results
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.vllm_result import vllm_result
from pytest_gpulayout.workload import Workload
from tests.support.traces import FAST, SLOW, failed, run_of

# As vLLM 0.32 writes it with --save-result --save-detailed: the third request got HTTP 500, the fourth broke off
# after two chunks (it keeps its ttft and gaps, and has no latency).
DETAILED: dict[str, Any] = {
    "date": "20261121-101126",
    "endpoint_type": "openai",
    "backend": "openai",
    "label": None,
    "model_id": "org/tiny",
    "tokenizer_id": "org/tiny",
    "num_prompts": 4,
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": 2,
    "duration": 2.5,
    "completed": 2,
    "failed": 2,
    "total_input_tokens": 20,
    "total_output_tokens": 6,
    "request_throughput": 0.8,
    "request_goodput": None,
    "output_throughput": 2.4,
    "total_token_throughput": 10.4,
    "input_lens": [10, 10, 10, 10],
    "output_lens": [3, 3, 0, 0],
    "ttfts": [0.1, 0.3, 0.0, 0.2],
    "itls": [[0.01, 0.02], [0.03, 0.07], [], [0.05]],
    "latencies": [0.13, 0.4, 0.0, 0.0],
    "start_times": [5.0, 5.0, 5.1, 5.4],
    "queue_times": [0.0, 0.0, 0.1, 0.4],
    "generated_texts": ["abc", "abc", "", ""],
    "errors": [
        "",
        "",
        "Internal Server Error",
        "Traceback (most recent call last):\n  ...\nClientPayloadError: gone\n",
    ],
    "max_output_tokens_per_s": 6.0,
    "max_concurrent_requests": 2,
    "rtfx": 0.0,
    "mean_ttft_ms": 200.0,
    "median_ttft_ms": 200.0,
    "std_ttft_ms": 100.0,
    "p99_ttft_ms": 298.0,
    "mean_tpot_ms": 32.5,
    "median_tpot_ms": 32.5,
    "std_tpot_ms": 17.5,
    "p99_tpot_ms": 49.65,
    "mean_itl_ms": 32.5,
    "median_itl_ms": 25.0,
    "std_itl_ms": 22.8,
    "p99_itl_ms": 68.8,
}
SHORT = {
    key: value
    for key, value in DETAILED.items()
    if key not in {"input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors"}
}
# `vllm bench serve` 0.9.0, without --save-detailed: no count of failures, a goodput with a colon, no latencies.
OLD = {
    key: value
    for key, value in SHORT.items()
    if key not in {"failed", "request_goodput", "latencies", "queue_times", "max_output_tokens_per_s", "rtfx"}
} | {"request_goodput:": 0.4, "request_rate": 10.0, "max_concurrency": None, "tensor_parallel_size": "2"}
WORKLOAD = Workload(name="three", input_tokens=10, output_tokens=3, concurrency=2, requests=2, batches=1)


def ours(*requests: Any) -> dict[str, Any]:
    run: RunTrace = run_of(requests or (FAST, SLOW, failed(2)))
    return vllm_result(run, WORKLOAD, model="org/tiny")


def read(document: Any) -> Any:
    return read_bench_result(json.dumps(document), "r.json")


def test_a_detailed_file_of_vllm() -> None:
    result = read(DETAILED)
    assert (result.model, result.backend, result.ours, result.date) == (
        "org/tiny",
        "openai",
        False,
        "20261121-101126",
    )
    assert (result.num_prompts, result.completed, result.failed, result.duration_s) == (4, 2, 2, 2.5)
    assert (result.request_rate, result.burstiness, result.max_concurrency) == (math.inf, 1.0, 2)
    assert result.ttfts_ms == (100.0, 300.0, None, None)
    assert result.latencies_ms == (130.0, 400.0, None, None)
    assert result.itls_ms[1:] == ((30.0, 70.0), None, None)
    assert result.metrics["p99_itl_ms"] == 68.8
    assert "request_goodput" not in result.metrics
    assert result.document == DETAILED


def test_a_short_file_of_vllm_still_has_the_latencies() -> None:
    result = read(SHORT)
    assert (result.ttfts_ms, result.itls_ms) == (None, None)
    assert result.latencies_ms == (130.0, 400.0, None, None)


def test_a_file_of_vllm_0_9() -> None:
    result = read(OLD)
    assert (result.failed, result.num_prompts, result.latencies_ms) == (2, 4, None)
    assert (result.metrics["request_goodput"], result.request_rate, result.max_concurrency) == (0.4, 10.0, None)


def test_what_vllm_writes_as_zero_because_it_does_not_exist_is_left_out() -> None:
    one_token = DETAILED | dict.fromkeys([name for name in DETAILED if "_tpot_" in name or "_itl_" in name], 0.0)
    metrics = read(one_token | {"mean_client_queue_time_ms": 0.0}).metrics
    assert not [name for name in metrics if ("tpot" in name or "itl" in name) and not name.startswith("std_")]
    assert metrics["mean_client_queue_time_ms"] == 0.0


def test_answers_that_are_not_streamed_have_no_ttft() -> None:
    result = read(DETAILED | {"ttfts": [0.0] * 4})
    assert result.ttfts_ms is None
    assert result.latencies_ms == (130.0, 400.0, None, None)


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(json.dumps(document) for document in (DETAILED, OLD, SHORT)),
        json.dumps([DETAILED, OLD, SHORT], indent=4),
        json.dumps({"points": [DETAILED, OLD, SHORT], "knee": None}),
    ],
    ids=["--append-result", "summary.json of a sweep", "sweep of ours"],
)
def test_several_results_in_a_file(text: str) -> None:
    results = read_bench_results(text, "r.json")
    assert [result.number for result in results] == [1, 2, 3]
    assert [result.document for result in results] == [DETAILED, OLD, SHORT]
    assert read_bench_result(text, "r.json") == results[-1]
    assert bench_result_lines(results[-1])[0].endswith("result 3 of 3")


def test_ours_reads_back() -> None:
    document = ours()
    result = read(document)
    assert (result.ours, result.completed, result.failed) == (True, 2, 1)
    assert result.ttfts_ms == (100.0, 300.0, None)
    assert result.itls_ms == ((10.0, 20.0), (30.0, 70.0), None)
    for name, value in result.metrics.items():
        assert document[name] == value
    assert {"median_e2el_ms", "p95_tpot_ms", "total_token_throughput"} <= set(result.metrics)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "text that is no JSON"),
        ("hello", "text that is no JSON"),
        ('{"duration": 1', "text that is no JSON"),
        ("{}\n{oops}\n", "text that is neither JSON nor a line of JSON per run"),
        ("[]", "a list with nothing in it"),
        ("3", "a number with nothing in it"),
        ("[[]]", "a list"),
        ("null", "null"),
        ('{"records": []}', "an object without duration, completed, total_input_tokens, request_throughput"),
        (json.dumps(DETAILED | {"duration": "long"}), "duration = 'long', which is no number"),
        (json.dumps(DETAILED | {"completed": True}), "completed = True, which is no number"),
        (json.dumps(DETAILED | {"completed": 1.5}), "completed = 1.5, which is no whole number"),
        (json.dumps(DETAILED | {"median_ttft_ms": []}), "median_ttft_ms = [], which is no number"),
        (json.dumps(DETAILED | {"ttfts": [0.1]}), "errors, ttfts and latencies of different lengths"),
        (json.dumps(DETAILED | {"ttfts": ["fast"]}), "ttfts that is no list of numbers"),
        (json.dumps(DETAILED | {"itls": [0.1, 0.2, 0.3, 0.4]}), "itls that are no list of lists"),
    ],
)
def test_anything_else_is_refused_with_what_to_type(text: str, found: str) -> None:
    with pytest.raises(MeasurementError) as error:
        read_bench_results(text, "dir/r.json")
    message = str(error.value)
    assert message.startswith("a result of gpulayout measure --save or of vllm bench serve --save-result is required")
    assert f"\n  found: {found}" in message
    assert "\n  in dir/r.json" in message
    assert "\n  write one: gpulayout measure --url" in message


def test_the_place_of_a_wrong_line_is_named() -> None:
    with pytest.raises(MeasurementError, match=r"without duration.*\n  in r.json, result 2 of 2\n"):
        read_bench_results(f"{json.dumps(SHORT)}\n{{}}\n", "r.json")


def test_a_table_for_people() -> None:
    lines = bench_result_lines(read(DETAILED))
    assert lines[:3] == [
        "org/tiny, by vllm bench serve on 20261121-101126",
        "4 requests, 2 at a time, 2.50 s",
        "2 of 4 requests failed; the first: Internal Server Error",
    ]
    assert "request_throughput      0.800 req/s" in lines
    assert lines[-5:] == [
        "         mean     median   std      p99",
        "ttft ms  200.000  200.000  100.000  298.000",
        "tpot ms  32.500   32.500   17.500   49.650",
        "itl ms   32.500   25.000   22.800   68.800",
        "2 requests cannot tell such tails: p99 needs 662",
    ]
    assert bench_result_lines(read(DETAILED | {"completed": 662}))[-1].startswith("itl ms")


def test_the_table_says_the_load_and_what_ours_knows_more() -> None:
    assert "10 req/s, burstiness 1, 2.50 s" in bench_result_lines(read(OLD))[1]
    ramp = {"ramp_up_strategy": "linear", "max_concurrency": None}
    assert "linear ramp, 2.50 s" in bench_result_lines(read(SHORT | ramp))[1]
    document = ours()
    document["gpulayout"]["problems"] = [{"kind": "jit-compilation", "text": "a kernel was compiled"}]
    lines = bench_result_lines(read(document))
    assert lines[0].startswith("org/tiny, by gpulayout measure")
    assert lines[-2:] == ["steady state: too short", "invalid: jit-compilation: a kernel was compiled"]


# -- vLLM's own readers ---------------------------------------------------------------------------------------------


def vllm_timeline_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What ``--plot-timeline`` of vLLM 0.32 makes of a document (``serve.py``, ``main_async``)."""
    rows = []
    for i in range(len(document["start_times"])):
        ttft, itl = document["ttfts"][i], document["itls"][i]
        rows.append({"start": document["start_times"][i], "ttft": ttft, "latency": ttft + sum(itl) if itl else ttft})
    return rows


def test_our_arrays_have_the_types_that_vllm_s_plots_compute_with() -> None:
    document = json.loads(json.dumps(ours()))
    assert [row["latency"] for row in vllm_timeline_rows(document)] == pytest.approx([0.13, 0.4, 0.0])
    for name in ("ttfts", "latencies", "start_times", "queue_times"):
        assert all(type(value) is float for value in document[name]), name
    assert all(type(gap) is float for gaps in document["itls"] for gap in gaps)


def test_our_document_has_what_vllm_s_sweeps_look_up() -> None:
    # sweep/plot_pareto.py and sweep/serve_workload.py call float() on these; sweep/plot.py turns "inf" into a number.
    document = json.loads(json.dumps(ours()))
    for name in (
        "output_throughput",
        "request_throughput",
        "mean_e2el_ms",
        "max_concurrent_requests",
        "request_rate",
    ):
        assert float(document[name]) > 0
    for name in ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms", "total_token_throughput"):
        assert isinstance(document[name], float)
