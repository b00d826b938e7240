"""Reads the text of ``nvidia-smi topo -m`` and ``-p2p``, of ``rocm-smi --showtopo`` and of ``amd-smi topology``.

The text is taken as people keep it: in the middle of a job log, with terminal codes, re-aligned, wrapped by a
terminal or a mail program, as a Markdown table, with or without the tab before the header. What it does not settle
is refused with line and column, not guessed.

All four programs print tables: a header that names devices, and a row per device that begins with its name. ::

            GPU0    GPU1    NIC0    CPU Affinity    NUMA Affinity   GPU NUMA ID
    GPU0     X      NV12    PIX     0-23            0               N/A
    GPU1    NV12     X      SYS     24-47           1               N/A
    NIC0    PIX     SYS      X

What shows that a cell slipped is that a device's own cell must be ``X`` and that rows and columns must agree. Only
the affinity cells may be empty, which the tabs tell. ``topo -p2p`` has the same form with ``OK``, ``CNS``, ... in its
cells. AMD's tools print several tables of which the one titled "link type" counts, with ``XGMI`` or ``PCIE`` in it;
``amd-smi`` names devices by PCI bus id. ``nvidia-smi -L`` in the same text gives names, UUIDs and MIG. The legends
are those of nvidia-smi 375 to 580, rocm-smi of ROCm 4 to 7, amd-smi of ROCm 6.4 and 7. Single lines are the business
of :mod:`~pytest_gpulayout.topology_text_rows`, and joining broken ones that of
:mod:`~pytest_gpulayout.topology_text_wrap`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal, NamedTuple

from pytest_gpulayout.errors import TopologyFormatError
from pytest_gpulayout.links import LinkClass, parse_link_class
from pytest_gpulayout.topology import Device, P2pStatus, Platform, Topology
from pytest_gpulayout.topology_text_rows import (
    CPU_COLUMN,
    GPU,
    GPU_NUMA_COLUMN,
    LINK_CELL,
    NUMA_COLUMN,
    OWN_CELLS,
    STATUS_CELL,
    UNKNOWN_CELLS,
    Cell,
    Header,
    Line,
    Row,
    find_label,
    first_label,
    is_matrix_cell,
    read_affinity,
    read_affinity_row,
    read_header,
    read_headless_row,
    read_piped_row,
    split_cells,
    split_lines,
)
from pytest_gpulayout.topology_text_wrap import unwrapped

_COMMAND = re.compile(r"\btopo\s+(?P<option>--?[a-z][\w-]*)(?:[\s=]+(?P<letter>[rwnap])\b)?")
_PCIE_ONLY = ("-mp", "--matrix_pci")
_P2P = ("-p2p", "--p2p_status")

_AMD_TITLE = re.compile(r"\W*(?P<title>[A-Z][A-Za-z-]*(?: [A-Za-z-]+){0,3}?) (?:TABLE:|between two GPUs)")
_LINK_TYPES = "link type"
_ROCM_NUMA = re.compile(r"\bGPU ?\[?([0-9]{1,6})\]?\s*:\s*\(Topology\) Numa Node:\s*([0-9]{1,6})\b")
_AMD_FORM = re.compile(r"\s*(?:(?P<JSON>[\[{]\s*(?:$|[\"{]))|(?P<CSV>gpu,))")

_LISTED_GPU = re.compile(r"\bGPU (?P<index>[0-9]{1,6}): (?P<name>[^(\n]{1,100}?) \(UUID: (?P<uuid>[^\s()]+)\)")
_LISTED_INSTANCE = re.compile(r"\bMIG \S+\s+Device\s+[0-9]+: \(UUID: MIG-")
_UUID = re.compile(r"GPU-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_ADVICE = (
    "  record it again: nvidia-smi topo -m > topo.txt, or on the machine itself gpulayout topo --json > topo.json"
)
_AMD_ADVICE = "  record it again, not as JSON or CSV: rocm-smi --showtopo > topo.txt, or amd-smi topology > topo.txt"


@dataclass(frozen=True, slots=True)
class _Table:
    """:param command: option and letter of the ``topo`` command above it. :param title: AMD's, in lower case."""

    header: Header
    command: tuple[str, str | None]
    title: str
    rows: dict[str, Row] = field(default_factory=dict)

    def cell(self, row: str, column: str) -> Cell:
        return self.rows[row].cells[column]

    @property
    def is_complete(self) -> bool:
        return bool(self.header.gpus) and all(gpu in self.rows for gpu in self.header.gpus)

    def is_over(self, line: Line) -> bool:
        """A header that names no GPU has rows until a GPU comes again."""
        text = line.text.strip()
        if text.startswith("Legend:"):
            return True
        if self.header.gpus:
            return self.is_complete and not text
        label = first_label(line)
        return label is not None and label.text in self.rows

    def is_continued_by(self, header: Header) -> bool:
        """Some pagers print the header of a long table again."""
        return bool(self.rows) and not self.is_complete and header.columns == self.header.columns

    def between_devices(self) -> Iterator[Cell]:
        """Cells of the rows of GPUs, those of NICs included, without those where a GPU meets itself."""
        return (self.cell(a, b) for a in self.header.gpus for b in self.header.columns if a != b)


