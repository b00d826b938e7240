"""What becomes of baselines when saved results are taken into them, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from pytest_gpulayout.approving import Candidate, Category, Plan, Terms, approve, newest_of_each_key, plan_approval
from pytest_gpulayout.baseline import Baseline, LevelStart
from pytest_gpulayout.baseline_text import baseline_from_text, baseline_to_text
from pytest_gpulayout.errors import BaselineCorrupt, BaselineError
from pytest_gpulayout.measurement import Measurement
from pytest_gpulayout.results import RecordedMeasurement, measurements_from_text
from pytest_gpulayout.testing import InMemoryBaselines
from pytest_gpulayout.tolerance import parse_tolerances
from pytest_gpulayout.verdict import Status
from tests.support.measurements import key, measurement_of, run_of
from tests.support.stored import dated, measured, quiet_baseline, quiet_session, results_text, stored

PATH = key().path
TERMS = Terms(parse_tolerances(""), today="2026-11-21")
WORSE = replace(TERMS, allow_worse=True, reason="it checks more")


def read(measurement: Measurement, created: str = "2026-11-21T08:00:00Z") -> RecordedMeasurement:
    [found] = measurements_from_text(results_text(measurement, created=created), "r.json")
    return found


def candidates(*measurements: RecordedMeasurement) -> list[Candidate]:
    return [Candidate(f"r{number}.json", item) for number, item in enumerate(measurements, 1)]


def holding(*baselines: Baseline) -> InMemoryBaselines:
    return InMemoryBaselines({baseline.key.path: baseline_to_text(baseline) for baseline in baselines})


def planned(
    store: InMemoryBaselines, *measurements: RecordedMeasurement, terms: Terms = TERMS
) -> tuple[Plan, Baseline | None]:
    [plan] = plan_approval(store, candidates(*measurements), terms)
    return plan, None if plan.after is None else baseline_from_text(plan.after, PATH)


def refusals(plan: Plan) -> list[str]:
    return [refusal for step in plan.steps for refusal in step.refusals]


def test_the_session_is_the_one_that_the_measurement_would_have_stored() -> None:
    measurement = measured(1.0)
    assert read(measurement, "2026-11-20").as_session() == measurement.as_session("2026-11-20")


def test_a_new_baseline() -> None:
    plan, after = planned(InMemoryBaselines(), read(measured()))
    assert [step.category for step in plan.steps] == [Category.NEW]
    assert after == Baseline(key(), (measured().as_session("2026-11-21T08:00:00Z"),))


@pytest.mark.parametrize(
    ("factor", "category", "levels"),
    [(1.0, Category.EQUAL, 1), (0.8, Category.BETTER, 2), (1.25, Category.WORSE, 2)],
)
def test_categories(factor: float, category: Category, levels: int) -> None:
    plan, after = planned(holding(quiet_baseline(10)), read(measured(factor)), terms=WORSE)
    assert [step.category for step in plan.steps] == [category]
    assert after is not None
    assert (len(after.sessions), len(after.levels())) == (11, levels)
    assert bool(plan.steps[0].changes) is (levels == 2)


def test_undecided_joins_the_level() -> None:
    plan, after = planned(holding(stored(quiet_session(1))), read(measured(1.03)))
    assert [step.category for step in plan.steps] == [Category.UNDECIDED]
    assert after is not None
    assert len(after.levels()) == 1


def test_what_was_measured_without_a_gate_is_sound() -> None:
    text = results_text(measured(), status=Status.NO_BASELINE, reasons=["not judged: --gpu-baseline=off"])
    [measurement] = measurements_from_text(text, "r.json")
    assert planned(InMemoryBaselines(), measurement)[1] is not None


def test_what_was_invalid_is_not() -> None:
    text = results_text(measured(), status=Status.INVALID, reasons=["a foreign process"])
    [measurement] = measurements_from_text(text, "r.json")
    plan, after = planned(InMemoryBaselines(), measurement)
    assert (refusals(plan), after) == (["a foreign process"], None)


def test_worse_is_refused_without_leave() -> None:
    plan, after = planned(holding(quiet_baseline(10)), read(measured(1.25)))
    assert after is None
    assert refusals(plan) == ["it makes the baseline worse"]
    assert any(change.startswith("median_tpot_ms 10.0 ms -> 12.5 ms") for change in plan.steps[0].changes)
    assert plan.steps[0].category is Category.WORSE


@pytest.mark.parametrize("until", ["", "2026-12-31"])
def test_what_is_worse_keeps_its_reason(until: str) -> None:
    _, after = planned(holding(quiet_baseline(10)), read(measured(1.25)), terms=replace(WORSE, until=until))
    assert after is not None
    begins = after.sessions[-1].begins
    assert begins is not None
    assert (begins.reason, begins.until) == ("it checks more", until)
    assert any(change.startswith("median_tpot_ms 10.0 ms -> 12.5 ms") for change in begins.changes)


def test_sessions_are_taken_oldest_first_each_after_the_other() -> None:
    later, first = read(measured(1.252), "2026-11-22"), read(measured(1.25), "2026-11-21")
    plan, after = planned(holding(quiet_baseline(10)), later, first, terms=WORSE)
    assert [step.candidate.measurement.created for step in plan.steps] == ["2026-11-21", "2026-11-22"]
    assert plan.steps[0].category is Category.WORSE
    assert plan.steps[1].category in (Category.EQUAL, Category.UNDECIDED)
    assert after is not None
    assert [len(level) for level in after.levels()] == [10, 2]


def test_changed_software_is_named() -> None:
    measurement = measured()
    identity = replace(measurement.identity, epoch={"driver": "580.2"}, sut={"vllm": "0.33.0"})
    plan, _ = planned(holding(quiet_baseline(10)), read(replace(measurement, identity=identity)))
    assert plan.steps[0].changed == ("driver: 570.1 -> 580.2", "vllm: 0.32.0 -> 0.33.0")


def test_after_a_waiver_a_session_is_compared_with_the_level_before_and_joins_it() -> None:
    waiver = LevelStart("a bug", ("x (+20.0%, worse)",), until="2026-11-20")
    store = holding(stored(*quiet_baseline(10).sessions, quiet_session(11, factor=1.25, begins=waiver)))
    plan, after = planned(store, read(measured()))
    assert [step.category for step in plan.steps] == [Category.EQUAL]
    assert after is not None
    assert [len(level) for level in after.levels()] == [11, 1]


# -- what must not be stored -----------------------------------------------------------------------------------------


def failed() -> Measurement:
    sound = run_of(1.0, 1.0)
    broken = replace(run_of(1.0, error="HTTP 500").batches[0], index=1)
    return replace(measured(), runs=(replace(sound, batches=(sound.batches[0], broken)),))


def copied() -> RecordedMeasurement:
    return replace(read(measured()), created="2026-11-23")


@pytest.mark.parametrize(
    ("measurement", "told"),
    [
        (read(failed()), "failed-requests: 1 of 2 requests failed; the first: HTTP 500"),
        (
            replace(read(measured()), recorded_topology="topo.txt"),
            "the topology was read from topo.txt and not probed",
        ),
        (read(replace(measured(), runs=())), "no server start was measured"),
        (
            read(measured(model={"name": "org/tiny", "revision": "v2", "dtype": "bfloat16", "arguments": ""})),
            "model.revision: stored 'default', now 'v2'",
        ),
        (copied(), "the same numbers are stored already, as the session of 2026-11-01"),
    ],
    ids=["failed", "recorded", "empty", "key", "copied"],
)
def test_what_must_not_be_stored(measurement: RecordedMeasurement, told: str) -> None:
    sessions = (*quiet_baseline(10).sessions, measured().as_session("2026-11-01"))
    plan, after = planned(holding(stored(*sessions)), measurement, terms=WORSE)
    assert after is None
    assert told in "; ".join(refusals(plan))
    assert plan.steps[0].category is None


def test_fewer_requests_than_the_stored_sessions_have() -> None:
    few = replace(measured(), runs=tuple(run_of(f) for f in (1.0, 1.001)))
    measurement = read(few)
    batches = replace(measurement, problems=(), runs=tuple(replace(run, requests=7) for run in read(measured()).runs))
    plan, after = planned(holding(quiet_baseline(10)), batches)
    assert after is None
    assert refusals(plan) == ["a batch has 3.5 requests, where those of the newest stored session have 1"]


def test_a_metric_that_is_gated_and_was_not_measured() -> None:
    sound = read(measured())
    runs = tuple(replace(run, metrics={"median_ttft_ms": run.metrics["median_ttft_ms"]}) for run in sound.runs)
    plan, after = planned(InMemoryBaselines(), replace(sound, runs=runs))
    assert after is None
    assert "median_tpot_ms is gated" in "; ".join(refusals(plan))


def test_one_refusal_leaves_the_sound_ones_out_too() -> None:
    plan, after = planned(holding(quiet_baseline(10)), read(measured()), read(measured(1.3), "2026-11-22"))
    assert [step.category for step in plan.steps] == [Category.EQUAL, Category.WORSE]
    assert after is None


def test_a_stored_file_that_cannot_be_read() -> None:
    with pytest.raises(BaselineCorrupt):
        planned(InMemoryBaselines({PATH: "{"}), read(measured()))


def chosen(items: Sequence[Candidate]) -> list[str]:
    return [item.measurement.test for item in items]


def test_of_several_measurements_of_a_file_the_last_counts_but_no_unsound_one_is_passed_over() -> None:
    one, two, three = measured(), measured(1.001), measured(layout="tp4")
    taken, left_out = newest_of_each_key("r.json", measurements_from_text(results_text(one, two, three), "r.json"))
    assert chosen(taken) == ["t.py::test_2", "t.py::test_3"]
    assert chosen(left_out) == ["t.py::test_1"]
    taken, left_out = newest_of_each_key("r.json", measurements_from_text(results_text(failed(), one), "r.json"))
    assert (chosen(taken), left_out) == (["t.py::test_1", "t.py::test_2"], [])


# -- writing ---------------------------------------------------------------------------------------------------------


def test_what_was_planned_is_written() -> None:
    store = holding(quiet_baseline(10))
    plan, after = planned(store, read(measured()))
    approve(store, plan, TERMS)
    assert baseline_from_text(store.texts[PATH], PATH) == after


def test_another_writer_is_not_overwritten() -> None:
    store = holding(quiet_baseline(10))
    plan, _ = planned(store, read(measured()))
    other = stored(*quiet_baseline(10).sessions, dated(12, 1.0005, 1.0006, 1.0007))
    store.texts[PATH] = baseline_to_text(other)
    approve(store, plan, TERMS)
    after = baseline_from_text(store.texts[PATH], PATH)
    assert after.sessions[:11] == other.sessions
    assert len(after.sessions) == 12


def test_another_writer_who_changes_the_verdict_stops_it() -> None:
    store = holding(quiet_baseline(10))
    plan, _ = planned(store, read(measured()))
    theirs = baseline_to_text(stored(*(quiet_session(number, factor=0.7) for number in range(1, 11))))
    store.texts[PATH] = theirs
    with pytest.raises(BaselineError, match="another writer has changed it: it makes the baseline worse"):
        approve(store, plan, TERMS)
    assert store.texts[PATH] == theirs


def test_several_baselines_are_planned_at_once() -> None:
    plans = plan_approval(
        InMemoryBaselines(), candidates(read(measured()), read(measurement_of(1.0, 1.01, layout="tp4"))), TERMS
    )
    assert [plan.path for plan in plans] == sorted([PATH, key(layout="tp4").path])
