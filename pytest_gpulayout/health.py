"""What goes bad in stored baselines with time, while every gate on them stays green.

Knows documents and dates; which files there are, and what anybody does about it, is left to others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date

from pytest_gpulayout.approval import got_better
from pytest_gpulayout.baseline import Baseline, BaselineKey, BaselineSession, Reference
from pytest_gpulayout.bimodality import find_modes
from pytest_gpulayout.gated import documented_prior, gated_of, is_of_links
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.reasons import FEW_SESSIONS
from pytest_gpulayout.report import plural
from pytest_gpulayout.standing import stand
from pytest_gpulayout.stats import t_cdf, variance
from pytest_gpulayout.tolerance import Tolerance, percent_text
from pytest_gpulayout.verdict import Look, MetricHistory, judge_metrics, log_sessions, overall_status

DRIFT_ALARM = 0.01
"""Probability that sessions in no order are called drifting, over all gated metrics of a baseline together."""

CONFIRMED = 0.05
"""Level at which the later sessions of a level have to be better than the level before."""

_UNCONFIRMED_LEVELS = 2
_MODE_SHIFT = (
    "a gate on them sees little: find what chooses between them (autotuning, CUDA graphs, clocks, NUMA node)"
)


@dataclass(frozen=True, slots=True)
class Rot:
    """One thing that is wrong with a stored baseline.

    :param kind: one word, such as ``stale``. :param text: what was found. :param advice: what to do, or to type.
    :param is_note: worth knowing, and no fault.
    """

    kind: str
    path: str
    text: str
    advice: str
    is_note: bool = False


@dataclass(frozen=True, slots=True)
class HealthRules:
    """What counts as rot.

    :param used: keys that somebody still measures, ``None`` where that is not known.
    """

    today: date
    max_age_days: int
    tolerances: Mapping[str, Tolerance]
    used: Sequence[BaselineKey] | None = None


def examine(baselines: Mapping[str, Baseline], rules: HealthRules) -> tuple[Rot, ...]:
    """Return what is wrong with these baselines.

    :param baselines: by the path that each lies at. :param rules: with the tolerances of all keys.
    """
    checks = (_stale, _waivers, _drifting, _ratcheted, _bimodal, _unused, _provisional)
    found: list[Rot] = []
    for path, baseline in baselines.items():
        own = replace(rules, tolerances=gated_of(baseline.key, rules.tolerances))
        found += [rot for check in checks for rot in check(path, baseline, own)]
    return (*_misplaced(baselines), *found, *_copied(baselines))


def unreadable(path: str, message: str) -> Rot:
    """What is wrong with a file that is no baseline. :param message: of the error, with its advice."""
    text, *rest = message.split("\n")
    advice = rest[-1].strip() if rest else "restore it (git checkout), or remove it"
    return Rot("unreadable", path, text, advice)


def _misplaced(baselines: Mapping[str, Baseline]) -> Iterator[Rot]:
    for path, baseline in baselines.items():
        if path != baseline.key.path:
            yield Rot(
                "foreign",
                path,
                f"it holds the key of {baseline.key.path}, so no measurement is ever compared with it",
                "move it there (git mv), or remove it",
            )


def _stale(path: str, baseline: Baseline, rules: HealthRules) -> Iterator[Rot]:
    newest = max(baseline.sessions, key=lambda session: session.recorded)
    try:
        age = (rules.today - date.fromisoformat(newest.recorded[:10])).days
    except ValueError:
        yield Rot("stale", path, f"its newest session has no date: {newest.recorded!r}", _record_again(baseline))
        return
    if age > rules.max_age_days:
        told = f"its newest session is of {newest.recorded[:10]}, {plural(age, 'day')} ago"
        yield Rot("stale", path, told, _record_again(baseline))
    elif age < -1:
        told = f"its newest session is of {newest.recorded[:10]}, which is still to come"
        yield Rot("stale", path, told, f"set the clock of the machine; {_record_again(baseline)}")


def _record_again(baseline: Baseline) -> str:
    return f"add a session: {_recording(baseline)}"


def _recording(baseline: Baseline) -> str:
    key = baseline.key
    if is_of_links(key):
        gate = "pytest --pyargs pytest_gpulayout.gates -k collectives"
        return f"{gate} --gpu-layout={key.layout} --gpu-model=ID_OR_PATH --gpu-baseline=update"
    return (
        f"pytest --gpu-layout={key.layout} --gpu-model={key.model['name']} "
        f"--gpu-workload={key.workload['name']} --gpu-baseline=update"
    )


def _provisional(path: str, baseline: Baseline, rules: HealthRules) -> Iterator[Rot]:
    standing = stand(baseline, rules.tolerances, today=rules.today.isoformat(), starts=1)
    count = len(standing.reference.sessions)
    if not standing.is_settled:
        told = f"verdicts are provisional: {plural(count, 'session')} of its newest level and epoch"
        more = f"{FEW_SESSIONS - count} more" if count < FEW_SESSIONS else "more"
        yield Rot("provisional", path, told, f"store {more}: gpulayout baseline approve RESULTS.json", is_note=True)


# -- waivers -----------------------------------------------------------------------------------------------------


def _waivers(path: str, baseline: Baseline, rules: HealthRules) -> Iterator[Rot]:
    reference = baseline.reference(today=rules.today.isoformat())
    accepted = reference.accepted
    if accepted is None or not accepted.until:
        return
    if reference.is_expired:
        yield Rot(
            "expired",
            path,
            f"a waiver ended on {accepted.until} ({accepted.reason}): gates judge against the level before it",
            "once it is mended: gpulayout baseline prune --expired; else waive it again: gpulayout baseline approve "
            "RESULTS.json --allow-worse --reason TEXT --until DATE",
        )
    elif _is_as_good_as_before(baseline, reference, rules):
        yield Rot(
            "unneeded",
            path,
            f"a waiver until {accepted.until} is in force ({accepted.reason}), and the newest session is as good as "
            "the level before it",
            f"end it: {_recording(baseline)}",
        )


def _is_as_good_as_before(baseline: Baseline, reference: Reference, rules: HealthRules) -> bool:
    """Whether the newest session passes against the level before the waiver."""
    levels = baseline.levels()
    if len(levels) < 2 or len(levels[-1]) < 2:
        return False
    before = Baseline(baseline.key, tuple(session for level in levels[:-1] for session in level))
    newest = reference.newest
    former = before.reference(newest.epoch)
    prior = documented_prior(baseline.key)
    histories = []
    for name, tolerance in rules.tolerances.items():
        current, level = newest.samples(name), former.level_samples(name)
        if current and level:
            histories.append(MetricHistory(tolerance, current, level, prior, former.other_samples(name)))
    return bool(histories) and overall_status(judge_metrics(histories, Look(1, 1))).passed


# -- means that move ---------------------------------------------------------------------------------------------


def _drifting(path: str, baseline: Baseline, rules: HealthRules) -> Iterator[Rot]:
    """Mann-Kendall on the session means of the level in force (Mann, Econometrica 13, 1945), and the size of it.

    Two-sided, at a level shared by the gated metrics: sessions whose order says nothing are called drifting in 1 % of
    baselines at most. Six sessions are the fewest that can show it. The size is Sen's slope (J. Am. Stat. Assoc. 63,
    1968) over the level's length; a drift within the tolerance is none.
    """
    from scipy.stats import kendalltau, theilslopes

    sessions = _level_in_force(baseline, rules)
    for name, tolerance in rules.tolerances.items():
        means = [mean for session in sessions if (mean := _session_mean(session, name)) is not None]
        order = range(len(means))
        if len(means) < 3 or kendalltau(order, means).pvalue > DRIFT_ALARM / len(rules.tolerances):
            continue
        moved = math.expm1(float(theilslopes(means, order).slope) * (len(means) - 1))
        if abs(math.log1p(moved)) > tolerance.margin:
            yield Rot(
                "drifting",
                path,
                f"{name} moved by {moved:+.1%} in {plural(len(means), 'session')} of one level, "
                f"with {percent_text(tolerance.fraction)} allowed from one to the next",
                f"find what moves it; then take a session of now for a new level: {_recording(baseline)}",
            )


def _level_in_force(baseline: Baseline, rules: HealthRules) -> list[BaselineSession]:
    """The sessions of the level that measurements are compared with, of all epochs, in order of time."""
    newest = baseline.reference(today=rules.today.isoformat()).newest
    level = next(level for level in baseline.levels() if any(session is newest for session in level))
    return sorted(level, key=lambda session: session.recorded)


def _session_mean(session: BaselineSession, metric: str) -> float | None:
    samples = session.samples(metric)
    return math.fsum(math.log(sample.value) for sample in samples) / len(samples) if samples else None


def _ratcheted(path: str, baseline: Baseline, rules: HealthRules) -> Iterator[Rot]:
    """Levels that each began with a better session, and were never confirmed: the best of many, kept as the rule.

    The first session of such a level was chosen for being good; those after it were not, and have to be better than
    the level before (t-test on session means, one-sided, 5 %). A gate begins a level by chance in at most 1 of 100
    sessions, so that two in a row by chance are 1 in 10 000; two real ones without later sessions are told as well,
    because nothing in the file distinguishes them.
    """
    levels = baseline.levels()
    for name in rules.tolerances:
        count = 0
        for before, level in zip(reversed(levels[:-1]), reversed(levels), strict=False):
            start = level[0].begins
            if start is None or not got_better(start, name) or _is_confirmed(before, level, name):
                break
            count += 1
        if count >= _UNCONFIRMED_LEVELS:
            yield Rot(
                "ratcheted",
                path,
                f"the newest {count} levels each began with one session in which {name} was better, and no later "
                "session shows that it stayed so: honest runs will fail",
                f"store sessions that were not chosen for being good: {_recording(baseline)}",
            )


def _is_confirmed(before: Sequence[BaselineSession], level: Sequence[BaselineSession], metric: str) -> bool:
    """Student's t-test of two samples with one variance, on the session means that were not chosen."""
    sign = -1.0 if METRICS[metric].higher_is_better else 1.0
    old, new = (
        [sign * mean for session in sessions if (mean := _session_mean(session, metric)) is not None]
        for sessions in (before, level[1:])
    )
    df = len(old) + len(new) - 2
    if not old or not new or not df:
        return False
    gap = math.fsum(new) / len(new) - math.fsum(old) / len(old)
    squares = variance(old) * (len(old) - 1) + variance(new) * (len(new) - 1)
    se = math.sqrt(squares / df * (1 / len(old) + 1 / len(new)))
    return gap < 0 if se == 0 else t_cdf(gap / se, df) < CONFIRMED


