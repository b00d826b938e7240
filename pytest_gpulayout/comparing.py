"""Judges measurements that are read back, without pytest: ``gpulayout compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pytest_gpulayout.baseline import Baseline, BaselineKey
from pytest_gpulayout.judging import NOISE_PRIORS, GatePolicy, judge_once
from pytest_gpulayout.results import RecordedMeasurement
from pytest_gpulayout.tolerance import Tolerance
from pytest_gpulayout.verdict import Look, Status, Verdict


def judge_recorded(
    measurements: Sequence[RecordedMeasurement],
    baseline: Baseline,
    tolerances: Mapping[str, Tolerance],
    *,
    place: str,
) -> Verdict:
    """Judge the last of these measurements that has the baseline's key; all its starts count as one look.

    :param place: where the baseline is, for the report.
    """
    same = [item for item in measurements if not item.identity.key.differences(baseline.key)]
    if not same:
        return Verdict(Status.INVALID, reasons=_no_such_key(measurements, baseline.key), baseline_path=place)
    measurement = same[-1]
    if measurement.problems:
        return Verdict(Status.INVALID, reasons=measurement.problems, baseline_path=place)
    prior = NOISE_PRIORS[baseline.key.hardware["platform"]]
    policy = GatePolicy(mode="check", tolerances=tolerances, prior=prior, starts=len(measurement.runs))
    verdict = judge_once(measurement, baseline, policy, Look(1, 1), place=place)
    if len(same) == 1:
        return verdict
    told = f"{len(same)} measurements have this key; the last one was judged, of {measurement.test}"
    return replace(verdict, reasons=(*verdict.reasons, told))


def _no_such_key(measurements: Sequence[RecordedMeasurement], key: BaselineKey) -> tuple[str, ...]:
    if not measurements:
        return ("the results hold no measurement",)
    nearest = min((item.identity.key.differences(key) for item in measurements), key=len)
    return ("no measurement has the baseline's key; the nearest differs in", *nearest)
