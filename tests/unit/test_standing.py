"""What a baseline is worth, against an independent computation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pytest_gpulayout.baseline import LevelStart
from pytest_gpulayout.settings import STORED_STARTS
from pytest_gpulayout.standing import MetricStanding, stand, takes_text
from pytest_gpulayout.stats import NoisePrior
from pytest_gpulayout.tolerance import parse_tolerances
from pytest_gpulayout.verdict import Requirement
from tests.support.stored import dated, quiet_baseline, quiet_session, stored

TOLERANCES = parse_tolerances("")
TODAY = "2026-11-21"


def metric_of(metrics: tuple[MetricStanding, ...], name: str = "median_tpot_ms") -> MetricStanding:
    [found] = [metric for metric in metrics if metric.name == name]
    return found


def test_mean_and_spread() -> None:
    generator = np.random.default_rng(5)
    logs = generator.normal(0, 0.02, (12, 1)) + generator.normal(0, 0.03, (12, 4))
    factors = np.exp(logs)
    standing = stand(
        stored(*(dated(n, *row) for n, row in enumerate(factors.tolist(), 1))), TOLERANCES, today=TODAY, starts=3
    )
    found = metric_of(standing.metrics)
    within = logs.var(axis=1, ddof=1).mean()
    assert found.mean == pytest.approx(10 * np.exp(logs.mean()), rel=1e-4)
    assert found.start_sd == pytest.approx(np.sqrt(within), rel=1e-2)
    assert found.session_sd == pytest.approx(np.sqrt(logs.mean(axis=1).var(ddof=1) - within / 4), rel=2e-2)
    assert (found.sessions, found.starts, found.is_settled) == (12, 48, True)


def test_more_starts_see_smaller_changes_and_what_it_takes_is_told() -> None:
    generator = np.random.default_rng(6)
    sessions = [dated(n, *np.exp(generator.normal(0, 0.02, 6))) for n in range(1, 13)]
    one, six = (
        metric_of(stand(stored(*sessions), TOLERANCES, today=TODAY, starts=starts).metrics) for starts in (1, 6)
    )
    assert one.min_detectable is not None
    assert six.min_detectable is not None
    assert six.min_detectable < one.min_detectable
    assert not one.shows_its_margin
    assert takes_text(one, 1).startswith("--gpu-starts=")


def test_what_is_not_gated_has_no_margin() -> None:
    found = metric_of(stand(quiet_baseline(), TOLERANCES, today=TODAY, starts=3).metrics, "p99_itl_ms")
    assert (found.tolerance, found.min_detectable, found.requirement) == (None, None, None)
    assert found.shows_its_margin
    assert takes_text(found, 3) == ""


@pytest.mark.parametrize(
    ("requirement", "text"),
    [
        (Requirement(starts=7, sessions=9, smallest=0.03), "--gpu-starts=7"),
        (Requirement(starts=None, sessions=9, smallest=0.03), "9 stored sessions and --gpu-starts=10"),
        (Requirement(starts=None, sessions=None, smallest=0.08), "a tolerance of 8.0%, or pairs (--gpu-base)"),
    ],
)
def test_what_it_takes(requirement: Requirement, text: str) -> None:
    found = metric_of(stand(quiet_baseline(), TOLERANCES, today=TODAY, starts=3).metrics)
    assert takes_text(replace(found, min_detectable=0.2, requirement=requirement), 3) == text


@pytest.mark.parametrize(("count", "state"), [(4, "provisional"), (5, "provisional"), (10, "settled")])
def test_state(count: int, state: str) -> None:
    standing = stand(quiet_baseline(count), TOLERANCES, today=TODAY, starts=STORED_STARTS)
    assert standing.state == state
    assert standing.is_settled is (state == "settled")


@pytest.mark.parametrize(
    ("today", "ending"), [("2026-12-31", ", waiver until 2026-12-31"), ("2027-01-01", ", waiver ended on 2026-12-31")]
)
def test_the_state_names_a_waiver(today: str, ending: str) -> None:
    start = LevelStart("a bug", (), "2026-12-31")
    baseline = stored(*quiet_baseline(9).sessions, quiet_session(10, factor=1.2, begins=start))
    standing = stand(baseline, TOLERANCES, today=today, starts=3)
    assert standing.state.endswith(ending)
    assert len(standing.reference.sessions) == (9 if "ended" in ending else 1)


def test_an_assumption_counts_as_long_as_there_are_few_sessions() -> None:
    wide = NoisePrior(start_sd=0.5, session_sd=0.5)
    assumed, own = (
        metric_of(stand(quiet_baseline(count), TOLERANCES, today=TODAY, starts=3, priors=lambda name: wide).metrics)
        for count in (2, 10)
    )
    assert assumed.session_sd > 0.1 > own.session_sd
    assert (assumed.is_settled, own.is_settled) == (False, True)
