from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_gpulayout.agreement import BothSides, agreement, agreement_document, compare_sides
from pytest_gpulayout.server_window import EngineDelta, HistogramDelta, ServerWindow
from pytest_gpulayout.trace import RunTrace
from tests.support.traces import FAST, SLOW, failed, run_of

RUN = run_of((FAST,), (SLOW,))
"""2 requests with 10 prompt and 3 output tokens each, and a mean E2EL of 265 ms."""


def engine(number: int = 0, *, prompt: int = 10, output: int = 3, e2el_s: float = 0.0, **ends: int) -> EngineDelta:
    return EngineDelta(
        replica="http://127.0.0.1:1",
        engine=str(number),
        prompt_tokens=prompt,
        generation_tokens=output,
        finished=ends or {"length": 1},
        histograms={"e2e_request_latency": HistogramDelta(e2el_s, 1)},
    )


def window(*engines: EngineDelta) -> ServerWindow:
    return ServerWindow(engines=engines or (engine(0), engine(1, stop=1)))


def test_both_sides_count_the_same_over_all_engines() -> None:
    assert agreement(RUN, window()) == ()
    sides = compare_sides(RUN, window())
    assert (sides.requests, sides.prompt_tokens, sides.output_tokens) == (
        BothSides(2, 2),
        BothSides(20, 20),
        BothSides(6, 6),
    )


CAUSE = "use a server that nobody else uses, and an address behind which there is only one"


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        (engine(1, output=4), f"the client counted 6 output tokens and the server 7; {CAUSE}"),
        (engine(1, output=2), f"the client counted 6 output tokens and the server 5; {CAUSE}"),
        (engine(1, prompt=26), f"the client counted 20 prompt tokens and the server 36; {CAUSE}"),
        (engine(1, length=2), f"the client counted 2 completed requests and the server 3; {CAUSE}"),
        (
            engine(1, length=1, abort=2, error=1),
            f"the server ended requests that the client did not see fail: 2 with 'abort', 1 with 'error'; {CAUSE}",
        ),
    ],
)
def test_one_count_that_differs(second: EngineDelta, complaint: str) -> None:
    assert agreement(RUN, window(engine(0), second)) == (complaint,)


def test_counters_that_were_still_moving_are_named_as_the_cause() -> None:
    (complaint,) = agreement(RUN, replace(window(engine(0), engine(1, output=9)), settled=False))
    assert "the server 12; its counters were still moving when they were read; use a server" in complaint
    assert agreement(RUN, replace(window(), settled=False)) == ()


def with_failure() -> RunTrace:
    return run_of((FAST, failed(2)), (SLOW,))


def test_what_the_server_counted_for_requests_that_failed_is_explained() -> None:
    assert agreement(with_failure(), window(engine(0), engine(1, prompt=20, output=7, length=1, abort=1))) == ()


def test_failed_requests_do_not_explain_tokens_that_the_server_lacks() -> None:
    (complaint,) = agreement(with_failure(), window(engine(0), engine(1, output=2)))
    assert complaint.startswith("the client counted 6 output tokens and the server 5")


def test_tokens_that_the_client_was_not_told_are_not_compared() -> None:
    run = run_of((replace(FAST, output_tokens=0),), (SLOW,))
    assert agreement(run, window()) == ()


@pytest.mark.parametrize(
    ("server_s", "excess_ms", "close"),
    [
        (0.5280, 1.0, True),
        (0.5200, 5.0, True),  # 2 % of 260 ms are 5.2 ms
        (0.5190, 5.5, False),
        (0.5310, -0.5, False),
    ],
)
def test_latency_is_told_and_not_judged(server_s: float, excess_ms: float, close: bool) -> None:
    seen = window(engine(0, e2el_s=server_s / 2), engine(1, e2el_s=server_s / 2))
    sides = compare_sides(RUN, seen)
    assert sides.client_e2el_ms == 265
    assert sides.e2el_excess_ms == pytest.approx(excess_ms)
    assert sides.e2el_close is close
    assert agreement(RUN, seen) == ()


def test_a_short_request_may_take_two_ms_more() -> None:
    quick = run_of((replace(FAST, chunk_ns=tuple(FAST.send_ns + 1_000_000 * ms for ms in (1, 2, 10))),))
    seen = window(engine(e2el_s=0.0081))
    assert compare_sides(quick, seen).e2el_close is True


def test_nothing_completed() -> None:
    sides = compare_sides(run_of((failed(0),)), ServerWindow())
    assert (sides.client_e2el_ms, sides.server_e2el_ms) == (None, None)
    assert (sides.e2el_excess_ms, sides.e2el_close) == (None, None)


def test_document() -> None:
    seen = window(replace(engine(0, e2el_s=0.2), preemptions=3), engine(1, output=4, length=1, abort=1, e2el_s=0.328))
    document = agreement_document(RUN, seen)
    assert [complaint.partition(";")[0] for complaint in document.pop("complaints")] == [
        "the client counted 6 output tokens and the server 7",
        "the server ended requests that the client did not see fail: 1 with 'abort'",
    ]
    assert document == {
        "requests": {"client": 2, "server": 2},
        "prompt_tokens": {"client": 20, "server": 20},
        "output_tokens": {"client": 6, "server": 7},
        "ended_otherwise": {"abort": 1},
        "preemptions": 3,
        "client_e2el_ms": 265.0,
        "server_e2el_ms": 264.0,
        "e2el_excess_ms": 1.0,
        "e2el_close": True,
    }
