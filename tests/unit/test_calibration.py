"""What the client says, less what the mock did."""

from __future__ import annotations

import socket
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pytest_gpulayout.adapters import calibrator
from pytest_gpulayout.adapters.calibrator import MockCalibrator, calibration_workload
from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
from pytest_gpulayout.calibration import (
    Calibration,
    SentAnswer,
    compare_run,
    kept_time,
    latency_figures,
    lateness_ms,
    pair_answers,
)
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.ports import Endpoint, Progress
from pytest_gpulayout.trace import BatchTrace, ClientWork, RequestTrace, RunTrace
from pytest_gpulayout.workload import Workload

MS = 1_000_000


def request_of(number: int, send_ms: float, *chunks_ms: float) -> RequestTrace:
    return RequestTrace(
        index=number,
        batch=0,
        prompt_tokens=1,
        output_tokens=len(chunks_ms),
        send_ns=int(send_ms * MS),
        chunk_ns=tuple(int(ms * MS) for ms in chunks_ms),
        end_ns=int(max(chunks_ms, default=send_ms) * MS),
        system_fingerprint=f"vllm-mock-{number:08x}",
    )


def sent_of(number: int, received_ms: float, *chunks_ms: float) -> SentAnswer:
    chunks = [int(ms * MS) for ms in chunks_ms]
    return SentAnswer(f"vllm-mock-{number:08x}", "", int(received_ms * MS), chunks)


def run_of(*requests: RequestTrace, cpu_ms: int = 0, seconds: int = 1) -> RunTrace:
    clients = (ClientWork(cpu_ns=cpu_ms * MS), ClientWork(cpu_ns=cpu_ms * MS))
    batch = BatchTrace(index=0, requests=requests, start_ns=0, end_ns=seconds * 1000 * MS, clients=clients)
    return RunTrace(
        batches=(batch,), seed=0, warmup_requests=0, connections=1, timestamp_source="test", started_s=0.0
    )


def test_figures_are_medians_and_99th_percentiles_with_gaps_pooled() -> None:
    figures = latency_figures([(0, [10 * MS, 12 * MS, 15 * MS]), (100 * MS, [130 * MS, 131 * MS])])

    assert figures.median_ttft_ms == 20
    assert figures.p99_ttft_ms == pytest.approx(np.percentile([10, 30], 99))
    assert figures.median_itl_ms == 2
    assert figures.p99_itl_ms == pytest.approx(np.percentile([2, 3, 1], 99))


@pytest.mark.parametrize("answers", [[], [(0, [])], [(0, [MS]), (0, [2 * MS])]])
def test_no_figures_without_gaps(answers: list[tuple[int, list[int]]]) -> None:
    with pytest.raises(MeasurementError, match="no gap between chunks"):
        latency_figures(answers)


def test_error_is_client_less_server() -> None:
    run = run_of(request_of(0, 99, 122, 142, 165), request_of(1, 199, 223, 243, 263), cpu_ms=3, seconds=2)
    sent = [sent_of(9, 1, 2, 3), sent_of(1, 200, 220, 240, 260), sent_of(0, 100, 120, 140, 160)]

    result = compare_run(run, sent, streams=2, ttft_ms=20, itl_ms=20)

    assert (result.streams, result.ttft_ms, result.itl_ms, result.seconds) == (2, 20, 20, 2)
    assert result.median_ttft_error_ms == pytest.approx(3.5)
    assert result.p99_ttft_error_ms == pytest.approx(3.99)
    assert result.median_itl_error_ms == pytest.approx(0)
    assert result.p99_itl_error_ms == pytest.approx(2.91)
    assert result.events_per_s == pytest.approx(3)
    assert result.cpu_us_per_event == pytest.approx(1000), "6 ms of both processes for 6 messages"
    assert result.mock_kept_time


def test_server_that_is_late_is_found_out_by_its_own_stamps() -> None:
    on_time = [sent_of(number, 100, 120, 140, 160) for number in range(100)]
    late_at_first = [sent_of(number, 100, 150, 150, 160) for number in range(100)]
    late_at_last = [sent_of(number, 100, 120, 140, 175) for number in range(100)]

    assert lateness_ms(on_time, ttft_ms=20, itl_ms=20) == pytest.approx(0)
    assert lateness_ms(late_at_first, ttft_ms=20, itl_ms=20) == pytest.approx(30)
    assert lateness_ms(late_at_last, ttft_ms=20, itl_ms=20) == pytest.approx(15)
    few_late = [*on_time, sent_of(100, 100, 150, 150, 160)]
    assert lateness_ms(few_late, ttft_ms=20, itl_ms=20) < 1, "one in a hundred"
    assert kept_time(10, 20)
    assert not kept_time(10.1, 20)
    with pytest.raises(MeasurementError, match="1 answers without any"):
        lateness_ms([sent_of(0, 1)], ttft_ms=20, itl_ms=20)


