"""A server that knows what it did: fixed TTFT and ITL on an absolute timetable, and a stamp for each chunk sent.

The measure of a load client. One thread, one ``epoll``; an answer's chunks are encoded before its clock runs; the
TTFT counts from the arrival of the request's last byte, by the kernel's receive timestamp where there is one; chunk
``k`` of an answer is due at ``arrival + TTFT + k * ITL`` however late the one before was. Each chunk is stamped with
``CLOCK_MONOTONIC`` right before ``send()``. ``GET /sent`` returns the answers that ended since it was last asked::

    [{"request_id": "...", "fingerprint": "vllm-mock-0000002a", "received_ns": 1, "chunk_ns": [2, 3]}, ...]

By hand, and with ``curl`` against the port that it prints::

    python -m pytest_gpulayout.adapters.mock_server --ttft-ms 20 --itl-ms 20

Listens on 127.0.0.1 only, and ends with its parent: when its standard input was a pipe that is now closed, or when
its parent is gone. Knows sockets, HTTP requests (through ``httptools``) and time; what is said is
:mod:`~pytest_gpulayout.adapters.mock_answers`'s.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import select
import socket
import stat
import struct
import sys
from array import array
from collections import deque
from heapq import heappop, heappush, heapreplace
from http import HTTPStatus
from time import monotonic_ns, time_ns
from typing import Any

import httptools
import orjson

from pytest_gpulayout.adapters.mock_answers import Answer, Request, answer_to, plain

_RECV_BYTES = 1 << 16
_ANCILLARY_BYTES = 256
_BACKLOG = 4096
_TICK_NS = 500_000_000
_NS_PER_S = 1_000_000_000
_NS_PER_MS = 1_000_000
_STDIN = 0

# Linux, include/uapi/linux/net_tstamp.h and asm-generic/socket.h; SCM_TIMESTAMPING is the option's own number.
# Not the client's code for the same: a mistake that both sides made would not show.
_SO_TIMESTAMPING = 37
_RX_SOFTWARE, _SOFTWARE = 1 << 3, 1 << 4
_TIMESPEC = struct.Struct("@qq")
_OLDEST_STAMP_NS = 10 * _NS_PER_S


class _Streaming:
    """An answer under way. :param chunk_ns: (n_chunks,), 0 for what has not been sent."""

    __slots__ = (
        "answer",
        "chunk_ns",
        "connection",
        "fingerprint",
        "keep_alive",
        "number",
        "received_ns",
        "request_id",
        "sent",
    )

    def __init__(
        self, connection: _Connection, answer: Answer, request: Request, number: int, received_ns: int
    ) -> None:
        self.connection = connection
        self.answer = answer
        self.keep_alive = request.keep_alive
        self.request_id = request.request_id
        self.number = number
        self.fingerprint = _fingerprint(number)
        self.received_ns = received_ns
        self.chunk_ns = array("q", bytes(8 * len(answer.chunks)))
        self.sent = 0

    @property
    def ended(self) -> bool:
        """Whether nothing more will be sent."""
        return self.connection.lost or self.sent == len(self.chunk_ns)

    def record(self) -> dict[str, Any]:
        """What ``GET /sent`` tells of it."""
        return {
            "request_id": self.request_id,
            "fingerprint": self.fingerprint,
            "received_ns": self.received_ns,
            "chunk_ns": self.chunk_ns[: self.sent].tolist(),
        }


def _fingerprint(number: int) -> str:
    return f"vllm-mock-{number:08x}"


class _Connection:
    """One client's connection; a protocol of ``httptools``, which calls the ``on_`` methods while it is fed."""

    def __init__(self, accepted: socket.socket) -> None:
        self.socket = accepted
        self.unsent = bytearray()
        self.requests: deque[tuple[Request, int]] = deque()
        self.streaming = False
        self.closing = False
        self.lost = False
        self.watched = select.EPOLLIN
        self.arrival_ns = 0
        self._parser: Any = httptools.HttpRequestParser(self)
        self._path = b""
        self._request_id = b""
        self._body: list[bytes] = []

    def feed(self, data: bytes, arrival_ns: int) -> None:
        """Take bytes; whole requests end up in ``requests``.

        :raises httptools.HttpParserError: this is not HTTP.
        """
        self.arrival_ns = arrival_ns
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        """Forget the request before."""
        self._path, self._request_id, self._body = b"", b"", []

    def on_url(self, url: bytes) -> None:
        """Take a piece of the path."""
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep what matters here."""
        name = name.lower()
        if name == b"x-request-id":
            self._request_id = value
        elif name == b"expect" and value.lower() == b"100-continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Queue the request; a client that does not wait for its answer gets the answers in turn."""
        request = Request(
            method=self._parser.get_method().decode("latin-1"),
            path=self._path.decode("latin-1"),
            body=b"".join(self._body),
            request_id=self._request_id.decode("latin-1"),
            keep_alive=self._parser.should_keep_alive(),
        )
        self.requests.append((request, self.arrival_ns))

    def send(self, data: bytes) -> None:
        """Hand bytes to the kernel, and keep those that it does not take now."""
        if self.unsent:
            self.unsent += data
            return
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.lost = True
            return
        if sent < len(data):
            self.unsent += data[sent:]

    def flush(self) -> None:
        """Hand over what was kept."""
        data, self.unsent = bytes(self.unsent), bytearray()
        self.send(data)

    def close(self) -> None:
        """Close the socket, which takes it out of every epoll; and let go of the parser, which refers back here."""
        self.socket.close()
        self._parser = None


