"""How often the gate is wrong: false alarms on equal speed, and how often a real change is found.

A simulation of the shipped policy (default tolerances, up to 3 server starts, the looks of
:func:`~pytest_gpulayout.gate.judge_performance`) with noise exactly as the shipped priors assume it: normal on the
log scale, between sessions and between starts. Stored sessions have 3 starts each. Gates with more noise than that
err more often; how much noise there is, only measuring on the machine itself tells.

The metrics of one start share its luck to a degree nobody knows, so each rate is given for the degree that is worst
for it: false alarms for metrics that are independent, detection for metrics that move as one. A change is one of all
gated metrics together. From the repository's root::

    python benchmarks/gate_error_rates.py
    python benchmarks/gate_error_rates.py --trials 20000 --platforms cuda
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pytest_gpulayout.adapters.cpu_host import cpu_model
from pytest_gpulayout.baseline import Baseline, BaselineKey, BaselineRun, BaselineSession
from pytest_gpulayout.judging import NOISE_PRIORS, GatePolicy, judge_once
from pytest_gpulayout.measurement import Identity
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.options import OPTIONS
from pytest_gpulayout.stats import NoisePrior
from pytest_gpulayout.tolerance import parse_tolerances
from pytest_gpulayout.verdict import Look, MetricSample, Status

SESSIONS = (1, 3, 5, 10)
STARTS_STORED = 3
CHANGES = (0.05, 0.10, 0.30, 1.00)
STARTS = next(int(option.ini_default) for option in OPTIONS if option.name == "starts")
KEY = BaselineKey({"name": "m"}, "tp2", {"device": "d", "count": 2, "links": []}, {"name": "w", "fingerprint": ""})


@dataclass(frozen=True)
class Drawn:
    """A measurement that was drawn. :param runs: (n_starts,) of values by metric."""

    identity: Identity
    runs: tuple[Mapping[str, tuple[float, ...]], ...]

    def samples(self, metric: str) -> tuple[MetricSample, ...]:
        """(n_starts,) samples of one metric."""
        return tuple(MetricSample(run[metric]) for run in self.runs if metric in run)


class Machine:
    """Draws sessions. :param together: whether all metrics of a start share one deviation."""

    def __init__(self, noise: NoisePrior, metrics: Sequence[str], seed: int, *, together: bool) -> None:
        self._noise = noise
        self._metrics = metrics
        self._random = random.Random(seed)
        self._together = together

    def session(self, starts: int, change: float = 0.0) -> tuple[Mapping[str, tuple[float, ...]], ...]:
        """(starts,) of metrics; ``change`` 1.0 takes twice as long, at half the rate."""
        of_session = self._deviations(self._noise.session_sd)
        return tuple(self._start(of_session, math.log1p(change)) for _ in range(starts))

    def _start(self, of_session: Sequence[float], shift: float) -> Mapping[str, tuple[float, ...]]:
        of_start = self._deviations(self._noise.start_sd)
        logs = [shift + a + b for a, b in zip(of_session, of_start, strict=True)]
        signs = (-1 if METRICS[name].higher_is_better else 1 for name in self._metrics)
        return {name: (math.exp(sign * log),) for name, sign, log in zip(self._metrics, signs, logs, strict=True)}

    def _deviations(self, sd: float) -> list[float]:
        if self._together:
            return [self._random.gauss(0, sd)] * len(self._metrics)
        return [self._random.gauss(0, sd) for _ in self._metrics]


def gate(machine: Machine, policy: GatePolicy, sessions: int, change: float) -> tuple[Status, int]:
    """One gate on a fresh history: its verdict, and how many starts that took."""
    stored = tuple(
        BaselineSession("", {}, {}, {}, tuple(BaselineRun(1, run) for run in machine.session(STARTS_STORED)))
        for _ in range(sessions)
    )
    baseline, identity = Baseline(KEY, stored), Identity(KEY, {}, {}, {})
    runs = machine.session(policy.starts, change)
    for number in range(1, policy.starts + 1):
        look = Look(number, policy.starts)
        status = judge_once(Drawn(identity, runs[:number]), baseline, policy, look, place="").status
        if status is not Status.INCONCLUSIVE:
            return status, number
    return Status.INCONCLUSIVE, policy.starts


@dataclass(frozen=True)
class Rates:
    """Shares of the verdicts. :param starts: mean number of server starts."""

    shares: Mapping[Status, float]
    starts: float


def rates(platform_name: str, sessions: int, change: float, trials: int, seed: int) -> Rates:
    """Run many gates of one kind."""
    tolerances = parse_tolerances("")
    policy = GatePolicy("check", tolerances, NOISE_PRIORS[platform_name], STARTS)
    machine = Machine(policy.prior, tuple(tolerances), seed, together=change > 0)
    found = [gate(machine, policy, sessions, change) for _ in range(trials)]
    counts = Counter(status for status, _ in found)
    return Rates({status: counts[status] / trials for status in Status}, sum(starts for _, starts in found) / trials)


def report(platform_name: str, trials: int, seed: int) -> None:
    """Print one table."""
    print(f"\n{platform_name}: noise {NOISE_PRIORS[platform_name]}")
    head = [f"{'+' + format(change, '.0%'):>7}" for change in CHANGES]
    print(f"{'':8}  {'same against same':^35}  {'found as regression':^35}")
    print(f"{'sessions':8}  {'alarm':>7}  {'pass':>7}  {'unclear':>7}  {'starts':>6}    {'  '.join(head)}")
    for sessions in SESSIONS:
        same = rates(platform_name, sessions, 0.0, 2 * trials, seed)
        changed = [rates(platform_name, sessions, change, trials, seed) for change in CHANGES]
        kinds = (Status.REGRESSION, Status.PASS, Status.INCONCLUSIVE)
        quiet = "  ".join(f"{same.shares[kind]:7.1%}" for kind in kinds)
        found = "  ".join(f"{rate.shares[Status.REGRESSION]:7.1%}" for rate in changed)
        print(f"{sessions:8}  {quiet}  {same.starts:6.2f}    {found}", flush=True)


def main() -> None:
    """Print the machine, the date and a table per platform."""
    parser = argparse.ArgumentParser(description="simulate how often the performance gate is wrong")
    parser.add_argument("--trials", type=int, default=2000, help="gates per change; twice as many without (2000)")
    parser.add_argument("--platforms", default="cuda,cpu")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began = time.monotonic()
    tolerances = ", ".join(f"{t.metric} {t.fraction:.0%}" for t in parse_tolerances("").values())
    print(f"{datetime.now(UTC):%Y-%m-%d}, {cpu_model()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"gated: {tolerances}; at most {STARTS} starts; stored sessions of {STARTS_STORED} starts")
    print(f"{arguments.trials} gates per change, {2 * arguments.trials} without, seed {arguments.seed}")
    for name in arguments.platforms.split(","):
        report(name, arguments.trials, arguments.seed)
    print(f"\ntook {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
