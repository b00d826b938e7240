"""The lines of a topology listing: what a header, a row and a cell of ``nvidia-smi topo`` and AMD's tools look like.

A header names devices, ``GPU0`` or a PCI bus id and between them ``NIC0`` or ``mlx5_0``, and then the affinity
columns in ``nvidia-smi topo -m``. A row begins with the name of its device. Cells are counted, not measured, since
columns move when text is copied; those of wide tables run into each other (``NODEPIX``). Leaves finding and checking
the tables to :mod:`~pytest_gpulayout.topology_text`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

# Codes of a terminal (ECMA-48 CSI, xterm's OSC, character sets), also where copying lost or spelled out the escape
# character, and characters without a width.
_CODES = re.compile(
    r"(?:\x1b\[|\x9b)[0-9;:?]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[()][0-9AB]|\x1b[=>78]"
    r"|(?:␛|\^\[)\[[0-9;]*m|\[[0-9;]+m|[\u200b-\u200f\u2060\ufeff\x07]"
)
_BREAK = re.compile(r"\r*\n|\r")

# More digits than any machine needs would only be a number that Python takes long to read, or refuses.
_GPU_NAME = r"GPU(?:0|[1-9][0-9]{0,5})"
_BUS_ID = r"[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]"
GPU = re.compile(rf"{_GPU_NAME}(?![\w:.-])|{_BUS_ID}(?![\w:.-])")
_LABEL = re.compile(rf"(?<!\S)(?:{GPU.pattern})(?=\s)")
_FIRST_LABEL = re.compile(rf"\s*({GPU.pattern})(?=\s)")
_FIRST_COLUMN = re.compile(rf"(?<!\S)(?:(?:{_GPU_NAME}|{_BUS_ID})|CPU\s+Affinity\b)")
_AFFINITY_OR_GPU = (
    rf"(?P<affinity>CPU\s+Affinity|NUMA\s+Affinity|GPU\s+NUMA\s+ID)"
    rf"|(?P<gpu>{_GPU_NAME}(?=GPU[0-9]|NIC[0-9]|mlx[0-9]|CPU\s|\s|$)|{_BUS_ID}(?![\w:.-]))"
)
# NIC columns are named NIC0, or as the driver calls the port (mlx5_0, rocep145s0, hfi1_0): a word with a digit. Only
# where the affinity columns show that the line is a header, a port that somebody renamed can be any word.
_COLUMN = re.compile(
    rf"{_AFFINITY_OR_GPU}|(?P<nic>(?:NIC|mlx[0-9]_)[0-9]+(?=\s|$|NIC|mlx|CPU)"
    r"|(?!NV[0-9]+\b|GPU[0-9])(?=[\w.-]*[0-9])[A-Za-z][\w.-]*+)"
)
_ANY_COLUMN = re.compile(rf"{_COLUMN.pattern}|(?!GPU[0-9])[A-Za-z][\w.-]*(?=\s)")

_PCIE_CLASS = r"PIX|PXB|PHB|NODE|SYS|SOC"
_NVIDIA_CLASS = rf"NV[1-9][0-9]{{0,3}}|{_PCIE_CLASS}"
LINK_CELL = re.compile(rf"{_NVIDIA_CLASS}|XGMI|PCIE")
STATUS_CELL = re.compile(r"OK|CNS|GNS|TNS|DR|NS|U")
UNKNOWN_CELLS = ("N/A", "???", "ERR!", "UNK", "Unknown", "UNKNOWN", "XXXX")
OWN_CELLS = ("X", "SELF", "0", "N/A")
"""What stands where a device meets itself; AMD's ``0`` and ``N/A`` are also other things elsewhere."""

_MATRIX_CELL = re.compile(rf"{_NVIDIA_CLASS}|X")
_CPUS = r"[0-9]{1,6}(?:-[0-9]{1,6})?(?:,[0-9]{1,6}(?:-[0-9]{1,6})?)*"
_CPU_LIST = re.compile(rf"N/A|{_CPUS}")
# NV# cannot be told from the number behind it.
_GLUED_CELLS = re.compile(rf"(?:{_NVIDIA_CLASS}|X){{2,}}|(?:{_NVIDIA_CLASS}|X)*(?:{_PCIE_CLASS}|X){_CPUS}")
_GLUED_PART = re.compile(rf"{_NVIDIA_CLASS}|X|{_CPUS}")

CPU_COLUMN, NUMA_COLUMN, GPU_NUMA_COLUMN = "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"


