"""How often gates are wrong: this one's verdicts beside the rules of others, on the same simulated noise.

The first two tables have one gated metric with a margin of 5 %, and three kinds of noise: for each rule, how often it
is red on identical code, and how often it finds a true +5 %. The third sets this project's verdicts beside the plain
tests that they are built on, gate by gate on the same numbers: what the guards and looks cost and spare. The fourth
has 3 and 12 metrics: how often any is red on identical code. The last is the gate as it is shipped (three metrics, up
to three starts) on noise exactly as the shipped priors assume it.

Noise is normal on the log scale: between sessions, between server starts of a session, between repeats on one server;
``two modes`` adds 12 % to two of five starts. Real noise has heavier tails, so both kinds of error are more frequent.
The rules of others are written here from their documents and sources, one value per night where they look at a
history; only Otava is the real package, where it is installed. The rules of this project are not copied: it is
``judge_metrics`` and ``judge_pairs`` that decide, on values as a baseline holds them, with the shipped priors and
numbers of starts. Files and servers are left out (``judge_in_looks`` judges after each start, as
``judge_performance`` does); they do not touch the numbers. From the repository's root::

    python benchmarks/gate_error_rates.py
    python benchmarks/gate_error_rates.py --trials 40000 --seed 2
    python benchmarks/gate_error_rates.py --trials 200000 --only plain
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.special import fdtri, stdtr

from pytest_gpulayout.adapters.cpu_host import cpu_model
from pytest_gpulayout.judging import NOISE_PRIORS
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.noise_study import judge_in_looks, wilson_interval
from pytest_gpulayout.pairs import LOOKS, USUAL_BLOCKS, PairedHistory, StartSpread, judge_pairs, spread_of_starts
from pytest_gpulayout.stats import NoisePrior, t_quantile
from pytest_gpulayout.tolerance import Tolerance, parse_tolerances
from pytest_gpulayout.verdict import FALSE_ALARM, MetricSample, Status, overall_status

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

STARTS_STORED = 3
STARTS = 3
"""Most starts of a gate in stored mode as shipped."""

ONE_METRIC = (Tolerance("median_tpot_ms", 0.05),)
SHIPPED = tuple(parse_tolerances("").values())
CHANGES = (0.05, 0.10, 0.30, 1.00)


@dataclass(frozen=True)
class Noise:
    """Standard deviations on the log scale. :param second_mode: share of starts that are slower, and by how much."""

    name: str
    session: float
    start: float
    within: float = 0.0
    second_mode: tuple[float, float] = (0.0, 0.0)

    def draw(self, rng: np.random.Generator, *shape: int) -> Floats:
        """(trials, sessions, starts, repeats) of logs; larger is worse."""
        trials, sessions, starts, _ = shape
        luck = rng.normal(0, self.start, (trials, sessions, starts, 1))
        luck = luck + np.where(rng.random(luck.shape) < self.second_mode[0], self.second_mode[1], 0.0)
        between = rng.normal(0, self.session, (trials, sessions, 1, 1))
        drawn: Floats = between + luck + rng.normal(0, self.within, shape)
        return drawn

    @property
    def variance_of_start(self) -> float:
        """Of the log of one repeat on one start of a session."""
        share, shift = self.second_mode
        return self.start**2 + self.within**2 + share * (1 - share) * shift**2


NOISES = (
    Noise("quiet node", 0.005, 0.008, 0.003),
    Noise("node pool", 0.020, 0.015, 0.005),
    Noise("two modes", 0.003, 0.002, 0.002, (0.4, 0.12)),
)


# --- the rules of others: (trials,) whether each is red; `shift` is the log of the true change ---

Rule = Callable[[np.random.Generator, Noise, float, int], Bools]


def one_earlier_run(rng: np.random.Generator, noise: Noise, shift: float, trials: int, *, limit: float) -> Bools:
    """Means of five rounds against one stored run. Source: pytest-benchmark, ``PercentageRegressionCheck``."""
    before, now = (noise.draw(rng, trials, 1, 1, 5).mean((1, 2, 3)) for _ in range(2))
    red: Bools = np.expm1(now + shift - before) > limit
    return red


def within_run_t(rng: np.random.Generator, noise: Noise, shift: float, trials: int) -> Bools:
    """A t test on samples of one process each, 1 % noise band. Source: criterion.rs, ``book/analysis.md``."""
    before, now = (noise.draw(rng, trials, 1, 1, 47)[:, 0, 0] for _ in range(2))
    now = now + shift
    p = stats.ttest_ind(now, before, axis=1, equal_var=False, alternative="greater").pvalue
    red: Bools = (p < 0.025) & (np.expm1(now.mean(1) - before.mean(1)) > 0.01)
    return red


def u_test(rng: np.random.Generator, noise: Noise, shift: float, trials: int) -> Bools:
    """Mann-Whitney on 9 repetitions each. Source: google/benchmark, ``tools/compare.py``."""
    before, now = (noise.draw(rng, trials, 1, 1, 9)[:, 0, 0] for _ in range(2))
    now = now + shift
    p = stats.mannwhitneyu(before, now, axis=1).pvalue
    red: Bools = (p < 0.05) & (np.median(now, 1) > np.median(before, 1))
    return red


def asv_continuous(rng: np.random.Generator, noise: Noise, shift: float, trials: int, *, factor: float) -> Bools:
    """A factor, and Mann-Whitney at 0.002, on two processes of ten samples each. Source: asv, ``_stats.py``."""
    drawn = noise.draw(rng, trials, 1, 4, 10)[:, 0]
    before, now = drawn[:, :2].reshape(trials, -1), drawn[:, 2:].reshape(trials, -1) + shift
    p = stats.mannwhitneyu(before, now, axis=1).pvalue
    red: Bools = (p < 0.002) & (np.median(now, 1) - np.median(before, 1) > math.log(factor))
    return red


def nights(rng: np.random.Generator, noise: Noise, trials: int, count: int) -> Floats:
    """(trials, count): one start a night, the median of three repeats."""
    medians: Floats = np.median(noise.draw(rng, trials, count, 1, 3)[:, :, 0], 2)
    return medians


def bencher_t(rng: np.random.Generator, noise: Noise, shift: float, trials: int) -> Bools:
    """The new value against a t interval of 30 stored ones. Source: Bencher, ``bencher_boundary``."""
    drawn = nights(rng, noise, trials, 31)
    stored = drawn[:, :30]
    red: Bools = drawn[:, 30] + shift > stored.mean(1) + stored.std(1) * stats.t.ppf(0.99, 29)
    return red


def conbench_z(rng: np.random.Generator, noise: Noise, shift: float, trials: int) -> Bools:
    """Five standard deviations from 90 stored values. Source: conbench, ``lookback_zscore.md``."""
    drawn = nights(rng, noise, trials, 91)
    stored = drawn[:, :90]
    red: Bools = (drawn[:, 90] + shift - stored.mean(1)) / stored.std(1, ddof=1) > 5
    return red


def rustc_iqr(rng: np.random.Generator, noise: Noise, shift: float, trials: int) -> Bools:
    """A step beyond Q3 + 3 IQR of the last 30 steps. Source: rust-lang/rustc-perf, ``comparison.rs``."""
    drawn = nights(rng, noise, trials, 32)
    steps = np.abs(np.diff(drawn[:, :31], axis=1))
    first, third = np.quantile(steps, [0.25, 0.75], axis=1)
    red: Bools = drawn[:, 31] + shift - drawn[:, 30] > third + 3 * (third - first)
    return red


def tensorrt_llm(rng: np.random.Generator, noise: Noise, shift: float, trials: int, *, limit: float) -> Bools:
    """A limit over the P5 of a 3-day mean of 90 days. Source: TensorRT-LLM, ``README_perf_regression_system.md``."""
    drawn = nights(rng, noise, trials, 91)
    stored = drawn[:, :90]
    rolling = (stored[:, 2:] + stored[:, 1:-1] + stored[:, :-2]) / 3
    red: Bools = np.expm1(drawn[:, 90] + shift - np.quantile(rolling, 0.05, axis=1)) > limit
    return red


def seven_nights(rng: np.random.Generator, noise: Noise, shift: float, trials: int) -> Bools:
    """5 % over the mean of seven nights. Source: vLLM-Omni, ``tests/dfx/perf/tests``."""
    drawn = nights(rng, noise, trials, 8)
    red: Bools = np.expm1(drawn[:, 7] + shift - drawn[:, :7].mean(1)) > 0.05
    return red


def pytorch_hud(rng: np.random.Generator, noise: Noise, shift: float, trials: int) -> Bools:
    """Two points in a row 20 % over the median of three days. Source: pytorch/test-infra, ``regression_utils.py``."""
    drawn = nights(rng, noise, trials, 5)
    low = drawn[:, 3:].min(1) + shift
    red: Bools = np.expm1(low - np.median(drawn[:, :3], 1)) > 0.2
    return red


PEERS: tuple[tuple[str, Rule], ...] = (
    ("pytest-benchmark mean:5%, one earlier run", partial(one_earlier_run, limit=0.05)),
    ("pytest-benchmark mean:10%, one earlier run", partial(one_earlier_run, limit=0.10)),
    ("criterion.rs: t within the run, 1 % band", within_run_t),
    ("google/benchmark: U test, 9 against 9", u_test),
    ("asv continuous, factor 1.05", partial(asv_continuous, factor=1.05)),
    ("asv continuous, factor 1.1", partial(asv_continuous, factor=1.1)),
    ("Bencher: t .99 of 30 runs", bencher_t),
    ("conbench: z 5 of 90 runs", conbench_z),
    ("rustc-perf: Q3 + 3 IQR of 30 steps", rustc_iqr),
    ("TensorRT-LLM post-merge 5%", partial(tensorrt_llm, limit=0.05)),
    ("TensorRT-LLM pre-merge 10%", partial(tensorrt_llm, limit=0.10)),
    ("mean of seven nights, 5%", seven_nights),
    ("PyTorch HUD: 20%, two in a row", pytorch_hud),
)


def otava_found(rng: np.random.Generator, noise: Noise, shift: float, bad_runs: int, trials: int) -> float:
    """Share of series of 50 good and some bad runs in which apache-otava dates a change point at the change."""
    compute_change_points = import_module("otava.analysis").compute_change_points
    found = 0
    for series in nights(rng, noise, trials, 50 + bad_runs):
        series[50:] += shift
        points = [point.index for point in compute_change_points(list(np.exp(series)))[0]]
        found += any(48 <= index <= 51 for index in points)
    return found / trials


# --- the tests that this project's rules are built on, without guards, early looks and margins of safety ---


def plain_prediction(logs: Floats) -> bool:
    """Whether the last session's mean is above the 99 % prediction bound of the others. :param logs: (K + 1, r)."""
    *stored, now = logs.mean(1)
    bound = t_quantile(1 - FALSE_ALARM, len(stored) - 1) * np.std(stored, ddof=1) * math.sqrt(1 + 1 / len(stored))
    return bool(now - np.mean(stored) > bound)


