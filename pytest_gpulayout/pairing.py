"""The use case of a performance gate in paired mode: fresh servers of two sides in turn until the verdict is clear.

Through ports, and with time and chance as arguments. Needs no stored baseline, takes the spread between starts from
one where there is one, and writes nothing. The statistics are in :mod:`~pytest_gpulayout.pairs`, stored mode in
:mod:`~pytest_gpulayout.judging`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pytest_gpulayout.attribution import explain
from pytest_gpulayout.baseline import Reference
from pytest_gpulayout.errors import BaselineError, MeasurementError, ServerError
from pytest_gpulayout.judging import advisory_changes, invalid_verdict, load_baseline, undisturbed, unjudgeable
from pytest_gpulayout.measurement import Identity, Measurement
from pytest_gpulayout.pairs import (
    FEWEST_BLOCKS,
    MOST_BLOCKS,
    PairedHistory,
    StartSpread,
    is_look,
    judge_pairs,
    sign_count,
    spread_of_starts,
)
from pytest_gpulayout.ports import BaselineStore
from pytest_gpulayout.reasons import replaced_texts, stopped_early
from pytest_gpulayout.report import plural
from pytest_gpulayout.tolerance import Tolerance, percent_text
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.validity import Problem
from pytest_gpulayout.verdict import MetricVerdict, Status, Verdict, changed_fields, overall_status

Start = tuple[RunTrace, tuple[Problem, ...], Mapping[str, float]]
"""One server start: what was measured on it, what was wrong beside it, and what else was seen of it."""

_LARGEST_ADVISED = 0.5  # a tolerance beyond it would hide what a gate is for


@dataclass(frozen=True, slots=True)
class BaseSide:
    """What the candidate is compared with.

    :param name: as the user named it. :param start: starts a fresh server of it and sends the load of a seed.
    :param identify: what it is, given what the candidate is; asked after its first start.
    :param restarts: ``False`` for a server that runs elsewhere and answers throughout.
    :param remarks: what cannot be proved of it, in sentences; asked at the end.
    """

    name: str
    start: Callable[[int], Start]
    identify: Callable[[Identity], Identity]
    restarts: bool = True
    remarks: Callable[[], tuple[str, ...]] = tuple


@dataclass(frozen=True, slots=True)
class PairingInputs:
    """What a paired gate works with.

    :param start_candidate: starts a fresh server of the candidate and sends the load of a seed.
    :param blocks: most blocks. :param budget_s: most seconds of measuring, ``None`` for no limit.
    :param store: where a stored spread may be; ``None`` to look for none.
    :param new_seed: of prompts and arrivals, the same for both sides of a block.
    :param now_utc: wall clock, ISO 8601. :param elapsed_s: seconds since the gate began.
    :param say: takes a line on each block.
    """

    base: BaseSide
    start_candidate: Callable[[int], Start]
    tolerances: Mapping[str, Tolerance]
    blocks: int
    budget_s: float | None
    store: BaselineStore | None
    new_seed: Callable[[], int]
    now_utc: Callable[[], str]
    elapsed_s: Callable[[], float]
    say: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PairedResult:
    """The verdict with everything that it rests on. :param base: ``None`` where it never was measured."""

    verdict: Verdict
    candidate: Measurement
    base: Measurement | None = None


def judge_in_pairs(measurement: Measurement, inputs: PairingInputs) -> PairedResult:
    """Judge a candidate against the base, block by block.

    :param measurement: of one start of the candidate: the first half of the first block.
    :raises ServerError: a server of either side did not come up, or went away; it is said which.
    :raises MeasurementError: nothing could be measured on it.
    """
    return _Pairing(measurement, inputs).run()


def block_order(blocks: int, seed: int) -> tuple[bool, ...]:
    """For each block, whether the candidate is first; in every two blocks each side is first once.

    A drift of the machine then cancels, also where the gate stops early. The first block begins with the candidate,
    whose server already runs.
    """
    chance = random.Random(seed)
    order = [True, False]
    while len(order) < blocks:
        first = chance.random() < 0.5
        order += [first, not first]
    return tuple(order[:blocks])


class _Pairing:
    """One gate on its way through the blocks."""

    def __init__(self, measurement: Measurement, inputs: PairingInputs) -> None:
        self.inputs = inputs
        self.candidate = measurement
        self.base: Measurement | None = None
        self.order = block_order(inputs.blocks, measurement.runs[0].seed)
        self.spreads, self.spread_text = self._stored_spreads()

    def run(self) -> PairedResult:
        """Measure and look, until the verdict is clear or nothing may be added."""
        for number, candidate_first in enumerate(self.order, 1):
            if problems := self._block(number, candidate_first):
                return self._invalid(problems)
            last = number == self.inputs.blocks or self._over_budget(number)
            histories = self._histories()
            metrics = self._judge(histories, number, is_last=last)
            self.inputs.say(self._block_line(number, metrics, histories))
            if last or (is_look(number, self.inputs.blocks) and _is_clear(metrics)):
                break
        return self._result(metrics, histories)

    # -- measuring -------------------------------------------------------------------------------------------------

    def _block(self, number: int, candidate_first: bool) -> tuple[str, ...]:
        """Measure both sides of a block, one after the other; say what was wrong with each, and with the two."""
        seed = self.candidate.runs[0].seed if number == 1 else self.inputs.new_seed()
        sides = [self._measure_candidate, self._measure_base]
        for measure in sides if candidate_first else reversed(sides):
            if problems := measure(number, seed):
                return problems
        return self._token_difference(number)

    def _measure_candidate(self, number: int, seed: int) -> tuple[str, ...]:
        def once_more(measurement: Measurement) -> Measurement:
            return measurement.with_run(*self.inputs.start_candidate(seed))

        with _blaming("candidate", number):
            if number > 1:
                self.candidate = once_more(self.candidate)
            self.candidate = self._undisturbed("candidate", self.candidate, once_more, self.base)
        return self._problems("candidate", self.candidate)

    def _measure_base(self, number: int, seed: int) -> tuple[str, ...]:
        def once_more(measurement: Measurement | None) -> Measurement:
            start = self.inputs.base.start(seed)
            if measurement is None:  # it can be asked what it is once it has run
                identity = self.inputs.base.identify(self.candidate.identity)
                measurement = Measurement(identity, self.candidate.workload, ())
            return measurement.with_run(*start)

        side = f"base {self.inputs.base.name}"
        with _blaming(side, number):
            self.base = self._undisturbed(side, once_more(self.base), once_more, self.candidate)
        return self._problems(side, self.base)

    def _undisturbed(
        self,
        side: str,
        measurement: Measurement,
        once_more: Callable[[Measurement], Measurement],
        other: Measurement | None,
    ) -> Measurement:
        """Let a fresh start take the place of a disturbed one. :param other: the other side, if it has run."""
        number = len(measurement.runs)
        return undisturbed(
            measurement,
            once_more,
            name=f"{side}: the server of block {number}",
            may_start=lambda _: not self._over_budget(number),
            say=self.inputs.say,
            elsewhere=len(other.replaced) if other else 0,
        )

    def _problems(self, side: str, measurement: Measurement) -> tuple[str, ...]:
        """Say whose numbers are not sound, and which start's."""
        invalid = invalid_verdict(measurement, "")
        reasons = invalid.reasons if invalid else unjudgeable(measurement, self.inputs.tolerances)
        return tuple(f"{side}: {reason}" for reason in reasons)

    def _token_difference(self, number: int) -> tuple[str, ...]:
        """What the two sides of a block were not asked, or did not answer, alike."""
        assert self.base is not None
        candidate, base = self.candidate.runs[number - 1], self.base.runs[number - 1]
        counts = {"prompt": (_prompt_tokens(candidate), _prompt_tokens(base))}
        if self.candidate.workload.expects_exact_output:
            counts["output"] = (_output_tokens(candidate), _output_tokens(base))
        return tuple(
            f"token-counts: the same number of {kind} tokens is required of both sides, the candidate had {mine}, "
            f"the base {theirs} (block {number}): do they serve the same model, with the same tokenizer?"
            for kind, (mine, theirs) in counts.items()
            if mine != theirs
        )

    def _over_budget(self, blocks: int) -> bool:
        """Whether one more block, as long as those so far, would end after the budget."""
        budget, elapsed = self.inputs.budget_s, self.inputs.elapsed_s()
        return budget is not None and elapsed + elapsed / blocks > budget

    # -- judging ---------------------------------------------------------------------------------------------------

    def _stored_spreads(self) -> tuple[Mapping[str, StartSpread], str]:
        """The stored spread between starts of each gated metric, and a sentence on it."""
        alone = "the spread between starts is that of these blocks alone"
        if self.inputs.store is None:
            return {}, alone
        key = self.candidate.identity.key
        try:
            baseline = load_baseline(self.inputs.store, key)
        except BaselineError as error:
            return {}, f"{alone}; what is stored cannot be used: {str(error).partition(chr(10))[0]}"
        if baseline is None:
            return {}, alone
        reference = baseline.reference(self.candidate.identity.epoch)
        found = {
            name: spread_of_starts([reference.level_samples(name), *reference.other_samples(name)])
            for name in self.inputs.tolerances
        }
        spreads = {name: spread for name, spread in found.items() if spread is not None}
        place = f"{self.inputs.store.root.rstrip('/')}/{key.path}"
        return spreads, f"the spread between starts is that of these blocks and of {place}" if spreads else alone

    def _histories(self) -> list[PairedHistory]:
        assert self.base is not None
        return [
            PairedHistory(
                tolerance,
                self.candidate.samples(name),
                self.base.samples(name),
                self.spreads.get(name),
                self.inputs.base.restarts,
            )
            for name, tolerance in self.inputs.tolerances.items()
        ]

    def _judge(self, histories: Sequence[PairedHistory], blocks: int, *, is_last: bool) -> tuple[MetricVerdict, ...]:
        if blocks < 2:
            return ()
        return judge_pairs(histories, most=self.inputs.blocks, is_last=is_last)

    def _block_line(self, number: int, metrics: Sequence[MetricVerdict], histories: Sequence[PairedHistory]) -> str:
        """``block 4 of at most 8, base old: median_tpot_ms +3.1% [-0.4%, +6.5%]``; what is decided says so."""
        told = [
            f"{m.name} {m.change:+.1%} " + (f"[{m.ci[0]:+.1%}, {m.ci[1]:+.1%}]" if _is_open(m) else str(m.status))
            for m in metrics
        ]
        if not metrics:
            changes = ((h.tolerance.metric, h.candidate[0].value / h.base[0].value - 1) for h in histories)
            told = [f"{name} {change:+.1%}" for name, change in changes]
        layout, name = self.candidate.identity.key.layout, self.inputs.base.name
        return f"{layout}: block {number} of at most {self.inputs.blocks}, base {name}: {', '.join(told)}"

    # -- telling ---------------------------------------------------------------------------------------------------

    def _invalid(self, problems: tuple[str, ...]) -> PairedResult:
        reasons = (*problems, *self._replaced())
        verdict = Verdict(Status.INVALID, reasons=reasons, baseline_path=f"base {self.inputs.base.name}")
        return PairedResult(verdict, self.candidate, self.base)

    def _result(self, metrics: tuple[MetricVerdict, ...], histories: Sequence[PairedHistory]) -> PairedResult:
        assert self.base is not None
        reference = Reference((self.base.as_session(self.inputs.now_utc()),))
        changed = differences_of_sides(self.base.identity, self.candidate.identity)
        verdict = Verdict(
            overall_status(metrics),
            reasons=(*self._open_ones(metrics), *self._about(histories, changed)),
            metrics=metrics,
            advisory=advisory_changes(self.candidate, reference, gated=self.inputs.tolerances),
            changed=changed,
            cause=explain(metrics, reference, self.candidate, changed),
            baseline_path=f"base {self.inputs.base.name}",
        )
        return PairedResult(verdict, self.candidate, self.base)

    def _open_ones(self, metrics: Sequence[MetricVerdict]) -> list[str]:
        """Say for each metric that is not decided what was seen, and what it would take."""
        assert self.base is not None
        done = len(self.base.runs)
        if overall_status(metrics) is Status.REGRESSION:
            return stopped_early(metrics)
        reasons = [
            f"{m.name}: changed by {m.change:+.1%}, interval {m.ci[0]:+.1%} to {m.ci[1]:+.1%}; a change of "
            f"{percent_text(m.tolerance)} cannot be ruled out with {plural(done, 'block')}: "
            f"{_what_it_takes(m, self.inputs.blocks)}"
            for m in metrics
            if _is_open(m)
        ]
        if done < self.inputs.blocks and (reasons or not metrics):
            few = f"; a verdict needs {FEWEST_BLOCKS} at least" if done < FEWEST_BLOCKS else ""
            reasons.append(
                f"the budget of {self.inputs.budget_s:g} s ended after {plural(done, 'block')} of at most "
                f"{self.inputs.blocks}{few}: allow more (--gpu-budget)"
            )
        return reasons

    def _about(self, histories: Sequence[PairedHistory], changed: Sequence[str]) -> list[str]:
        """Both sides, the blocks, and what else a reader must know."""
        assert self.base is not None
        side = self.inputs.base
        done = len(self.base.runs)
        order = " ".join("CB" if first else "BC" for first in self.order[:done])
        versions = [measurement.identity.sut.get("vllm") or "unknown" for measurement in (self.candidate, self.base)]
        kind = "fresh servers of both sides" if side.restarts else "fresh servers of the candidate"
        lines = [
            f"candidate (vLLM {versions[0]}) against base {side.name} (vLLM {versions[1]}): "
            f"{plural(done, 'block')}, {kind}, in the order {order}; {self.spread_text}"
        ]
        lines.append(
            "signs: " + ", ".join(f"{history.tolerance.metric} {sign_count(history)}" for history in histories)
        )
        if not changed:
            lines.append("nothing that is recorded of both sides differs: this compares them with themselves")
        if not side.restarts:
            lines.append(
                "the base was one server throughout: how lucky its start was is in every block, so it counts as one "
                "draw, and the intervals are wider; a Python or a folder as --gpu-base is restarted for each block"
            )
        return [*lines, *self._replaced(), *side.remarks()]

    def _replaced(self) -> list[str]:
        base = self.base.replaced if self.base else ()
        return [
            *replaced_texts(self.candidate.replaced, "of the candidate "),
            *replaced_texts(base, f"of the base {self.inputs.base.name} "),
        ]


