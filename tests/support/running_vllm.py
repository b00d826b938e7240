"""A vLLM that somebody else runs, as a gate from outside sees it: scripted answers, and no engine behind them.

Answers ``/health``, ``/version``, ``/v1/models``, ``/metrics``, ``/server_info`` and ``/v1/completions`` (not
streamed) on loopback; every answer may be changed while it runs. Notes what it was asked.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any, Self

from tests.support.prometheus import metrics_text


@dataclass
class RunningVllm:
    """What it answers; a context manager.

    :param models: entries of ``/v1/models``. :param fingerprint: of a completion, ``None`` for none.
    :param starts: ``process_start_time_seconds`` of the scrapes in turn; ``None`` in it for a server without.
    :param info: ``parallel_config`` of ``/server_info``, ``None`` where that is not offered.
    :param completion: status of completions. :param health: of ``/health``. :param key: that it insists on.
    """

    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "org/tiny", "root": "org/tiny"}])
    version: str | None = "0.32.0"
    fingerprint: str | None = "vllm-0.32.0-tp2-abcdef12"
    starts: list[float | None] = field(default_factory=lambda: [1_763_700_000.0])
    info: dict[str, Any] | None = None
    completion: int = 200
    health: int = 200
    key: str | None = None
    asked: list[str] = field(default_factory=list)
    """``GET /health``, in order."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._scrapes = count()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        told = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer("GET")

            def do_POST(self) -> None:
                self._answer("POST")

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - its name in the library
                """Be quiet."""

            def _answer(self, method: str) -> None:
                self.rfile.read(int(self.headers.get("content-length") or 0))
                told.asked.append(f"{method} {self.path.partition('?')[0]}")
                is_allowed = told.key is None or self.headers.get("authorization") == f"Bearer {told.key}"
                status, text = told._answer_to(self.path.partition("?")[0]) if is_allowed else (401, "{}")
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

        return Handler

    def _answer_to(self, path: str) -> tuple[int, str]:
        match path:
            case "/health":
                return self.health, ""
            case "/version" if self.version is not None:
                return 200, json.dumps({"version": self.version})
            case "/v1/models":
                return 200, json.dumps({"object": "list", "data": self.models})
            case "/metrics":
                return 200, metrics_text({}, started=self.starts[next(self._scrapes) % len(self.starts)])
            case "/server_info" if self.info is not None:
                return 200, json.dumps({"vllm_config": {"parallel_config": self.info}})
            case "/v1/completions":
                answer = {"choices": [{"index": 0, "text": "x"}], "system_fingerprint": self.fingerprint}
                return self.completion, json.dumps(answer if self.completion == 200 else {"error": "engine is dead"})
            case _:
                return 404, json.dumps({"detail": "Not Found"})