# -- numbers that are not what they seem ---------------------------------------------------------------------------


def _bimodal(path: str, baseline: Baseline, rules: HealthRules) -> Iterator[Rot]:
    reference = baseline.reference(today=rules.today.isoformat())
    for name in rules.tolerances:
        logs = [value for session in log_sessions(reference.level_samples(name)) for value in session]
        if modes := find_modes(logs):
            low, high = modes
            apart = math.expm1(high.center - low.center)
            yield Rot(
                "bimodal",
                path,
                f"{name} falls into two groups of starts, {low.share:.0%} and {high.share:.0%} of {len(logs)}, "
                f"{apart:.1%} apart",
                _MODE_SHIFT,
            )


def _unused(path: str, baseline: Baseline, rules: HealthRules) -> Iterator[Rot]:
    if rules.used is not None and not is_used(baseline.key, rules.used):
        yield Rot(
            "unused",
            path,
            "none of the results has its key",
            "remove it (gpulayout baseline prune --unused RESULTS.json), or find out which test no longer runs",
        )


def is_used(key: BaselineKey, used: Sequence[BaselineKey]) -> bool:
    """Whether one of these keys is compared with this one."""
    return any(not other.differences(key) for other in used)


def _copied(baselines: Mapping[str, Baseline]) -> Iterator[Rot]:
    """Starts with the same numbers to the last digit: nobody measured both."""
    seen: dict[tuple[object, ...], str] = {}
    for path, baseline in baselines.items():
        told: set[str] = set()
        for session in baseline.sessions:
            for run in session.runs:
                numbers = tuple(sorted(run.metrics.items()))
                place = f"the session of {session.recorded} in {path}"
                first = seen.setdefault(numbers, place)
                if first != place and place not in told:
                    told.add(place)
                    advice = "remove one of them: look at both with git log -p"
                    yield Rot("copied", path, f"{place} has the same numbers as {first}, to the last digit", advice)
