"""One request, its answer, and the connection they travel on: HTTP/1.1 without waiting (``httptools``)."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httptools

from pytest_gpulayout.adapters.sse import error_message
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.ports import Endpoint

RECV_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where an endpoint is and how to address it, resolved once. :param address: as :mod:`socket` takes it."""

    endpoint: Endpoint
    host: str
    port: int
    prefix: str
    family: int
    address: Any

    def encode(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Return a whole request as it goes over the wire."""
        lines = [f"{method} {self.prefix}{path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in self.headers(len(body)).items()]
        return "\r\n".join([*lines, "", ""]).encode() + body

    def headers(self, length: int) -> dict[str, str]:
        """Headers of a request with a body of ``length`` bytes."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        headers = {"Host": f"{host}:{self.port}", "Connection": "keep-alive", "Content-Length": str(length)}
        if length:
            headers["Content-Type"] = "application/json"
        if self.endpoint.api_key is not None:
            headers["Authorization"] = f"Bearer {self.endpoint.api_key}"
        return headers

    def fault(self, required: str, found: str, advice: str) -> MeasurementError:
        """An error in four parts, this server being the place."""
        return MeasurementError(
            f"{required}\n  found: {found}\n  at {self.endpoint.url}, model {self.endpoint.model!r}\n  {advice}"
        )


@dataclass(slots=True)
class Exchange:
    """One request and its answer; the HTTP parser calls the ``on_`` methods.

    :param pieces: (arrival in ns, bytes of the body), in the order they came.
    """

    payload: bytes
    send_ns: int = 0
    end_ns: int = 0
    status: int = 0
    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    error: str | None = None
    complete: bool = False
    keep_alive: bool = False
    _now_ns: int = 0
    _has_length: bool = False
    _parser: Any = None

    def feed(self, now_ns: int, data: bytes) -> None:
        """Take bytes of the answer that arrived at ``now_ns``."""
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
        self._now_ns = now_ns
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(now_ns, f"the answer is not HTTP: {error}")

    def end_of_stream(self, now_ns: int, reason: str) -> None:
        """The connection is gone; that is the end of an answer only where nothing else marks its end."""
        if self.status and not self._has_length:
            self.complete, self.end_ns = True, now_ns
            return
        seen = sum(len(piece) for _, piece in self.pieces)
        self.fail(now_ns, f"{reason} after {seen} bytes of the answer")

    def fail(self, now_ns: int, error: str) -> None:
        """End the exchange without an answer, or with half of one."""
        self.error, self.complete, self.keep_alive, self.end_ns = error, True, False, now_ns

    def on_header(self, name: bytes, _value: bytes) -> None:
        """Note whether the answer says where it ends."""
        self._has_length = self._has_length or name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        """Note the status."""
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body with its time of arrival."""
        if not self.complete:
            self.pieces.append((self._now_ns, body))

    def on_message_complete(self) -> None:
        """End the exchange, unless the answer was only provisional."""
        if self.status < HTTPStatus.OK:  # "100 Continue" and its like announce another one
            self.status, self._has_length = 0, False
            return
        self.complete, self.end_ns = True, self._now_ns
        self.keep_alive = self._parser.should_keep_alive()

    def body(self) -> bytes:
        """The whole body."""
        return b"".join(piece for _, piece in self.pieces)

    def http_error(self) -> str | None:
        """Why the exchange failed, in the server's words where there are some; ``None`` when it did not."""
        if self.error is not None:
            return self.error
        if self.status == HTTPStatus.OK:
            return None
        return f"HTTP {self.status}: {error_message(self.body())}"


class Connection:
    """One TCP connection that is opened again when it was lost."""

    __slots__ = ("connecting", "exchange", "mask", "progress_ns", "socket", "unsent")

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.exchange: Exchange | None = None
        self.unsent: memoryview = memoryview(b"")
        self.connecting = False
        self.mask = 0
        self.progress_ns = 0

    def open(self, server: ServerAddress) -> None:
        """Begin to connect; the socket becomes writable when that is done.

        :raises OSError: refused at once.
        """
        self.close()
        self.socket = new_socket(server)
        self.connecting = True
        self.socket.setblocking(False)
        error = self.socket.connect_ex(server.address)
        if error not in (0, errno.EINPROGRESS):
            raise OSError(error, os.strerror(error))

    def receive(self) -> bytes | OSError | None:
        """Return bytes, none of them at the end of the stream, or the error, or ``None`` for nothing yet."""
        assert self.socket is not None
        try:
            return self.socket.recv(RECV_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            return error

    def is_lost(self) -> bool:
        """Whether the server has closed it, or sent what nobody asked for; only true between requests."""
        if self.socket is None:
            return True
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Close the socket, if there is one."""
        if self.socket is not None:
            self.socket.close()
        self.socket, self.connecting, self.unsent = None, False, memoryview(b"")


def new_socket(server: ServerAddress) -> socket.socket:
    """A TCP socket that sends small requests at once."""
    new = socket.socket(server.family, socket.SOCK_STREAM)
    new.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return new
