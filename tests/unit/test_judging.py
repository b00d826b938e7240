"""The gate's use case: modes, looks, budget, waivers, what is stored, and what is never a pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from pytest_gpulayout.baseline import Baseline, BaselineSession, LevelStart
from pytest_gpulayout.baseline_text import baseline_from_text, baseline_to_text
from pytest_gpulayout.errors import (
    BaselineCorrupt,
    BaselineError,
    BaselineForeign,
    BaselineNotFound,
    DevicesBusy,
)
from pytest_gpulayout.judging import (
    NOISE_PRIORS,
    BaselineMode,
    GateInputs,
    GatePolicy,
    judge_once,
    judge_performance,
    what_changed,
)
from pytest_gpulayout.measurement import Measurement
from pytest_gpulayout.reasons import what_it_takes, why_open
from pytest_gpulayout.stats import NoisePrior
from pytest_gpulayout.testing import InMemoryBaselines
from pytest_gpulayout.tolerance import Tolerance, parse_tolerances
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.validity import Problem
from pytest_gpulayout.verdict import Look, MetricVerdict, Requirement, Status, Verdict
from tests.support.measurements import baseline_of, identity, key, measurement_of, plain_session, run_of, session_of

CALM = NoisePrior(start_sd=0.004, session_sd=0.004)
NOW = "2026-11-21T08:00:00Z"
WAVES = [1.0, 1.004, 0.996, 1.002, 0.998, 1.003, 0.997, 1.001, 0.999]
"""Session means that differ by 0.3 %."""


def steady(level: float = 1.0, sessions: int = 9) -> Baseline:
    """Sessions of three starts, with a spread of their own."""
    return baseline_of(*([level * wave * start for start in (1.0, 1.002, 0.998)] for wave in WAVES[:sessions]))


STEADY = steady()
PLACE = f"memory/{key().path}"


@dataclass
class Gate:
    """A gate whose fresh starts are scripted. :param later: factor or run of each start after the first.

    :param seconds: how long a start takes, on a clock that moves only by that.
    """

    store: InMemoryBaselines = field(default_factory=InMemoryBaselines)
    later: list[float | RunTrace] = field(default_factory=list)
    mode: BaselineMode = "check"
    starts: int = 3
    prior: NoisePrior = CALM
    budget_s: float | None = None
    seconds: float = 10.0
    tolerances: Mapping[str, Tolerance] = field(default_factory=lambda: parse_tolerances(""))
    may_write: bool = True
    now: str = NOW
    measured: int = 1
    said: list[str] = field(default_factory=list)

    def judge(self, measurement: Measurement) -> Verdict:
        verdict, self.measurement = judge_performance(measurement, self._inputs())
        return verdict

    def _inputs(self) -> GateInputs[Measurement]:
        policy = GatePolicy(self.mode, self.tolerances, self.prior, self.starts, self.budget_s, self.may_write)
        return GateInputs(
            self.store, policy, self._again, lambda: self.now, lambda: self.measured * self.seconds, self.said.append
        )

    def _again(self, measurement: Measurement) -> Measurement:
        self.measured += 1
        following = self.later.pop(0)
        return measurement.with_run(following if isinstance(following, RunTrace) else run_of(following, following))


def holding(*baselines: Baseline) -> InMemoryBaselines:
    return InMemoryBaselines({baseline.key.path: baseline_to_text(baseline) for baseline in baselines})


# -- modes -----------------------------------------------------------------------------------------------------------


def test_check_judges_against_what_is_stored() -> None:
    gate = Gate(holding(STEADY))
    verdict = gate.judge(measurement_of(1.0))
    assert (verdict.status, verdict.reasons, verdict.stored, gate.measured) == (Status.PASS, (), "", 1)
    assert gate.said == []
    assert [metric.name for metric in verdict.metrics] == ["request_throughput", "median_ttft_ms", "median_tpot_ms"]
    assert verdict.baseline_path == PLACE
    assert not verdict.provisional


def test_check_fails_without_a_baseline_and_says_how_to_record_it() -> None:
    with pytest.raises(BaselineNotFound) as error:
        Gate().judge(measurement_of(1.0))
    assert str(error.value) == (
        "a stored baseline was required, and there is none\n"
        f"  expected in {PLACE}\n"
        "  record it: run the same command with --gpu-baseline=new"
    )
    assert error.value.path == PLACE


@pytest.mark.parametrize("mode", ["check", "new"])
def test_a_regression_needs_a_second_start(mode: BaselineMode) -> None:
    gate = Gate(holding(STEADY), later=[1.5], mode=mode)
    verdict = gate.judge(measurement_of(1.5))
    assert (verdict.status, gate.measured) == (Status.REGRESSION, 2)
    assert len(gate.measurement.runs) == 2


def test_new_records_what_is_missing_on_all_starts() -> None:
    gate = Gate(later=[1.1, 1.2], mode="new")
    verdict = gate.judge(measurement_of(1.0))
    assert (verdict.status, verdict.stored, gate.measured) == (Status.NO_BASELINE, "recorded", 3)
    assert verdict.reasons == (
        f"recorded from 3 server starts in {verdict.baseline_path}",
        "nothing was judged: run again to check against it",
    )
    stored = baseline_from_text(gate.store.texts[key().path], "x")
    assert stored == Baseline(key(), (session_of(1.0, 1.1, 1.2, recorded=NOW),))
    assert not verdict.status.passed


def test_new_leaves_what_is_stored_alone() -> None:
    gate = Gate(holding(STEADY), mode="new")
    before = dict(gate.store.texts)
    assert gate.judge(measurement_of(1.0)).status is Status.PASS
    assert gate.store.texts == before


def stored_in(gate: Gate) -> Baseline:
    return baseline_from_text(gate.store.texts[key().path], "x")


def test_update_goes_on_with_the_level_where_nothing_moved() -> None:
    gate = Gate(holding(STEADY), later=[1.001, 0.999], mode="update")
    verdict = gate.judge(measurement_of(1.0))
    assert (verdict.status, verdict.stored) == (Status.NO_BASELINE, "updated")
    assert verdict.reasons == (
        f"recorded from 3 server starts in {PLACE}",
        "nothing was judged: run again to check against it",
        "nothing got clearly better or worse: one more session beside those stored",
    )
    assert [metric.status for metric in verdict.metrics] == [Status.PASS] * 3
    assert stored_in(gate).sessions == (*STEADY.sessions, session_of(1.0, 1.001, 0.999, recorded=NOW))


@pytest.mark.parametrize(("factor", "word"), [(1.5, "worse"), (0.5, "better")])
def test_update_begins_a_new_level_and_says_what_moved(factor: float, word: str) -> None:
    gate = Gate(holding(STEADY), later=[factor, factor], mode="update")
    verdict = gate.judge(measurement_of(factor))
    [told] = [reason for reason in verdict.reasons if "median_ttft_ms" in reason]
    ttft = told.removeprefix("a new level begins here: ")
    assert ttft.endswith(f" ms ({factor - 1:+.1%}, {word})")
    assert (verdict.status, verdict.stored, len(verdict.metrics)) == (Status.NO_BASELINE, "updated", 3)
    old, new = stored_in(gate).levels()
    assert (old, len(new)) == (STEADY.sessions, 1)
    assert new[0].begins is not None
    assert ttft in new[0].begins.changes
    assert Gate(gate.store).judge(measurement_of(factor)).status is not Status.REGRESSION


class Hurried(InMemoryBaselines):
    """Somebody else writes between this gate's first look and its writing. :param text: what they write."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._theirs = text

    def update(self, path: str, change: Callable[[str | None], str | None]) -> bool:
        self.texts[path] = self._theirs
        return super().update(path, change)