_Kind = Literal["links", "p2p", "affinity", "other"]


class _Listed(NamedTuple):
    """What ``nvidia-smi -L`` says about a GPU."""

    name: str
    uuid: str | None
    mig: bool | None


def parse_topology_text(text: str, source: str) -> Topology:
    """Return the topology that a listing shows; it counts as recorded.

    A listing without link cells, such as an excerpt with the affinity columns only, has devices and no links. GPUs
    keep the numbers that are printed, also where they do not begin with 0.

    :param source: name of the file, for messages.
    :raises TopologyFormatError: the text is no such listing, is cut, contradicts itself, or is ``topo -mp``, which
        does not show NVLink.
    """
    lines = split_lines(text)
    try:
        plain = _Reader(lines, source).read()
    except TopologyFormatError:
        if joined := _read_joined(lines, source):
            return joined
        raise
    # Lines may be broken behind their last link, which damages the affinities only.
    joined = _read_joined(lines, source)
    return joined if joined and joined.links == plain.links and joined.pairs == plain.pairs else plain


def _read_joined(lines: Sequence[Line], source: str) -> Topology | None:
    """Read lines that were broken, if all ways to join them that leave nothing over come to the same.

    A break inside a number that is taken for one between two shows in a word too many, the reverse in an empty cell.
    """
    readings: list[tuple[int, Topology]] = []
    for way in unwrapped(lines):
        reader = _Reader(way, source)
        try:
            topology = reader.read()
        except TopologyFormatError:
            continue
        if not reader.has_rests:
            readings.append((reader.empty_cells, topology))
    fewest = min((empty for empty, _ in readings), default=0)
    best = [topology for empty, topology in readings if empty == fewest]
    return best[0] if best and all(topology == best[0] for topology in best) else None


