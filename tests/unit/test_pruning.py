"""What is removed, and that no mean moves by it."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_gpulayout.baseline import Baseline, LevelStart
from pytest_gpulayout.pruning import Pruned, prune
from pytest_gpulayout.tolerance import parse_tolerances
from tests.support.stored import dated, quiet_session, stored

TOLERANCES = parse_tolerances("")
TODAY = "2026-11-21"
BETTER = LevelStart("faster", ("median_tpot_ms 10 ms -> 9 ms (-10.0%, better)",))
WAIVER = LevelStart("a bug", ("median_tpot_ms 10 ms -> 12 ms (+20.0%, worse)",), until="2026-12-31")
OVER = LevelStart("a bug", ("median_tpot_ms 10 ms -> 12 ms (+20.0%, worse)",), until="2026-10-31")


def pruned(baseline: Baseline, keep: int = 20, *, expired: bool = False, today: str = TODAY) -> Pruned:
    return prune(baseline, TOLERANCES, today=today, keep=keep, expired=expired)


def means(baseline: Baseline, today: str = TODAY) -> list[Any]:
    """What each epoch would be compared with, now and when every waiver is over."""
    epochs = [None, *(session.epoch for session in baseline.sessions)]
    days = (today, "9999-12-31")
    references = [baseline.reference(epoch, today=day) for day in days for epoch in epochs]
    return [[session.runs for session in reference.sessions] for reference in references]


def days(baseline: Baseline) -> list[str]:
    return [session.recorded[5:10] for session in baseline.sessions]


def test_sessions_that_no_longer_count_go() -> None:
    before = stored(*(quiet_session(number) for number in range(1, 26)))
    after = pruned(before)
    assert days(after.baseline) == [f"10-{number:02d}" for number in range(6, 26)]
    assert after.removed == ("5 sessions older than the newest of their level and epoch: 2026-10-01 to 2026-10-05",)
    assert means(after.baseline) == means(before)[: len(means(after.baseline))]


@pytest.mark.parametrize("keep", [1, 5, 20])
def test_no_number_to_keep_moves_a_mean(keep: int) -> None:
    old_epoch = [dated(number, 1.0, 1.01, epoch={"driver": "550"}) for number in range(1, 4)]
    level = [quiet_session(number) for number in range(4, 12)]
    before = stored(*old_epoch, *level)
    after = pruned(before, keep)
    assert after.baseline == before
    assert after.removed == ()


def test_a_level_that_was_followed_goes_once_the_new_one_has_settled() -> None:
    old = [quiet_session(number) for number in range(1, 4)]
    new = [quiet_session(number, factor=0.9, begins=BETTER if number == 4 else None) for number in range(4, 14)]
    before = stored(*old, *new)
    after = pruned(before)
    assert after.removed == ("3 sessions of a level that others followed: 2026-10-01 to 2026-10-03",)
    assert after.baseline.sessions == tuple(new)
    assert after.baseline.sessions[0].begins == BETTER


def test_a_level_that_was_followed_stays_as_long_as_its_spread_is_needed() -> None:
    before = stored(*map(quiet_session, range(1, 9)), quiet_session(9, factor=0.9, begins=BETTER))
    assert pruned(before).baseline == before
    fewer = pruned(before, keep=3)
    assert days(fewer.baseline) == ["10-06", "10-07", "10-08", "10-09"]
    assert means(fewer.baseline)[0] == means(before)[0]


def test_the_level_before_a_waiver_stays() -> None:
    old = [quiet_session(number) for number in range(1, 10)]
    new = [quiet_session(number, factor=1.2, begins=WAIVER if number == 10 else None) for number in range(10, 20)]
    before = stored(*old, *new)
    assert pruned(before, keep=1).baseline == before


def test_the_first_session_that_stays_begins_its_level() -> None:
    old = [quiet_session(number) for number in range(1, 4)]
    new = [quiet_session(number, factor=1.2, begins=WAIVER if number == 4 else None) for number in range(4, 28)]
    after = pruned(stored(*old, *new)).baseline
    assert [len(level) for level in after.levels()] == [3, 20]
    assert after.levels()[1][0].begins == WAIVER


@pytest.mark.parametrize("expired", [False, True])
def test_the_level_of_a_waiver_that_is_over_goes_only_when_asked(expired: bool) -> None:
    old = [quiet_session(number) for number in range(1, 10)]
    before = stored(*old, quiet_session(10, factor=1.2, begins=OVER))
    after = pruned(before, expired=expired)
    assert after.baseline.sessions == (tuple(old) if expired else before.sessions)
    told = ("1 session of a waiver that ended on 2026-10-31 (a bug): 2026-10-10",)
    assert after.removed == (told if expired else ())
    reference = before.reference(today=TODAY).sessions
    assert after.baseline.reference(today=TODAY).sessions == reference


def test_a_waiver_that_is_in_force_is_not_over() -> None:
    before = stored(quiet_session(1), quiet_session(2, factor=1.2, begins=WAIVER))
    assert pruned(before, expired=True).baseline == before
