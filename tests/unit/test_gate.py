from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from pytest_gpulayout.baseline import Baseline
from pytest_gpulayout.baseline_text import baseline_from_text, baseline_to_text
from pytest_gpulayout.comparing import judge_recorded
from pytest_gpulayout.errors import (
    BaselineCorrupt,
    BaselineError,
    BaselineForeign,
    BaselineNotFound,
    TopologyError,
    UnsupportedLayoutError,
)
from pytest_gpulayout.gate import place_layout, require_launchable
from pytest_gpulayout.judging import (
    NOISE_PRIORS,
    BaselineMode,
    GateInputs,
    GatePolicy,
    judge_once,
    judge_performance,
    what_changed,
)
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_requirement
from pytest_gpulayout.measurement import Measurement
from pytest_gpulayout.results import RecordedMeasurement
from pytest_gpulayout.stats import NoisePrior
from pytest_gpulayout.testing import FakeTopologySource, InMemoryBaselines
from pytest_gpulayout.tolerance import Tolerance, parse_tolerances
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.verdict import Look, Status, Verdict
from tests.support.measurements import baseline_of, identity, key, measurement_of, plain_session, run_of, session_of

CALM = NoisePrior(start_sd=0.004, session_sd=0.004)
NOW = "2026-11-21T08:00:00Z"
STEADY = baseline_of([1.0, 1.001, 0.999], [1.0, 1.0, 1.001])
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
    measured: int = 1
    said: list[str] = field(default_factory=list)

    def judge(self, measurement: Measurement) -> Verdict:
        verdict, self.measurement = judge_performance(measurement, self._inputs())
        return verdict

    def _inputs(self) -> GateInputs:
        policy = GatePolicy(self.mode, self.tolerances, self.prior, self.starts, self.budget_s)
        return GateInputs(
            self.store, policy, self._again, lambda: NOW, lambda: self.measured * self.seconds, self.said.append
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
    assert [metric.name for metric in verdict.metrics] == ["request_throughput", "median_ttft_ms", "median_tpot_ms"]
    assert verdict.baseline_path == PLACE
    assert verdict.provisional


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


@pytest.mark.parametrize("stored", [baseline_to_text(STEADY), "<<<<<<< HEAD", "\0"])
def test_update_records_again_whatever_is_stored(stored: str) -> None:
    gate = Gate(InMemoryBaselines({key().path: stored}), later=[1.5, 1.5], mode="update")
    verdict = gate.judge(measurement_of(1.5))
    assert (verdict.status, verdict.stored) == (Status.NO_BASELINE, "updated")
    [session] = baseline_from_text(gate.store.texts[key().path], "x").sessions
    assert len(session.runs) == 3


def test_what_was_recorded_is_a_pass_for_the_same_numbers() -> None:
    gate = Gate(later=[1.0, 1.0], mode="new")
    gate.judge(measurement_of(1.0))
    assert Gate(gate.store).judge(measurement_of(1.0)).status is Status.PASS


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
        (0.5, [], 3, Status.IMPROVEMENT, 1),
        (1.5, [1.5], 3, Status.REGRESSION, 2),
        (1.5, [], 1, Status.REGRESSION, 1),
        (1.035, [1.0], 3, Status.PASS, 2),
        (1.045, [1.0, 1.0], 3, Status.PASS, 3),
        (1.035, [1.035], 5, Status.REGRESSION, 2),
    ],
)
def test_starts_until_the_verdict_is_clear(
    first: float, later: list[float | RunTrace], starts: int, status: Status, measured: int
) -> None:
    gate = Gate(holding(STEADY), later=later, starts=starts)
    assert (gate.judge(measurement_of(first)).status, gate.measured) == (status, measured)


def test_what_cannot_be_decided_is_inconclusive_and_says_what_it_takes() -> None:
    gate = Gate(holding(STEADY), later=[1.0, 1.0], prior=NOISE_PRIORS["cpu"])
    verdict = gate.judge(measurement_of(1.0))
    assert (verdict.status, gate.measured) == (Status.INCONCLUSIVE, 3)
    assert [reason.partition(":")[0] for reason in verdict.reasons] == [m.name for m in verdict.metrics]
    assert verdict.reasons[1].endswith(
        "a change of 8% cannot be ruled out with 3 starts now and 6 stored: allow more (--gpu-starts=5) "
        "or accept a larger tolerance (--gpu-tolerance=median_ttft_ms=...)"
    )


@pytest.mark.parametrize(("budget_s", "measured"), [(5, 1), (19, 1), (20, 2), (29, 2), (30, 3), (1000, 3), (None, 3)])
def test_no_start_that_would_end_after_the_budget(budget_s: float | None, measured: int) -> None:
    for mode in ("check", "update"):
        gate = Gate(holding(STEADY), later=[1.0, 1.0], prior=NOISE_PRIORS["cpu"], budget_s=budget_s, mode=mode)
        gate.judge(measurement_of(1.0))
        assert gate.measured == measured


def test_when_the_budget_allows_one_start_it_is_the_last_look() -> None:
    gate = Gate(holding(STEADY), budget_s=5)
    assert gate.judge(measurement_of(1.5)).status is Status.REGRESSION


# -- what must not be judged or stored -------------------------------------------------------------------------------

BROKEN = run_of(1.0, error="HTTP 500: boom")


