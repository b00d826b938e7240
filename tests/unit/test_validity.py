"""Each way in which a run can be wrong, on both sides of its limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest

from pytest_gpulayout.calibration import Calibration
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.schemas import load_schema
from pytest_gpulayout.server_window import EngineDelta, PrefixReset, ServerWindow
from pytest_gpulayout.telemetry import CPU, DeviceTelemetry, Telemetry
from pytest_gpulayout.trace import BatchTrace, ClientWork, Observations, RequestTrace, RunTrace
from pytest_gpulayout.validity import Problem, ProblemKind, find_problems
from pytest_gpulayout.workload import RampUp, Workload

MS = 1_000_000
TTFT_MS, ITL_MS, TOKENS, STREAMS = 100, 20, 6, 4
E2EL_MS = TTFT_MS + ITL_MS * (TOKENS - 1)
CLOSED = Workload(name="w", input_tokens=8, output_tokens=TOKENS, concurrency=STREAMS, requests=16, batches=2)
OPEN = Workload(name="w", input_tokens=8, output_tokens=TOKENS, rate=10.0, requests=16, batches=2)


def request(
    index: int, batch: int, send_ns: int, *, ttft_ms: float = TTFT_MS, itl_ms: float = ITL_MS
) -> RequestTrace:
    chunks = tuple(send_ns + round((ttft_ms + itl_ms * n) * MS) for n in range(TOKENS))
    return RequestTrace(
        index=index,
        batch=batch,
        prompt_tokens=8,
        output_tokens=TOKENS,
        send_ns=send_ns,
        chunk_ns=chunks,
        end_ns=chunks[-1],
        system_fingerprint="vllm-a",
    )


def run(
    *,
    batches: int = 2,
    requests: int = 16,
    clients: Sequence[Sequence[ClientWork]] = (),
    drift: float = 0.0,
    **more: Any,
) -> RunTrace:
    """Waves of four requests, TTFT 100 ms, ITL 20 ms, E2EL 200 ms.

    :param clients: of each batch; the last stays. :param drift: growth of all latencies from first to last request.
    """
    found, now, index = [], 10**12, 0
    for number in range(batches):
        start = now
        traces: list[RequestTrace] = []
        for _ in range(0, requests, STREAMS):
            slower = 1 + drift * index / (batches * requests)
            wave = [
                request(index + n, number, now, ttft_ms=TTFT_MS * slower, itl_ms=ITL_MS * slower)
                for n in range(STREAMS)
            ]
            traces += wave[: requests - len(traces)]
            index += len(wave)
            now = wave[-1].end_ns
        tell = clients[min(number, len(clients) - 1)] if clients else ()
        found.append(
            BatchTrace(index=number, requests=tuple(traces), start_ns=start, end_ns=now, clients=tuple(tell))
        )
    standard = RunTrace(
        batches=tuple(found), seed=1, warmup_requests=4, connections=4, timestamp_source="kernel", started_s=0.0
    )
    return replace(standard, **more)


def with_request(trace: RunTrace, **changes: Any) -> RunTrace:
    """The same run with a first request that differs."""
    first, *rest = trace.batches
    changed = (replace(first.requests[0], **changes), *first.requests[1:])
    return replace(trace, batches=(replace(first, requests=changed), *rest))


def seen(**observations: Any) -> RunTrace:
    return run(observations=Observations(**observations))


def kinds(trace: RunTrace, workload: Workload = CLOSED) -> list[str]:
    return [problem.kind for problem in find_problems(trace, workload)]


def told(trace: RunTrace, workload: Workload = CLOSED) -> str:
    """The text of the only problem."""
    (problem,) = find_problems(trace, workload)
    return problem.text


def test_a_sound_run_has_no_problem() -> None:
    everything = Observations(
        calibration=calibration(), server=ServerWindow(), telemetry=Telemetry(source="NVML", interval_s=1.0)
    )
    assert find_problems(run(clients=[[ClientWork(events=96)]], observations=everything), CLOSED) == ()


def test_what_nobody_looked_at_is_no_problem() -> None:
    assert find_problems(run(), CLOSED) == ()


def test_a_problem_says_its_kind_first() -> None:
    assert str(Problem("throttled", "too hot")) == "throttled: too hot"


def test_the_schema_knows_every_kind() -> None:
    problems = load_schema("results")["$defs"]["run"]["properties"]["gpulayout"]["properties"]["problems"]
    assert problems["items"]["properties"]["kind"]["enum"] == list(get_args(ProblemKind))


# -- the requests ----------------------------------------------------------------------------------------------------


def test_failed_requests() -> None:
    assert told(with_request(run(), error="HTTP 500: boom")) == "1 of 32 requests failed; the first: HTTP 500: boom"


def test_a_run_in_which_everything_failed_has_problems_and_raises_nothing() -> None:
    broken = tuple(replace(failing, error="HTTP 500", chunk_ns=()) for failing in run(batches=1).requests)
    trace = run(batches=1)
    assert kinds(replace(trace, batches=(replace(trace.batches[0], requests=broken),))) == ["failed-requests"]


def test_no_batch_is_no_run() -> None:
    with pytest.raises(MeasurementError, match="a metric needs at least one batch"):
        find_problems(run(batches=0), CLOSED)


def test_several_servers() -> None:
    text = told(with_request(run(), system_fingerprint="vllm-b"))
    assert text == "servers that differ answered: vllm-b, vllm-a; measure one of them at a time"


def test_the_first_of_many_servers_are_named() -> None:
    trace = run(batches=1)
    each = tuple(replace(one, system_fingerprint=f"vllm-{one.index}") for one in trace.requests)
    text = told(replace(trace, batches=(replace(trace.batches[0], requests=each),)))
    assert text.startswith("servers that differ answered: vllm-0, vllm-1, vllm-2 and 13 more; ")


@pytest.mark.parametrize(
    ("batches", "requests", "found"),
    [(1, 7, ["too-few-samples"]), (1, 8, []), (2, 1, []), (1, 1, ["too-few-samples"])],
)
def test_too_few_samples(batches: int, requests: int, found: list[str]) -> None:
    assert kinds(run(batches=batches, requests=requests)) == found


def test_metrics_that_are_zero() -> None:
    still = tuple(replace(each, chunk_ns=(each.send_ns,) * TOKENS) for each in run(batches=1).requests)
    trace = run(batches=1)
    text = told(replace(trace, batches=(replace(trace.batches[0], requests=still),)))
    assert text.startswith("zero or not finite: median_e2el_ms, median_itl_ms, ")


def test_no_request_within_the_limits_of_goodput() -> None:
    assert kinds(run(), replace(CLOSED, goodput={"ttft": TTFT_MS + 1})) == []
    text = told(run(), replace(CLOSED, goodput={"ttft": TTFT_MS - 1}))
    assert text == "zero or not finite: request_goodput; no request kept its limits"


def test_tokens_that_the_server_did_not_count() -> None:
    text = told(with_request(run(), output_tokens=0))
    assert text.startswith("the server did not count the tokens of 1 of 32 requests; ")


def engine(**counts: Any) -> EngineDelta:
    """What a server counts that has answered exactly the run's requests."""
    standard: dict[str, Any] = {
        "prompt_tokens": 32 * 8,
        "generation_tokens": 32 * TOKENS,
        "finished": {"length": 32},
        "prefix_queries": 1000,
    }
    return EngineDelta(replica="http://127.0.0.1:8000", engine="0", **(standard | counts))


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ({}, []),
        ({"generation_tokens": 32 * TOKENS + 1}, ["token-counts"]),
        ({"prompt_tokens": 32 * 8 - 1}, ["token-counts"]),
        ({"finished": {"length": 33}}, ["token-counts"]),
        ({"finished": {"length": 32, "abort": 1}}, ["token-counts"]),
    ],
)
def test_counts_that_differ_from_the_server_s(counts: dict[str, Any], found: list[str]) -> None:
    assert kinds(seen(server=ServerWindow(engines=(engine(**counts),)))) == found


