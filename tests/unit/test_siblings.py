"""Which noise is borrowed; how the nearest key is chosen is in test_baseline_key.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from pytest_gpulayout.baseline import Baseline, BaselineRun, BaselineSession, LevelStart
from pytest_gpulayout.baseline_text import baseline_to_text
from pytest_gpulayout.siblings import MOST_BORROWED_DF, borrowed_prior, sibling_priors
from pytest_gpulayout.stats import NoisePrior, estimate_spread
from pytest_gpulayout.testing import InMemoryBaselines
from tests.support.measurements import key

PRIOR = NoisePrior(start_sd=0.9, session_sd=0.8)
METRIC = "median_tpot_ms"


def draw(seed: int, sizes: Sequence[int], *, session_sd: float = 0.02, start_sd: float = 0.03) -> list[list[float]]:
    """Logs, one session per size."""
    rng = np.random.default_rng(seed)
    return [list(rng.normal(rng.normal(0, session_sd), start_sd, size)) for size in sizes]


def session(logs: Sequence[float], *, begins: LevelStart | None = None, metric: str = METRIC) -> BaselineSession:
    runs = tuple(BaselineRun(4, {metric: (10 * math.exp(y),)}) for y in logs)
    stored = BaselineSession("2026-11-20T08:00:00Z", {"driver": "570.1"}, {"vllm": "0.32.0"}, {}, runs)
    return replace(stored, begins=begins)


def baseline(sessions: Sequence[Sequence[float]], **parts: object) -> Baseline:
    return Baseline(key(**parts), tuple(map(session, sessions)))


def store(*baselines: Baseline) -> InMemoryBaselines:
    return InMemoryBaselines({item.key.path: baseline_to_text(item) for item in baselines})


def test_what_is_borrowed_are_the_components_of_variance() -> None:
    """One-way analysis of variance by numpy: mean squares within and between sessions of as many starts."""
    logs = np.array(draw(1, [4] * 10))
    within = logs.var(axis=1, ddof=1).mean()
    between = logs.mean(axis=1).var(ddof=1)
    prior = borrowed_prior(baseline(logs.tolist()), METRIC, "there.json")
    assert prior is not None
    assert prior.start_sd == pytest.approx(math.sqrt(within))
    assert prior.session_sd == pytest.approx(math.sqrt(max(0.0, between - within / 4)))
    assert (prior.start_df, prior.session_df) == (MOST_BORROWED_DF, 9)
    assert prior.source == "the noise of there.json"


def test_a_prior_that_was_borrowed_predicts_as_the_sibling_does() -> None:
    """With as many starts per session the sum of both components is what the sibling's session means show."""
    logs = draw(2, [3] * 9)
    prior = borrowed_prior(baseline(logs), METRIC, "")
    assert prior is not None
    assert prior.session_sd > 0
    means = np.mean(logs, axis=1)
    assert prior.session_sd**2 + prior.start_sd**2 / 3 == pytest.approx(means.var(ddof=1))


def test_it_is_never_less_than_the_sibling_s_sessions_show() -> None:
    """Sessions that are more alike than their starts let expect have no variance of their own, not a negative one."""
    alike = [[math.log(1 + d) for d in (-0.02, 0.0, 0.02)]] * 9
    prior = borrowed_prior(baseline(alike), METRIC, "")
    assert prior is not None
    assert prior.session_sd == 0
    assert prior.start_sd > 0.015


def test_without_enough_of_its_own_a_sibling_lends_nothing() -> None:
    assert borrowed_prior(baseline(draw(3, [3] * 7)), METRIC, "") is None
    assert borrowed_prior(baseline(draw(3, [3] * 8)), METRIC, "") is not None
    assert borrowed_prior(baseline(draw(3, [1] * 12)), METRIC, "") is None, "nothing is known between its starts"
    assert borrowed_prior(baseline(draw(3, [2] * 4 + [1] * 6)), METRIC, "") is None
    assert borrowed_prior(baseline(draw(3, [3] * 8)), "median_ttft_ms", "") is None
    assert borrowed_prior(baseline(draw(3, [3] * 8)), "no_such_metric", "") is None


def test_a_change_that_was_accepted_there_is_no_noise() -> None:
    before, after = draw(4, [3] * 6), draw(5, [3] * 6)
    sessions = [*map(session, before), session([y + 2 for y in after[0]], begins=LevelStart("slower on purpose"))]
    sessions += [session([y + 2 for y in logs]) for logs in after[1:]]
    prior = borrowed_prior(Baseline(key(), tuple(sessions)), METRIC, "")
    assert prior is not None
    assert prior.session_df == 10
    assert prior.session_sd < 0.1


def test_the_nearest_sibling_on_such_devices_lends() -> None:
    here = key()
    near = baseline(draw(6, [3] * 9, start_sd=0.01), layout="tp4")
    far = baseline(draw(7, [3] * 9, start_sd=0.05), layout="tp4", model={**here.model, "name": "org/other"})
    of = sibling_priors(store(far, near), here, PRIOR)
    assert of(METRIC) == borrowed_prior(near, METRIC, near.key.path)
    assert of("median_ttft_ms") is PRIOR


def test_a_sibling_that_knows_too_little_is_passed_over() -> None:
    here = key()
    near = baseline(draw(6, [3] * 3), layout="tp4")
    far = baseline(draw(7, [3] * 9), layout="tp4", model={**here.model, "name": "org/other"})
    assert sibling_priors(store(far, near), here, PRIOR)(METRIC).source == f"the noise of {far.key.path}"


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"hardware": {"device": "NVIDIA L4"}},
        {"hardware": {"platform": "cpu"}},
        {"workload": {"name": "long", "fingerprint": "0"}},
    ],
    ids=["itself", "another device", "another platform", "another workload"],
)
def test_other_machines_and_workloads_lend_nothing(parts: dict[str, object]) -> None:
    stored = baseline(draw(8, [3] * 9), **parts)
    assert sibling_priors(store(stored), key(), PRIOR)(METRIC) is PRIOR


def test_the_store_is_read_once_and_only_when_needed() -> None:
    class Counting(InMemoryBaselines):
        reads = 0

        def read(self, path: str) -> str | None:
            self.reads += 1
            return super().read(path)

    stored = baseline(draw(9, [3] * 9), layout="tp4")
    counting = Counting({stored.key.path: baseline_to_text(stored), "broken.json": "{"})
    of = sibling_priors(counting, key(), PRIOR)
    assert counting.reads == 0
    assert of(METRIC) is of(METRIC)
    assert of("median_ttft_ms") is PRIOR
    assert counting.reads == 2


def test_a_borrowed_prior_gives_way_to_own_data() -> None:
    prior = borrowed_prior(baseline(draw(10, [3] * 9, start_sd=0.3)), METRIC, "")
    assert prior is not None
    level, current = draw(11, [3] * 8), [0.0, 0.0, 0.0]
    own = estimate_spread(level, [], current, PRIOR, start_variance_floor=0.0)
    assert estimate_spread(level, [], current, prior, start_variance_floor=0.0).of_prediction(3) == own.of_prediction(
        3
    )
    assert estimate_spread(level[:2], [], current, prior, start_variance_floor=0.0).of_prediction(3)[0] > 0.1
