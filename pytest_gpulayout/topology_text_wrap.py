"""Joins the lines of a topology listing that a terminal, a mail program or a form broke.

A terminal breaks a line at its last column, in the middle of a cell if need be; people copy that with or without
the blanks at the end. Mail programs break at white space. Where a row of the table begins is certain, since it begins
with the name of a device and a cell; what follows up to the next row belongs to it. Whether a break stood inside a
word is not, so several ways of joining are tried, and :mod:`~pytest_gpulayout.topology_text` reads them and decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Sequence
from typing import NamedTuple

from pytest_gpulayout.topology_text_rows import (
    CPU_COLUMN,
    GPU,
    GPU_NUMA_COLUMN,
    NUMA_COLUMN,
    Line,
    column_names,
    first_label,
    to_line,
)

_QUOTE = re.compile(r"(?:> ?)+")
_DEVICE_FIRST = re.compile(rf"\s*(?:{GPU.pattern})")
_ROW = re.compile(
    r"\s*(?P<label>\S+)\s+(?:NV[1-9][0-9]*|PIX|PXB|PHB|NODE|SYS|SOC|XGMI|PCIE|X|SELF|OK|CNS|GNS|TNS|DR|NS|U"
    r"|N/A|[0-9]+|\?\?\?)(?:\s|$)"
)
_END = re.compile(r"\s*(?:Legend:|NIC Legend:|```|={3,}|[A-Z][A-Z -]* TABLE:)|$")
_TAB_WIDTH = 8
_WIDEST = 1000  # terminal
_MOST_PARTS = 64  # in which a header is looked for, so that a log of many lines is not joined to one

_Group = list[Line]
_Way = list[Line]


def unwrapped(lines: Sequence[Line]) -> list[_Way]:
    """Return ways to join broken lines, each as the whole text; none if no line is broken."""
    groups = _groups(lines)
    broken = [group for group in groups if len(group) > 1]
    if not broken:
        return []
    widths = [width for measure in _measures(broken) if (width := _find_width(broken, measure))]
    ways = [_joined(groups, join) for join in (*(width.join for width in widths), _join_with_blanks)]
    return [way for i, way in enumerate(ways) if way not in ways[:i]]


def _groups(lines: Sequence[Line]) -> list[_Group]:
    """The lines, each with those that continue it."""
    groups: list[_Group] = []
    header: _Group = []
    names: set[str] = set()
    in_header = False
    for line in map(_without_quote, lines):
        if _END.match(line.text) or len(header) > _MOST_PARTS:
            header = []
        elif header and _is_row(names, line):
            in_header = False
        elif _begins_header(line) and not (header and in_header and not _repeats(header, line)):
            header, in_header, names = [line], True, _names([line])
            groups.append(header)
            continue
        elif header and (in_header or not _is_other_row(line)):
            groups[-1].append(line)
            names = _names(header) if in_header else names
            continue
        groups.append([line])
    return groups


def _without_quote(line: Line) -> Line:
    """A line of a mail that answers one, without the marks."""
    quote = _QUOTE.match(line.raw)
    return to_line(line.number, line.raw[quote.end() :]) if quote else line


def _names(header: _Group) -> set[str]:
    """The names of a header, whether its lines were broken between two names or inside of one."""
    return {name for glue in ("", " ") for name, _ in column_names(glue.join(line.text for line in header))[0]}


def _is_row(names: Container[str], line: Line) -> bool:
    """Whether the line begins with a device of the header, or any GPU, and a cell."""
    match = _ROW.match(line.text)
    return match is not None and (match["label"] in names or GPU.fullmatch(match["label"]) is not None)


def _is_other_row(line: Line) -> bool:
    """Whether it may be a row of AMD's tables of anything but links."""
    label = first_label(line)
    return label is not None and bool(line.text[label.end :].strip())


def _begins_header(line: Line) -> bool:
    """Whether the line names devices, and nothing else but perhaps the beginning of one more name."""
    if not _DEVICE_FIRST.match(line.text):
        return False
    _, end = column_names(line.text)
    rest = line.text[end:].split()
    names = (CPU_COLUMN, NUMA_COLUMN, GPU_NUMA_COLUMN)
    return len(rest) < 2 or any(name.startswith(" ".join(rest)) for name in names)


def _repeats(header: _Group, line: Line) -> bool:
    """Whether the line names the first device of the header again: then it is another header."""
    return header[0].text.split()[0] == line.text.split()[0]


def _joined(groups: Sequence[_Group], join: Callable[[_Group], str]) -> _Way:
    return [group[0] if len(group) == 1 else to_line(group[0].number, join(group)) for group in groups]


def _join_with_blanks(group: _Group) -> str:
    return " ".join(line.text for line in group)


_Measure = Callable[[Line], str]


def _measures(broken: Sequence[_Group]) -> Iterator[_Measure]:
    """What of a line may have been counted: its characters, its columns, and with either the codes of a terminal."""
    yield lambda line: line.text
    yield lambda line: line.text.expandtabs(_TAB_WIDTH)
    if any(line.text != line.raw for group in broken for line in group):
        yield lambda line: line.raw
        yield lambda line: line.raw.expandtabs(_TAB_WIDTH)


class _Width(NamedTuple):
    """The width at which lines were broken."""

    width: int
    measure: _Measure

    def join(self, group: _Group) -> str:
        """Join the parts; one that is shorter lost the blanks at its end."""
        *parts, last = (self.measure(line) for line in group)
        return "".join(part.ljust(self.width) for part in parts) + last


def _find_width(broken: Sequence[_Group], measure: _Measure) -> _Width | None:
    """The width of the longest line that another one continues; none if a last part is longer."""
    width = max(len(measure(line)) for group in broken for line in group[:-1])
    if width > _WIDEST or any(len(measure(group[-1])) > width for group in broken):
        return None
    return _Width(width, measure)