class Line(NamedTuple):
    """:param number: 1-based. :param text: without the codes of a terminal. :param raw: as it stands in the file."""

    number: int
    text: str
    raw: str

    def raw_column(self, column: int) -> int:
        """Where a 1-based column of the text is in the file."""
        for code in _CODES.finditer(self.raw):
            if code.start() > column - 1:
                break
            column += len(code.group())
        return column


class Cell(NamedTuple):
    """A word of a line; line and column begin with 1."""

    text: str
    line: int
    column: int

    @property
    def end(self) -> int:
        """Index of the character behind it."""
        return self.column - 1 + len(self.text)


@dataclass(frozen=True, slots=True)
class Header:
    """The names of columns.

    :param prefix: what stands before the first name, such as the time stamp of a log.
    :param columns: names of the columns with link cells, in order. :param gpus: those that are GPUs.
    :param affinities: names of the columns behind them. :param cpu_at: where the first of them begins.
    :param piped: all names in order, if it is the header of a Markdown table.
    """

    line: int
    prefix: str
    columns: tuple[str, ...]
    gpus: tuple[str, ...]
    affinities: tuple[str, ...]
    cpu_at: int = 0
    piped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """:param cells: by name of the column. :param affinity: cells by name, ``""`` for an empty one.

    :param rest: what stands behind the last of them, such as a note by hand.
    """

    label: Cell
    cells: Mapping[str, Cell]
    affinity: Mapping[str, str]
    rest: str = ""


class HeadlessRow(NamedTuple):
    """:param own: position of the cell ``X``, ``None`` unless there is exactly one. :param width: link cells."""

    label: str
    own: int | None
    width: int
    line: Line


def split_lines(text: str) -> list[Line]:
    """Return the lines of a text; a carriage return alone ends a line too, as where progress was shown."""
    raw = _BREAK.split(text.removeprefix("\ufeff"))
    if not raw[-1]:
        raw.pop()
    return [to_line(i, line) for i, line in enumerate(raw, start=1)]


def to_line(number: int, raw: str) -> Line:
    """Return a line without the codes of a terminal."""
    return Line(number, _CODES.sub("", raw), raw)


def read_header(line: Line) -> Header | None:
    """Read a line that names GPUs (or the affinity columns) and nothing else after the first of them."""
    if "GPU" not in line.text and ":" not in line.text and "Affinity" not in line.text:
        return None
    if piped := _read_piped_header(line):
        return piped
    failed_at, cpu_at = 0, line.text.rfind(CPU_COLUMN)
    for first in _FIRST_COLUMN.finditer(line.text):
        if first.start() < failed_at:
            continue
        names, failed_at = column_names(line.text, first.start())
        if names and failed_at < cpu_at:
            names, failed_at = column_names(line.text, first.start(), _ANY_COLUMN)
        if failed_at == len(line.text):
            return _make_header(line.number, names, line.text[: first.start()].strip())
    return None


def column_names(text: str, at: int = 0, pattern: re.Pattern[str] = _COLUMN) -> tuple[list[tuple[str, int]], int]:
    """Return the names of columns from ``at`` on and where each begins, and where the row of names ends."""
    names: list[tuple[str, int]] = []
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        match = pattern.match(text, at)
        if match is None:
            break
        names.append((" ".join(match.group().split()), at))
        at = match.end()
    return names, at


def _make_header(
    line: int, names: Sequence[tuple[str, int]], prefix: str, piped: Sequence[str] = ()
) -> Header | None:
    """A header of GPU numbers or of bus ids; a mixture is none, since nobody could number its devices."""
    affinities = tuple(name for name, _ in names if " " in name)
    columns = tuple(name for name, _ in names if " " not in name)
    gpus = tuple(name for name in columns if GPU.fullmatch(name))
    if len({":" in name for name in gpus}) > 1:
        return None
    return Header(line, prefix, columns, gpus, affinities, dict(names).get(CPU_COLUMN, 0), tuple(piped))


def _read_piped_header(line: Line) -> Header | None:
    """Read the header of a Markdown table; one column, that of the row labels, has another name or none."""
    cells = _piped_cells(line)
    names = [" ".join(cell.text.split()) for cell in cells]
    known = [(name, cell.column - 1) for name, cell in zip(names, cells, strict=True) if _COLUMN.fullmatch(name)]
    if len(known) < len(names) - 1 or not any(GPU.fullmatch(name) for name, _ in known):
        return None
    piped = [name if _COLUMN.fullmatch(name) else "" for name in names]
    return _make_header(line.number, known, "", piped if "" in piped else ["", *piped])


