"""Cuts a log, as bytes or as text, into lines, and finds those few that a reader of NCCL's log wants.

Knows dirt and speed: NUL bytes, UTF-16, colours, CRLF, bytes that are no UTF-8, lines without an end, records inside
JSON. Leaves what a line means to :mod:`~pytest_gpulayout.nccl_records`.

``NCCL_DEBUG_SUBSYS=ALL`` writes gigabytes, nearly all of it lines about single collectives, proxies and allocations.
So a log is searched in blocks of whole lines by few patterns, and only lines in which one is found are decoded. Every
record that :mod:`~pytest_gpulayout.nccl_records` reads holds one of them; a test compares with reading every line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

BLOCK_BYTES = 1 << 18
"""How much is searched at once: stays in the processor's cache."""
LONGEST_LINE = 1 << 20
"""Bytes after which a line without an end is read in pieces, so that memory stays bounded."""
_LONGEST_NEIGHBOUR = 4096
_NEWLINE = ord("\n")

_NULS = re.compile(rb"\0{2,}")
_COLOURS = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]")
_COLOURS_IN_JSON = re.compile(r"\\u001[bB]\[[0-9;?]*[ -/]*[@-~]")
_COLOURS_WITHOUT_ESCAPE = re.compile(r"\[\d{1,3}(?:;\d{1,3})*m")
_ESCAPE = re.compile(r"\\(?:u00(?P<code>[0-7][0-9a-fA-F])|[nrt])|(?P<entity>&gt;)")
_RECORD_START = re.compile(rb"[A-Za-z0-9][\w.-]{0,252}+:\d{1,10}:\d{1,10} \[-?\d+\]")
# A record that a line's end may have broken at its arrow or at "via": the next line belongs to it.
_UNFINISHED = re.compile(
    rb"(?:Channel|Ring|Coll(?:Net)?) +\d+[^\n]{0,80}?(?:->|\]|via|\d)(?:[ \r\0]|(?:\x1b|\\u001[bB])?\[[0-9;]*m)*\Z"
)

# One pass over the log each, so there are few of them; what they spare is looking at every line.
_VIA = re.compile(rb"via(?:\s|\Z)")
_MESSAGE = re.compile(
    rb"NCCL INFO (?!A[^s]|Ne|nccl|proxyP|Connected to)"  # what fills a log is turned away first
    rb"(?:C(?:hannel \d+(?:/\d+)? :\s+\d+(?:\s|\Z)|onnected all |heck P2P)|Trees |[NR]CCL version"
    rb"|c(?:omm 0x|uMem host)|NET/|P2P is dis|(?:Assigned|Initialized|Failed to initialize) NET"
    rb"|[a-z/][\w./-]*+:\d+ -> )"
)
# A search for one byte costs next to nothing while the byte is rare; only where it is found follows the text's.
_RARE = (
    (b"W", b"NCCL WARN"),
    (b"U", b"Using network"),
    (b"_", b"set by environment"),
    (b"+", b"CCL version"),
    (b"D", b"cudaDev"),
    (b"V", b"NVLS "),
    (b"V", b"MNNVL "),
)


@dataclass(frozen=True, slots=True)
class LogLine:
    """A piece of evidence: where it stands, and its text without colours, cut at 400 characters.

    :param line: 1-based.
    """

    file: str
    line: int
    text: str


class Block:
    """Whole lines of a log, without NULs and colours.

    :param number: of the first line, 1-based.
    :param data: holds the lines from byte ``start`` to byte ``end``, and perhaps more.
    :param before: the line in front of the first, or its end.
    """

    __slots__ = ("_before", "_counted", "_number", "data", "end", "start")

    def __init__(self, number: int, data: bytes, start: int, end: int, before: bytes) -> None:
        self.data = data
        self.start = start
        self.end = end
        self._before = before
        self._number = number
        self._counted = start

    def number_at(self, position: int) -> int:
        """Number of the line that holds a byte; positions must not go back."""
        self._number += self.data.count(b"\n", self._counted, position)
        self._counted = position
        return self._number

    def end_of(self, start: int) -> int:
        """Where the line that begins at ``start`` ends."""
        end = self.data.find(b"\n", start, self.end)
        return self.end if end < 0 else end

    def line_before(self, start: int) -> bytes:
        """The line in front of the one that begins at ``start``, or its end."""
        if start == self.start:
            return self._before
        low = max(self.start, start - _LONGEST_NEIGHBOUR)
        return self.data[max(self.data.rfind(b"\n", low, start - 1) + 1, low) : start - 1]

    def line_after(self, end: int) -> bytes:
        """The line after the one that ends at ``end``, or its beginning."""
        return self.data[end + 1 : min(self.end_of(end + 1), end + 1 + _LONGEST_NEIGHBOUR)]


