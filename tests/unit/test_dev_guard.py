from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest

from pytest_gpulayout.adapters.dev_guard import KeyGuard, Receive, Scope, Send

Ask = Callable[..., list[MutableMapping[str, Any]]]
PASSED = [{"type": "passed"}]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Send one request to an app behind the guard; return what the client is sent."""
    monkeypatch.setenv("VLLM_API_KEY", "the-key")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "passed"})

    guard = KeyGuard(app)

    def ask(path: str, *, key: bytes | None = None, kind: str = "http", root: str = "") -> list[Any]:
        sent: list[MutableMapping[str, Any]] = []

        async def receive() -> MutableMapping[str, Any]:
            raise AssertionError("the guard reads no request")

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        headers = [(b"host", b"x"), *([(b"authorization", key)] if key is not None else [])]
        asyncio.run(guard({"type": kind, "path": path, "headers": headers, "root_path": root}, receive, send))
        return sent

    return ask


@pytest.mark.parametrize(
    "path",
    [
        "/collective_rpc",
        "/reset_prefix_cache",
        "/server_info",
        "/v1/models",
        "/tokenize",
        "/health/x",
        "/metricsx",
        "",
    ],
)
@pytest.mark.parametrize("key", [None, b"", b"the-key", b"Bearer other", b"Bearer the-key2", b"Bearer \xff"])
def test_without_the_key_there_is_no_way_in(ask: Ask, path: str, key: bytes | None) -> None:
    start, body = ask(path, key=key)
    assert (start["type"], start["status"]) == ("http.response.start", 401)
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert body == {"type": "http.response.body", "body": b'{"error": "Unauthorized"}'}


@pytest.mark.parametrize("path", ["/reset_prefix_cache", "/v1/models", "/tokenize"])
def test_with_the_key_everything_passes(ask: Ask, path: str) -> None:
    assert ask(path, key=b"Bearer the-key") == PASSED
    assert ask(path, key=b"Bearer the-key", kind="websocket") == PASSED


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/load", "/metrics", "/metrics/"])
def test_how_the_server_fares_is_no_secret(ask: Ask, path: str) -> None:
    assert ask(path) == PASSED
    assert ask(f"/prefix{path}", root="/prefix") == PASSED


def test_a_websocket_without_the_key_is_closed(ask: Ask) -> None:
    assert ask("/v1/realtime", kind="websocket") == [{"type": "websocket.close", "code": 1008}]


def test_start_and_end_of_the_server_pass(ask: Ask) -> None:
    assert ask("", kind="lifespan") == PASSED
