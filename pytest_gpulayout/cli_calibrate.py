"""``gpulayout baseline calibrate``: how noisy this machine is, and what a gate on it can see.

Runs the speed gate against itself through pytest, in a child process, with baselines in a temporary folder; or reads
sessions that are stored. What they tell is in :mod:`~pytest_gpulayout.noise_study`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.cli_common import FAILED, FINE, Outcome, as_count, command, read_text, typed
from pytest_gpulayout.cli_store import add_tolerance
from pytest_gpulayout.errors import GpuLayoutError, MeasurementError
from pytest_gpulayout.options import OPTION, gpu_options

if TYPE_CHECKING:
    from pytest_gpulayout.baseline import BaselineKey, BaselineRun

_SPEED_GATE = ("--pyargs", "pytest_gpulayout.gates.test_gate::test_performance")
_OURS = ("base", "baseline", "baseline-dir", "results", "starts", "write-in-ci")
"""Options of the plugin that are given to each session here, and so not by the caller."""

_TO_STDERR = 2


def declare_calibrate(verbs: Any) -> None:
    """Declare the subcommand. :param verbs: the subparsers of ``gpulayout baseline``."""
    parser = command(
        verbs,
        "calibrate",
        _calibrate,
        "measure how noisy this machine is: sessions in which nothing changes, compared with each other",
        "gpulayout baseline calibrate -- --gpu-layout=tp2 --gpu-model=./model",
        "gpulayout baseline calibrate --sessions 5 --save today.json -- --gpu-layout=tp2 tests/test_speed.py",
        "gpulayout baseline calibrate --from today.json yesterday.json     pool sessions, and measure nothing",
        "gpulayout baseline calibrate --from gpu-baselines/.../smoke.json  sessions that are stored anyway",
        more=("what follows -- goes to pytest; without a test file there, the built-in speed gate runs",),
    )
    add = parser.add_argument
    add("--sessions", type=typed(as_count), default=3, metavar="N", help="runs of pytest (default: 3)")
    add("--starts", type=typed(as_count), default=4, metavar="N", help="fresh server starts of each (default: 4)")
    add(
        "--gate-starts",
        type=typed(_starts_of_gate),
        metavar="N",
        help="--gpu-starts of the gate that is planned (default: its own default)",
    )
    add_tolerance(parser)
    add("--resamples", type=typed(as_count), default=2000, metavar="N", help="gates to judge (default: %(default)s)")
    add("--seed", type=int, default=1, metavar="N", help="of the draws (default: %(default)s)")
    add("--save", metavar="FILE", help="keep the measured sessions, for --from")
    add("--from", dest="sources", nargs="+", metavar="FILE", help="study these results or baselines instead")
    add("pytest_arguments", nargs="*", metavar="-- PYTEST ARGS", help="for pytest: layout, model, test files")


def _starts_of_gate(text: str) -> int:
    from pytest_gpulayout.verdict import MOST_STARTS

    number = as_count(text)
    if number > MOST_STARTS:
        raise ValueError(f"at most {MOST_STARTS} starts were expected, found {number}")
    return number


@dataclass(frozen=True, slots=True)
class _Pool:
    """All sessions of one key."""

    key: BaselineKey
    sessions: list[tuple[BaselineRun, ...]]


def _calibrate(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.gated import documented_prior, gated_of
    from pytest_gpulayout.noise_study import study_noise
    from pytest_gpulayout.noise_text import study_document, study_lines
    from pytest_gpulayout.settings import STORED_STARTS

    pools, notes = _stored_pools(arguments) if arguments.sources else (_measured_pools(arguments), [])
    lines: list[str] = []
    documents, code = [], FINE
    for pool in pools:
        study = study_noise(
            pool.sessions,
            gated_of(pool.key, arguments.tolerance),
            documented_prior(pool.key),
            gate_starts=arguments.gate_starts or STORED_STARTS,
            resamples=arguments.resamples,
            seed=arguments.seed,
        )
        if study.same is not None and study.same.is_too_high:
            code = FAILED
        first, *rest = study_lines(study)
        lines += [*([""] if lines else []), first, f"of {pool.key.path}", *rest]
        documents.append({"path": pool.key.path, **study_document(study)})
    return Outcome(code, {"studies": documents}, lines, notes)


# -- sessions that are stored --------------------------------------------------------------------------------------


def _stored_pools(arguments: argparse.Namespace) -> tuple[list[_Pool], list[str]]:
    if arguments.pytest_arguments or arguments.save:
        raise GpuLayoutError(
            "either sessions to study or arguments for pytest were required, found both\n"
            "  in the options of gpulayout baseline calibrate\n"
            "  leave out --from to measure, or --save and everything after -- to study stored sessions"
        )
    sessions: list[tuple[BaselineKey, tuple[BaselineRun, ...]]] = []
    notes: list[str] = []
    for source in arguments.sources:
        for key, runs in _read(source, notes):
            if (key, runs) in sessions:
                notes.append(f"gpulayout: a session of {source} is the same as one before: counted once")
            else:
                sessions.append((key, runs))
    return _pools(sessions, ", ".join(arguments.sources)), notes


def _read(path: str, notes: list[str]) -> Iterator[tuple[BaselineKey, tuple[BaselineRun, ...]]]:
    """The sessions of a results file, or of the newest level and epoch of a baseline."""
    from pytest_gpulayout.baseline_text import baseline_from_text

    advice = "name files of --gpu-results, of --save, or of gpulayout baseline list"
    text = read_text(path, "results or a baseline were required", advice)
    if not _is_baseline(text):
        yield from _sessions_of_results(text, path)
        return
    baseline = baseline_from_text(text, path)
    sessions = baseline.reference().sessions
    if left_out := len(baseline.sessions) - len(sessions):
        notes.append(f"gpulayout: {left_out} sessions of {path} are of another level or epoch, or older: left out")
    for session in sessions:
        yield baseline.key, session.runs


def _is_baseline(text: str) -> bool:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and "sessions" in document


def _sessions_of_results(text: str, path: str) -> Iterator[tuple[BaselineKey, tuple[BaselineRun, ...]]]:
    """Each measurement is a session. :raises MeasurementError: one of them is not sound."""
    from pytest_gpulayout.results import measurements_from_text

    for measurement in measurements_from_text(text, path):
        if measurement.problems:
            problems = "\n".join(f"    {problem}" for problem in measurement.problems)
            raise MeasurementError(
                f"sound measurements were required, found one that is invalid:\n{problems}\n"
                f"  in {path}, {measurement.test}\n  end what disturbs the machine, and measure again"
            )
        yield measurement.identity.key, measurement.runs


def _pools(sessions: Sequence[tuple[BaselineKey, tuple[BaselineRun, ...]]], source: str) -> list[_Pool]:
    pools: list[_Pool] = []
    for key, runs in sessions:
        pool = next((pool for pool in pools if not pool.key.differences(key)), None)
        if pool is None:
            pools.append(_Pool(key, [runs]))
        else:
            pool.sessions.append(runs)
    if not pools:
        raise MeasurementError(
            f"at least one measurement was required, found none\n  in {source}\n"
            "  run a test that measures: one with the perf_gate fixture, or no test file for the built-in speed gate"
        )
    return pools


# -- sessions that are measured ------------------------------------------------------------------------------------


def _measured_pools(arguments: argparse.Namespace) -> list[_Pool]:
    _refuse_ours(arguments.pytest_arguments)
    if arguments.save is not None:
        _check_writable(Path(arguments.save))
    texts: list[str] = []
    try:
        with tempfile.TemporaryDirectory(prefix="gpulayout-calibrate-") as folder:
            for number in range(1, arguments.sessions + 1):
                texts.append(_measure_session(arguments, number, Path(folder)))
    finally:
        if arguments.save is not None and texts:  # those before one that failed, too: they took their time
            _save(Path(arguments.save), [json.loads(text) for text in texts])
    sessions = [session for text in texts for session in _sessions_of_results(text, "the results of pytest")]
    return _pools(sessions, "the results of pytest")


def _measure_session(arguments: argparse.Namespace, number: int, folder: Path) -> str:
    """Run pytest, and return its results."""
    results = folder / f"session-{number}.json"
    words = _command(arguments, results, folder / "baselines")
    _say(f"session {number} of {arguments.sessions}: {shlex.join(words[2:])}")
    _run_session(words, number, results)
    return results.read_text(encoding="utf-8")


def _refuse_ours(words: Sequence[str]) -> None:
    flags = {OPTION[name].flag for name in _OURS}
    taken = [word for word in gpu_options(words) if word.partition("=")[0] in flags]
    if taken:
        raise GpuLayoutError(
            f"arguments for pytest were required that leave {', '.join(sorted(flags))} to this command\n"
            f"  found: {' '.join(taken)}\n  after --\n  leave them out; for more starts: --starts N before the --"
        )


def _check_writable(path: Path) -> None:
    """Not to find out after an hour that the sessions cannot be kept."""
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise GpuLayoutError(
            f"a file that can be written was required for the sessions, found {path}\n"
            "  in --save\n  name a file in a folder that exists and can be written to"
        )


def _command(arguments: argparse.Namespace, results: Path, store: Path) -> list[str]:
    """The child: recording makes exactly so many starts, whatever their numbers are."""
    words: Sequence[str] = arguments.pytest_arguments
    return [
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words),
        *("--gpu-baseline=update", f"--gpu-starts={arguments.starts}", "--gpu-write-in-ci=yes"),
        *(f"--gpu-baseline-dir={store}", f"--gpu-results={results}"),
        *(() if _names_tests(words) else _SPEED_GATE),
    ]


def _names_tests(words: Sequence[str]) -> bool:
    """Whether there is a test file, a test's id, or a folder that does not belong to the option before it."""
    before = ["", *words]
    return any(
        not word.startswith("-")
        and (
            word.partition("::")[0].endswith(".py")
            or (os.path.isdir(word) and not (previous.startswith("-") and "=" not in previous))
        )
        for previous, word in zip(before, words, strict=False)
    )


