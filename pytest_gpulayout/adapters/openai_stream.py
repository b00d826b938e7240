"""Sends a workload to an OpenAI-compatible server, and stamps everything that comes back.

Made so that the client is never the suspect: prompts, request bodies and connections exist before the clock
starts; one thread waits for all sockets at once; after a wake-up all waiting sockets are read and stamped before
anything is parsed; of the answers only the HTTP framing is read while the clock runs, SSE and JSON afterwards.
Nothing is sent twice: a request that fails is a trace with an error.

On a host whose CPUs are all busy with the server, a client of ordinary priority may not run for the length of whole
answers (seen on 2 CPUs with vLLM's CPU build: every chunk of an answer got one stamp). So the thread takes the lowest
real-time priority while a batch runs, where it may, and the time it waited for a CPU is recorded either way.

Knows sockets, HTTP/1.1 (through ``httptools``) and the fields of ``/v1/completions`` and ``/tokenize`` (vLLM
0.32). Leaves the answers' meaning to :mod:`~pytest_gpulayout.adapters.sse`. Proxies of the environment are not
used; they would be measured.
"""

from __future__ import annotations

import errno
import gc
import http.client
import json
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from random import Random
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httptools

from pytest_gpulayout.adapters.sse import error_message, read_completion_stream
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.ports import Endpoint, Progress
from pytest_gpulayout.trace import BatchTrace, RequestTrace, RunTrace
from pytest_gpulayout.workload import Workload

TIMESTAMP_SOURCE = "CLOCK_MONOTONIC in user space, right after recv() returned"

_RECV_BYTES = 1 << 16
_TICK_S = 0.25
_NS_PER_S = 1_000_000_000
_FEWEST_TOKEN_IDS = 16
_SEED_MASK = 0x7FFF_FFFF

# Words of many kinds, so that every tokenizer, a byte-level one included, makes many different ids of them.
_WORDS = """
amber bridge castle dozen engine forest glacier harbor island jungle kettle lantern meadow needle orchard pepper
quartz river saddle timber umbrella valley window xylophone yellow zebra anchor basket candle desert elephant
feather guitar hammer insect jacket kitchen ladder magnet notebook ocean pencil quilt rabbit silver tunnel uncle
violin whistle yogurt zipper answer before circle during either follow garden happen inside justice known listen
minute nothing often people question remember second thousand until village wonder young because children
different everything finally government however important language mountain national operation possible quickly
several together usually various without yesterday zero one two three four five six seven eight nine ten 11 13 17
19 23 29 31 37 41 43 47 53 59 61 67 71 73 79 83 89 97 Paris Tokyo Lima Cairo Oslo Delhi Rome Kyiv (blue) [green]
{red} "black" 'white' a+b=c x*y/z u<v>w 50% #1 @home & so; on: and, then! why? yes. no_way all-round
"""


@dataclass(frozen=True, slots=True)
class _Server:
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
        host = f"[{self.host}]" if ":" in self.host else self.host
        headers = {"Host": f"{host}:{self.port}", "Connection": "keep-alive", "Content-Length": str(length)}
        if length:
            headers["Content-Type"] = "application/json"
        if self.endpoint.api_key is not None:
            headers["Authorization"] = f"Bearer {self.endpoint.api_key}"
        return headers

    def fault(self, required: str, found: str, advice: str) -> MeasurementError:
        return MeasurementError(
            f"{required}\n  found: {found}\n  at {self.endpoint.url}, model {self.endpoint.model!r}\n  {advice}"
        )