@pytest.mark.parametrize(("factor", "status"), [(1.0, Status.PASS), (1.5, Status.REGRESSION)])
def test_new_judges_against_what_somebody_else_recorded_in_the_meantime(factor: float, status: Status) -> None:
    store = Hurried(baseline_to_text(STEADY))
    verdict = Gate(store, later=[factor] * 3, mode="new").judge(measurement_of(factor))
    assert (verdict.status, verdict.stored) == (status, "")
    assert store.texts == {key().path: baseline_to_text(STEADY)}


def test_update_adds_to_what_somebody_else_recorded_in_the_meantime() -> None:
    gate = Gate(Hurried(baseline_to_text(STEADY)), later=[1.0, 1.0], mode="update")
    assert gate.judge(measurement_of(1.0)).stored == "updated"
    assert stored_in(gate).sessions[:-1] == STEADY.sessions


def test_what_was_recorded_is_judged_against_the_next_time() -> None:
    gate = Gate(later=[1.0, 1.0], mode="new")
    gate.judge(measurement_of(1.0))
    again = Gate(gate.store, tolerances=parse_tolerances("median_tpot_ms=9%,median_ttft_ms=9%,request_throughput=9%"))
    assert again.judge(measurement_of(1.0)).status is Status.PASS


def test_new_records_nothing_where_nothing_may_be_written() -> None:
    gate = Gate(mode="new", may_write=False)
    with pytest.raises(BaselineNotFound, match=r"-baseline=new, and not in CI, where nothing is written \(or add "):
        gate.judge(measurement_of(1.0))
    assert (gate.store.texts, gate.measured) == ({}, 1)
    assert Gate(holding(STEADY), mode="new", may_write=False).judge(measurement_of(1.0)).status is Status.PASS


def test_update_changes_nothing_where_nothing_may_be_written() -> None:
    gate = Gate(holding(STEADY), mode="update", may_write=False)
    with pytest.raises(BaselineError, match=r"in CI nothing is written\n  in memory/.*\n  record it elsewhere and "):
        gate.judge(measurement_of(1.0))
    assert stored_in(gate) == STEADY


def test_off_judges_nothing_and_is_no_pass() -> None:
    gate = Gate(holding(STEADY), mode="off")
    verdict = gate.judge(measurement_of(9.0))
    assert (verdict.status, verdict.metrics, gate.measured) == (Status.NO_BASELINE, (), 1)
    assert verdict.reasons == ("not judged: --gpu-baseline=off",)
    assert "median_tpot_ms" in [row.name for row in verdict.advisory]


