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

import http.client
import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from http import HTTPStatus
from random import Random
from urllib.parse import SplitResult, urlsplit

from pytest_gpulayout.adapters.closed_loop import ClosedLoop, LimitedProgress, no_garbage_collection, real_time
from pytest_gpulayout.adapters.http_exchange import RECV_BYTES, Connection, Exchange, ServerAddress, new_socket
from pytest_gpulayout.adapters.sse import error_message, read_completion_stream
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.ports import Endpoint, Progress
from pytest_gpulayout.trace import BatchTrace, ClientWork, RequestTrace, RunTrace
from pytest_gpulayout.workload import Workload

TIMESTAMP_SOURCE = "CLOCK_MONOTONIC in user space, right after recv() returned"

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
            with window or nullcontext():
                batches = tuple(load.measure(index, batch) for index, batch in enumerate(bodies))
        return RunTrace(
            batches=batches,
            seed=seed,
            warmup_requests=workload.warmup_requests,
            connections=workload.in_flight,
            timestamp_source=TIMESTAMP_SOURCE,
            started_s=started_s,
        )


class _Load:
    """The connections of one run, and what is sent over them, batch after batch."""

    def __init__(
        self, server: ServerAddress, workload: Workload, stall_s: float, connect_s: float, progress: Progress
    ) -> None:
        self._server = server
        self._workload = workload
        self._stall_s = stall_s
        self._connect_s = connect_s
        self._progress = LimitedProgress(progress)
        self.scheduling = "SCHED_OTHER"
        self._connections = [Connection() for _ in range(workload.in_flight)]

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
        exchanges = [Exchange(payload) for payload in payloads]
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
        exchanges = [Exchange(payload) for payload in payloads]
        loop = self._loop(exchanges, f"batch {index + 1}/{self._workload.batches}")
        with no_garbage_collection(), real_time() as self.scheduling:
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
            clients=(
                ClientWork(
                    cpu_ns=loop.cpu_ns,
                    wait_ns=loop.wait_ns,
                    lag_max_ns=loop.lag_max_ns,
                    scheduling=self.scheduling,
                ),
            ),
        )

    def _loop(self, exchanges: Sequence[Exchange], stage: str) -> ClosedLoop:
        stage = f"{self._workload.name}: {stage}"
        return ClosedLoop(self._server, self._connections, exchanges, self._stall_s, self._progress, stage)

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

    def _open_and_verify(self, connection: Connection) -> None:
        connection.close()
        connection.socket = new_socket(self._server)
        connection.socket.settimeout(self._connect_s)
        connection.socket.connect(self._server.address)
        connection.socket.sendall(self._server.encode("GET", "/v1/models"))
        exchange = Exchange(b"")
        while not exchange.complete:
            data = connection.socket.recv(RECV_BYTES)
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


def _locate(endpoint: Endpoint, timeout_s: float) -> ServerAddress:
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
    return ServerAddress(endpoint, host, port, parts.path.rstrip("/"), family, address)


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


def _harvest_token_ids(server: ServerAddress, timeout_s: float) -> tuple[int, ...]:
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


def _post(server: ServerAddress, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
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


def _payloads(server: ServerAddress, workload: Workload, token_ids: Sequence[int], seed: int) -> Iterator[bytes]:
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
        prompt = random.choices(token_ids, k=workload.input_tokens or 0)
        body = json.dumps({"prompt": prompt, **constant}, separators=(",", ":")).encode()
        yield server.encode("POST", "/v1/completions", body)


def _trace(exchange: Exchange, index: int, batch: int, workload: Workload) -> RequestTrace:
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
        prompt_tokens=(workload.input_tokens or 0) if prompt_tokens is None else prompt_tokens,
        output_tokens=counted or 0,
        send_ns=exchange.send_ns,
        chunk_ns=stream.chunk_ns,
        end_ns=exchange.end_ns,
        chunk_tokens=stream.chunk_tokens,
        error=error,
        system_fingerprint=stream.system_fingerprint,
        text=stream.text,
    )