class _Reader:
    """Finds the tables of a text and joins them."""

    def __init__(self, lines: Sequence[Line], source: str) -> None:
        self._lines = lines
        self._source = source
        self._found: list[_Table] = []
        self._is_amd = False

    def read(self) -> Topology:
        tables: dict[_Kind, list[_Table]] = {"links": [], "p2p": [], "affinity": [], "other": []}
        for table in self._tables():
            tables[self._kind(table)].append(table)
        if not any(tables.values()) and (headless := self._table_without_header()):
            tables["links"].append(headless)
        shown = [table for table in tables["links"] if table.command[0] not in _PCIE_ONLY] or tables["links"]
        self._found = [*shown, *tables["affinity"], *tables["p2p"]]
        if not self._found:
            raise self._error(f"a table of links between GPUs was expected, found {self._instead(tables['other'])}")
        return Topology(
            devices=self._devices(self._found),
            links=self._links(shown),
            source=self._source,
            recorded=True,
            platform=_platform(self._found),
            p2p=self._p2p(tables["p2p"], shown),
        )

    @property
    def has_rests(self) -> bool:
        """Whether something stands behind the cells of a row."""
        return any(row.rest for table in self._found for row in table.rows.values())

    @property
    def empty_cells(self) -> int:
        """How many affinity cells are empty."""
        rows = (row for table in self._found for row in table.rows.values())
        return sum(not cell for row in rows for cell in row.affinity.values())

    def _tables(self) -> Iterator[_Table]:
        """Tables with at least one row, in the order of the text; a header without rows is a title."""
        command: tuple[str, str | None] = ("", None)
        title = ""
        table: _Table | None = None
        for line in self._lines:
            if match := _COMMAND.search(line.text):
                command, title = (match["option"], match["letter"]), ""
            if match := _AMD_TITLE.match(line.text):
                title = match["title"].lower()
                self._is_amd = True
            header = read_header(line)
            if header and table and table.is_continued_by(header):
                continue
            if header or (table and table.is_over(line)):
                yield from self._finished(table)
                table = _Table(header, command, title) if header else None
            elif table and not table.is_complete:
                self._add_row(table, line)
            elif table:
                self._refuse_stranger(table.header, line)
        yield from self._finished(table)

    def _add_row(self, table: _Table, line: Line) -> None:
        row = self._row(table.header, line)
        if row is None:
            self._refuse_stranger(table.header, line)
            return
        if row.label.text in table.rows:
            raise self._error(f"one row for {row.label.text} was expected, found a second", row.label)
        table.rows[row.label.text] = row

    def _refuse_stranger(self, header: Header, line: Line) -> None:
        """A row of links for a GPU that the header does not name shows that the header is damaged."""
        label = first_label(line)
        if label is None or label.text in header.gpus:
            return
        word = line.text[label.end :].split(maxsplit=1)
        if not word or not (word[0] in ("X", "SELF") or LINK_CELL.fullmatch(word[0])):
            return
        raise self._error(
            f"a column for {label.text} was expected in the header in line {header.line}, found "
            f"{', '.join(header.columns) or 'none'}",
            label,
        )

    def _finished(self, table: _Table | None) -> Iterator[_Table]:
        """A table of affinities ends where it ends; another one that is not complete is refused."""
        if table is None or not table.rows:
            return
        names, gpus = table.header.columns, table.header.gpus
        if len(set(names)) < len(names):
            raise self._error(
                f"each device once was expected in the header, found {', '.join(names)}", _line(table.header)
            )
        missing = [gpu for gpu in gpus if gpu not in table.rows]
        if missing:
            raise self._error(
                f"a row for each of the {len(gpus)} GPUs of the header was expected, found none for "
                f"{', '.join(missing)}",
                _line(table.header),
            )
        yield table

    def _row(self, header: Header, line: Line) -> Row | None:
        if header.piped:
            return read_piped_row(header, line)
        if not header.columns:
            return read_affinity_row(header, line)
        return self._spaced_row(header, line)

    def _spaced_row(self, header: Header, line: Line) -> Row | None:
        label = find_label(header.gpus, line)
        if label is None:
            return None
        cells = split_cells(line, label.end)
        own = header.columns.index(label.text)
        before = line.text[: label.column - 1].strip()
        is_own = len(cells) > own and cells[own].text in OWN_CELLS
        if not is_own and (
            (before and before != header.prefix) or not any(LINK_CELL.fullmatch(c.text) for c in cells)
        ):
            return None  # a sentence that mentions a GPU
        width = len(header.columns)
        wanted = (
            f"{width} cell{'s were' if width > 1 else ' was'} expected in the row of {label.text}, one for each "
            f"device of the header in line {header.line}, found "
        )
        if len(cells) < width:
            raise self._error(f"{wanted}{len(cells)}", label)
        if len(cells) > width and is_matrix_cell(cells[width].text):
            raise self._error(f"{wanted}one more, {cells[width].text!r}", cells[width])
        affinity, rest = read_affinity(header, line, cells[width - 1].end)
        return Row(label, dict(zip(header.columns, cells, strict=False)), affinity, rest)

    def _kind(self, table: _Table) -> _Kind:
        if not table.header.columns:
            return "affinity"
        if table.title and table.title != _LINK_TYPES:
            return "other"
        has_links = any(LINK_CELL.fullmatch(cell.text) for cell in table.between_devices())
        if not has_links and any(STATUS_CELL.fullmatch(cell.text) for cell in table.between_devices()):
            self._check(table, STATUS_CELL, (), "a status (OK, CNS, GNS, TNS, DR, NS, U)")
            return "p2p"
        owns = (table.cell(gpu, gpu).text for gpu in table.header.gpus)
        if has_links or table.title or all(own in ("X", "SELF") for own in owns):
            self._check(table, LINK_CELL, UNKNOWN_CELLS, "a link class (NV#, PIX, PXB, PHB, NODE, SYS, XGMI, PCIE)")
            return "links"
        return "other"

    def _check(self, table: _Table, allowed: re.Pattern[str], unknown: Container[str], what: str) -> None:
        """Every cell is one of those allowed, own cells are where they belong, rows agree with columns."""
        for cell in table.between_devices():
            if cell.text not in unknown and not allowed.fullmatch(cell.text):
                raise self._error(f"{what} was expected, found {_quoted(cell.text)}", cell)
        for gpu in table.header.gpus:
            if (own := table.cell(gpu, gpu)).text not in OWN_CELLS:
                raise self._error(f"X was expected where {gpu} meets itself, found {_quoted(own.text)}", own)
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
                pair: parse_link_class(cell.text) for pair, cell in _pairs(table) if cell.text not in UNKNOWN_CELLS
            }
            if table.command[0] in _PCIE_ONLY and links:
                raise self._error(
                    "the links of nvidia-smi topo -m were expected, found topo -mp, which shows PCIe only and "
                    "never NVLink",
                    _line(table.header),
                )
            if table is tables[0]:
                first = links
            elif links != first or _numbers(table) != _numbers(tables[0]):
                raise self._other_machine(tables[0], table)
        return first

    def _p2p(self, tables: Sequence[_Table], links: Sequence[_Table]) -> tuple[P2pStatus, ...]:
        """The statuses of the tables, which must be those of one machine; -p2p is asked once per capability."""
        found: dict[P2pStatus, None] = {}
        known: dict[tuple[int, int, str], str] = {}
        for table in tables:
            for other in (*links[:1], *tables[:1]):
                if _numbers(other) != _numbers(table):
                    raise self._other_machine(other, table)
            for status in _statuses(table):
                key = (status.a, status.b, status.capability or "")
                if status.capability and known.setdefault(key, status.status) != status.status:
                    raise self._other_machine(tables[0], table)
                found[status] = None
        return tuple(found)

    def _devices(self, tables: Sequence[_Table]) -> tuple[Device, ...]:
        text = "\n".join(line.text for line in self._lines)
        nodes = {int(gpu): int(node) for gpu, node in _ROCM_NUMA.findall(text)}
        listed = _listed_gpus(text)
        devices: dict[int, Device] = {}
        for table in tables:
            for label, number in _numbers(table).items():
                affinity = table.rows[label].affinity
                gpu_numa = _numa(affinity.get(GPU_NUMA_COLUMN, ""))
                device = Device(
                    index=number,
                    pci_bus_id=label if ":" in label else None,
                    numa_node=_numa(affinity.get(NUMA_COLUMN, "")) if affinity else nodes.get(number),
                    cpu_affinity=affinity.get(CPU_COLUMN),
                    gpu_numa_id=gpu_numa if isinstance(gpu_numa, int) else None,
                )
                if facts := listed.get(number):
                    device = replace(device, name=facts.name, uuid=facts.uuid, mig=facts.mig)
                devices.setdefault(number, device)
        return tuple(devices[number] for number in sorted(devices))

    def _table_without_header(self) -> _Table | None:
        """Rows whose header was cut: the cell ``X`` of a row tells which column is its own."""
        rows = [row for line in self._lines if (row := read_headless_row(line))]
        labels = {row.own: row.label for row in rows}
        gpus = tuple(row.label for row in rows if GPU.fullmatch(row.label) and ":" not in row.label)
        widths = {row.width for row in rows if row.label in gpus}
        if not gpus or len(widths) != 1 or len(labels) < len(rows) or None in labels:
            return None
        columns = tuple(labels.get(i, f"column {i + 1}") for i in range(widths.pop()))
        if len(set(columns)) < len(columns) or not set(gpus) <= set(columns):
            return None
        header = Header(rows[0].line.number, "", columns, gpus, (CPU_COLUMN, NUMA_COLUMN))
        table = _Table(header, self._last_command(), "")
        for row in rows:
            if read := self._spaced_row(header, row.line):
                table.rows[row.label] = read
        if len(gpus) == 1 and not table.rows[gpus[0]].affinity[CPU_COLUMN]:
            return None  # a sentence about one GPU
        return table if self._kind(table) == "links" else None

    def _last_command(self) -> tuple[str, str | None]:
        matches = [match for line in self._lines if (match := _COMMAND.search(line.text))]
        return (matches[-1]["option"], matches[-1]["letter"]) if matches else ("", None)

    def _instead(self, others: Sequence[_Table]) -> str:
        """What a text without links has in their place."""
        if titles := list(dict.fromkeys(table.title for table in others if table.title)):
            return f"only AMD's {', '.join(titles)}"
        first = next((line.text for line in self._lines if line.text.strip()), "")
        form = _AMD_FORM.match(first)
        self._is_amd |= form is not None
        count = f"{len(self._lines)} line{'' if len(self._lines) == 1 else 's'}"
        return f"{form.lastgroup}, and no table in {count}" if form else f"none in {count}"

    def _other_machine(self, first: _Table, other: _Table) -> TopologyFormatError:
        return self._error(
            f"one machine was expected, found a table that differs from the one in line {first.header.line}",
            _line(other.header),
        )

    def _error(self, reason: str, cell: Cell | None = None) -> TopologyFormatError:
        line, column = (cell.line, cell.column) if cell else (0, 0)
        if column:
            column = next(text.raw_column(column) for text in self._lines if text.number == line)
        advice = _AMD_ADVICE if self._is_amd else _ADVICE
        return TopologyFormatError(f"{reason}\n{advice}", source=self._source, line=line, column=column)