# -- the client ------------------------------------------------------------------------------------------------------


def calibration(**errors: float) -> Calibration:
    figures = {
        "median_ttft_error_ms": 0.1,
        "p99_ttft_error_ms": 0.5,
        "median_itl_error_ms": 0.0,
        "p99_itl_error_ms": 0.3,
        "cpu_us_per_event": 8.0,
    }
    return Calibration(streams=4, ttft_ms=20.0, itl_ms=20.0, seconds=1.0, events_per_s=200.0, **(figures | errors))


@pytest.mark.parametrize(
    ("errors", "found"),
    [
        ({"p99_ttft_error_ms": 4.9}, []),
        ({"p99_ttft_error_ms": 5.1}, ["client-bound"]),
        ({"p99_ttft_error_ms": -5.1}, ["client-bound"]),
        ({"p99_itl_error_ms": 1.9}, []),
        ({"p99_itl_error_ms": 2.1}, ["client-bound"]),
        ({"p99_ttft_error_ms": 6.0, "p99_itl_error_ms": 3.0}, ["client-bound"] * 2),
    ],
)
def test_a_client_that_is_off_on_this_host(errors: dict[str, float], found: list[str]) -> None:
    """Allowed: 5 % of a TTFT of 100 ms, 10 % of an ITL of 20 ms."""
    assert kinds(seen(calibration=calibration(**errors))) == found


