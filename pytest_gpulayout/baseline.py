"""What a measurement is compared with: the baseline document, its key, and where it belongs.

Knows the document's fields; :mod:`~pytest_gpulayout.baseline_text` knows its text form, and
:mod:`~pytest_gpulayout.adapters.baseline_files` knows files.

Identity has four parts. The *key* must match exactly (:class:`BaselineKey`). The *epoch* (driver, CUDA, NCCL, kernel)
and the *software under test* (vLLM, torch, arguments) do not: a change of either is named in the verdict.
*Covariates* (host, commit, core binding) are recorded, and named too where they differ. Which field is where, and
why, says :mod:`pytest_gpulayout.adapters.host`.

Sessions that share a mean form a *level*. A new level begins where somebody accepted a change
(:class:`LevelStart`); within it, sessions of another epoch have a mean of their own. The other groups are not
compared with, but tell how much sessions differ when nothing has changed.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pytest_gpulayout.errors import LayoutSyntaxError
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.verdict import MetricSample

PROTOCOL = 1
"""Counts up when the way of measuring changes, so that numbers of different meaning are never compared."""

NEWEST = 20
"""Sessions of a group that count; older ones are left out of the mean and the spread."""

_UNSAFE = re.compile(r"[^A-Za-z0-9._+@-]+")
_LONGEST_NAME = 80


_MAY_BE_UNKNOWN = frozenset({"model.revision", "model.dtype", "hardware.power_limit_w"})
_LINKS = "hardware.links"
_MOST_PAIRS = 6


@dataclass(frozen=True, slots=True)
class BaselineKey:
    """What a stored number is valid for; keys without :meth:`differences` are comparable, all others are not.

    :param model: ``name``, ``revision`` (the commit of a model of a hub, of a folder a hash of its config.json),
        ``dtype`` (of the weights, with their quantisation), ``arguments`` of its marker.
    :param layout: canonical text.
    :param hardware: ``platform``, ``device``, ``count``, ``memory_gib``, ``power_limit_w`` and ``links``: the link
        class of each pair of ranks that communicate, in the order of
        :meth:`~pytest_gpulayout.layout.Layout.node_pairs`, so of tp4 of 0-1, 0-2, 0-3, 1-2, 1-3, 2-3.
    :param workload: ``name`` and ``fingerprint``.
    """

    model: Mapping[str, str]
    layout: str
    hardware: Mapping[str, Any]
    workload: Mapping[str, str]
    protocol: int = PROTOCOL

    @property
    def path(self) -> str:
        """``<model>/<layout>/<hardware>/<workload>.json``, safe as file names whatever the model is called.

        What is measured side by side has a path of its own: a model with other arguments of its marker. What takes
        the place of something else has not: a revision, a dtype, a power limit, other numbers in a workload.
        """
        hardware = [f"{self.hardware['count']}x", self.hardware["device"], *sorted(set(self.hardware["links"]))]
        model = " ".join(filter(None, (self.model["name"], self.model["arguments"])))
        parts = (model, self.layout, " ".join(hardware), self.workload["name"])
        return "/".join(safe_name(part) for part in parts) + ".json"

    def differences(self, stored: BaselineKey) -> tuple[str, ...]:
        """Name each field in which a stored key differs, as ``hardware.power_limit_w: stored 700, now 500``.

        A revision, dtype or power limit that was not known when it was stored matches any; one that was known does
        not match one that is unknown now. GPU memory may differ by 1 GiB: drivers keep a part of it for themselves,
        not all of them the same.
        """
        mine, theirs = _flatten(asdict(self)), _flatten(asdict(stored))
        found: list[str] = []
        for name in dict.fromkeys([*mine, *theirs]):
            before, now = theirs.get(name), mine.get(name)
            if name == _LINKS:
                found += self._other_links(stored)
            elif not _matches(name, before, now):
                found.append(f"{name}: stored {_told(name, before)}, now {_told(name, now)}")
        return tuple(found)

    def completed_by(self, measured: BaselineKey) -> BaselineKey:
        """Return this stored key with what was not known of it, where a measurement that matches it knows."""
        model, hardware = dict(self.model), dict(self.hardware)
        for name in _MAY_BE_UNKNOWN:
            part, _, field_name = name.partition(".")
            mine, theirs = (model, measured.model) if part == "model" else (hardware, measured.hardware)
            if mine[field_name] in (None, ""):
                mine[field_name] = theirs[field_name]
        return replace(self, model=model, hardware=hardware)

    def link_of_pairs(self) -> dict[str, str]:
        """Return the link of each pair of ranks, ``{"0-1": "NV18"}``; by number where the layout is not known."""
        links = self.hardware["links"]
        try:
            names = [f"{a}-{b}" for a, b in parse_layout(self.layout).node_pairs()]
        except LayoutSyntaxError:
            names = []
        if len(names) != len(links):
            names = [f"link {number}" for number in range(1, len(links) + 1)]
        return dict(zip(names, links, strict=True))

    def _other_links(self, stored: BaselineKey) -> list[str]:
        """Name the pairs whose link is another one; of another layout only those that both have."""
        now, before = self.link_of_pairs(), stored.link_of_pairs()
        of_both = self.layout == stored.layout
        pairs = [pair for pair in dict.fromkeys([*before, *now]) if of_both or (pair in before and pair in now)]
        other = [pair for pair in pairs if before.get(pair) != now.get(pair)]
        if not other:
            return []
        named = other[:_MOST_PAIRS]
        sides = (", ".join(f"{pair} {links.get(pair, 'none')}" for pair in named) for links in (before, now))
        more = f", and {len(other) - _MOST_PAIRS} pairs more" if len(other) > _MOST_PAIRS else ""
        return ["{}: stored {}, now {}{}".format(_LINKS, *sides, more)]


def _matches(name: str, stored: object, now: object) -> bool:
    if name in _MAY_BE_UNKNOWN and stored in (None, ""):
        return True
    if name == "hardware.memory_gib" and isinstance(stored, int) and isinstance(now, int):
        return abs(stored - now) <= 1
    return stored == now


def _told(name: str, value: object) -> str:
    return "unknown" if value is None or (value == "" and name in _MAY_BE_UNKNOWN) else repr(value)


@dataclass(frozen=True, slots=True)
class BaselineRun:
    """One server start.

    :param metrics: each metric's value in each batch, (n_batches,) in the metric's unit.
    :param observed: what else was seen of this start, by the names of :data:`~pytest_gpulayout.observed.OBSERVED`:
        start-up time, KV-cache size, clocks, where the latency went. Never judged; tells causes.
    """

    requests: int
    metrics: Mapping[str, tuple[float, ...]]
    observed: Mapping[str, float] = field(default_factory=dict)

    @property
    def batch_size(self) -> float:
        """Requests in a batch, the mean of all batches."""
        return self.requests / max(map(len, self.metrics.values()), default=1)


def as_stored(value: float) -> float:
    """Eight significant digits: short in a diff, and never rounded down to zero.

    Fresh and saved measurements are stored alike: a session that is stored already is recognised by its numbers.
    """
    return float(f"{value:.8g}")


def fold_batches(batches: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    """Turn (n_batches,) of metrics into each metric's (n_batches,) values; one that a batch lacks is left out."""
    names = [name for name in batches[0] if all(name in batch for batch in batches)]
    return {name: tuple(batch[name] for batch in batches) for name in names}


