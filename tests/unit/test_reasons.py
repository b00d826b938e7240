from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_gpulayout.pairing import _is_clear
from pytest_gpulayout.reasons import what_it_takes, why_open
from pytest_gpulayout.verdict import MetricVerdict, Requirement, Status


def metric(name: str, status: Status) -> MetricVerdict:
    return MetricVerdict(name, status, 10.0, 10.4, 0.04, (-0.02, 0.1), 0.05, 0.08, n_current=2, n_baseline=9)


WORSE = metric("median_tpot_ms", Status.REGRESSION)
OPEN = metric("median_ttft_ms", Status.INCONCLUSIVE)
FINE = metric("request_throughput", Status.PASS)


def test_what_a_regression_leaves_open_is_not_blamed_on_the_budget() -> None:
    assert why_open((WORSE, OPEN, FINE), starts=3) == [
        "not decided, since a regression ends the gate: median_ttft_ms"
    ]
    assert why_open((WORSE, FINE), starts=3) == []


def test_without_a_regression_an_open_metric_says_what_it_takes() -> None:
    [reason] = why_open((OPEN, FINE), starts=3)
    assert reason.startswith("median_ttft_ms: changed by +4.0%, interval -2.0% to +10.0%; a change of 5% cannot")
    assert "the budget ended before 3 starts" in reason


def test_pairs_end_with_the_first_regression_or_when_nothing_is_open() -> None:
    assert _is_clear((WORSE, OPEN))
    assert _is_clear((FINE,))
    assert not _is_clear((FINE, OPEN))


@pytest.mark.parametrize(
    ("requirement", "told"),
    [
        (Requirement(1, 9, 0.03), "it lies near the limit; more stored sessions narrow it (gpulayout baseline "),
        (Requirement(None, 12, 0.03), "store 12 sessions, each of another start of the server (--gpu-baseline=upd"),
        (Requirement(None, None, 0.25), "one start of a server hides changes below 25% here, whatever is stored"),
    ],
)
def test_of_a_server_that_is_never_started_anew_neither_starts_nor_pairs_are_advised(
    requirement: Requirement, told: str
) -> None:
    one_start = replace(OPEN, n_current=1, requirement=requirement)

    text = what_it_takes(one_start, 1, restarts=False)

    assert text.startswith(told)
    assert text.endswith("accept a larger tolerance (--gpu-tolerance=median_ttft_ms=10%)")
    assert "--gpu-starts" not in text
    assert "--gpu-base)" not in text
    [reason] = why_open((one_start,), 1, restarts=False)
    assert reason.endswith(text)