# -- the sequence of starts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "later", "starts", "status", "measured"),
    [
        (1.0, [], 3, Status.PASS, 1),
        (0.5, [0.5], 3, Status.IMPROVEMENT, 2),
        (0.5, [], 1, Status.IMPROVEMENT, 1),
        (1.5, [1.5], 3, Status.REGRESSION, 2),
        (1.5, [1.5], 1, Status.REGRESSION, 2),  # the second one confirms
        (1.5, [0.9], 1, Status.INCONCLUSIVE, 2),
        (1.07, [1.0, 1.0], 3, Status.PASS, 3),
    ],
)
def test_starts_until_the_verdict_is_clear(
    first: float, later: list[float | RunTrace], starts: int, status: Status, measured: int
) -> None:
    gate = Gate(holding(STEADY), later=later, starts=starts)
    assert (gate.judge(measurement_of(first)).status, gate.measured) == (status, measured)


UNSTEADY = baseline_of(*([1 + 4 * (wave - 1) + shift for shift in (0.0, 0.02, -0.02)] for wave in WAVES))
"""Sessions among which two starts do not decide a change of 10 %, and three do."""


@pytest.mark.parametrize(("confirming", "status"), [(1.1, Status.REGRESSION), (0.98, Status.INCONCLUSIVE)])
def test_a_regression_of_the_last_look_is_confirmed_by_one_more_start(confirming: float, status: Status) -> None:
    gate = Gate(holding(UNSTEADY), later=[1.1, 1.1, confirming])
    verdict = gate.judge(measurement_of(1.1))
    assert (verdict.status, gate.measured) == (status, 4)
    assert gate.said[-1].startswith("start 3 of at most 3 shows a regression of request_throughput (-9.1%, between -")
    assert gate.said[-1].endswith("): one more to confirm it")
    [tpot] = [metric for metric in verdict.metrics if metric.name == "median_tpot_ms"]
    assert (tpot.n_current, tpot.n_confirming) == (3, 1)
    assert tpot.change == pytest.approx(0.1, abs=2e-3)
    unconfirmed = "1 of 4 starts did not change, so a few slow ones may be all of it; more starts narrow it"
    assert (unconfirmed in "".join(verdict.reasons)) == (status is Status.INCONCLUSIVE)


def test_each_further_start_is_announced_with_its_reason() -> None:
    gate = Gate(holding(STEADY), later=[1.5])
    gate.judge(measurement_of(1.5))
    [line] = gate.said
    assert line.startswith("start 1 of at most 3 does not decide request_throughput (-33.3%, between ")
    assert line.endswith("): one more")


@pytest.mark.parametrize(("budget_s", "measured"), [(39.0, 3), (40.0, 4)])
def test_no_time_to_confirm_a_regression_leaves_it_one(budget_s: float, measured: int) -> None:
    gate = Gate(holding(UNSTEADY), later=[1.1] * 3, seconds=10.0, budget_s=budget_s)
    assert (gate.judge(measurement_of(1.1)).status, gate.measured) == (Status.REGRESSION, measured)


def test_what_cannot_be_decided_is_inconclusive_and_says_what_it_takes() -> None:
    gate = Gate(holding(baseline_of([1.0, 1.001])), later=[1.0, 1.0], prior=NOISE_PRIORS["cpu"])
    verdict = gate.judge(measurement_of(1.0))
    assert (verdict.status, gate.measured) == (Status.INCONCLUSIVE, 3)
    assert [reason.partition(":")[0] for reason in verdict.reasons] == [m.name for m in verdict.metrics]
    assert "a change of 8% cannot be ruled out with 3 starts now and 1 stored session: " in verdict.reasons[1]
    assert verdict.provisional == "1 stored session; the spread rests partly on the documented prior"


OPEN = MetricVerdict(
    "median_ttft_ms", Status.INCONCLUSIVE, 100.0, 104.0, 0.04, (-0.02, 0.1312), 0.08, 0.0921, 3, 9, 3
)


@pytest.mark.parametrize(
    ("metric", "starts", "told"),
    [
        (replace(OPEN, requirement=Requirement(5, 3, 0.05)), 3, "allow more starts (--gpu-starts=5), or {accept}"),
        (
            replace(OPEN, requirement=Requirement(2, 3, 0.05)),
            3,
            "it lies near the limit; more starts narrow it (--gpu-starts=5), or {accept}",
        ),
        (
            replace(OPEN, n_current=10, requirement=Requirement(2, 3, 0.05)),
            10,
            "it lies near the limit; more stored sessions narrow it (gpulayout baseline approve RESULTS.json), "
            "or {accept}",
        ),
        (
            replace(OPEN, requirement=Requirement(None, 8, 0.05)),
            3,
            "store 8 sessions (--gpu-baseline=update, or gpulayout baseline approve RESULTS.json) and allow 10 "
            "starts, or {accept}",
        ),
        (
            replace(OPEN, requirement=Requirement(None, None, 0.0712)),
            3,
            "this machine's noise hides changes below 7.2% whatever is measured: {accept}, or compare in pairs "
            "(--gpu-base)",
        ),
        (
            replace(OPEN, n_current=1, requirement=Requirement(2, 3, 0.05)),
            3,
            "the budget ended before 3 starts; allow more seconds (--gpu-budget), or {accept}",
        ),
        (
            replace(OPEN, n_current=3, ordinary_starts=1, requirement=Requirement(2, 3, 0.05)),
            3,
            "1 of 3 starts did not change, so a few slow ones may be all of it; more starts narrow it "
            "(--gpu-starts=5), or {accept}",
        ),
        (OPEN, 3, "{accept}"),
    ],
)
def test_what_a_verdict_would_take(metric: MetricVerdict, starts: int, told: str) -> None:
    accept = "accept a larger tolerance (--gpu-tolerance=median_ttft_ms=13.2%)"
    assert what_it_takes(metric, starts) == told.format(accept=accept)


