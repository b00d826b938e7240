"""Gates that compare the layouts of one run, and the table of all layouts at its end.

Keeps what this process has measured, by test. Leaves the statistics to :mod:`~pytest_gpulayout.relative`, the table
to :mod:`~pytest_gpulayout.layout_table` and :mod:`~pytest_gpulayout.advice`, and outcomes to
:mod:`~pytest_gpulayout.session`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_gpulayout.advice import advice_lines, advise
from pytest_gpulayout.errors import GpuLayoutError, MeasurementError
from pytest_gpulayout.judging import advisory_changes, undisturbed
from pytest_gpulayout.layout_table import compare_layouts, table_document, table_lines
from pytest_gpulayout.relative import (
    Claim,
    ClaimInputs,
    Contestant,
    RelativeVerdict,
    judge_claim,
    load_differences,
    parse_claim,
    require_same_load,
    start_priors,
)
from pytest_gpulayout.verdict import Status, Verdict

if TYPE_CHECKING:
    from pytest_gpulayout.baseline import BaselineKey
    from pytest_gpulayout.judging import PriorOf
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.live import LiveLine
    from pytest_gpulayout.measurement import Measurement
    from pytest_gpulayout.performance import Performance
    from pytest_gpulayout.ports import BaselineStore, ServerSpec
    from pytest_gpulayout.report import Record
    from pytest_gpulayout.servers import ServerOwner
    from pytest_gpulayout.settings import Settings
    from pytest_gpulayout.wiring import Wiring


@dataclass(frozen=True, slots=True)
class Measured:
    """What a test has measured.

    :param test: its node id. :param spec: of the server; fresh ones of it can be started.
    :param is_recorded: the results have it, as it is here.
    """

    test: str
    spec: ServerSpec
    measurement: Measurement
    is_recorded: bool = False

    @property
    def layout(self) -> str:
        """In its canonical form."""
        return self.measurement.identity.key.layout


@dataclass(frozen=True, slots=True)
class JudgedClaim:
    """A relative verdict with what it rests on. :param other_test: that measured the other layout first."""

    verdict: RelativeVerdict
    own: Measurement
    other_test: str


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What is told of all layouts at the end of a run: lines for the terminal, and records for the results."""

    lines: tuple[str, ...]
    records: tuple[Record, ...]


class PerfGate:
    """What the ``perf_gate`` fixture gives: judges a measurement, and compares the layout with others of this run.

    :param judge: against the baseline. :param compare: against another layout.
    """

    def __init__(
        self, judge: Callable[[Measurement], Verdict], compare: Callable[[Claim], RelativeVerdict | None]
    ) -> None:
        self._judge = judge
        self._compare = compare

    def __call__(self, measurement: Measurement) -> Verdict:
        """Judge against the baseline; fails the test on a regression, on no baseline, and on invalid numbers."""
        return self._judge(measurement)

    def better_than(self, other: Layout | str, metric: str, factor: float = 1.0) -> RelativeVerdict | None:
        """Fail the test unless this layout is more than ``factor`` times as good as another layout of this run.

        Judges what the test has measured last, and needs no stored baseline.

        :param metric: of :data:`~pytest_gpulayout.relative.RELATIVE_METRICS`; good is a high rate, and a short time.
        :returns: the verdict, ``None`` where this is the other layout itself, whose numbers are kept for the others.
        :raises GpuLayoutError: the other layout has not been measured, or not in the same way.
        """
        return self._compare(parse_claim(other, metric, factor))


