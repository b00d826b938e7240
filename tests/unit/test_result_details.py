from __future__ import annotations

import json
import math
from array import array
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pytest_gpulayout.calibration import Calibration
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.result_details import distribution, jsonable, own_object
from pytest_gpulayout.server_window import EngineDelta, HistogramDelta, ServerWindow
from pytest_gpulayout.telemetry import DeviceTelemetry, Telemetry
from pytest_gpulayout.trace import ClientWork, Observations, RequestTrace, RunTrace, ServerTimings
from pytest_gpulayout.workload import Workload
from tests.support.traces import FAST, MS, SLOW, failed, request, run_of

WORKLOAD = Workload(name="three", input_tokens=10, output_tokens=3, concurrency=2, requests=2, batches=1)


def details(*requests: RequestTrace, workload: Workload = WORKLOAD, **parts: Any) -> dict[str, Any]:
    """The object as a file has it."""
    text = json.dumps(own_object(run_of(requests, **parts), workload), allow_nan=False)
    document: dict[str, Any] = json.loads(text)
    return document


def test_facts_of_the_run() -> None:
    own = details(FAST, failed(1), sent_source="the kernel")
    assert own["workload"] == WORKLOAD.to_document()
    assert own["workload_fingerprint"] == WORKLOAD.fingerprint()
    assert own["system_fingerprints"] == ["vllm-0.32.0-tp2-0a1b2c3d"]
    assert (own["seed"], own["schedule_ns"], own["warmup_requests"]) == (7, None, 2)
    assert (own["timestamp_source"], own["sent_source"]) == ("test", "the kernel")
    assert own["server"] is own["telemetry"] is own["client"]["calibration"] is own["goodput"] is None
    assert [batch["completed"] for batch in own["batches"]] == [1]
    assert set(own["batches"][0]["metrics"]) < set(METRICS)
    assert own["steady_state"]["verdict"] == "too_short"


def test_a_failed_request_is_null_and_never_zero() -> None:
    broken_off = replace(FAST, index=2, error="the connection broke", output_tokens=0)
    rows = details(FAST, failed(1), broken_off)["requests"]
    assert [row["ttft_ms"] for row in rows] == [100.0, None, None]
    assert [row["e2el_ms"] for row in rows] == [130.0, None, None]
    assert [row["tpot_adjusted_ms"] for row in rows] == [None, None, None]
    assert [row["error"] for row in rows] == [None, "HTTP 500: boom", "the connection broke"]
    assert [row["chunks"] for row in rows] == [3, 0, 3]


def test_ttft_by_three_clocks() -> None:
    sent = replace(FAST, sent_ns=FAST.send_ns + 2 * MS, intended_ns=FAST.send_ns - 40 * MS, queued_ns=30 * MS)
    own = details(sent, SLOW, schedule_ns=(array("q", [0, 40 * MS]),))
    row = own["requests"][0]
    assert (row["ttft_ms"], row["ttft_socket_ms"], row["ttft_intended_ms"]) == (100.0, 98.0, 140.0)
    assert own["requests"][1]["ttft_socket_ms"] is own["requests"][1]["ttft_intended_ms"] is None
    assert own["latencies_ms"]["ttft_socket"]["median"] == 98.0
    assert own["latencies_ms"]["ttft_intended"]["n"] == 1
    assert own["schedule_ns"] == [[0, 40 * MS]]
    assert row["queued_ms"] == 30.0


def test_several_tokens_per_chunk() -> None:
    # The role message has no token, the first chunk with text has 2, then 1 and 4, and the last one says it is over.
    chat = request(0, 1000, 1099, 1100, 1110, 1150, 1151, output_tokens=7, chunk_tokens=(0, 2, 1, 4, 0))
    own = details(chat, SLOW)
    chunks, latencies = own["chunks"], own["latencies_ms"]
    assert own["requests"][0]["tpot_adjusted_ms"] == 50 / 5
    assert own["requests"][0]["tpot_ms"] == pytest.approx(52 / 6)
    assert (latencies["icl"]["n"], latencies["icl"]["mean"]) == (2, 25.0)
    assert (latencies["itl_token"]["n"], latencies["itl_token"]["mean"]) == (5, 10.0)
    assert latencies["itl"]["n"] == chunks["gaps"] == 6
    assert (chunks["tokens_per_chunk_p50"], chunks["tokens_per_chunk_max"]) == (2.0, 4)
    assert chunks["coalesced_share"] == 0.0


def test_without_counted_tokens_there_are_no_token_metrics() -> None:
    own = details(FAST, SLOW)
    empty = {"n": 0, "mean": None, "median": None, "std": None, "p90": None, "p95": None, "p99": None, "requests": 2}
    assert own["latencies_ms"]["itl_token"] == own["latencies_ms"]["icl"] == empty
    assert own["latencies_ms"]["tpot_adjusted"] == own["latencies_ms"]["ttft_socket"] == empty
    assert own["chunks"]["tokens_per_chunk_p50"] is None