def test_a_calibration_whose_mock_was_late_proves_nothing() -> None:
    assert kinds(seen(calibration=calibration(mock_late_ms=9.9))) == []
    text = told(seen(calibration=calibration(mock_late_ms=450.0)))
    assert "could not be found out, since the built-in mock was 450 ms late itself" in text


def test_the_error_of_the_client_is_told_with_its_limit() -> None:
    assert told(seen(calibration=calibration(p99_ttft_error_ms=7.25))) == (
        "at 4 streams this client's p99 TTFT is off by +7.25 ms on this host "
        "(allowed 5 ms: 5% of a median of 100 ms); free the host's cores, or measure from another host"
    )


@pytest.mark.parametrize(("error_ms", "found"), [(0.9, []), (1.1, ["client-bound"])])
def test_an_error_below_a_millisecond_is_none(error_ms: float, found: list[str]) -> None:
    """Of a server so fast that 5 % of its TTFT are half a millisecond."""
    fast = [request(n, 0, 10**12 + n * 20 * MS, ttft_ms=10.0, itl_ms=2.0) for n in range(8)]
    batch = BatchTrace(index=0, requests=tuple(fast), start_ns=10**12, end_ns=fast[-1].end_ns)
    off = Observations(calibration=calibration(p99_ttft_error_ms=error_ms))
    assert kinds(replace(run(), batches=(batch,), observations=off)) == found


@pytest.mark.parametrize(("lag_ms", "found"), [(0.9, []), (1.1, ["client-bound"])])
def test_a_turnaround_below_a_millisecond_is_none(lag_ms: float, found: list[str]) -> None:
    """Of a server so fast that 2 % of its E2EL are a third of that."""
    fast = [request(n, 0, 10**12 + n * 20 * MS, ttft_ms=8.0, itl_ms=2.0) for n in range(8)]
    batch = BatchTrace(
        index=0, requests=tuple(fast), start_ns=10**12, end_ns=fast[-1].end_ns, clients=(lag(lag_ms, lag_ms),)
    )
    assert kinds(replace(run(), batches=(batch,))) == found


def lag(median_ms: float, p99_ms: float) -> ClientWork:
    """A client process that sends so late, and reads with the kernel's clock."""
    p99 = round(p99_ms * MS)
    return ClientWork(events=96, read_lag_ns=(0, 0, 0), send_lag_ns=(round(median_ms * MS), p99, p99))


@pytest.mark.parametrize(
    ("median_ms", "p99_ms", "found"),
    [
        (3.9, 39.0, []),
        (4.1, 39.0, ["client-bound"]),
        (3.9, 41.0, ["client-bound"]),
        (4.1, 41.0, ["client-bound"] * 2),
    ],
)
def test_a_closed_loop_that_is_late_with_the_next_request(median_ms: float, p99_ms: float, found: list[str]) -> None:
    """Allowed: 2 % of an E2EL of 200 ms for half of them, 20 % for all but one in a hundred."""
    assert kinds(run(clients=[[lag(median_ms, p99_ms)]])) == found


@pytest.mark.parametrize(("lag_ms", "found"), [(19, []), (21, ["client-bound"])])
def test_messages_that_pile_up_unread(lag_ms: int, found: list[str]) -> None:
    """Allowed: as long as the gap of 20 ms to the next message of the same answer."""
    client = ClientWork(events=96, read_lag_ns=(0, lag_ms * MS, 50 * MS))
    assert kinds(run(clients=[[client]])) == found


