"""How many times as good one layout is as another by one metric, and whether that is as much as somebody claims.

Both were measured in one run, so what a run shares (the day, the node, the boot) is in both numbers and cancels; what
differs from one fresh server start to the next does not::

    ratio = exp(mean(ln own) - mean(ln other))        turned around where lower is better
    se^2  = s_own^2 / n_own + s_other^2 / n_other     each with a variance of its own (Welch, Biometrika 34, 1947)

``s^2`` is the variance between the starts of a layout, never less than what their batches make of it, pooled with
what is assumed of it (:func:`start_priors`): with one start nothing else is known. Degrees of freedom are by
Satterthwaite (Biometrics Bull. 2, 1946). A drift of the machine between the first starts of the two is no noise to
this, and is in the ratio; the starts that a gate adds take turns.

=============  ==================================================================================================
pass           the lower bound of the ratio lies above the factor: 5 % of the claims that are not true pass at most
fail           the upper bound lies below it: 1 % of the claims that are true fail at most
inconclusive   neither, so far; after the last start for good
=============  ==================================================================================================

Looks share these levels as in :mod:`~pytest_gpulayout.verdict`. While one of the layouts has a single start and more
may follow, a pass is as hard to get as an early false alarm. Knows nothing of servers and of files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from pytest_gpulayout.baseline import Baseline, BaselineKey, is_measurement
from pytest_gpulayout.errors import BaselineError, LayoutSyntaxError, MeasurementError
from pytest_gpulayout.gated import documented_prior
from pytest_gpulayout.judging import PriorOf, load_baseline, undisturbed
from pytest_gpulayout.layout import Layout, parse_layout
from pytest_gpulayout.metrics import SERVING
from pytest_gpulayout.pairs import MOST_STORED_DF, spread_of_starts
from pytest_gpulayout.report import plural, quantity
from pytest_gpulayout.stats import SETTLED_DF, Effect, NoisePrior, estimate_spread, mean
from pytest_gpulayout.tolerance import LARGEST_LOG
from pytest_gpulayout.verdict import MOST_STARTS, Look, MetricSample, batch_noise

if TYPE_CHECKING:
    from pytest_gpulayout.measurement import Measurement
    from pytest_gpulayout.ports import BaselineStore
    from pytest_gpulayout.report import Record

PER_UNIT = "_per_gpu"
"""At the end of a metric's name: divided by :func:`units_of` the layout."""

RELATIVE_METRICS = (*SERVING, f"request_throughput{PER_UNIT}", f"output_throughput{PER_UNIT}")
"""What a claim can be about; the last two are what a request, or a token, costs at one price per GPU."""

RelativeStatus = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Claim:
    """That a layout is more than ``factor`` times as good as another.

    :param metric: of :data:`RELATIVE_METRICS`; good is high for a rate, and low for a time.
    :param factor: above 0; 1 for just better, 0.9 for at most a little worse.
    """

    other: Layout
    metric: str
    factor: float = 1.0

    @property
    def base_metric(self) -> str:
        """The metric that is measured."""
        return self.metric.removesuffix(PER_UNIT)

    @property
    def is_per_unit(self) -> bool:
        """Whether it is divided by the number of GPUs."""
        return self.metric.endswith(PER_UNIT)


def parse_claim(other: Layout | str, metric: str, factor: float = 1.0) -> Claim:
    """Read the arguments of ``better_than``, of a call or of a marker.

    :raises LayoutSyntaxError: no layout, an unknown metric, or a factor that is no number above 0.
    """
    if metric not in RELATIVE_METRICS:
        near = get_close_matches(str(metric), RELATIVE_METRICS, n=3) or RELATIVE_METRICS
        raise LayoutSyntaxError(
            str(metric), 1, f"better_than: unknown metric {metric!r}, did you mean {', '.join(near)}?"
        )
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not (is_number and math.isfinite(factor) and factor > 0):
        raise LayoutSyntaxError(str(factor), 1, f"better_than: a factor above 0 was expected, found {factor!r}")
    return Claim(other if isinstance(other, Layout) else parse_layout(str(other)), metric, float(factor))


# -- levels and ratios -------------------------------------------------------------------------------------------


def units_of(layout: str, hardware: Mapping[str, Any]) -> int:
    """What has to be paid for while a layout serves: its GPUs; on the CPU platform the cores of the machine.

    A layout has the whole machine there: the cores beside those of its ranks run the server's front end.

    :param hardware: of a :class:`~pytest_gpulayout.baseline.BaselineKey`.
    """
    return int(hardware["count"]) if hardware["platform"] == "cpu" else parse_layout(layout).gpus


