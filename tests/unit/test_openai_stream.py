from __future__ import annotations

import gc
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pytest_gpulayout.adapters import openai_stream
from pytest_gpulayout.adapters.load_loop import Tally
from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.metrics import batch_metrics
from pytest_gpulayout.ports import Endpoint, LoadDriver
from pytest_gpulayout.trace import RunTrace, ServerTimings
from pytest_gpulayout.workload import Workload
from tests.support.stream_server import FINGERPRINT, Reply, StreamServer

SMALL = Workload(name="small", input_tokens=20, output_tokens=3, concurrency=2, requests=6, batches=2)
WARM_UP = SMALL.warmup_requests


def silent(_line: str) -> None:
    pass


def drive(
    server: StreamServer, workload: Workload = SMALL, *, seed: int = 1, stall_timeout_s: float = 330.0
) -> RunTrace:
    endpoint = Endpoint(server.url, "m", server.api_key)
    return OpenAiStreamDriver(stall_timeout_s=stall_timeout_s).run(endpoint, workload, seed=seed, progress=silent)


def only(number: int, reply: Reply) -> Callable[[int], Reply]:
    """The measured request of this number gets the reply, all others are answered well."""
    return lambda n: reply if n == number + WARM_UP else Reply()


def errors(run: RunTrace) -> dict[int, str]:
    return {trace.index: str(trace.error) for trace in run.failed}


def test_every_request_is_measured_and_batches_do_not_overlap() -> None:
    with StreamServer(api_key="sekret") as server:
        run = drive(server)
    assert errors(run) == {}
    assert [trace.index for trace in run.requests] == list(range(12))
    assert [trace.batch for trace in run.requests] == [0] * 6 + [1] * 6
    assert all((trace.prompt_tokens, trace.output_tokens, trace.text) == (20, 3, "xxx") for trace in run.requests)
    first, second = run.batches
    for batch in run.batches:
        assert batch.start_ns <= min(trace.send_ns for trace in batch.requests)
        assert batch.end_ns >= max(trace.end_ns for trace in batch.requests)
    assert first.end_ns <= second.start_ns
    assert (run.seed, run.warmup_requests, run.reconnects) == (1, 2, 0)
    assert set(batch_metrics(run)[0]) >= {"median_ttft_ms", "request_throughput"}


def test_stamps_lie_between_the_server_s_own_and_the_end() -> None:
    with StreamServer(Reply(ttft_s=0.01, itl_s=0.005)) as server:
        run = drive(server)
        sent = {record.request_id: record for record in server.sent}
    for trace in run.requests:
        record = sent[trace.request_id]
        assert trace.send_ns < record.received_ns
        assert all(ours > theirs for ours, theirs in zip(trace.chunk_ns, record.chunk_ns, strict=True))
        assert trace.chunk_ns[-1] <= trace.end_ns
    assert all(batch.loop_lag_max_ns > 0 and batch.clients[0].cpu_ns > 0 for batch in run.batches)


def test_the_client_runs_in_real_time_where_it_may_and_says_so() -> None:
    before = os.sched_getscheduler(0)
    with StreamServer() as server:
        allowed = drive(server).scheduling
    assert os.sched_getscheduler(0) == before
    assert allowed in ("SCHED_FIFO", "SCHED_OTHER")


def test_the_client_measures_without_the_right_to_real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with StreamServer() as server:
        run = drive(server)
    assert (run.scheduling, errors(run)) == ("SCHED_OTHER", {})


def test_concurrency_is_reached_and_connections_are_kept() -> None:
    with StreamServer(Reply(ttft_s=0.005)) as server:
        drive(server)
    assert server.most_in_flight == SMALL.concurrency
    assert server.connections == SMALL.concurrency + 2  # to find the address, and for /tokenize


