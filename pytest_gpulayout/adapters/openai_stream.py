"""Sends a workload to an OpenAI-compatible server, and stamps everything that comes back.

Made so that the client is never the suspect: prompts, request bodies and connections exist before the clock
starts; the kernel says when bytes arrived and left, where it can; one thread waits for all sockets at once and of the
answers only looks for the end while others are in flight; with many connections several processes share them.
Nothing is sent twice: a request that fails is a trace with an error.

On a host whose CPUs are all busy with the server, a client of ordinary priority may not run for the length of whole
answers (seen on 2 CPUs with vLLM's CPU build: every chunk of an answer got one stamp). So the thread takes the lowest
real-time priority while a batch runs, where it may, and the time it waited for a CPU is recorded either way.

What a run needs in memory: the bodies of its requests (about 6 bytes for each prompt token) from before the first
batch on, the raw bytes of the answers in flight and of up to 64 MiB that ended, and of each answer its text, 16 bytes
for each message and 1 to 2 kB. In answers of 64 tokens a million messages came to 38 MB, all of that included.

Knows the order of things. Leaves what a request says to :mod:`~pytest_gpulayout.adapters.prompts`, and one worker's
work to :mod:`~pytest_gpulayout.adapters.load_worker`. Proxies of the environment are not used; they would be
measured.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Protocol

from pytest_gpulayout.adapters.answer_trace import Expectation
from pytest_gpulayout.adapters.load_loop import Tally
from pytest_gpulayout.adapters.load_process import WorkerProcesses
from pytest_gpulayout.adapters.load_worker import Job, Share, ShareResult, Worker, WorkerPlan
from pytest_gpulayout.adapters.prompts import RequestSource, request_source
from pytest_gpulayout.adapters.server_address import Asker, ServerAddress, locate
from pytest_gpulayout.arrivals import arrival_offsets_ns
from pytest_gpulayout.ports import Endpoint, Progress
from pytest_gpulayout.trace import BatchTrace, RunTrace
from pytest_gpulayout.workload import Workload

CONNECTIONS_PER_PROCESS = 512
"""A second worker process starts to pay off beyond so many, where there is a core for it."""

_MOST_OPENED_BEFORE = 1024
_PROGRESS_NS = 250_000_000
_RECENT = 512
_TWO_DIGITS = 10.0
_NS_PER_S = 1e9
_NS_PER_MS = 1e6


class OpenAiStreamDriver:
    """A load generator over ``POST /v1/completions`` or ``/v1/chat/completions`` with streamed answers.

    Implements :class:`pytest_gpulayout.ports.LoadDriver`.

    :param stall_timeout_s: a request without a byte of progress for so long has failed. vLLM gives up on a
        stuck engine after 300 s itself (``VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS``) and then tells the cause.
    :param connect_timeout_s: for opening a connection and for the small requests before the clock starts.
    :param processes: worker processes; ``None`` for one in each 512 connections, as far as there are cores.
    :param cpus: to keep the client's threads on while a batch runs; ``None`` to leave that to the kernel.
    """

    def __init__(
        self,
        *,
        stall_timeout_s: float = 330.0,
        connect_timeout_s: float = 10.0,
        processes: int | None = None,
        cpus: Collection[int] | None = None,
    ) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._processes = processes
        self._cpus = tuple(sorted(cpus or ()))

    def run(
        self,
        endpoint: Endpoint,
        workload: Workload,
        *,
        seed: int,
        progress: Progress,
        window: AbstractContextManager[object] | None = None,
    ) -> RunTrace:
        """Warm up, then send all batches of the workload.

        :param seed: of the prompts and the arrivals; a new one for each run, so that no prefix cache can answer.
        :param window: entered after the warm-up, when nothing is in flight, and left after the last batch.
        :raises MeasurementError: the server cannot be reached or spoken to, a warm-up request failed, all
            requests of a batch failed, or the server or a worker went away.
        """
        started_s = time.time()
        server = locate(endpoint, self._connect_timeout_s)
        with ExitStack() as stack:
            asker = Asker(server, self._connect_timeout_s)
            stack.callback(asker.close)
            source = request_source(asker.post, endpoint.model, workload, seed)
            crew = self._crew(server, workload, source)
            stack.callback(crew.close)
            load = _Load(server, workload, source, crew, seed, progress)
            load.warm_up()
            with window or nullcontext():
                for index in range(workload.batches):
                    load.measure(index)
        return load.result(started_s)

    def _crew(self, server: ServerAddress, workload: Workload, source: RequestSource) -> _Crew:
        connections = min(workload.in_flight, _MOST_OPENED_BEFORE) if _may_add(workload) else workload.in_flight
        cores = len(self._cpus) or _free_cores(server)
        wanted = self._processes or min(-(-connections // CONNECTIONS_PER_PROCESS), cores)
        count = max(1, min(wanted, connections))
        plans = [
            WorkerPlan(
                number=number,
                connections=len(range(number, connections, count)),
                may_add=_may_add(workload),
                path=source.path,
                expected=Expectation(
                    output_tokens=workload.output_tokens,
                    exact_output=workload.expects_exact_output,
                    prompt_tokens=source.prompt_tokens,
                ),
                stall_s=self._stall_timeout_s,
                connect_s=self._connect_timeout_s,
                cpus=self._cpus[number::count] or self._cpus,
            )
            for number in range(count)
        ]
        return _Alone(server, plans[0]) if count == 1 else WorkerProcesses(server, plans)


def _may_add(workload: Workload) -> bool:
    """Whether requests that are due may open more connections than there are."""
    return workload.is_open and workload.concurrency is None


def _free_cores(server: ServerAddress) -> int:
    """Cores for the client; a server on this host needs the other half."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // 2) if server.is_local else cores