def level_of(samples: Sequence[MetricSample], prior: NoisePrior) -> Effect:
    """Return the logarithm of a layout's number with its standard error.

    :param samples: (n_starts,), at least one. :param prior: what is assumed of the spread between starts.
    """
    logs = [math.log(sample.value) for sample in samples]
    spread = estimate_spread([logs], (), logs[:1], prior, start_variance_floor=batch_noise(samples))
    return Effect(mean(logs), math.sqrt(spread.start_variance / len(logs)), spread.start_df)


def scaled(level: Effect, factor: float) -> Effect:
    """The level of a number times a known factor."""
    return Effect(level.size + math.log(factor), level.se, level.df)


def inverse(level: Effect) -> Effect:
    """The level of one over a number."""
    return Effect(-level.size, level.se, level.df)


def ratio_of(own: Effect, other: Effect) -> Effect:
    """The logarithm of own / other."""
    mine, theirs = own.se**2, other.se**2
    variance = mine + theirs
    df = variance**2 / (mine**2 / own.df + theirs**2 / other.df)
    return Effect(own.size - other.size, math.sqrt(variance), df)


def times_as_good(own: Effect, other: Effect, *, higher_is_better: bool) -> Effect:
    """The logarithm of how many times as good own is as other."""
    return ratio_of(own, other) if higher_is_better else ratio_of(other, own)


def number_of(log: float) -> float:
    """``e^log``; what has no floating-point number is cut."""
    return math.exp(max(-LARGEST_LOG, min(log, LARGEST_LOG)))


PRIOR_SECONDS = 10.0
"""How long a start has to measure for the documented spread to hold. A machine is faster in one second than in the
next, so shorter starts spread more: about by the square root (docs/comparing-layouts.md has the figures)."""


def start_priors(store: BaselineStore | None, key: BaselineKey, *, seconds: float, before: str) -> PriorOf:
    """Return what to assume of the spread between starts of a layout.

    That of its stored starts, with the documented one until they are enough to tell by themselves.

    :param store: where sessions of this key may be; their spread is used, never their level.
    :param seconds: that a start has measured; below :data:`PRIOR_SECONDS` more spread is assumed. 0 for no start.
    :param before: UTC, ISO 8601; sessions that were stored later may hold the very starts that are compared.
    """
    documented = _at(seconds, documented_prior(key))
    try:
        baseline = None if store is None else load_baseline(store, key)
    except BaselineError:
        baseline = None
    earlier = () if baseline is None else tuple(one for one in baseline.sessions if one.recorded < before)
    if not earlier:
        return lambda _: documented
    reference = Baseline(key, earlier).reference()

    def prior_of(metric: str) -> NoisePrior:
        spread = spread_of_starts([reference.level_samples(metric), *reference.other_samples(metric)])
        if spread is None:
            return documented
        weight = 0.0 if spread.df >= SETTLED_DF else documented.start_df
        variance = (weight * documented.start_sd**2 + spread.df * spread.variance) / (weight + spread.df)
        return replace(
            documented,
            start_sd=math.sqrt(variance),
            start_df=min(weight + spread.df, MOST_STORED_DF),
            source=f"the stored starts{f' and {documented.source}' if weight else ''}",
        )

    return prior_of


def _at(seconds: float, prior: NoisePrior) -> NoisePrior:
    if not 0 < seconds < PRIOR_SECONDS:
        return prior
    return replace(
        prior,
        start_sd=prior.start_sd * math.sqrt(PRIOR_SECONDS / seconds),
        source=f"{prior.source} for starts that measure less than {PRIOR_SECONDS:g} s",
    )


# -- the verdict -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RelativeVerdict:
    """A claim, judged.

    :param layout: that the claim is about. :param ratio: how many times as good as the other it is.
    :param ci: (low, high) of the ratio, the bounds that the verdict rests on.
    :param values: of this layout and of the other, in the metric's unit. :param starts: of both.
    :param enough: starts of each that would probably decide; ``None`` where :data:`MOST_STARTS` would not. Only
        where it is inconclusive.
    """

    claim: Claim
    layout: str
    status: RelativeStatus
    ratio: float
    ci: tuple[float, float]
    values: tuple[float, float]
    starts: tuple[int, int]
    enough: int | None = None

    @property
    def unit(self) -> str:
        """Of the values."""
        unit = SERVING[self.claim.base_metric].unit
        return f"{unit} per GPU" if self.claim.is_per_unit else unit

    def __str__(self) -> str:
        """``tp2 is 1.84 times as good as tp1 in request_throughput, more than 1.5 times was claimed: pass``."""
        claim = self.claim
        return (
            f"{self.layout} is {self.ratio:.3g} times as good as {claim.other} in {claim.metric}, "
            f"more than {claim.factor:g} times was claimed: {self.status}"
        )

    @property
    def evidence(self) -> str:
        """The numbers behind it, in one line."""
        own, other = (quantity(value, self.unit) for value in self.values)
        return (
            f"{own} against {other}, interval {self.ci[0]:.3g} to {self.ci[1]:.3g} times, "
            f"n = {plural(self.starts[0], 'start')} against {self.starts[1]}"
        )

    @property
    def what_it_takes(self) -> str:
        """What to do where it is inconclusive; ``""`` where it is not."""
        if self.status != "inconclusive":
            return ""
        if self.enough is None:
            limits = f"{self.ratio:.3g} from {self.claim.factor:g} times"
            return f"even {MOST_STARTS} starts of each would not tell {limits} here: claim less"
        budget = f"--gpu-starts={self.enough}, and time for them where --gpu-budget is set"
        return f"{self.enough} starts of each would probably tell ({budget}); or claim less"