PLAIN_LEVELS = {0: (0.0027, 0.0168), 16: (0.0034, 0.0196)}
"""Of a look at pairs: a false alarm, a miss; 1 % and 5 % over all looks (Pocock), found by simulation."""


def plain_pairs(differences: Floats, stored: StartSpread | None, margin: float) -> bool:
    """Whether one of the t tests after 3, 4, 5, 6 and 8 blocks is red, and none passes before it.

    :param differences: (8,) of logs. :param stored: known from other sessions. :param margin: on the log scale.
    """
    for blocks in LOOKS:
        seen = differences[:blocks]
        squares, df = float(((seen - seen.mean()) ** 2).sum()), blocks - 1
        variance, known_df = squares / df, 0
        if stored and variance <= 2 * stored.variance * fdtri(df, stored.df, 0.90):
            known_df = int(stored.df)
            variance = (squares + known_df * 2 * stored.variance) / (known_df + df)
        alarm, miss = PLAIN_LEVELS[known_df]
        error = math.sqrt(variance / blocks)
        if stdtr(known_df + df, -seen.mean() / error) < alarm and seen.mean() >= margin / 2:
            return True
        if stdtr(known_df + df, (seen.mean() - margin) / error) < miss:
            return False
    return False


# --- this project's ---


@dataclass(frozen=True)
class Outcome:
    """How many gates ended how.

    :param counts: of this project's verdict, and whether the plain test of the same numbers is red; ``None`` without.
    :param starts: server starts (or blocks of two) of all gates together.
    """

    counts: Counter[tuple[Status, bool | None]]
    starts: int

    @property
    def trials(self) -> int:
        """Gates."""
        return self.counts.total()

    def share(self, status: Status) -> float:
        """Of the gates, in percent."""
        return 100 * self._count(status) / self.trials

    def share_text(self, status: Status) -> str:
        """``0.9 [0.7, 1.1]``: percent and its 95 % interval (Wilson, JASA 22, 1927)."""
        return _share_text(self._count(status), self.trials)

    def plain_text(self) -> str:
        """The share of gates in which the plain test is red."""
        return _share_text(sum(n for (_, plain), n in self.counts.items() if plain), self.trials)

    def beyond_plain_text(self) -> str:
        """This project's share of red less the plain test's, and its 95 % interval for pairs (McNemar)."""
        ours = sum(n for (status, plain), n in self.counts.items() if status is Status.REGRESSION and not plain)
        theirs = sum(n for (status, plain), n in self.counts.items() if status is not Status.REGRESSION and plain)
        difference = (ours - theirs) / self.trials
        half = 1.96 * math.sqrt(((ours + theirs) / self.trials - difference**2) / self.trials)
        return f"{100 * difference:+.2f} [{100 * (difference - half):+.2f}, {100 * (difference + half):+.2f}]"

    def _count(self, status: Status) -> int:
        return sum(n for (found, _), n in self.counts.items() if found is status)


