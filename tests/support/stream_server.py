"""A scripted HTTP/1.1 server that streams completions as vLLM does, for tests and for measuring the client.

Speaks ``/v1/models``, ``/tokenize``, ``/v1/completions`` and ``/v1/chat/completions`` (chunked SSE), over TLS where a
context is given, and listens on loopback only. What each
request gets is a :class:`Reply`, chosen by a function of the request's number. Stamps every chunk with
``CLOCK_MONOTONIC`` just before it is written; ``X-Request-Id`` names the record. Of the module's
command line, see ``--help``; there ``GET /sent`` returns the records and forgets them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

FINGERPRINT = "vllm-0.32.0-tp2-00000000"
_MANY_WORDS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one completion request gets.

    :param status: HTTP status; other than 200 with ``body`` and no stream.
    :param tokens: completion tokens that ``usage`` claims, ``None`` for as many as asked for.
    :param usage: whether to send usage at all. :param error_after: chunks before an error event.
    :param abort_after: chunks before the connection is reset. :param stall_after: chunks before silence.
    :param close: hang up after the answer, with ``announce`` as HTTP announces it, else without a word.
    :param prompt_tokens: that ``usage`` claims, ``None`` for as many as there are.
    :param metrics: the server's own timings, as ``--enable-per-request-metrics`` adds them to ``usage``'s message.
    :param raw: bytes sent instead of an HTTP answer. :param ttft_s: before the first chunk. :param itl_s: between.
    """

    status: int = 200
    body: bytes = b""
    tokens: int | None = None
    prompt_tokens: int | None = None
    metrics: dict[str, float] | None = None
    usage: bool = True
    error_after: int | None = None
    abort_after: int | None = None
    stall_after: int | None = None
    close: bool = False
    announce: bool = False
    raw: bytes | None = None
    ttft_s: float = 0.0
    itl_s: float = 0.0


@dataclass(slots=True)
class Sent:
    """Instants of one answer, ns. :param chunk_ns: (n_chunks,), just before each chunk was written."""

    request_id: str
    received_ns: int
    chunk_ns: list[int] = field(default_factory=list)