def judge_ratio(
    claim: Claim, layout: str, levels: tuple[Effect, Effect], starts: tuple[int, int], look: Look
) -> RelativeVerdict:
    """Judge a claim by what there is now.

    :param levels: of this layout and of the other, as :func:`level_of` gives them. :param starts: of both.
    """
    own, other = levels
    higher = SERVING[claim.base_metric].higher_is_better
    found, limit = times_as_good(own, other, higher_is_better=higher), math.log(claim.factor)
    is_early = min(starts) == 1 and not look.is_last
    low, high = found.lower(look.alarm if is_early else look.miss), found.upper(look.alarm)
    status: RelativeStatus = "pass" if low > limit else "fail" if high < limit else "inconclusive"
    return RelativeVerdict(
        claim=claim,
        layout=layout,
        status=status,
        ratio=number_of(found.size),
        ci=(number_of(low), number_of(high)),
        values=(number_of(own.size), number_of(other.size)),
        starts=starts,
        enough=_enough_starts(found, limit, levels, starts) if status == "inconclusive" else None,
    )


def _enough_starts(found: Effect, limit: float, levels: tuple[Effect, Effect], starts: tuple[int, int]) -> int | None:
    """The fewest starts of each that show a distance such as this one in 80 of 100 runs, with noise as it was."""
    variance = sum(level.se**2 * count for level, count in zip(levels, starts, strict=True))
    for count in range(min(starts) + 1, MOST_STARTS + 1):
        look = Look(count, count)
        planned = Effect(0.0, math.sqrt(variance / count), found.df)
        if planned.detectable(look.miss if found.size > limit else look.alarm) <= abs(found.size - limit):
            return count
    return None


# -- the gate ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contestant:
    """One of the two layouts.

    :param measure_again: starts a fresh server of it and measures the same workload once more.
    :param prior: what is assumed of the spread between its starts, for the metric of the claim.
    """

    measurement: Measurement
    measure_again: Callable[[Measurement], Measurement]
    prior: NoisePrior

    @property
    def layout(self) -> str:
        """In its canonical form."""
        return self.measurement.identity.key.layout

    @property
    def starts(self) -> int:
        """Fresh servers that it was measured on."""
        return len(self.measurement.runs)

    def level(self, claim: Claim) -> Effect:
        """Where it stands by the metric of a claim.

        :raises MeasurementError: a start did not measure it, or measured zero.
        """
        samples = self.measurement.samples(claim.base_metric)
        if len(samples) < self.starts or not all(is_measurement(sample.batches) for sample in samples):
            raise MeasurementError(
                f"{claim.metric} of every start was required, found it in {len(samples)} of "
                f"{plural(self.starts, 'start')}, or zero\n  layout {self.layout}, workload "
                f"{self.measurement.workload.name}\n  claim something about a metric that this workload has"
            )
        found, key = level_of(samples, self.prior), self.measurement.identity.key
        return scaled(found, 1 / units_of(key.layout, key.hardware)) if claim.is_per_unit else found


@dataclass(frozen=True, slots=True)
class ClaimInputs:
    """What a relative gate works with.

    :param starts: most fresh server starts of each layout.
    :param over_budget: whether one more start would take too long, given how many this gate has made.
    :param say: takes a line on why one more start is made.
    """

    starts: int
    over_budget: Callable[[int], bool]
    say: Callable[[str], None]


def judge_claim(
    claim: Claim, own: Contestant, other: Contestant, inputs: ClaimInputs
) -> tuple[RelativeVerdict, Measurement, Measurement]:
    """Judge a claim with as many fresh starts of both layouts as it needs and the inputs allow.

    :returns: the verdict, and the measurements of both with all their starts.
    :raises MeasurementError: the two were not measured alike, or the numbers of one are not sound.
    """
    require_same_load(own.measurement, other.measurement)
    return _Contest(claim, inputs).run(own, other)


