"""What else is different where a metric moved: which part of the latency, what of the machine and the software.

Knows how numbers of this session are compared with those of stored ones, and which differences are told first. Leaves
judging to :mod:`~pytest_gpulayout.verdict`, and taking the numbers to :mod:`~pytest_gpulayout.observed`.

That two things changed together is a fact; that one caused the other is not known here, and never claimed. The order
is by what can act on the part that moved: the way between GPUs acts on prefill and decode, clocks on everything the
GPUs do, room in the KV cache on the queue, what runs beside the server on the client and the front end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_gpulayout.baseline import BaselineSession, Reference
from pytest_gpulayout.drift import describe_drift
from pytest_gpulayout.measurement import Identity, Judgeable
from pytest_gpulayout.metrics import COLLECTIVES
from pytest_gpulayout.observed import OBSERVED
from pytest_gpulayout.report import aligned, plural, quantity
from pytest_gpulayout.stats import median
from pytest_gpulayout.verdict import MetricVerdict, Status, Verdict

SPREADS = 3.0
"""A number moved when it is further from the stored median than so many times its scatter: Hampel's rule (R. K.
Pearson, "Outliers in process modeling and identification", IEEE Trans. Control Syst. Technol. 10, 2002), which one
odd server start does not move."""

_MAD_OF_NORMAL = 1.4826  # standard deviation / median absolute deviation of a normal distribution
_TOLD_SHARE = 0.1  # of what all parts of TTFT changed: one that adds less is not named in the sentence,
_TOLD_OF_TTFT = 0.02  # nor one that adds less than this to TTFT as it was
_MANIFOLD = 10.0
_MOST_NAMED = 3
_LONGEST_TEXT = 80
_NOT_RECORDED = "not compared, since not recorded on both sides"


@dataclass(frozen=True, slots=True)
class _Number:
    """A number in the stored starts and in those now. :param moved: by more than it scatters."""

    label: str
    unit: str
    before: float
    now: float
    moved: bool

    @property
    def change(self) -> str:
        """``+12.3%``, ``41 times`` from tenfold on; nothing for no change, and for one from zero."""
        if self.before == 0 or f"{self.now / self.before - 1:.1%}" in ("0.0%", "-0.0%"):
            return ""
        ratio = self.now / self.before
        return f"{ratio - 1:+.1%}" if ratio < _MANIFOLD else f"{ratio:.3g} times"

    @property
    def ratio(self) -> float:
        """How far apart the two are, whichever is larger."""
        low, high = sorted((self.before, self.now))
        return high / low if low else math.inf if high else 1.0

    @property
    def values(self) -> tuple[str, str]:
        return _value(self.before, self.unit), _value(self.now, self.unit)

    @property
    def row(self) -> tuple[str, str, str, str]:
        return self.label, *self.values, self.change if self.moved else f"{self.change} as before".lstrip()


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the latency. :param clause: with a place for ``longer`` or ``shorter``."""

    noun: str
    clause: str
    number: _Number

    @property
    def told(self) -> str:
        before, now = (_bare(value) for value in (self.number.before, self.number.now))
        word = "longer" if self.number.now > self.number.before else "shorter"
        return f"{self.clause.format(word)} ({before} -> {now} {self.number.unit})"


@dataclass(frozen=True, slots=True)
class _Change:
    """Something that is different now.

    :param group: of :data:`_GROUPS`. :param text: from what to what. :param line: of the table, if it has one.
    :param is_known: on both sides.
    """

    group: str
    label: str
    text: str
    line: str = ""
    is_known: bool = True

    @property
    def name(self) -> str:
        return self.label if self.label in _PROPER_NAMES else f"the {self.label}"


