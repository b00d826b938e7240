"""What the subcommands of ``gpulayout`` share: their outcome, exit codes, and types of arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_gpulayout.errors import GpuLayoutError

if TYPE_CHECKING:
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.links import LinkRequirement
    from pytest_gpulayout.topology import Topology

T = TypeVar("T")

FINE, FAILED, MISUSE, UNDECIDED = 0, 1, 2, 3

EXIT_CODES = "exit codes: 0 fine, 1 the check failed, 2 misuse or unreadable input"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a subcommand found.

    :param document: for ``--json``. :param lines: for people. :param complaints: for standard error, in both cases.
    """

    code: int
    document: Any
    lines: Sequence[str]
    complaints: Sequence[str] = ()


def command(
    commands: Any, name: str, run: Callable[..., Outcome], text: str, *examples: str, more: Sequence[str] = ()
) -> Any:
    """Declare a subcommand. :param run: takes the parsed arguments. :param more: lines at the end of its help."""
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["examples:", *(f"  {example}" for example in examples), "", *more, EXIT_CODES]),
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)
    return parser


def typed(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Make a parser of ours an argparse type: its message is shown as it is."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except (GpuLayoutError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def read_text(path: str, required: str, advice: str) -> str:
    """Read a file that a user named.

    :raises GpuLayoutError: it is no UTF-8. :raises OSError: it cannot be opened.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise GpuLayoutError(
            f"{required}, found bytes that are no UTF-8: {error.reason}\n  in {path}\n  {advice}"
        ) from error


def read_topology(source: str | None, otherwise: str) -> Topology:
    """Read a recorded topology, or look at this machine's GPUs.

    :param source: file, ``-`` for standard input; ``None`` for this machine.
    :param otherwise: what to do where there is no GPU.
    :raises TopologyError: it cannot be read, or there is no GPU here.
    """
    from pytest_gpulayout.errors import TopologyError

    if source is not None:
        from pytest_gpulayout.adapters.recorded_topology import RecordedTopology

        return RecordedTopology("/dev/stdin" if source == "-" else source).probe()
    from pytest_gpulayout.adapters.nvml import NvmlTopology

    try:
        return NvmlTopology().probe()
    except TopologyError as error:
        raise TopologyError(f"{error}\n  or {otherwise}") from error


def as_layout(text: str) -> Layout:
    """Read a layout."""
    from pytest_gpulayout.layout import parse_layout

    return parse_layout(text)


def as_requirement(text: str) -> LinkRequirement:
    """Read a link requirement."""
    from pytest_gpulayout.links import parse_requirement

    return parse_requirement(text)


def as_count(text: str) -> int:
    """Read a whole number above 0.

    :raises ValueError: it is none.
    """
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise ValueError(f"a whole number above 0 was expected, found {text!r}")
    return number