def _line(header: Header) -> Cell:
    """The line of a header as a whole."""
    return Cell("", header.line, 0)


def _quoted(text: str) -> str:
    """The word in quotes, cut where a file without white space would fill the screen."""
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def _listed_gpus(text: str) -> dict[int, _Listed]:
    """What the lines of ``nvidia-smi -L`` say, by index; a GPU that is listed in two ways is left out.

    MIG mode without an instance does not show there, so no instance means "unknown".
    """
    found: dict[int, set[_Listed]] = {}
    gpus = list(_LISTED_GPU.finditer(text))
    ends = [*(gpu.start() for gpu in gpus[1:]), len(text)]
    for gpu, end in zip(gpus, ends, strict=False):
        instances = _LISTED_INSTANCE.search(text, gpu.end(), end)
        uuid = gpu["uuid"] if _UUID.fullmatch(gpu["uuid"]) else None
        found.setdefault(int(gpu["index"]), set()).add(_Listed(gpu["name"], uuid, True if instances else None))
    return {index: facts.pop() for index, facts in found.items() if len(facts) == 1}


def _statuses(table: _Table) -> Iterator[P2pStatus]:
    option, letter = table.command
    for (a, b), cell in _pairs(table):
        yield P2pStatus(a, b, letter if option in _P2P else None, cell.text)


def _pairs(table: _Table) -> Iterator[tuple[tuple[int, int], Cell]]:
    numbers = _numbers(table)
    for a, b in combinations(table.header.gpus, 2):
        yield (min(numbers[a], numbers[b]), max(numbers[a], numbers[b])), table.cell(a, b)


def _numbers(table: _Table) -> dict[str, int]:
    """Label -> index; devices that are named by bus id are numbered in the order of the table."""
    labels = table.header.gpus or tuple(table.rows)
    return {
        label: int(label.removeprefix("GPU")) if label.startswith("GPU") else position
        for position, label in enumerate(labels)
    }


def _numa(text: str) -> int | str | None:
    """A node, or a range as it is printed."""
    if re.fullmatch(r"[0-9]+", text):
        return int(text)
    return text if text not in ("", "N/A") else None


def _platform(tables: Sequence[_Table]) -> Platform:
    """AMD's tools print ``0`` or ``SELF`` where a device meets itself."""
    own = [table.cell(gpu, gpu).text for table in tables for gpu in table.header.gpus]
    return "rocm" if any(text in ("0", "SELF") for text in own) else "cuda"
