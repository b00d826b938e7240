"""One worker of the load client: its connections, and its share of each batch.

Knows what keeps a thread on time: its CPUs, its priority, no garbage collection. The same worker runs in the calling
process or, through :mod:`~pytest_gpulayout.adapters.load_process`, in one of its own.
"""

from __future__ import annotations

import gc
import os
import ssl
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pytest_gpulayout.adapters.answer_trace import Expectation, trace_of
from pytest_gpulayout.adapters.connection import Connection
from pytest_gpulayout.adapters.http_exchange import Exchange
from pytest_gpulayout.adapters.load_loop import LoadLoop, LoopPlan, Tally
from pytest_gpulayout.adapters.server_address import ServerAddress, tls_fault
from pytest_gpulayout.trace import ClientWork, RequestTrace

REQUEST_ID = "X-Request-Id"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """What stays the same for all batches.

    :param number: of the worker, from 0. :param connections: opened before each batch.
    :param may_add: whether more may be opened when requests are due.
    :param cpus: to run on, empty for wherever the kernel likes.
    """

    number: int
    connections: int
    may_add: bool
    path: str
    expected: Expectation
    stall_s: float
    connect_s: float
    cpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """One request. :param offset_ns: when it is due, from the batch's start; ``None`` when a place is free."""

    index: int
    request_id: str
    body: bytes
    offset_ns: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A worker's part of a batch. :param stage: what this is, for messages. :param jobs: in the order to send them.

    :param measured: whether this is the real thing, for which the thread gets priority.
    """

    stage: str
    batch: int
    jobs: Sequence[Job]
    measured: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareResult:
    """What became of a share. :param traces: in the order in which the answers ended.

    :param stamped_sends: requests of which the kernel said when they left.
    """

    traces: list[RequestTrace]
    start_ns: int
    end_ns: int
    reconnects: int
    stamped_sends: int
    work: ClientWork


class Worker:
    """Connections to one server, and what is sent over them."""

    def __init__(self, server: ServerAddress, plan: WorkerPlan) -> None:
        self._server = server
        self._plan = plan
        self._connections = [Connection() for _ in range(plan.connections)]

    def connect(self) -> None:
        """Open what is not open and let the server answer once on it.

        :raises MeasurementError: one of them failed.
        """
        # What open arrivals added beyond the plan is kept as long as it is alive.
        extra = self._connections[self._plan.connections :]
        self._connections[self._plan.connections :] = [c for c in extra if not c.is_lost()]
        lost = [connection for connection in self._connections if connection.is_lost()]
        for number, connection in enumerate(lost):
            try:
                connection.open_and_verify(self._server, self._plan.connect_s)
            except OSError as error:
                raise self._connect_fault(error, f"connection {number + 1} of {len(lost)}") from error

    def prepare(self, share: Share) -> deque[Exchange]:
        """Encode all requests of a share."""
        return deque(
            Exchange(
                self._server.encode("POST", self._plan.path, job.body, {REQUEST_ID: job.request_id}),
                job.index,
                job.request_id,
                job.offset_ns,
            )
            for job in share.jobs
        )

    def run(
        self,
        share: Share,
        exchanges: deque[Exchange],
        tell: Callable[[Tally], None],
        *,
        start_ns: int | None = None,
        owner: int | None = None,
    ) -> ShareResult:
        """Send a share and wait until every request of it has ended.

        :param exchanges: of :meth:`prepare`; emptied. :param start_ns: of the batch, ``None`` for now.
        :param owner: a file that becomes readable when the result is not wanted any more.
        :raises MeasurementError: the server went away.
        """
        loop = LoadLoop(
            self._server,
            self._connections,
            exchanges,
            LoopPlan(
                stage=share.stage,
                most_connections=None if self._plan.may_add and share.measured else len(self._connections),
                stall_s=self._plan.stall_s,
                start_ns=start_ns,
                owner=owner,
            ),
            lambda exchange: trace_of(exchange, self._plan.expected, batch=share.batch, worker=self._plan.number),
            tell,
        )
        if not share.measured:
            loop.run()
            return _result(loop, (), "SCHED_OTHER")
        with no_garbage_collection(), pinned(self._plan.cpus) as cpus, real_time() as scheduling:
            loop.run()
        return _result(loop, cpus, scheduling)

    def close(self) -> None:
        """Close all connections."""
        for connection in self._connections:
            connection.close()

    def _connect_fault(self, error: OSError, which: str) -> Exception:
        if isinstance(error, ssl.SSLError):
            return tls_fault(self._server.endpoint, error)
        return self._server.fault(
            f"{len(self._connections)} connections to the server are needed",
            f"{which} failed: {error}",
            "check that the server runs, and `ulimit -n` for many connections",
        )


def _result(loop: LoadLoop, cpus: tuple[int, ...], scheduling: str) -> ShareResult:
    work = ClientWork(
        events=loop.events,
        unstamped=loop.unstamped,
        cpu_ns=loop.cpu_ns,
        wait_ns=loop.wait_ns,
        lag_max_ns=loop.lag_max_ns,
        read_lag_ns=loop.read_lags.summary(),
        send_lag_ns=loop.send_lags.summary(),
        cpus=cpus,
        scheduling=scheduling,
    )
    return ShareResult(
        traces=loop.traces,
        start_ns=loop.start_ns,
        end_ns=loop.end_ns,
        reconnects=loop.reconnects,
        stamped_sends=loop.stamped_sends,
        work=work,
    )


@contextmanager
def pinned(cpus: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Keep this thread on these CPUs; yield those it is on by that, none where it was not asked or not allowed."""
    before = os.sched_getaffinity(0)
    try:
        if cpus:
            os.sched_setaffinity(0, cpus)
    except OSError:  # CPUs of another container: a poorer measurement, and the trace says so
        yield ()
        return
    try:
        yield tuple(sorted(os.sched_getaffinity(0))) if cpus else ()
    finally:
        os.sched_setaffinity(0, before)


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
