"""The measured part of the load client: one batch, one thread, one ``epoll``.

A turn waits once, reads and stamps every connection that has data, and only then sends what is due: by the
timetable, or because an answer ended and its place is free. Of an answer nothing but its end is looked at. What it
said is read when nothing else is to do (or when too many raw bytes have piled up, or at the end), and only the
small result is kept, so that an hour needs no more memory than its instants: 8 bytes for each message, and the text.

Knows when to do what. Leaves framing, sockets, stamps and the meaning of answers to the modules beside it.
"""

from __future__ import annotations

import select
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

from pytest_gpulayout.adapters.connection import RECV_BYTES, Connection
from pytest_gpulayout.adapters.http_exchange import Exchange
from pytest_gpulayout.adapters.kernel_time import ANCILLARY_BYTES, Alarm, KernelTime
from pytest_gpulayout.adapters.server_address import ServerAddress
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.trace import RequestTrace

RAW_BYTES_CAP = 64 << 20
"""Most bytes of ended answers that wait to be read."""

_TICK_S = 0.25
_NS_PER_S = 1_000_000_000
# A burst of requests must not keep answers waiting for longer than the gap between two messages.
_SENDS_PER_TURN = 64
# Where messages come faster than this, one wake-up for each would cost more than all the rest, and take the server's
# CPU from it as often. It is far below the gap between two messages of one answer.
_NAP_NS = 200_000
_MANY = 64
_READABLE = select.EPOLLIN | select.EPOLLHUP
_FOLD = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopPlan:
    """What one loop is to do, beside its requests.

    :param stage: what this is, for messages. :param most_connections: ``None`` for open arrivals without a limit.
    :param stall_s: a request without progress for so long has failed.
    :param start_ns: instant of the first request, ``None`` for now; requests are due so long after it as their
        ``intended_ns`` says. :param owner: a file that becomes readable when nobody wants the answer any more.
    """

    stage: str
    most_connections: int | None
    stall_s: float
    start_ns: int | None = None
    owner: int | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """How far a loop is: what has happened since it last told. :param ended: requests.

    :param ttft_ns: of the answers that were read. :param tpot_ns: likewise.
    """

    ended: int = 0
    ttft_ns: list[float] = field(default_factory=list)
    tpot_ns: list[float] = field(default_factory=list)


class OwnerGone(Exception):
    """Nobody waits for the result any more."""


