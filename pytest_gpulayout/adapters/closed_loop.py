"""The measured part of the load client: one batch, one thread, one selector, and what keeps that thread on time."""

from __future__ import annotations

import gc
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pytest_gpulayout.adapters.http_exchange import Connection, Exchange, ServerAddress
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.ports import Progress

_TICK_S = 0.25
_NS_PER_S = 1_000_000_000


class ClosedLoop:
    """Keeps every connection busy until no request is left: one thread, one selector, one batch."""

    def __init__(
        self,
        server: ServerAddress,
        connections: Sequence[Connection],
        exchanges: Sequence[Exchange],
        stall_s: float,
        progress: LimitedProgress,
        stage: str,
    ) -> None:
        self._server = server
        self._connections = connections
        self._waiting = deque(exchanges)
        self._stall_s = stall_s
        self._tick_s = min(_TICK_S, stall_s / 4)
        self._next_tick_ns = 0
        self._progress = progress
        self._stage = stage
        self._requests = len(exchanges)
        self._busy = 0
        self._ended = 0
        self._stalls_in_a_row = 0
        self._first_error: str | None = None
        self._selector: selectors.BaseSelector
        self.start_ns = self.end_ns = self.cpu_ns = 0
        self.wait_ns: int | None = None
        self.lag_max_ns = 0
        self.reconnects = 0

    def run(self) -> None:
        """Send everything; returns when the last answer has ended.

        :raises MeasurementError: the server went away.
        """
        with selectors.DefaultSelector() as self._selector:
            waited_ns, cpu_start_ns, self.start_ns = _cpu_wait_ns(), time.thread_time_ns(), time.monotonic_ns()
            try:
                self._start_all()
                self.lag_max_ns = time.monotonic_ns() - self.start_ns
                while self._busy:
                    self._turn()
            finally:
                for connection in self._connections:
                    connection.mask = 0
            self.end_ns, self.cpu_ns = time.monotonic_ns(), time.thread_time_ns() - cpu_start_ns
            if waited_ns is not None:
                self.wait_ns = (_cpu_wait_ns() or 0) - waited_ns

    def _start_all(self) -> None:
        for connection in self._connections:
            self._busy += 1
            self._start_next(connection)

    def _turn(self) -> None:
        """Wait once; read and stamp every socket that has data; only then look at what came."""
        ready = self._selector.select(self._tick_s)
        woke_ns = time.monotonic_ns()
        arrivals = [
            (key.data, key.data.receive(), time.monotonic_ns())
            for key, mask in ready
            if mask & selectors.EVENT_READ and not key.data.connecting
        ]
        for key, mask in ready:
            if mask & selectors.EVENT_WRITE or key.data.connecting:
                self._writable(key.data)
        for connection, data, now_ns in arrivals:
            self._received(connection, data, now_ns)
        self._keep_house(woke_ns)
        self.lag_max_ns = max(self.lag_max_ns, time.monotonic_ns() - woke_ns)

    def _keep_house(self, now_ns: int) -> None:
        if now_ns < self._next_tick_ns:
            return
        self._next_tick_ns = now_ns + int(self._tick_s * _NS_PER_S)
        self._fail_stalled(now_ns)
        self._progress.tell(f"{self._stage}, {self._ended}/{self._requests} requests, {self._rate(now_ns):.1f} req/s")

    def _rate(self, now_ns: int) -> float:
        return self._ended * _NS_PER_S / max(now_ns - self.start_ns, 1)

    def _start_next(self, connection: Connection) -> None:
        if not self._waiting:
            self._busy -= 1
            self._watch(connection, 0)
            return
        connection.exchange = self._waiting.popleft()
        if connection.is_lost():
            self._reopen(connection)
        else:
            self._begin_sending(connection)

    def _reopen(self, connection: Connection) -> None:
        self._watch(connection, 0)
        self.reconnects += 1
        connection.progress_ns = time.monotonic_ns()
        try:
            connection.open(self._server)
        except OSError as error:
            raise self._gone(f"cannot connect again: {error.strerror}") from error
        self._watch(connection, selectors.EVENT_WRITE)

    def _begin_sending(self, connection: Connection) -> None:
        assert connection.exchange is not None
        connection.unsent = memoryview(connection.exchange.payload)
        connection.exchange.send_ns = connection.progress_ns = time.monotonic_ns()
        self._send(connection)

    def _writable(self, connection: Connection) -> None:
        if connection.connecting:
            assert connection.socket is not None
            error = connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise self._gone(f"cannot connect again: {os.strerror(error)}")
            connection.connecting = False
            self._begin_sending(connection)
        elif connection.unsent:
            self._send(connection)

    def _send(self, connection: Connection) -> None:
        assert connection.socket is not None
        try:
            sent = connection.socket.send(connection.unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            # What the server had to say before it closed is still to be read, or the reset is read instead.
            sent = len(connection.unsent)
        else:
            connection.progress_ns = time.monotonic_ns()
        connection.unsent = connection.unsent[sent:]
        self._watch(connection, selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0))

    def _received(self, connection: Connection, data: bytes | OSError | None, now_ns: int) -> None:
        exchange = connection.exchange
        if data is None or exchange is None:
            return
        if isinstance(data, bytes) and data:
            connection.progress_ns = now_ns
            exchange.feed(now_ns, data)
            if exchange.pieces:  # a stuck engine's front end still sends headers
                self._stalls_in_a_row = 0
        else:
            how = f"broke the connection ({data.strerror})" if data else "closed the connection"
            exchange.end_of_stream(now_ns, f"the server {how}")
        if exchange.complete:
            self._ended_with(connection, exchange)

    def _ended_with(self, connection: Connection, exchange: Exchange) -> None:
        self._ended += 1
        if self._first_error is None:
            self._first_error = exchange.http_error()
        connection.exchange = None
        if not exchange.keep_alive or connection.unsent:
            self._watch(connection, 0)
            connection.close()
        self._start_next(connection)

    def _fail_stalled(self, now_ns: int) -> None:
        limit_ns = self._stall_s * _NS_PER_S
        for connection in self._connections:
            exchange = connection.exchange
            if exchange is None or now_ns - connection.progress_ns < limit_ns:
                continue
            seen = sum(len(piece) for _, piece in exchange.pieces)
            exchange.fail(now_ns, f"no progress for {self._stall_s:g} s, after {seen} bytes of the answer")
            self._stalls_in_a_row += 1
            if self._stalls_in_a_row > len(self._connections):
                raise self._gone(f"{self._stalls_in_a_row} requests in a row made no progress")
            self._ended_with(connection, exchange)

    def _gone(self, reason: str) -> MeasurementError:
        found = f"{reason}; {self._ended} requests had ended"
        if self._first_error is not None:
            found += f", the first failure was: {self._first_error}"
        advice = "see the end of the server's log for why it went away"
        return self._server.fault(f"{self._stage} needs a server that goes on answering", found, advice)

    def _watch(self, connection: Connection, mask: int) -> None:
        if connection.socket is None or mask == connection.mask:
            return
        if not mask:
            self._selector.unregister(connection.socket)
        elif connection.mask:
            self._selector.modify(connection.socket, mask, connection)
        else:
            self._selector.register(connection.socket, mask, connection)
        connection.mask = mask