def _share_text(found: int, trials: int) -> str:
    low, high = wilson_interval(found, trials)
    return f"{100 * found / trials:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


@dataclass(frozen=True)
class StoredGate:
    """Gates against stored sessions of three starts each.

    :param sessions: K. :param looks: 1 for one look at three starts, else one after each start; then one more start
        confirms what the last look finds.
    :param correlation: of the metrics of one start, and of one session.
    """

    noise: Noise
    sessions: int
    prior: NoisePrior
    looks: int = STARTS
    tolerances: tuple[Tolerance, ...] = ONE_METRIC
    correlation: float = 0.0
    change: float = 0.0
    trials: int = 1000
    seed: tuple[int, ...] = field(default=(1,))

    def run(self) -> Outcome:
        """Judge one fresh history per gate."""
        rng = np.random.default_rng(self.seed)
        counts: Counter[tuple[Status, bool | None]] = Counter()
        starts = 0
        for _ in range(self.trials):
            logs = self._draw(rng)
            status, made = self._gate(logs)
            has_plain = len(self.tolerances) == 1 and self.sessions > 1
            counts[status, plain_prediction(logs[0, :, :STARTS]) if has_plain else None] += 1
            starts += made
        return Outcome(counts, starts)

    def _draw(self, rng: np.random.Generator) -> Floats:
        """(n_metrics, sessions + 1, starts + 1) of logs, larger is worse; the last session is the current one."""
        shape = (self.sessions + 1, STARTS_STORED + 1, 1)
        logs = self.noise.draw(rng, len(self.tolerances), *shape)[..., 0]
        if self.correlation:
            shared = self.noise.draw(rng, 1, *shape)[..., 0]
            logs = math.sqrt(self.correlation) * shared + math.sqrt(1 - self.correlation) * logs
        logs[:, -1] += math.log1p(self.change)
        return logs

    def _gate(self, logs: Floats) -> tuple[Status, int]:
        """The verdict, and the starts that it took."""
        tolerances = {tolerance.metric: tolerance for tolerance in self.tolerances}
        signs = [-1.0 if METRICS[name].higher_is_better else 1.0 for name in tolerances]
        *stored, current = (
            [dict(zip(tolerances, _samples(values), strict=True)) for values in session]
            for session in np.exp(np.moveaxis(logs, 0, -1) * signs)
        )
        verdicts = judge_in_looks(
            current,
            [session[:STARTS_STORED] for session in stored],
            tolerances,
            self.prior,
            of=STARTS,
            first=STARTS - self.looks + 1,
        )
        return overall_status(verdicts), verdicts[0].n_current + verdicts[0].n_confirming