@pytest.mark.parametrize(
    ("metric", "unknown"),
    [
        (OPEN, "a change of 8% cannot be ruled out with"),
        (replace(OPEN, ci=(-0.05, 0.06)), "changes below 9.3% could go unseen with"),
        (
            replace(OPEN, name="request_throughput", ci=(-0.06, 0.3)),  # 30 % more is no worse
            "changes below 9.3% could go unseen with",
        ),
        (replace(OPEN, ci=(-0.05, 0.06), min_detectable=0.04), "a change of 8% cannot be ruled out with"),
    ],
)
def test_what_an_open_verdict_leaves_unknown(metric: MetricVerdict, unknown: str) -> None:
    [reason] = why_open([metric], 3)
    assert unknown in reason


def test_the_tolerance_that_is_advised_would_have_passed() -> None:
    baseline = baseline_of([1.0, 1.001], [1.0, 1.002])
    verdict = once(measurement_of(1.02, 1.02), baseline, prior=NOISE_PRIORS["cuda"])
    assert verdict.status is Status.INCONCLUSIVE
    advised = [
        reason.partition("--gpu-tolerance=")[2].partition(")")[0]
        for reason in verdict.reasons
        if "--gpu-tolerance=" in reason
    ]
    assert len(advised) == sum(metric.status is Status.INCONCLUSIVE for metric in verdict.metrics)
    relaxed = once(measurement_of(1.02, 1.02), baseline, ",".join(advised), prior=NOISE_PRIORS["cuda"])
    assert relaxed.status is Status.PASS


@pytest.mark.parametrize(("budget_s", "measured"), [(5, 1), (19, 1), (20, 2), (29, 2), (30, 3), (1000, 3), (None, 3)])
def test_no_start_that_would_end_after_the_budget(budget_s: float | None, measured: int) -> None:
    modes: tuple[BaselineMode, ...] = ("check", "update")
    for mode in modes:
        few = holding(baseline_of([1.0, 1.001]))
        gate = Gate(few, later=[1.0, 1.0], prior=NOISE_PRIORS["cpu"], budget_s=budget_s, mode=mode)
        gate.judge(measurement_of(1.0))
        assert gate.measured == measured


def test_when_the_budget_allows_one_start_it_is_the_last_look() -> None:
    gate = Gate(holding(STEADY), budget_s=5)
    assert gate.judge(measurement_of(1.5)).status is Status.REGRESSION


# -- what must not be judged or stored -------------------------------------------------------------------------------

BROKEN = run_of(1.0, 1.0, error="HTTP 500: boom")


@pytest.mark.parametrize("mode", ["check", "new", "update", "off"])
@pytest.mark.parametrize("runs", [(), (BROKEN,), (run_of(1.0, 1.0), BROKEN)])
def test_an_invalid_measurement_is_never_judged_or_stored(mode: BaselineMode, runs: tuple[RunTrace, ...]) -> None:
    gate = Gate(mode=mode)
    verdict = gate.judge(replace(measurement_of(1.0), runs=runs))
    assert verdict.status is Status.INVALID
    assert not verdict.status.passed
    told = f"; the first: HTTP 500: boom (server start {len(runs)})" if runs else "no server start was measured"
    assert verdict.reasons[-1].endswith(told)
    assert (gate.store.texts, gate.measured, verdict.baseline_path) == ({}, 1, PLACE)


@pytest.mark.parametrize("mode", ["check", "new", "update"])
@pytest.mark.parametrize("later", [[BROKEN], [1.0, BROKEN]])
def test_problems_of_a_later_start_count_as_well(mode: BaselineMode, later: list[float | RunTrace]) -> None:
    store = InMemoryBaselines() if mode == "new" else holding(baseline_of([1.0, 1.001]))
    before = dict(store.texts)
    gate = Gate(store, later=list(later), mode=mode, prior=NOISE_PRIORS["cpu"])
    verdict = gate.judge(measurement_of(1.0))
    number = len(later) + 1
    assert verdict.status is Status.INVALID
    told = f"failed-requests: 2 of 2 requests failed; the first: HTTP 500: boom (server start {number})"
    assert verdict.reasons == (told,)
    assert store.texts == before


