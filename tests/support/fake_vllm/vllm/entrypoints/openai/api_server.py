"""The API server: ``python -m vllm.entrypoints.openai.api_server --model M --port P [--tensor-parallel-size N ...]``.

Speaks HTTP/1.1 with kept connections: ``/health``, ``/version``, ``/metrics``, ``/v1/models``, ``/tokenize`` and
``/v1/completions``, streamed or not. As in vLLM, only paths below ``/v1`` ask for the key.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ...behaviour import Behaviour, read_behaviour
from ...processes import Engine, await_nodes, say, start_engines
from ...sizes import Sizes, add_options, read_sizes

_ROOT_CAUSE = "RuntimeError: Unsupported CPU attention configuration: head_dim=16 isa=2 kv_cache_idx=0"
_ENGINE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
_DONE = b"data: [DONE]\n\n"


class ApiServer:
    """Answers requests until a signal comes or the engine dies."""

    def __init__(
        self, arguments: argparse.Namespace, sizes: Sizes, behaviour: Behaviour, engines: Sequence[Engine]
    ) -> None:
        self._model: str = arguments.model
        self._sizes = sizes
        self._behaviour = behaviour
        self._engines = engines
        self._key = os.environ.get("VLLM_API_KEY")
        self._completions = 0
        self._running = 0
        self._counters = Counter[str]()
        self._ended = asyncio.Event()

    async def serve(self, host: str, port: int) -> None:
        """Listen; return when the server shall end."""
        if not self._behaviour.ignore_sigterm:
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self._ended.set)
        listener = await asyncio.start_server(self._connection, host, port, backlog=2048)
        say("APIServer", "entry.py:140", f"Starting vLLM server on http://{host}:{port}")
        await self._ended.wait()
        listener.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not self._ended.is_set():
                await self._request(reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path = request_line.split()[1]
        if path.startswith("/v1") and self._key and headers.get("authorization") != f"Bearer {self._key}":
            _answer(writer, 401, {"error": "Unauthorized"})
        elif path == "/v1/completions":
            await self._completion(writer, json.loads(body), int(headers.get("x-data-parallel-rank", 0)))
        elif path == "/v1/models":
            _answer(writer, 200, {"object": "list", "data": [{"id": self._model, "object": "model"}]})
        elif path == "/tokenize":
            tokens = _tokenize(json.loads(body)["prompt"])
            _answer(writer, 200, {"count": len(tokens), "max_model_len": 2048, "tokens": tokens})
        elif path.startswith("/server_info") and self._behaviour.server_info is not None:
            _answer(writer, 200, self._server_info(self._behaviour.server_info))
        elif path in ("/health", "/version"):
            _answer(writer, 200, {"version": "0.32.0"} if path == "/version" else None)
        elif path == "/metrics":
            _answer_text(writer, self._metrics())
        else:
            _answer(writer, 404, {"detail": "Not Found"})

    async def _completion(self, writer: asyncio.StreamWriter, request: dict[str, Any], engine: int) -> None:
        self._completions += 1
        number = self._completions
        if request["model"] != self._model:
            _answer(writer, 404, _error(404, f"The model `{request['model']}` does not exist."))
        elif self._behaviour.fails(number):
            _answer(writer, 500, _error(500, _ENGINE_DEAD))
            self._die()
        elif self._behaviour.refuses(number) or engine == self._behaviour.dead_engine:
            _answer(writer, 500, _error(500, f"request {number} failed"))
        elif request.get("stream"):
            await self._stream(writer, request)
        else:
            texts = [text async for text in self._generate(request)]
            choice = {"index": 0, "text": "".join(texts), "logprobs": None, "finish_reason": "length"}
            _answer(writer, 200, self._event([choice], _usage(request)))

    async def _stream(self, writer: asyncio.StreamWriter, request: dict[str, Any]) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n")
        writer.write(b"transfer-encoding: chunked\r\n\r\n")
        left = request["max_tokens"]
        async for text in self._generate(request):
            left -= 1
            reason = None if left else "length"
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None}
            writer.write(_chunk(_sse(self._event([choice]))))
            await writer.drain()
        usage = _sse(self._event([], _usage(request))) if request.get("stream_options") else b""
        writer.write((_chunk(usage) if usage else b"") + _chunk(_DONE) + b"0\r\n\r\n")

    async def _generate(self, request: dict[str, Any]) -> AsyncIterator[str]:
        clock = asyncio.get_running_loop().time
        due = clock() + self._behaviour.ttft_ms / 1e3
        self._running += 1
        try:
            for _ in range(request["max_tokens"]):
                await asyncio.sleep(max(0.0, due - clock()))
                due += self._behaviour.itl_ms / 1e3
                self._counters["generation_tokens"] += 1
                yield " word"
        finally:
            self._running -= 1
        self._counters["prompt_tokens"] += _usage(request)["prompt_tokens"]
        self._counters["request_success"] += 1

    def _metrics(self) -> str:
        """As in ``vllm/v1/metrics/loggers.py``, but only what counts requests and tokens."""
        labels = f'engine="0",model_name="{self._model}"'
        lines = [f"vllm:num_requests_running{{{labels}}} {float(self._running)}"]
        for name in ("prompt_tokens", "generation_tokens"):
            lines.append(f"vllm:{name}_total{{{labels}}} {float(self._counters[name])}")
        finished = f'{labels},finished_reason="length"'
        lines.append(f"vllm:request_success_total{{{finished}}} {float(self._counters['request_success'])}")
        return "".join(f"{line}\n" for line in lines)

    def _server_info(self, other: Mapping[str, object]) -> dict[str, Any]:
        """As in ``vllm/entrypoints/serve/dev/server_info``, ``ParallelConfig`` only. :param other: than its sizes."""
        sizes = self._sizes
        config = {
            "tensor_parallel_size": sizes.tp,
            "pipeline_parallel_size": sizes.pp,
            "data_parallel_size": sizes.dp,
            "prefill_context_parallel_size": sizes.pcp,
            "decode_context_parallel_size": sizes.dcp,
            "enable_expert_parallel": sizes.ep,
            "is_moe_model": sizes.moe,
            "distributed_executor_backend": "mp",
            "all2all_backend": "allgather_reducescatter",
        }
        return {"vllm_config": {"parallel_config": {**config, **other}}, "vllm_env": {}, "system_env": {}}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        event: dict[str, Any] = {"id": f"cmpl-{self._completions}", "object": "text_completion"}
        event |= {"created": int(time.time()), "model": self._model, "choices": choices}
        event["system_fingerprint"] = self._behaviour.fingerprint
        return event | ({"usage": usage} if usage else {})

    def _die(self) -> None:
        """As with a model that the CPU build cannot compute: the root cause stands in the worker's traceback."""
        engine = self._engines[0]
        worker, pid = self._sizes.worker_title(0, 0), next(iter(engine.worker_pids.values()))
        _say_traceback(worker, "multiproc_executor.py:1063", "WorkerProc hit an exception.", _ROOT_CAUSE, pid)
        wrapped = f"RuntimeError: Worker failed with error '{_ROOT_CAUSE}', please check the stack trace above"
        headline = "EngineCore encountered a fatal error."
        _say_traceback(self._sizes.engine_title(0), "core.py:1512", headline, wrapped, engine.pid)
        dead = f"vllm.v1.engine.exceptions.EngineDeadError: {_ENGINE_DEAD}"
        _say_traceback("APIServer", "async_llm.py:906", "AsyncLLM output_handler failed.", dead, os.getpid())
        self._ended.set()


