from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from pytest_gpulayout.adapters.http_session import open_session
from pytest_gpulayout.ports import Endpoint
from tests.support.stream_server import Reply, StreamServer

KEY = "the-key"
COMPLETION = {"model": "m", "prompt": [1], "max_tokens": 1}


@pytest.fixture
def server() -> Iterator[StreamServer]:
    with StreamServer(api_key=KEY) as server:
        yield server


def endpoint_of(server: StreamServer) -> Endpoint:
    return Endpoint(server.url, "m", KEY)


def test_a_path_goes_to_the_server_with_its_key(server: StreamServer) -> None:
    with open_session(lambda: endpoint_of(server)) as session:
        assert session.get("/v1/models").json()["data"] == [{"id": "m"}]
        assert session.post("/v1/completions", json=COMPLETION).status_code == 200
        assert session.request("GET", b"/v1/models").status_code == 200


def test_a_full_url_gets_no_key(server: StreamServer) -> None:
    with open_session(lambda: endpoint_of(server)) as session:
        assert session.get(f"{server.url}/v1/models").status_code == 401


def test_other_headers_and_another_key_of_the_caller(server: StreamServer) -> None:
    with open_session(lambda: endpoint_of(server)) as session:
        assert session.get("/v1/models", headers={"X-Trace": "1"}).status_code == 200
        assert session.get("/v1/models", headers={"Authorization": "Bearer other"}).status_code == 401


def test_server_without_a_key() -> None:
    with StreamServer() as server, open_session(lambda: replace(endpoint_of(server), api_key=None)) as session:
        response = session.get("/v1/models")
        assert response.status_code == 200
        assert "Authorization" not in response.request.headers


def test_each_request_asks_which_server_runs_now(server: StreamServer) -> None:
    with StreamServer(api_key=KEY) as successor:
        current = [endpoint_of(server)]
        with open_session(lambda: current[0]) as session:
            assert session.get("/v1/models").url == f"{server.url}/v1/models"
            current[0] = endpoint_of(successor)
            assert session.get("/v1/models").url == f"{successor.url}/v1/models"


def test_the_key_does_not_follow_a_redirect_to_another_server(server: StreamServer) -> None:
    location = f"HTTP/1.1 302 Found\r\nLocation: {server.url}/v1/models\r\nContent-Length: 0\r\n\r\n"
    with (
        StreamServer(Reply(raw=location.encode()), api_key=KEY) as redirecting,
        open_session(lambda: endpoint_of(redirecting)) as session,
    ):
        response = session.post("/v1/completions", json=COMPLETION)
    assert response.url == f"{server.url}/v1/models"
    assert response.status_code == 401


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_environment_stays_out(
    server: StreamServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    with open_session(lambda: endpoint_of(server)) as session:
        assert session.get("/v1/models").status_code == 200
