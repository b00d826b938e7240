from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from pytest_gpulayout.baseline import Baseline, BaselineSession, LevelStart
from pytest_gpulayout.baseline_text import baseline_to_text
from pytest_gpulayout.compared_files import read_recorded
from pytest_gpulayout.comparing import Compared, compare_recorded, overall
from pytest_gpulayout.errors import BaselineCorrupt, MeasurementError
from pytest_gpulayout.judging import NOISE_PRIORS
from pytest_gpulayout.measurement import Measurement
from pytest_gpulayout.metrics import batch_metrics
from pytest_gpulayout.tolerance import parse_tolerances
from pytest_gpulayout.verdict import Status, Verdict
from pytest_gpulayout.vllm_result import vllm_result
from tests.support.compared import BENCH, MANY, NOISE, WIDE, bench
from tests.support.measurements import WORKLOAD, baseline_of, key, measurement_of, results_of, run_of, session_of

TODAY = "2026-11-21"


def compare(
    baseline: str, measurement: str, *, tolerance: str = "", today: str = TODAY, platform: str = "cuda"
) -> tuple[Compared, ...]:
    stored = read_recorded(baseline, "b.json", platform=platform)
    measured = read_recorded(measurement, "m.json", platform=platform)
    return compare_recorded(measured, stored, parse_tolerances(tolerance), today=today)


def verdict_of(baseline: str, measurement: str, **options: Any) -> Verdict:
    [one] = compare(baseline, measurement, **options)
    return one.verdict


def told(verdict: Verdict) -> str:
    return "\n".join(verdict.reasons)


# -- our own files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "status"),
    [(1.0, Status.PASS), (1.3, Status.REGRESSION), (0.7, Status.IMPROVEMENT)],
)
def test_results_against_a_baseline(factor: float, status: Status) -> None:
    measured = results_of(measurement_of(*(factor * one for one in NOISE)))
    verdict = verdict_of(baseline_to_text(MANY), measured)
    assert (verdict.status, len(verdict.metrics), verdict.provisional) == (status, 3, "")


def test_results_against_results_rest_on_the_documented_spread() -> None:
    verdict = verdict_of(results_of(measurement_of(*NOISE)), results_of(measurement_of(*(2.0 * n for n in NOISE))))
    assert verdict.status is Status.REGRESSION
    assert "1 stored session" in verdict.provisional
    assert {metric.n_sessions for metric in verdict.metrics} == {1}


def test_a_baseline_as_the_measurement_is_its_newest_session() -> None:
    now = baseline_of(NOISE, [1.3 * one for one in NOISE])
    sessions = [replace(session, recorded=f"2026-11-2{n}T10:00:00Z") for n, session in enumerate(now.sessions)]
    verdict = verdict_of(baseline_to_text(MANY), baseline_to_text(replace(now, sessions=tuple(sessions))))
    assert verdict.status is Status.REGRESSION


def test_a_baseline_is_not_judged_by_itself() -> None:
    text = baseline_to_text(MANY)
    verdict = verdict_of(text, text)
    assert verdict.status is Status.INVALID
    assert "one of the baseline's own sessions" in told(verdict)


def test_results_that_are_the_baseline_are_told() -> None:
    text = results_of(measurement_of(*NOISE))
    verdict = verdict_of(text, text, tolerance=WIDE)
    assert verdict.status is Status.PASS
    assert "both files hold the same numbers to the last digit" in told(verdict)


def slow_accepted(until: str) -> str:
    slow = session_of(*(1.3 * one for one in NOISE), recorded="2026-11-20T09:00:00Z")
    accepted = replace(slow, begins=LevelStart("an accepted change", (), until))
    return baseline_to_text(replace(MANY, sessions=(*MANY.sessions, accepted)))


