"""What the verbs of ``gpulayout baseline`` share: where baselines are, reading them, and when they may be written."""

from __future__ import annotations

import argparse
import os
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.cli_common import read_text, typed
from pytest_gpulayout.errors import GpuLayoutError

if TYPE_CHECKING:
    from pytest_gpulayout.baseline import Baseline
    from pytest_gpulayout.ports import BaselineStore
    from pytest_gpulayout.results import RecordedMeasurement


def add_dir(parser: Any) -> None:
    """Declare where the baselines are."""
    parser.add_argument(
        "--dir",
        default="gpu-baselines",
        metavar="DIR_OR_URL",
        help="where they are (default: gpu-baselines in the current folder)",
    )


def add_tolerance(parser: Any) -> None:
    """Declare the gated metrics."""
    parser.add_argument(
        "--tolerance", type=typed(_tolerances), default="", metavar="METRIC=5%,...", help="as --gpu-tolerance"
    )


def _tolerances(text: str) -> object:
    from pytest_gpulayout.tolerance import parse_tolerances

    return parse_tolerances(text)


def add_today(parser: Any) -> None:
    """Declare the day that ages and waivers are judged on."""
    parser.add_argument(
        "--today",
        type=typed(as_date),
        default=today_utc(),
        metavar="DATE",
        help="as 2026-12-31; for waivers and ages (default: today, UTC)",
    )


def add_write_in_ci(parser: Any) -> None:
    """Declare the permission to write in CI."""
    parser.add_argument(
        "--write-in-ci", action="store_true", help="write although the environment variable CI is set"
    )


def today_utc() -> str:
    """Today's date as an option's default, which argparse reads like any other text."""
    return datetime.now(UTC).date().isoformat()


def as_date(text: str) -> date:
    """Read a date.

    :raises ValueError: it is none.
    """
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"a date such as 2026-12-31 was expected, found {text!r}") from None


def refuse_in_ci(arguments: argparse.Namespace) -> None:
    """Do nothing where this run may write.

    :raises GpuLayoutError: it may not.
    """
    from pytest_gpulayout.settings import is_ci

    if is_ci(os.environ) and not arguments.write_in_ci and not arguments.dry_run:
        raise GpuLayoutError(
            f"a place outside CI was required to write baselines, found CI={os.environ['CI']}\n"
            "  in the environment\n"
            "  look only: --dry-run; write them elsewhere and commit the files, or add --write-in-ci"
        )


def open_store(arguments: argparse.Namespace) -> BaselineStore:
    """Return the store that ``--dir`` names."""
    from pytest_gpulayout.adapters.baseline_files import open_baselines

    return open_baselines(arguments.dir)


def read_baseline(store: BaselineStore, path: str) -> Baseline:
    """Return one baseline.

    :raises BaselineError: it is not there, or cannot be read.
    """
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


def read_all(store: BaselineStore) -> tuple[dict[str, Baseline], dict[str, str]]:
    """Return what is stored and what of it cannot be read, both by path."""
    from pytest_gpulayout.errors import BaselineError

    baselines: dict[str, Baseline] = {}
    faults: dict[str, str] = {}
    for path in store.paths():
        try:
            baselines[path] = read_baseline(store, path)
        except BaselineError as error:
            faults[path] = str(error)
    return baselines, faults


def read_results(path: str) -> tuple[RecordedMeasurement, ...]:
    """Return the measurements of a results file.

    :raises GpuLayoutError: it is none.
    """
    from pytest_gpulayout.results import measurements_from_text

    text = read_text(path, "a results file was required", "name a file of --gpu-results")
    return measurements_from_text(text, path)