def test_requests_ask_for_exactly_what_the_workload_says() -> None:
    with StreamServer() as server:
        drive(server, seed=2**40 + 5)
    body = server.bodies[0]
    prompt = body.pop("prompt")
    assert body.pop("cache_salt")
    assert len(prompt) == 20
    assert set(prompt) <= set(server.token_ids or ())
    assert body == {
        "model": "m",
        "max_tokens": 3,
        "min_tokens": 3,
        "ignore_eos": True,
        "temperature": 0,
        "repetition_penalty": 1.0,
        "seed": 5,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


def test_prompts_depend_on_the_seed_alone_and_none_comes_twice() -> None:
    def prompts(seed: int) -> list[tuple[int, ...]]:
        with StreamServer() as server:
            drive(server, seed=seed)
        return sorted(tuple(body["prompt"]) for body in server.bodies)

    assert prompts(1) == prompts(1)
    assert not set(prompts(1)) & set(prompts(2))
    assert len(set(prompts(1))) == WARM_UP + 12


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(status=503, body=b'{"error":{"message":"overloaded"}}'), "HTTP 503: overloaded"),
        (Reply(status=500, body=b"oops"), "HTTP 500: oops"),
        (Reply(error_after=1), "error in the stream: EngineCore encountered an issue."),
        (Reply(tokens=2), "3 completion tokens were asked for, the server counted 2"),
        (Reply(usage=False), "3 completion tokens were asked for, the server counted no usage at all"),
        (Reply(prompt_tokens=21), "20 prompt tokens were sent, the server counted 21"),
        (Reply(abort_after=2), "of the answer"),
        (Reply(raw=b""), "the server closed the connection after 0 bytes of the answer"),
        (Reply(raw=b"220 smtp.example ready\r\n"), "the answer is not HTTP: "),
        (Reply(raw=b"HTTP/1.1 200 OK\r\n\r\n"), "the server counted no usage at all"),
        (Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nda"), "closed the connection after 2 bytes"),
    ],
)
def test_a_failed_request_is_recorded_and_the_run_goes_on(reply: Reply, error: str) -> None:
    with StreamServer(only(3, reply)) as server:
        run = drive(server)
    ((index, found),) = errors(run).items()
    assert error in found
    assert index in (2, 3)  # the two streams race for the numbers
    assert len(server.bodies) == WARM_UP + 12, "nothing is sent twice"


def test_a_stalled_request_fails_alone_and_keeps_what_had_arrived() -> None:
    with StreamServer(only(3, Reply(stall_after=1))) as server:
        run = drive(server, stall_timeout_s=0.2)
    ((index, error),) = errors(run).items()
    assert error.startswith("no progress for 0.2 s, after ")
    assert len(run.requests[index].chunk_ns) == 1
    assert run.reconnects == 0, "it was opened again before the next batch"


def test_a_server_that_hangs_ends_the_run_instead_of_every_request_in_turn() -> None:
    with (
        StreamServer(lambda n: Reply(stall_after=0) if n >= WARM_UP else Reply()) as server,
        pytest.raises(MeasurementError) as error,
    ):
        drive(server, stall_timeout_s=0.1)
    assert "small: batch 1/2 needs a server that goes on answering" in str(error.value)
    assert "3 requests in a row made no progress; 2 requests had ended" in str(error.value)


@pytest.mark.parametrize("announce", [True, False], ids=["announced", "silent"])
def test_connections_closed_between_requests_are_opened_again_and_counted(announce: bool) -> None:
    with StreamServer(Reply(close=True, announce=announce)) as server:
        run = drive(
            server, Workload(name="w", input_tokens=20, output_tokens=3, concurrency=1, requests=3, batches=2)
        )
    if announce:
        assert errors(run) == {}
        assert [batch.reconnects for batch in run.batches] == [2, 2]
    else:  # whether the end of the connection was seen before the next request is a race, hiding it is not
        assert run.reconnects >= 2


def test_an_interim_response_is_not_the_answer() -> None:
    answer = b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\n'
    chunks = b'data: {"choices":[{"text":"a"}]}\n\n' * 3
    raw = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s%s"
    with StreamServer(only(0, Reply(raw=raw % (len(chunks + answer), chunks, answer)))) as server:
        run = drive(server)
    assert errors(run) == {}


def test_a_large_prompt_is_sent_in_parts() -> None:
    large = Workload(name="large", input_tokens=1_500_000, output_tokens=2, concurrency=1, requests=1, batches=1)
    with StreamServer() as server:
        run = drive(server, large)
    assert errors(run) == {}
    assert run.requests[0].prompt_tokens == 1_500_000