class LoadLoop:
    """Sends requests over connections and receives the answers; used once.

    :param connections: open ones; more are added for open arrivals that find none free.
    :param exchanges: in the order to send them; it is emptied, so that nobody keeps what has been read.
    :param read_answer: turns an exchange that has ended into its trace.
    :param tell: called a few times a second.
    """

    def __init__(
        self,
        server: ServerAddress,
        connections: list[Connection],
        exchanges: deque[Exchange],
        plan: LoopPlan,
        read_answer: Callable[[Exchange], RequestTrace],
        tell: Callable[[Tally], None],
    ) -> None:
        self._server = server
        self._connections = connections
        self._waiting = exchanges
        self._plan = plan
        self._read_answer = read_answer
        self._tell = tell
        self._free: deque[Connection] = deque()
        self._by_fd: dict[int, Connection] = {}
        self._in_flight = self._ended = self._told = 0
        self._finished: deque[tuple[Exchange, int]] = deque()
        self._raw_bytes = 0
        self._news = Tally()
        self._stalls_in_a_row = 0
        self._is_crowded = False
        self._first_error: str | None = None
        self._tick_s = min(_TICK_S, plan.stall_s / 4)
        self._next_tick_ns = self._busy_since_ns = 0
        self._clock = KernelTime()
        self._room = (bytearray(RECV_BYTES),)
        self._room_view = memoryview(self._room[0])
        self._epoll: select.epoll
        self._alarm: Alarm
        self.traces: list[RequestTrace] = []
        self.start_ns = self.end_ns = self.cpu_ns = self.lag_max_ns = 0
        self.wait_ns: int | None = None
        self.events = self.unstamped = self.stamped_sends = self.reconnects = 0
        self.read_lags, self.send_lags = Lags(), Lags()

    def run(self) -> None:
        """Send everything; returns when the last answer has ended and all have been read.

        :raises MeasurementError: the server went away. :raises OwnerGone: the owner did.
        """
        with self._files():
            self._wait_for_the_start()
            waited_ns, cpu_start_ns = _cpu_wait_ns(), time.thread_time_ns()
            self._free.extend(self._connections)
            while self._waiting or self._in_flight:
                self._turn()
            self.cpu_ns = time.thread_time_ns() - cpu_start_ns
            if waited_ns is not None:
                self.wait_ns = (_cpu_wait_ns() or 0) - waited_ns
        while self._finished:
            self._read_one_answer()

    @contextmanager
    def _files(self) -> Iterator[None]:
        self._alarm = Alarm()
        try:
            with select.epoll() as self._epoll:
                self._epoll.register(self._alarm, select.EPOLLIN)
                if self._plan.owner is not None:
                    self._epoll.register(self._plan.owner, select.EPOLLIN)
                yield
        finally:
            self._alarm.close()
            for connection in self._connections:
                connection.mask = connection.free_ns = 0
                connection.exchange = None

    def _wait_for_the_start(self) -> None:
        start_ns = self._plan.start_ns
        while start_ns is not None and time.monotonic_ns() < start_ns:
            self._alarm.ring_at(start_ns)
            self._notice(fd for fd, _ in self._epoll.poll(self._tick_s))
        self.start_ns = self.end_ns = self._busy_since_ns = start_ns or time.monotonic_ns()
        for exchange in self._waiting:
            if exchange.intended_ns is not None:
                exchange.intended_ns += self.start_ns

    def _turn(self) -> None:
        """Send what is due, wait once, read and stamp everything that came, and do the rest after that."""
        more_is_due = self._send_due()
        has_answers = bool(self._finished) and self._kernel_stamps()
        if has_answers and self._is_crowded and not more_is_due:
            self._read_one_answer()
        idle_ns = time.monotonic_ns()
        if idle_ns - self._busy_since_ns > self.lag_max_ns:
            self.lag_max_ns = idle_ns - self._busy_since_ns
        if self._is_crowded and not more_is_due and not has_answers:
            self._nap(idle_ns)
        ready = self._epoll.poll(0 if more_is_due or has_answers else self._tick_s)
        now_ns = self._clock.follow()
        # With many at a time there is no time to lose; with one now and then, none to gain.
        self._is_crowded = 1 < len(ready) < _MANY or now_ns - self._busy_since_ns < _NAP_NS
        self._busy_since_ns = now_ns
        if ready:
            self._receive(ready)
        elif has_answers and not more_is_due and self._finished:
            self._read_one_answer()
        if now_ns >= self._next_tick_ns:
            self._next_tick_ns = now_ns + int(self._tick_s * _NS_PER_S)
            self._fail_stalled(now_ns)
            self._tell_news()

    def _kernel_stamps(self) -> bool:
        """Whether the kernel takes the instants, so that none is moved by what is done meanwhile."""
        return self.unstamped * 2 <= self.events

    def _nap(self, now_ns: int) -> None:
        """Let arrivals gather, so that one wake-up serves several of them; never beyond the next due request."""
        if not self._kernel_stamps():
            return
        nap_ns = _NAP_NS
        if self._waiting and (intended_ns := self._waiting[0].intended_ns) is not None:
            nap_ns = min(nap_ns, intended_ns - now_ns)
        if nap_ns > 0:
            time.sleep(nap_ns / _NS_PER_S)

    # Sending

    def _send_due(self) -> bool:
        """Send what is due and has a place; return whether there may be more of it."""
        for _ in range(_SENDS_PER_TURN):
            if not self._waiting:
                return False
            intended_ns = self._waiting[0].intended_ns
            if intended_ns is not None and intended_ns > time.monotonic_ns():
                self._alarm.ring_at(intended_ns)
                return False
            if (connection := self._place()) is None:
                return False
            self._begin(connection, self._waiting.popleft())
        return True

    def _place(self) -> Connection | None:
        """Return the connection that is free for the longest time, or a new one where that is allowed."""
        if self._free:
            return self._free.popleft()
        if self._plan.most_connections is not None:
            return None
        self._connections.append(Connection())
        return self._connections[-1]

    def _begin(self, connection: Connection, exchange: Exchange) -> None:
        self._in_flight += 1
        connection.exchange = exchange
        exchange.due_ns = exchange.intended_ns
        if exchange.intended_ns is None:
            exchange.due_ns = connection.free_ns or None
        elif self._plan.most_connections is not None and connection.free_ns > exchange.intended_ns:
            # The longest-free place was not free yet when the request was due: none was.
            exchange.due_ns, exchange.queued_ns = connection.free_ns, connection.free_ns - exchange.intended_ns
        if connection.is_lost():
            self._reopen(connection)
        else:
            self._send_request(connection, exchange)

    def _reopen(self, connection: Connection) -> None:
        self.reconnects += connection.times_opened > 0
        self._drop(connection)
        connection.opening_ns = connection.progress_ns = time.monotonic_ns()
        try:
            connection.begin_to_open(self._server)
        except OSError as error:
            raise self._gone(f"cannot connect again: {error.strerror}") from error
        self._watch(connection, select.EPOLLOUT)

    def _send_request(self, connection: Connection, exchange: Exchange) -> None:
        payload = exchange.payload if connection.tls is None else connection.tls.encrypt(exchange.payload)
        exchange.payload = b""
        connection.unsent = memoryview(bytes(connection.unsent) + payload if connection.unsent else payload)
        now_ns = time.monotonic_ns()
        exchange.send_ns = connection.stamp_ns = connection.progress_ns = now_ns
        self._send(connection)
        if connection.opening_ns:
            exchange.connect_ns, connection.opening_ns = now_ns - connection.opening_ns, 0
        if exchange.due_ns is not None:
            self.send_lags.add(max(0, now_ns - exchange.due_ns - exchange.connect_ns))

    def _send(self, connection: Connection) -> None:
        assert connection.socket is not None
        assert connection.exchange is not None
        try:
            sent = connection.socket.send(connection.unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            # What the server had to say before it closed is still to be read, or the reset is read instead.
            sent = len(connection.unsent)
        else:
            connection.sent_bytes += sent
            connection.progress_ns = time.monotonic_ns()
            if connection.exchange.send_ns:
                connection.exchange.sent_ns = connection.progress_ns
        connection.unsent = connection.unsent[sent:]
        self._watch(connection, select.EPOLLIN | (select.EPOLLOUT if connection.unsent else 0))

    # Receiving

    def _receive(self, ready: Sequence[tuple[int, int]]) -> None:
        later = []
        for fd, mask in ready:
            connection = self._by_fd.get(fd)
            if connection is None:
                self._notice((fd,))
            elif mask == select.EPOLLIN:
                self._read(connection)
            elif mask & _READABLE and not connection.connecting:
                self._take_sent_stamp(connection)
                self._read(connection)
                later.append((connection, mask))
            else:
                later.append((connection, mask))
        for connection, mask in later:
            self._writable_or_stamped(connection, mask)

    def _read(self, connection: Connection) -> None:
        """Read once and stamp; this is what every message goes through."""
        exchange = connection.exchange
        if exchange is None or connection.handshaking:
            self._read_aside(connection)
            return
        try:
            size, ancillary, _, _ = connection.recvmsg_into(self._room, ANCILLARY_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(connection, exchange, f"broke the connection ({error.strerror})")
            return
        now_ns = connection.progress_ns = time.monotonic_ns()
        # A copy of the right size: what recvmsg() cuts down from a large one leaves holes that fit nothing.
        data = bytes(self._room_view[:size])
        stamp_ns = self._clock.arrival(ancillary, connection.stamp_ns, now_ns) if size else now_ns
        self.events += 1
        if stamp_ns is None:
            stamp_ns = now_ns
            self.unstamped += 1
        elif ancillary:
            self.read_lags.add(now_ns - stamp_ns)
        connection.stamp_ns = stamp_ns
        if exchange.status:  # there was a head before this; a stuck engine's front end still sends one
            self._stalls_in_a_row = 0
        if connection.tls is not None or not data:
            self._take_or_close(connection, exchange, data)
        elif exchange.take(stamp_ns, data):
            self._ended_with(connection, exchange)

    def _take_or_close(self, connection: Connection, exchange: Exchange, data: bytes) -> None:
        """Take what lies in TLS records, or the end of the stream."""
        plain: bytes | None = None
        if data and connection.tls is not None:
            try:
                plain = connection.tls.decrypt(data)
            except OSError as error:
                self._lost(connection, exchange, f"broke TLS ({error.args[-1]})")
                return
        if plain is None:
            self._lost(connection, exchange, "closed the connection")
        elif plain and exchange.take(connection.stamp_ns, plain):
            self._ended_with(connection, exchange)

    def _read_aside(self, connection: Connection) -> None:
        """Read what is no answer: the server's part of a handshake, or the end of an idle connection."""
        if not connection.handshaking:
            if connection.socket is not None and connection.is_lost():
                self._drop(connection)
                self._free.remove(connection)
                self._free.append(connection)  # connections that are still open go first
            return
        assert connection.socket is not None
        try:
            data = connection.socket.recv(RECV_BYTES)
            if not data:
                raise self._gone("cannot connect again: the server closed the connection in the TLS handshake")
            connection.shake_hands(data)
        except BlockingIOError:
            return
        except OSError as error:
            raise self._gone(f"cannot connect again: {error.args[-1]}") from error
        self._go_on(connection)

    def _writable_or_stamped(self, connection: Connection, mask: int) -> None:
        if connection.socket is None:
            return
        if connection.connecting:
            try:
                connection.connected()
            except OSError as error:
                raise self._gone(f"cannot connect again: {error.args[-1]}") from error
            self._go_on(connection)
            return
        if mask & select.EPOLLERR:
            self._take_sent_stamp(connection)
        if mask & select.EPOLLOUT and connection.unsent and connection.exchange is not None:
            self._send(connection)

    def _go_on(self, connection: Connection) -> None:
        """Send the request once its connection is there, or the next part of a handshake."""
        exchange = connection.exchange
        assert exchange is not None
        if connection.connecting or connection.handshaking:
            self._send(connection)
        else:
            self._send_request(connection, exchange)

    def _take_sent_stamp(self, connection: Connection) -> None:
        exchange = connection.exchange
        floor_ns = exchange.send_ns if exchange is not None else 0
        assert connection.socket is not None
        stamp_ns = self._clock.sent_stamp(connection.socket, connection.sent_bytes - 1, floor_ns)
        if stamp_ns is not None and exchange is not None and exchange.send_ns and not connection.unsent:
            self.stamped_sends += not exchange.kernel_sent
            exchange.sent_ns, exchange.kernel_sent = stamp_ns, True

    def _notice(self, files: Iterator[int] | Sequence[int]) -> None:
        """Look at files that are no connections; the alarm has done its work by waking up."""
        for fd in files:
            if fd == self._plan.owner:
                raise OwnerGone
            if fd == self._alarm.fileno():
                self._alarm.ring_at(0)

    # The ends of requests

    def _lost(self, connection: Connection, exchange: Exchange, how: str) -> None:
        exchange.end_of_stream(time.monotonic_ns(), f"the server {how}")
        self._ended_with(connection, exchange)

    def _ended_with(self, connection: Connection, exchange: Exchange) -> None:
        self._ended += 1
        self._in_flight -= 1
        self.end_ns = max(self.end_ns, exchange.end_ns)
        if self._first_error is None and (exchange.error or exchange.status != HTTPStatus.OK):
            self._first_error = exchange.http_error()
        connection.exchange = None
        connection.free_ns = exchange.end_ns
        if not exchange.keep_alive or connection.unsent:
            self._drop(connection)
        self._free.append(connection)
        size = exchange.received
        self._finished.append((exchange, size))
        self._raw_bytes += size
        while self._raw_bytes > RAW_BYTES_CAP:
            self._read_one_answer()

    def _read_one_answer(self) -> None:
        exchange, size = self._finished.popleft()
        self._raw_bytes -= size
        trace = self._read_answer(exchange)
        self.traces.append(trace)
        if trace.ok:
            self._news.ttft_ns.append(trace.ttft_ns)
            if (tpot_ns := trace.tpot_ns) is not None:
                self._news.tpot_ns.append(tpot_ns)
        self.read_lags.fold()
        self.send_lags.fold()

    def _fail_stalled(self, now_ns: int) -> None:
        limit_ns = self._plan.stall_s * _NS_PER_S
        for connection in list(self._connections):
            exchange = connection.exchange
            if exchange is None or now_ns - connection.progress_ns < limit_ns:
                continue
            seen = f"after {exchange.body_bytes()} bytes of the answer"
            exchange.fail(now_ns, f"no progress for {self._plan.stall_s:g} s, {seen}")
            self._stalls_in_a_row += 1
            if self._stalls_in_a_row > len(self._connections):
                raise self._gone(f"{self._stalls_in_a_row} requests in a row made no progress")
            self._ended_with(connection, exchange)

    def _tell_news(self) -> None:
        news, self._news = self._news, Tally()
        self._tell(Tally(self._ended - self._told, news.ttft_ns, news.tpot_ns))
        self._told = self._ended

    def _gone(self, reason: str) -> MeasurementError:
        found = f"{reason}; {self._ended} requests had ended"
        if self._first_error is not None:
            found += f", the first failure was: {self._first_error}"
        advice = "see the end of the server's log for why it went away"
        return self._server.fault(f"{self._plan.stage} needs a server that goes on answering", found, advice)

    # What epoll is told

    def _watch(self, connection: Connection, mask: int) -> None:
        if connection.socket is None or mask == connection.mask:
            return
        if connection.mask:
            self._epoll.modify(connection.socket, mask)
        else:
            self._epoll.register(connection.socket, mask)
            self._by_fd[connection.socket.fileno()] = connection
        connection.mask = mask

    def _drop(self, connection: Connection) -> None:
        if connection.mask and connection.socket is not None:
            self._by_fd.pop(connection.socket.fileno(), None)
            self._epoll.unregister(connection.socket)
        connection.mask = 0
        connection.close()


class Lags:
    """Many durations in little memory, true to 1.6 %."""

    __slots__ = ("_counts", "_fresh", "_max", "add")

    def __init__(self) -> None:
        self._fresh: array[int] = array("q")
        self._counts: Counter[int] = Counter()
        self._max = 0
        self.add = self._fresh.append

    def fold(self, *, at_least: int = _FOLD) -> None:
        """Make durations that were added one by one small."""
        if self._fresh and len(self._fresh) >= at_least:
            self._max = max(self._max, max(self._fresh))
            self._counts.update(value >> (shift := max(value.bit_length() - 6, 0)) << shift for value in self._fresh)
            del self._fresh[:]

    def summary(self) -> tuple[int, int, int] | None:
        """Return (p50, p99, max) in ns, ``None`` when there are none."""
        self.fold(at_least=1)
        total = sum(self._counts.values())
        if not total:
            return None
        return self._quantile(0.5 * total), self._quantile(0.99 * total), self._max

    def _quantile(self, rank: float) -> int:
        seen = 0
        for value, count in sorted(self._counts.items()):
            seen += count
            if seen >= rank:
                return value
        return self._max


def _cpu_wait_ns() -> int | None:
    """Time this thread has spent on a run queue (kernel ``Documentation/scheduler/sched-stats.rst``)."""
    try:
        with open("/proc/thread-self/schedstat", encoding="ascii") as stat:
            return int(stat.read().split()[1])
    except (OSError, IndexError, ValueError):
        return None