def _run_session(words: Sequence[str], number: int, results: Path) -> None:
    """Run pytest with its output on our standard error.

    In a process group of its own: Ctrl-C reaches it once, from us, and pytest then ends its servers in order.
    """
    with subprocess.Popen(words, stdout=_TO_STDERR, start_new_session=True) as child:
        code = _wait(child)
    if code == 0 and results.exists():
        return
    found = f"pytest ended with exit code {code}" if code else "pytest passed, and wrote no results"
    raise MeasurementError(
        f"session {number} was required to measure\n  found: {found}; its messages are above\n"
        f"  in {shlex.join(words[2:])}\n  mend what it names, and run the calibration again"
    )


def _wait(child: subprocess.Popen[bytes]) -> int:
    try:
        with _termination_as_interrupt():
            return child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)
        child.wait()  # a second Ctrl-C ends this, too: the servers' keeper ends them when pytest is gone
        raise
    finally:
        if child.poll() is None:
            child.kill()


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """A CI system that cancels a job sends SIGTERM; the child, out of its reach, must not outlive us."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _save(path: Path, documents: Sequence[Mapping[str, Any]]) -> None:
    """Write one results file with the measurements of all sessions."""
    records = [record for item in documents for record in item["records"] if record["kind"] == "performance"]
    path.write_text(json.dumps({**documents[-1], "records": records}, indent=1) + "\n", encoding="utf-8")
    _say(f"the sessions are in {path}; study them with others: gpulayout baseline calibrate --from {path} ...")


def _say(line: str) -> None:
    print(f"gpulayout: {line}", file=sys.stderr, flush=True)