@dataclass(frozen=True, slots=True)
class LevelStart:
    """Why a session is not compared with those before it: somebody accepted a change.

    :param reason: in their words. :param changes: what got better and worse, as
        ``median_tpot_ms 9.8 ms -> 11.9 ms (+21.4%, worse)``.
    :param until: last day (ISO 8601) of a waiver, on which the level before counts again; ``""`` for good.
    """

    reason: str
    changes: tuple[str, ...] = ()
    until: str = ""

    def is_over(self, today: str) -> bool:
        """Whether this was a waiver, and its last day is past. :param today: ISO 8601 date."""
        return bool(self.until) and today > self.until


@dataclass(frozen=True, slots=True)
class BaselineSession:
    """The starts of one measuring session, and what the machine and the software were then.

    :param recorded: UTC, ISO 8601.
    :param topology: the wiring, as :func:`~pytest_gpulayout.drift.wiring_document` gives it.
    :param begins: it begins a new level; ``None`` where it goes on with the one before.
    """

    recorded: str
    epoch: Mapping[str, Any]
    sut: Mapping[str, Any]
    covariates: Mapping[str, Any]
    runs: tuple[BaselineRun, ...]
    topology: Mapping[str, Any] = field(default_factory=dict)
    begins: LevelStart | None = None

    def samples(self, metric: str) -> tuple[MetricSample, ...]:
        """Return (n_starts,) samples of one metric; starts that never measured it are left out."""
        return tuple(MetricSample(run.metrics[metric]) for run in self.runs if metric in run.metrics)