@dataclass
class DisturbedGate(Gate):
    """A gate with starts that have problems. :param problems: of each start, in the order they are made, from 1."""

    problems: Mapping[int, tuple[Problem, ...]] = field(default_factory=dict)

    def judge(self, measurement: Measurement) -> Verdict:
        return super().judge(replace(measurement, disturbances={0: self.problems.get(1, ())}))

    def _again(self, measurement: Measurement) -> Measurement:
        longer = super()._again(measurement)
        found = self.problems.get(self.measured, ())
        return replace(longer, disturbances={**longer.disturbances, len(longer.runs) - 1: found})


HOT, BUSY = Problem("throttled", "the GPU was hot"), Problem("foreign-process", "others used 70 %")
WRONG = Problem("token-counts", "7 too many")
TOOK = "a server start was disturbed, and measured anew"


@pytest.mark.parametrize(
    ("problems", "told"),
    [
        ({1: (HOT,)}, [f"{TOOK} (throttled: the GPU was hot)"]),
        ({2: (HOT, BUSY)}, [f"{TOOK} (throttled: the GPU was hot; foreign-process: others used 70 %)"]),
        (
            {1: (HOT,), 2: (BUSY,)},
            [f"{TOOK} (throttled: the GPU was hot)", f"{TOOK} (foreign-process: others used 70 %)"],
        ),
    ],
)
@pytest.mark.parametrize("mode", ["check", "new", "update"])
def test_fresh_starts_take_the_place_of_disturbed_ones(
    mode: BaselineMode, problems: Mapping[int, tuple[Problem, ...]], told: list[str]
) -> None:
    gate = DisturbedGate(InMemoryBaselines() if mode == "new" else holding(baseline_of([1.0, 1.001])), mode=mode)
    # the numbers of the disturbed starts would show: none of them may count
    gate.later = [9.0 if n in problems else 1.0 for n in range(2, 6)]
    gate.problems, gate.prior = problems, NOISE_PRIORS["cpu"]

    verdict = gate.judge(measurement_of(9.0 if 1 in problems else 1.0))

    assert verdict.status is (Status.INCONCLUSIVE if mode == "check" else Status.NO_BASELINE)
    assert [reason for reason in verdict.reasons if TOOK in reason] == told
    assert gate.measured == 3 + len(problems)
    assert [sample.value for sample in gate.measurement.samples("median_tpot_ms")] == [10.0] * 3
    assert len(gate.measurement.observed()) == 3
    announced = [line for line in gate.said if "is measured anew" in line]
    assert len(announced) == len(problems)
    assert announced[0].startswith(f"server start {min(problems)} was disturbed, ")
    if mode != "check":
        assert len(stored_in(gate).sessions[-1].runs) == 3


@pytest.mark.parametrize(
    "problems",
    [
        {1: (HOT,), 2: (HOT,), 3: (HOT,)},
        {1: (HOT,), 2: (WRONG,)},
        {1: (WRONG,)},
        {2: (HOT, WRONG)},
    ],
)
@pytest.mark.parametrize("mode", ["check", "new", "update"])
def test_what_stays_wrong_or_is_no_disturbance_is_invalid(
    mode: BaselineMode, problems: Mapping[int, tuple[Problem, ...]]
) -> None:
    gate = DisturbedGate(InMemoryBaselines() if mode == "new" else holding(baseline_of([1.0, 1.001])), mode=mode)
    gate.later, gate.prior, gate.problems = [1.0] * 5, NOISE_PRIORS["cpu"], problems
    before = dict(gate.store.texts)

    verdict = gate.judge(measurement_of(1.0))

    assert verdict.status is Status.INVALID
    assert str(problems[max(problems)][-1]) in verdict.reasons[len(problems[max(problems)]) - 1]
    assert sum(TOOK in reason for reason in verdict.reasons) == len(gate.measurement.replaced) == len(problems) - 1
    assert (gate.measured, gate.store.texts) == (max(problems), before)


def test_who_is_still_there_is_the_reason() -> None:
    class Busy(DisturbedGate):
        def _again(self, measurement: Measurement) -> Measurement:
            raise DevicesBusy("idle GPUs were required", pids=[4242])

    verdict = Busy(problems={1: (BUSY,)}).judge(measurement_of(1.0))

    assert verdict.status is Status.INVALID
    assert verdict.reasons == ("foreign-process: others used 70 % (server start 1)",)


def test_no_start_is_replaced_where_nothing_is_judged_or_the_budget_is_over() -> None:
    for gate in (DisturbedGate(mode="off"), DisturbedGate(budget_s=15)):
        gate.problems = {1: (HOT,)}
        assert gate.judge(measurement_of(1.0)).status is Status.INVALID
        assert gate.measured == 1


@pytest.mark.parametrize("mode", ["check", "new", "update"])
def test_a_corrupt_baseline_is_an_error(mode: BaselineMode) -> None:
    store = InMemoryBaselines({key().path: baseline_to_text(STEADY)[:100]})
    with pytest.raises(BaselineCorrupt, match=f"this file is none: it is not JSON .*\n  in {PLACE}\n  restore it"):
        Gate(store, mode=mode).judge(measurement_of(1.0))


