from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from pytest_gpulayout.steady_state import MIN_BLOCKS, find_steady_state
from pytest_gpulayout.trace import RequestTrace, RunTrace
from pytest_gpulayout.workload import RampUp, Workload
from tests.support.traces import MS, failed, request, run_of

TOKENS = 10


def workload(**parts: object) -> Workload:
    standard: dict[str, object] = {"concurrency": 4, "requests": 48, "batches": 2}
    return Workload(name="w", input_tokens=10, output_tokens=TOKENS, **(standard | parts))  # type: ignore[arg-type]


def answer(index: int, send_ms: int, e2el_ms: float) -> RequestTrace:
    chunks = [round(send_ms + e2el_ms * (n + 1) / TOKENS) for n in range(TOKENS)]
    return replace(request(index, send_ms, *chunks, output_tokens=TOKENS), end_ns=chunks[-1] * MS)


def closed_loop(latencies_ms: Sequence[float], places: int = 4) -> tuple[RequestTrace, ...]:
    """Requests with these end-to-end latencies, each sent when a place is free."""
    free_at, requests = [1000] * places, []
    for index, e2el_ms in enumerate(latencies_ms):
        requests.append(answer(index, heapq.heappop(free_at), e2el_ms))
        heapq.heappush(free_at, requests[-1].end_ns // MS)
    return tuple(requests)


def run_with(latency_ms: Callable[[float], float], *, batches: int = 2, requests: int = 48) -> RunTrace:
    """A run whose latencies follow a function of progress, 0 to 1 over all batches."""
    total = batches * requests
    values = [latency_ms(number / (total - 1)) for number in range(total)]
    return run_of(*(closed_loop(values[start : start + requests]) for start in range(0, total, requests)))


def test_the_window_leaves_out_ramp_and_drain() -> None:
    # Two places, sent 100 ms apart; the drain is the last request alone.
    requests = (answer(0, 1000, 400), answer(1, 1100, 400), answer(2, 1400, 400), answer(3, 1500, 600))
    state = find_steady_state(run_of(requests), workload(concurrency=2, requests=4, batches=1))
    assert state is not None
    assert state.windows_ns == ((1100 * MS, 1800 * MS),)
    assert state.seconds == 0.7
    # In the window lie 3/4 of the first, all of the second and third, half of the last.
    assert state.request_throughput == pytest.approx((0.75 + 1 + 1 + 0.5) / 0.7)
    assert state.n_requests == 4


def test_tokens_are_interpolated_at_the_edges_of_the_window() -> None:
    # A chunk of 4 tokens takes 100 ms; the window opens 25 ms and closes 50 ms into such a gap.
    first = request(0, 1000, 1100, 1200, 1300, chunk_tokens=(1, 4, 4), output_tokens=9)
    second = request(1, 1125, 1250, 1300, output_tokens=2)
    state = find_steady_state(run_of((first, second)), workload(concurrency=2, requests=2, batches=1))
    assert state is not None
    assert state.windows_ns == ((1125 * MS, 1301 * MS),)
    assert state.output_throughput == pytest.approx((3 + 4 + 2) / 0.176)


@pytest.mark.parametrize(
    ("latency", "drift"),
    [
        (lambda progress: 1000.0, 0.0),
        (lambda progress: 1000 + 150 * progress, 0.15),
        (lambda progress: 1000 + 400 * math.sin(40 * progress), None),
        (lambda progress: 3000.0 if progress < 0.1 else 1000.0, None),
    ],
    ids=["constant", "drift below the limit", "waves", "slow start"],
)
def test_stable(latency: Callable[[float], float], drift: float | None) -> None:
    state = find_steady_state(run_with(latency), workload())
    assert state is not None
    assert state.verdict == "stable"
    assert drift is None or state.drift == pytest.approx(drift, abs=0.03)


@pytest.mark.parametrize(
    ("latency", "sign"),
    [
        (lambda progress: 1000 + 400 * progress, 1),
        (lambda progress: 1000 - 400 * progress, -1),
        (lambda progress: 1000.0 + 50 * math.sin(300 * progress) + 300 * round(3 * progress), 1),
    ],
    ids=["slower", "faster", "steps"],
)
def test_unstable(latency: Callable[[float], float], sign: int) -> None:
    state = find_steady_state(run_with(latency), workload())
    assert state is not None
    assert state.verdict == "unstable"
    assert state.drift is not None
    assert sign * state.drift > 0.2
    assert state.p_value is not None
    assert state.p_value < 0.001


def test_batches_that_each_begin_slowly_have_no_trend() -> None:
    batch = [1600.0, 1500.0, 1400.0, 1300.0] * 3 + [1000.0] * 36
    state = find_steady_state(run_of(*[closed_loop(batch)] * 4), workload(batches=4))
    assert state is not None
    assert state.verdict == "stable"


def test_noise_alone_is_not_called_unstable() -> None:
    random = np.random.default_rng(1)
    verdicts = []
    for _ in range(100):
        # A quarter of spread, and a host that is half as fast again for a third of the time.
        level = 1000 * np.repeat(random.choice([1.0, 1.0, 1.5], size=24), 4)
        values = (level * random.lognormal(0, 0.25, 96)).tolist()
        run = run_of(closed_loop(values[:48]), closed_loop(values[48:]))
        state = find_steady_state(run, workload())
        assert state is not None
        verdicts.append(state.verdict)
    assert verdicts.count("stable") >= 99


def test_a_host_that_stays_for_a_while_at_each_of_two_speeds_is_not_called_unstable() -> None:
    random = np.random.default_rng(2)
    verdicts = []
    for _ in range(100):
        level, levels = 1000.0, []
        for _ in range(24):
            level = 3500.0 - level if random.random() < 0.1 else level
            levels += [level] * 4
        values = (np.array(levels) * random.lognormal(0, 0.05, 96)).tolist()
        state = find_steady_state(run_of(closed_loop(values[:48]), closed_loop(values[48:])), workload())
        assert state is not None
        verdicts.append(state.verdict)
    assert verdicts.count("stable") >= 97


@pytest.mark.parametrize("turns", [MIN_BLOCKS - 1, MIN_BLOCKS])
def test_too_few_turns_say_nothing(turns: int) -> None:
    run = run_with(lambda progress: 1000 + 1000 * progress, batches=1, requests=4 * turns)
    state = find_steady_state(run, workload(batches=1))
    assert state is not None
    assert (state.blocks, state.verdict) == (turns, "too_short" if turns < MIN_BLOCKS else "unstable")
    assert (state.drift is None) == (turns < MIN_BLOCKS)


def test_one_wave_is_too_short_and_its_batches_are_compared() -> None:
    def waves(*latencies_ms: float) -> RunTrace:
        return run_of(*(closed_loop([e2el_ms] * 4) for e2el_ms in latencies_ms))

    short = find_steady_state(waves(1000, 1500, 2000), workload(requests=4, batches=3))
    slower = find_steady_state(waves(*range(1000, 2000, 100)), workload(requests=4, batches=10))
    assert short is not None
    assert slower is not None
    assert (short.verdict, slower.verdict) == ("too_short", "unstable")


def test_open_arrivals_that_the_server_cannot_follow_are_unstable() -> None:
    # One answer each 100 ms, one request each 50 ms: the queue grows.
    overloaded = [answer(index, 1000 + 50 * index, 100 + 50 * index) for index in range(80)]
    kept_up = [answer(index, 1000 + 50 * index, 100 + 10 * (index % 3)) for index in range(80)]
    load = workload(concurrency=None, rate=20.0, requests=80, batches=1)
    verdicts = []
    for requests in (overloaded, kept_up):
        state = find_steady_state(run_of(tuple(requests)), load)
        assert state is not None
        verdicts.append(state.verdict)
    assert verdicts == ["unstable", "stable"]


def test_a_ramp_has_no_steady_state() -> None:
    ramp = workload(concurrency=None, ramp_up=RampUp("linear", 1.0, 9.0))
    assert find_steady_state(run_with(lambda progress: 1000.0), ramp) is None


def test_a_load_that_was_never_reached_has_no_window() -> None:
    state = find_steady_state(run_of((answer(0, 1000, 10), failed(1)), ()), workload())
    assert state is not None
    assert state.windows_ns == (None, None)
    assert (state.output_throughput, state.request_throughput, state.verdict) == (None, None, "too_short")