class _Crew(Protocol):
    """The workers of a run."""

    def connect(self) -> None: ...

    def run(self, shares: Sequence[Share], tell: Callable[[Tally], None]) -> list[ShareResult]: ...

    def close(self) -> None: ...


class _Alone:
    """One worker in this process."""

    def __init__(self, server: ServerAddress, plan: WorkerPlan) -> None:
        self._worker = Worker(server, plan)
        self.connect = self._worker.connect
        self.close = self._worker.close

    def run(self, shares: Sequence[Share], tell: Callable[[Tally], None]) -> list[ShareResult]:
        (share,) = shares
        return [self._worker.run(share, self._worker.prepare(share), tell)]


class _Load:
    """One run: what is sent, batch after batch, and what came of it."""

    def __init__(
        self,
        server: ServerAddress,
        workload: Workload,
        source: RequestSource,
        crew: _Crew,
        seed: int,
        progress: Progress,
    ) -> None:
        self._server = server
        self._workload = workload
        self._source = source
        self._crew = crew
        self._seed = seed
        self._progress = _LimitedProgress(progress)
        self._workers = len(crew.pids) if isinstance(crew, WorkerProcesses) else 1
        self._timetables = [
            arrival_offsets_ns(workload, seed=seed + index) if workload.is_open else None
            for index in range(workload.batches)
        ]
        # All before the first connection is opened: it must not idle until the server closes it.
        self._warmup_jobs = self._jobs("w", range(workload.warmup_requests), None)
        self._batch_jobs = deque(
            self._jobs("", range(batch * workload.requests, (batch + 1) * workload.requests), timetable)
            for batch, timetable in enumerate(self._timetables)
        )
        self._batches: list[BatchTrace] = []
        self._stamped_sends = 0

    def warm_up(self) -> None:
        """Open all connections, then send one wave that is not measured.

        :raises MeasurementError: with the server's own words when a request failed.
        """
        self._crew.connect()
        jobs, self._warmup_jobs = self._warmup_jobs, []
        if not (count := len(jobs)):
            return
        stage = f"{self._workload.name}: warm-up"
        results = self._run(jobs, stage, 0, _Forecast(f"{stage},", count, None, self._progress), measured=False)
        errors = [trace.error for result in results for trace in result.traces if trace.error is not None]
        if errors:
            raise self._server.fault(
                f"workload {self._workload.name} needs a server that answers its warm-up requests",
                f"{len(errors)} of {count} failed, the first with: {errors[0]}",
                "see the server's log; the workload's sizes must fit the server's --max-model-len",
            )

    def measure(self, index: int) -> None:
        """Send one batch and wait until every request of it has ended.

        :raises MeasurementError: all requests failed, or the server or a worker went away.
        """
        self._crew.connect()
        jobs = self._batch_jobs.popleft()
        stage = f"{self._workload.name}: batch {index + 1}/{self._workload.batches}"
        timetable = self._timetables[index]
        seconds = timetable[-1] / _NS_PER_S if timetable else None
        results = self._run(jobs, stage, index, _Forecast(f"{stage}:", len(jobs), seconds, self._progress))
        traces = sorted((trace for result in results for trace in result.traces), key=lambda trace: trace.index)
        if not any(trace.ok for trace in traces):
            raise self._server.fault(
                f"batch {index + 1} of workload {self._workload.name} needs at least one answer",
                f"all {len(traces)} requests failed, the first with: {traces[0].error}",
                "see the server's log, then measure again",
            )
        self._stamped_sends += sum(result.stamped_sends for result in results)
        self._batches.append(
            BatchTrace(
                index=index,
                requests=tuple(traces),
                start_ns=min(result.start_ns for result in results),
                end_ns=max(result.end_ns for result in results),
                reconnects=sum(result.reconnects for result in results),
                clients=tuple(result.work for result in results),
            )
        )

    def result(self, started_s: float) -> RunTrace:
        """Return everything that was measured."""
        clients = [client for batch in self._batches for client in batch.clients]
        return RunTrace(
            batches=tuple(self._batches),
            seed=self._seed,
            warmup_requests=self._workload.warmup_requests,
            connections=self._workload.in_flight,
            timestamp_source=_timestamp_source(
                sum(client.events for client in clients),
                sum(client.unstamped for client in clients),
                tls=self._server.tls,
            ),
            sent_source=_sent_source(self._stamped_sends, self._workload.requests * self._workload.batches),
            started_s=started_s,
            schedule_ns=tuple(timetable for timetable in self._timetables if timetable is not None),
        )

    def _next_body(self) -> bytes:
        # A copy of its own size: what orjson returns keeps the room it was written in, 8 kB and more for each.
        return bytes(memoryview(self._source.next_body()))

    def _jobs(self, kind: str, numbers: range, timetable: Sequence[int] | None) -> list[Job]:
        return [
            Job(
                number,
                f"{self._seed & 0xFFFF_FFFF:08x}-{kind}{number}",
                self._next_body(),
                None if timetable is None else timetable[place],
            )
            for place, number in enumerate(numbers)
        ]

    def _run(
        self, jobs: Sequence[Job], stage: str, batch: int, forecast: _Forecast, *, measured: bool = True
    ) -> list[ShareResult]:
        shares = [
            Share(stage=stage, batch=batch, jobs=jobs[number :: self._workers], measured=measured)
            for number in range(self._workers)
        ]
        return self._crew.run(shares, forecast.take)