@dataclass(slots=True)
class _Exchange:
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
        self.error, self.complete, self.keep_alive, self.end_ns = error, True, False, now_ns

    def on_header(self, name: bytes, _value: bytes) -> None:
        self._has_length = self._has_length or name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if not self.complete:
            self.pieces.append((self._now_ns, body))

    def on_message_complete(self) -> None:
        if self.status < HTTPStatus.OK:  # "100 Continue" and its like announce another one
            self.status, self._has_length = 0, False
            return
        self.complete, self.end_ns = True, self._now_ns
        self.keep_alive = self._parser.should_keep_alive()

    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)

    def http_error(self) -> str | None:
        if self.error is not None:
            return self.error
        if self.status == HTTPStatus.OK:
            return None
        return f"HTTP {self.status}: {error_message(self.body())}"


class _Connection:
    """One TCP connection that is opened again when it was lost."""

    __slots__ = ("connecting", "exchange", "mask", "progress_ns", "socket", "unsent")

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.exchange: _Exchange | None = None
        self.unsent: memoryview = memoryview(b"")
        self.connecting = False
        self.mask = 0
        self.progress_ns = 0

    def open(self, server: _Server) -> None:
        """Begin to connect; the socket becomes writable when that is done.

        :raises OSError: refused at once.
        """
        self.close()
        self.socket = _new_socket(server)
        self.connecting = True
        self.socket.setblocking(False)
        error = self.socket.connect_ex(server.address)
        if error not in (0, errno.EINPROGRESS):
            raise OSError(error, os.strerror(error))

    def receive(self) -> bytes | OSError | None:
        """Return bytes, none of them at the end of the stream, or the error, or ``None`` for nothing yet."""
        assert self.socket is not None
        try:
            return self.socket.recv(_RECV_BYTES)
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
        if self.socket is not None:
            self.socket.close()
        self.socket, self.connecting, self.unsent = None, False, memoryview(b"")


class OpenAiStreamDriver:
    """A closed-loop load generator over ``POST /v1/completions`` with streamed answers.

    Implements :class:`pytest_gpulayout.ports.LoadDriver`.

    :param stall_timeout_s: a request without a byte of progress for so long has failed. vLLM gives up on a
        stuck engine after 300 s itself (``VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS``) and then tells the cause.
    :param connect_timeout_s: for opening a connection and for the small requests before the clock starts.
    """

    def __init__(self, *, stall_timeout_s: float = 330.0, connect_timeout_s: float = 10.0) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._connect_timeout_s = connect_timeout_s

    def run(self, endpoint: Endpoint, workload: Workload, *, seed: int, progress: Progress) -> RunTrace:
        """Warm up, then send all batches of the workload.

        :param seed: of the prompts; a new one for each run, so that no prefix cache can answer.
        :raises MeasurementError: the server cannot be reached or spoken to, a warm-up request failed, all
            requests of a batch failed, or the server went away.
        """
        started_s = time.time()
        server = _locate(endpoint, self._connect_timeout_s)
        token_ids = _harvest_token_ids(server, self._connect_timeout_s)
        payloads = _payloads(server, workload, token_ids, seed)
        load = _Load(server, workload, self._stall_timeout_s, self._connect_timeout_s, progress)
        with ExitStack() as stack:
            stack.callback(load.close)
            load.warm_up([next(payloads) for _ in range(workload.warmup_requests)])
            bodies = [[next(payloads) for _ in range(workload.requests)] for _ in range(workload.batches)]
            batches = tuple(load.measure(index, batch) for index, batch in enumerate(bodies))
        return RunTrace(
            batches=batches,
            seed=seed,
            warmup_requests=workload.warmup_requests,
            connections=workload.concurrency,
            timestamp_source=TIMESTAMP_SOURCE,
            started_s=started_s,
            scheduling=load.scheduling,
        )


