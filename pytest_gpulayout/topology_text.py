"""Reads the text of ``nvidia-smi topo -m`` and ``-p2p``, of ``rocm-smi --showtopo`` and of ``amd-smi topology``.

The text is taken as people keep it: in the middle of a job log, with terminal codes, re-aligned, as a Markdown table,
with or without the tab before the header. What it does not settle is refused with line and column, not guessed.

All four programs print tables: a header that names devices, and a row per device that begins with its name. ::

            GPU0    GPU1    NIC0    CPU Affinity    NUMA Affinity   GPU NUMA ID
    GPU0     X      NV12    PIX     0-23            0               N/A
    GPU1    NV12     X      SYS     24-47           1               N/A
    NIC0    PIX     SYS      X

The cells of a row are counted, not measured, since columns move when text is copied; what shows a slip is that a
device's own cell must be ``X`` and that rows and columns must agree. Only the affinity cells may be empty, which the
tabs tell. ``topo -p2p`` has the same form with ``OK``, ``CNS``, ... in its cells. AMD's tools print several tables
of which the one with ``XGMI`` or ``PCIE`` counts; ``amd-smi`` names devices by PCI bus id. The legends are those of
nvidia-smi 375 to 580, rocm-smi of ROCm 5 and 6, amd-smi of ROCm 6.4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, takewhile
from typing import Literal, NamedTuple

from pytest_gpulayout.errors import TopologyFormatError
from pytest_gpulayout.links import LinkClass, parse_link_class
from pytest_gpulayout.topology import Device, P2pStatus, Platform, Topology

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|␛?\[[0-9;]+m")
_COMMAND = re.compile(r"\btopo\s+(?P<option>--?[a-z][\w-]*)(?:[\s=]+(?P<letter>[rwnap])\b)?")
_PCIE_ONLY = ("-mp", "--matrix_pci")
_P2P = ("-p2p", "--p2p_status")

_GPU = r"GPU\d+(?![\w:.-])|[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7](?![\w:.-])"
_FIRST_COLUMN = re.compile(rf"(?<!\S)(?:{_GPU}|CPU\s+Affinity\b)")
# NIC columns are named NIC0, or as the driver calls the port (mlx5_0, rocep145s0, hfi1_0): a word with a digit.
_COLUMN = re.compile(
    rf"(?P<affinity>CPU\s+Affinity|NUMA\s+Affinity|GPU\s+NUMA\s+ID)|(?P<gpu>{_GPU})"
    r"|(?P<nic>(?:NIC|mlx\d_)\d+(?=\s|$|NIC|mlx|CPU)|(?!NV\d+\b)[A-Za-z][\w.-]*\d[\w.-]*)"
)
_LINK = r"NV[1-9]\d*|PIX|PXB|PHB|NODE|SYS|SOC"
_LINK_CELL = re.compile(rf"{_LINK}|XGMI|PCIE")
_LINK_OR_UNKNOWN = re.compile(rf"{_LINK}|XGMI|PCIE|N/A|\?\?\?|ERR!|UNK|Unknown|XXXX")
_STATUS_CELL = re.compile(r"OK|CNS|GNS|TNS|DR|NS|U")
_MATRIX_CELL = re.compile(rf"{_LINK}|X")
_LINK_OR_OWN = re.compile(rf"{_LINK}|XGMI|PCIE|X|SELF")
_GLUED_CELLS = re.compile(rf"(?:{_LINK}|X){{2,}}")
_OWN_CELLS = ("X", "SELF", "0", "N/A")
_CPU_LIST = re.compile(r"N/A|\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*")
_ROCM_NUMA = re.compile(r"GPU\[(\d+)\]\s*:\s*\(Topology\) Numa Node:\s*(\d+)")

_ADVICE = (
    "  record it again: nvidia-smi topo -m > topo.txt, or on the machine itself gpulayout topo --json > topo.json"
)


class _Cell(NamedTuple):
    text: str
    line: int
    column: int


class _Line(NamedTuple):
    number: int
    text: str


@dataclass(frozen=True, slots=True)
class _Header:
    """:param columns: names of the columns with link cells, in order. :param prefix: text before the first one."""

    line: int
    prefix: str
    columns: tuple[str, ...]
    gpus: tuple[str, ...]
    affinities: tuple[str, ...]
    cpu_at: int = 0
    piped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Row:
    """:param cells: by name of the column. :param affinity: cells by name, ``""`` for an empty one."""

    label: _Cell
    cells: Mapping[str, _Cell]
    affinity: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Table:
    header: _Header
    command: tuple[str, str | None]
    rows: dict[str, _Row] = field(default_factory=dict)

    def cell(self, row: str, column: str) -> _Cell:
        return self.rows[row].cells[column]

    @property
    def is_complete(self) -> bool:
        return bool(self.header.gpus) and set(self.header.gpus) <= set(self.rows)

    def is_over(self, line: _Line) -> bool:
        """A header that names no GPU has as many rows as follow without a break."""
        text = line.text.strip()
        if text.startswith("Legend:"):
            return True
        if self.header.gpus:
            return self.is_complete and not text
        return bool(self.rows) and re.match(_GPU, text) is None

    def between_gpus(self) -> list[_Cell]:
        gpus = self.header.gpus
        return [self.cell(a, b) for a in gpus for b in gpus if a != b]


_Kind = Literal["links", "p2p", "affinity", "other"]


def parse_topology_text(text: str, source: str) -> Topology:
    """Return the topology that a listing shows; it counts as recorded.

    A listing without link cells, such as an excerpt with the affinity columns only, has devices and no links. GPUs
    keep the numbers that are printed, also where they do not begin with 0.

    :param source: name of the file, for messages.
    :raises TopologyFormatError: the text is no such listing, is cut, contradicts itself, or is ``topo -mp``, which
        does not show NVLink.
    """
    return _Reader(text, source).read()


class _Reader:
    """Finds the tables of a text and joins them."""

    def __init__(self, text: str, source: str) -> None:
        lines = text.removeprefix("\ufeff").splitlines()
        self._lines = [_Line(i, _ANSI.sub("", line)) for i, line in enumerate(lines, start=1)]
        self._text = text
        self._source = source

    def read(self) -> Topology:
        tables: dict[_Kind, list[_Table]] = {"links": [], "p2p": [], "affinity": [], "other": []}
        for table in self._tables():
            tables[self._kind(table)].append(table)
        if not any(tables.values()) and (headless := self._table_without_header()):
            tables["links"].append(headless)
        links = self._links(tables["links"])
        found = [*tables["links"], *tables["affinity"], *tables["p2p"]]
        if not found:
            found = [table for table in tables["other"] if _is_single_amd_gpu(table)]
        if not found:
            raise self._error(
                "a table of links between GPUs was expected, found none in "
                f"{len(self._lines)} line{'' if len(self._lines) == 1 else 's'}"
            )
        return Topology(
            devices=self._devices(found),
            links=links,
            source=self._source,
            recorded=True,
            platform=_platform(found),
            p2p=tuple(dict.fromkeys(status for table in tables["p2p"] for status in self._statuses(table))),
        )

    def _tables(self) -> Iterator[_Table]:
        """Tables with at least one row, in the order of the text; a header without rows is a title."""
        command: tuple[str, str | None] = ("", None)
        table: _Table | None = None
        for line in self._lines:
            if match := _COMMAND.search(line.text):
                command = (match["option"], match["letter"])
            header = _read_header(line)
            if header or (table and table.is_over(line)):
                yield from self._finished(table)
                table = _Table(header, command) if header else None
            elif table and not table.is_complete:
                self._add_row(table, line)
            elif table:
                self._refuse_stranger(table.header, line)
        yield from self._finished(table)

    def _add_row(self, table: _Table, line: _Line) -> None:
        row = self._row(table.header, line)
        if row is None:
            self._refuse_stranger(table.header, line)
            return
        if row.label.text in table.rows:
            raise self._error(f"one row for {row.label.text} was expected, found a second", row.label)
        table.rows[row.label.text] = row

    def _refuse_stranger(self, header: _Header, line: _Line) -> None:
        """A row of links for a GPU that the header does not name shows that the header is damaged."""
        match = re.match(rf"\s*({_GPU})\s+(\S+)", line.text)
        if match is None or match[1] in header.gpus or not _LINK_OR_OWN.fullmatch(match[2]):
            return
        raise self._error(
            f"a column for {match[1]} was expected in the header in line {header.line}, found "
            f"{', '.join(header.columns) or 'none'}",
            _Cell(match[1], line.number, match.start(1) + 1),
        )

    def _finished(self, table: _Table | None) -> Iterator[_Table]:
        """A table of affinities ends where it ends; another one that is not complete is refused."""
        if table is None or not table.rows:
            return
        gpus = table.header.gpus
        if len(set(gpus)) < len(gpus):
            raise self._error(
                f"each GPU once was expected in the header, found {', '.join(gpus)}",
                _Cell("", table.header.line, 0),
            )
        missing = [gpu for gpu in gpus if gpu not in table.rows]
        if missing:
            raise self._error(
                f"a row for each of the {len(gpus)} GPUs of the header was expected, found none for "
                f"{', '.join(missing)}",
                _Cell("", table.header.line, 0),
            )
        yield table

    def _row(self, header: _Header, line: _Line) -> _Row | None:
        if header.piped:
            return _read_piped_row(header, line)
        if not header.columns:
            return _read_affinity_row(header, line)
        return self._spaced_row(header, line)

    def _spaced_row(self, header: _Header, line: _Line) -> _Row | None:
        label = _find_label(header.gpus, line)
        if label is None:
            return None
        end = label.column - 1 + len(label.text)
        cells = _split_cells(line, end)
        own = header.columns.index(label.text)
        before = line.text[: label.column - 1].strip()
        if before and before != header.prefix and (len(cells) <= own or cells[own].text not in _OWN_CELLS):
            return None  # a sentence that mentions a GPU, not a row behind a log prefix
        if len(cells) < len(header.columns):
            raise self._error(
                f"{len(header.columns)} cells were expected in the row of {label.text}, one for each device of the "
                f"header in line {header.line}, found {len(cells)}",
                label,
            )
        rest = cells[len(header.columns) :]
        if rest and _MATRIX_CELL.fullmatch(rest[0].text):
            raise self._error(
                f"the row of {label.text} has more cells than the header in line {header.line} has devices "
                f"({len(header.columns)}), found {rest[0].text!r}",
                rest[0],
            )
        last = cells[len(header.columns) - 1]
        affinity = _read_affinity(header, line, last.column - 1 + len(last.text))
        return _Row(label, dict(zip(header.columns, cells, strict=False)), affinity)

    def _kind(self, table: _Table) -> _Kind:
        gpus = table.header.gpus
        if not table.header.columns:
            return "affinity"
        cells = table.between_gpus()
        has_links = any(_LINK_CELL.fullmatch(cell.text) for cell in cells)
        if not has_links and any(_STATUS_CELL.fullmatch(cell.text) for cell in cells):
            self._check(table, _STATUS_CELL, "a status (OK, CNS, GNS, TNS, DR, NS, U)")
            return "p2p"
        if has_links or all(table.cell(gpu, gpu).text in ("X", "SELF") for gpu in gpus):
            self._check(table, _LINK_OR_UNKNOWN, "a link class (NV#, PIX, PXB, PHB, NODE, SYS, XGMI, PCIE)")
            return "links"
        return "other"

    def _check(self, table: _Table, allowed: re.Pattern[str], what: str) -> None:
        """Every cell is one of those allowed, own cells are where they belong, rows agree with columns."""
        for cell in table.between_gpus():
            if not allowed.fullmatch(cell.text):
                raise self._error(f"{what} was expected, found {cell.text!r}", cell)
        for gpu in table.header.gpus:
            if (own := table.cell(gpu, gpu)).text not in _OWN_CELLS:
                raise self._error(f"X was expected where {gpu} meets itself, found {own.text!r}", own)
        for a, b in combinations(table.header.gpus, 2):
            first, second = table.cell(a, b), table.cell(b, a)
            if first.text != second.text:
                raise self._error(
                    f"the same cell was expected for {b}-{a} as for {a}-{b} in line {first.line} "
                    f"({first.text}), found {second.text}",
                    second,
                )

    def _links(self, tables: Sequence[_Table]) -> dict[tuple[int, int], LinkClass]:
        """The links of the tables, which must show the same: a file can hold repeated samples of one machine."""
        first: dict[tuple[int, int], LinkClass] = {}
        for table in tables:
            links = {
                pair: parse_link_class(cell.text)
                for pair, cell in self._pairs(table)
                if _LINK_CELL.fullmatch(cell.text)
            }
            if table.command[0] in _PCIE_ONLY and links:
                raise self._error(
                    "the links of nvidia-smi topo -m were expected, found topo -mp, which shows PCIe only and "
                    "never NVLink",
                    _Cell("", table.header.line, 0),
                )
            if table is tables[0]:
                first = links
            elif links != first or _numbers(table) != _numbers(tables[0]):
                raise self._error(
                    f"one machine was expected, found a table that differs from the one in line "
                    f"{tables[0].header.line}",
                    _Cell("", table.header.line, 0),
                )
        return first

    def _statuses(self, table: _Table) -> Iterator[P2pStatus]:
        option, letter = table.command
        for (a, b), cell in self._pairs(table):
            yield P2pStatus(a, b, letter if option in _P2P else None, cell.text)

    def _pairs(self, table: _Table) -> Iterator[tuple[tuple[int, int], _Cell]]:
        numbers = _numbers(table)
        for a, b in combinations(table.header.gpus, 2):
            pair = (min(numbers[a], numbers[b]), max(numbers[a], numbers[b]))
            yield pair, table.cell(a, b)

    def _devices(self, tables: Sequence[_Table]) -> tuple[Device, ...]:
        nodes = {int(gpu): int(node) for gpu, node in _ROCM_NUMA.findall(self._text)}
        devices: dict[int, Device] = {}
        for table in tables:
            for label, number in _numbers(table).items():
                affinity = table.rows[label].affinity
                device = Device(
                    index=number,
                    pci_bus_id=label if ":" in label else None,
                    numa_node=_numa(affinity.get("NUMA Affinity", "")) if affinity else nodes.get(number),
                    cpu_affinity=affinity.get("CPU Affinity"),
                )
                devices.setdefault(number, device)
        return tuple(devices[number] for number in sorted(devices))

    def _table_without_header(self) -> _Table | None:
        """Rows whose header was cut: the cell ``X`` of a row tells which column is its own."""
        rows = [row for line in self._lines if (row := _read_headless_row(line))]
        labels = {row.own: row.label for row in rows}
        gpus = tuple(row.label for row in rows if re.fullmatch(_GPU, row.label))
        widths = {row.width for row in rows if row.label in gpus}
        if not gpus or len(widths) != 1 or len(labels) < len(rows) or None in labels:
            return None
        columns = tuple(labels.get(i, f"column {i + 1}") for i in range(widths.pop()))
        if not set(gpus) <= set(columns):
            return None
        header = _Header(rows[0].line.number, "", columns, gpus, ("CPU Affinity", "NUMA Affinity"))
        table = _Table(header, ("", None))
        for row in rows:
            if read := self._spaced_row(header, row.line):
                table.rows[row.label] = read
        self._check(table, _LINK_OR_UNKNOWN, "a link class")
        return table

    def _error(self, reason: str, cell: _Cell | None = None) -> TopologyFormatError:
        line, column = (cell.line, cell.column) if cell else (0, 0)
        return TopologyFormatError(f"{reason}\n{_ADVICE}", source=self._source, line=line, column=column)


def _is_single_amd_gpu(table: _Table) -> bool:
    """All tables of rocm-smi for one GPU consist of one ``0``."""
    gpus = table.header.gpus
    return len(gpus) == 1 and table.cell(gpus[0], gpus[0]).text == "0"


class _HeadlessRow(NamedTuple):
    """:param own: position of the cell ``X``, ``None`` unless there is exactly one. :param width: link cells."""

    label: str
    own: int | None
    width: int
    line: _Line


def _read_headless_row(line: _Line) -> _HeadlessRow | None:
    """Read a line that begins with a GPU, or with another device and link cells."""
    match = re.match(r"\s*([A-Za-z][\w.-]*\d|[\da-fA-F]+:[\da-fA-F:]+\.[0-7])(?=\s)", line.text)
    if match is None:
        return None
    cells = [cell.text for cell in _split_cells(line, match.end())]
    links = list(takewhile(_MATRIX_CELL.fullmatch, cells))
    if not links and not re.fullmatch(_GPU, match[1]):
        return None
    return _HeadlessRow(match[1], links.index("X") if links.count("X") == 1 else None, len(links), line)


def _read_header(line: _Line) -> _Header | None:
    """Read a line that names GPUs (or the affinity columns) and nothing else after the first of them."""
    if piped := _read_piped_header(line):
        return piped
    failed_at = 0
    for first in _FIRST_COLUMN.finditer(line.text):
        if first.start() < failed_at:
            continue
        names, failed_at = _column_names(line.text, first.start())
        if failed_at == len(line.text):
            prefix = line.text[: first.start()].strip()
            return _make_header(
                line.number, [name for name, _ in names], prefix, cpu_at=dict(names).get("CPU Affinity", 0)
            )
    return None


def _column_names(text: str, at: int) -> tuple[list[tuple[str, int]], int]:
    """Names of columns and where they begin, and where the row of names ends."""
    names = []
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        match = _COLUMN.match(text, at)
        if match is None:
            break
        names.append((" ".join(match.group().split()), at))
        at = match.end()
    return names, at


def _make_header(
    line: int, names: Sequence[str], prefix: str, *, cpu_at: int = 0, piped: Sequence[str] = ()
) -> _Header:
    affinities = tuple(name for name in names if " " in name)
    columns = tuple(name for name in names if name and " " not in name)
    gpus = tuple(name for name in columns if re.fullmatch(_GPU, name))
    return _Header(line, prefix, columns, gpus, affinities, cpu_at, tuple(piped))


def _read_piped_header(line: _Line) -> _Header | None:
    names = [" ".join(cell.text.split()) for cell in _piped_cells(line)]
    matches = [_COLUMN.fullmatch(name) for name in names]
    if any(match is None for name, match in zip(names, matches, strict=True) if name):
        return None
    if not any(match and match["gpu"] for match in matches):
        return None
    return _make_header(line.number, names, "", piped=names)


def _piped_cells(line: _Line) -> list[_Cell]:
    """Cells between the bars of a Markdown table row."""
    start, end = line.text.find("|") + 1, line.text.rfind("|")
    if line.text[: start - 1].strip() or end < start:
        return []
    cells = []
    for part in line.text[start:end].split("|"):
        indent = len(part) - len(part.lstrip())
        cells.append(_Cell(part.strip(" \t`*"), line.number, start + indent + 1))
        start += len(part) + 1
    return cells


def _read_piped_row(header: _Header, line: _Line) -> _Row | None:
    """Read a row of a Markdown table; its label stands under the column without a name."""
    cells = _piped_cells(line)
    if len(cells) != len(header.piped) or "" not in header.piped:
        return None
    label = cells[header.piped.index("")]
    if label.text not in header.gpus:
        return None
    by_name = {name: cell for name, cell in zip(header.piped, cells, strict=True) if name}
    return _Row(
        label,
        {name: by_name[name] for name in header.columns},
        {name: by_name[name].text for name in header.affinities},
    )


def _find_label(labels: Sequence[str], line: _Line) -> _Cell | None:
    """The first GPU of the line, if the header has a column for it."""
    match = re.search(rf"(?<!\S)(?:{_GPU})(?=\s)", line.text)
    if match is None or match.group() not in labels:
        return None
    return _Cell(match.group(), line.number, match.start() + 1)


def _split_cells(line: _Line, start: int) -> list[_Cell]:
    """Words from ``start`` on; cells of wide tables that run into each other (``SYSNODE``) are taken apart."""
    cells = []
    for match in re.finditer(r"\S+", line.text[start:]):
        column = start + match.start() + 1
        if _GLUED_CELLS.fullmatch(match.group()):
            for part in _MATRIX_CELL.finditer(match.group()):
                cells.append(_Cell(part.group(), line.number, column + part.start()))
        else:
            cells.append(_Cell(match.group(), line.number, column))
    return cells


def _read_affinity_row(header: _Header, line: _Line) -> _Row | None:
    match = re.match(rf"\s*({_GPU})(?=\s)", line.text)
    if match is None:
        return None
    label = _Cell(match[1], line.number, match.start(1) + 1)
    affinity = _read_affinity(header, line, match.end())
    return _Row(label, {}, affinity) if any(affinity.values()) else None


def _read_affinity(header: _Header, line: _Line, start: int) -> dict[str, str]:
    """Cells of the affinity columns, from the end of the last link cell on; notes behind them are left out.

    The CPU list is empty inside a CPU set that leaves the GPU's cores out. With tabs an empty field shows it; with
    spaces the first word then stands clearly to the right of its heading.
    """
    words: list[tuple[str, int]] = []
    for match in re.finditer(r"\S+", line.text[start:]):
        if not _CPU_LIST.fullmatch(match.group()) or len(words) == len(header.affinities):
            break
        words.append((match.group(), start + match.start()))
    if words and len(words) < len(header.affinities) and _cpu_list_is_empty(header, line.text, start, words[0][1]):
        words.insert(0, ("", start))
    texts = [text for text, _ in words]
    missing = len(header.affinities) - len(texts)
    return dict(zip(header.affinities, texts + [""] * missing, strict=True))


def _cpu_list_is_empty(header: _Header, text: str, start: int, first_word: int) -> bool:
    if "CPU Affinity" not in header.affinities:
        return False
    if "\t" in text[start:first_word]:
        return text[start:first_word].count("\t") > 1
    return first_word > header.cpu_at + len("CPU ")


def _numbers(table: _Table) -> dict[str, int]:
    """Label -> index; devices that are named by bus id are numbered in the order of the table."""
    labels = table.header.gpus or tuple(table.rows)
    return {
        label: int(label.removeprefix("GPU")) if label.startswith("GPU") else position
        for position, label in enumerate(labels)
    }


def _numa(text: str) -> int | str | None:
    """A node, or a range as it is printed."""
    if re.fullmatch(r"\d+", text):
        return int(text)
    return text if text not in ("", "N/A") else None


def _platform(tables: Sequence[_Table]) -> Platform:
    """AMD's tools print ``0`` or ``SELF`` where a device meets itself."""
    own = [table.cell(gpu, gpu).text for table in tables for gpu in table.header.gpus]
    return "rocm" if any(text in ("0", "SELF") for text in own) else "cuda"