@pytest.mark.parametrize("mode", ["check", "new", "update", "off"])
@pytest.mark.parametrize("runs", [(), (BROKEN,), (run_of(1.0), BROKEN)])
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
    store = InMemoryBaselines() if mode == "new" else holding(STEADY)
    before = dict(store.texts)
    gate = Gate(store, later=list(later), mode=mode, prior=NOISE_PRIORS["cpu"])
    verdict = gate.judge(measurement_of(1.0))
    number = len(later) + 1
    assert verdict.status is Status.INVALID
    told = f"failed-requests: 1 of 1 requests failed; the first: HTTP 500: boom (server start {number})"
    assert verdict.reasons == (told,)
    assert store.texts == before


@pytest.mark.parametrize("mode", ["check", "new"])
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
        "  record it for what runs now: --gpu-baseline=update"
    )


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
        "    hardware.links: stored ['SYS'], now ['NV18']",
        "  record it: run the same command with --gpu-baseline=new",
    ]


# -- one look --------------------------------------------------------------------------------------------------------


def once(measurement: Measurement, baseline: Baseline, tolerances: str = "", prior: NoisePrior = CALM) -> Verdict:
    policy = GatePolicy("check", parse_tolerances(tolerances), prior, starts=1)
    return judge_once(measurement, baseline, policy, Look(1, 1), place="here")


def test_a_gated_metric_without_a_value_is_never_a_pass() -> None:
    only_tpot = Baseline(key(), (plain_session(10.0, 10.0),))
    verdict = once(measurement_of(1.0), only_tpot)
    assert verdict.status is Status.INCONCLUSIVE
    assert verdict.reasons[:2] == (
        "request_throughput has no value in the baseline: it cannot be judged",
        "median_ttft_ms has no value in the baseline: it cannot be judged",
    )
    assert once(measurement_of(2.0), only_tpot).status is Status.REGRESSION


def test_a_gate_without_metrics_is_never_a_pass() -> None:
    policy = GatePolicy("check", {}, CALM, starts=1)
    verdict = judge_once(measurement_of(1.0), STEADY, policy, Look(1, 1), place="here")
    assert verdict.status is Status.INCONCLUSIVE
    assert verdict.reasons == ("no metric is gated: name one, --gpu-tolerance=median_tpot_ms=5%",)


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


@pytest.mark.parametrize(("sessions", "provisional"), [(1, True), (4, True), (5, False)])
def test_few_sessions_make_a_verdict_provisional(sessions: int, provisional: bool) -> None:
    assert once(measurement_of(1.0), baseline_of(*[[1.0]] * sessions)).provisional is provisional


# -- recorded measurements -------------------------------------------------------------------------------------------


def recorded(factor: float, *problems: str, layout: str = "tp2") -> RecordedMeasurement:
    runs = () if problems else session_of(factor, factor, factor).runs
    return RecordedMeasurement(f"test_{factor}", identity(layout=layout), runs, problems)


@pytest.mark.parametrize(
    ("measurements", "status", "reasons"),
    [
        ([recorded(1.0)], Status.PASS, ()),
        ([recorded(1.5)], Status.REGRESSION, ()),
        ([recorded(1.5, layout="tp4"), recorded(1.0)], Status.PASS, ()),
        (
            [recorded(1.5), recorded(1.0)],
            Status.PASS,
            ("2 measurements have this key; the last one was judged, of test_1.0",),
        ),
        ([], Status.INVALID, ("the results hold no measurement",)),
        (
            [recorded(1.0, layout="tp4")],
            Status.INVALID,
            ("no measurement has the baseline's key; the nearest differs in", "layout: stored 'tp2', now 'tp4'"),
        ),
        ([recorded(1.0, "a request failed")], Status.INVALID, ("a request failed",)),
    ],
)
def test_recorded_measurements(
    measurements: list[RecordedMeasurement], status: Status, reasons: tuple[str, ...]
) -> None:
    verdict = judge_recorded(measurements, STEADY, parse_tolerances(""), place="here")
    assert (verdict.status, verdict.reasons, verdict.baseline_path) == (status, reasons, "here")


# -- links -----------------------------------------------------------------------------------------------------------


def test_a_layout_is_placed_on_the_best_devices() -> None:
    topology = FakeTopologySource(gpus=4, link="SYS", links={(2, 3): "NV4", (0, 1): None}).probe()
    placed = place_layout(topology, parse_layout("tp2"), None, parse_requirement("nvlink"))
    assert ([device.index for device in placed.devices], placed.violations) == ([2, 3], ())
    assert [str(link) for link in placed.links] == ["NV4"]

    forced = place_layout(topology, parse_layout("tp2"), ("1", "0"), parse_requirement("phb"))
    assert [device.index for device in forced.devices] == [1, 0]
    assert forced.links == (None,)
    assert len(forced.violations) == 1


def test_a_layout_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(TopologyError, match=r"^layout tp8 needs 8 GPUs, found 4 \(source fake\)"):
        place_layout(FakeTopologySource(gpus=4).probe(), parse_layout("tp8"), None, parse_requirement("any"))


@pytest.mark.parametrize("text", ["tp1", "tp2", "tp8"])
def test_tensor_parallelism_on_one_host_can_be_started(text: str) -> None:
    require_launchable(parse_layout(text))


@pytest.mark.parametrize("text", ["pp2", "dp2", "tp2ep", "tp2pcp2", "tp2dcp2", "tp2x2", "tp2@2"])
def test_other_layouts_are_refused_before_anything_starts(text: str) -> None:
    with pytest.raises(UnsupportedLayoutError) as error:
        require_launchable(parse_layout(text))
    first, second, third = str(error.value).split("\n")
    assert first == f"a layout that this version can start was required, found {text}"
    assert second.startswith("  it starts tensor parallelism on one host: ")
    assert third == f"  try --gpu-layout=tp{parse_layout(text).tp}"