class _Load:
    """The connections of one run, and what is sent over them, batch after batch."""

    def __init__(
        self, server: _Server, workload: Workload, stall_s: float, connect_s: float, progress: Progress
    ) -> None:
        self._server = server
        self._workload = workload
        self._stall_s = stall_s
        self._connect_s = connect_s
        self._progress = _LimitedProgress(progress)
        self.scheduling = "SCHED_OTHER"
        self._connections = [_Connection() for _ in range(workload.concurrency)]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def warm_up(self, payloads: Sequence[bytes]) -> None:
        """Open all connections, then send one wave that is not measured.

        :raises MeasurementError: with the server's own words when a request failed.
        """
        self._connect()
        if not payloads:
            return
        exchanges = [_Exchange(payload) for payload in payloads]
        self._loop(exchanges, "warm-up").run()
        traces = [_trace(exchange, i, 0, self._workload) for i, exchange in enumerate(exchanges)]
        errors = [trace.error for trace in traces if trace.error is not None]
        if errors:
            raise self._server.fault(
                f"workload {self._workload.name} needs a server that answers its warm-up requests",
                f"{len(errors)} of {len(traces)} failed, the first with: {errors[0]}",
                "see the server's log; the workload's sizes must fit the server's --max-model-len",
            )

    def measure(self, index: int, payloads: Sequence[bytes]) -> BatchTrace:
        """Send one batch and wait until every request of it has ended.

        :raises MeasurementError: all requests failed, or the server went away.
        """
        reopened = self._connect()
        exchanges = [_Exchange(payload) for payload in payloads]
        loop = self._loop(exchanges, f"batch {index + 1}/{self._workload.batches}")
        with _no_garbage_collection(), _real_time() as self.scheduling:
            loop.run()
        first = index * self._workload.requests
        traces = [_trace(exchange, first + i, index, self._workload) for i, exchange in enumerate(exchanges)]
        if not any(trace.ok for trace in traces):
            raise self._server.fault(
                f"batch {index + 1} of workload {self._workload.name} needs at least one answer",
                f"all {len(traces)} requests failed, the first with: {traces[0].error}",
                "see the server's log, then measure again",
            )
        return BatchTrace(
            index=index,
            requests=tuple(traces),
            start_ns=loop.start_ns,
            end_ns=loop.end_ns,
            reconnects=reopened + loop.reconnects,
            loop_lag_max_ns=loop.lag_max_ns,
            client_cpu_ns=loop.cpu_ns,
            client_wait_ns=loop.wait_ns,
        )

    def _loop(self, exchanges: Sequence[_Exchange], stage: str) -> _ClosedLoop:
        stage = f"{self._workload.name}: {stage}"
        return _ClosedLoop(self._server, self._connections, exchanges, self._stall_s, self._progress, stage)

    def _connect(self) -> int:
        """Open what is not open and let the server answer once on it; return how many had been lost."""
        lost = [connection for connection in self._connections if connection.is_lost()]
        for number, connection in enumerate(lost):
            try:
                self._open_and_verify(connection)
            except OSError as error:
                raise self._server.fault(
                    f"{len(self._connections)} connections to the server are needed",
                    f"connection {number + 1} of {len(lost)} failed: {error}",
                    "check that the server runs, and `ulimit -n` for many connections",
                ) from error
        return len(lost)

    def _open_and_verify(self, connection: _Connection) -> None:
        connection.close()
        connection.socket = _new_socket(self._server)
        connection.socket.settimeout(self._connect_s)
        connection.socket.connect(self._server.address)
        connection.socket.sendall(self._server.encode("GET", "/v1/models"))
        exchange = _Exchange(b"")
        while not exchange.complete:
            data = connection.socket.recv(_RECV_BYTES)
            if data:
                exchange.feed(0, data)
            else:
                exchange.end_of_stream(0, "the server closed the connection")
        connection.socket.setblocking(False)
        if (error := exchange.http_error()) is not None:
            raise self._server.fault(
                "the server must answer GET /v1/models on every connection",
                error,
                "check URL and API key; a server that has just started may not be ready",
            )