_CLAUSES = {
    "client_ms": ("client", "the client takes {} to send"),
    "network_and_frontend_ms": ("network/front end", "network and front end take {}"),
    "queue_ms": ("queue", "requests wait {} in the queue"),
    "prefill_ms": ("prefill", "prefill takes {}"),
}
_GROUPS = ("wiring", "clocks", "software", "driver", "arguments", "memory", "client", "placement", "elsewhere")
_FIRST_FOR = {
    "decode": ("wiring", "clocks"),
    "prefill": ("wiring", "clocks"),
    "queue": ("memory", "arguments"),
    "client": ("client", "placement", "elsewhere"),
    "network/front end": ("client", "placement", "elsewhere"),
}
_FIELDS = {
    "transport": ("wiring", "transport"),
    "all_reduce": ("wiring", "all-reduce backends"),
    "fabric": ("wiring", "fabric"),
    "nccl": ("software", "NCCL"),
    "vllm": ("software", "vLLM"),
    "torch": ("software", "torch"),
    "flashinfer": ("software", "FlashInfer"),
    "python": ("software", "Python"),
    "image": ("software", "container image"),
    "driver": ("driver", "driver"),
    "cuda": ("driver", "CUDA"),
    "kernel": ("driver", "kernel"),
    "arguments": ("arguments", "arguments"),
    "client scheduling": ("client", "client's scheduling"),
    "gpus": ("placement", "GPUs"),
    "cpu": ("placement", "CPU"),
    "binding": ("placement", "binding"),
    "cores of ranks": ("placement", "cores of the ranks"),
    "VLLM_CPU_OMP_THREADS_BIND": ("placement", "VLLM_CPU_OMP_THREADS_BIND"),
}
_PROPER_NAMES = ("NCCL", "vLLM", "torch", "FlashInfer", "Python", "CUDA", "VLLM_CPU_OMP_THREADS_BIND")
_NUMBERS = {
    "sm_clock_mhz": "clocks",
    "memory_clock_mhz": "clocks",
    "cpu_clock_mhz": "clocks",
    "kv_cache_tokens": "memory",
    "preemptions": "memory",
}
_CLOCKS = ("sm_clock_mhz", "cpu_clock_mhz")


def explain(
    metrics: Sequence[MetricVerdict],
    reference: Reference,
    measurement: Judgeable,
    changed: Sequence[str],
    *,
    against: str = "baseline",
) -> tuple[str, ...]:
    """Say what else is different where a metric got worse or better.

    :param metrics: the judged ones. :param reference: what they were compared with.
    :param changed: fields that differ from its newest session, as
        :func:`~pytest_gpulayout.verdict.changed_fields` names them.
    :param against: what the other side is called.
    :returns: a sentence, then the lines of a table; nothing where no metric moved.
    """
    moved = sorted(filter(_has_moved, metrics), key=lambda m: (m.status is not Status.REGRESSION, -_size(m)))
    if not moved:
        return ()
    numbers = _observed(reference, measurement)
    parts = _parts(numbers, reference, measurement)
    changes = [
        *_of_wiring(reference.newest, measurement.identity),
        *_of_numbers(numbers),
        *(_of_field(change, against) for change in changed),
    ]
    told = _told(parts)
    changes = _in_order(changes, told)
    of_links = all(metric.name in COLLECTIVES for metric in moved)
    aspects = _Aspects(reference.newest, measurement.identity, numbers, of_links)
    part = "" if of_links else f"{_of_parts(parts, told)}; "
    sentence = f"{_heads(moved)}: {part}{_of_changes(changes, aspects, against)}"
    return sentence, *_rows(parts, numbers, against), *_lines(changes, aspects)


def with_links(cause: tuple[str, ...], told: str) -> tuple[str, ...]:
    """Return what :func:`explain` said, and beside it what is known of the links themselves.

    :param told: by :func:`told_of_links`; ``""`` where they were not probed.
    """
    return (f"{cause[0]}; {told}", *cause[1:]) if cause and told else cause


def told_of_links(verdict: Verdict, findings: Sequence[str] = ()) -> str:
    """Say whether the links themselves were slower, before a server had its part in it.

    :param verdict: on their probe. :param findings: links that are slower than their class must be, in sentences.
    """
    moved = sorted((m for m in verdict.metrics if m.status is verdict.status), key=lambda m: -_size(m))
    match verdict.status:
        case _ if findings:
            return f"the link itself is slow: {findings[0]}"
        case Status.REGRESSION:
            return f"the link itself is slower, without a server: {_heads(moved)}"
        case Status.IMPROVEMENT:
            return f"the link itself is not slower: {_heads(moved)}"
        case Status.PASS:
            return "the link itself is as fast as its baseline"
        case Status.INCONCLUSIVE:
            named = _joined(f"{metric.name} {metric.change:+.1%}" for metric in moved[:_MOST_NAMED])
            return f"whether the link itself is slower is open: {named}"
        case _:
            return f"the link itself was probed and not judged: {next(iter(verdict.reasons), verdict.status)}"


def _has_moved(metric: MetricVerdict) -> bool:
    return metric.status in (Status.REGRESSION, Status.IMPROVEMENT)


def _size(metric: MetricVerdict) -> float:
    return round(abs(math.log1p(metric.change)), 3)  # half as fast is as far as twice as long


def _heads(moved: Sequence[MetricVerdict]) -> str:
    """``median_tpot_ms rose by 212% and request_throughput fell by 68%``."""
    named, rest = moved[:_MOST_NAMED], len(moved) - _MOST_NAMED
    texts = [f"{m.name} {'rose' if m.change > 0 else 'fell'} by {_percent(abs(m.change))}" for m in named]
    return _joined([*texts, f"{plural(rest, 'more metric')} moved"] if rest > 0 else texts)


# -- numbers ---------------------------------------------------------------------------------------------------------