@pytest.mark.parametrize("mode", ["check", "new"])
def test_a_foreign_baseline_is_an_error_that_names_every_difference(mode: BaselineMode) -> None:
    foreign = baseline_of([1.0], hardware={"memory_gib": 80}, protocol=2)
    store = InMemoryBaselines({key().path: baseline_to_text(foreign)})
    with pytest.raises(BaselineForeign) as error:
        Gate(store, mode=mode).judge(measurement_of(1.0))
    assert str(error.value) == (
        "a baseline of this model, layout, hardware and workload was required, the stored one is of another:\n"
        "  hardware.memory_gib: stored 80, now 141\n"
        "  protocol: stored 2, now 1\n"
        f"  in {PLACE}\n"
        "  replace it by what runs now: --gpu-baseline=update; or keep both: --gpu-baseline-dir=ANOTHER"
    )


def test_update_replaces_a_baseline_of_another_key_and_says_so() -> None:
    foreign = baseline_of([1.0], [1.0], hardware={"power_limit_w": 500})
    gate = Gate(InMemoryBaselines({key().path: baseline_to_text(foreign)}), later=[1.0, 1.0], mode="update")
    verdict = gate.judge(measurement_of(1.0))
    assert verdict.stored == "updated"
    assert "replaced the baseline of another key; hardware.power_limit_w: stored 500, now 700" in verdict.reasons
    stored = baseline_from_text(gate.store.texts[key().path], "x")
    assert (stored.key, len(stored.sessions)) == (key(), 1)


class Unreadable(InMemoryBaselines):
    def read(self, path: str) -> str | None:
        if path == "locked.json":
            raise BaselineError("no permission", path=path)
        return super().read(path)


def test_the_nearest_stored_key_is_named_with_what_differs() -> None:
    store = Unreadable(
        {
            "corrupt.json": "{",
            "locked.json": "",
            "near.json": baseline_to_text(baseline_of([1.0], hardware={"links": ["SYS"]})),
            "far.json": baseline_to_text(baseline_of([1.0], layout="tp4", hardware={"count": 4})),
        }
    )
    with pytest.raises(BaselineNotFound) as error:
        Gate(store).judge(measurement_of(1.0))
    assert str(error.value).split("\n")[2:] == [
        "  nearest is near.json, which differs in",
        "    hardware.links: stored 0-1 SYS, now 0-1 NV18",
        "  record it: run the same command with --gpu-baseline=new",
    ]


# -- one look --------------------------------------------------------------------------------------------------------


def once(measurement: Measurement, baseline: Baseline, tolerances: str = "", prior: NoisePrior = CALM) -> Verdict:
    policy = GatePolicy("check", parse_tolerances(tolerances), prior, starts=1)
    return judge_once(measurement, baseline, policy, Look(1, 1), place="here")


def sending(session: BaselineSession, batch_size: int) -> BaselineSession:
    return replace(session, runs=tuple(replace(run, requests=batch_size * 2) for run in session.runs))


def test_a_gated_metric_that_is_not_stored_has_no_baseline() -> None:
    only_tpot = Baseline(key(), (sending(plain_session(10.0, 10.0), 1),))
    verdict = once(measurement_of(1.0), only_tpot)
    assert verdict.status is Status.NO_BASELINE
    told = "is gated, and no stored session that can be compared has it; record it: --gpu-baseline=update"
    assert verdict.reasons[:2] == (f"request_throughput {told}", f"median_ttft_ms {told}")
    assert [metric.name for metric in verdict.metrics] == ["median_tpot_ms"]
    assert once(measurement_of(2.0), only_tpot).status is Status.REGRESSION


ONE_TOKEN = replace(measurement_of(1.0).workload, output_tokens=1)


def without_tpot(factor: float) -> RunTrace:
    """A run whose answers have one token."""
    run = run_of(factor, factor)
    batches = [
        replace(
            batch,
            requests=tuple(replace(one, output_tokens=1, chunk_ns=one.chunk_ns[:1]) for one in batch.requests),
        )
        for batch in run.batches
    ]
    return replace(run, batches=tuple(batches))


@pytest.mark.parametrize("mode", ["check", "new", "update"])
@pytest.mark.parametrize("later", [False, True])
def test_a_gated_metric_that_was_not_measured_makes_the_measurement_invalid(mode: BaselineMode, later: bool) -> None:
    store = InMemoryBaselines() if mode == "new" else holding(baseline_of([1.0, 1.1]))
    before = dict(store.texts)
    first = measurement_of(1.0)
    gate = Gate(store, later=[without_tpot(1.0), 1.0], mode=mode, prior=NOISE_PRIORS["cpu"])
    verdict = gate.judge(first if later else replace(first, runs=(without_tpot(1.0),)))
    starts = "1 start of 2" if later else "1 start of 1"
    assert verdict.status is Status.INVALID
    assert verdict.reasons[0].startswith(f"median_tpot_ms is gated, and {starts} did not measure it; ")
    assert store.texts == before


