"""Other stored baselines near a key: which one a missing one was meant to be, and whose noise may be borrowed.

A variance may be borrowed, a mean never: two machines of one kind differ in speed, and less in how they scatter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from pytest_gpulayout.baseline import Baseline, BaselineKey
from pytest_gpulayout.baseline_text import baseline_from_text
from pytest_gpulayout.errors import BaselineError
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.ports import BaselineStore
from pytest_gpulayout.stats import SETTLED_DF, NoisePrior, estimate_spread
from pytest_gpulayout.verdict import log_sessions

MOST_BORROWED_DF = 16.0
"""Weight of a borrowed variance; it is of something else, however well it is known there."""

_TELLING = ("hardware.", "model.", "workload.")
_NO_DF = 1e-9  # a prior that says nothing; zero would divide by zero where there are no data


def nearest_key(store: BaselineStore, key: BaselineKey) -> tuple[str, tuple[str, ...]] | None:
    """Return the path and the differences of the stored key with the fewest fields that differ, if there is any.

    Of several the one on the same hardware, then with the same model, then of the same workload: who changed one
    thing changed a layout or a workload more often than a machine. A file whose key does not differ at all lies at
    the wrong place, and that is its difference.
    """
    candidates = []
    for path, baseline in _readable(store):
        differences = key.differences(baseline.key)
        parts = [sum(text.startswith(part) for text in differences) for part in _TELLING]
        candidates.append((len(differences), parts, path, differences))
    if not candidates:
        return None
    *_, path, differences = min(candidates)
    return path, differences or (f"its place: the key is the same, move it to {key.path}",)


def same_but_links(store: BaselineStore, key: BaselineKey) -> Baseline | None:
    """Return a baseline whose key is the same but for the links between the devices, if there is one."""
    for _, baseline in _readable(store):
        hardware = {**baseline.key.hardware, "links": key.hardware["links"]}
        if key.differences(baseline.key) and not key.differences(replace(baseline.key, hardware=hardware)):
            return baseline
    return None


def sibling_priors(store: BaselineStore, key: BaselineKey, prior: NoisePrior) -> Callable[[str], NoisePrior]:
    """Return what to assume of the noise of each metric: that of the nearest key on such devices that has settled.

    :param prior: what is assumed where there is none.
    :returns: a function of the metric's name; the store is read when it is first called.
    """
    known: dict[str, NoisePrior] = {}
    near: list[tuple[int, str, Baseline]] = []

    def of(metric: str) -> NoisePrior:
        if not known:
            near.extend(sorted(_on_such_devices(store, key), key=lambda item: item[:2]))
        if metric not in known:
            found = (borrowed_prior(baseline, metric, path) for _, path, baseline in near)
            known[metric] = next(filter(None, found), prior)
        return known[metric]

    return of


def _on_such_devices(store: BaselineStore, key: BaselineKey) -> Iterator[tuple[int, str, Baseline]]:
    for path, baseline in _readable(store):
        hardware = baseline.key.hardware
        same = all(hardware[name] == key.hardware[name] for name in ("platform", "device"))
        if same and baseline.key.workload["name"] == key.workload["name"] and path != key.path:
            yield len(key.differences(baseline.key)), path, baseline


def borrowed_prior(baseline: Baseline, metric: str, source: str) -> NoisePrior | None:
    """Return the noise of a metric as a baseline's own sessions show it, ``None`` when they are too few to tell."""
    reference = baseline.reference()
    level, others = reference.level_samples(metric), reference.other_samples(metric)
    if not level or METRICS.get(metric) is None:
        return None
    logs = [log_sessions(group) for group in (level, *others)]
    nothing = NoisePrior(0.0, 0.0, start_df=_NO_DF, session_df=_NO_DF)
    spread = estimate_spread(logs[0], logs[1:], logs[0][-1][:1], nothing, start_variance_floor=0.0)
    if spread.own_df < SETTLED_DF or spread.start_df < SETTLED_DF:
        return None
    return NoisePrior(
        start_sd=math.sqrt(spread.start_variance),
        session_sd=math.sqrt(spread.session_variance),
        start_df=min(spread.start_df, MOST_BORROWED_DF),
        session_df=min(spread.mean_df, MOST_BORROWED_DF),
        source=f"the noise of {source}",
    )


def _readable(store: BaselineStore) -> Iterator[tuple[str, Baseline]]:
    """All baselines that can be read; the others are no candidates."""
    for path in store.paths():
        try:
            yield path, baseline_from_text(store.read(path) or "", path)
        except BaselineError:
            continue
