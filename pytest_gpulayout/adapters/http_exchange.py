"""One request and its answer: HTTP/1.1 framing (``httptools``), and nothing that costs time while a clock runs.

While bytes arrive only one question matters: is this the end of the answer? The head is parsed as it comes. After it
a chunked answer can only end in an empty line, so its pieces are kept as they are, and shown to the parser, which
runs in C without a callback here, when the last bytes may be that line. The body is taken out of the framing later,
with the instants of its pieces. Leaves sockets to :mod:`~pytest_gpulayout.adapters.connection`.
"""

from __future__ import annotations

from array import array
from http import HTTPStatus
from typing import Any

import httptools

from pytest_gpulayout.adapters.sse import error_message

_EMPTY_LINE = b"\r\n\r\n"


class Exchange:
    """One request and its answer; the HTTP parser calls the ``on_`` methods.

    :param payload: the request as it goes over the wire. :param index: of the request, whatever its owner counts.
    :param request_id: that it carries. :param intended_ns: when it is due, of an open arrival.
    """

    __slots__ = (
        *("payload", "index", "request_id", "intended_ns", "queued_ns", "connect_ns", "due_ns"),
        *("send_ns", "sent_ns", "kernel_sent", "end_ns", "status", "error", "complete", "keep_alive"),
        *("_stamps", "_raw", "_parsed", "_parser", "_has_length", "_is_chunked", "_lazy"),
    )

    def __init__(self, payload: bytes, index: int = 0, request_id: str = "", intended_ns: int | None = None) -> None:
        self.payload = payload
        self.index = index
        self.request_id = request_id
        self.intended_ns = intended_ns
        self.queued_ns = self.connect_ns = self.send_ns = self.end_ns = self.status = 0
        self.due_ns: int | None = None
        self.sent_ns: int | None = None
        self.kernel_sent = False
        self.error: str | None = None
        self.complete = self.keep_alive = False
        self._stamps: array[int] = array("q")
        self._raw: list[bytes] = []
        self._parsed = 0
        self._parser: Any = None
        self._has_length = self._is_chunked = self._lazy = False

    def take(self, now_ns: int, data: bytes) -> bool:
        """Keep bytes of the answer that arrived at ``now_ns``; return whether they ended it."""
        self._stamps.append(now_ns)
        self._raw.append(data)
        if self._lazy:
            tail = data if len(data) >= len(_EMPTY_LINE) else b"".join(self._raw[-len(_EMPTY_LINE) :])
            if not tail.endswith(_EMPTY_LINE):
                return False
        self._parse()
        return self.complete

    @property
    def first_byte_ns(self) -> int | None:
        """When the first byte of the answer arrived; ``None`` if none did."""
        return self._stamps[0] if self._stamps else None

    @property
    def received(self) -> int:
        """Bytes of the answer that have arrived, head and framing included."""
        return sum(map(len, self._raw))

    def end_of_stream(self, now_ns: int, reason: str) -> None:
        """The connection is gone; that is the end of an answer only where nothing else marks its end."""
        if self._parsed < len(self._raw):
            self._parse()
        if self.complete:
            return
        if self.status and not self._has_length:
            self.complete, self.end_ns = True, now_ns
            return
        self.fail(now_ns, f"{reason} after {self.body_bytes()} bytes of the answer")

    def fail(self, now_ns: int, error: str) -> None:
        """End the exchange without an answer, or with half of one."""
        self.error, self.complete, self.keep_alive, self.end_ns = error, True, False, now_ns
        self._forget_parser()

    def on_message_begin(self) -> None:
        """Distrust a connection on which another answer follows that nobody asked for."""
        if self.complete:
            self.keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note whether the answer says where it ends."""
        name = name.lower()
        self._has_length = self._has_length or name in (b"content-length", b"transfer-encoding")
        self._is_chunked = self._is_chunked or (name == b"transfer-encoding" and b"chunked" in value.lower())

    def on_headers_complete(self) -> None:
        """Note the status."""
        if not self.complete:
            self.status = self._parser.get_status_code()
            self._lazy = self._is_chunked and self.status >= HTTPStatus.OK

    def on_message_complete(self) -> None:
        """End the exchange, unless the answer was only provisional."""
        if self.status < HTTPStatus.OK:  # "100 Continue" and its like announce another one
            self.status, self._has_length, self._is_chunked = 0, False, False
        elif not self.complete:
            self.complete, self.end_ns = True, self._stamps[-1]
            self.keep_alive = self._parser.should_keep_alive()

    def pieces(self) -> list[tuple[int, bytes]]:
        """Return the body without its framing: (arrival in ns, bytes), in the order they came."""
        reader = _BodyReader()
        parser = httptools.HttpResponseParser(reader)
        try:
            for reader.now_ns, data in zip(self._stamps, self._raw, strict=True):
                _feed(parser, data)
        except httptools.HttpParserError:
            pass  # what came before the fault is kept, and the fault itself is the exchange's error
        return reader.pieces

    def body_bytes(self) -> int:
        """Bytes of the body that have arrived."""
        return sum(len(piece) for _, piece in self.pieces())

    def http_error(self) -> str | None:
        """Why the exchange failed, in the server's words where there are some; ``None`` when it did not."""
        if self.error is not None:
            return self.error
        if self.status == HTTPStatus.OK:
            return None
        return f"HTTP {self.status}: {error_message(b''.join(piece for _, piece in self.pieces()))}"

    def _parse(self) -> None:
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
        fresh = self._raw[self._parsed :]
        self._parsed = len(self._raw)
        try:
            _feed(self._parser, fresh[0] if len(fresh) == 1 else b"".join(fresh))
        except httptools.HttpParserError as error:
            if not self.complete:  # otherwise the fault lies in what nobody asked for
                self.fail(self._stamps[-1], f"the answer is not HTTP: {error}")
            self.keep_alive = False
        if self.complete:
            self._forget_parser()

    def _forget_parser(self) -> None:
        # It refers to this object: a cycle that nothing would free while the garbage collector is off.
        self._parser = None


def _feed(parser: httptools.HttpResponseParser, data: bytes) -> None:
    """Parse, and let Ctrl-C through: httptools keeps whatever a callback raises, and raises an error of its own."""
    try:
        parser.feed_data(data)
    except httptools.HttpParserCallbackError as error:
        kept = error.__context__
        if kept is not None and not isinstance(kept, Exception):
            raise kept from None
        raise


class _BodyReader:
    """Collects the body of the one final answer in a stream; the HTTP parser calls the ``on_`` methods."""

    __slots__ = ("_complete", "now_ns", "pieces")

    def __init__(self) -> None:
        self.now_ns = 0
        self.pieces: list[tuple[int, bytes]] = []
        self._complete = False

    def on_body(self, body: bytes) -> None:
        if not self._complete:
            self.pieces.append((self.now_ns, body))

    def on_message_complete(self) -> None:
        # An interim answer has no body, so that the first one which has one is the one that counts.
        self._complete = bool(self.pieces)