def _say_traceback(process: str, where: str, headline: str, exception: str, pid: int) -> None:
    frames = '  File "vllm/v1/executor/multiproc_executor.py", line 1055, in f\n    output = func(*args, **kwargs)'
    text = f"{headline}\nTraceback (most recent call last):\n{frames}\n{exception}"
    say(process, where, text, level="ERROR", pid=pid)


def _answer_text(writer: asyncio.StreamWriter, text: str) -> None:
    head = f"HTTP/1.1 200 X\r\ncontent-type: text/plain; version=0.0.4\r\ncontent-length: {len(text)}\r\n\r\n"
    writer.write((head + text).encode())


def _answer(writer: asyncio.StreamWriter, status: int, document: dict[str, Any] | None) -> None:
    body = b"" if document is None else json.dumps(document, separators=(",", ":")).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


def _error(code: int, message: str) -> dict[str, Any]:
    kind = "NotFoundError" if code == 404 else "InternalServerError"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _sse(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def _chunk(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


def _tokenize(prompt: str) -> list[int]:
    return [zlib.crc32(word.encode()) % 30000 for word in prompt.split()]


def _usage(request: dict[str, Any]) -> dict[str, int]:
    prompt = request["prompt"]
    prompt_tokens = len(prompt if isinstance(prompt, list) else _tokenize(prompt))
    completion_tokens = request["max_tokens"]
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="api_server.py", allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    add_options(parser)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--master-addr", default="127.0.0.1")
    parser.add_argument("--master-port", type=int, default=29501)
    return parser.parse_known_args()[0]


def main() -> None:
    """Load, serve, end; vLLM ends with exit code 0 also when its engine has died."""
    arguments = _parse_arguments()
    behaviour = read_behaviour(read_sizes(arguments, moe=False).fingerprint)
    sizes = read_sizes(arguments, moe=behaviour.moe)
    say("APIServer", "api_utils.py:347", f" ▄▄ ▄█ █     █     █ ▀▄▀ █  version 0.32.0\n model {arguments.model}")
    if (ending := behaviour.exit_at_start) is not None:
        lines: Any = ending.get("log", ["OSError: [Errno 98] Address already in use"])
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        raise SystemExit(ending.get("code", 1))
    if behaviour.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    meeting = f"{arguments.master_addr}:{arguments.master_port}" if arguments.nnodes > 1 else ""
    engines = start_engines(arguments.model, sizes, behaviour, nodes=arguments.nnodes, meeting=meeting)
    await_nodes(arguments.master_addr, arguments.master_port, arguments.nnodes - 1)
    while behaviour.hang_at_start:
        signal.pause()
    time.sleep(behaviour.load_s)
    asyncio.run(ApiServer(arguments, sizes, behaviour, engines).serve(arguments.host, arguments.port))
    for engine in engines:
        engine.end(signal.SIGTERM)
    for engine in engines:
        os.waitpid(engine.pid, 0)


if __name__ == "__main__":
    main()
