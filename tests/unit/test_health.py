"""Each kind of rot is found, and a sound store has none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from scipy.stats import ttest_ind

from pytest_gpulayout.baseline import Baseline, BaselineKey, BaselineSession, LevelStart
from pytest_gpulayout.health import HealthRules, Rot, examine, is_used, unreadable
from pytest_gpulayout.tolerance import parse_tolerances
from tests.support.measurements import key
from tests.support.stored import dated, quiet_baseline, quiet_session, stored

TODAY = date(2026, 11, 21)
BETTER = LevelStart("x", ("median_tpot_ms 10.0 ms -> 9.8 ms (-2.0%, better)",))
TPOT_ONLY = {name: item for name, item in parse_tolerances("").items() if name == "median_tpot_ms"}


def rules(*, today: date = TODAY, max_age_days: int = 90, used: Sequence[BaselineKey] | None = None) -> HealthRules:
    return HealthRules(today, max_age_days, parse_tolerances(""), used)


def found(baseline: Baseline, given: HealthRules | None = None, path: str | None = None) -> list[Rot]:
    return list(examine({path or baseline.key.path: baseline}, given or rules()))


def kinds(rots: Sequence[Rot]) -> set[str]:
    return {rot.kind for rot in rots}


def test_a_sound_baseline_has_no_rot() -> None:
    assert found(quiet_baseline(10)) == []


def test_what_lies_under_another_key() -> None:
    [rot] = found(quiet_baseline(10), path="elsewhere/smoke.json")
    assert (rot.kind, rot.path) == ("foreign", "elsewhere/smoke.json")
    assert key().path in rot.text


@pytest.mark.parametrize(
    ("today", "told"),
    [
        (date(2027, 1, 8), None),
        (date(2027, 1, 9), "its newest session is of 2026-10-10, 91 days ago"),
        (date(2026, 10, 9), None),
        (date(2026, 10, 8), "its newest session is of 2026-10-10, which is still to come"),
    ],
)
def test_stale(today: date, told: str | None) -> None:
    rots = found(quiet_baseline(10), rules(today=today))
    assert [rot.text for rot in rots if rot.kind == "stale"] == ([] if told is None else [told])


def test_the_newest_session_need_not_be_the_last() -> None:
    sessions = [quiet_session(number) for number in (10, 1, 2, 3, 4, 5, 6, 7)]
    assert "stale" not in kinds(found(stored(*sessions), rules(today=date(2027, 1, 8))))


def test_a_session_without_a_date() -> None:
    baseline = quiet_baseline(8)
    undated = replace(baseline, sessions=tuple(replace(s, recorded="yesterday") for s in baseline.sessions))
    assert "its newest session has no date: 'yesterday'" in [rot.text for rot in found(undated)]


def test_few_sessions_are_a_note() -> None:
    [rot] = found(quiet_baseline(3))
    assert (rot.kind, rot.is_note) == ("provisional", True)
    assert "2 more" in rot.advice


# -- waivers -----------------------------------------------------------------------------------------------------


def waived(*after: BaselineSession, until: str) -> Baseline:
    start = LevelStart("a bug", ("median_tpot_ms 10.0 ms -> 12.0 ms (+20.0%, worse)",), until)
    before = [quiet_session(number) for number in range(1, 10)]
    return stored(*before, quiet_session(10, factor=1.2, begins=start), *after)


def test_a_waiver_that_is_over() -> None:
    rots = found(waived(until="2026-11-20"))
    [rot] = [rot for rot in rots if rot.kind == "expired"]
    assert rot.text.startswith("a waiver ended on 2026-11-20 (a bug)")
    assert not rot.is_note


def test_a_waiver_in_force_is_no_rot() -> None:
    assert kinds(found(waived(until="2026-11-21"))) <= {"provisional"}
    assert kinds(found(waived(quiet_session(11, factor=1.2), until="2026-11-21"))) <= {"provisional"}


def test_a_waiver_that_is_no_longer_needed() -> None:
    rots = found(waived(quiet_session(11), until="2026-12-31"))
    [rot] = [rot for rot in rots if rot.kind == "unneeded"]
    assert "the newest session is as good as the level before it" in rot.text


# -- means that move -----------------------------------------------------------------------------------------------


def drifting(total: float, count: int = 12) -> Baseline:
    return stored(
        *(quiet_session(number, factor=(1 + total) ** (number / (count - 1))) for number in range(1, count + 1))
    )


def test_drift_is_found_beyond_the_tolerance_only() -> None:
    assert "drifting" not in kinds(found(drifting(0.02)))
    rots = [rot for rot in found(drifting(0.12)) if rot.kind == "drifting"]
    assert {rot.text.split()[0] for rot in rots} == {"median_ttft_ms", "median_tpot_ms", "request_throughput"}
    [rate] = [rot.text for rot in rots if rot.text.startswith("request_throughput")]
    assert "moved by -1" in rate


def test_drift_goes_by_time_and_not_by_the_order_of_the_file() -> None:
    baseline = drifting(0.12)
    mixed = replace(baseline, sessions=baseline.sessions[::2] + baseline.sessions[1::2])
    assert "drifting" in kinds(found(mixed))


def test_drift_across_epochs_of_one_level_is_found() -> None:
    sessions = [
        replace(session, epoch={"driver": str(number)}) for number, session in enumerate(drifting(0.12).sessions)
    ]
    assert "drifting" in kinds(found(stored(*sessions)))


def test_a_step_that_was_accepted_is_no_drift() -> None:
    start = LevelStart("x", ("median_tpot_ms 10.0 ms -> 12.0 ms (+20.0%, worse)",))
    sessions = [quiet_session(number, factor=1.0 if number < 9 else 1.2) for number in range(1, 18)]
    sessions[8] = replace(sessions[8], begins=start)
    assert "drifting" not in kinds(found(stored(*sessions)))


def test_order_that_says_nothing_is_rarely_called_a_drift() -> None:
    draw = random.Random(3)
    count = 0
    for _ in range(150):
        sessions = [dated(number, draw.lognormvariate(0, 0.08)) for number in range(1, 11)]
        only_tpot = HealthRules(TODAY, 90, TPOT_ONLY)
        count += "drifting" in kinds(found(stored(*sessions), only_tpot))
    assert count <= 5  # 1 % of 150 is 1.5; more than 5 have a probability below 0.5 %


def ratchet(*sizes: int) -> Baseline:
    """Levels of so many sessions, each begun by one that was 2 % better, after which all is as it was."""
    sessions = [quiet_session(number) for number in range(1, 9)]
    number = 9
    for level, size in enumerate(sizes, 1):
        sessions.append(quiet_session(number, factor=0.98**level, begins=BETTER))
        sessions += [quiet_session(number + later) for later in range(1, size)]
        number += size
    return stored(*sessions)


@pytest.mark.parametrize(
    ("sizes", "is_found"), [((1,), False), ((1, 1), True), ((1, 1, 1), True), ((4, 4), True), ((4,), False)]
)
def test_ratchet(sizes: tuple[int, ...], is_found: bool) -> None:
    rots = [rot for rot in found(ratchet(*sizes)) if rot.kind == "ratcheted"]
    assert bool(rots) is is_found
    if rots:
        assert rots[0].text.startswith(
            f"the newest {len(sizes)} levels each began with one session in which median_tpot"
        )


def test_levels_that_stayed_better_are_no_ratchet() -> None:
    sessions = [quiet_session(number) for number in range(1, 9)]
    for level in (1, 2):
        first = 9 + (level - 1) * 5
        sessions += [
            quiet_session(n, factor=0.9**level, begins=BETTER if n == first else None)
            for n in range(first, first + 5)
        ]
    assert "ratcheted" not in kinds(found(stored(*sessions)))


@pytest.mark.parametrize("seed", range(12))
def test_a_level_is_confirmed_as_an_independent_t_test_says(seed: int) -> None:
    generator = np.random.default_rng(seed)
    old, new = np.exp(generator.normal(0, 0.02, 5)), np.exp(generator.normal(-0.025, 0.02, 3))
    sessions = [dated(number, factor) for number, factor in enumerate(old.tolist(), 1)]
    first = dated(6, 0.5, begins=BETTER)
    later = [dated(number, factor) for number, factor in enumerate(new.tolist(), 7)]
    last = dated(10, 0.4, begins=BETTER)  # nothing follows it, so that the level before decides
    is_found = "ratcheted" in kinds(found(stored(*sessions, first, *later, last), HealthRules(TODAY, 90, TPOT_ONLY)))
    assert is_found is not bool(ttest_ind(np.log(new), np.log(old), alternative="less").pvalue < 0.05)


def test_sessions_without_any_spread_are_no_trouble() -> None:
    same = [dated(number, 1.0) for number in range(1, 9)]
    better = [dated(number, 0.9, begins=BETTER if number == 9 else None) for number in range(9, 17)]
    assert {"drifting", "ratcheted"} & kinds(found(stored(*same, *better))) == set()


# -- numbers that are not what they seem ---------------------------------------------------------------------------


def test_two_groups_of_starts() -> None:
    sessions = [
        dated(number, 1.0 + number / 1e4, 1.15 + number / 1e4, 1.001 + number / 1e4) for number in range(1, 9)
    ]
    rots = [rot for rot in found(stored(*sessions)) if rot.kind == "bimodal"]
    [tpot] = [rot.text for rot in rots if rot.text.startswith("median_tpot_ms")]
    assert tpot == "median_tpot_ms falls into two groups of starts, 67% and 33% of 24, 14.9% apart"


def test_the_same_numbers_twice_in_one_file() -> None:
    baseline = quiet_baseline(8)
    again = replace(baseline.sessions[2], recorded="2026-10-20T08:00:00Z")
    rots = found(replace(baseline, sessions=(*baseline.sessions, again)))
    [rot] = [rot for rot in rots if rot.kind == "copied"]
    assert rot.text.startswith(f"the session of 2026-10-20T08:00:00Z in {key().path} has the same numbers as")


def test_the_same_numbers_under_another_key() -> None:
    one, other = quiet_baseline(8), quiet_baseline(8, hardware={"device": "H100"})
    rots = examine({one.key.path: one, other.key.path: other}, rules())
    assert {(rot.kind, rot.path) for rot in rots} == {("copied", other.key.path)}


def test_what_nobody_uses() -> None:
    baseline = quiet_baseline(8)
    assert found(baseline, rules(used=[key()])) == []
    assert kinds(found(baseline, rules(used=[]))) == {"unused"}
    assert kinds(found(baseline, rules(used=[key(layout="tp4")]))) == {"unused"}
    assert is_used(key(), [key(layout="tp4"), key()])


def test_what_cannot_be_read_keeps_the_advice_of_its_error() -> None:
    rot = unreadable("a.json", "a document was required, found none\n  in a.json\n  restore it (git checkout)")
    assert rot == Rot("unreadable", "a.json", "a document was required, found none", "restore it (git checkout)")
