"""How a session joins the stored ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_gpulayout.approval import add_session, change_text, got_better, got_worse
from pytest_gpulayout.baseline import Baseline, BaselineSession, LevelStart
from pytest_gpulayout.verdict import MetricVerdict, Status, Verdict
from tests.support.stored import dated, stored

WAIVER = LevelStart("a bug", ("median_tpot_ms 10.0 ms -> 12.0 ms (+20.0%, worse)",), until="2026-10-31")


def metric(status: Status, name: str = "median_tpot_ms", current: float = 11.9) -> MetricVerdict:
    return MetricVerdict(
        name=name,
        status=status,
        baseline=9.8,
        current=current,
        change=current / 9.8 - 1,
        ci=(-0.1, 0.3),
        tolerance=0.05,
        min_detectable=0.04,
        n_current=3,
        n_baseline=9,
    )


def added(
    baseline: Baseline, session: BaselineSession, *statuses: Status, until: str = "", today: str = ""
) -> Baseline:
    verdict = Verdict(Status.INCONCLUSIVE, metrics=tuple(metric(status) for status in statuses))
    return add_session(baseline, session, verdict, reason="new kernel", until=until, today=today)


@pytest.mark.parametrize("status", [Status.PASS, Status.INCONCLUSIVE])
def test_what_is_no_change_joins_the_level(status: Status) -> None:
    session = dated(3, 1.0)
    after = added(stored(dated(1, 1.0), dated(2, 1.01)), session, status)
    assert after.sessions[-1] == session
    assert len(after.levels()) == 1


def test_what_is_worse_begins_a_level_with_reason_and_numbers() -> None:
    after = added(stored(dated(1, 1.0)), dated(2, 1.2), Status.REGRESSION, until="2026-12-31")
    assert after.sessions[-1].begins == LevelStart(
        "new kernel", ("median_tpot_ms 9.80 ms -> 11.9 ms (+21.4%, worse)",), "2026-12-31"
    )
    assert [len(level) for level in after.levels()] == [1, 1]


def test_what_only_got_better_is_no_waiver() -> None:
    after = added(stored(dated(1, 1.0)), dated(2, 0.8), Status.IMPROVEMENT, Status.PASS, until="2026-12-31")
    assert after.sessions[-1].begins is not None
    assert after.sessions[-1].begins.until == ""


def test_a_session_that_began_a_level_elsewhere_does_not_here() -> None:
    after = added(stored(dated(1, 1.0)), dated(2, 1.0, begins=WAIVER), Status.PASS)
    assert after.sessions[-1].begins is None


@pytest.mark.parametrize(
    ("today", "levels"),
    [("2026-10-31", [["1"], ["2", "3"]]), ("2026-11-01", [["1", "3"], ["2"]]), ("", [["1"], ["2", "3"]])],
)
def test_after_a_waiver_a_session_joins_the_level_that_it_was_compared_with(
    today: str, levels: list[list[str]]
) -> None:
    before = stored(dated(1, 1.0), dated(2, 1.2, begins=WAIVER))
    after = added(before, replace(dated(3, 1.0)), Status.PASS, today=today)
    found = [[str(int(session.recorded[8:10])) for session in level] for level in after.levels()]
    assert found == levels


def test_the_day_of_the_session_counts_where_no_other_is_given() -> None:
    before = stored(dated(1, 1.0), dated(2, 1.2, begins=WAIVER))
    after = added(before, dated(40, 1.0), Status.PASS)
    assert [len(level) for level in after.levels()] == [2, 1]


@pytest.mark.parametrize(
    ("status", "name", "current", "text"),
    [
        (Status.REGRESSION, "median_tpot_ms", 11.9, "median_tpot_ms 9.80 ms -> 11.9 ms (+21.4%, worse)"),
        (
            Status.IMPROVEMENT,
            "request_throughput",
            12.1,
            "request_throughput 9.80 req/s -> 12.1 req/s (+23.5%, better)",
        ),
    ],
)
def test_a_change_says_which_way(status: Status, name: str, current: float, text: str) -> None:
    assert change_text(metric(status, name, current)) == text
    start = LevelStart("x", (text,))
    assert got_better(start, name) is (status is Status.IMPROVEMENT)
    assert got_worse(start) is (status is Status.REGRESSION)
    assert not got_better(start, "median_ttft_ms")