class MockServer:
    """The loop of the mock.

    :param ttft_ms: from the arrival of a request to its first chunk. :param itl_ms: between chunks.
    :param port: 0 for any free one.
    """

    def __init__(self, *, ttft_ms: float, itl_ms: float, model: str = "m", port: int = 0) -> None:
        self._ttft_ns = round(ttft_ms * _NS_PER_MS)
        self._itl_ns = round(itl_ms * _NS_PER_MS)
        self._model = model
        self._epoll = select.epoll()  # before all sockets: select() takes no descriptor above 1023
        self._listener = socket.create_server(("127.0.0.1", port), backlog=_BACKLOG)
        self._listener.setblocking(False)
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._connections: dict[int, _Connection] = {}
        self._due: list[tuple[int, int, _Streaming]] = []
        self._records: list[_Streaming] = []
        self._number = 0
        self._parent = os.getppid()
        self._orphaned = False

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    def serve(self) -> None:
        """Answer until the parent is gone."""
        if _is_pipe(_STDIN):
            self._epoll.register(_STDIN, select.EPOLLIN)
        while not self._orphaned and os.getppid() == self._parent:
            tick_ns = monotonic_ns() + _TICK_NS
            while not self._orphaned and monotonic_ns() < tick_ns:
                self._turn(tick_ns)

    def _turn(self, tick_ns: int) -> None:
        """Wait for the next deadline or event; in between two events send what has become due."""
        until_ns = min(self._due[0][0], tick_ns) if self._due else tick_ns
        wait_ns = until_ns - monotonic_ns()
        if wait_ns > 0:  # epoll itself waits in whole milliseconds, select() in microseconds
            select.select([self._epoll], [], [], wait_ns / _NS_PER_S)
        self._send_due()
        # Kernel stamps are CLOCK_REALTIME; taken once for each wake-up, so that a step of that clock does no harm.
        clocks_apart_ns = time_ns() - monotonic_ns()
        for descriptor, mask in self._epoll.poll(0):
            self._handle(descriptor, mask, clocks_apart_ns)
            self._send_due()

    def _send_due(self) -> None:
        """Send what is due by now; what becomes due meanwhile waits, so that requests are read under any load."""
        due, now_ns = self._due, monotonic_ns()
        while due and due[0][0] <= now_ns:
            due_ns, number, streaming = due[0]
            connection, index = streaming.connection, streaming.sent
            if connection.lost:
                heappop(due)
                self._close(connection)
                continue
            streaming.sent = index + 1
            chunk = streaming.answer.chunks[index]
            streaming.chunk_ns[index] = monotonic_ns()
            connection.send(chunk)
            if index + 1 < len(streaming.chunk_ns):
                heapreplace(due, (due_ns + self._itl_ns, number, streaming))
            else:
                heappop(due)
                self._finish(streaming)
            if connection.unsent:
                self._watch(connection)

    def _finish(self, streaming: _Streaming) -> None:
        connection = streaming.connection
        if streaming.answer.tail:
            connection.send(streaming.answer.tail)
        connection.streaming = False
        connection.closing = not streaming.keep_alive
        self._answer_next(connection)

    def _handle(self, descriptor: int, mask: int, clocks_apart_ns: int) -> None:
        if descriptor == self._listener.fileno():
            self._accept()
        elif descriptor == _STDIN:
            self._orphaned = not os.read(_STDIN, _RECV_BYTES)
        elif descriptor in self._connections:  # an event of this wake-up may have closed it
            connection = self._connections[descriptor]
            if mask & select.EPOLLOUT:
                connection.flush()
            if mask & ~select.EPOLLOUT:
                self._receive(connection, clocks_apart_ns)
            self._watch(connection)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:  # the client has gone already
            return
        accepted.setblocking(False)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            accepted.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPING, _RX_SOFTWARE | _SOFTWARE)
        except OSError:
            pass  # a kernel without it: the arrival is when the bytes are read
        self._connections[accepted.fileno()] = _Connection(accepted)
        self._epoll.register(accepted.fileno(), select.EPOLLIN)

    def _receive(self, connection: _Connection, clocks_apart_ns: int) -> None:
        try:
            data, ancillary, _, _ = connection.socket.recvmsg(_RECV_BYTES, _ANCILLARY_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        if not data:
            connection.lost = True
            return
        try:
            connection.feed(data, _arrival_ns(ancillary, clocks_apart_ns))
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            broken = Request("", "", b"", "", keep_alive=False)
            connection.send(plain(broken, HTTPStatus.BAD_REQUEST, b'{"detail":"Bad Request"}'))
            connection.closing = True
        self._answer_next(connection)

    def _answer_next(self, connection: _Connection) -> None:
        """Answer what the client has asked for; after an answer that takes time, the rest waits for its end."""
        while connection.requests and not connection.streaming and not connection.closing:
            request, arrival_ns = connection.requests.popleft()
            if (request.method, request.path) == ("GET", "/sent"):
                connection.send(plain(request, HTTPStatus.OK, self._take_records()))
                connection.closing = not request.keep_alive
                continue
            answer = answer_to(request, self._model, _fingerprint(self._number))
            if isinstance(answer, Answer):
                self._begin(connection, answer, request, arrival_ns)
            else:
                connection.send(answer)
                connection.closing = not request.keep_alive
        self._watch(connection)

    def _begin(self, connection: _Connection, answer: Answer, request: Request, arrival_ns: int) -> None:
        streaming = _Streaming(connection, answer, request, self._number, arrival_ns)
        self._number += 1
        self._records.append(streaming)
        connection.streaming = True
        if answer.head:  # at once and by itself, as uvicorn does
            connection.send(answer.head)
        first_ns = arrival_ns + self._ttft_ns + answer.held * self._itl_ns
        heappush(self._due, (first_ns, streaming.number, streaming))

    def _take_records(self) -> bytes:
        """Hand out and forget what has ended; the rest is told of when it is complete."""
        ended = [streaming.record() for streaming in self._records if streaming.ended]
        self._records = [streaming for streaming in self._records if not streaming.ended]
        return orjson.dumps(ended)

    def _watch(self, connection: _Connection) -> None:
        """Close what has ended; ask the kernel to tell when it takes bytes again, if there are any."""
        if connection.lost or (connection.closing and not connection.unsent and not connection.streaming):
            self._close(connection)
            return
        wanted = select.EPOLLIN | (select.EPOLLOUT if connection.unsent else 0)
        if wanted != connection.watched:
            connection.watched = wanted
            self._epoll.modify(connection.socket.fileno(), wanted)

    def _close(self, connection: _Connection) -> None:
        connection.lost = True
        self._connections.pop(connection.socket.fileno(), None)
        connection.close()


def _arrival_ns(ancillary: list[tuple[int, int, bytes]], clocks_apart_ns: int) -> int:
    """When the kernel received the last bytes of a read, by ``CLOCK_MONOTONIC``; now where it does not tell."""
    now_ns = monotonic_ns()
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPING and len(data) >= _TIMESPEC.size:
            seconds, nanoseconds = _TIMESPEC.unpack_from(data)
            stamp_ns = int(seconds) * _NS_PER_S + int(nanoseconds) - clocks_apart_ns
            return stamp_ns if now_ns - _OLDEST_STAMP_NS < stamp_ns < now_ns else now_ns
    return now_ns


def _is_pipe(descriptor: int) -> bool:
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _keep_time() -> None:
    """Run before all ordinary processes where that is allowed, and wake up on time.

    A server that others keep from running does not offer the load that it was to offer. Ordinary timers have 50 us of
    slack (``proc(5)``, ``timerslack_ns``).
    """
    try:
        lowest = os.sched_param(os.sched_get_priority_min(os.SCHED_FIFO))
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, lowest)
    except OSError:
        pass  # not allowed: it may be late, and its stamps say so
    try:
        with open("/proc/self/timerslack_ns", "w", encoding="ascii") as slack:
            slack.write("1")
    except OSError:
        pass  # the chunks go out that much later, and their stamps say so


def _allow_many_connections() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main(arguments: list[str] | None = None) -> None:
    """Print the port and serve until the parent is gone."""
    parser = argparse.ArgumentParser(description="an OpenAI-compatible server with a fixed TTFT and ITL")
    parser.add_argument("--ttft-ms", type=float, default=20.0, help="request received to the first token")
    parser.add_argument("--itl-ms", type=float, default=20.0, help="between tokens")
    parser.add_argument("--port", type=int, default=0, help="0 for any free one")
    parser.add_argument("--model", default="m", help="name in /v1/models")
    chosen = parser.parse_args(arguments)
    _allow_many_connections()
    _keep_time()
    server = MockServer(ttft_ms=chosen.ttft_ms, itl_ms=chosen.itl_ms, model=chosen.model, port=chosen.port)
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection takes milliseconds; what an answer leaves behind has no cycles
    try:
        server.serve()
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
