from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import pytest

from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
from pytest_gpulayout.adapters.server_address import locate
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.ports import Endpoint
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.workload import Workload
from tests.support.stream_server import Reply, StreamServer

FOLDER = Path(__file__).parents[1] / "data" / "tls"
SMALL = Workload(name="small", input_tokens=20, output_tokens=3, concurrency=2, requests=6, batches=2)


@pytest.fixture
def context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(FOLDER / "cert.pem", FOLDER / "key.pem")
    return context


@pytest.fixture
def trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(FOLDER / "cert.pem"))


def drive(url: str, workload: Workload = SMALL, *, key: str | None = None, processes: int | None = None) -> RunTrace:
    driver = OpenAiStreamDriver(processes=processes)
    return driver.run(Endpoint(url, "m", key), workload, seed=1, progress=lambda _line: None)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.usefixtures("trust")
def test_a_server_behind_tls_is_measured(context: ssl.SSLContext, version: ssl.TLSVersion) -> None:
    context.minimum_version = context.maximum_version = version
    with StreamServer(Reply(itl_s=0.002), tls=context, api_key="sekret") as server:
        run = drive(server.url, key="sekret")
        sent = {record.request_id: record for record in server.sent}
    assert server.url.startswith("https://")
    assert run.failed == ()
    assert run.reconnects == 0
    for trace in run.requests:
        record = sent[trace.request_id]
        assert trace.send_ns < record.received_ns
        assert all(ours > theirs for ours, theirs in zip(trace.chunk_ns, record.chunk_ns, strict=True))
    if run.batches[0].clients[0].unstamped < run.batches[0].clients[0].events:
        assert "receive time of the TLS record that completed the data (SO_TIMESTAMPING)" in run.timestamp_source
        assert run.sent_source.startswith("the kernel's time")


@pytest.mark.usefixtures("trust")
def test_connections_are_opened_again_in_the_loop(context: ssl.SSLContext) -> None:
    workload = Workload(name="w", input_tokens=20, output_tokens=3, concurrency=1, requests=3, batches=1)
    with StreamServer(Reply(close=True, announce=True), tls=context) as server:
        run = drive(server.url, workload)
    assert run.failed == ()
    assert [trace.connect_ns > 0 for trace in run.requests] == [False, True, True]
    assert run.reconnects == 2


@pytest.mark.usefixtures("trust")
def test_large_requests_and_worker_processes(context: ssl.SSLContext) -> None:
    large = Workload(name="large", input_tokens=200_000, output_tokens=3, concurrency=2, requests=2, batches=1)
    with StreamServer(tls=context) as server:
        run = drive(server.url, large, processes=2)
    assert run.failed == ()
    assert [trace.prompt_tokens for trace in run.requests] == [200_000] * 2


@pytest.mark.usefixtures("trust")
def test_a_connection_that_breaks_is_a_failed_request(context: ssl.SSLContext) -> None:
    with StreamServer(lambda n: Reply(abort_after=1) if n == 3 else Reply(), tls=context) as server:
        run = drive(server.url)
    (failed,) = run.failed
    assert "of the answer" in str(failed.error)


@pytest.mark.usefixtures("trust")
def test_over_ipv6_and_by_name(context: ssl.SSLContext) -> None:
    try:
        with StreamServer(tls=context, host="::1") as server:
            run = drive(server.url)
    except AssertionError:
        pytest.skip("this host has no IPv6 loopback")
    assert run.failed == ()
    with StreamServer(tls=context) as server:
        assert drive(server.url.replace("127.0.0.1", "localhost")).failed == ()


def test_a_certificate_that_nobody_trusts_is_refused_before_anything_is_sent(context: ssl.SSLContext) -> None:
    with StreamServer(tls=context) as server, pytest.raises(MeasurementError) as error:
        drive(server.url, key="sekret")
    lines = str(error.value).splitlines()
    assert lines[0] == "a TLS connection to a server that can be trusted is needed"
    assert "self-signed certificate" in lines[1]
    assert lines[2] == f"  at {server.url}"
    assert "SSL_CERT_FILE=" in lines[3]
    assert "sekret" not in str(error.value)


@pytest.mark.usefixtures("trust")
def test_a_certificate_for_another_name_is_refused(context: ssl.SSLContext) -> None:
    with StreamServer(tls=context, host="127.0.0.2") as server, pytest.raises(MeasurementError) as error:
        drive(server.url)
    assert "IP address mismatch" in str(error.value)
    assert "use the name that the certificate is for" in str(error.value)


def test_a_server_that_speaks_no_tls_is_told_from_a_bad_certificate() -> None:
    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.recv(1000)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        with pytest.raises(MeasurementError) as error:
            drive(f"https://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert "found: WRONG_VERSION_NUMBER" in str(error.value)
    assert "use the http:// address if the server speaks no TLS" in str(error.value)


def test_a_server_that_waits_for_more_than_a_handshake() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(MeasurementError) as error:
        locate(Endpoint(f"https://127.0.0.1:{silent.getsockname()[1]}", "m"), 0.1)
    assert "handshake operation timed out" in str(error.value)
    assert "use the http:// address if the server speaks no TLS" in str(error.value)


def test_nobody_listens_on_the_default_port_of_https() -> None:
    with pytest.raises(MeasurementError) as error:
        locate(Endpoint("https://127.0.0.3", "m"), 1.0)
    assert "a server that takes connections is needed" in str(error.value)


@pytest.mark.usefixtures("trust")
def test_small_questions_use_the_same_address(context: ssl.SSLContext) -> None:
    with StreamServer(tls=context, api_key="sekret") as server:
        address = locate(Endpoint(server.url, "m", "sekret"), 5.0)
        assert address.ask("GET", "/v1/models")[0] == 200
        assert address.ask("GET", "/nothing") == (404, b'{"detail":"Not Found"}')