@dataclass(frozen=True, slots=True)
class Baseline:
    """Everything stored under one key, oldest session first."""

    key: BaselineKey
    sessions: tuple[BaselineSession, ...] = field(default=())

    def levels(self) -> tuple[tuple[BaselineSession, ...], ...]:
        """Return (n_levels,) of sessions, oldest first."""
        levels: list[list[BaselineSession]] = []
        for session in self.sessions:
            if not levels or session.begins is not None:
                levels.append([])
            levels[-1].append(session)
        return tuple(map(tuple, levels))

    def reference(self, epoch: Mapping[str, Any] | None = None, *, today: str = "") -> Reference:
        """Return which sessions a measurement is compared with.

        :param epoch: of the measurement; ``None`` for that of the newest session.
        :param today: ISO 8601 date; waivers that are over by then leave their levels out of the mean.
        """
        levels = self.levels()
        start = levels[-1][0].begins
        starts = [level[0].begins for level in levels]
        current = max(
            (n for n, begins in enumerate(starts) if begins is None or not begins.is_over(today)), default=0
        )
        groups = [_by_epoch(level) for level in levels]
        here = groups[current]
        chosen = next((group for group in here if epoch is not None and group[0].epoch == epoch), None)
        chosen = chosen or next(group for group in here if levels[current][-1] in group)
        others = tuple(group for level in groups for group in level if group is not chosen)
        return Reference(chosen, others, start, is_expired=current < len(levels) - 1)


def _by_epoch(level: Sequence[BaselineSession]) -> list[tuple[BaselineSession, ...]]:
    """The newest sessions of each epoch, in order of first appearance."""
    groups: list[list[BaselineSession]] = []
    for session in level:
        known = next((group for group in groups if group[0].epoch == session.epoch), None)
        if known is None:
            groups.append([session])
        else:
            known.append(session)
    return [tuple(group[-NEWEST:]) for group in groups]


@dataclass(frozen=True, slots=True)
class Reference:
    """What a measurement is compared with.

    :param sessions: (K,), oldest first: their mean is the reference.
    :param others: groups of sessions at another level or of another epoch; they tell of the spread only.
    :param accepted: how the newest level began, ``None`` for the first one.
    :param is_expired: it was a waiver and is over, so ``sessions`` are of the level before.
    """

    sessions: tuple[BaselineSession, ...]
    others: tuple[tuple[BaselineSession, ...], ...] = ()
    accepted: LevelStart | None = None
    is_expired: bool = False

    @property
    def newest(self) -> BaselineSession:
        """What the machine and the software were last."""
        return self.sessions[-1]

    def level_samples(self, metric: str) -> tuple[tuple[MetricSample, ...], ...]:
        """Return (K,) of (n_starts,) samples; sessions that never measured the metric are left out."""
        return _samples(self.sessions, metric)

    def other_samples(self, metric: str) -> tuple[tuple[tuple[MetricSample, ...], ...], ...]:
        """Return the same of each other group, without those that never measured the metric."""
        return tuple(filter(None, (_samples(group, metric) for group in self.others)))


def _samples(sessions: Sequence[BaselineSession], metric: str) -> tuple[tuple[MetricSample, ...], ...]:
    return tuple(filter(None, (session.samples(metric) for session in sessions)))


def safe_name(text: str) -> str:
    """Turn any text into one portable file name; texts that had to be changed get a hash, so that none collide."""
    name = _UNSAFE.sub("-", text).strip("-.")[:_LONGEST_NAME]
    if name and name == text:
        return name
    return f"{name or 'x'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _flatten(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, object] = {}
    for name, item in value.items():
        flat |= _flatten(item, f"{prefix}.{name}" if prefix else str(name))
    return flat


def is_measurement(values: Sequence[float]) -> bool:
    """Whether these can be stored and judged: at least one, all finite and above zero."""
    return bool(values) and all(math.isfinite(value) and value > 0 for value in values)