class StreamServer:
    """A server in a thread of its own; a context manager.

    :param reply: of every request, or a function of the request's number (from 0).
    :param api_key: bearer token to insist on. :param token_ids: what ``/tokenize`` returns.
    :param tls: certificate and key to serve with. :param host: loopback address to listen on.
    """

    def __init__(
        self,
        reply: Reply | Callable[[int], Reply] = Reply(),
        *,
        api_key: str | None = None,
        token_ids: tuple[int, ...] | None = tuple(range(100, 200)),
        tls: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.reply = reply
        self.api_key = api_key
        self.token_ids = token_ids
        self.host = host
        self._tls = tls
        self.bodies: list[dict[str, Any]] = []
        self.sent: list[Sent] = []
        self.connections = 0
        self.open_connections = 0
        self.most_in_flight = 0
        self.port = 0
        self._in_flight = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._run, name="stream-server", daemon=True)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if self._tls is None else 'https'}://{host}:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10), "the stream server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive(), "the stream server did not stop"

    def stop_listening(self) -> None:
        """Refuse new connections from now on; call it from a reply, which runs in the server's thread."""
        assert self._listener is not None
        self._listener.close()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self.serve())

    async def serve(self, port: int = 0) -> None:
        """Serve until stopped."""
        self._listener = await asyncio.start_server(self._accept, self.host, port, backlog=4096, ssl=self._tls)
        self.port = self._listener.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._connection(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open_connections += 1
        try:
            while await self._request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open_connections -= 1
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        received_ns = time.monotonic_ns()
        request_line, *lines = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if self.api_key and headers.get("authorization") != f"Bearer {self.api_key}":
            return self._plain(writer, 401, b'{"error":"Unauthorized"}')
        path = request_line.split()[1]
        if path in ("/v1/completions", "/v1/chat/completions"):
            request_id = headers.get("x-request-id", "")
            return await self._completion(writer, json.loads(body), request_id, received_ns)
        if path == "/tokenize" and self.token_ids is not None:
            return self._plain(writer, 200, json.dumps(self._tokens(json.loads(body))).encode())
        if path == "/sent":
            records, self.sent = self.sent, []
            return self._plain(writer, 200, json.dumps([asdict(record) for record in records]).encode())
        if path == "/v1/models":
            return self._plain(writer, 200, b'{"object":"list","data":[{"id":"m"}]}')
        return self._plain(writer, 404, b'{"detail":"Not Found"}')

    def _tokens(self, request: dict[str, Any]) -> dict[str, Any]:
        """A token for each word, and one for the template of a chat; of a long text the ids that were given."""
        if messages := request.get("messages"):
            tokens = [0] * (1 + len(messages[0]["content"].split()))
        elif len(words := request["prompt"].split()) < _MANY_WORDS:
            tokens = [0] * len(words)
        else:
            tokens = list(self.token_ids or ())
        return {"count": len(tokens), "max_model_len": 2_000_000, "tokens": tokens}

    def _plain(self, writer: asyncio.StreamWriter, status: int, body: bytes) -> bool:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        return True

    async def _completion(
        self, writer: asyncio.StreamWriter, request: dict[str, Any], request_id: str, received_ns: int
    ) -> bool:
        number = len(self.bodies)
        self.bodies.append(request)
        reply = self.reply(number) if callable(self.reply) else self.reply
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            if reply.raw is not None:
                writer.write(reply.raw)
                return False
            if reply.status != 200:
                return self._plain(writer, reply.status, reply.body) and not reply.close
            record = Sent(request_id, received_ns)
            self.sent.append(record)
            return await self._stream(writer, request, reply, record)
        finally:
            self._in_flight -= 1

    async def _stream(
        self, writer: asyncio.StreamWriter, request: dict[str, Any], reply: Reply, record: Sent
    ) -> bool:
        announcement = b"Connection: close\r\n" if reply.announce else b""
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
        writer.write(head + announcement + b"\r\n")
        clock = asyncio.get_running_loop().time
        due = clock() + reply.ttft_s
        for index in range(request["max_tokens"]):
            if index == reply.error_after:
                error = {"error": {"message": "EngineCore encountered an issue.", "code": 500}}
                writer.write(_chunk(error) + _DONE)
                return True
            if index == reply.abort_after:
                writer.transport.abort()
                return False
            if index == reply.stall_after:
                await self._stop.wait()
            await asyncio.sleep(max(0.0, due - clock()))
            due += reply.itl_s
            record.chunk_ns.append(time.monotonic_ns())
            writer.write(_chunk({"choices": [{"index": 0, "text": "x"}]}))
        writer.write((_usage(request, reply) if reply.usage else b"") + _DONE)
        return not reply.close


def _chunk(payload: dict[str, Any]) -> bytes:
    return _framed(b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n")


def _framed(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


_DONE = _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def _usage(request: dict[str, Any], reply: Reply) -> bytes:
    prompt = request["prompt"] if "prompt" in request else ["template", *request["messages"][0]["content"].split()]
    completion_tokens = request["max_tokens"] if reply.tokens is None else reply.tokens
    prompt_tokens = len(prompt) if reply.prompt_tokens is None else reply.prompt_tokens
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    message = {"choices": [], "usage": usage, "system_fingerprint": FINGERPRINT}
    return _chunk(message | ({} if reply.metrics is None else {"metrics": reply.metrics}))


def main() -> None:
    """Serve until the process is ended; prints the port once it is bound."""
    parser = argparse.ArgumentParser(description="stream completions with a fixed TTFT and ITL")
    parser.add_argument("--ttft-ms", type=float, default=50.0)
    parser.add_argument("--itl-ms", type=float, default=10.0)
    arguments = parser.parse_args()
    reply = Reply(ttft_s=arguments.ttft_ms / 1e3, itl_s=arguments.itl_ms / 1e3)
    with StreamServer(reply) as server:
        print(server.port, flush=True)  # noqa: T201 - how the parent learns the port
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