@pytest.mark.parametrize(("today", "status"), [("2026-11-30", Status.PASS), ("2026-12-01", Status.REGRESSION)])
def test_a_waiver_counts_until_its_last_day(today: str, status: Status) -> None:
    measured = results_of(measurement_of(*(1.3 * one for one in NOISE)))
    verdict = verdict_of(slow_accepted("2026-11-30"), measured, today=today, tolerance="request_throughput=20%")
    wide = verdict_of(slow_accepted("2026-11-30"), measured, today=today, tolerance=WIDE.replace("40", "25"))
    assert verdict.status is not Status.INVALID
    assert wide.status is status
    assert "2026-11-30" in told(wide)


def test_changes_beside_the_numbers_are_named() -> None:
    measurement = measurement_of(*NOISE)
    identity = replace(measurement.identity, epoch={"driver": "580.2"}, covariates={"host": "node9"})
    verdict = verdict_of(baseline_to_text(MANY), results_of(replace(measurement, identity=identity)))
    assert set(verdict.changed) == {"driver: 570.1 -> 580.2", "host: node1 -> node9"}


def test_the_spread_of_the_cpu_is_that_of_our_own_files() -> None:
    def on(platform: str) -> Measurement:
        return measurement_of(*NOISE, hardware={"platform": platform})

    cpu, cuda = (verdict_of(results_of(on(name)), results_of(on(name))) for name in ("cpu", "cuda"))
    assert NOISE_PRIORS["cpu"].session_sd > NOISE_PRIORS["cuda"].session_sd
    for wide, narrow in zip(cpu.metrics, cuda.metrics, strict=True):
        assert wide.min_detectable > narrow.min_detectable


@pytest.mark.parametrize(
    ("stored", "now", "reason"),
    [
        ({"hardware": {"power_limit_w": 700}}, {"hardware": {"power_limit_w": 500}}, "stored 700, now 500"),
        ({"layout": "tp2"}, {"layout": "dp2"}, "layout: stored 'tp2', now 'dp2'"),
        ({}, {"hardware": {"links": ["SYS"]}}, "hardware.links: stored 0-1 NV18, now 0-1 SYS"),
    ],
)
def test_another_key_is_invalid_and_named(stored: dict[str, Any], now: dict[str, Any], reason: str) -> None:
    documents = (baseline_to_text(baseline_of(NOISE, **stored)), results_of(measurement_of(*NOISE, **stored)))
    for baseline in documents:
        verdict = verdict_of(baseline, results_of(measurement_of(*NOISE, **now)))
        assert verdict.status is Status.INVALID
        assert reason in told(verdict)


def test_a_key_that_knew_less_is_compared() -> None:
    stored = baseline_of(*[NOISE] * 8, hardware={"power_limit_w": None})
    assert verdict_of(baseline_to_text(stored), results_of(measurement_of(*NOISE))).status is not Status.INVALID
    known_less = results_of(measurement_of(*NOISE, hardware={"power_limit_w": None}))
    assert verdict_of(baseline_to_text(MANY), known_less).status is Status.INVALID


def test_results_of_the_first_versions_are_read() -> None:
    document = json.loads(results_of(measurement_of(*NOISE)))
    stored = document["records"][0]["identity"]["key"]
    del stored["model"]["dtype"], stored["hardware"]["power_limit_w"]
    old = json.dumps(document)
    assert verdict_of(old, results_of(measurement_of(*NOISE)), tolerance=WIDE).status is Status.PASS
    newer = verdict_of(results_of(measurement_of(*NOISE)), old, tolerance=WIDE)
    assert "model.dtype: stored 'bfloat16', now unknown" in told(newer)


# -- several measurements in a file --------------------------------------------------------------------------------


def two(first: float, second: float) -> str:
    return results_of(
        measurement_of(*(first * one for one in NOISE)),
        measurement_of(*(second * one for one in NOISE), layout="dp2"),
    )


