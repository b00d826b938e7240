"""A real nginx in front of small servers that do as a test says."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import requests

from pytest_gpulayout.adapters import nginx_proxy
from pytest_gpulayout.adapters.device_lock import LentLocks
from pytest_gpulayout.adapters.http_session import open_session
from pytest_gpulayout.adapters.nginx_proxy import (
    REPLICA_HEADER,
    Nginx,
    NginxProxy,
    find_nginx,
    nginx_configuration,
)
from pytest_gpulayout.adapters.vllm_process import free_port
from pytest_gpulayout.errors import ServerExited, ServerStartFailed
from pytest_gpulayout.ports import Endpoint
from tests.support.nginx import are_gone, needs_nginx, nginx_processes
from tests.support.processes import wait_until

pytestmark = pytest.mark.end_to_end


# -- finding it ------------------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which programs are looked for; it is empty."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nginx_proxy, "_SEARCHED_TOO", ("/opt/none/sbin",))
    return tmp_path


def program(folder: Path, text: str) -> Path:
    file = folder / "nginx"
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_nginx_that_is_missing_is_told_with_the_package(nowhere: Path) -> None:
    with pytest.raises(ServerStartFailed) as caught:
        find_nginx()
    assert str(caught.value).splitlines() == [
        "nginx is required in front of the replicas of a layout xN, found none",
        "  in PATH and /opt/none/sbin",
        "  install it: apt-get install nginx-light (Debian, Ubuntu; elsewhere the package is called nginx)",
    ]


def test_nginx_beside_the_path_is_found(nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sbin"
    folder.mkdir()
    file = program(folder, "#!/bin/sh\necho 'nginx version: nginx/1.18.0 (Ubuntu)' >&2\n")
    monkeypatch.setattr(nginx_proxy, "_SEARCHED_TOO", (str(folder),))
    assert find_nginx() == Nginx(str(file), "nginx/1.18.0", (1, 18, 0))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("#!/bin/sh\necho busybox\n", "it does not say its version: 'busybox'"),
        ("#!/no/such/interpreter\n", "it does not run: "),
    ],
)
def test_nginx_that_cannot_be_used(nowhere: Path, text: str, found: str) -> None:
    file = program(nowhere, text)
    with pytest.raises(ServerStartFailed) as caught:
        find_nginx()
    headline, where, _ = str(caught.value).splitlines()
    assert found in headline
    assert where == f"  in {file}"


# -- its configuration -----------------------------------------------------------------------------------------------


def test_configuration_names_every_server_and_no_path_of_the_machine() -> None:
    text = nginx_configuration(4000, ["127.0.0.1:4001", "127.0.0.1:4002"], files=1024, user=None)
    assert "    server 127.0.0.1:4001 max_fails=3 fail_timeout=5s;\n    server 127.0.0.1:4002 max_fails=3 " in text
    assert "listen 127.0.0.1:4000 backlog" in text
    assert "worker_connections 960;" in text
    assert "user" not in text.replace("userid", "")
    words = [word for line in text.splitlines() for word in line.split() if word.startswith("/")]
    assert words == ["/"]  # the location; all files lie in the folder that it is started with


def test_worker_of_root_stays_root_so_that_it_may_enter_the_folder() -> None:
    assert "\nuser root root;\n" in nginx_configuration(4000, ["127.0.0.1:4001"], files=1024, user="root")


# -- at work ---------------------------------------------------------------------------------------------------------


class Upstream:
    """A server behind the proxy.

    :ivar requests: paths in the order they came. :ivar connections: how many were opened to it.
    :ivar go_on: what a request for ``/wait`` or ``/stream`` waits for before it goes on.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.connections = 0
        self.go_on = threading.Event()
        self.waiting = threading.Semaphore(0)
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def setup(self) -> None:
                super().setup()
                upstream.connections += 1

            def do_GET(self) -> None:
                upstream.answer(self)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                upstream.answer(self)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(handler.path)
        if handler.path == "/hang-up":
            handler.close_connection = True
            return
        if handler.path == "/wait":
            self._wait()
        handler.send_response(503 if handler.path == "/busy" else 200)
        if handler.path == "/stream":
            self._stream(handler)
            return
        body = (handler.headers["Authorization"] or "").encode()
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _stream(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"9\r\ndata: a\n\n\r\n")
        handler.wfile.flush()
        self._wait()
        handler.wfile.write(b"9\r\ndata: b\n\n\r\n0\r\n\r\n")

    def _wait(self) -> None:
        self.waiting.release()
        assert self.go_on.wait(20)

    def close(self) -> None:
        """Let nobody connect any more; connections that are open stay."""
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()


