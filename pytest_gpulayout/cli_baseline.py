"""``gpulayout baseline``: look after stored baselines. Here the verbs are gathered, and ``list`` and ``show``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.cli_approve import declare_approve
from pytest_gpulayout.cli_baseline_diff import declare_diff
from pytest_gpulayout.cli_calibrate import declare_calibrate
from pytest_gpulayout.cli_common import FINE, MISUSE, Outcome, as_count, command, typed
from pytest_gpulayout.cli_store import add_dir, add_today, add_tolerance, open_store, read_all, read_baseline
from pytest_gpulayout.cli_upkeep import declare_check, declare_prune

if TYPE_CHECKING:
    from pytest_gpulayout.baseline import Baseline, BaselineKey, BaselineSession
    from pytest_gpulayout.bimodality import Mode
    from pytest_gpulayout.standing import MetricStanding, Standing

_GATE_STARTS = 3


def declare_baseline(commands: Any) -> None:
    """Declare the subcommand and its verbs."""
    parser = commands.add_parser("baseline", help="look after stored baselines")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for declare in (
        *(_declare_list, _declare_show, declare_diff, declare_check),
        *(declare_approve, declare_prune, declare_calibrate),
    ):
        declare(verbs)


# -- list ----------------------------------------------------------------------------------------------------------


def _declare_list(verbs: Any) -> None:
    parser = command(
        verbs,
        "list",
        _list,
        "list the stored baselines: how much is in each, and whether verdicts on it are provisional",
        "gpulayout baseline list --dir s3://bucket/baselines",
    )
    add_dir(parser)
    add_today(parser)


def _list(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.report import aligned

    store = open_store(arguments)
    baselines, faults = read_all(store)
    entries = [_entry(path, baseline, arguments.today.isoformat()) for path, baseline in baselines.items()]
    head = ("levels", "sessions", "starts", "newest", "state", "path")
    lines = list(aligned([head, *(tuple(str(entry[name]) for name in head) for entry in entries)]))
    if not entries and not faults:
        lines = [f"no baseline in {store.root}; record one: pytest --gpu-layout=SPEC --gpu-baseline=new"]
    document = {"root": store.root, "baselines": entries}
    return Outcome(MISUSE if faults else FINE, document, lines, list(faults.values()))


def _entry(path: str, baseline: Baseline, today: str) -> dict[str, Any]:
    from pytest_gpulayout.standing import stand
    from pytest_gpulayout.tolerance import parse_tolerances

    standing = stand(baseline, parse_tolerances(""), today=today, starts=_GATE_STARTS)
    return {
        "path": path,
        "levels": len(baseline.levels()),
        "sessions": len(baseline.sessions),
        "starts": sum(len(session.runs) for session in baseline.sessions),
        "newest": max(session.recorded for session in baseline.sessions),
        **_state_document(standing),
    }


def _state_document(standing: Standing) -> dict[str, Any]:
    accepted = standing.reference.accepted
    return {
        "state": standing.state,
        "settled": standing.is_settled,
        "waiver_until": None if accepted is None or not accepted.until else accepted.until,
    }


# -- show ----------------------------------------------------------------------------------------------------------


def _declare_show(verbs: Any) -> None:
    parser = command(
        verbs,
        "show",
        _show,
        "show one stored baseline: its key, levels and sessions, and what a gate on it can see",
        "gpulayout baseline show Qwen3-8B/tp2/2x-NVIDIA-H200-NV18-d03fc2a1/smoke.json",
        "gpulayout baseline show PATH --starts 5 --tolerance median_ttft_ms=10%",
    )
    add_dir(parser)
    add_tolerance(parser)
    add_today(parser)
    parser.add_argument(
        "--starts",
        type=typed(as_count),
        default=_GATE_STARTS,
        metavar="N",
        help="server starts that a gate may make, as --gpu-starts (default: %(default)s)",
    )
    parser.add_argument("path", metavar="PATH", help="as gpulayout baseline list prints it")


def _show(arguments: argparse.Namespace) -> Outcome:
    from dataclasses import asdict

    from pytest_gpulayout.gated import documented_prior
    from pytest_gpulayout.siblings import sibling_priors
    from pytest_gpulayout.standing import stand

    store = open_store(arguments)
    baseline = read_baseline(store, arguments.path)
    priors = sibling_priors(store, baseline.key, documented_prior(baseline.key))
    today = arguments.today.isoformat()
    standing = stand(baseline, arguments.tolerance, today=today, starts=arguments.starts, priors=priors)
    document = {
        "path": arguments.path,
        "key": asdict(baseline.key),
        **_state_document(standing),
        "levels": [_level_document(level) for level in baseline.levels()],
        "gate_starts": arguments.starts,
        "metrics": [_metric_document(metric, arguments.starts) for metric in standing.metrics],
    }
    lines = [
        *_key_lines(baseline.key),
        f"state: {standing.state}",
        *_level_lines(baseline),
        *_metric_lines(standing, arguments.starts),
    ]
    return Outcome(FINE, document, lines)


def _level_document(level: tuple[BaselineSession, ...]) -> dict[str, Any]:
    start = level[0].begins
    return {
        "reason": None if start is None else start.reason,
        "changes": [] if start is None else list(start.changes),
        "until": start.until or None if start is not None else None,
        "sessions": [
            {
                "recorded": session.recorded,
                "starts": len(session.runs),
                "requests": session.runs[0].requests,
                "epoch": dict(session.epoch),
                "sut": dict(session.sut),
                "covariates": dict(session.covariates),
            }
            for session in level
        ],
    }


def _metric_document(metric: MetricStanding, starts: int) -> dict[str, Any]:
    from pytest_gpulayout.metrics import METRICS
    from pytest_gpulayout.standing import takes_text

    needed = metric.requirement
    return {
        "name": metric.name,
        "unit": METRICS[metric.name].unit,
        "mean": metric.mean,
        "start_sd": metric.start_sd,
        "session_sd": metric.session_sd,
        "sessions": metric.sessions,
        "starts": metric.starts,
        "settled": metric.is_settled,
        "modes": [{"share": mode.share, "center": _center(mode)} for mode in metric.modes],
        "tolerance": metric.tolerance,
        "min_detectable": metric.min_detectable,
        "takes": takes_text(metric, starts) or None,
        "needed_starts": None if needed is None else needed.starts,
        "needed_sessions": None if needed is None else needed.sessions,
    }


def _center(mode: Mode) -> float:
    import math

    return math.exp(mode.center)


def _key_lines(key: BaselineKey) -> Iterator[str]:
    for title, part in (("model", key.model), ("hardware", key.hardware), ("workload", key.workload)):
        yield f"{title}: " + ", ".join(
            f"{name} {value}" for name, value in part.items() if value not in (None, "", [])
        )
    yield f"layout: {key.layout}, protocol {key.protocol}"


def _level_lines(baseline: Baseline) -> Iterator[str]:
    before: BaselineSession | None = None
    for number, level in enumerate(baseline.levels(), 1):
        start = level[0].begins
        waiver = f", a waiver until {start.until}" if start is not None and start.until else ""
        yield f"level {number}{waiver}: {'the first' if start is None else start.reason}"
        if start is not None:
            yield from (f"  {change}" for change in start.changes)
        for session in level:
            yield from (f"  {line}" for line in _session_lines(session, before))
            before = session


def _session_lines(session: BaselineSession, before: BaselineSession | None) -> Iterator[str]:
    """A session, and what was there then where that is not as it was before."""
    from pytest_gpulayout.report import plural
    from pytest_gpulayout.verdict import changed_fields

    starts, requests = plural(len(session.runs), "start"), plural(session.runs[0].requests, "request")
    yield f"session {session.recorded}: {starts} of {requests}"
    if before is None:
        known = [f"{name} {value}" for name, value in _facts(session).items() if value not in (None, "")]
        yield from [f"  {', '.join(known)}"] if known else []
    else:
        yield from (f"  {change}" for change in changed_fields(_facts(before), _facts(session)))


def _facts(session: BaselineSession) -> dict[str, Any]:
    return {**session.epoch, **session.sut, **session.covariates}


def _metric_lines(standing: Standing, starts: int) -> Iterator[str]:
    from pytest_gpulayout.report import aligned, plural

    sessions = plural(len(standing.reference.sessions), "session")
    yield f"of {sessions} that a measurement is compared with, for a gate of up to {plural(starts, 'start')}:"
    head = ("metric", "mean", "between starts", "between sessions", "allowed", "seen from", "takes")
    yield from aligned([head, *(_metric_row(metric, starts) for metric in standing.metrics)])
    for metric in standing.metrics:
        if metric.modes:
            low, high = metric.modes
            apart = _center(high) / _center(low) - 1
            yield (
                f"bimodal: {metric.name}: {low.share:.0%} and {high.share:.0%} of its {metric.starts} starts are "
                f"{apart:.1%} apart"
            )
    if any(not metric.is_settled for metric in standing.metrics):
        yield "the spread rests partly on an assumption: there are few sessions of its own"


def _metric_row(metric: MetricStanding, starts: int) -> tuple[str, ...]:
    from pytest_gpulayout.metrics import METRICS
    from pytest_gpulayout.report import quantity
    from pytest_gpulayout.standing import takes_text
    from pytest_gpulayout.tolerance import percent_text

    return (
        metric.name,
        quantity(metric.mean, METRICS[metric.name].unit),
        f"{metric.start_sd:.1%}",
        f"{metric.session_sd:.1%}",
        "not gated" if metric.tolerance is None else percent_text(metric.tolerance),
        "-" if metric.min_detectable is None else f"{metric.min_detectable:.1%}",
        takes_text(metric, starts) or "-",
    )