def test_lateness_is_told_with_its_limit() -> None:
    assert told(run(clients=[[lag(4.5, 4.5)]])) == (
        "half of the requests followed 4.5 ms or more after the answer they waited for (allowed 4 ms: 2% of the "
        "median E2EL); free the host's cores, or use more client processes"
    )


def test_the_worst_process_counts() -> None:
    assert kinds(run(clients=[[lag(0, 0), lag(9, 9)]])) == ["client-bound"]


@pytest.mark.parametrize(
    ("batches", "found"),
    [([0, 9, 0], []), ([9, 9, 0], ["client-bound"])],
)
def test_one_disturbed_batch_does_not_count(batches: list[float], found: list[str]) -> None:
    assert kinds(run(batches=3, clients=[[lag(ms, ms)] for ms in batches])) == found


@pytest.mark.parametrize(
    ("load", "p99_ms", "found"),
    [
        ({"rate": 10.0}, 4.9, []),
        ({"rate": 10.0}, 5.1, ["client-bound"]),  # 5 % of a gap of 100 ms, and of a TTFT of 100 ms
        ({"rate": 2.0}, 24.0, []),
        ({"rate": 2.0}, 26.0, ["client-bound"]),  # 5 % of a gap of 500 ms
        ({"rate": 1000.0}, 4.9, []),
        ({"rate": 1000.0}, 5.1, ["client-bound"]),  # 5 % of the TTFT, however short the gaps are
        ({"rate": math.inf}, 5.1, ["client-bound"]),
        ({"rate": None, "ramp_up": RampUp("linear", 1.0, 3.0)}, 24.0, []),
        ({"rate": None, "ramp_up": RampUp("linear", 1.0, 3.0)}, 26.0, ["client-bound"]),
    ],
)
def test_arrivals_that_are_late(load: dict[str, Any], p99_ms: float, found: list[str]) -> None:
    assert kinds(run(clients=[[lag(p99_ms, p99_ms)]]), replace(OPEN, **load)) == found


def unstamped(**facts: Any) -> ClientWork:
    """A process that reads without the kernel's clock."""
    standard = {"events": 100, "unstamped": 100}
    return ClientWork(**(standard | facts))


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        ({"cpu_ns": 100 * MS, "wait_ns": 90 * MS}, []),  # 1.9 ms for each event
        ({"cpu_ns": 100 * MS, "wait_ns": 110 * MS}, ["client-bound"]),  # 10 % of an ITL of 20 ms are 2 ms
        ({"cpu_ns": 210 * MS}, ["client-bound"]),
        ({"cpu_ns": 210 * MS, "unstamped": 1}, []),
        ({"cpu_ns": 210 * MS, "unstamped": 2}, ["client-bound"]),
        ({"lag_max_ns": 19 * MS}, []),
        ({"lag_max_ns": 21 * MS}, ["client-bound"]),  # 20 % of a TTFT of 100 ms
        ({"lag_max_ns": 21 * MS, "unstamped": 0}, []),
        ({"events": 0, "unstamped": 0}, []),
    ],
)
def test_a_client_that_reads_late_without_the_kernel_s_clock(facts: dict[str, Any], found: list[str]) -> None:
    assert kinds(run(clients=[[unstamped(**facts)]])) == found


@pytest.mark.parametrize(("share", "found"), [(0.89, []), (0.91, ["client-bound"])])
def test_a_client_that_needs_its_whole_core(share: float, found: list[str]) -> None:
    batch = run().batches[0]
    work = ClientWork(events=10**6, cpu_ns=round(share * (batch.end_ns - batch.start_ns)))
    assert kinds(run(clients=[[work]])) == found


def test_a_request_that_waited_for_a_connection() -> None:
    text = told(with_request(run(), connect_ns=3 * MS))
    assert text.startswith("connections were opened while it was measured: 1 requests waited for one, 3 ms at most, ")


def test_connections_that_the_server_closed() -> None:
    trace = run()
    closed = replace(trace, batches=(replace(trace.batches[0], reconnects=1), *trace.batches[1:]))
    assert kinds(closed) == ["client-bound"]
    assert kinds(with_request(closed, error="connection reset")) == ["failed-requests"]


