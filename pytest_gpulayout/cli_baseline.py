"""``gpulayout compare`` and ``gpulayout baseline``: judge stored numbers, and look after them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.cli_common import (
    FAILED,
    FINE,
    MISUSE,
    UNDECIDED,
    Outcome,
    command,
    typed,
)
from pytest_gpulayout.errors import GpuLayoutError

if TYPE_CHECKING:
    from pytest_gpulayout.baseline import Baseline
    from pytest_gpulayout.ports import BaselineStore
    from pytest_gpulayout.verdict import Verdict


def declare_compare(commands: Any) -> None:
    """Declare the subcommand."""
    parser = command(
        commands,
        "compare",
        _compare,
        "judge measurements of --gpu-results against a baseline; exit code 3 is inconclusive",
        "gpulayout compare gpu-baselines/Qwen3-8B/tp2/2x-NVIDIA-H200-NV18-d03fc2a1/smoke.json results.json",
        "gpulayout compare BASELINE.json MEASUREMENT.json --tolerance median_ttft_ms=10% --json",
    )
    parser.add_argument("baseline", metavar="BASELINE.json", help="a baseline document")
    parser.add_argument("measurement", metavar="MEASUREMENT.json", help="results with a measurement of the same key")
    parser.add_argument(
        "--tolerance", type=typed(_tolerances), default="", metavar="METRIC=5%,...", help="as --gpu-tolerance"
    )


def _tolerances(text: str) -> object:
    from pytest_gpulayout.tolerance import parse_tolerances

    return parse_tolerances(text)


def _compare(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.report import metric_document, verdict_lines
    from pytest_gpulayout.verdict import Status

    verdict = _judge_files(arguments)
    document = {
        "verdict": str(verdict.status),
        "metrics": [metric_document(metric) for metric in verdict.metrics],
        "reasons": list(verdict.reasons),
        "changed": list(verdict.changed),
        "provisional": verdict.provisional,
    }
    code = FINE if verdict.status.passed else UNDECIDED if verdict.status is Status.INCONCLUSIVE else FAILED
    lines = verdict_lines(verdict, arguments.measurement, "record it again with pytest --gpu-baseline=update")
    notes = [f"  {reason}" for reason in verdict.reasons if f"{verdict.status}: {reason}" not in lines]
    return Outcome(code, document, [f"verdict: {verdict.status}", *lines, *notes])


def _judge_files(arguments: argparse.Namespace) -> Verdict:
    """A side that is missing, or is not the document it should be, is a verdict here and not an error."""
    from pytest_gpulayout.baseline_text import baseline_from_text
    from pytest_gpulayout.comparing import judge_recorded
    from pytest_gpulayout.errors import BaselineError, MeasurementError
    from pytest_gpulayout.results import measurements_from_text
    from pytest_gpulayout.verdict import Status, Verdict

    place = arguments.baseline
    baseline_text, results_text = _text(place), _text(arguments.measurement)
    if baseline_text is None:
        reason = f"a stored baseline was required, and there is none in {place}"
        return Verdict(Status.NO_BASELINE, reasons=(reason,), baseline_path=place)
    if results_text is None:
        reason = f"results with a measurement were required, and there are none in {arguments.measurement}"
        return Verdict(Status.INVALID, reasons=(reason,), baseline_path=place)
    try:
        baseline = baseline_from_text(baseline_text, place)
        measurements = measurements_from_text(results_text, arguments.measurement)
    except (BaselineError, MeasurementError) as error:
        return Verdict(Status.INVALID, reasons=(str(error),), baseline_path=place)
    return judge_recorded(measurements, baseline, arguments.tolerance, place=place)


def _text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise GpuLayoutError(
            f"a JSON document was required, found bytes that are no UTF-8: {error.reason}\n  in {path}\n"
            "  name a baseline, or results of --gpu-results"
        ) from error


def declare_baseline(commands: Any) -> None:
    """Declare the subcommand and its verbs."""
    parser = commands.add_parser("baseline", help="look after stored baselines")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = command(
        verbs,
        "list",
        _baseline_list,
        "list the stored baselines",
        "gpulayout baseline list --dir s3://bucket/baselines",
    )
    show = command(
        verbs,
        "show",
        _baseline_show,
        "show one stored baseline: its key, its sessions and the spread between starts",
        "gpulayout baseline show Qwen3-8B/tp2/2x-NVIDIA-H200-NV18-d03fc2a1/smoke.json",
    )
    show.add_argument("path", metavar="PATH", help="as gpulayout baseline list prints it")
    for verb in (listing, show):
        verb.add_argument(
            "--dir",
            default="gpu-baselines",
            metavar="DIR_OR_URL",
            help="where they are (default: gpu-baselines in the current folder)",
        )


def _baseline_list(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.adapters.baseline_files import open_baselines
    from pytest_gpulayout.errors import BaselineError
    from pytest_gpulayout.report import aligned

    store = open_baselines(arguments.dir)
    entries, faults = [], []
    for path in store.paths():
        try:
            baseline = _read_baseline(store, path)
        except BaselineError as error:
            faults.append(str(error))
            continue
        entries.append(
            {
                "path": path,
                "sessions": len(baseline.sessions),
                "starts": sum(len(session.runs) for session in baseline.sessions),
                "recorded": baseline.sessions[-1].recorded,
            }
        )
    lines = list(aligned([("sessions", "starts", "last recorded", "path"), *map(_entry_row, entries)]))
    if not entries and not faults:
        lines = [f"no baseline in {store.root}; record one: pytest --gpu-layout=SPEC --gpu-baseline=new"]
    return Outcome(MISUSE if faults else FINE, {"root": store.root, "baselines": entries}, lines, faults)


def _entry_row(entry: dict[str, Any]) -> tuple[str, ...]:
    return str(entry["sessions"]), str(entry["starts"]), entry["recorded"], entry["path"]


def _read_baseline(store: BaselineStore, path: str) -> Baseline:
    from pytest_gpulayout.baseline_text import baseline_from_text
    from pytest_gpulayout.errors import BaselineNotFound

    text = store.read(path)
    place = f"{store.root.rstrip('/')}/{path}"
    if text is None:
        raise BaselineNotFound(
            f"a stored baseline was required, and there is none\n  expected in {place}\n"
            f"  see what there is: gpulayout baseline list --dir {store.root}",
            path=place,
        )
    return baseline_from_text(text, place)


def _baseline_show(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.adapters.baseline_files import open_baselines
    from pytest_gpulayout.baseline_text import baseline_to_text

    baseline = _read_baseline(open_baselines(arguments.dir), arguments.path)
    return Outcome(FINE, json.loads(baseline_to_text(baseline)), list(_baseline_lines(baseline)))


def _baseline_lines(baseline: Baseline) -> Iterator[str]:
    from pytest_gpulayout.report import aligned

    key = baseline.key
    for title, part in (("model", key.model), ("hardware", key.hardware), ("workload", key.workload)):
        yield f"{title}: " + ", ".join(
            f"{name} {value}" for name, value in part.items() if value not in (None, "", [])
        )
    yield f"layout: {key.layout}, protocol {key.protocol}"
    for session in baseline.sessions:
        facts = {**session.epoch, **session.sut, **session.covariates}
        yield f"session {session.recorded}: {len(session.runs)} starts of {session.runs[0].requests} requests"
        yield "  " + ", ".join(f"{name} {value}" for name, value in facts.items() if value not in (None, ""))
    yield from aligned([("metric", "median of starts", "lowest", "highest", "starts"), *_metric_rows(baseline)])


def _metric_rows(baseline: Baseline) -> Iterator[tuple[str, ...]]:
    from pytest_gpulayout.metrics import METRICS
    from pytest_gpulayout.report import quantity
    from pytest_gpulayout.stats import median

    names = dict.fromkeys(name for session in baseline.sessions for run in session.runs for name in run.metrics)
    for name in names:
        unit = METRICS[name].unit if name in METRICS else ""
        values = [sample.value for session in baseline.sessions for sample in session.samples(name)]
        yield name, *(quantity(f(values), unit) for f in (median, min, max)), str(len(values))