class _ClosedLoop:
    """Keeps every connection busy until no request is left: one thread, one selector, one batch."""

    def __init__(
        self,
        server: _Server,
        connections: Sequence[_Connection],
        exchanges: Sequence[_Exchange],
        stall_s: float,
        progress: _LimitedProgress,
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

    def _start_next(self, connection: _Connection) -> None:
        if not self._waiting:
            self._busy -= 1
            self._watch(connection, 0)
            return
        connection.exchange = self._waiting.popleft()
        if connection.is_lost():
            self._reopen(connection)
        else:
            self._begin_sending(connection)

    def _reopen(self, connection: _Connection) -> None:
        self._watch(connection, 0)
        self.reconnects += 1
        connection.progress_ns = time.monotonic_ns()
        try:
            connection.open(self._server)
        except OSError as error:
            raise self._gone(f"cannot connect again: {error.strerror}") from error
        self._watch(connection, selectors.EVENT_WRITE)

    def _begin_sending(self, connection: _Connection) -> None:
        assert connection.exchange is not None
        connection.unsent = memoryview(connection.exchange.payload)
        connection.exchange.send_ns = connection.progress_ns = time.monotonic_ns()
        self._send(connection)

    def _writable(self, connection: _Connection) -> None:
        if connection.connecting:
            assert connection.socket is not None
            error = connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise self._gone(f"cannot connect again: {os.strerror(error)}")
            connection.connecting = False
            self._begin_sending(connection)
        elif connection.unsent:
            self._send(connection)

    def _send(self, connection: _Connection) -> None:
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

    def _received(self, connection: _Connection, data: bytes | OSError | None, now_ns: int) -> None:
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

    def _ended_with(self, connection: _Connection, exchange: _Exchange) -> None:
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

    def _watch(self, connection: _Connection, mask: int) -> None:
        if connection.socket is None or mask == connection.mask:
            return
        if not mask:
            self._selector.unregister(connection.socket)
        elif connection.mask:
            self._selector.modify(connection.socket, mask, connection)
        else:
            self._selector.register(connection.socket, mask, connection)
        connection.mask = mask


class _LimitedProgress:
    """Passes a line on at most a few times a second, over all batches together."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._next_ns = 0

    def tell(self, text: str) -> None:
        now_ns = time.monotonic_ns()
        if now_ns >= self._next_ns:
            self._next_ns = now_ns + int(_TICK_S * _NS_PER_S)
            self._progress(text)


def _locate(endpoint: Endpoint, timeout_s: float) -> _Server:
    """Find an address of the endpoint that takes connections.

    :raises MeasurementError: not an ``http`` URL, an unknown host, or nobody listens.
    """
    parts = urlsplit(endpoint.url)
    host, port = _host_and_port(endpoint, parts)
    try:
        with socket.create_connection((host, port), timeout_s) as probe:
            family, address = probe.family, probe.getpeername()
    except OSError as error:
        raise MeasurementError(
            f"a server that takes connections is needed\n  found: {error}\n  at {endpoint.url}\n"
            "  start the server, or correct the URL"
        ) from error
    return _Server(endpoint, host, port, parts.path.rstrip("/"), family, address)


def _host_and_port(endpoint: Endpoint, parts: SplitResult) -> tuple[str, int]:
    try:
        port = parts.port or http.client.HTTP_PORT
    except ValueError:
        port = 0
    if parts.scheme == "http" and parts.hostname and port:
        return parts.hostname, port
    advice = "use the http:// address of the server"
    if parts.scheme == "https":
        advice = "TLS is not supported by this client: " + advice + ", or a local forward to it"
    raise MeasurementError(
        f"the server's URL must look like http://HOST:PORT\n  found: {endpoint.url!r}\n"
        f"  in the endpoint to measure\n  {advice}"
    )


def _harvest_token_ids(server: _Server, timeout_s: float) -> tuple[int, ...]:
    """Ask the server's own tokenizer for ids that are ordinary text in its model, each once, in order.

    :raises MeasurementError: no ``/tokenize``, or too few different ids to make prompts of.
    """
    request = {"model": server.endpoint.model, "prompt": _WORDS, "add_special_tokens": False}
    required = "the server's POST /tokenize is needed to make prompts of an exact length"
    advice = "use a vLLM server, and the name it serves the model under (curl URL/v1/models)"
    status, body = _post(server, "/tokenize", json.dumps(request).encode(), timeout_s)
    if status != HTTPStatus.OK:
        raise server.fault(required, f"HTTP {status}: {error_message(body)}", advice)
    try:
        ids = tuple(dict.fromkeys(int(token) for token in json.loads(body)["tokens"]))
    except (ValueError, TypeError, KeyError) as error:
        raise server.fault(required, f"an answer without a list of tokens: {body[:200]!r}", advice) from error
    if len(ids) < _FEWEST_TOKEN_IDS:
        found = f"{len(ids)} different token ids, fewer than {_FEWEST_TOKEN_IDS}, in a text of many words"
        raise server.fault(required, found, advice)
    return ids


def _post(server: _Server, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=timeout_s)
    try:
        connection.request("POST", server.prefix + path, body, server.headers(len(body)))
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        required, advice = f"the server must answer POST {path}", "see the server's log"
        raise server.fault(required, str(error) or type(error).__name__, advice) from error
    finally:
        connection.close()


def _payloads(server: _Server, workload: Workload, token_ids: Sequence[int], seed: int) -> Iterator[bytes]:
    """Yield encoded requests without end, no two with the same prompt in practice, the same for the same seed."""
    random = Random(seed)
    # Explicit where a model's generation_config.json could interfere, as `vllm bench serve` does.
    constant = {
        "model": server.endpoint.model,
        "max_tokens": workload.output_tokens,
        "min_tokens": workload.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "repetition_penalty": 1.0,
        "seed": seed & _SEED_MASK,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    while True:
        prompt = random.choices(token_ids, k=workload.input_tokens)
        body = json.dumps({"prompt": prompt, **constant}, separators=(",", ":")).encode()
        yield server.encode("POST", "/v1/completions", body)


def _trace(exchange: _Exchange, index: int, batch: int, workload: Workload) -> RequestTrace:
    """Read an answer, now that no clock runs any more."""
    is_stream = exchange.status == HTTPStatus.OK
    stream = read_completion_stream(exchange.pieces if is_stream else (), whole=exchange.error is None)
    counted = stream.completion_tokens
    # A server that fails in the middle of an answer says why and then hangs up: both belong to the story.
    error = "; ".join(text for text in (stream.error, exchange.http_error()) if text) or None
    if error is None and counted != workload.output_tokens:
        told = "no usage at all" if counted is None else f"{counted}"
        error = f"{workload.output_tokens} completion tokens were asked for, the server counted {told}"
    if error is None and not stream.chunk_ns:
        error = "the answer has no chunk with choices"
    prompt_tokens = stream.prompt_tokens
    return RequestTrace(
        index=index,
        batch=batch,
        prompt_tokens=workload.input_tokens if prompt_tokens is None else prompt_tokens,
        output_tokens=counted or 0,
        send_ns=exchange.send_ns,
        chunk_ns=stream.chunk_ns,
        end_ns=exchange.end_ns,
        chunk_tokens=stream.chunk_tokens,
        error=error,
        system_fingerprint=stream.system_fingerprint,
        text=stream.text,
    )


def _new_socket(server: _Server) -> socket.socket:
    new = socket.socket(server.family, socket.SOCK_STREAM)
    new.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return new


def _cpu_wait_ns() -> int | None:
    """Time this thread has spent on a run queue (kernel ``Documentation/scheduler/sched-stats.rst``)."""
    try:
        with open("/proc/thread-self/schedstat", encoding="ascii") as stat:
            return int(stat.read().split()[1])
    except (OSError, IndexError, ValueError):
        return None


@contextmanager
def _real_time() -> Iterator[str]:
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
def _no_garbage_collection() -> Iterator[None]:
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
