"""Where an endpoint is, how to talk to it, and the small questions that are asked before anything is measured.

Knows URLs, name resolution, TLS trust and the head of an HTTP/1.1 request. Leaves the measured requests and their
connections to :mod:`~pytest_gpulayout.adapters.connection` and :mod:`~pytest_gpulayout.adapters.load_loop`.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from types import MappingProxyType
from typing import Any
from urllib.parse import SplitResult, urlsplit

import orjson

from pytest_gpulayout.adapters.sse import error_message
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.ports import Endpoint

_DEFAULT_PORTS = {"http": 80, "https": 443}
_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where an endpoint is and how to address it, resolved once.

    :param prefix: of every path. :param address: as :mod:`socket` takes it. :param tls: whether the URL is https.
    """

    endpoint: Endpoint
    host: str
    port: int
    prefix: str
    family: int
    address: Any
    tls: bool = False

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this host, as far as its address tells."""
        return str(self.address[0]).startswith(("127.", "::1"))

    def encode(self, method: str, path: str, body: bytes = b"", extra: Mapping[str, str] = _NONE) -> bytes:
        """Return a whole request as it goes over the wire."""
        lines = [f"{method} {self.prefix}{path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in {**self.headers(len(body)), **extra}.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body

    def headers(self, length: int) -> dict[str, str]:
        """Headers of a request with a body of ``length`` bytes."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        headers = {"Host": f"{host}:{self.port}", "Connection": "keep-alive", "Content-Length": str(length)}
        if length:
            headers["Content-Type"] = "application/json"
        if self.endpoint.api_key is not None:
            headers["Authorization"] = f"Bearer {self.endpoint.api_key}"
        return headers

    def fault(self, required: str, found: str, advice: str) -> MeasurementError:
        """An error in four parts, this server being the place."""
        return MeasurementError(
            f"{required}\n  found: {found}\n  at {self.endpoint.url}, model {self.endpoint.model!r}\n  {advice}"
        )

    def ask(self, method: str, path: str, payload: bytes = b"", *, timeout_s: float = 10.0) -> tuple[int, bytes]:
        """Ask one small question on a connection of its own; return status and body.

        :raises MeasurementError: no answer.
        """
        asker = Asker(self, timeout_s)
        try:
            return asker.ask(method, path, payload)
        finally:
            asker.close()


class Asker:
    """Asks small questions, one after the other, over one connection that is kept."""

    def __init__(self, server: ServerAddress, timeout_s: float) -> None:
        self._server = server
        host, port = server.host, server.port
        self._connection = (
            http.client.HTTPSConnection(host, port, timeout=timeout_s, context=trusted())
            if server.tls
            else http.client.HTTPConnection(host, port, timeout=timeout_s)
        )

    def ask(self, method: str, path: str, payload: bytes = b"") -> tuple[int, bytes]:
        """Return status and body of the answer.

        :raises MeasurementError: no answer.
        """
        was_open = self._connection.sock is not None
        try:
            return self._ask(method, path, payload)
        except (ConnectionError, http.client.RemoteDisconnected) as error:
            if not was_open:
                raise self._fault(method, path, error) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._fault(method, path, error) from error
        return self.ask(method, path, payload)  # the server had closed the idle connection; now there is a new one

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask with a JSON object and return the one that is answered.

        :raises MeasurementError: no answer, or another one than that.
        """
        status, answer = self.ask("POST", path, orjson.dumps(body))
        if status != HTTPStatus.OK:
            raise self._refused(path, f"HTTP {status}: {error_message(answer)}")
        try:
            document = orjson.loads(answer)
        except ValueError as error:
            raise self._refused(path, f"an answer that is not JSON: {answer[:200]!r}") from error
        if not isinstance(document, dict):
            raise self._refused(path, f"an answer that is not a JSON object: {answer[:200]!r}")
        return document

    def close(self) -> None:
        """Close the connection, if there is one."""
        self._connection.close()

    def _ask(self, method: str, path: str, payload: bytes) -> tuple[int, bytes]:
        try:
            self._connection.request(method, self._server.prefix + path, payload, self._server.headers(len(payload)))
            response = self._connection.getresponse()
            return response.status, response.read()
        except BaseException:
            self._connection.close()
            raise

    def _refused(self, path: str, found: str) -> MeasurementError:
        advice = "use a vLLM server, and the name it serves the model under (curl URL/v1/models)"
        return self._server.fault(
            f"the server's POST {path} is needed to make prompts of an exact length", found, advice
        )

    def _fault(self, method: str, path: str, error: Exception) -> MeasurementError:
        if isinstance(error, ssl.SSLError):
            return tls_fault(self._server.endpoint, error)
        required, advice = f"the server must answer {method} {path}", "see the server's log"
        return self._server.fault(required, str(error) or type(error).__name__, advice)


def locate(endpoint: Endpoint, timeout_s: float) -> ServerAddress:
    """Find an address of the endpoint that takes connections.

    :raises MeasurementError: not an ``http`` or ``https`` URL, an unknown host, nobody listens, or a certificate
        that is not trusted.
    """
    parts = urlsplit(endpoint.url)
    host, port = _host_and_port(endpoint, parts)
    tls = parts.scheme == "https"
    try:
        with socket.create_connection((host, port), timeout_s) as probe:
            family, address = probe.family, probe.getpeername()
            if tls:
                _try_tls(endpoint, probe, host)
    except OSError as error:
        raise MeasurementError(
            f"a server that takes connections is needed\n  found: {error}\n  at {endpoint.url}\n"
            "  start the server, or correct the URL"
        ) from error
    return ServerAddress(endpoint, host, port, parts.path.rstrip("/"), family, address, tls)


def _try_tls(endpoint: Endpoint, probe: socket.socket, host: str) -> None:
    try:
        with trusted().wrap_socket(probe, server_hostname=host):
            pass
    except OSError as error:
        raise tls_fault(endpoint, error) from error


def trusted() -> ssl.SSLContext:
    """What is needed to trust a server: the system's certificates, or those of ``SSL_CERT_FILE``/``SSL_CERT_DIR``."""
    return _context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@lru_cache(maxsize=4)
def _context(_file: str | None, _folder: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context()  # OpenSSL reads both variables itself
    context.set_alpn_protocols(["http/1.1"])
    return context


def tls_fault(endpoint: Endpoint, error: OSError) -> MeasurementError:
    """An error in four parts for a TLS connection that did not come about."""
    found, advice = (
        getattr(error, "reason", None) or str(error),
        "use the http:// address if the server speaks no TLS",
    )
    if isinstance(error, ssl.SSLCertVerificationError):
        found = f"{error.verify_message} ({error.reason})"
        advice = "use the name that the certificate is for, or trust its issuer: SSL_CERT_FILE=/path/to/ca.pem"
    return MeasurementError(
        f"a TLS connection to a server that can be trusted is needed\n  found: {found}\n"
        f"  at {endpoint.url}\n  {advice}"
    )


def _host_and_port(endpoint: Endpoint, parts: SplitResult) -> tuple[str, int]:
    try:
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
    except ValueError:
        port = 0
    if parts.scheme in _DEFAULT_PORTS and parts.hostname and port:
        return parts.hostname, port
    raise MeasurementError(
        f"the server's URL must look like http://HOST:PORT or https://HOST:PORT\n  found: {endpoint.url!r}\n"
        "  in the endpoint to measure\n  use the http:// or https:// address of the server"
    )
