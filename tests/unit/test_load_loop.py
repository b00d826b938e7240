from __future__ import annotations

import itertools
import math
import select
import socket
import struct
import time
from contextlib import closing
from dataclasses import replace

import pytest

from pytest_gpulayout.adapters import connection as connections
from pytest_gpulayout.adapters import kernel_time, load_loop
from pytest_gpulayout.adapters.http_exchange import Exchange
from pytest_gpulayout.adapters.kernel_time import SO_TIMESTAMPING, Alarm, KernelTime, request_stamps
from pytest_gpulayout.adapters.load_loop import Lags
from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
from pytest_gpulayout.arrivals import arrival_offsets_ns
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.ports import Endpoint
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.workload import Workload
from tests.support.stream_server import Reply, StreamServer

MS = 1_000_000
SMALL = Workload(name="small", input_tokens=20, output_tokens=3, concurrency=2, requests=6, batches=2)


def drive(server: StreamServer, workload: Workload, *, seed: int = 1) -> RunTrace:
    return OpenAiStreamDriver().run(Endpoint(server.url, "m"), workload, seed=seed, progress=lambda _line: None)


def arrivals(rate: float, requests: int, *, concurrency: int | None = None, batches: int = 1) -> Workload:
    return Workload(
        name="open",
        input_tokens=20,
        output_tokens=3,
        rate=rate,
        requests=requests,
        concurrency=concurrency,
        batches=batches,
        warmup_requests=1,
    )


def chunked(*bodies: bytes, trailer: bytes = b"", head: bytes = b"") -> bytes:
    frames = b"".join(b"%x\r\n%s\r\n" % (len(body), body) for body in bodies)
    return (
        b"HTTP/1.1 200 OK\r\n" + head + b"Transfer-Encoding: chunked\r\n\r\n" + frames + b"0\r\n" + trailer + b"\r\n"
    )


SSE = b'data: {"a": 1}\n\n', b'data: {"b": 2}\n\n', b"data: [DONE]\n\n"
CRLF_SSE = tuple(body.replace(b"\n", b"\r\n") for body in SSE)

