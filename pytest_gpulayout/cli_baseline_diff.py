"""``gpulayout baseline diff``: what changed in stored baselines, for a reviewer."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.cli_common import FAILED, FINE, MISUSE, Outcome, command
from pytest_gpulayout.cli_store import add_dir, add_today, open_store, read_all
from pytest_gpulayout.errors import GpuLayoutError

if TYPE_CHECKING:
    from pytest_gpulayout.baseline import Baseline

    Side = tuple[dict[str, Baseline], dict[str, str]]


def declare_diff(verbs: Any) -> None:
    """Declare the subcommand. :param verbs: the subparsers of ``gpulayout baseline``."""
    parser = command(
        verbs,
        "diff",
        _diff,
        "show what changed between two states of stored baselines: sessions, levels, means, software",
        "gpulayout baseline diff --since origin/main                 what this branch changes",
        "gpulayout baseline diff --since origin/main --markdown      the same for a pull request",
        "gpulayout baseline diff s3://bucket/baselines               a bucket against gpu-baselines",
        "gpulayout baseline diff old/smoke.json new/smoke.json",
        more=("without --exit-code a difference is no failure",),
    )
    add_dir(parser)
    add_today(parser)
    parser.add_argument("old", nargs="?", metavar="OLD", help="a folder, a URL or one file")
    parser.add_argument("new", nargs="?", metavar="NEW", help="the same (default: --dir)")
    parser.add_argument("--since", metavar="REV", help="OLD is what --dir held in this git revision")
    parser.add_argument("--markdown", action="store_true", help="print tables for a comment on a pull request")
    parser.add_argument("--exit-code", action="store_true", help="exit with 1 where there is a difference")


def _diff(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.baseline_diff import diff_baselines, diff_document, diff_lines, diff_markdown

    (old, old_faults), (new, new_faults) = _sides(arguments)
    diffs = diff_baselines(old, new, today=arguments.today.isoformat())
    if arguments.markdown:
        lines = list(diff_markdown(diffs))
    else:
        lines = [line for diff in diffs for line in (*diff_lines(diff), "")] or ["no stored baseline changed"]
    faults = [*old_faults.values(), *new_faults.values()]
    code = FAILED if diffs and arguments.exit_code else FINE
    return Outcome(MISUSE if faults else code, {"baselines": [diff_document(diff) for diff in diffs]}, lines, faults)


def _sides(arguments: argparse.Namespace) -> tuple[Side, Side]:
    if (arguments.old is None) == (arguments.since is None) or (arguments.since and arguments.new):
        raise GpuLayoutError(
            "either OLD, or --since REV and nothing else, was required to compare with\n"
            "  in the arguments of gpulayout baseline diff\n"
            "  try: gpulayout baseline diff --since origin/main"
        )
    if arguments.since is not None:
        return _revision(arguments.since, arguments.dir), read_all(open_store(arguments))
    old = _state(arguments.old)
    new = read_all(open_store(arguments)) if arguments.new is None else _state(arguments.new)
    if os.path.isfile(arguments.old) and arguments.new is None:
        new = ({path: baseline for path, baseline in new[0].items() if path in old[0]}, {})
    return old, new


def _state(place: str) -> Side:
    """All baselines of a folder or a URL; of a file the one, under the path that its key has."""
    from pytest_gpulayout.adapters.baseline_files import open_baselines

    if os.path.isfile(place):
        baseline = _of_text(Path(place).read_bytes().decode(errors="replace"), place)
        return {baseline.key.path: baseline}, {}
    if "://" not in place and not os.path.isdir(place):
        raise GpuLayoutError(
            f"a folder, a URL or a file with baselines was required, found none\n  in {place}\n"
            "  look for them: gpulayout baseline list --dir DIR_OR_URL"
        )
    return read_all(open_baselines(place))


def _revision(revision: str, folder: str) -> Side:
    from pytest_gpulayout.adapters.baseline_revision import read_revision
    from pytest_gpulayout.errors import BaselineError

    if "://" in folder:
        raise GpuLayoutError(
            f"a folder in a git repository was required for --since, found a URL\n  {folder} in --dir\n"
            "  compare two places instead: gpulayout baseline diff OLD NEW"
        )
    baselines: dict[str, Baseline] = {}
    faults: dict[str, str] = {}
    for path, text in read_revision(revision, Path(folder)).items():
        try:
            baselines[path] = _of_text(text, f"{revision}:{path}")
        except BaselineError as error:
            faults[path] = str(error)
    return baselines, faults


def _of_text(text: str, place: str) -> Baseline:
    from pytest_gpulayout.baseline_text import baseline_from_text

    return baseline_from_text(text, place)
