"""``gpulayout baseline check`` and ``prune``: find what went bad in stored baselines, and thin them out."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.cli_common import FAILED, FINE, MISUSE, Outcome, as_count, command, typed
from pytest_gpulayout.cli_store import (
    add_dir,
    add_today,
    add_tolerance,
    add_write_in_ci,
    open_store,
    read_all,
    read_results,
    refuse_in_ci,
)
from pytest_gpulayout.errors import GpuLayoutError

if TYPE_CHECKING:
    from pytest_gpulayout.baseline import BaselineKey
    from pytest_gpulayout.health import Rot
    from pytest_gpulayout.ports import BaselineStore


def declare_check(verbs: Any) -> None:
    """Declare the subcommand. :param verbs: the subparsers of ``gpulayout baseline``."""
    parser = command(
        verbs,
        "check",
        _check,
        "find rot in stored baselines: stale, foreign, bimodal, drifting, ratcheted, copied, expired, unused",
        "gpulayout baseline check",
        "gpulayout baseline check --max-age 30 --used nightly-*.json --strict",
    )
    add_dir(parser)
    add_tolerance(parser)
    add_today(parser)
    parser.add_argument(
        "--max-age",
        type=typed(as_count),
        default=90,
        metavar="DAYS",
        help="since the newest session (default: %(default)s)",
    )
    parser.add_argument(
        "--used", nargs="+", metavar="RESULTS.json", help="a baseline that none of these has is unused"
    )
    parser.add_argument("--strict", action="store_true", help="fail for notes, too: baselines of few sessions")


def _check(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.health import HealthRules, examine, unreadable

    store = open_store(arguments)
    baselines, faults = read_all(store)
    if not baselines and not faults:
        told = f"a baseline to check was required, found none in {store.root}; name another place: --dir DIR_OR_URL"
        return Outcome(FAILED, {"root": store.root, "baselines": 0, "findings": []}, [told])
    used = None if arguments.used is None else _keys(arguments.used)
    rules = HealthRules(arguments.today, arguments.max_age, arguments.tolerance, used)
    found = [*(unreadable(path, message) for path, message in faults.items()), *examine(baselines, rules)]
    failing = [rot for rot in found if arguments.strict or not rot.is_note]
    count = len(baselines) + len(faults)
    document = {"root": store.root, "baselines": count, "findings": [_rot_document(rot) for rot in found]}
    return Outcome(FAILED if failing else FINE, document, list(_rot_lines(found, count, len(failing))))


def _keys(results: list[str]) -> list[BaselineKey]:
    """Keys of all measurements.

    :raises GpuLayoutError: there is none, which would make every baseline an unused one.
    """
    keys = [measurement.identity.key for path in results for measurement in read_results(path)]
    if not keys:
        raise GpuLayoutError(
            f"results with measurements were required, found none\n  in {', '.join(results)}\n"
            "  name results of all the tests that use these baselines"
        )
    return keys


def _rot_document(rot: Rot) -> dict[str, Any]:
    return {"kind": rot.kind, "path": rot.path, "text": rot.text, "advice": rot.advice, "note": rot.is_note}


def _rot_lines(found: list[Rot], count: int, failing: int) -> Iterator[str]:
    from pytest_gpulayout.report import plural

    for rot in sorted(found, key=lambda rot: (rot.is_note, rot.path)):
        yield f"{'note: ' if rot.is_note else ''}{rot.kind}: {rot.path}"
        yield f"  {rot.text}"
        yield f"  {rot.advice}"
    notes = plural(len([rot for rot in found if rot.is_note]), "note")
    yield f"{plural(count, 'baseline')}: {plural(failing, 'fault') if failing else 'no fault'}, {notes}"


# -- prune ---------------------------------------------------------------------------------------------------------


def declare_prune(verbs: Any) -> None:
    """Declare the subcommand. :param verbs: the subparsers of ``gpulayout baseline``."""
    parser = command(
        verbs,
        "prune",
        _prune,
        "remove stored sessions that no verdict's mean needs, and baselines that nobody uses",
        "gpulayout baseline prune --dry-run",
        "gpulayout baseline prune --expired --unused nightly-*.json",
        more=("the newest 20 sessions of each group with a mean stay, whatever --keep says",),
    )
    add_dir(parser)
    add_tolerance(parser)
    add_today(parser)
    parser.add_argument(
        "--keep",
        type=typed(as_count),
        default=20,
        metavar="N",
        help="newest sessions of each epoch of a level (default: %(default)s)",
    )
    parser.add_argument("--expired", action="store_true", help="remove the levels of waivers that are over, too")
    parser.add_argument("--unused", nargs="+", metavar="RESULTS.json", help="remove baselines that none of these has")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    add_write_in_ci(parser)


def _prune(arguments: argparse.Namespace) -> Outcome:
    refuse_in_ci(arguments)
    store = open_store(arguments)
    used = None if arguments.unused is None else _keys(arguments.unused)
    baselines, faults = read_all(store)
    removed = {path: _prune_one(store, path, used, arguments) for path in baselines}
    removed = {path: lines for path, lines in removed.items() if lines}
    verb = "would be removed" if arguments.dry_run else "removed"
    lines = [f"{verb}: {line} of {path}" for path, gone in removed.items() for line in gone]
    document = {
        "root": store.root,
        "dry_run": arguments.dry_run,
        "removed": [{"path": path, "what": gone} for path, gone in removed.items()],
    }
    return Outcome(MISUSE if faults else FINE, document, lines or ["nothing to remove"], list(faults.values()))


def _prune_one(
    store: BaselineStore, path: str, used: list[BaselineKey] | None, arguments: argparse.Namespace
) -> list[str]:
    """Prune what is there when it is written, which another writer may have changed since it was listed."""
    from pytest_gpulayout.baseline_text import baseline_from_text, baseline_to_text
    from pytest_gpulayout.health import is_used
    from pytest_gpulayout.pruning import prune

    removed: list[str] = []

    def change(text: str | None) -> str | None:
        removed.clear()
        if text is None:
            return None
        baseline = baseline_from_text(text, path)
        if used is not None and not is_used(baseline.key, used):
            removed.append("all, since it is unused,")
            return None
        today = arguments.today.isoformat()
        pruned = prune(baseline, arguments.tolerance, today=today, keep=arguments.keep, expired=arguments.expired)
        removed.extend(pruned.removed)
        return baseline_to_text(pruned.baseline) if pruned.removed else text

    if arguments.dry_run:
        change(store.read(path))
    else:
        store.update(path, change)
    return removed