FIRST_BATCH_DIES = Reply(status=400, body=b'{"error":{"message":"This model\'s maximum context length is 32"}}')


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            FIRST_BATCH_DIES,
            "workload small needs a server that answers its warm-up requests\n"
            "  found: 2 of 2 failed, the first with: HTTP 400: This model's maximum context length is 32\n",
        ),
        (
            lambda n: FIRST_BATCH_DIES if n >= WARM_UP else Reply(),
            "batch 1 of workload small needs at least one answer\n"
            "  found: all 6 requests failed, the first with: HTTP 400: This model's maximum context length is 32\n",
        ),
    ],
    ids=["warm-up", "batch"],
)
def test_when_nothing_is_answered_the_run_ends_with_the_server_s_words(reply: Any, message: str) -> None:
    with StreamServer(reply) as server, pytest.raises(MeasurementError) as error:
        drive(server)
    assert message in str(error.value)
    assert f"at {server.url}, model 'm'" in str(error.value)


def test_a_server_that_goes_away_is_told_with_the_first_failure() -> None:
    def reply(number: int) -> Reply:
        if number < WARM_UP + 2:
            return Reply()
        server.stop_listening()
        return Reply(abort_after=1)

    with StreamServer(reply) as server, pytest.raises(MeasurementError) as error:
        drive(server)
    assert "cannot connect again: Connection refused" in str(error.value)
    assert "the first failure was: the server " in str(error.value)


@pytest.mark.parametrize(
    ("token_ids", "found"),
    [
        (None, "found: HTTP 404: Not Found"),
        ((1, 2, 2, 1), "found: 2 different token ids, fewer than 16,"),
    ],
)
def test_tokenize_is_needed(token_ids: tuple[int, ...] | None, found: str) -> None:
    with StreamServer(token_ids=token_ids) as server, pytest.raises(MeasurementError) as error:
        drive(server)
    assert "POST /tokenize is needed to make prompts of an exact length" in str(error.value)
    assert found in str(error.value)


def test_a_wrong_key_is_refused_in_the_server_s_words_and_never_shown() -> None:
    with StreamServer(api_key="right") as server, pytest.raises(MeasurementError) as error:
        OpenAiStreamDriver().run(Endpoint(server.url, "m", "wr0ng"), SMALL, seed=1, progress=silent)
    assert "HTTP 401: Unauthorized" in str(error.value)
    assert "wr0ng" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://127.0.0.1:1", "http://:8000", "http://127.0.0.1:99999", "http://127.0.0.1:x"]
)
def test_urls_that_cannot_be_used(url: str) -> None:
    with pytest.raises(MeasurementError) as error:
        OpenAiStreamDriver().run(Endpoint(url, "m"), SMALL, seed=1, progress=silent)
    assert "use the http:// or https:// address of the server" in str(error.value)
    assert repr(url) in str(error.value)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(MeasurementError) as error:
        OpenAiStreamDriver().run(Endpoint(f"http://127.0.0.1:{port}", "m"), SMALL, seed=1, progress=silent)
    assert f"Connection refused\n  at http://127.0.0.1:{port}\n" in str(error.value)


def test_an_interrupt_leaves_no_connection_and_the_garbage_collector_as_it_was() -> None:
    calls = itertools.count()

    def interrupt(_line: str) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    was_enabled = gc.isenabled()
    with StreamServer(only(2, Reply(stall_after=1))) as server:
        with pytest.raises(KeyboardInterrupt):
            OpenAiStreamDriver().run(Endpoint(server.url, "m"), SMALL, seed=1, progress=interrupt)
        assert gc.isenabled() == was_enabled
        assert gc.get_freeze_count() == 0
    gc.collect()  # a socket left open is a ResourceWarning, and warnings are errors here


def test_progress_names_the_stage_and_comes_a_few_times_a_second() -> None:
    lines: list[str] = []
    driver: LoadDriver = OpenAiStreamDriver()
    with StreamServer(Reply(ttft_s=0.1, itl_s=0.01)) as server:
        run = driver.run(Endpoint(server.url, "m"), SMALL, seed=1, progress=lines.append)
    assert lines[0] == "small: warm-up, 0/2 requests, 0.0 req/s"
    assert any(line.startswith("small: batch ") and "/6 requests, " in line for line in lines), lines
    assert len(lines) <= 2 + (run.duration_s + 0.2) * 4
    assert run.fingerprints == (FINGERPRINT,)