class LimitedProgress:
    """Passes a line on at most a few times a second, over all batches together."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._next_ns = 0

    def tell(self, text: str) -> None:
        """Pass the line on, or drop it."""
        now_ns = time.monotonic_ns()
        if now_ns >= self._next_ns:
            self._next_ns = now_ns + int(_TICK_S * _NS_PER_S)
            self._progress(text)


def _cpu_wait_ns() -> int | None:
    """Time this thread has spent on a run queue (kernel ``Documentation/scheduler/sched-stats.rst``)."""
    try:
        with open("/proc/thread-self/schedstat", encoding="ascii") as stat:
            return int(stat.read().split()[1])
    except (OSError, IndexError, ValueError):
        return None


@contextmanager
def real_time() -> Iterator[str]:
    """Let this thread run before all ordinary ones, where that is allowed (``CAP_SYS_NICE``); yield the policy."""
    before, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    lowest = os.sched_param(os.sched_get_priority_min(os.SCHED_FIFO))
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, lowest)
    except OSError:  # not allowed, or a kernel without it: a poorer measurement, and the trace says so
        yield "SCHED_OTHER"
        return
    try:
        yield "SCHED_FIFO"
    finally:
        os.sched_setscheduler(0, before, parameter)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect once, then not at all; a collection in a large pytest process takes tens of milliseconds."""
    was_enabled, was_frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.collect()
    if not was_frozen:  # what somebody else froze must not be thawed here
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()
        if was_enabled:
            gc.enable()