@dataclass(frozen=True)
class PairedGate:
    """Gates of up to eight blocks.

    :param stored_sessions: of three starts, whose spread between starts is known.
    :param is_normal: what is stored is no draw of such starts: a variance like that of normal ones with the same sd.
    """

    noise: Noise
    stored_sessions: int
    is_normal: bool = False
    change: float = 0.0
    trials: int = 1000
    seed: tuple[int, ...] = field(default=(1,))

    def run(self) -> Outcome:
        """Judge the blocks of each gate; the session's luck is in both sides, so it is in none."""
        rng = np.random.default_rng(self.seed)
        counts: Counter[tuple[Status, bool | None]] = Counter()
        blocks = 0
        for _ in range(self.trials):
            logs = self.noise.draw(rng, 1, 1, 2 * USUAL_BLOCKS, 1)[0, 0, :, 0].reshape(2, USUAL_BLOCKS)
            logs[0] += math.log1p(self.change)
            stored = self._stored(rng)
            candidate, base = map(_samples, np.exp(logs))
            verdict = judge_pairs([PairedHistory(ONE_METRIC[0], candidate, base, stored)])[0]
            counts[verdict.status, plain_pairs(logs[0] - logs[1], stored, ONE_METRIC[0].margin)] += 1
            blocks += verdict.n_current
        return Outcome(counts, blocks)

    def _stored(self, rng: np.random.Generator) -> StartSpread | None:
        if not self.stored_sessions:
            return None
        if self.is_normal:
            df = self.stored_sessions * (STARTS_STORED - 1)
            return StartSpread(self.noise.variance_of_start * rng.chisquare(df) / df, df)
        before = np.exp(self.noise.draw(rng, 1, self.stored_sessions, STARTS_STORED, 1)[0, ..., 0])
        return spread_of_starts([[_samples(session) for session in before]])