class LayoutGates:
    """What one process has measured of all layouts.

    :param is_worker: of pytest-xdist, whose other workers measure other layouts.
    :param began_utc: ISO 8601; what was stored before tells of the spread between starts.
    """

    def __init__(
        self,
        settings: Settings,
        wiring: Wiring,
        performance: Performance,
        servers: ServerOwner,
        live: LiveLine,
        *,
        is_worker: bool,
        began_utc: str,
    ) -> None:
        self._settings = settings
        self._wiring = wiring
        self._performance = performance
        self._servers = servers
        self._live = live
        self._is_worker = is_worker
        self._measured: list[Measured] = []
        self._began_utc = began_utc
        self._summary: RunSummary | None = None

    # -- what was measured ---------------------------------------------------------------------------------------

    def note(self, test: str, spec: ServerSpec, measurement: Measurement) -> None:
        """Keep a fresh measurement."""
        self._measured.append(Measured(test, spec, measurement))

    def recorded(self, before: Measurement, after: Measurement) -> None:
        """Know that a measurement is in the results. :param after: the same, with the starts that a gate added."""
        self._measured = [
            replace(one, measurement=after, is_recorded=True) if one.measurement is before else one
            for one in self._measured
        ]

    def unrecorded(self, *tests: str) -> list[Measurement]:
        """What these tests have measured that is not in the results yet, or not with all its starts."""
        return [one.measurement for one in self._measured if one.test in tests and not one.is_recorded]

    def last_of(self, test: str) -> Measured:
        """What a test has measured last.

        :raises MeasurementError: nothing.
        """
        found = next((one for one in reversed(self._measured) if one.test == test), None)
        if found is None:
            raise MeasurementError(
                "numbers of this layout were required for better_than, found none\n"
                f"  in {test}\n  measure in the test before it asks: measure()"
            )
        return found

    def replace_disturbed(self, one: Measured) -> None:
        """Let a fresh start take the place of the last one where the machine disturbed that, as a gate would."""
        began, first_s = time.monotonic(), one.measurement.runs[0].duration_s
        made = 0

        def measure_again(measurement: Measurement) -> Measurement:
            nonlocal made
            made += 1
            return self._performance.measure_on(one.spec, measurement)

        after = undisturbed(
            one.measurement,
            measure_again,
            name=f"{one.layout}: server start {len(one.measurement.runs)}",
            may_start=lambda _: not self._is_over_budget(time.monotonic() - began + first_s, made + 1),
            say=self._live.say,
        )
        self._grown(one, after)

    # -- relative gates ------------------------------------------------------------------------------------------

    def judge(self, own: Measured, claim: Claim) -> JudgedClaim:
        """Judge a claim, with fresh servers of both layouts in turn where the verdict needs them.

        Afterwards the test's own server is there when it is asked for.

        :raises GpuLayoutError: the other layout was not measured in the same way, or a server failed.
        """
        other = self._find(claim.other, own)
        began, first_s = time.monotonic(), own.measurement.runs[0].duration_s
        inputs = ClaimInputs(
            starts=self._settings.starts,
            over_budget=lambda made: self._is_over_budget(time.monotonic() - began + first_s, made + 1),
            say=self._live.say,
        )
        try:
            verdict, mine, theirs = judge_claim(
                claim, self._contestant(own, claim), self._contestant(other, claim), inputs
            )
        finally:
            self._servers.end_loan()
        self._grown(own, mine)
        self._grown(other, theirs)
        return JudgedClaim(verdict, mine, other.test)

    def _contestant(self, one: Measured, claim: Claim) -> Contestant:
        return Contestant(
            one.measurement,
            lambda measurement: self._performance.measure_on(one.spec, measurement),
            self._priors(one.measurement.identity.key, one.measurement.seconds)(claim.base_metric),
        )

    def _grown(self, before: Measured, after: Measurement) -> None:
        """Let the next gate begin with all starts that this one has made."""
        if after is not before.measurement:
            grown = replace(before, measurement=after, is_recorded=False)
            self._measured = [grown if one is before else one for one in self._measured]

    def _is_over_budget(self, elapsed_s: float, starts: int) -> bool:
        budget = self._settings.budget_s
        return budget is not None and elapsed_s + elapsed_s / starts > budget

    def _find(self, other: Layout, own: Measured) -> Measured:
        """What was measured of another layout under the same load: with the same prompts, else what came last.

        The n-th load of each layout has the same prompts: a server that has served for a while is compared with one
        that has, too.

        :raises MeasurementError: nothing of that layout, or of another model or load only.
        """
        known = [one for one in self._measured if one.layout == str(other)]
        if not known:
            raise MeasurementError(self._not_measured(other))
        key, seed = own.measurement.identity.key, own.measurement.runs[0].seed

        def distance(one: Measured) -> tuple[int, bool]:
            differences = load_differences(key, one.measurement.identity.key)
            return len(differences), one.measurement.runs[0].seed != seed

        found = min(reversed(known), key=distance)
        require_same_load(own.measurement, found.measurement)
        return found

    def _not_measured(self, other: Layout) -> str:
        layouts = ",".join(map(str, self._settings.layouts))
        if other not in self._settings.layouts:
            what_next = f"add it: --gpu-layout={other},{layouts}"
        elif self._is_worker:
            what_next = (
                "with pytest-xdist the tests of each layout have a worker of their own: run without -n, or with -n1"
            )
        else:
            what_next = (
                f"let a test measure {other} before this one (do -k, -m or a gpu_layout marker leave it out?): name "
                f"it first, --gpu-layout={other},..., or mark this test with gpu_better_than, which sees to the order"
            )
        return (
            f"numbers of layout {other} were required to compare with, and it was not measured before this test\n"
            f"  in this run, --gpu-layout={layouts}\n  {what_next}"
        )

    # -- the table -----------------------------------------------------------------------------------------------

    def summary(self, records: Sequence[tuple[str, Record]]) -> RunSummary:
        """Compare all layouts of the run; made once, when nothing will be added any more.

        :param records: (test id, record), of this process and of all workers.
        """
        if self._summary is None:
            tables, left_out = compare_layouts(
                records,
                priors_of=self._priors,
                hour_cost_usd=self._settings.hour_cost_usd,
            )
            lines: list[str] = []
            documents: list[Record] = []
            for table in tables:
                advice = advise(table)
                lines += [*table_lines(table), *advice_lines(advice)]
                documents.append({**table_document(table), "advice": advice.to_document()})
            self._summary = RunSummary((*lines, *left_out), tuple(documents))
        return self._summary

    def _priors(self, key: BaselineKey, seconds: float) -> PriorOf:
        """What is assumed of the spread between starts; where the store cannot be opened, what is documented."""
        try:
            store: BaselineStore | None = self._wiring.store()
        except GpuLayoutError:
            store = None
        return start_priors(store, key, seconds=seconds, before=self._began_utc)


def unjudged(measurement: Measurement, why: str) -> Verdict | None:
    """The verdict on numbers that no gate was asked about; ``None`` where there are no numbers at all."""
    try:
        if problems := measurement.problems():
            return Verdict(Status.INVALID, reasons=problems)
        return Verdict(Status.NO_BASELINE, reasons=(why,), advisory=advisory_changes(measurement, None))
    except MeasurementError:  # not one request was answered
        return None