def test_a_gate_without_metrics_is_never_a_pass() -> None:
    for mode in ("check", "new", "update"):
        gate = Gate(holding(STEADY), mode=mode, tolerances={})
        verdict = gate.judge(measurement_of(1.0))
        assert verdict.status is Status.INVALID
        assert verdict.reasons == (
            "a gated metric was required, found none; name one: --gpu-tolerance=median_tpot_ms=5%",
        )
        assert stored_in(gate) == STEADY


TWO = run_of(1.0, 1.0)


@pytest.mark.parametrize("mode", ["check", "new", "update", "off"])
@pytest.mark.parametrize(
    ("run", "found"),
    [
        (run_of(1.0), "found 1 of 1"),
        (run_of(1.0, 1.0, 1.0), "found 3 of 1"),
        (replace(TWO, batches=tuple(replace(b, requests=b.requests * 2) for b in TWO.batches)), "found 2 of 2"),
    ],
    ids=["batch missing", "batch too many", "requests too many"],
)
def test_a_driver_that_sends_another_load_than_asked_for(mode: BaselineMode, run: RunTrace, found: str) -> None:
    gate = Gate(holding(STEADY), mode=mode)
    measurement = measurement_of(1.0)
    verdict = gate.judge(replace(measurement, runs=(run,)))
    assert verdict.status is Status.INVALID
    told = f"too-few-samples: 2 batches of 1 requests were asked for, {found} (server start 1); let the load driver "
    assert verdict.reasons[-1].startswith(told)
    assert stored_in(gate) == STEADY


def test_sessions_of_another_sample_size_are_not_compared_with() -> None:
    slow = [sending(session, 4) for session in steady(2.0).sessions[:3]]
    mixed = replace(STEADY, sessions=(*slow, *STEADY.sessions))
    verdict = once(measurement_of(1.0), mixed)
    assert verdict.status is Status.PASS
    assert verdict.reasons == ("3 stored sessions left out: 4 requests in a batch there, 1 now",)
    assert {metric.n_sessions for metric in verdict.metrics} == {len(STEADY.sessions)}
    assert [metric.ci for metric in verdict.metrics] == [m.ci for m in once(measurement_of(1.0), STEADY).metrics]


def test_no_session_of_the_same_sample_size_is_no_baseline() -> None:
    verdict = once(measurement_of(1.0), replace(STEADY, sessions=tuple(sending(s, 4) for s in STEADY.sessions)))
    assert (verdict.status, verdict.metrics) == (Status.NO_BASELINE, ())
    assert verdict.reasons[-1] == "9 stored sessions left out: 4 requests in a batch there, 1 now"


def test_metrics_that_are_not_gated_are_advisory() -> None:
    verdict = once(measurement_of(1.1), STEADY, "p99_ttft_ms=50%")
    names = {row.name for row in verdict.advisory}
    assert names.isdisjoint(metric.name for metric in verdict.metrics)
    [row] = [row for row in verdict.advisory if row.name == "p99_e2el_ms"]
    assert (row.baseline, row.current, row.change) == pytest.approx((120.0, 132.0, 0.1))


def test_what_changed_besides_the_numbers_is_named() -> None:
    stored = replace(session_of(1.0), epoch={"driver": "565.2"}, covariates={"host": "node0"})
    assert once(measurement_of(1.0), Baseline(key(), (stored,))).changed == (
        "driver: 565.2 -> 570.1",
        "host: node0 -> node1",
    )
    assert what_changed(session_of(1.0), identity()) == ()


@pytest.mark.parametrize(
    ("stored", "provisional"),
    [
        (steady(sessions=1), "1 stored session; the spread rests partly on the documented prior"),
        (steady(sessions=4), "4 stored sessions; the spread rests partly on the documented prior"),
        (steady(sessions=7), "7 stored sessions; the spread rests partly on the documented prior"),
        (steady(sessions=8), ""),
    ],
)
def test_few_sessions_make_a_verdict_provisional(stored: Baseline, provisional: str) -> None:
    assert once(measurement_of(1.0), stored).provisional == provisional


def begun(sessions: Sequence[BaselineSession], *, until: str = "", reason: str = "a new kernel") -> Baseline:
    """STEADY, and then a level that begins with the first of these."""
    first = replace(sessions[0], begins=LevelStart(reason, ("median_ttft_ms 100 ms -> 150 ms (+50%, worse)",), until))
    return replace(STEADY, sessions=(*STEADY.sessions, first, *sessions[1:]))


def test_few_sessions_of_a_level_make_it_provisional_though_its_spread_is_known() -> None:
    level = begun(steady(1.5, sessions=2).sessions)
    assert once(measurement_of(1.5), level).provisional == "2 stored sessions of this level and epoch"


def test_another_epoch_is_named_and_makes_the_verdict_provisional() -> None:
    other = replace(
        STEADY, sessions=tuple(replace(session, epoch={"driver": "565.2"}) for session in STEADY.sessions)
    )
    verdict = once(measurement_of(1.0), other)
    assert (verdict.status, verdict.changed) == (Status.PASS, ("driver: 565.2 -> 570.1",))
    assert verdict.provisional == "none of this epoch is stored, compared with 2026-11-20"
    own = replace(other, sessions=(*other.sessions, *(replace(s, runs=s.runs) for s in steady(1.5).sessions)))
    assert once(measurement_of(1.5), own).status is Status.PASS
    assert once(measurement_of(1.5), own).changed == ()
    assert once(measurement_of(1.5), other).status is Status.REGRESSION


