"""The ``requests`` session that speaks to one server of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import requests

from pytest_gpulayout.ports import Endpoint


class EndpointSession(requests.Session):
    """Resolves paths against the server that runs now, and sends its key to it alone."""

    def __init__(self, endpoint: Callable[[], Endpoint]) -> None:
        super().__init__()
        self._endpoint = endpoint
        self.trust_env = False  # a proxy of the environment must not come between us and loopback

    def request(self, method: str | bytes, url: str | bytes, *args: Any, **kwargs: Any) -> requests.Response:
        """Send a request. :param url: a path such as ``/v1/models``, or a full URL, which gets no key."""
        address = url.decode() if isinstance(url, bytes) else url
        if address.startswith("/"):
            endpoint = self._endpoint()
            address = endpoint.url + address
            headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
            kwargs["headers"] = headers | dict(kwargs.get("headers") or {})
        return super().request(method, address, *args, **kwargs)


def open_session(endpoint: Callable[[], Endpoint]) -> requests.Session:
    """Return a session for the server that ``endpoint()`` names at the time of each request."""
    return EndpointSession(endpoint)