def _piped_cells(line: Line) -> list[Cell]:
    """Cells between the bars of a Markdown table row; the outer bars may be missing, but not at a single cell."""
    text = line.text.rstrip()
    start = len(text) - len(text.lstrip())
    has_outer_bar = text.startswith("|", start)
    start += has_outer_bar
    parts = text[start:].removesuffix("|").split("|")
    if len(parts) < (2 if has_outer_bar else 3):
        return []
    cells = []
    for part in parts:
        stripped = part.strip(" \t`*")
        cells.append(Cell(stripped, line.number, start + part.find(stripped) + 1))
        start += len(part) + 1
    return cells


def read_piped_row(header: Header, line: Line) -> Row | None:
    """Read a row of a Markdown table; its label stands under the column without a name."""
    cells = _piped_cells(line)
    if len(cells) != len(header.piped):
        return None
    label = cells[header.piped.index("")]
    if label.text not in header.gpus:
        return None
    by_name = {name: cell for name, cell in zip(header.piped, cells, strict=True) if name}
    return Row(
        label,
        {name: by_name[name] for name in header.columns},
        {name: by_name[name].text for name in header.affinities},
    )


def find_label(labels: Sequence[str], line: Line) -> Cell | None:
    """Return the first GPU of the line, if the header has a column for it."""
    match = _LABEL.search(line.text)
    if match is None or match.group() not in labels:
        return None
    return Cell(match.group(), line.number, match.start() + 1)


def first_label(line: Line) -> Cell | None:
    """Return the GPU that the line begins with."""
    match = _FIRST_LABEL.match(line.text)
    return Cell(match[1], line.number, match.start(1) + 1) if match else None


def split_cells(line: Line, start: int) -> list[Cell]:
    """Return the words from ``start`` on; cells that run into each other are taken apart."""
    cells = []
    for match in re.finditer(r"\S+", line.text[start:]):
        word, column = match.group(), start + match.start() + 1
        if _GLUED_CELLS.fullmatch(word):
            cells += [Cell(part.group(), line.number, column + part.start()) for part in _GLUED_PART.finditer(word)]
        else:
            cells.append(Cell(word, line.number, column))
    return cells


def is_matrix_cell(text: str) -> bool:
    """Whether it is what ``nvidia-smi topo -m`` prints between two devices."""
    return _MATRIX_CELL.fullmatch(text) is not None


def read_affinity_row(header: Header, line: Line) -> Row | None:
    """Read a row of a listing that was cut down to its affinity columns."""
    label = first_label(line)
    if label is None:
        return None
    affinity, rest = read_affinity(header, line, label.end)
    return Row(label, {}, affinity, rest) if any(affinity.values()) else None


def read_affinity(header: Header, line: Line, start: int) -> tuple[dict[str, str], str]:
    """Return the cells of the affinity columns, from the end of the last link cell on, and what is behind them.

    The CPU list is empty inside a CPU set that leaves the GPU's cores out. With tabs an empty field shows it; with
    spaces the first word then stands clearly to the right of its heading.
    """
    words: list[tuple[str, int]] = []
    end = start
    for match in re.finditer(r"\S+", line.text[start:]):
        if not _CPU_LIST.fullmatch(match.group()) or len(words) == len(header.affinities):
            break
        words.append((match.group(), start + match.start()))
        end = start + match.end()
    rest = line.text[end:].strip()
    if words and len(words) < len(header.affinities) and _cpu_list_is_empty(header, line.text, start, words[0][1]):
        words.insert(0, ("", start))
    texts = [text for text, _ in words]
    missing = len(header.affinities) - len(texts)
    return dict(zip(header.affinities, texts + [""] * missing, strict=True)), rest


def _cpu_list_is_empty(header: Header, text: str, start: int, first_word: int) -> bool:
    if CPU_COLUMN not in header.affinities:
        return False
    if "\t" in text[start:first_word]:
        return text[start:first_word].count("\t") > 1
    return first_word > header.cpu_at + len("CPU ")


_HEADLESS_LABEL = re.compile(rf"\s*([A-Za-z][\w.-]*[0-9]|{_BUS_ID})(?=\s)")


def read_headless_row(line: Line) -> HeadlessRow | None:
    """Read a line that begins with a GPU, or with another device and link cells."""
    match = _HEADLESS_LABEL.match(line.text)
    if match is None:
        return None
    links = list(takewhile(is_matrix_cell, (cell.text for cell in split_cells(line, match.end()))))
    if not links and not GPU.fullmatch(match[1]):
        return None
    return HeadlessRow(match[1], links.index("X") if links.count("X") == 1 else None, len(links), line)