# -- waivers ---------------------------------------------------------------------------------------------------------

WAIVED = begun(steady(1.5).sessions, until="2026-12-01", reason="until the kernel is mended")
BEFORE, AFTER = "2026-12-01T23:00:00Z", "2026-12-02T00:00:00Z"
IN_FORCE = "a waiver until 2026-12-01 is in force: until the kernel is mended"


def test_a_waiver_in_force_is_the_reference() -> None:
    verdict = Gate(holding(WAIVED), now=BEFORE).judge(measurement_of(1.5))
    assert (verdict.status, verdict.reasons) == (Status.PASS, (IN_FORCE,))
    worse = Gate(holding(WAIVED), now=BEFORE, later=[2.0]).judge(measurement_of(2.0))
    assert (worse.status, worse.reasons) == (Status.REGRESSION, (IN_FORCE,))


def test_a_waiver_that_is_over_leaves_the_level_before() -> None:
    verdict = Gate(holding(WAIVED), now=AFTER, later=[1.5]).judge(measurement_of(1.5))
    ended = "a waiver ended on 2026-12-01 (until the kernel is mended): judged against the level before it"
    assert (verdict.status, verdict.reasons) == (Status.REGRESSION, (ended,))
    assert Gate(holding(WAIVED), now=AFTER).judge(measurement_of(1.0)).status is Status.PASS


def test_of_two_waivers_that_are_over_neither_counts() -> None:
    first, *more = steady(2.0).sessions
    later = replace(first, begins=LevelStart("still not mended", (), "2026-12-20"))
    twice = replace(WAIVED, sessions=(*WAIVED.sessions, later, *more))
    in_force = Gate(holding(twice), now="2026-12-20T12:00:00Z").judge(measurement_of(2.0))
    assert in_force.status is Status.PASS
    for factor in (1.5, 2.0):
        over = Gate(holding(twice), now="2026-12-21T00:00:00Z", later=[factor]).judge(measurement_of(factor))
        assert over.status is Status.REGRESSION
        assert over.reasons == (
            "a waiver ended on 2026-12-20 (still not mended): judged against the level before it",
        )


def test_a_waiver_that_is_no_longer_needed_is_told() -> None:
    verdict = Gate(holding(WAIVED), now=BEFORE, later=[1.0]).judge(measurement_of(1.0))
    assert (verdict.status, verdict.reasons) == (
        Status.IMPROVEMENT,
        (
            IN_FORCE,
            "the waiver until 2026-12-01 is no longer needed: these numbers are as good as before it; "
            "end it: --gpu-baseline=update",
        ),
    )


def test_a_waiver_before_which_nothing_is_kept_is_only_named() -> None:
    only = replace(WAIVED, sessions=WAIVED.levels()[-1])
    verdict = Gate(holding(only), now=BEFORE).judge(measurement_of(1.5))
    assert (verdict.status, verdict.reasons) == (Status.PASS, (IN_FORCE,))


def test_a_waiver_that_is_no_longer_needed_is_ended_by_update() -> None:
    gate = Gate(holding(WAIVED), now=BEFORE, later=[1.0, 1.0], mode="update")
    gate.judge(measurement_of(1.0))
    *_, (session,) = stored_in(gate).levels()
    assert session.begins is not None
    assert session.begins.until == ""
    assert Gate(gate.store, now=AFTER, later=[1.5]).judge(measurement_of(1.5)).status is Status.REGRESSION


# -- the noise of siblings -------------------------------------------------------------------------------------------


class Counting(InMemoryBaselines):
    """Counts how often somebody lists what is stored."""

    listed = 0

    def paths(self) -> Sequence[str]:
        self.listed += 1
        return super().paths()


def test_noise_is_borrowed_from_a_sibling_while_own_sessions_are_few() -> None:
    sibling = baseline_of(*([wave * start for start in (1.0, 1.002, 0.998)] for wave in WAVES), layout="tp4")
    few = baseline_of([1.0, 1.001])
    alone = Gate(holding(few), prior=NOISE_PRIORS["cpu"], starts=1).judge(measurement_of(1.0))
    beside = Gate(holding(few, sibling), prior=NOISE_PRIORS["cpu"], starts=1).judge(measurement_of(1.0))
    assert (alone.status, beside.status) == (Status.INCONCLUSIVE, Status.PASS)
    assert beside.provisional == f"1 stored session; the spread rests partly on the noise of {sibling.key.path}"


@pytest.mark.parametrize(("sessions", "reads"), [(9, False), (3, True)])
def test_siblings_are_looked_for_only_where_they_are_needed(sessions: int, reads: bool) -> None:
    store = Counting(holding(steady(sessions=sessions)).texts)
    Gate(store, starts=1).judge(measurement_of(1.0))
    assert bool(store.listed) is reads