Start = Callable[..., NginxProxy]


@pytest.fixture
def upstreams() -> Iterator[tuple[Upstream, Upstream]]:
    pair = Upstream(), Upstream()
    yield pair
    for upstream in pair:
        with suppress(OSError):
            upstream.close()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the proxy's folder is made, and nothing may be left."""
    with tempfile.TemporaryDirectory(prefix="gl-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)
        assert os.listdir(folder) == []


@pytest.fixture
def start(temporary: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a proxy in front of servers; afterwards nothing of it is left."""
    proxies: list[NginxProxy] = []

    def start(*servers: str, port: int | None = None) -> NginxProxy:
        proxies.append(
            NginxProxy(
                find_nginx(),
                servers,
                port or free_port(),
                log=tmp_path / "proxy.log",
                locks=LentLocks((), ()),
                where="the replicas of layout tp1x2",
            )
        )
        return proxies[-1]

    yield start
    processes = nginx_processes(str(temporary))
    for proxy in proxies:
        proxy.stop()
    assert are_gone(processes)
    assert nginx_processes(str(temporary)) == []


@pytest.fixture
def proxy(start: Start, upstreams: tuple[Upstream, Upstream]) -> NginxProxy:
    return start(*(upstream.address for upstream in upstreams))


@pytest.fixture
def session(proxy: NginxProxy) -> Iterator[requests.Session]:
    with open_session(lambda: Endpoint(proxy.url, "m", "the-key")) as session:
        yield session


def who(response: requests.Response) -> str:
    return response.headers[REPLICA_HEADER].rpartition(" ")[2]


@needs_nginx
def test_idle_servers_are_taken_in_turn_and_the_key_reaches_them(
    session: requests.Session, upstreams: tuple[Upstream, Upstream]
) -> None:
    answers = [session.get("/v1/models", timeout=10) for _ in range(6)]
    assert [answer.text for answer in answers] == ["Bearer the-key"] * 6
    assert sorted(map(who, answers)) == sorted([upstream.address for upstream in upstreams] * 3)
    assert [len(upstream.requests) for upstream in upstreams] == [3, 3]


@needs_nginx
def test_server_with_fewest_open_requests_gets_the_next(
    proxy: NginxProxy, session: requests.Session, upstreams: tuple[Upstream, Upstream]
) -> None:
    answers: list[requests.Response] = []
    thread = threading.Thread(target=lambda: answers.append(requests.post(f"{proxy.url}/wait", data="x", timeout=20)))
    thread.start()
    wait_until(lambda: any(upstream.requests for upstream in upstreams), "the request that waits")
    busy, free = sorted(upstreams, key=lambda upstream: -len(upstream.requests))
    assert {who(session.post("/v1/completions", data="x", timeout=10)) for _ in range(8)} == {free.address}
    busy.go_on.set()
    thread.join()
    assert who(answers[0]) == busy.address


@needs_nginx
def test_every_piece_of_an_answer_comes_when_it_was_sent(
    session: requests.Session, upstreams: tuple[Upstream, Upstream]
) -> None:
    with session.post("/stream", data="x", stream=True, timeout=10) as response:
        pieces = response.iter_content(None)
        assert next(pieces) == b"data: a\n\n"  # the server does not go on before
        for upstream in upstreams:
            upstream.go_on.set()
        assert list(pieces) == [b"data: b\n\n"]


@needs_nginx
def test_connections_are_kept_on_both_sides(proxy: NginxProxy, upstreams: tuple[Upstream, Upstream]) -> None:
    host, port = proxy.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        file = client.makefile("rb")
        for _ in range(1200):  # nginx closes after 1000 unless it is told otherwise
            client.sendall(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                line = file.readline()
                assert line, "the proxy closed the connection"
                head += line
            assert head.startswith(b"HTTP/1.1 200 ")
    assert [upstream.connections for upstream in upstreams] == [1, 1]
    assert sum(len(upstream.requests) for upstream in upstreams) == 1200


@needs_nginx
def test_server_that_is_gone_costs_no_request(
    session: requests.Session, upstreams: tuple[Upstream, Upstream], tmp_path: Path
) -> None:
    gone, left = upstreams
    gone.close()
    answers = [session.post("/v1/completions", data="x", timeout=10) for _ in range(20)]
    assert [answer.status_code for answer in answers] == [200] * 20
    assert {who(answer) for answer in answers} == {left.address}
    assert len(left.requests) == 20
    assert f'upstream: "http://{gone.address}/v1/completions"' in (tmp_path / "proxy.log").read_text()


@needs_nginx
def test_server_that_refuses_is_asked_no_more_for_a_while(
    session: requests.Session, upstreams: tuple[Upstream, Upstream], tmp_path: Path
) -> None:
    upstreams[0].close()
    for _ in range(20):
        session.get("/x", timeout=10)
    assert (tmp_path / "proxy.log").read_text().count("Connection refused") == 3


@needs_nginx
def test_request_that_was_sent_is_not_sent_to_another_server(
    session: requests.Session, upstreams: tuple[Upstream, Upstream]
) -> None:
    assert session.post("/hang-up", data="x", timeout=10).status_code == 502
    assert sum(len(upstream.requests) for upstream in upstreams) == 1


@needs_nginx
@pytest.mark.parametrize(("method", "computed"), [("POST", 1), ("GET", 2)])
def test_refusal_of_a_server_goes_to_the_client_unless_asking_again_is_harmless(
    session: requests.Session, upstreams: tuple[Upstream, Upstream], method: str, computed: int
) -> None:
    body = "x" if method == "POST" else None
    assert session.request(method, "/busy", data=body, timeout=10).status_code == 503
    assert sum(len(upstream.requests) for upstream in upstreams) == computed


@needs_nginx
def test_large_prompts_pass(session: requests.Session, upstreams: tuple[Upstream, Upstream]) -> None:
    assert session.post("/v1/completions", data=b"x" * 5_000_000, timeout=20).status_code == 200


@needs_nginx
def test_it_listens_on_loopback_alone_and_one_worker_counts_all_requests(proxy: NginxProxy, temporary: Path) -> None:
    wait_until(lambda: len(nginx_processes(str(temporary))) == 2, "the worker")
    master, *workers = nginx_processes(str(temporary))
    assert len(workers) == 1
    listening = [found for found in master.net_connections("inet") if found.status == psutil.CONN_LISTEN]
    assert {f"http://{found.laddr.ip}:{found.laddr.port}" for found in listening} == {proxy.url}
    assert {process.username() for process in (master, *workers)} == {psutil.Process().username()}


# -- its end ---------------------------------------------------------------------------------------------------------


@needs_nginx
def test_stop_leaves_nothing_and_may_be_called_twice(proxy: NginxProxy, temporary: Path) -> None:
    wait_until(lambda: len(nginx_processes(str(temporary))) == 2, "the worker")
    processes = nginx_processes(str(temporary))
    proxy.check_alive()
    proxy.stop()
    assert are_gone(processes)
    assert os.listdir(temporary) == []
    proxy.stop()


@needs_nginx
def test_proxy_that_was_killed_is_told_and_leaves_nothing(proxy: NginxProxy, temporary: Path) -> None:
    wait_until(lambda: len(nginx_processes(str(temporary))) == 2, "the worker")
    master, *workers = nginx_processes(str(temporary))
    master.kill()
    wait_until(lambda: are_gone([master, *workers]), "the end of the proxy")

    def told() -> str:
        try:
            proxy.check_alive()
        except ServerExited as error:
            return str(error)
        return ""

    wait_until(told, "the news of its end")
    assert told().startswith(
        "nginx in front of the replicas of layout tp1x2 went away while it was in use (ended by SIGKILL)\n  cause: "
    )


@needs_nginx
def test_port_that_is_taken_is_told_with_the_cause(start: Start, upstreams: tuple[Upstream, Upstream]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # it does not listen, so that nobody can take it for the proxy
        port = taken.getsockname()[1]
        with pytest.raises(ServerStartFailed) as caught:
            start(upstreams[0].address, port=port)
    headline, cause, command, *_ = str(caught.value).splitlines()
    assert headline == (
        f"nginx in front of the replicas of layout tp1x2 does not listen at http://127.0.0.1:{port} (exit code 1)"
    )
    assert cause.startswith("  cause: ")
    assert (
        f"bind() to 127.0.0.1:{port} failed (98: Address already in use)" in cause or "still could not bind" in cause
    )
    assert " -c nginx.conf" in command


# -- on a busy host --------------------------------------------------------------------------------------------------


@needs_nginx
def test_it_runs_before_ordinary_processes_where_it_may(proxy: NginxProxy, temporary: Path) -> None:
    policies = {os.sched_getscheduler(process.pid) for process in nginx_processes(str(temporary))}
    assert policies == {getattr(os, proxy.scheduling)}


@needs_nginx
def test_it_works_where_it_may_not(
    start: Start, upstreams: tuple[Upstream, Upstream], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    proxy = start(upstreams[0].address)
    assert proxy.scheduling == "SCHED_OTHER"
    assert requests.get(f"{proxy.url}/x", timeout=10).status_code == 200
