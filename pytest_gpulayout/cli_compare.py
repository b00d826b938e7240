"""``gpulayout compare``: judge stored numbers against others, without pytest and without a GPU."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.cli_common import FAILED, FINE, UNDECIDED, Outcome, command, read_text
from pytest_gpulayout.cli_store import add_tolerance

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_gpulayout.comparing import Compared
    from pytest_gpulayout.verdict import Status

_ACCEPT = "gpulayout baseline approve MEASUREMENT.json, or record it again: pytest --gpu-baseline=update"


def declare_compare(commands: Any) -> None:
    """Declare the subcommand."""
    parser = command(
        commands,
        "compare",
        _compare,
        "judge a measurement against a baseline; both may be files of ours or of vllm bench serve",
        "gpulayout compare gpu-baselines/Qwen3-8B/tp2/2x-NVIDIA-H200-NV18-d03fc2a1/smoke.json results.json",
        "gpulayout compare before.json after.json --tolerance median_ttft_ms=10% --json",
        more=(
            "Each file may be a baseline, results of pytest --gpu-results, of gpulayout measure --save, or of",
            "vllm bench serve --save-result (also appended, or the summary.json of a sweep).",
            "",
            "exit code 3: inconclusive; 1 also for a side that is missing or invalid",
        ),
    )
    parser.add_argument("baseline", metavar="BASELINE.json", help="what counts as usual")
    parser.add_argument("measurement", metavar="MEASUREMENT.json", help="what is judged")
    add_tolerance(parser)
    parser.add_argument(
        "--platform",
        choices=("cuda", "cpu"),
        default="cuda",
        help="whose noise to assume of files that do not tell their platform (default: cuda)",
    )


def _compare(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.comparing import overall

    compared = _compare_files(arguments)
    status = overall(compared)
    lines = [f"verdict: {status}", *(line for one in compared for line in _lines(one, several=len(compared) > 1))]
    return Outcome(_exit_code([one.verdict.status for one in compared]), _document(compared, status), lines)


def _exit_code(found: Sequence[Status]) -> int:
    from pytest_gpulayout.verdict import Status

    if all(status.passed for status in found):
        return FINE
    return UNDECIDED if all(status.passed or status is Status.INCONCLUSIVE for status in found) else FAILED


def _document(compared: Sequence[Compared], status: Status) -> dict[str, Any]:
    """What every comparison found, in one list each; ``measurement`` tells them apart."""
    from pytest_gpulayout.report import metric_document

    verdicts = [(one.title if len(compared) > 1 else "", one.verdict) for one in compared]

    def told(name: str) -> list[str]:
        return [
            f"{title}: {text}" if title else text for title, verdict in verdicts for text in getattr(verdict, name)
        ]

    return {
        "verdict": str(status),
        "metrics": [
            {**metric_document(metric), "measurement": one.title}
            for one in compared
            for metric in one.verdict.metrics
        ],
        "reasons": told("reasons"),
        "changed": told("changed"),
        "cause": told("cause"),
        "drift": _joined(one.verdict.drift for one in compared),
        "provisional": _joined(one.verdict.provisional for one in compared),
    }


def _joined(texts: Iterable[str]) -> str:
    return "; ".join(filter(None, dict.fromkeys(texts)))


def _lines(one: Compared, *, several: bool) -> list[str]:
    from pytest_gpulayout.report import verdict_lines

    lines = verdict_lines(one.verdict, one.title, _ACCEPT)
    return [f"{one.title}: {one.verdict.status}", *(f"  {line}" for line in lines)] if several else lines


def _compare_files(arguments: argparse.Namespace) -> Sequence[Compared]:
    """A side that is missing, or is not the document it should be, is a verdict here and not an error."""
    from pytest_gpulayout.adapters.host import utc_now
    from pytest_gpulayout.compared_files import read_recorded
    from pytest_gpulayout.comparing import Compared, compare_recorded
    from pytest_gpulayout.errors import BaselineError, MeasurementError
    from pytest_gpulayout.verdict import Status, Verdict

    place = arguments.baseline

    def failed(status: Status, reason: str) -> Sequence[Compared]:
        return [Compared(arguments.measurement, Verdict(status, reasons=(reason,), baseline_path=place))]

    texts = [_text(path) for path in (place, arguments.measurement)]
    if texts[0] is None:
        return failed(Status.NO_BASELINE, f"a stored baseline was required, and there is none in {place}")
    if texts[1] is None:
        return failed(
            Status.INVALID,
            f"results with a measurement were required, and there are none in {arguments.measurement}",
        )
    try:
        stored = read_recorded(texts[0], place, platform=arguments.platform)
        measured = read_recorded(texts[1], arguments.measurement, platform=arguments.platform)
    except (BaselineError, MeasurementError) as error:
        return failed(Status.INVALID, str(error))
    return compare_recorded(measured, stored, arguments.tolerance, today=utc_now()[:10])


def _text(path: str) -> str | None:
    advice = "name a baseline, or results of --gpu-results or of vllm bench serve --save-result"
    try:
        return read_text(path, "a JSON document was required", advice)
    except FileNotFoundError:
        return None