def _compare(label: str, unit: str, stored: Sequence[float], now: Sequence[float], least: float) -> _Number | None:
    """Compare medians over starts; ``None`` where one side has none.

    :param least: relative change below which it has not moved, however little it scatters.
    """
    if not stored or not now:
        return None
    before, after = median(stored), median(now)
    scatter = _MAD_OF_NORMAL * max(_mad(stored), _mad(now))
    limit = max(SPREADS * scatter, least * abs(before))
    return _Number(label, unit, before, after, moved=abs(after - before) > limit)


def _mad(values: Sequence[float]) -> float:
    middle = median(values)
    return median([abs(value - middle) for value in values])


def _observed(reference: Reference, measurement: Judgeable) -> dict[str, _Number]:
    """All numbers of :data:`OBSERVED` that both sides have."""
    runs = [run for session in reference.sessions for run in session.runs]
    found = {}
    for name, item in OBSERVED.items():
        stored = [run.observed[name] for run in runs if name in run.observed]
        now = [start[name] for start in measurement.observed() if name in start]
        if number := _compare(item.label, item.unit, stored, now, item.least):
            found[name] = number
    return found


def _of_metric(metric: str, label: str, unit: str, reference: Reference, measurement: Judgeable) -> _Number | None:
    """A stored metric as a part of the latency: baselines have it that have no other numbers."""
    stored = [sample.value for session in reference.level_samples(metric) for sample in session]
    now = [sample.value for sample in measurement.samples(metric)]
    return _compare(label, unit, stored, now, OBSERVED["decode_per_token_ms"].least)


# -- parts of the latency --------------------------------------------------------------------------------------------


def _parts(numbers: Mapping[str, _Number], reference: Reference, measurement: Judgeable) -> list[_Part]:
    """Where the time of a request goes, in the order in which it passes; only what is known on both sides."""
    parts = [_Part(noun, clause, numbers[name]) for name, (noun, clause) in _CLAUSES.items() if name in numbers]
    if not parts:
        first = _of_metric("median_ttft_ms", "time to first token, median", "ms", reference, measurement)
        parts += [_Part("the time to the first token", "the first token takes {}", first)] if first else []
    decode = numbers.get("decode_per_token_ms") or _of_metric(
        "median_tpot_ms", "decode, per token, median", "ms", reference, measurement
    )
    if decode:
        spoken = _Number(decode.label, "ms a token", decode.before, decode.now, decode.moved)
        parts.append(_Part("decode", "decode takes {}", spoken))
    return parts


def _told(parts: Sequence[_Part]) -> list[_Part]:
    """The parts that moved and matter, the one that changed most first."""
    of_ttft = [part for part in parts if part.noun != "decode"]
    least = max(
        _TOLD_SHARE * sum(abs(part.number.now - part.number.before) for part in of_ttft),
        _TOLD_OF_TTFT * sum(part.number.before for part in of_ttft),
    )
    matter = [p for p in parts if p.noun == "decode" or abs(p.number.now - p.number.before) >= least]
    return sorted((part for part in matter if part.number.moved), key=lambda part: -part.number.ratio)


def _of_parts(parts: Sequence[_Part], told: Sequence[_Part]) -> str:
    if not parts:
        return "which part of the latency moved was not recorded"
    if not told:
        most = max(parts, key=lambda part: part.number.ratio)
        text = "no part of the latency moved by more than it scatters"
        return f"{text}; most of all, {most.told}" if most.number.ratio > 1 else text
    others = [part.noun for part in parts if part not in told]
    text = _joined(part.told for part in told)
    return text + (f", {_joined(others)} {'are' if len(others) > 1 else 'is'} as before" if others else "")


# -- what changed along with it --------------------------------------------------------------------------------------


def _of_field(change: str, against: str) -> _Change:
    name, _, values = change.partition(": ")
    before, arrow, now = values.partition(" -> ")
    group, label = _FIELDS.get(name, ("elsewhere", name.replace("_", " ")))
    text = f"from {before or 'none'} to {now or 'none'}"
    return _Change(
        group,
        label,
        text if len(text) <= _LONGEST_TEXT else "(in full below)",
        line=f"changed since the {against}: {change}",
        is_known=bool(arrow) and "unknown" not in (before, now),
    )


def _of_wiring(stored: BaselineSession, identity: Identity) -> Iterator[_Change]:
    """The wiring, which has a line of its own above the verdict."""
    if drift := describe_drift(stored.topology, identity.topology):
        text = drift.partition(": ")[2]
        yield _Change("wiring", "wiring", f"({text})" if len(text) <= _LONGEST_TEXT else "(in full above)")