# -- the server and its devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "reset", "found"),
    [
        (10, "done", []),
        (11, "done", ["prefix-cache"]),
        (11, "unavailable", ["prefix-cache"]),
        (1, "refused", ["prefix-cache"]),
        (0, "refused", []),
    ],
)
def test_prompts_from_the_prefix_cache(hits: int, reset: PrefixReset, found: list[str]) -> None:
    trace = seen(server=ServerWindow(engines=(engine(prefix_hits=hits),), prefix_reset=reset))
    assert kinds(trace) == found
    assert kinds(trace, replace(CLOSED, shares_prefix=True)) == []


def test_hits_are_told_as_a_share_of_all_engines() -> None:
    engines = (
        engine(prefix_hits=100, generation_tokens=16 * TOKENS, prompt_tokens=128, finished={"length": 16}),
        engine(generation_tokens=16 * TOKENS, prompt_tokens=128, finished={"length": 16}),
    )
    text = told(seen(server=ServerWindow(engines=engines, prefix_reset="done")))
    assert text.startswith("5.0% of the prompt tokens came from the prefix cache (allowed 1%): others use the server")


def test_a_chat_is_told_of_its_template() -> None:
    trace = seen(server=ServerWindow(engines=(engine(prefix_hits=500),)))
    assert "or the chat template is what they share" in told(trace, replace(CLOSED, api="chat"))


def test_kernels_that_were_compiled() -> None:
    lines = ("WARNING 11-21 jit_monitor.py:9] Triton JIT compilation during inference: _fwd_kernel", "another")
    assert told(seen(server=ServerWindow(jit=lines))) == (
        f"the server compiled kernels while it was measured, 2 log lines, the first: {lines[0]}; "
        "raise warmup_requests of the workload"
    )


@pytest.mark.parametrize(("first", "found"), [(18, []), (22, []), (23, ["uneven-shares"] * 2)])
def test_replicas_that_carried_unlike_shares(first: int, found: list[str]) -> None:
    urls = ("http://127.0.0.1:4001", "http://127.0.0.1:4002")
    engines = tuple(
        replace(engine(finished={"length": n}, prompt_tokens=8 * n, generation_tokens=TOKENS * n), replica=url)
        for url, n in zip(urls, (first, 32 - first), strict=True)
    )
    trace = seen(server=ServerWindow(engines=engines, replicas=urls))
    assert kinds(trace) == found
    assert "uneven-shares" not in kinds(with_request(trace, error="HTTP 502: Bad Gateway"))


SECONDS = tuple(n * 10**9 for n in range(1, 12))


def telemetry(*devices: DeviceTelemetry) -> RunTrace:
    return seen(telemetry=Telemetry(source="NVML", interval_s=1.0, sample_ns=SECONDS, devices=devices))


@pytest.mark.parametrize(("share", "found"), [(0.0, []), (0.5, ["throttled"])])
def test_a_gpu_that_got_too_hot(share: float, found: list[str]) -> None:
    assert kinds(telemetry(DeviceTelemetry(name="GPU 0", throttled={"hw_thermal_slowdown": share}))) == found


def test_a_power_cap_is_normal() -> None:
    assert kinds(telemetry(DeviceTelemetry(name="GPU 0", throttled={"sw_power_cap": 1.0}))) == []


def test_each_slowdown_is_a_problem() -> None:
    hot = DeviceTelemetry(name="GPU 0", throttled={"hw_slowdown": 0.9}, counters={"ecc_uncorrected": 1})
    assert kinds(telemetry(hot)) == ["throttled", "throttled"]


@pytest.mark.parametrize(("percent", "found"), [(5.0, []), (60.0, ["foreign-process"])])
def test_processes_of_others_on_the_host(percent: float, found: list[str]) -> None:
    assert kinds(telemetry(DeviceTelemetry(name=CPU, series={"others_busy_percent": [percent] * 11}))) == found


@pytest.mark.parametrize(("drift", "found"), [(0.1, []), (0.8, ["unstable"])])
def test_a_server_that_becomes_slower(drift: float, found: list[str]) -> None:
    assert kinds(run(batches=4, requests=24, drift=drift), replace(CLOSED, requests=24)) == found


def test_a_trend_is_told_with_its_evidence() -> None:
    text = told(run(batches=4, requests=24, drift=0.8), replace(CLOSED, requests=24))
    assert text.startswith("the time per token changed by +")
    assert "(p = " in text
