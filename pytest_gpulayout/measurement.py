"""What was measured, on what, and whether it is fit to be judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pytest_gpulayout.baseline import BaselineKey, BaselineRun, BaselineSession, is_measurement
from pytest_gpulayout.metrics import batch_metrics
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.verdict import MetricSample
from pytest_gpulayout.workload import Workload


@dataclass(frozen=True, slots=True)
class Identity:
    """Where numbers come from; see :mod:`~pytest_gpulayout.baseline` for the four parts."""

    key: BaselineKey
    epoch: Mapping[str, Any]
    sut: Mapping[str, Any]
    covariates: Mapping[str, Any]


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
        found = []
        for number, run in enumerate(self.runs, 1):
            if run.failed:
                first = run.failed[0].error
                found.append(
                    f"{len(run.failed)} of {len(run.requests)} requests failed on server start {number}; "
                    f"the first: {first}"
                )
            elif len(run.fingerprints) > 1:
                found.append(f"different servers answered on start {number}: {', '.join(run.fingerprints)}")
            elif not all(is_measurement(list(batch.values())) for batch in batch_metrics(run)):
                found.append(f"a metric of server start {number} is zero or not finite")
        return tuple(found)

    def as_session(self, recorded: str) -> BaselineSession:
        """Return what a baseline stores of this. :param recorded: UTC, ISO 8601."""
        runs = []
        for run in self.runs:
            batches = batch_metrics(run)
            metrics = {name: tuple(round(batch[name], 6) for batch in batches) for name in batches[0]}
            runs.append(BaselineRun(len(run.requests), metrics))
        identity = self.identity
        return BaselineSession(recorded, identity.epoch, identity.sut, identity.covariates, tuple(runs))