def _of_numbers(numbers: Mapping[str, _Number]) -> Iterator[_Change]:
    for name, group in _NUMBERS.items():
        if name in numbers and numbers[name].moved:
            before, now = numbers[name].values
            yield _Change(group, numbers[name].label, f"from {before} to {now}")


def _in_order(changes: Iterable[_Change], told: Sequence[_Part]) -> list[_Change]:
    """The most telling first: what acts on the part that moved most, then in the order of :data:`_GROUPS`."""
    first = [group for part in told for group in _FIRST_FOR.get(part.noun, ())]
    order = list(dict.fromkeys([*first, *_GROUPS]))
    return sorted(changes, key=lambda change: (not change.is_known, order.index(change.group)))


def _of_changes(changes: Sequence[_Change], aspects: _Aspects, against: str) -> str:
    known = [change for change in changes if change.is_known]
    same = _joined(aspects.same(changes))
    if not known:
        text = "nothing else that was recorded changed" + (f": same {same}" if same else "")
        missing = aspects.missing()
        return f"{text}; {_NOT_RECORDED}: {_joined(missing)}" if missing else text
    named, rest = known[:_MOST_NAMED], len(known) - _MOST_NAMED
    texts = [f"{change.name} {'' if number else 'changed '}{change.text}" for number, change in enumerate(named)]
    text = f"along with it, {_joined(texts)} since the {against}"
    if rest > 0:
        text += f" ({plural(rest, 'more change')} below)"
    is_all_elsewhere = all(change.group == "elsewhere" for change in known)
    return f"{text}; same {same}" if is_all_elsewhere and same else text


@dataclass(frozen=True, slots=True)
class _Aspects:
    """What a reader wants to know of each verdict: whether it is the same, or was not recorded on both sides.

    :param of_links: the verdict is of a probe of the links, on which the server and the clocks do not act.
    """

    stored: BaselineSession
    identity: Identity
    numbers: Mapping[str, _Number]
    of_links: bool = False

    def _known(self) -> dict[str, tuple[str, bool]]:
        """By group or label of a change: its word, and whether both sides have it; those that apply here only."""
        hardware = self.identity.key.hardware
        now, then = self.identity, self.stored
        known: dict[str, tuple[str, bool]] = {}
        if not self.of_links:
            known["vLLM"] = ("vLLM", _both(then.sut, now.sut, "vllm"))
        if hardware["platform"] == "cuda":
            known["driver"] = ("driver", _both(then.epoch, now.epoch, "driver"))
        if hardware["links"] or then.topology or now.topology:
            known["wiring"] = ("wiring", bool(then.topology and now.topology))
        if hardware["links"]:
            known["transport"] = ("transport", _both(then.covariates, now.covariates, "transport"))
        if self.of_links:
            return known
        known["clocks"] = ("clocks", any(name in self.numbers for name in _CLOCKS))
        known["KV cache"] = ("KV-cache size", "kv_cache_tokens" in self.numbers)
        known["arguments"] = ("arguments", _both(then.sut, now.sut, "arguments"))
        return known

    def same(self, changes: Sequence[_Change]) -> list[str]:
        """What both sides have and is not among the changes."""
        different = {change.label for change in changes} | {c.group for c in changes if c.group == "clocks"}
        return [word for label, (word, both) in self._known().items() if both and label not in different]

    def missing(self) -> list[str]:
        """What one side lacks."""
        return [word for word, both in self._known().values() if not both]


def _both(stored: Mapping[str, Any], now: Mapping[str, Any], name: str) -> bool:
    return stored.get(name) is not None and now.get(name) is not None


# -- the table -------------------------------------------------------------------------------------------------------


def _rows(parts: Sequence[_Part], numbers: Mapping[str, _Number], against: str) -> Iterator[str]:
    """All parts of the latency, and what else moved."""
    rows = [part.number.row for part in parts]
    shown = {part.number.label for part in parts}
    rows += [number.row for number in numbers.values() if number.moved and number.label not in shown]
    if rows:
        yield from aligned([("beside the verdict", against, "now", "change"), *rows])


def _lines(changes: Sequence[_Change], aspects: _Aspects) -> Iterator[str]:
    """Every field that changed, and what could not be compared where the sentence does not say so."""
    missing = aspects.missing()
    yield from (change.line for change in changes if change.line and (change.is_known or change.label not in missing))
    if missing and any(change.is_known for change in changes):
        yield f"{_NOT_RECORDED}: {_joined(missing)}"


def _value(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}".rstrip() if unit in ("tokens", "MHz", "") else quantity(value, unit)


def _bare(value: float) -> str:
    return quantity(value, "").rstrip()


def _percent(fraction: float) -> str:
    return f"{fraction:.0%}" if fraction >= 0.1 else f"{fraction:.1%}"


def _joined(words: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *others, end = [*words] or [""]
    return f"{', '.join(others)} and {end}" if others else end