def _samples(values: Iterable[float]) -> list[MetricSample]:
    return [MetricSample((float(value),)) for value in values]


Gate = StoredGate | PairedGate


def run_gate(gate: Gate) -> Outcome:
    """Run in another process."""
    return gate.run()


def one_metric_gates(trials: int, seed: int) -> list[tuple[str, list[Gate]]]:
    """Rows of the first table: a name, and per noise the gate on identical code and on +5 %."""
    kinds: list[tuple[str, Callable[..., Gate]]] = [
        ("stored, K 20, one look", partial(StoredGate, sessions=20, prior=NOISE_PRIORS["cuda"], looks=1)),
        ("stored, K 20, as shipped", partial(StoredGate, sessions=20, prior=NOISE_PRIORS["cuda"])),
    ]
    for prior in NOISE_PRIORS:
        for count in (1, 5, 10):
            name = f"stored, K {count}, {prior} prior"
            kinds.append((name, partial(StoredGate, sessions=count, prior=NOISE_PRIORS[prior])))
    kinds.append(("paired, nothing stored", partial(PairedGate, stored_sessions=0)))
    kinds.append(("paired, 16 df stored", partial(PairedGate, stored_sessions=8)))
    return [
        (
            name,
            [
                make(noise=noise, change=change, trials=trials, seed=(seed, row, column))
                for column, noise in enumerate(NOISES)
                for change in (0.0, 0.05)
            ],
        )
        for row, (name, make) in enumerate(kinds)
    ]