def _timestamp_source(events: int, unstamped: int, *, tls: bool) -> str:
    if unstamped == events:
        return "CLOCK_MONOTONIC in user space, right after recvmsg() returned"
    what = "the TLS record that completed the data" if tls else "the data"
    source = f"the kernel's receive time of {what} (SO_TIMESTAMPING), as CLOCK_MONOTONIC"
    return source + (f"; {unstamped} of {events} arrivals in user space" if unstamped else "")


def _sent_source(stamped: int, requests: int) -> str:
    if not stamped:
        return "CLOCK_MONOTONIC in user space, right after send() of the last byte returned"
    source = "the kernel's time of handing the last byte to the network device (SO_TIMESTAMPING), as CLOCK_MONOTONIC"
    return source + (f"; {requests - stamped} of {requests} requests in user space" if stamped < requests else "")


class _Forecast:
    """Says how a batch goes on: sums what all workers tell, and estimates when it ends.

    :param seconds: length of the timetable of open arrivals, ``None`` in a closed loop.
    """

    def __init__(self, stage: str, requests: int, seconds: float | None, progress: _LimitedProgress) -> None:
        self._stage = stage
        self._requests = requests
        self._seconds = seconds
        self._progress = progress
        self._start_s = time.monotonic()
        self._ended = 0
        self._ttft_ns: deque[float] = deque(maxlen=_RECENT)
        self._tpot_ns: deque[float] = deque(maxlen=_RECENT)

    def take(self, news: Tally) -> None:
        """Take what one worker tells."""
        self._ended += news.ended
        self._ttft_ns.extend(news.ttft_ns)
        self._tpot_ns.extend(news.tpot_ns)
        self._progress.tell(self._line)

    def _line(self) -> str:
        elapsed_s = max(time.monotonic() - self._start_s, 1e-9)
        rate = self._ended / elapsed_s
        parts = [f"{self._ended}/{self._requests} requests", f"{rate:.1f} req/s"]
        for name, values in (("TTFT", self._ttft_ns), ("TPOT", self._tpot_ns)):
            if values:
                value = statistics.median(values) / _NS_PER_MS
                parts.append(f"{name} {value:.{0 if value >= _TWO_DIGITS else 1}f} ms")
        left_s = (self._requests - self._ended) / rate if rate else None
        if self._seconds is not None and elapsed_s < self._seconds:
            left_s = self._seconds - elapsed_s
        if left_s is not None:
            minutes, seconds = divmod(round(left_s), 60)
            parts.append(f"{minutes}:{seconds:02d} left")
        return f"{self._stage} {', '.join(parts)}"


class _LimitedProgress:
    """Passes a line on at most a few times a second, over all batches together."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._next_ns = 0

    def tell(self, line: Callable[[], str]) -> None:
        """Make the line and pass it on, or do neither."""
        now_ns = time.monotonic_ns()
        if now_ns >= self._next_ns:
            self._next_ns = now_ns + _PROGRESS_NS
            self._progress(line())