def test_each_key_of_results_is_judged() -> None:
    compared = compare(two(1.0, 1.0), two(1.0, 2.0), tolerance=WIDE)
    assert [(one.title.split(":")[0], one.verdict.status) for one in compared] == [
        ("tp2", Status.PASS),
        ("dp2", Status.REGRESSION),
    ]
    assert overall(compared) is Status.REGRESSION


def test_a_key_that_was_not_measured_is_invalid() -> None:
    compared = compare(two(1.0, 1.0), results_of(measurement_of(*NOISE)), tolerance=WIDE)
    assert [one.verdict.status for one in compared] == [Status.PASS, Status.INVALID]
    assert "layout: stored 'dp2', now 'tp2'" in told(compared[1].verdict)
    assert overall(compared) is Status.INVALID


def test_a_key_that_is_not_stored_has_no_baseline() -> None:
    compared = compare(results_of(measurement_of(*NOISE)), two(1.0, 1.0), tolerance=WIDE)
    assert [one.verdict.status for one in compared] == [Status.PASS, Status.NO_BASELINE]
    assert overall(compared) is Status.NO_BASELINE


def test_a_baseline_document_asks_for_its_own_key_only() -> None:
    [one] = compare(baseline_to_text(MANY), two(1.0, 9.0), tolerance=WIDE)
    assert (one.title, one.verdict.status) == ("tp2: small on org/tiny (t.py::test_1)", Status.PASS)


def test_of_several_of_one_key_the_last_counts() -> None:
    twice = results_of(measurement_of(*(9.0 * one for one in NOISE)), measurement_of(*NOISE))
    verdict = verdict_of(baseline_to_text(MANY), twice)
    assert verdict.status is Status.PASS
    assert "2 measurements have this key; the last one was judged" in told(verdict)
    stored = verdict_of(twice, results_of(measurement_of(*NOISE)), tolerance=WIDE)
    assert stored.status is Status.PASS
    assert "the last one counts" in told(stored)


# -- files of vllm bench serve -------------------------------------------------------------------------------------


def test_one_start_against_one_start() -> None:
    verdict = verdict_of(bench(), bench(median_tpot_ms=15.0))
    assert verdict.status is Status.REGRESSION
    [tpot] = [metric for metric in verdict.metrics if metric.status is Status.REGRESSION]
    assert (tpot.name, tpot.n_current, tpot.n_baseline, tpot.n_sessions) == ("median_tpot_ms", 1, 1, 1)
    assert tpot.change == pytest.approx(15.0 / 9.8 - 1)
    assert "the documented prior" in verdict.provisional
    assert verdict.changed == ()


def test_two_files_do_not_prove_that_nothing_changed() -> None:
    verdict = verdict_of(bench(), bench(median_tpot_ms=9.9))
    assert verdict.status is Status.INCONCLUSIVE
    assert "not proved, since the files do not tell: same layout, GPUs, driver, vLLM" in told(verdict)
    assert "the files hold 1 server start now and 1 session as the baseline" in told(verdict)
    wide = verdict_of(bench(), bench(median_tpot_ms=9.9), tolerance=WIDE)
    assert wide.status is Status.PASS
    assert "not proved" in told(wide)


def test_the_platform_chooses_the_spread() -> None:
    cpu, cuda = (verdict_of(bench(), bench(), platform=name) for name in ("cpu", "cuda"))
    assert cpu.metrics[0].min_detectable > cuda.metrics[0].min_detectable


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_id": "org/other"}, "model: stored 'org/tiny', now 'org/other'"),
        ({"max_concurrency": 16}, "max_concurrency: stored 8, now 16"),
        ({"max_concurrency": None}, "max_concurrency: stored 8, now 'none'"),
        ({"request_rate": 4.0}, "request_rate: stored inf, now 4"),
        ({"num_prompts": 100, "completed": 100}, "num_prompts: stored 200, now 100"),
        ({"burstiness": 0.5}, "burstiness: stored 1, now 0.5"),
        ({"total_input_tokens": 40_000}, "input tokens per request: stored 100, now 200"),
        ({"total_output_tokens": 3_000}, "output tokens per request: stored 30, now 15"),
    ],
)
def test_another_load_is_invalid_and_named(changes: Mapping[str, Any], reason: str) -> None:
    verdict = verdict_of(bench(), bench(**changes), tolerance=WIDE)
    assert (verdict.status, verdict.metrics) == (Status.INVALID, ())
    assert reason in told(verdict)


