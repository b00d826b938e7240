"""What was measured, on what, and whether it is fit to be judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pytest_gpulayout.baseline import BaselineKey, BaselineRun, BaselineSession, fold_batches, is_measurement
from pytest_gpulayout.metrics import batch_metrics
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.verdict import MetricSample
from pytest_gpulayout.workload import Workload


@dataclass(frozen=True, slots=True)
class Identity:
    """Where numbers come from; see :mod:`~pytest_gpulayout.baseline` for the four parts.

    :param topology: the wiring, as :func:`~pytest_gpulayout.drift.wiring_document` gives it.
    """

    key: BaselineKey
    epoch: Mapping[str, Any]
    sut: Mapping[str, Any]
    covariates: Mapping[str, Any]
    topology: Mapping[str, Any] = field(default_factory=dict)


class Judgeable(Protocol):
    """What a verdict is formed on: a fresh measurement, or one that is read back."""

    @property
    def identity(self) -> Identity:
        """Where the numbers come from."""

    def samples(self, metric: str) -> tuple[MetricSample, ...]:
        """Return (n_starts,) samples of one metric, empty when it was not measured."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One workload on one layout. :param runs: (n_starts,), one per fresh server start, oldest first."""

    identity: Identity
    workload: Workload
    runs: tuple[RunTrace, ...]

    def with_run(self, run: RunTrace) -> Measurement:
        """Return this measurement with one more server start."""
        return replace(self, runs=(*self.runs, run))

    def samples(self, metric: str) -> tuple[MetricSample, ...]:
        """Return (n_starts,) samples of one metric; starts that cannot have it (TPOT of one token) are left out."""
        batches = ([b[metric] for b in batch_metrics(run) if metric in b] for run in self.runs)
        return tuple(MetricSample(tuple(values)) for values in batches if values)

    def problems(self) -> tuple[str, ...]:
        """Say why these numbers must be neither judged nor stored; empty when they are sound."""
        found = [] if self.runs else ["no server start was measured"]
        for number, run in enumerate(self.runs, 1):
            if run.failed:
                first = run.failed[0].error
                found.append(
                    f"{len(run.failed)} of {len(run.requests)} requests failed on server start {number}; "
                    f"the first: {first}"
                )
            elif len(run.fingerprints) > 1:
                found.append(f"different servers answered on start {number}: {', '.join(run.fingerprints)}")
            elif unfit := _unfit_metrics(run):
                found.append(f"zero or not finite on server start {number}: {', '.join(unfit)}")
        return tuple(found)

    def as_session(self, recorded: str) -> BaselineSession:
        """Return what a baseline stores of this. :param recorded: UTC, ISO 8601."""
        runs = []
        for run in self.runs:
            metrics = fold_batches(batch_metrics(run))
            rounded = {name: tuple(map(_rounded, values)) for name, values in metrics.items()}
            runs.append(BaselineRun(len(run.requests), rounded))
        identity = self.identity
        return BaselineSession(
            recorded, identity.epoch, identity.sut, identity.covariates, tuple(runs), identity.topology
        )


def _unfit_metrics(run: RunTrace) -> list[str]:
    values = (item for batch in batch_metrics(run) for item in batch.items())
    return sorted({name for name, value in values if not is_measurement([value])})


def _rounded(value: float) -> float:
    """Eight significant digits: short in a diff, and never rounded down to zero."""
    return float(f"{value:.8g}")
