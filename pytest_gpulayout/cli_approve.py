"""``gpulayout baseline approve``: take saved results into the stored baselines."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.cli_common import FAILED, FINE, Outcome, command, typed
from pytest_gpulayout.cli_store import (
    add_dir,
    add_today,
    add_tolerance,
    add_write_in_ci,
    as_date,
    open_store,
    read_results,
    refuse_in_ci,
)
from pytest_gpulayout.errors import GpuLayoutError

if TYPE_CHECKING:
    from pytest_gpulayout.approving import Candidate, Plan, Step, Terms
    from pytest_gpulayout.ports import BaselineStore


def declare_approve(verbs: Any) -> None:
    """Declare the subcommand. :param verbs: the subparsers of ``gpulayout baseline``."""
    parser = command(
        verbs,
        "approve",
        _approve,
        "take saved results into the stored baselines, and say what gets better, worse or new by them",
        "gpulayout baseline approve results.json --dry-run",
        "gpulayout baseline approve results.json --allow-worse --reason 'vLLM 0.33 checks every token'",
        "gpulayout baseline approve results.json --allow-worse --reason 'driver bug 4711' --until 2026-12-31",
        more=("one refusal, and nothing is written, to no baseline",),
    )
    add_dir(parser)
    add_tolerance(parser)
    add_today(parser)
    parser.add_argument("results", nargs="+", metavar="RESULTS.json", help="files of --gpu-results")
    parser.add_argument("--allow-worse", action="store_true", help="take what makes a baseline worse; needs --reason")
    parser.add_argument("--reason", default="", metavar="TEXT", help="why the change is accepted; kept in the file")
    parser.add_argument(
        "--until",
        type=typed(as_date),
        metavar="DATE",
        help="last day of a waiver; then the level before counts again",
    )
    parser.add_argument("--only", action="append", metavar="PATH", help="this baseline alone; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    add_write_in_ci(parser)


def _approve(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.approving import plan_approval

    terms = _terms(arguments)
    refuse_in_ci(arguments)
    store = open_store(arguments)
    taken, left_out = _candidates(arguments)
    plans = plan_approval(store, taken, terms)
    refused = any(plan.after is None for plan in plans)
    written = not refused and not arguments.dry_run
    if written:
        _write(store, plans, terms)
    document = {
        "root": store.root,
        "written": written,
        "sessions": [_step_document(plan.path, step) for plan in plans for step in plan.steps],
        "left_out": [{"path": item.path, "test": item.measurement.test, "source": item.source} for item in left_out],
    }
    lines = [*_lines(plans, left_out), _ending(store.root, refused=refused, written=written)]
    return Outcome(FAILED if refused else FINE, document, lines)


def _write(store: BaselineStore, plans: Sequence[Plan], terms: Terms) -> None:
    """Write all plans.

    :raises BaselineError: one cannot be written; the message names those that were before it.
    """
    from pytest_gpulayout.approving import approve
    from pytest_gpulayout.errors import BaselineError

    for number, plan in enumerate(plans):
        try:
            approve(store, plan, terms)
        except BaselineError as error:
            before = "".join(f"\n  stored before that: {plan.path}" for plan in plans[:number])
            raise BaselineError(f"{error}{before}", path=plan.path) from error


def _terms(arguments: argparse.Namespace) -> Terms:
    """What the options say.

    :raises GpuLayoutError: they do not go together.
    """
    from pytest_gpulayout.approving import Terms

    reason, until = arguments.reason.strip(), arguments.until
    wrong = ""
    if arguments.allow_worse and not reason:
        wrong = "a reason was required for what gets worse, found none"
    elif until is not None and not arguments.allow_worse:
        wrong = "something that gets worse was required for a waiver, found --until without --allow-worse"
    elif until is not None and until < arguments.today:
        wrong = f"a last day of the waiver that is still to come was required, found {until}"
    if wrong:
        raise GpuLayoutError(
            f"{wrong}\n  in the options of gpulayout baseline approve\n"
            "  try: --allow-worse --reason 'why' [--until 2026-12-31]"
        )
    return Terms(
        arguments.tolerance,
        arguments.today.isoformat(),
        allow_worse=arguments.allow_worse,
        reason=reason,
        until="" if until is None else until.isoformat(),
    )


def _candidates(arguments: argparse.Namespace) -> tuple[list[Candidate], list[Candidate]]:
    """What to take, and what is left out.

    :raises GpuLayoutError: there is nothing to take, or a path of ``--only`` that no measurement has.
    """
    from pytest_gpulayout.approving import newest_of_each_key

    taken: list[Candidate] = []
    left_out: list[Candidate] = []
    for source in dict.fromkeys(arguments.results):
        of_file, others = newest_of_each_key(source, read_results(source))
        taken += of_file
        left_out += others
    only = arguments.only or sorted({item.path for item in taken})
    unknown = [path for path in only if path not in {item.path for item in taken}]
    if unknown or not taken:
        found = "\n".join(f"    {path}" for path in sorted({item.path for item in taken})) or "    none"
        raise GpuLayoutError(
            f"measurements of {', '.join(unknown) or 'any baseline'} were required, found those of\n{found}\n"
            f"  in {', '.join(arguments.results)}\n  name results of a run with perf_gate, and paths as above"
        )
    return [item for item in taken if item.path in only], [item for item in left_out if item.path in only]


def _step_document(path: str, step: Step) -> dict[str, Any]:
    measurement = step.candidate.measurement
    return {
        "path": path,
        "source": step.candidate.source,
        "test": measurement.test,
        "recorded": measurement.created,
        "starts": len(measurement.runs),
        "category": None if step.category is None else str(step.category),
        "changes": list(step.changes),
        "changed": list(step.changed),
        "refusals": list(step.refusals),
    }


def _lines(plans: Sequence[Plan], left_out: Sequence[Candidate]) -> Iterator[str]:
    from pytest_gpulayout.report import plural

    for plan in plans:
        yield plan.path
        for step in plan.steps:
            measurement = step.candidate.measurement
            title = f"{step.category or 'unsound'}: session of {measurement.created}"
            starts = f", {plural(len(measurement.runs), 'start')}" if measurement.runs else ""
            yield f"  {title}{starts}  [{step.candidate.source}]"
            yield from (f"    {change}" for change in step.changes)
            yield from (f"    changed: {field}" for field in step.changed)
            yield from (f"    refused: {refusal}" for refusal in step.refusals)
    for item in left_out:
        yield f"left out: {item.measurement.test} of {item.source}, which measured the same once more later"


def _ending(root: str, *, refused: bool, written: bool) -> str:
    if refused:
        return (
            "refused: nothing was written; take what is worse with --allow-worse --reason 'why', "
            "and measure again what is unsound"
        )
    return f"stored in {root}" if written else f"nothing was written to {root}: --dry-run"