def test_tokens_that_were_drawn_with_another_seed_are_the_same_load() -> None:
    assert verdict_of(bench(), bench(total_output_tokens=6_030), tolerance=WIDE).status is Status.PASS


def test_a_folder_is_the_same_model_wherever_it_lies() -> None:
    here, there = bench(model_id="/models/tiny-qwen2"), bench(model_id="/mnt/hub/tiny-qwen2/")
    assert verdict_of(here, there, tolerance=WIDE).status is Status.PASS


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"failed": 2, "completed": 198}, "failed-requests: 2 of 200 requests failed (in m.json)"),
        ({"completed": 198, "failed": 0}, "failed-requests: 2 of 200 requests failed"),
        ({"median_tpot_ms": 0.0}, "median_tpot_ms is 0.0, which is no measurement (in m.json)"),
        ({"median_tpot_ms": float("nan")}, "median_tpot_ms is nan, which is no measurement"),
        ({"request_throughput": -1.0}, "request_throughput is -1.0, which is no measurement"),
        ({"median_tpot_ms": None}, "median_tpot_ms is gated"),
        ({"gpulayout": {"problems": [{"kind": "throttled", "text": "at 900 MHz"}]}}, "throttled: at 900 MHz"),
    ],
)
def test_numbers_that_are_none_are_never_a_pass(changes: Mapping[str, Any], reason: str) -> None:
    verdict = verdict_of(bench(), bench(**changes), tolerance=WIDE)
    assert (verdict.status, verdict.metrics) == (Status.INVALID, ())
    assert reason in told(verdict)


def test_a_baseline_without_a_gated_metric_is_never_a_pass() -> None:
    assert verdict_of(bench(median_tpot_ms=0.0), bench(), tolerance=WIDE).status is Status.INVALID
    assert verdict_of(bench(failed=1, completed=199), bench(), tolerance=WIDE).status is Status.INVALID
    missing = verdict_of(bench(median_tpot_ms=None), bench(), tolerance=WIDE)
    assert not missing.status.passed
    assert "median_tpot_ms is gated" in told(missing)


@pytest.mark.parametrize(
    "several",
    [
        "\n".join(bench(median_tpot_ms=value) for value in (9.7, 9.8, 9.9)),
        json.dumps([BENCH | {"median_tpot_ms": value} for value in (9.7, 9.8, 9.9)]),
    ],
    ids=["appended", "summary of a sweep"],
)
def test_several_results_of_one_load_are_batches_of_one_start(several: str) -> None:
    for baseline, measurement in ((bench(), several), (several, bench())):
        verdict = verdict_of(baseline, measurement, tolerance=WIDE)
        assert {(metric.n_current, metric.n_baseline) for metric in verdict.metrics} == {(1, 1)}
        assert "taken as batches of one server start" in told(verdict)
        [tpot] = [metric for metric in verdict.metrics if metric.name == "median_tpot_ms"]
        assert tpot.change == pytest.approx(0.0)


def test_each_load_of_a_sweep_is_judged() -> None:
    loads = [BENCH | {"max_concurrency": limit} for limit in (4, 8)]
    slow = [loads[0], loads[1] | {"median_tpot_ms": 20.0}]
    compared = compare(json.dumps(loads), json.dumps(slow), tolerance=WIDE)
    assert [one.verdict.status for one in compared] == [Status.PASS, Status.REGRESSION]
    assert [one.title for one in compared] == [
        "org/tiny, 200 requests, 4 at a time",
        "org/tiny, 200 requests, 8 at a time",
    ]
    fewer = compare(json.dumps(loads), bench(), tolerance=WIDE)
    assert [one.verdict.status for one in fewer] == [Status.INVALID, Status.PASS]