def print_peers(_pool: ProcessPoolExecutor, trials: int, seed: int) -> None:
    """The rules of others: red on identical code / on +5 %."""
    print(f"\nred on identical code / found of +5 %, in percent of {trials} (rank tests: {min(trials, 4000)})")
    print(f"{'':44}" + "".join(f"{noise.name:>16}" for noise in NOISES))
    for row, (name, rule) in enumerate(PEERS):
        count = min(trials, 4000) if rule is u_test or "asv" in name else trials
        cells = []
        for column, noise in enumerate(NOISES):
            rng = np.random.default_rng((seed, 100 + row, column))
            same, slower = (100 * rule(rng, noise, math.log1p(c), count).mean() for c in (0, 0.05))
            cells.append(f"{same:.1f} / {slower:.1f}")
        print(f"{name:44}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
    if find_spec("otava") is None:
        print("apache-otava is not installed: left out")
        return
    for bad in (1, 3, 7):
        rng = np.random.default_rng((seed, 200, bad))
        cells = [f"- / {100 * otava_found(rng, noise, math.log1p(0.05), bad, 150):.0f}" for noise in NOISES]
        print(f"{f'Otava p .001, after {bad} bad runs':44}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def print_one_metric(pool: ProcessPoolExecutor, trials: int, seed: int) -> None:
    """This project's verdicts, with intervals."""
    print(f"\nthis project, one metric, margin 5 %: percent of {trials} gates and 95 % interval; starts: mean number")
    print(f"{'':26}{'noise':12}{'identical: red':>20}{'pass':>7}{'unclear':>9}{'starts':>8}", end="")
    print(f"{'+5 %: red':>22}{'pass':>7}{'unclear':>9}{'starts':>8}")
    for name, gates in one_metric_gates(trials, seed):
        outcomes = list(pool.map(run_gate, gates))
        for noise, same, slower in zip(NOISES, outcomes[::2], outcomes[1::2], strict=True):
            print(f"{name:26}{noise.name:12}{_row(same):>44}{_row(slower):>46}", flush=True)


def print_beside_plain(pool: ProcessPoolExecutor, trials: int, seed: int) -> None:
    """This project's verdicts and the plain tests, on the same numbers."""
    print(f"\nred in percent of {trials} gates; the plain test on the same numbers; difference, 95 % interval")
    print(f"{'':26}{'noise':12}{'identical':>18}{'plain':>18}{'difference':>24}", end="")
    print(f"{'+5 %':>20}{'plain':>20}{'difference':>24}")
    stored = partial(StoredGate, sessions=20, prior=NOISE_PRIORS["cuda"])
    kinds: list[tuple[str, Callable[..., Gate]]] = [
        ("stored, K 20, one look", partial(stored, looks=1)),
        ("stored, K 20, as shipped", stored),
        ("paired, nothing stored", partial(PairedGate, stored_sessions=0)),
        ("paired, 16 df stored", partial(PairedGate, stored_sessions=8)),
        ("paired, 16 normal df", partial(PairedGate, stored_sessions=8, is_normal=True)),
    ]
    for row, (name, make) in enumerate(kinds):
        for column, noise in enumerate(NOISES):
            line = f"{name:26}{noise.name:12}"
            for change, width in ((0.0, 18), (0.05, 20)):
                parts: list[Gate] = [
                    make(noise=noise, change=change, trials=trials // 4, seed=(seed, 600 + row, column, part))
                    for part in range(4)
                ]
                outcome = joined(pool.map(run_gate, parts))
                red = outcome.share_text(Status.REGRESSION)
                line += f"{red:>{width}}{outcome.plain_text():>{width}}{outcome.beyond_plain_text():>24}"
            print(line, flush=True)


def joined(outcomes: Iterable[Outcome]) -> Outcome:
    """All gates of several."""
    every = list(outcomes)
    return Outcome(sum((o.counts for o in every), Counter()), sum(o.starts for o in every))


def _row(outcome: Outcome) -> str:
    shares = f"{outcome.share(Status.PASS):7.1f}{outcome.share(Status.INCONCLUSIVE):9.1f}"
    return f"{outcome.share_text(Status.REGRESSION):>20}{shares}{outcome.starts / outcome.trials:8.2f}"


def print_many_metrics(pool: ProcessPoolExecutor, trials: int, seed: int) -> None:
    """False alarms where several metrics are gated; beside a fixed limit and uncorrected tests of the same data."""
    print(f"\nany metric red on identical code, K 20, as shipped: percent of {trials} gates")
    print(f"{'metrics':>8}{'correlation':>13}{'this project':>20}{'p < .01 each':>14}{'5 % each':>10}")
    names = [*(t.metric for t in SHIPPED), *(name for name in METRICS if name not in {t.metric for t in SHIPPED})]
    for count in (3, 12):
        tolerances = tuple(Tolerance(name, 0.05) for name in names[:count])
        for correlation in (0.0, 0.6):
            parts = [
                StoredGate(NOISES[1], 20, NOISE_PRIORS["cuda"], STARTS, tolerances, correlation, 0.0, trials // 4, at)
                for at in ((seed, 300, count, int(10 * correlation), part) for part in range(4))
            ]
            whole = joined(pool.map(run_gate, parts))
            tested, fixed = _uncorrected(count, correlation, seed)
            print(
                f"{count:8}{correlation:13.1f}{whole.share_text(Status.REGRESSION):>20}{tested:14.1f}{fixed:10.1f}",
                flush=True,
            )


def _uncorrected(metrics: int, correlation: float, seed: int, trials: int = 20000) -> tuple[float, float]:
    """Percent of gates with any red: a test at 1 % of each metric, and a limit of 5 % over one earlier run."""
    rng = np.random.default_rng((seed, 400))
    shared, own = rng.normal(size=(trials, 1)), rng.normal(size=(trials, metrics))
    z = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    noise = NOISES[1]
    sd = math.sqrt(2 * (noise.session**2 + noise.start**2 + noise.within**2 / 5))
    tested, fixed = (stats.norm.sf(z) < 0.01).any(1).mean(), (np.expm1(z * sd) > 0.05).any(1).mean()
    return 100 * float(tested), 100 * float(fixed)


def print_as_shipped(pool: ProcessPoolExecutor, trials: int, seed: int) -> None:
    """The default gate on the noise that the priors assume; metrics in the way that is worst for each rate."""
    told = ", ".join(f"{t.metric} {t.fraction:.0%}" for t in SHIPPED)
    print(f"\nthe default gate ({told}) on noise as its prior says: percent of {trials} gates")
    print("identical: the metrics are independent; slower: all alike, and they move as one")
    print(f"{'':12}{'identical: red':>20}{'pass':>7}{'unclear':>9}{'starts':>8}", end="")
    print("".join(f"{'+' + format(change, '.0%'):>8}" for change in CHANGES))
    for row, (name, prior) in enumerate(NOISE_PRIORS.items()):
        noise = Noise(name, prior.session_sd, prior.start_sd)
        for count in (1, 3, 5, 10):
            make = partial(StoredGate, noise, count, prior, STARTS, SHIPPED, trials=trials)
            gates: list[Gate] = [make(seed=(seed, 500, row, count, 0))]
            for number, change in enumerate(CHANGES, 1):
                gates.append(make(correlation=1.0, change=change, seed=(seed, 500, row, count, number)))
            same, *slower = pool.map(run_gate, gates)
            found = "".join(f"{outcome.share(Status.REGRESSION):8.1f}" for outcome in slower)
            print(f"{f'{name}, K {count}':12}{_row(same):>44}{found}", flush=True)


TABLES: Mapping[str, tuple[Callable[[ProcessPoolExecutor, int, int], None], float]] = {
    "peers": (print_peers, 2),
    "one-metric": (print_one_metric, 1),
    "plain": (print_beside_plain, 1),
    "many-metrics": (print_many_metrics, 1 / 2),
    "shipped": (print_as_shipped, 1 / 3),
}
"""Each table, and its gates in multiples of ``--trials``."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the machine, the date and the tables."""
    parser = argparse.ArgumentParser(description="simulate how often performance gates are wrong")
    parser.add_argument("--trials", type=int, default=4000, help="gates per figure; fewer in the later tables (4000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="(all cores)")
    parser.add_argument("--only", choices=TABLES, help="print this table and no other")
    parsed = parser.parse_args(arguments)
    began = time.monotonic()
    print(f"{datetime.now(UTC):%Y-%m-%d}, {cpu_model()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"stored mode: at most {STARTS} starts now; stored sessions of {STARTS_STORED}; seed {parsed.seed}")
    for noise in NOISES:
        print(f"{noise.name}: sd session {noise.session:.1%}, start {noise.start:.1%}, within {noise.within:.1%}")
    with ProcessPoolExecutor(parsed.processes) as pool:
        for name, (print_table, factor) in TABLES.items():
            if parsed.only in (None, name):
                print_table(pool, max(100, round(factor * parsed.trials)), parsed.seed)
    print(f"\ntook {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