ANSWERS = {
    "chunked": (chunked(*SSE), b"".join(SSE), True),
    "trailer": (chunked(*SSE, trailer=b"X-Sum: 12\r\n"), b"".join(SSE), True),
    "crlf": (chunked(*CRLF_SSE), b"".join(CRLF_SSE), True),
    "looks like the end": (chunked(b"\r\n0\r\n\r\n", b"x", b"\r\n\r\n"), b"\r\n0\r\n\r\nx\r\n\r\n", True),
    "hangs up": (chunked(*SSE, head=b"Connection: close\r\n"), b"".join(SSE), False),
    "length": (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nsome\r\n\r\n!", b"some\r\n\r\n!", True),
    "interim": (b"HTTP/1.1 100 Continue\r\n\r\n" + chunked(*SSE), b"".join(SSE), True),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_ends_with_its_last_byte_wherever_it_is_cut(name: str) -> None:
    answer, body, keep_alive = ANSWERS[name]
    for cut, second in itertools.combinations(range(1, len(answer) + 1), 2):
        exchange = Exchange(b"")
        pieces = [piece for piece in (answer[:cut], answer[cut:second], answer[second:]) if piece]
        ended = [exchange.take(10 * (number + 1), piece) for number, piece in enumerate(pieces)]
        assert ended == [False] * (len(pieces) - 1) + [True], (cut, second)
        assert (exchange.status, exchange.keep_alive, exchange.error) == (200, keep_alive, None)
        assert (exchange.first_byte_ns, exchange.end_ns) == (10, 10 * len(pieces))
        assert b"".join(data for _, data in exchange.pieces()) == body


def test_byte_by_byte_each_byte_of_the_body_keeps_its_instant() -> None:
    answer, body, _ = ANSWERS["crlf"]
    exchange = Exchange(b"")
    ended = [exchange.take(index, answer[index : index + 1]) for index in range(len(answer))]
    assert ended.index(True) == len(answer) - 1
    assert [answer[now_ns : now_ns + 1] for now_ns, _ in exchange.pieces()] == [bytes([byte]) for byte in body]


def test_a_connection_that_says_more_than_was_asked_is_not_used_again() -> None:
    exchange = Exchange(b"")
    assert exchange.take(1, chunked(*SSE) + b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
    assert not exchange.keep_alive
    assert exchange.error is None
    assert b"".join(data for _, data in exchange.pieces()) == b"".join(SSE)


def test_broken_framing_is_found_when_the_answer_ends() -> None:
    exchange = Exchange(b"")
    exchange.take(1, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
    exchange.take(2, b"not a length\r\n")
    exchange.end_of_stream(3, "the server closed the connection")
    assert str(exchange.error).startswith("the answer is not HTTP: ")
    assert exchange.pieces() == [(1, b"abc")]


def ancillary(stamp_ns: int) -> list[tuple[int, int, bytes]]:
    content = struct.pack("@qqqqqq", *divmod(stamp_ns, 1_000_000_000), 0, 0, 0, 0)
    return [(socket.SOL_SOCKET, SO_TIMESTAMPING, content)]


def test_a_stamp_counts_only_where_it_can_be_true() -> None:
    clock = KernelTime()
    now_ns = time.monotonic_ns()
    real_ns = time.time_ns()
    floor_ns = now_ns - 10 * MS

    def arrival(ago_ns: int) -> int | None:
        return clock.arrival(ancillary(real_ns - ago_ns), floor_ns, now_ns)

    believed = arrival(5 * MS)
    assert believed is not None
    assert abs(believed - (now_ns - 5 * MS)) < MS
    assert arrival(-5 * MS) is None, "after it was read"
    assert arrival(50 * MS) is None, "before anything was sent"
    assert clock.arrival(ancillary(0), floor_ns, now_ns) is None, "no software stamp"
    assert clock.arrival([], floor_ns, now_ns) is None
    assert clock.arrival([(0, 11, b"something else")], floor_ns, now_ns) is None


def test_a_stamp_just_outside_is_the_two_clocks_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 5_000 * MS)
    monkeypatch.setattr(time, "monotonic_ns", lambda: 1_000 * MS)
    clock = KernelTime()
    assert clock.follow() == 1_000 * MS
    assert clock.arrival(ancillary(4_999 * MS), 998 * MS, 1_000 * MS) == 999 * MS
    assert clock.arrival(ancillary(5_000 * MS + 1), 998 * MS, 1_000 * MS) == 1_000 * MS
    assert clock.arrival(ancillary(4_998 * MS - 1), 998 * MS, 1_000 * MS) == 998 * MS


def test_a_clock_reading_that_was_interrupted_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([0, 0, 0, 0, 10_000, 10_000, 10_000 + MS])
    monkeypatch.setattr(time, "time_ns", lambda: 5_000 * MS)
    monkeypatch.setattr(time, "monotonic_ns", lambda: next(readings))
    clock = KernelTime()
    assert clock.follow() == 10_000
    clock.follow()
    assert clock.arrival(ancillary(5_000 * MS), -MS, MS) == 5_000


def test_the_kernel_tells_when_bytes_arrived_and_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as ours:
        theirs, _ = listener.accept()
        with theirs:
            request_stamps(ours)
            clock = KernelTime()
            sent = 0
            for _ in range(1_000):  # the kernel begins to stamp a moment after the first who asked
                before_ns = time.monotonic_ns()
                ours.sendall(b"?")
                sent += 1
                assert theirs.recv(100) == b"?"
                theirs.sendall(b"!")
                data, extra, _, _ = ours.recvmsg(100, kernel_time.ANCILLARY_BYTES)
                assert data == b"!"
                sent_ns = clock.sent_stamp(ours, sent - 1, before_ns)
                if extra:
                    break
            else:
                pytest.skip("this kernel takes no receive stamps")
            now_ns = time.monotonic_ns()
            arrived_ns = clock.arrival(extra, before_ns, now_ns)
            assert arrived_ns is not None
            assert sent_ns is not None
            assert before_ns <= sent_ns <= arrived_ns <= now_ns
            assert clock.sent_stamp(ours, sent - 1, before_ns) is None, "the queue was emptied"


def test_the_alarm_rings_at_its_instant_and_can_be_moved() -> None:
    with closing(Alarm()) as alarm, select.epoll() as epoll:
        epoll.register(alarm, select.EPOLLIN)
        alarm.ring_at(time.monotonic_ns() + 3_600_000 * MS)
        assert epoll.poll(0) == []
        at_ns = time.monotonic_ns() + 3 * MS
        alarm.ring_at(at_ns)
        assert epoll.poll(10) == [(alarm.fileno(), select.EPOLLIN)]
        assert time.monotonic_ns() >= at_ns
        alarm.ring_at(0)
        assert epoll.poll(0) == []


def test_sources_of_the_stamps_are_named() -> None:
    with StreamServer() as server:
        run = drive(server, SMALL)
    clients = [batch.clients[0] for batch in run.batches]
    if clients[0].unstamped == clients[0].events:
        pytest.skip("this kernel takes no receive stamps")
    assert run.timestamp_source == "the kernel's receive time of the data (SO_TIMESTAMPING), as CLOCK_MONOTONIC"
    assert run.sent_source.startswith("the kernel's time of handing the last byte to the network device")
    for trace in run.requests:
        assert trace.first_byte_ns is not None
        assert trace.sent_ns is not None
        assert trace.send_ns <= trace.sent_ns <= trace.first_byte_ns <= trace.chunk_ns[0]
    assert all(client.read_lag_ns and client.send_lag_ns and client.events > 0 for client in clients)


def test_a_kernel_without_stamps_leaves_user_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "request_stamps", lambda _socket: None)
    with StreamServer() as server:
        run = drive(server, SMALL)
    assert run.failed == ()
    assert run.timestamp_source == "CLOCK_MONOTONIC in user space, right after recvmsg() returned"
    assert run.sent_source == "CLOCK_MONOTONIC in user space, right after send() of the last byte returned"
    client = run.batches[0].clients[0]
    assert (client.unstamped, client.read_lag_ns) == (client.events, None)
    assert all(trace.sent_ns is not None and trace.sent_ns >= trace.send_ns for trace in run.requests)


def test_a_kernel_that_refuses_is_asked_for_less_and_then_left_alone() -> None:
    asked: list[int] = []

    class Refusing(socket.socket):
        def setsockopt(self, _level: int, _option: int, value: int) -> None:  # type: ignore[override]
            asked.append(value)
            raise OSError(92, "Protocol not available")

    with Refusing() as refusing:
        request_stamps(refusing)
    everything, receive_only = asked
    assert everything & receive_only == receive_only != everything


def test_open_arrivals_keep_to_their_timetable_and_it_is_in_the_result() -> None:
    workload = arrivals(200.0, 20, batches=2)
    with StreamServer() as server:
        run = drive(server, workload, seed=7)
    assert run.failed == ()
    assert [list(table) for table in run.schedule_ns] == [
        list(arrival_offsets_ns(workload, seed=seed) or ()) for seed in (7, 8)
    ]
    for batch, table in zip(run.batches, run.schedule_ns, strict=True):
        assert [trace.intended_ns for trace in batch.requests] == [batch.start_ns + due for due in table]
        assert all(trace.send_ns >= (trace.intended_ns or math.inf) for trace in batch.requests)
        assert {trace.queued_ns for trace in batch.requests} == {0}
        assert batch.clients[0].send_lag_ns is not None


def test_arrivals_without_a_limit_open_what_they_miss_and_say_so() -> None:
    workload = arrivals(math.inf, 8)
    with StreamServer(lambda n: Reply(ttft_s=0.05, close=n == 0, announce=n == 0)) as server:
        run = drive(server, workload)
    assert run.failed == ()
    assert server.most_in_flight == 8
    assert [trace.intended_ns for trace in run.requests] == [run.batches[0].start_ns] * 8


def test_a_connection_that_is_opened_for_a_due_request_is_never_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_gpulayout.adapters.openai_stream._MOST_OPENED_BEFORE", 2)
    with StreamServer(Reply(ttft_s=0.05)) as server:
        run = drive(server, arrivals(math.inf, 6, batches=2))
    assert run.failed == ()
    assert [sum(trace.connect_ns > 0 for trace in batch.requests) for batch in run.batches] == [4, 0]
    assert run.reconnects == 0


def test_arrivals_that_find_no_place_wait_in_the_client_and_say_how_long() -> None:
    with StreamServer(Reply(ttft_s=0.03)) as server:
        run = drive(server, arrivals(math.inf, 6, concurrency=2))
    assert run.failed == ()
    assert server.most_in_flight == 2
    start_ns = run.batches[0].start_ns
    ends = sorted(trace.end_ns for trace in run.requests)
    assert [trace.queued_ns for trace in run.requests[:2]] == [0, 0]
    assert sorted(trace.queued_ns for trace in run.requests[2:]) == [end - start_ns for end in ends[:4]]
    assert all(trace.send_ns >= start_ns + trace.queued_ns for trace in run.requests)


def test_raw_bytes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[int] = []
    read = load_loop.LoadLoop._read_one_answer

    def watched(loop: load_loop.LoadLoop) -> None:
        waiting.append(len(loop._finished))
        read(loop)

    monkeypatch.setattr(load_loop, "RAW_BYTES_CAP", 1)
    monkeypatch.setattr(load_loop.LoadLoop, "_kernel_stamps", lambda _loop: False)  # nor is there time to read
    monkeypatch.setattr(load_loop.LoadLoop, "_read_one_answer", watched)
    with StreamServer() as server:
        run = drive(server, SMALL)
    assert run.failed == ()
    assert set(waiting) == {1}


def test_a_connection_that_the_server_closes_while_it_is_idle_is_opened_again_and_counted() -> None:
    workload = replace(arrivals(8.0, 4, concurrency=1), burstiness=math.inf)  # time for a busy machine to close it
    with StreamServer(lambda n: Reply(close=n > 0)) as server:
        run = drive(server, workload)
    assert run.failed == ()
    assert run.reconnects == 3
    assert [trace.connect_ns > 0 for trace in run.requests] == [False, True, True, True]


@pytest.mark.parametrize("callback", ["on_message_begin", "on_header", "on_headers_complete", "on_message_complete"])
def test_ctrl_c_while_an_answer_is_parsed_is_not_lost(monkeypatch: pytest.MonkeyPatch, callback: str) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Exchange, callback, interrupted)
    with StreamServer() as server, pytest.raises(KeyboardInterrupt):
        drive(server, SMALL)


def test_nobody_listens_any_more_for_a_due_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_gpulayout.adapters.openai_stream._MOST_OPENED_BEFORE", 1)

    def reply(number: int) -> Reply:
        if number == 0:
            server.stop_listening()
        return Reply(ttft_s=0.05)

    with StreamServer(reply) as server, pytest.raises(MeasurementError) as error:
        drive(server, arrivals(math.inf, 4))
    assert "open: batch 1/1 needs a server that goes on answering" in str(error.value)
    assert "cannot connect again: Connection refused" in str(error.value)


def test_lags_are_summed_up_closely_in_little_memory() -> None:
    lags = Lags()
    for value in range(1, 100_001):
        lags.add(value * 1_000)
        lags.fold()
    p50, p99, most = lags.summary() or (0, 0, 0)
    assert p50 == pytest.approx(50_000_000, rel=0.02)
    assert p99 == pytest.approx(99_000_000, rel=0.02)
    assert most == 100_000_000
    assert len(lags._counts) < 500
    assert Lags().summary() is None
