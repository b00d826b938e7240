"""The connection that requests travel on: TCP, with TLS on top where the URL says so, never waiting once it is open.

Knows sockets and :mod:`ssl`. Leaves what is said over them to :mod:`~pytest_gpulayout.adapters.http_exchange`, and
when, to :mod:`~pytest_gpulayout.adapters.load_loop`.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Callable, Sequence

from pytest_gpulayout.adapters.http_exchange import Exchange
from pytest_gpulayout.adapters.kernel_time import Ancillary, request_stamps
from pytest_gpulayout.adapters.server_address import ServerAddress, trusted

RECV_BYTES = 1 << 14
"""Most bytes of one read: many messages, so that one read takes what one arrival brought."""


class Connection:
    """One connection that can be opened again when it was lost.

    :param free_ns: when its last answer ended; 0 if there was none in this batch.
    :param stamp_ns: the latest instant that is known of it; what is read next cannot have arrived before.
    :param progress_ns: when anything last moved. :param opening_ns: when it began to connect.
    :param sent_bytes: since the kernel was asked for stamps. :param times_opened: also in vain.
    """

    __slots__ = (
        *("socket", "recvmsg_into", "tls", "exchange", "unsent", "sent_bytes", "connecting", "handshaking"),
        *("mask", "progress_ns", "opening_ns", "free_ns", "stamp_ns", "times_opened"),
    )

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.recvmsg_into: Callable[[Sequence[bytearray], int], tuple[int, Ancillary, int, object]]
        self.tls: TlsChannel | None = None
        self.exchange: Exchange | None = None
        self.unsent: memoryview = memoryview(b"")
        self.connecting = self.handshaking = False
        self.sent_bytes = self.mask = self.progress_ns = self.opening_ns = self.free_ns = self.stamp_ns = 0
        self.times_opened = 0

    def open_and_verify(self, server: ServerAddress, timeout_s: float) -> None:
        """Connect and let the server answer once; waits.

        :raises OSError: no connection, or nothing that could be trusted (:class:`ssl.SSLError`).
        :raises MeasurementError: an answer that was no success.
        """
        self._create(server)
        assert self.socket is not None
        self.socket.settimeout(timeout_s)
        self.socket.connect(server.address)
        exchange = Exchange(server.encode("GET", "/v1/models"))
        if self.tls is not None:
            while not self.tls.handshake():
                self.socket.sendall(self.tls.outgoing())
                self.tls.incoming(self._receive_or_fail())
            exchange.payload = self.tls.outgoing() + self.tls.encrypt(exchange.payload)
        self.socket.sendall(exchange.payload)
        while not exchange.complete:
            data = self.socket.recv(RECV_BYTES)
            plain = self.tls.decrypt(data) if self.tls is not None and data else data
            if plain:
                exchange.take(0, plain)
            elif plain is None or not data:
                exchange.end_of_stream(0, "the server closed the connection")
        self.socket.setblocking(False)
        request_stamps(self.socket)
        if (error := exchange.http_error()) is not None:
            raise server.fault(
                "the server must answer GET /v1/models on every connection",
                error,
                "check URL and API key; a server that has just started may not be ready",
            )

    def begin_to_open(self, server: ServerAddress) -> None:
        """Begin to connect; the socket becomes writable when that is done.

        :raises OSError: refused at once.
        """
        self._create(server)
        assert self.socket is not None
        self.connecting = True
        self.socket.setblocking(False)
        error = self.socket.connect_ex(server.address)
        if error not in (0, errno.EINPROGRESS):
            raise OSError(error, os.strerror(error))

    def connected(self) -> None:
        """Go on after the socket became writable; a TLS handshake may follow.

        :raises OSError: the connection was refused.
        """
        assert self.socket is not None
        if error := self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))
        self.connecting = False
        request_stamps(self.socket)
        if self.tls is not None:
            self.handshaking = True
            self.shake_hands(b"")

    def shake_hands(self, data: bytes) -> None:
        """Take a step of the TLS handshake; :attr:`unsent` then is what must be sent.

        :raises OSError: it failed.
        """
        assert self.tls is not None
        self.tls.incoming(data)
        self.handshaking = not self.tls.handshake()
        self.unsent = memoryview(bytes(self.unsent) + self.tls.outgoing())

    def is_lost(self) -> bool:
        """Whether the server has closed it, or sent what nobody asked for; only true between requests."""
        if self.socket is None:
            return True
        try:
            data = self.socket.recv(1 if self.tls is None else RECV_BYTES, 0 if self.tls else socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        try:  # a TLS server may send tickets and keys at any time, which are no data
            return self.tls is None or not data or self.tls.decrypt(data) != b""
        except ssl.SSLError:
            return True

    def close(self) -> None:
        """Close the socket, if there is one."""
        if self.socket is not None:
            self.socket.close()
        self.socket, self.tls, self.connecting, self.handshaking = None, None, False, False
        self.unsent = memoryview(b"")

    def _create(self, server: ServerAddress) -> None:
        self.close()
        self.times_opened += 1
        self.socket = socket.socket(server.family, socket.SOCK_STREAM)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small requests leave at once
        self.recvmsg_into = self.socket.recvmsg_into
        self.sent_bytes = 0
        self.tls = TlsChannel(trusted(), server.host) if server.tls else None

    def _receive_or_fail(self) -> bytes:
        assert self.socket is not None
        if not (data := self.socket.recv(RECV_BYTES)):
            raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection in the TLS handshake")
        return data


class TlsChannel:
    """TLS between bytes and bytes, so that the socket stays ours and its stamps are those of the records."""

    __slots__ = ("_from_server", "_tls", "_to_server")

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._from_server, self._to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._from_server, self._to_server, server_hostname=host)

    def incoming(self, data: bytes) -> None:
        """Take what the server sent."""
        self._from_server.write(data)

    def outgoing(self) -> bytes:
        """Return what must be sent to the server."""
        return self._to_server.read()

    def handshake(self) -> bool:
        """Go on with the handshake; return whether it is done.

        :raises ssl.SSLError: it failed; :meth:`outgoing` is what to tell the server.
        """
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def encrypt(self, data: bytes) -> bytes:
        """Return data as the server will understand it."""
        self._tls.write(data)
        return self.outgoing()

    def decrypt(self, data: bytes) -> bytes | None:
        """Return what the server said with these bytes, ``b""`` if that is not whole yet, ``None`` at its end.

        :raises ssl.SSLError: they are not TLS.
        """
        self._from_server.write(data)
        plain: list[bytes] = []
        while True:
            try:
                piece = self._tls.read(RECV_BYTES)
            except ssl.SSLWantReadError:
                return b"".join(plain)
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                piece = b""
            if not piece:
                # What was said before the end counts; the end itself is seen again when the socket closes.
                return b"".join(plain) or None
            plain.append(piece)