def test_small_errors_against_a_server_that_was_late_prove_nothing() -> None:
    """A server that lags sends one message after the other: the client agrees with it whatever the client is."""
    run = run_of(request_of(0, 100, 500, 501, 502))

    result = compare_run(run, [sent_of(0, 100, 500, 501, 502)], streams=1, ttft_ms=20, itl_ms=20)

    assert result.median_ttft_error_ms == result.p99_itl_error_ms == 0
    assert result.mock_late_ms == pytest.approx(380, abs=1)
    assert not result.mock_kept_time


def test_what_does_not_belong_together_is_not_compared() -> None:
    request, sent = request_of(0, 0, 20, 40), sent_of(0, 0, 20, 40)

    assert pair_answers([request], [sent]) == [(request, sent)]
    with pytest.raises(MeasurementError, match=r"every answer known to the mock\n  found: request 0 \(vllm-mock-0"):
        pair_answers([request], [sent_of(1, 0, 20, 40)])
    with pytest.raises(MeasurementError, match=r"every chunk that was sent\n  found: 2 of 3 in request 0"):
        pair_answers([request], [sent_of(0, 0, 20, 40, 60)])
    with pytest.raises(MeasurementError, match="request 0 failed: HTTP 500"):
        pair_answers([replace(request, error="HTTP 500")], [sent])


@pytest.mark.parametrize("streams", [1, 2, 7, 8, 250])
def test_workload_keeps_all_streams_busy_for_about_a_second(streams: int) -> None:
    workload = calibration_workload(streams)
    answers_in_a_row = workload.requests / streams

    assert workload.in_flight == streams
    assert 0.9 <= answers_in_a_row * (20 + (workload.output_tokens - 1) * 20) / 1000 <= 1.5
    assert workload.requests >= 4


class CountingDriver:
    """The real client; remembers where it was sent."""

    def __init__(self, error: Exception | None = None) -> None:
        self.endpoints: list[Endpoint] = []
        self._error = error

    def run(
        self,
        endpoint: Endpoint,
        workload: Workload,
        *,
        seed: int,
        progress: Progress,
        window: AbstractContextManager[object] | None = None,
    ) -> RunTrace:
        self.endpoints.append(endpoint)
        if self._error is not None:
            raise self._error
        return OpenAiStreamDriver().run(endpoint, workload, seed=seed, progress=progress, window=window)

    def servers_that_listen(self) -> int:
        found = 0
        for endpoint in self.endpoints:
            port = int(endpoint.url.rpartition(":")[2])
            with socket.socket() as probe:
                found += probe.connect_ex(("127.0.0.1", port)) == 0
        return found


@pytest.mark.end_to_end
def test_real_client_is_measured_once_for_each_number_of_streams() -> None:
    driver = CountingDriver()
    calibrates = MockCalibrator(driver)
    told: list[str] = []

    first = calibrates.calibrate(2, told.append)

    runs = len(driver.endpoints)
    assert calibrates.calibrate(2, told.append) is first
    assert len(driver.endpoints) == runs == (1 if first.mock_kept_time else 2)
    assert driver.servers_that_listen() == 0
    assert told[0] == "calibrating the load client with 2 streams"
    assert (first.streams, first.ttft_ms, first.itl_ms) == (2, 20, 20)
    assert first.events_per_s * first.seconds == pytest.approx(2 * 4 * 16)
    assert first.cpu_us_per_event > 0


@pytest.mark.end_to_end
def test_a_mock_that_was_late_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    late = iter([50.0, 30.0])

    def compare(*arguments: Any, **options: Any) -> Calibration:
        return replace(compare_run(*arguments, **options), mock_late_ms=next(late))

    monkeypatch.setattr(calibrator, "compare_run", compare)
    driver = CountingDriver()

    result = MockCalibrator(driver).calibrate(1, lambda _line: None)

    assert (len(driver.endpoints), result.mock_late_ms, result.mock_kept_time) == (2, 30.0, False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MeasurementError("all requests failed"), "all requests failed"),
        (
            OSError(24, "Too many open files"),
            r"found: OSError: \[Errno 24\] Too many open files\n  in .*mock_server\n",
        ),
    ],
)
def test_a_run_that_fails_says_why_and_leaves_no_server(error: Exception, message: str) -> None:
    driver = CountingDriver(error)

    with pytest.raises(MeasurementError, match=message):
        MockCalibrator(driver).calibrate(1, lambda _line: None)

    assert len(driver.endpoints) == 1
    assert driver.servers_that_listen() == 0


@pytest.mark.parametrize(
    ("interpreter", "reason"), [("/bin/false", "it said nothing"), ("/nowhere/python", "No such file or directory")]
)
def test_a_mock_that_does_not_start_is_an_error(
    monkeypatch: pytest.MonkeyPatch, interpreter: str, reason: str
) -> None:
    monkeypatch.setattr(sys, "executable", interpreter)

    with pytest.raises(MeasurementError, match=f"found: it did not start: {reason}"):
        MockCalibrator(CountingDriver()).calibrate(1, lambda _line: None)