@pytest.mark.parametrize(
    ("at_s", "timetable_s", "left"),
    [(2.0, None, ", 1:20 left"), (2.0, 30.0, ", 0:28 left"), (2.0, 1.0, ", 1:20 left")],
    ids=["closed", "open", "after the timetable"],
)
def test_progress_tells_medians_and_when_it_ends(
    monkeypatch: pytest.MonkeyPatch, at_s: float, timetable_s: float | None, left: str
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    forecast = openai_stream._Forecast("w: batch 1/2:", 41, timetable_s, openai_stream._LimitedProgress(lines.append))
    monkeypatch.setattr(time, "monotonic", lambda: at_s)
    forecast.take(Tally(1, [20.6e6, 90e6, 21.4e6], [8.06e6]))
    assert lines == [f"w: batch 1/2: 1/41 requests, 0.5 req/s, TTFT 21 ms, TPOT 8.1 ms{left}"]


def test_progress_before_anything_ended_promises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    forecast = openai_stream._Forecast("w: batch 1/2:", 4, None, openai_stream._LimitedProgress(lines.append))
    forecast.take(Tally())
    forecast.take(Tally(4))
    assert lines == ["w: batch 1/2: 0/4 requests, 0.0 req/s"], "the second came too soon"


def test_a_request_can_be_found_in_the_server_s_logs_by_its_id() -> None:
    with StreamServer() as server:
        run = drive(server, seed=0xABCDEF)
        received = [record.request_id for record in server.sent]
    assert [trace.request_id for trace in run.requests] == [f"00abcdef-{i}" for i in range(12)]
    assert sorted(received) == sorted(["00abcdef-w0", "00abcdef-w1", *(trace.request_id for trace in run.requests)])


def test_the_server_s_own_timings_are_kept() -> None:
    metrics = {"queue_time_ms": 1.5, "time_to_first_token_ms": 20.25, "generation_time_ms": 100.0}
    with StreamServer(Reply(metrics=metrics)) as server:
        run = drive(server)
    assert run.requests[0].server == ServerTimings(queue_ms=1.5, prefill_ms=20.25, generation_ms=100.0)


def test_chats_go_to_the_chat_api() -> None:
    workload = Workload(
        name="chat", api="chat", input_tokens=20, output_tokens=3, concurrency=2, requests=4, batches=1
    )
    with StreamServer() as server:
        run = drive(server, workload)
    assert errors(run) == {}
    assert {trace.prompt_tokens for trace in run.requests} == {20}
    assert all("messages" in body for body in server.bodies)


def test_answers_that_a_schema_ends_may_be_shorter() -> None:
    workload = Workload(
        name="json",
        input_tokens=20,
        output_tokens=3,
        concurrency=1,
        requests=2,
        batches=1,
        response_schemas=({"type": "object"},),
    )
    with StreamServer(lambda n: Reply(tokens=(3, 1, 4)[n])) as server:
        run = drive(server, workload)
    assert errors(run) == {1: "1 to 3 completion tokens were asked for, the server counted 4"}


def test_the_window_encloses_the_batches_and_is_left_when_they_fail() -> None:
    seen: list[tuple[str, int]] = []

    @contextmanager
    def window() -> Iterator[None]:
        seen.append(("entered", len(server.bodies)))
        try:
            yield
        finally:
            seen.append(("left", len(server.bodies)))

    with StreamServer() as server:
        OpenAiStreamDriver().run(Endpoint(server.url, "m"), SMALL, seed=1, progress=silent, window=window())
    assert seen == [("entered", WARM_UP), ("left", WARM_UP + 12)]
    seen.clear()
    with (
        StreamServer(lambda n: FIRST_BATCH_DIES if n >= WARM_UP else Reply()) as server,
        pytest.raises(MeasurementError),
    ):
        OpenAiStreamDriver().run(Endpoint(server.url, "m"), SMALL, seed=1, progress=silent, window=window())
    assert [what for what, _ in seen] == ["entered", "left"]