def test_chunks_that_were_held_back_show() -> None:
    bundled = replace(FAST, chunk_ns=(1100 * MS, 1100 * MS + 100_000, 1120 * MS))
    assert details(bundled, FAST)["chunks"]["coalesced_share"] == 0.25


def test_tails_come_with_enough_requests_only() -> None:
    sample = np.arange(1, 1001, dtype=np.float64)
    few, some, many = (distribution(sample, requests=n) for n in (63, 130, 662))
    assert (few["n"], few["median"], few["p90"]) == (1000, 500.5, None)
    assert (some["p90"], some["p95"], some["p99"]) == (*map(float, np.percentile(sample, (90, 95))), None)
    assert many["p99"] == float(np.percentile(sample, 99))


def test_goodput() -> None:
    limited = replace(WORKLOAD, goodput={"ttft": 200.0})
    own = details(FAST, SLOW, failed(2), FAST, workload=limited)
    assert own["goodput"] == {"limits_ms": {"ttft": 200.0}, "good": 2, "share": 0.5, "req_per_s": 1.0}
    assert own["batches"][0]["metrics"]["request_goodput"] == 1.0


CALIBRATION = Calibration(
    streams=2,
    ttft_ms=20,
    itl_ms=20,
    seconds=2,
    events_per_s=100,
    median_ttft_error_ms=0.1,
    p99_ttft_error_ms=0.2,
    median_itl_error_ms=0.0,
    p99_itl_error_ms=math.nan,
    cpu_us_per_event=7,
)


def with_clients(run: RunTrace, *clients: ClientWork) -> RunTrace:
    return replace(run, batches=tuple(replace(batch, clients=clients) for batch in run.batches))


def test_client_sums_its_work_and_names_its_worst_lag() -> None:
    first = ClientWork(events=100, unstamped=3, cpu_ns=600_000, wait_ns=2 * MS, send_lag_ns=(1 * MS, 5 * MS, 6 * MS))
    second = ClientWork(events=100, cpu_ns=800_000, cpus=(3,), send_lag_ns=(2 * MS, 3 * MS, 9 * MS))
    run = with_clients(run_of((FAST, SLOW), observations=Observations(calibration=CALIBRATION)), first, second)
    client = own_object(run, WORKLOAD)["client"]
    assert (client["workers"], client["events"], client["unstamped"], client["cpus"]) == (2, 200, 3, [3])
    assert (client["cpu_us_per_event"], client["cpu_wait_s"], client["reconnects"]) == (7.0, 0.002, 1)
    assert client["send_lag_ms"] == {"p50": 2.0, "p99": 5.0, "max": 9.0}
    assert client["read_lag_ms"] is None
    assert (client["calibration"]["cpu_us_per_event"], client["calibration"]["p99_itl_error_ms"]) == (7, None)


def test_server_and_devices_of_the_same_window() -> None:
    engine = EngineDelta(
        replica="http://127.0.0.1:1",
        engine="0",
        prompt_tokens=20,
        generation_tokens=6,
        prefix_queries=20,
        prefix_hits=5,
        finished={"length": 2},
        histograms={"e2e_request_latency": HistogramDelta(0.5, 2)},
    )
    device = DeviceTelemetry(name="CPU", series={"busy_percent": array("d", [50.0, 60.0]), "load_1min": [None, 1.5]})
    telemetry = Telemetry(source="/proc", interval_s=0.5, sample_ns=array("q", [1, 2]), devices=(device,))
    timed = replace(FAST, server=ServerTimings(queue_ms=5, prefill_ms=60, generation_ms=30))
    seen = Observations(server=ServerWindow(engines=(engine,)), telemetry=telemetry)
    own = details(timed, observations=seen)
    server = own["server"]
    assert (server["prompt_tokens"], server["generation_tokens"], server["prefix_hit_rate"]) == (20, 6, 0.25)
    assert server["engines"][0]["histograms"] == {"e2e_request_latency": {"sum_s": 0.5, "count": 2}}
    assert server["agreement"]["output_tokens"] == {"client": 3, "server": 6}
    assert sum(server["mean_ttft_split_ms"].values()) == pytest.approx(100.0)
    assert own["telemetry"]["devices"][0]["series"] == {"busy_percent": [50.0, 60.0], "load_1min": [None, 1.5]}
    assert own["telemetry"]["summary"].startswith("CPU")
    assert own["requests"][0]["server"] == {"queue_ms": 5, "prefill_ms": 60, "generation_ms": 30}


def test_a_server_without_counters_agrees_with_nobody() -> None:
    own = details(FAST, observations=Observations(server=ServerWindow(notes=("no metrics",))))
    assert own["server"]["agreement"] is own["server"]["mean_ttft_split_ms"] is None
    assert own["server"]["notes"] == ["no metrics"]


def test_json_of_our_values() -> None:
    assert jsonable({"a": (1, 2.5, math.inf, None, "x", array("q", [7]))}) == {"a": [1, 2.5, None, None, "x", [7]]}
    assert jsonable(ServerTimings(queue_ms=1.0)) == {"queue_ms": 1.0, "prefill_ms": None, "generation_ms": None}
