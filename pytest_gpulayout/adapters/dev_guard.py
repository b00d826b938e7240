"""The door-keeper of a vLLM server that offers its development endpoints; runs inside that server.

A measurement needs one of them, ``POST /reset_prefix_cache`` (``VLLM_SERVER_DEV_MODE=1``). Others let a caller run
methods of the workers, pause the engine or read its configuration, and vLLM does not ask for the key there (0.32,
``vllm/entrypoints/serve/middleware/authenticate.py``), so any user of the machine could. Here everything asks for the
key that does not merely tell how the server fares.

Loaded by the server's Python through ``vllm serve --middleware``, from a copy in a folder of its own: hence the
standard library alone.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/load", "/metrics", "/metrics/"})
"""What vLLM tells everybody, and load balancers and monitoring ask without a key."""

_BODY = b'{"error": "Unauthorized"}'

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class KeyGuard:
    """ASGI middleware that lets those in who know the key, ``VLLM_API_KEY`` of the server's environment."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._wanted = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on or refuse it; what is no request, such as the server's start, passes."""
        if scope["type"] not in ("http", "websocket") or self._admits(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _BODY})

    def _admits(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return path in OPEN_PATHS or hmac.compare_digest(given, self._wanted)
