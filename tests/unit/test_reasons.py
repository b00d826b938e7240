from __future__ import annotations

from pytest_gpulayout.pairing import _is_clear
from pytest_gpulayout.reasons import why_open
from pytest_gpulayout.verdict import MetricVerdict, Status


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
