"""What was measured, on what, and whether it is fit to be judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, TypeVar

from pytest_gpulayout.baseline import BaselineKey, BaselineRun, BaselineSession, as_stored, fold_batches
from pytest_gpulayout.metrics import batch_metrics
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.validity import TRANSIENT, Problem, find_problems
from pytest_gpulayout.verdict import MetricSample
from pytest_gpulayout.workload import Workload

T = TypeVar("T")


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

    def batch_sizes(self) -> tuple[float, ...]:
        """Return (n_starts,) numbers of requests in a batch."""

    def observed(self) -> tuple[Mapping[str, float], ...]:
        """Return (n_starts,) of what else was seen, by the names of :data:`~pytest_gpulayout.observed.OBSERVED`."""


class Repeatable(Judgeable, Protocol):
    """A fresh measurement, to which more starts can be added until a verdict is clear."""

    @property
    def runs(self) -> Sequence[object]:
        """(n_starts,), oldest first."""

    @property
    def replaced(self) -> tuple[str, ...]:
        """(n_replaced,) what disturbed each start that a fresh one took the place of."""

    @property
    def start_noun(self) -> str:
        """What one start is called, such as ``server start``."""

    def without_last(self) -> Self:
        """Return it without its last start, and keep why."""

    def is_last_disturbed(self) -> bool:
        """Whether nothing is wrong with the last start but what a fresh one would probably not meet."""

    def problems(self) -> tuple[str, ...]:
        """Say why these numbers must be neither judged nor stored; empty when they are sound."""

    def shortfalls(self) -> tuple[str, ...]:
        """Say where less was measured than was asked for; empty when all was."""

    def as_session(self, recorded: str) -> BaselineSession:
        """Return what a baseline stores of this. :param recorded: UTC, ISO 8601."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One workload on one layout.

    :param runs: (n_starts,), one per fresh server start, oldest first.
    :param disturbances: what was wrong beside a run and does not show in its trace, by its position.
    :param sightings: what else was seen of a start, by its position; see :meth:`observed`.
    :param replaced: (n_replaced,) what disturbed each start that a fresh one took the place of.
    """

    identity: Identity
    workload: Workload
    runs: tuple[RunTrace, ...]
    disturbances: Mapping[int, tuple[Problem, ...]] = field(default_factory=dict)
    sightings: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    # Metrics take 0.1 s for a million gaps and are asked for one by one; a run never changes, so its are computed
    # once. By position: a trace is too large to be hashed.
    _computed: dict[int, list[dict[str, float]]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _found: dict[int, tuple[Problem, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def start_noun(self) -> str:
        """What one start is called."""
        return "server start"

    def with_run(
        self, run: RunTrace, disturbances: tuple[Problem, ...] = (), observed: Mapping[str, float] | None = None
    ) -> Measurement:
        """Return this measurement with one more server start.

        :param disturbances: what was wrong beside it. :param observed: what else was seen of it.
        """
        number = len(self.runs)
        longer = replace(
            self,
            runs=(*self.runs, run),
            disturbances={**self.disturbances, number: disturbances},
            sightings={**self.sightings, number: observed or {}},
        )
        longer._computed.update(self._computed)
        longer._found.update(self._found)
        return longer

    def without_last(self) -> Measurement:
        """Return this measurement without its last server start, whose problems are kept as :attr:`replaced`."""
        last = len(self.runs) - 1

        def before(by_position: Mapping[int, T]) -> dict[int, T]:
            return {position: value for position, value in by_position.items() if position < last}

        shorter = replace(
            self,
            runs=self.runs[:last],
            disturbances=before(self.disturbances),
            sightings=before(self.sightings),
            replaced=(*self.replaced, "; ".join(map(str, self.problems_of(last)))),
        )
        shorter._computed.update(before(self._computed))
        shorter._found.update(before(self._found))
        return shorter

    @property
    def seconds(self) -> float:
        """How long a server start measured, the mean of all; 0 where there is none."""
        return sum(run.duration_s for run in self.runs) / max(len(self.runs), 1)

    def batch_metrics(self) -> list[list[dict[str, float]]]:
        """Return (n_starts,) of (n_batches,) metrics by name.

        :raises MeasurementError: they do not exist; see :func:`pytest_gpulayout.metrics.batch_metrics`.
        """
        for position, run in enumerate(self.runs):
            if position not in self._computed:
                self._computed[position] = batch_metrics(run, goodput=self.workload.goodput)
        return [self._computed[position] for position in range(len(self.runs))]

    def samples(self, metric: str) -> tuple[MetricSample, ...]:
        """Return (n_starts,) samples of one metric; starts that cannot have it (TPOT of one token) are left out."""
        batches = ([batch[metric] for batch in run if metric in batch] for run in self.batch_metrics())
        return tuple(MetricSample(tuple(values)) for values in batches if values)

    def observed(self) -> tuple[Mapping[str, float], ...]:
        """Return (n_starts,) of what else was seen, by the names of :data:`~pytest_gpulayout.observed.OBSERVED`."""
        return tuple(self.sightings.get(position, {}) for position in range(len(self.runs)))

    def batch_sizes(self) -> tuple[float, ...]:
        """Return (n_starts,) numbers of requests in a batch, the mean of the start's batches."""
        return tuple(len(run.requests) / len(run.batches) for run in self.runs)

    def problems_of(self, position: int) -> tuple[Problem, ...]:
        """Return all that is wrong with one server start. :param position: from 0."""
        if position not in self._found:
            found = find_problems(self.runs[position], self.workload)
            self._found[position] = (*found, *self.disturbances.get(position, ()))
        return self._found[position]

    def is_last_disturbed(self) -> bool:
        """Whether nothing is wrong with the last server start but what a fresh one would probably not meet."""
        found = self.problems_of(len(self.runs) - 1) if self.runs else ()
        return bool(found) and all(problem.kind in TRANSIENT for problem in found)

    def problems(self) -> tuple[str, ...]:
        """Say why these numbers must be neither judged nor stored; empty when they are sound."""
        if not self.runs:
            return ("no server start was measured",)
        starts = range(len(self.runs))
        return tuple(f"{problem} (server start {n + 1})" for n in starts for problem in self.problems_of(n))

    def shortfalls(self) -> tuple[str, ...]:
        """Say where fewer requests were sent than asked for: that is another load under the same name."""
        workload = self.workload
        found: list[str] = []
        for number, run in enumerate(self.runs, 1):
            sent = [len(batch.requests) for batch in run.batches]
            if sent != [workload.requests] * workload.batches:
                found.append(
                    f"too-few-samples: {workload.batches} batches of {workload.requests} requests were asked for, "
                    f"found {len(sent)} of {', '.join(map(str, sorted(set(sent))))} (server start {number}); "
                    "let the load driver send all of them, or describe another workload"
                )
        return tuple(found)

    def as_session(self, recorded: str) -> BaselineSession:
        """Return what a baseline stores of this. :param recorded: UTC, ISO 8601."""
        runs = []
        for run, batches, observed in zip(self.runs, self.batch_metrics(), self.observed(), strict=True):
            metrics = fold_batches(batches)
            rounded = {name: tuple(map(as_stored, values)) for name, values in metrics.items()}
            runs.append(BaselineRun(len(run.requests), rounded, dict(observed)))
        identity = self.identity
        return BaselineSession(
            recorded, identity.epoch, identity.sut, identity.covariates, tuple(runs), identity.topology
        )