# -- ours beside those ---------------------------------------------------------------------------------------------


def saved(factor: float, **changes: Any) -> str:
    """What ``gpulayout measure --save`` writes of the same load."""
    return json.dumps(vllm_result(run_of(factor, factor), WORKLOAD, model="org/tiny") | changes)


@pytest.mark.parametrize(("factor", "status"), [(1.0, Status.PASS), (3.0, Status.REGRESSION)])
def test_results_beside_a_saved_measurement(factor: float, status: Status) -> None:
    ours, theirs = results_of(measurement_of(1.0)), saved(factor)
    assert verdict_of(ours, theirs, tolerance=WIDE).status is status
    back = verdict_of(saved(1.0), results_of(measurement_of(factor)), tolerance=WIDE)
    assert back.status is status
    assert back.changed == ()
    assert "not proved" in told(back)


def test_a_saved_measurement_of_another_workload_is_invalid() -> None:
    other = json.loads(saved(1.0))
    other["gpulayout"]["workload_fingerprint"] = "0000"
    verdict = verdict_of(results_of(measurement_of(1.0)), json.dumps(other), tolerance=WIDE)
    assert verdict.status is Status.INVALID
    assert "workload: stored" in told(verdict)


def test_a_result_of_vllm_beside_a_baseline_of_other_batches_is_invalid() -> None:
    verdict = verdict_of(baseline_to_text(MANY), bench(), tolerance=WIDE)
    assert verdict.status is Status.INVALID
    assert "num_prompts: stored 1, now 200" in told(verdict)


def test_a_result_of_vllm_beside_a_baseline_of_such_batches_is_judged() -> None:
    runs = tuple(
        replace(run, requests=200 * 2, metrics={name: (BENCH[name],) * 2 for name in run.metrics if name in BENCH})
        for run in session_of(*NOISE).runs
    )
    stored = Baseline(key(), (BaselineSession("2026-11-20T08:00:00Z", {"driver": "570.1"}, {}, {}, runs),) * 9)
    verdict = verdict_of(baseline_to_text(stored), bench(), tolerance=WIDE)
    assert verdict.status is Status.PASS
    assert verdict.changed == ()


# -- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (baseline_to_text(MANY)[:-10], BaselineCorrupt, "a baseline document was required"),
        (results_of(measurement_of(1.0))[:-10], MeasurementError, "a results file was required"),
        (bench()[:-10], MeasurementError, "a result of gpulayout measure --save or of vllm bench serve"),
        ("", MeasurementError, "text that is no JSON"),
        ("[]", MeasurementError, "a list with nothing in it"),
        ('{"records": 1}', MeasurementError, "a results file was required"),
        ('{"sessions": 1}', BaselineCorrupt, "a baseline document was required"),
        (results_of(), MeasurementError, "the results hold no measurement"),
        ("[" * 100_000, MeasurementError, "found JSON that nothing writes"),
        (bench(median_tpot_ms=10**400), MeasurementError, "found JSON that nothing writes"),
        (f"<<<<<<< HEAD\n{baseline_to_text(MANY)}", BaselineCorrupt, "x.json"),
    ],
)
def test_what_cannot_be_read_is_said_by_its_own_reader(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=r"in x\.json") as raised:
        read_recorded(text, "x.json", platform="cuda")
    assert words in str(raised.value)


def test_numbers_of_the_results_are_those_of_the_measurement() -> None:
    written = json.loads(results_of(measurement_of(1.25)))["records"][0]["runs"][0]["gpulayout"]["batches"]
    assert [batch["metrics"] for batch in written] == batch_metrics(measurement_of(1.25).runs[0])
