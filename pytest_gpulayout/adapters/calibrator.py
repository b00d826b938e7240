"""Runs the load client against the built-in mock, which tells how far the client is from the truth on this host.

Knows the mock as a child process and the size of the run. The comparison is
:mod:`~pytest_gpulayout.calibration`'s.
"""

from __future__ import annotations

import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from time import monotonic_ns

import orjson

from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
from pytest_gpulayout.calibration import Calibration, SentAnswer, compare_run
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.ports import Endpoint, LoadDriver, Progress
from pytest_gpulayout.workload import Workload

_MODULE = "pytest_gpulayout.adapters.mock_server"
_MODEL = "mock"
_TTFT_MS = _ITL_MS = 20.0
_START_TIMEOUT_S = 20.0
_ANSWER_TIMEOUT_S = 30.0
_INPUT_TOKENS = 64

# One answer per stream of 48 tokens takes a second; where streams are few, several short ones make up for it.
_MANY_STREAMS = 8
_LONG_TOKENS, _SHORT_TOKENS = 48, 16
_SHORT_ANSWERS = 4


@dataclass(frozen=True, slots=True)
class RunningMock:
    """The mock as a child process. :param pid: of the child."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def take_sent(self) -> list[SentAnswer]:
        """Return what it did since it was last asked, in the order in which requests were received.

        :raises OSError: it does not answer.
        """
        connection = HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_TIMEOUT_S)
        try:
            connection.request("GET", "/sent")
            return [SentAnswer.from_document(document) for document in orjson.loads(connection.getresponse().read())]
        finally:
            connection.close()


@contextmanager
def running_mock(*, ttft_ms: float, itl_ms: float, model: str = _MODEL) -> Iterator[RunningMock]:
    """Start the mock, and end it when left, whatever happens.

    :param ttft_ms: from the arrival of a request to its first chunk. :param itl_ms: between chunks.
    :raises MeasurementError: it does not start.
    """
    # -P: a module in the working directory that is called like one of the standard library must not be loaded.
    command = [sys.executable, "-P", "-m", _MODULE, f"--ttft-ms={ttft_ms}", f"--itl-ms={itl_ms}", f"--model={model}"]
    pipe = subprocess.PIPE
    try:
        # A group of its own: Ctrl-C ends it through its parent. It ends by itself when its standard input is closed.
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, process_group=0)
    except OSError as error:
        raise _fault(f"it did not start: {error.strerror}") from error
    with child:
        try:
            yield RunningMock(_port_of(child), child.pid)
        finally:
            child.kill()


def _port_of(child: subprocess.Popen[bytes]) -> int:
    assert child.stdout is not None
    assert child.stderr is not None
    select.select([child.stdout], [], [], _START_TIMEOUT_S)
    child_told = child.stdout.readline() if select.select([child.stdout], [], [], 0)[0] else b""
    if not child_told.strip().isdigit():
        child.kill()
        words = child.stderr.read().decode("utf-8", "replace").strip().splitlines()
        raise _fault(f"it did not start: {words[-1] if words else 'it said nothing'}")
    return int(child_told)


class MockCalibrator:
    """Measures the built-in mock with the very load client that measures servers.

    Implements :class:`pytest_gpulayout.ports.Calibrator`.

    :param driver: the load client; the one of this package unless given.
    """

    def __init__(self, driver: LoadDriver | None = None) -> None:
        self._driver: LoadDriver = driver or OpenAiStreamDriver()
        self._known: dict[int, Calibration] = {}

    def calibrate(self, streams: int, progress: Progress) -> Calibration:
        """Return the errors of the client at a number of streams; measured once for each number.

        Where the mock could not keep its timetable it is tried once more; if that does not help,
        :attr:`~pytest_gpulayout.calibration.Calibration.mock_kept_time` says so.

        :param streams: requests in flight.
        :raises MeasurementError: nothing could be measured.
        """
        if streams not in self._known:
            progress(f"calibrating the load client with {streams} streams")
            first = self._measure(streams, progress)
            tries = [first] if first.mock_kept_time else [first, self._measure(streams, progress)]
            self._known[streams] = min(tries, key=lambda calibration: calibration.mock_late_ms)
        return self._known[streams]

    def _measure(self, streams: int, progress: Progress) -> Calibration:
        workload = calibration_workload(streams)
        with running_mock(ttft_ms=_TTFT_MS, itl_ms=_ITL_MS) as mock:
            try:
                # The seed only makes prompts; nothing is cached by the mock.
                endpoint = Endpoint(mock.url, _MODEL)
                run = self._driver.run(endpoint, workload, seed=monotonic_ns(), progress=progress)
                sent = mock.take_sent()
            except (OSError, HTTPException) as error:
                raise _fault(f"{type(error).__name__}: {error}") from error
        return compare_run(run, sent, streams=streams, ttft_ms=_TTFT_MS, itl_ms=_ITL_MS)


def calibration_workload(streams: int) -> Workload:
    """Return a load of about a second (and as much for its warm-up) with a number of requests in flight."""
    many = streams >= _MANY_STREAMS
    return Workload(
        name="calibration",
        input_tokens=_INPUT_TOKENS,
        output_tokens=_LONG_TOKENS if many else _SHORT_TOKENS,
        concurrency=streams,
        requests=streams if many else streams * _SHORT_ANSWERS,
        batches=1,
        warmup_requests=min(streams, _MANY_STREAMS),
    )


def _fault(found: str) -> MeasurementError:
    return MeasurementError(
        "the load client must be calibrated against the built-in mock server\n"
        f"  found: {found}\n  in {sys.executable} -m {_MODULE}\n"
        "  run that command by hand to see why; `ulimit -n` must allow a descriptor for each stream"
    )
