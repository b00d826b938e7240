"""The mock that measures the load client: it must do what it says it did."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from itertools import pairwise
from typing import Any

import psutil
import pytest

from pytest_gpulayout.adapters.calibrator import RunningMock, running_mock
from pytest_gpulayout.adapters.sse import read_completion_stream
from pytest_gpulayout.calibration import SentAnswer
from pytest_gpulayout.fingerprint import parse_fingerprint
from tests.support.processes import wait_until

pytestmark = pytest.mark.end_to_end

MS = 1_000_000
COMMAND = [sys.executable, "-m", "pytest_gpulayout.adapters.mock_server", "--ttft-ms=1", "--itl-ms=1"]
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def mock() -> Iterator[RunningMock]:
    with running_mock(ttft_ms=3, itl_ms=2) as running:
        yield running


@pytest.fixture(scope="module")
def hasty() -> Iterator[RunningMock]:
    """Answers without a pause."""
    with running_mock(ttft_ms=0, itl_ms=0) as running:
        yield running


def ask(mock: RunningMock, path: str, document: object = None, **headers: str) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", mock.port, timeout=20)
    body = None if document is None else json.dumps(document)
    connection.request("GET" if document is None else "POST", path, body, headers)
    response = connection.getresponse()
    try:
        return response.status, response.read()
    finally:
        connection.close()


def messages(body: bytes) -> list[Any]:
    events = body.decode().split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events)
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def request_bytes(document: object, path: str = "/v1/completions", *headers: str) -> bytes:
    body = json.dumps(document).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: mock", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    response = HTTPResponse(connection)
    response.begin()
    return response.status, response.read()


def read_answers(connection: socket.socket) -> bytes:
    received = bytearray()
    while piece := connection.recv(1 << 16):
        received += piece
    return bytes(received)


def test_models_health_and_unknown_paths(mock: RunningMock) -> None:
    assert ask(mock, "/health") == (200, b"")
    assert json.loads(ask(mock, "/v1/models")[1])["data"][0]["id"] == "mock"
    assert ask(mock, "/v1/nothing")[0] == 404
    assert ask(mock, "/v1/completions")[0] == 404, "GET"


def test_tokenizer_knows_words(mock: RunningMock) -> None:
    _, body = ask(mock, "/tokenize", {"prompt": "to be or not to be"})
    tokens = json.loads(body)["tokens"]

    assert len(tokens) == json.loads(body)["count"] == 6
    assert len(set(tokens)) == 4
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "two words"}, {"type": "image_url"}]}]}
    assert json.loads(ask(mock, "/tokenize", chat)[1])["count"] == 3


@pytest.mark.parametrize("api", ["completions", "chat/completions"])
@pytest.mark.parametrize("continuous", [True, False])
def test_streams_as_vllm_does(mock: RunningMock, api: str, continuous: bool) -> None:
    prompt = {"prompt": [5, 6, 7]} if api == "completions" else {"messages": [{"role": "user", "content": "a b c"}]}
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    _, body = ask(
        mock, f"/v1/{api}", {**prompt, "model": "x", "max_tokens": 3, "stream": True, "stream_options": options}
    )

    stream = read_completion_stream([(1, body)])
    assert (stream.error, stream.prompt_tokens, stream.completion_tokens) == (None, 3, 3)
    assert stream.text == " x x x"
    assert len(stream.chunk_ns) == 3
    assert (list(stream.chunk_tokens) if stream.chunk_tokens is not None else None) == (
        [1, 1, 1] if continuous else None
    )
    *chunks, usage = messages(body)
    assert {chunk["model"] for chunk in chunks} == {"x"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "length"]
    assert usage["choices"] == []
    assert parse_fingerprint(usage["system_fingerprint"]) is not None


def test_chat_names_the_role_before_the_first_token(mock: RunningMock) -> None:
    _, body = ask(mock, "/v1/chat/completions", {"messages": [], "max_completion_tokens": 2, "stream": True})

    deltas = [message["choices"][0]["delta"] for message in messages(body)]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": " x"}, {"content": " x"}]


@pytest.mark.parametrize(
    ("api", "prompt", "content"),
    [
        ("completions", {"prompt": "one two"}, {"text": " x x"}),
        (
            "chat/completions",
            {"messages": [{"content": "one two"}]},
            {"message": {"role": "assistant", "content": " x x"}},
        ),
    ],
)
def test_answers_without_a_stream(
    mock: RunningMock, api: str, prompt: dict[str, object], content: dict[str, object]
) -> None:
    mock.take_sent()
    _, body = ask(mock, f"/v1/{api}", {**prompt, "max_tokens": 2})

    document = json.loads(body)
    assert document["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    assert content.items() <= document["choices"][0].items()
    (sent,) = mock.take_sent()
    assert sent.fingerprint == document["system_fingerprint"]
    assert sent.chunk_ns[0] - sent.received_ns >= 5 * MS


def test_bad_requests_get_an_answer_and_do_no_harm(mock: RunningMock) -> None:
    documents: list[object] = [{"max_tokens": 3}, {"prompt": "a", "max_tokens": -1}, [], "text"]
    for document in documents:
        status, body = ask(mock, "/v1/completions", document)
        assert status == 400
        assert json.loads(body)["error"]["code"] == 400
    with socket.create_connection(("127.0.0.1", mock.port), timeout=20) as connection:
        connection.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert read_answers(connection).startswith(b"HTTP/1.1 400 ")
    assert ask(mock, "/health")[0] == 200


def test_tells_what_it_sent_once_and_by_both_names(mock: RunningMock) -> None:
    mock.take_sent()
    fingerprints = [
        messages(
            ask(mock, "/v1/completions", {"prompt": [1], "max_tokens": 4, **STREAMED}, **{"X-Request-Id": name})[1]
        )[-1]["system_fingerprint"]
        for name in ("first", "second")
    ]

    sent = mock.take_sent()
    assert [answer.request_id for answer in sent] == ["first", "second"]
    assert [answer.fingerprint for answer in sent] == fingerprints
    assert len(set(fingerprints)) == 2
    assert [len(answer.chunk_ns) for answer in sent] == [4, 4]
    assert mock.take_sent() == []


def test_timetable_is_absolute(mock: RunningMock) -> None:
    mock.take_sent()
    ask(mock, "/v1/completions", {"prompt": [1], "max_tokens": 50, **STREAMED})

    (sent,) = mock.take_sent()
    due_ns = [sent.received_ns + 3 * MS + number * 2 * MS for number in range(50)]
    assert all(stamp >= due for stamp, due in zip(sent.chunk_ns, due_ns, strict=True)), "none before its time"
    gaps_ns = [later - earlier for earlier, later in pairwise(sent.chunk_ns)]
    assert 0 < min(gaps_ns) < 2 * MS, "a late chunk moves none of the others"


def test_many_streams_at_once_all_end(mock: RunningMock) -> None:
    mock.take_sent()
    connections = [socket.create_connection(("127.0.0.1", mock.port), timeout=20) for _ in range(40)]
    for number, connection in enumerate(connections):
        connection.sendall(request_bytes({"prompt": [1] * number + [2], "max_tokens": 1 + number, **STREAMED}))
    answers = [read_answer(connection) for connection in connections]
    for connection in connections:
        connection.close()

    usages = [messages(body)[-1]["usage"] for _, body in answers]
    assert [usage["completion_tokens"] for usage in usages] == list(range(1, 41))
    assert [usage["prompt_tokens"] for usage in usages] == list(range(1, 41))
    assert [len(answer.chunk_ns) for answer in mock.take_sent()] == list(range(1, 41))


def test_a_request_may_come_in_two_pieces_cut_anywhere(hasty: RunningMock) -> None:
    whole = request_bytes({"prompt": [1, 2], "max_tokens": 2, **STREAMED}, "/v1/completions", "X-Request-Id: r")
    hasty.take_sent()
    witness = HTTPConnection("127.0.0.1", hasty.port, timeout=20)
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for cut in range(1, len(whole)):
            connection.sendall(whole[:cut])
            witness.request("GET", "/health")  # answered after the first piece was read: there is one thread
            assert witness.getresponse().read() == b""
            connection.sendall(whole[cut:])
            assert len(messages(read_answer(connection)[1])) == 3, f"cut after {cut} bytes"
    witness.close()
    assert [answer.request_id for answer in hasty.take_sent()] == ["r"] * (len(whole) - 1)


def test_requests_that_do_not_wait_are_answered_in_turn(hasty: RunningMock) -> None:
    first = request_bytes({"prompt": [1], "max_tokens": 5, **STREAMED})
    second = request_bytes({"prompt": "a b"}, "/tokenize", "Connection: close")
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=20) as connection:
        connection.sendall(first + second)
        received = read_answers(connection)

    streamed, _, tokenized = received.partition(b"\r\n0\r\n\r\n")
    assert streamed.count(b'"text":" x"') == 5
    assert tokenized.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Connection: close" in tokenized
    assert b'"count":2' in tokenized


def test_body_in_chunks_and_a_client_that_asks_first(hasty: RunningMock) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=20) as connection:
        connection.sendall(head)
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b'8\r\n{"prompt\r\n9\r\n":"a b c"\r\n1\r\n}\r\n0\r\n\r\n')
        assert b'"count":3' in read_answer(connection)[1]


def test_a_client_that_reads_late_misses_nothing(hasty: RunningMock) -> None:
    hasty.take_sent()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", hasty.port))
    connection.sendall(request_bytes({"prompt": [1], "max_tokens": 50_000, **STREAMED}))
    records: list[SentAnswer] = []

    def take() -> list[SentAnswer]:
        records.extend(hasty.take_sent())
        return records

    wait_until(take, "the answer")
    assert len(records[0].chunk_ns) == 50_000, "sent, as far as the server is concerned"
    with connection:
        _, body = read_answer(connection)

    assert len(messages(body)) == 50_001


def test_a_client_that_hangs_up_disturbs_nobody(mock: RunningMock) -> None:
    mock.take_sent()
    with socket.create_connection(("127.0.0.1", mock.port), timeout=20) as connection:
        connection.sendall(request_bytes({"prompt": [1], "max_tokens": 10_000, **STREAMED}))
        assert connection.recv(10).startswith(b"HTTP/1.1")
        assert mock.take_sent() == [], "told when it has ended"
    _, body = ask(mock, "/v1/completions", {"prompt": [1], "max_tokens": 50, **STREAMED})

    gone, answered = mock.take_sent()
    assert len(gone.chunk_ns) < 10_000
    assert len(messages(body)) == len(answered.chunk_ns) + 1 == 51


def test_ends_when_its_standard_input_closes() -> None:
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert int(child.stdout.readline()) > 0
        child.stdin.close()
        assert child.wait(20) == 0


PARENT = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_ends_when_its_parent_is_killed() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", PARENT, *COMMAND], stdin=pipe, stdout=pipe) as parent:
        assert parent.stdout is not None
        mock = psutil.Process(int(parent.stdout.readline()))
        assert mock.is_running()
        parent.kill()
    wait_until(lambda: not mock.is_running() or mock.status() == psutil.STATUS_ZOMBIE, "the end of the mock")