def numbered_lines(lines: Iterable[str | bytes]) -> Iterator[tuple[int, str]]:
    """Lines with their 1-based number, clean of NULs and colours.

    :param lines: text, one line or several per item; or bytes, cut anywhere.
    """
    for block in blocks(lines):
        start = block.start
        while start < block.end:
            end = block.end_of(start)
            yield block.number_at(start), _without_colours(block.data[start:end].decode("utf-8", "replace"))
            start = end + 1


def blocks(lines: Iterable[str | bytes]) -> Iterator[Block]:
    """Whole lines, many at once; a line longer than :data:`LONGEST_LINE` comes in pieces of one number.

    :param lines: text, one line or several per item; or bytes, cut anywhere.
    """
    number = 1
    before = b""
    for data, start, end in _whole_lines(lines):
        block = _clean_block(number, data, start, end, before)
        yield block
        number = block.number_at(block.end)
        before = block.line_before(block.end) if data[end - 1] == _NEWLINE else b""


def _whole_lines(lines: Iterable[str | bytes]) -> Iterator[tuple[bytes, int, int]]:
    """Bytes, with the range in them that holds whole lines; what a chunk's end cuts is completed, not copied all."""
    rest = b""
    for chunk in _chunks(lines):
        start = 0
        while rest and start < len(chunk):
            end = chunk.find(b"\n", start) + 1 or len(chunk)
            rest += chunk[start:end]
            start = end
            while size := _readable(rest, 0):
                yield rest, 0, size
                rest = rest[size:]
        if end := _readable(chunk, start):
            yield chunk, start, end
            start = end
        rest = rest or chunk[start:]
    if rest:
        yield rest, 0, len(rest)


def _clean_block(number: int, data: bytes, start: int, end: int, before: bytes) -> Block:
    dirty = b"\0" in data or b"\x1b" in data
    if dirty:
        # A NUL beside each letter is UTF-16.
        data = _COLOURS.sub(b"", data[start:end].replace(b"\0", b""))
        start, end = 0, len(data)
    return Block(number, data, start, end, before)


def line_text(raw: bytes) -> str:
    """A line as text, free of what terminals, JSON and HTML put into it."""
    text = _without_colours(raw.decode("utf-8", "replace"))
    return _ESCAPE.sub(_unescape, text) if "\\" in text or "&gt;" in text else text


def interesting_lines(block: Block) -> list[tuple[int, int]]:
    """Where the lines begin and end that may hold a record worth reading, in order."""
    data, first, last = block.data, block.start, block.end
    found: dict[int, int] = {}
    for pattern in (_VIA, _MESSAGE):
        match = pattern.search(data, first, last)
        while match:
            at = match.start()
            end = block.end_of(at)
            found[data.rfind(b"\n", first, at) + 1 or first] = end
            match = pattern.search(data, end, last)
    for rare, text in _RARE:
        at = data.find(text, first, last) if rare in data else -1
        while at >= 0:
            end = block.end_of(at)
            found[data.rfind(b"\n", first, at) + 1 or first] = end
            at = data.find(text, end, last)
    return sorted(found.items())


def _chunks(lines: Iterable[str | bytes]) -> Iterator[bytes]:
    """The same bytes in larger pieces; a run of NULs (a hole in a file) is cut short."""
    pieces: list[bytes] = []
    size = 0
    nuls = b""
    for item in lines:
        piece = (item.removesuffix("\n") + "\n").encode("utf-8", "replace") if isinstance(item, str) else item
        if nuls or b"\0" in piece:
            whole = (nuls + piece).rstrip(b"\0")
            # The next piece may go on with the run.
            nuls = b"\0" * min(2, len(nuls) + len(piece) - len(whole))
            piece = _NULS.sub(b" ", whole)
        pieces.append(piece)
        size += len(piece)
        if size >= BLOCK_BYTES:
            yield b"".join(pieces)
            pieces, size = [], 0
    yield b"".join([*pieces, nuls])


def _readable(data: bytes, start: int) -> int:
    """Up to where ``data`` can be read already; 0 when more has to come."""
    if end := data.rfind(b"\n", start) + 1:
        last = max(data.rfind(b"\n", start, end - 1) + 1, start)
        # A record that may go on in the next line waits for it.
        waits = end - last < _LONGEST_NEIGHBOUR and _UNFINISHED.search(data, last, end - 1)
        end = last if waits else end
        return end if end > start else 0
    if len(data) - start <= LONGEST_LINE:
        return 0
    return _last_record(data, start) or start + LONGEST_LINE


def _last_record(data: bytes, start: int) -> int:
    """Where the last record begins, which may be whole only with what follows; 0 when it is too far back."""
    latest = start + LONGEST_LINE
    starts = [match.start() for match in _RECORD_START.finditer(data, latest - LONGEST_LINE // 2, latest)]
    return starts[-1] if starts else 0


def _without_colours(text: str) -> str:
    if "\\u001" in text:
        text = _COLOURS_IN_JSON.sub("", text)
    return _COLOURS_WITHOUT_ESCAPE.sub("", text)


def _unescape(match: re.Match[str]) -> str:
    return chr(int(match["code"], 16)) if match["code"] else ">" if match["entity"] else " "
