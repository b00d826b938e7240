from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulayout.errors import LayoutSyntaxError
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.tolerance import DEFAULT_TOLERANCES, Tolerance, parse_tolerances, percent_text


@pytest.mark.parametrize("text", ["", "  "])
def test_without_text_the_defaults_are_gated(text: str) -> None:
    found = parse_tolerances(text)
    assert {name: tolerance.fraction for name, tolerance in found.items()} == DEFAULT_TOLERANCES
    assert set(found) <= set(METRICS)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("median_tpot_ms=10%", {"median_tpot_ms": 0.10}),
        ("median_tpot_ms=0.1", {"median_tpot_ms": 0.10}),
        ("median_tpot_ms=100%", {"median_tpot_ms": 1.0}),
        ("p99_ttft_ms=250.5%", {"p99_ttft_ms": 2.505}),
        (" p99_itl_ms = 20 % , request_throughput=99%", {"p99_itl_ms": 0.20, "request_throughput": 0.99}),
    ],
)
def test_named_metrics_join_the_defaults(text: str, named: dict[str, float]) -> None:
    found = {name: tolerance.fraction for name, tolerance in parse_tolerances(text).items()}
    assert found == pytest.approx({**DEFAULT_TOLERANCES, **named})


EXPECTED = "expected METRIC=5% or METRIC=0.05, found"


@pytest.mark.parametrize(
    ("text", "column", "reason"),
    [
        ("median_tpot_ms", 1, f"{EXPECTED} 'median_tpot_ms'"),
        ("5%", 1, f"{EXPECTED} '5%'"),
        ("median_tpot_ms=", 1, f"{EXPECTED} 'median_tpot_ms='"),
        ("median_tpot_ms=-5%", 1, f"{EXPECTED} 'median_tpot_ms=-5%'"),
        ("median_tpot_ms=nan", 1, f"{EXPECTED} 'median_tpot_ms=nan'"),
        ("median_tpot_ms=5%%", 1, f"{EXPECTED} 'median_tpot_ms=5%%'"),
        ("median_tpot_ms=5% request_throughput=5%", 1, f"{EXPECTED} 'median_tpot_ms=5% request_throughput=5%'"),
        ("median_tpot_ms=5%,", 19, f"{EXPECTED} ''"),
        (
            "median_tpot_ms=5%,median_ttft=5%",
            19,
            "unknown metric 'median_ttft', did you mean median_ttft_ms, median_tpot_ms, median_itl_ms?",
        ),
        ("latency=5%", 1, f"unknown metric 'latency', did you mean {', '.join(sorted(METRICS))}?"),
        ("median_tpot_ms=0%", 1, "median_tpot_ms needs above 0 %, found 'median_tpot_ms=0%'"),
        ("median_tpot_ms=" + "9" * 400 + "%", 1, "median_tpot_ms needs above 0 %, found 'median_tpot_ms="),
        ("median_tpot_ms=5", 1, "median_tpot_ms=5 is ambiguous, write 5% or a fraction"),
        (
            "request_throughput=100%",
            1,
            "request_throughput needs between 0 % and 100 %, found 'request_throughput=100%'",
        ),
    ],
)
def test_refuses_with_column_and_reason(text: str, column: int, reason: str) -> None:
    with pytest.raises(LayoutSyntaxError) as error:
        parse_tolerances(text)
    assert error.value.column == column
    assert error.value.reason.startswith(f"tolerance: {reason}")


@given(st.floats(0.001, 0.9))
def test_margin_is_the_worst_value_allowed_on_the_log_scale(fraction: float) -> None:
    assert math.exp(Tolerance("median_ttft_ms", fraction).margin) == pytest.approx(1 + fraction)
    assert math.exp(-Tolerance("request_throughput", fraction).margin) == pytest.approx(1 - fraction)


@given(st.floats(0.001, 0.9), st.sampled_from(["median_ttft_ms", "request_throughput"]))
def test_a_margin_has_one_fraction(fraction: float, metric: str) -> None:
    tolerance = Tolerance(metric, fraction)
    assert tolerance.fraction_of(tolerance.margin) == pytest.approx(fraction)


def test_a_change_beyond_all_numbers_is_still_a_number() -> None:
    assert math.isfinite(Tolerance("median_ttft_ms", 0.05).fraction_of(1e9))
    assert Tolerance("request_throughput", 0.05).fraction_of(1e9) == 1.0


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.05, "5%"), (0.07, "7%"), (0.025, "2.5%"), (0.001, "0.1%"), (1.0, "100%"), (12, "1200%")]
)
def test_percent_text(fraction: float, text: str) -> None:
    assert percent_text(fraction) == text
