"""The command ``gpulayout``: each part of the plugin on its own, without pytest.

Each subcommand returns an :class:`~pytest_gpulayout.cli_common.Outcome`; :func:`main` alone prints and turns errors
into exit codes. Imports that cost time happen in the subcommand that needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from pytest_gpulayout.cli_baseline import declare_baseline
from pytest_gpulayout.cli_common import EXIT_CODES, MISUSE, Outcome
from pytest_gpulayout.cli_compare import declare_compare
from pytest_gpulayout.cli_measure import declare_measure
from pytest_gpulayout.cli_nccl import declare_nccl
from pytest_gpulayout.cli_plan import declare_plan
from pytest_gpulayout.cli_topo import declare_topo
from pytest_gpulayout.errors import GpuLayoutError

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. :param argv: arguments without the program's name."""
    arguments = _parser().parse_args(argv)
    try:
        outcome: Outcome = arguments.run(arguments)
    except GpuLayoutError as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"a file could not be read or written: {error}")
    except KeyboardInterrupt:
        return _INTERRUPTED
    text = json.dumps(outcome.document, indent=1) if arguments.json else "\n".join(outcome.lines)
    _write(text)
    for complaint in outcome.complaints:
        print(complaint, file=sys.stderr)
    return outcome.code


def _complain(message: str) -> int:
    print(f"gpulayout: {message}", file=sys.stderr)
    return MISUSE


def _write(text: str) -> None:
    """Print; a reader that has gone (``| head``) is no error, and the exit code stays that of the check."""
    try:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpulayout",
        description="Look at GPU links, NCCL logs, a server's speed and stored baselines, as the pytest plugin does.",
        epilog=EXIT_CODES,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for declare in (declare_topo, declare_nccl, declare_plan, declare_measure, declare_compare, declare_baseline):
        declare(commands)
    return parser