def differences_of_sides(base: Identity, candidate: Identity) -> tuple[str, ...]:
    """Name what differs, base first, as ``vllm: 0.31.0 -> 0.32.0``; leave out what the base does not tell."""
    parts = ((base.sut, candidate.sut), (base.epoch, candidate.epoch), (base.covariates, candidate.covariates))
    return tuple(
        change
        for theirs, mine in parts
        for change in changed_fields(
            {name: value for name, value in theirs.items() if value is not None},
            {name: value for name, value in mine.items() if theirs.get(name) is not None},
        )
    )


@contextmanager
def _blaming(side: str, number: int) -> Iterator[None]:
    """Say whose server it was that failed; the rest of the message is complete."""
    try:
        yield
    except (ServerError, MeasurementError) as error:
        kind = ServerError if isinstance(error, ServerError) else MeasurementError
        raise kind(f"the {side} of paired mode could not be measured in block {number}\n{error}") from error


def _prompt_tokens(run: RunTrace) -> int:
    return sum(request.prompt_tokens for request in run.requests)


def _output_tokens(run: RunTrace) -> int:
    return sum(request.output_tokens for request in run.requests)


def _is_clear(metrics: Sequence[MetricVerdict]) -> bool:
    """Whether no further block can change the verdict of them all: a metric that got worse stays so."""
    return overall_status(metrics) is Status.REGRESSION or not any(map(_is_open, metrics))


def _is_open(metric: MetricVerdict) -> bool:
    return metric.status is Status.INCONCLUSIVE


def _what_it_takes(metric: MetricVerdict, blocks: int) -> str:
    """What to do for a verdict on a metric. :param blocks: that the gate may make now."""
    needed = metric.requirement
    accept = ""
    if metric.min_detectable <= _LARGEST_ADVISED:
        accept = f", or accept a larger change (--gpu-tolerance={metric.name}={metric.min_detectable:.1%})"
    if needed is not None and needed.starts is None:
        return f"even {MOST_BLOCKS} blocks would hide changes below {needed.smallest:.1%} here{accept}"
    if needed is not None and needed.starts is not None and needed.starts > blocks:
        return f"allow more blocks (--gpu-starts={needed.starts}){accept}"
    if blocks < MOST_BLOCKS:
        more = min(2 * blocks, MOST_BLOCKS)
        return f"it lies near the limit; more blocks narrow it (--gpu-starts={more}){accept}"
    return f"it lies near the limit{accept}"
