"""How many times as good one layout is as another, and the gate on it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pytest_gpulayout.baseline import Baseline
from pytest_gpulayout.baseline_text import baseline_to_text
from pytest_gpulayout.errors import DevicesBusy, GpuLayoutError, LayoutSyntaxError, MeasurementError
from pytest_gpulayout.judging import NOISE_PRIORS
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.measurement import Measurement
from pytest_gpulayout.relative import (
    RELATIVE_METRICS,
    Claim,
    ClaimInputs,
    Contestant,
    RelativeVerdict,
    judge_claim,
    judge_ratio,
    level_of,
    load_differences,
    parse_claim,
    ratio_of,
    relative_lines,
    relative_record,
    start_priors,
    times_as_good,
    units_of,
)
from pytest_gpulayout.stats import Effect, NoisePrior, t_quantile
from pytest_gpulayout.testing import InMemoryBaselines
from pytest_gpulayout.validity import Problem
from pytest_gpulayout.verdict import Look, MetricSample
from tests.support.measurements import H200, key, measurement_of, run_of, session_of

PRIOR = NoisePrior(start_sd=0.015, session_sd=0.01)
TP1 = Layout()


def sample(*batches: float) -> MetricSample:
    return MetricSample(batches)


# -- claims ----------------------------------------------------------------------------------------------------------


def test_a_claim_is_read_from_a_text_or_a_layout() -> None:
    assert parse_claim("tp1x2", "request_throughput", 1.5) == Claim(Layout(replicas=2), "request_throughput", 1.5)
    assert parse_claim(TP1, "median_ttft_ms") == Claim(TP1, "median_ttft_ms", 1.0)


@pytest.mark.parametrize("metric", RELATIVE_METRICS)
def test_every_metric_can_be_claimed(metric: str) -> None:
    claim = parse_claim("tp1", metric, 2)
    assert claim.is_per_unit is metric.endswith("_per_gpu")
    assert claim.base_metric in RELATIVE_METRICS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("tq1", "request_throughput", 1.0),
            "layout: expected a factor (tpN, ppN, dpN, pcpN, dcpN) or ep, found 'tq1'",
        ),
        (("tp1", "throughput", 1.0), "better_than: unknown metric 'throughput', did you mean "),
        (("tp1", 5, 1.0), "better_than: unknown metric 5, did you mean "),
        (("tp1", "request_throughput", 0), "better_than: a factor above 0 was expected, found 0"),
        (("tp1", "request_throughput", -1.5), "better_than: a factor above 0 was expected, found -1.5"),
        (("tp1", "request_throughput", math.nan), "better_than: a factor above 0 was expected, found nan"),
        (("tp1", "request_throughput", math.inf), "better_than: a factor above 0 was expected, found inf"),
        (("tp1", "request_throughput", True), "better_than: a factor above 0 was expected, found True"),
        (("tp1", "request_throughput", "2"), "better_than: a factor above 0 was expected, found '2'"),
    ],
)
def test_a_claim_that_cannot_be_read_says_why(arguments: tuple[str, str, float], message: str) -> None:
    with pytest.raises(LayoutSyntaxError) as error:
        parse_claim(*arguments)
    assert str(error.value).startswith(message)


# -- levels and ratios -----------------------------------------------------------------------------------------------


def test_one_start_rests_on_what_is_assumed() -> None:
    level = level_of([sample(10.0)], PRIOR)

    assert level.size == pytest.approx(math.log(10))
    assert level.se == pytest.approx(0.015)
    assert level.df == 4


def test_several_starts_are_pooled_with_what_is_assumed() -> None:
    """By hand: ln 9, ln 10, ln 11 have the sum of squares 0.02015 about their mean, on 2 degrees of freedom."""
    level = level_of([sample(9.0), sample(10.0), sample(11.0)], PRIOR)

    squares = sum((math.log(value) - math.log(990) / 3) ** 2 for value in (9, 10, 11))
    assert squares == pytest.approx(0.02015, abs=5e-6)
    assert level.size == pytest.approx(math.log(990) / 3)
    assert level.se == pytest.approx(math.sqrt((4 * 0.015**2 + squares) / 6 / 3))
    assert level.df == 6


def test_eight_starts_speak_for_themselves() -> None:
    values = [10.0, 10.1, 9.9, 10.05, 9.95, 10.0, 10.1, 9.9]
    level = level_of([sample(value) for value in values], replace(PRIOR, start_sd=0.5))

    assert level.df == 7
    assert level.se < 0.01


def test_batches_that_scatter_widen_a_single_start() -> None:
    level = level_of([sample(5.0, 10.0, 20.0)], PRIOR)

    assert level.se == pytest.approx(math.log(2) / math.sqrt(3))


def test_a_ratio_has_the_noise_of_both_and_satterthwaite_s_degrees_of_freedom() -> None:
    ratio = ratio_of(Effect(math.log(12), 0.03, 5), Effect(math.log(10), 0.04, 5))

    assert ratio.size == pytest.approx(math.log(1.2))
    assert ratio.se == pytest.approx(0.05)
    assert ratio.df == pytest.approx(0.05**4 / (0.03**4 / 5 + 0.04**4 / 5))
    assert ratio_of(Effect(0, 0.03, 5), Effect(0, 0.03, 5)).df == pytest.approx(10)


def test_good_is_a_high_rate_and_a_short_time() -> None:
    own, other = Effect(math.log(12), 0.01, 4), Effect(math.log(10), 0.01, 4)

    assert times_as_good(own, other, higher_is_better=True).size == pytest.approx(math.log(1.2))
    assert times_as_good(own, other, higher_is_better=False).size == pytest.approx(-math.log(1.2))


@pytest.mark.parametrize(
    ("layout", "units"), [("tp1", 1), ("tp4", 4), ("tp1x4", 4), ("dp2tp2ep", 4), ("tp8pp2@2", 16)]
)
def test_a_layout_is_paid_by_its_gpus(layout: str, units: int) -> None:
    assert units_of(layout, H200) == units


@pytest.mark.parametrize("layout", ["tp1", "tp2", "tp1x2"])
def test_on_the_cpu_platform_the_machine_is_paid(layout: str) -> None:
    assert units_of(layout, {"platform": "cpu", "count": 16}) == 16


# -- what is assumed -------------------------------------------------------------------------------------------------


def stored(*sessions: Sequence[float], recorded: str = "2026-11-20T08:00:00Z") -> InMemoryBaselines:
    baseline = Baseline(key(), tuple(session_of(*factors, recorded=recorded) for factors in sessions))
    return InMemoryBaselines({key().path: baseline_to_text(baseline)})


BEFORE = "2026-11-21T00:00:00Z"


def test_without_stored_starts_the_documented_spread_is_assumed() -> None:
    for store in (None, InMemoryBaselines(), stored([1.0]), InMemoryBaselines({key().path: "{"})):
        assert start_priors(store, key(), seconds=10, before=BEFORE)("median_tpot_ms") == NOISE_PRIORS["cuda"]


def test_few_stored_starts_are_weighed_with_the_documented_spread() -> None:
    prior = start_priors(stored([0.98, 1.0, 1.02]), key(), seconds=10, before=BEFORE)("median_tpot_ms")

    squares = sum((math.log(f) - math.log(0.98 * 1.02) / 3) ** 2 for f in (0.98, 1.0, 1.02))
    assert prior.start_df == 6
    assert prior.start_sd == pytest.approx(math.sqrt((4 * 0.015**2 + squares) / 6), rel=1e-3)
    assert prior.source == "the stored starts and the documented prior"


def test_enough_stored_starts_take_its_place() -> None:
    store = stored(*[[0.9, 1.0, 1.1]] * 4)
    prior = start_priors(store, key(), seconds=10, before=BEFORE)("median_tpot_ms")

    assert prior.start_df == 8
    assert prior.start_sd == pytest.approx(0.1004, abs=5e-4)
    assert prior.source == "the stored starts"
    many = start_priors(stored(*[[0.9, 1.0, 1.1]] * 30), key(), seconds=10, before=BEFORE)
    assert many("median_tpot_ms").start_df == 16


def test_what_this_run_has_stored_is_not_taken_for_other_evidence() -> None:
    store = stored([0.9, 1.0, 1.1], recorded=BEFORE)

    assert start_priors(store, key(), seconds=10, before=BEFORE)("median_tpot_ms") == NOISE_PRIORS["cuda"]


def test_short_starts_are_assumed_to_spread_more() -> None:
    prior = start_priors(None, key(), seconds=0.4, before=BEFORE)("median_tpot_ms")
    longer = start_priors(None, key(), seconds=60, before=BEFORE)("median_tpot_ms")

    assert prior.start_sd == pytest.approx(0.075)  # 1.5 % times the square root of 10 s / 0.4 s
    assert prior.source == "the documented prior for starts that measure less than 10 s"
    assert longer == NOISE_PRIORS["cuda"]


def test_stored_starts_that_are_few_are_weighed_with_the_spread_of_short_ones() -> None:
    store = stored([0.98, 1.0, 1.02])
    short, long = (start_priors(store, key(), seconds=s, before=BEFORE)("median_tpot_ms") for s in (2.5, 10))

    assert short.start_sd**2 - long.start_sd**2 == pytest.approx(4 * (0.03**2 - 0.015**2) / 6)


# -- the rule --------------------------------------------------------------------------------------------------------


def judged(ratio: float, factor: float, *, metric: str = "request_throughput", se: float = 0.02) -> RelativeVerdict:
    """Judge the last look at three starts of each, with a standard error of the ratio of ``se``."""
    level = Effect(math.log(10), se / math.sqrt(2), 8)
    own = Effect(level.size + math.log(ratio), level.se, 8)
    return judge_ratio(Claim(TP1, metric, factor), "tp2", (own, level), (3, 3), Look(3, 3))


@pytest.mark.parametrize(
    ("ratio", "factor", "status"),
    [
        (2.0, 1.5, "pass"),
        (1.2, 1.5, "fail"),
        (1.5, 1.5, "inconclusive"),
        (1.52, 1.5, "inconclusive"),
        (1.48, 1.5, "inconclusive"),
        (0.95, 0.8, "pass"),
        (1.0, 1.0, "inconclusive"),
    ],
)
def test_a_claim_passes_only_with_its_whole_interval(ratio: float, factor: float, status: str) -> None:
    verdict = judged(ratio, factor)

    assert verdict.status == status
    assert verdict.ratio == pytest.approx(ratio)
    assert verdict.values == pytest.approx((10 * ratio, 10))
    assert (verdict.ci[0] > factor) is (status == "pass")
    assert (verdict.ci[1] < factor) is (status == "fail")


def test_a_time_is_better_when_it_is_shorter() -> None:
    assert judged(0.5, 1.5, metric="median_ttft_ms").status == "pass"
    assert judged(2.0, 1.5, metric="median_ttft_ms").status == "fail"
    assert judged(0.5, 1.5, metric="median_ttft_ms").ratio == pytest.approx(2)


def test_the_bounds_are_at_the_levels_of_a_miss_and_of_a_false_alarm() -> None:
    verdict, df, look = judged(1.5, 1.0), 16.0, Look(3, 3)

    assert math.log(verdict.ci[0]) == pytest.approx(math.log(1.5) - 0.02 * t_quantile(1 - look.miss, df))
    assert math.log(verdict.ci[1]) == pytest.approx(math.log(1.5) + 0.02 * t_quantile(1 - look.alarm, df))
    assert look.miss == pytest.approx(0.05 / 3)
    assert look.alarm == pytest.approx(0.01 * 0.99)


def test_one_start_of_each_decides_only_what_is_beyond_doubt() -> None:
    own, other = Effect(math.log(11.5), 0.015, 4), Effect(math.log(10), 0.015, 4)
    claim = Claim(TP1, "request_throughput", 1.05)

    assert judge_ratio(claim, "tp2", (own, other), (1, 1), Look(1, 3)).status == "inconclusive"
    assert judge_ratio(claim, "tp2", (own, other), (2, 2), Look(2, 3)).status == "pass"
    assert judge_ratio(claim, "tp2", (own, other), (1, 1), Look(1, 1)).status == "pass"
    clear = replace(own, size=math.log(20))
    assert judge_ratio(claim, "tp2", (clear, other), (1, 1), Look(1, 3)).status == "pass"


def test_what_is_inconclusive_says_what_it_takes() -> None:
    near, nearest = judged(1.5675, 1.5), judged(1.5001, 1.5)

    assert near.enough is not None
    assert near.enough > 3
    assert f"{near.enough} starts of each would probably tell (--gpu-starts={near.enough}, " in near.what_it_takes
    assert nearest.enough is None
    assert nearest.what_it_takes == "even 10 starts of each would not tell 1.5 from 1.5 times here: claim less"
    assert judged(2.0, 1.5).what_it_takes == ""


@pytest.mark.parametrize(
    ("own", "other", "factor", "status"),
    [
        (8.55, 6.21, 1.2, "pass"),  # DeepSeek-R1-Distill-Qwen-7B: 1.377 times with twice the GPUs
        (8.55, 6.21, 1.5, "fail"),
        (6.10, 4.14, 1.2, "pass"),  # DeepSeek-R1-Distill-Llama-8B: 1.473 times
        (6.10, 4.14, 2.0, "fail"),
        (2.80, 6.21, 1.0, "fail"),  # tp1 beside a second GPU against tp1 alone
    ],
)
def test_published_throughputs_of_one_and_two_rtx_4090(own: float, other: float, factor: float, status: str) -> None:
    """``random-300``, one run of each: the spread between starts is the documented one."""
    levels = level_of([sample(own)], PRIOR), level_of([sample(other)], PRIOR)

    verdict = judge_ratio(Claim(TP1, "request_throughput", factor), "tp2", levels, (1, 1), Look(1, 1))

    assert verdict.status == status
    assert verdict.ratio == pytest.approx(own / other)


@pytest.mark.parametrize(("true_ratio", "factor"), [(1.5, 1.5), (1.0, 1.0)])
def test_a_claim_that_is_not_true_seldom_passes_and_one_that_is_seldom_fails(
    true_ratio: float, factor: float
) -> None:
    """At the very limit, with noise as the prior says: 5 % and 1 % at most."""
    chance, found = random.Random(1), {"pass": 0, "fail": 0, "inconclusive": 0}
    claim, gates = Claim(TP1, "request_throughput", factor), 2000
    for _ in range(gates):
        sides: list[Effect] = []
        for ratio in (true_ratio, 1.0):
            sides.append(level_of([sample(ratio * chance.lognormvariate(0, 0.015)) for _ in range(3)], PRIOR))
        found[judge_ratio(claim, "tp2", (sides[0], sides[1]), (3, 3), Look(3, 3)).status] += 1

    assert found["pass"] / gates < 0.05
    assert found["fail"] / gates < 0.02
    assert found["pass"] > 0


# -- the gate --------------------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """Starts servers whose times are what is written down for each start of a layout."""

    factors: dict[str, list[float]]
    problems: dict[str, list[Problem | None]] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def contestant(self, layout: str, *starts: float, problem: Problem | None = None, **parts: Any) -> Contestant:
        measurement = measurement_of(layout=layout, **parts)
        for start in starts:
            measurement = measurement.with_run(run_of(start, start), (problem,) if problem else ())
        return Contestant(measurement, self.again(layout), PRIOR)

    def again(self, layout: str) -> Callable[[Measurement], Measurement]:
        def measure_again(measurement: Measurement) -> Measurement:
            self.started.append(layout)
            factor = self.factors[layout].pop(0)
            found = self.problems.get(layout) or [None]
            problem = found.pop(0)
            return measurement.with_run(run_of(factor, factor), (problem,) if problem else ())

        return measure_again

    def inputs(self, starts: int = 3, *, most: int | None = None) -> ClaimInputs:
        return ClaimInputs(starts, lambda made: most is not None and made >= most, self.said.append)


THROUGHPUT = Claim(TP1, "request_throughput", 1.5)


def test_what_is_beyond_doubt_starts_nothing() -> None:
    machine = Machine({})

    verdict, own, other = judge_claim(
        THROUGHPUT, machine.contestant("tp2", 0.25), machine.contestant("tp1", 1.0), machine.inputs()
    )

    assert (verdict.status, verdict.starts) == ("pass", (1, 1))
    assert machine.started == []
    assert (len(own.runs), len(other.runs)) == (1, 1)


def test_both_layouts_are_started_again_in_turn_until_it_is_clear() -> None:
    machine = Machine({"tp1": [1.01, 0.99], "tp2": [0.6, 0.61]})

    verdict, own, other = judge_claim(
        THROUGHPUT, machine.contestant("tp2", 0.6), machine.contestant("tp1", 1.0), machine.inputs()
    )

    assert (verdict.status, verdict.starts) == ("pass", (2, 2))
    assert machine.started == ["tp1", "tp2"]
    assert (len(own.runs), len(other.runs)) == (2, 2)
    assert machine.said[0].startswith("tp2: tp2 is 1.67 times as good as tp1 in request_throughput, more than 1.5 ")


def test_the_layout_with_fewer_starts_catches_up_first() -> None:
    machine = Machine({"tp1": [1.0, 1.0], "tp2": []})

    verdict, *_ = judge_claim(
        THROUGHPUT, machine.contestant("tp2", 0.66, 0.665, 0.67), machine.contestant("tp1", 1.0), machine.inputs()
    )

    assert machine.started == ["tp1", "tp1"]
    assert (verdict.status, verdict.starts) == ("inconclusive", (3, 3))
    assert verdict.what_it_takes


def test_one_start_of_each_is_all_that_is_made_where_no_more_is_allowed() -> None:
    machine = Machine({})

    verdict, *_ = judge_claim(
        THROUGHPUT, machine.contestant("tp2", 0.6), machine.contestant("tp1", 1.0), machine.inputs(starts=1)
    )

    assert (verdict.status, machine.started) == ("pass", [])


def test_the_budget_ends_measuring() -> None:
    machine = Machine({"tp1": [1.0], "tp2": [0.66]})

    verdict, *_ = judge_claim(
        THROUGHPUT, machine.contestant("tp2", 0.66), machine.contestant("tp1", 1.0), machine.inputs(most=2)
    )

    assert verdict.status == "inconclusive"
    assert machine.started == ["tp1", "tp2"]


def test_per_gpu_a_larger_layout_must_be_that_much_better() -> None:
    machine, claim = Machine({}), Claim(TP1, "request_throughput_per_gpu", 1.0)

    verdict, *_ = judge_claim(
        claim, machine.contestant("tp4", 0.5), machine.contestant("tp1", 1.0), machine.inputs(starts=1)
    )

    assert verdict.status == "fail"
    assert verdict.ratio == pytest.approx(0.5)
    assert verdict.values == pytest.approx((0.5, 1.0))
    assert verdict.unit == "req/s per GPU"


DISTURBED = Problem("foreign-process", "somebody computed")


def test_a_disturbed_start_of_either_is_replaced() -> None:
    machine = Machine({"tp1": [1.0], "tp2": [0.25]})
    own, other = (machine.contestant(layout, 9.0, problem=DISTURBED) for layout in ("tp2", "tp1"))

    verdict, mine, theirs = judge_claim(THROUGHPUT, own, other, machine.inputs(starts=1))

    assert verdict.status == "pass"
    assert (len(mine.runs), len(theirs.runs)) == (1, 1)
    assert sorted(machine.started) == ["tp1", "tp2"]


def test_numbers_that_stay_unsound_are_no_verdict() -> None:
    machine = Machine({})
    own = machine.contestant("tp2", 0.5, problem=Problem("token-counts", "not counted"))

    with pytest.raises(MeasurementError) as error:
        judge_claim(THROUGHPUT, own, machine.contestant("tp1", 1.0), machine.inputs())
    assert str(error.value).startswith(
        "sound numbers of both layouts were required, those of tp2 are not\n  token-counts: not counted"
    )
    assert machine.started == []


def test_who_disturbs_and_stays_leaves_the_numbers_unsound() -> None:
    def busy(measurement: Measurement) -> Measurement:
        raise DevicesBusy("GPU 0 is taken", pids=(1,))

    machine = Machine({})
    other = replace(machine.contestant("tp1", 1.0, problem=DISTURBED), measure_again=busy)

    with pytest.raises(GpuLayoutError, match="those of tp1 are not"):
        judge_claim(THROUGHPUT, machine.contestant("tp2", 0.5), other, machine.inputs())


@pytest.mark.parametrize(
    ("parts", "field_name"),
    [
        ({"workload": {"name": "small", "fingerprint": "0123456789ab"}}, "workload.fingerprint"),
        ({"model": {"name": "org/other", "revision": "", "dtype": "", "arguments": ""}}, "model.name"),
    ],
)
def test_another_model_or_load_is_refused(parts: dict[str, Any], field_name: str) -> None:
    machine = Machine({})

    with pytest.raises(MeasurementError, match=r"^two layouts can be compared where they served the same model") as e:
        judge_claim(
            THROUGHPUT, machine.contestant("tp2", 0.5), machine.contestant("tp1", 1.0, **parts), machine.inputs()
        )
    assert f"  {field_name}: tp2 " in str(e.value)


def test_the_same_load_by_another_name_is_the_same() -> None:
    own, other = key(), key(layout="tp1")
    renamed = replace(other, workload={**other.workload, "name": "another"})

    assert load_differences(own, renamed) == ()


def test_a_metric_that_was_not_measured_cannot_be_claimed() -> None:
    machine = Machine({})

    with pytest.raises(MeasurementError, match=r"^request_goodput of every start was required"):
        judge_claim(
            Claim(TP1, "request_goodput", 1.0),
            machine.contestant("tp2", 0.5),
            machine.contestant("tp1", 1.0),
            machine.inputs(),
        )


# -- telling ---------------------------------------------------------------------------------------------------------


def test_a_failed_claim_says_what_was_claimed_and_found_where_and_what_next() -> None:
    lines = relative_lines(judged(1.2, 1.5), "layout tp2 on 2 x NVIDIA H200 (GPU 0, 1)", "t.py::test_it[tp1]")

    assert lines == [
        "fail: tp2 is required to be more than 1.5 times as good as tp1 in request_throughput, found 1.2 times",
        "    12.0 req/s against 10.0 req/s, interval 1.15 to 1.26 times, n = 3 starts against 3",
        "  layout tp2 on 2 x NVIDIA H200 (GPU 0, 1)",
        "  tp1 was measured by t.py::test_it[tp1]",
        "  claim less, or see in the table of layouts what holds it back",
    ]


def test_the_record_has_what_the_verdict_rests_on() -> None:
    record = relative_record(judged(2.0, 1.5), {"name": "small"})

    assert record["kind"] == "better-than"
    assert (record["layout"], record["other"], record["metric"]) == ("tp2", "tp1", "request_throughput")
    assert (record["verdict"], record["factor"], record["starts"]) == ("pass", 1.5, [3, 3])
    assert record["ratio"] == pytest.approx(2)
    assert record["text"].startswith(
        "tp2 is 2 times as good as tp1 in request_throughput, more than 1.5 times was cl"
    )