class _Contest:
    """One relative gate on its way through the starts."""

    def __init__(self, claim: Claim, inputs: ClaimInputs) -> None:
        self._claim = claim
        self._inputs = inputs
        self._made = 0

    def run(self, own: Contestant, other: Contestant) -> tuple[RelativeVerdict, Measurement, Measurement]:
        """Look after each start, until it is decided or nothing may be added."""
        own, other = self._sound(own), self._sound(other)
        while True:
            verdict, is_last = self._look(own, other)
            if is_last or verdict.status != "inconclusive":
                return verdict, own.measurement, other.measurement
            self._inputs.say(f"{own.layout}: {verdict} ({verdict.evidence}): one more start")
            if other.starts <= own.starts:
                other = self._once_more(other)
            if own.starts < other.starts:
                own = self._once_more(own)

    def _look(self, own: Contestant, other: Contestant) -> tuple[RelativeVerdict, bool]:
        most, number = self._inputs.starts, min(own.starts, other.starts)
        is_last = number >= most or self._inputs.over_budget(self._made)
        look = Look(most if is_last else number, most)
        levels = own.level(self._claim), other.level(self._claim)
        return judge_ratio(self._claim, own.layout, levels, (own.starts, other.starts), look), is_last

    def _once_more(self, side: Contestant) -> Contestant:
        self._made += 1
        return self._sound(replace(side, measurement=side.measure_again(side.measurement)))

    def _sound(self, side: Contestant) -> Contestant:
        """Let a fresh start take the place of a disturbed one, and refuse numbers that are not sound all the same."""
        measurement = undisturbed(
            side.measurement,
            side.measure_again,
            name=f"{side.layout}: server start {side.starts}",
            may_start=lambda _: not self._inputs.over_budget(self._made),
            say=self._inputs.say,
        )
        if problems := measurement.problems():
            raise MeasurementError(
                f"sound numbers of both layouts were required, those of {side.layout} are not\n"
                + "".join(f"  {problem}\n" for problem in problems)
                + "  mend the cause and run again"
            )
        return replace(side, measurement=measurement)


def require_same_load(own: Measurement, other: Measurement) -> None:
    """Do nothing when two layouts served the same model under the same load.

    :raises MeasurementError: they did not; the message names what differs.
    """
    if differences := load_differences(own.identity.key, other.identity.key):
        raise MeasurementError(
            "two layouts can be compared where they served the same model under the same load, and they did not\n"
            + "".join(f"  {difference}\n" for difference in differences)
            + "  measure both in the same way: let one test run for both layouts"
        )


def load_differences(own: BaselineKey, other: BaselineKey) -> tuple[str, ...]:
    """Name each field of model and load that differs, as ``model.dtype: tp2 'bfloat16', tp1 'float16'``.

    The name of a workload is none: its fingerprint says what is sent.
    """
    fields = [("model", name) for name in dict.fromkeys([*own.model, *other.model])] + [("workload", "fingerprint")]
    found = []
    for part, name in fields:
        mine, theirs = (getattr(key, part).get(name) for key in (own, other))
        if mine != theirs:
            names = [f" ({key.workload['name']})" if part == "workload" else "" for key in (own, other)]
            found.append(f"{part}.{name}: {own.layout} {mine!r}{names[0]}, {other.layout} {theirs!r}{names[1]}")
    return tuple(found)


# -- telling -----------------------------------------------------------------------------------------------------


def relative_lines(verdict: RelativeVerdict, where: str, other_test: str) -> list[str]:
    """Say what a relative gate found: what was claimed and found, where, and what to do.

    :param where: layout, devices, model and workload in one line. :param other_test: that measured the other layout.
    """
    claim = verdict.claim
    lines = [
        f"{verdict.status}: {verdict.layout} is required to be more than {claim.factor:g} times as good as "
        f"{claim.other} in {claim.metric}, found {verdict.ratio:.3g} times",
        f"    {verdict.evidence}",
        f"  {where}",
        f"  {claim.other} was measured by {other_test}",
    ]
    advice = verdict.what_it_takes or "claim less, or see in the table of layouts what holds it back"
    return [*lines, f"  {advice}"]


def relative_record(verdict: RelativeVerdict, workload: Mapping[str, Any]) -> Record:
    """A relative verdict as a record of the results. :param workload: its document."""
    claim = verdict.claim
    return {
        "kind": "better-than",
        "layout": verdict.layout,
        "other": str(claim.other),
        "metric": claim.metric,
        "factor": claim.factor,
        "verdict": verdict.status,
        "ratio": verdict.ratio,
        "ci": list(verdict.ci),
        "values": list(verdict.values),
        "unit": verdict.unit,
        "starts": list(verdict.starts),
        "workload": dict(workload),
        "text": f"{verdict} ({verdict.evidence})",
        "what_it_takes": verdict.what_it_takes,
    }
