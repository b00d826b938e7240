"""Asks a vLLM server what it counted and logged while a load ran on it: the server's side of a measured window.

Knows the addresses ``/metrics`` and ``/reset_prefix_cache`` (vLLM 0.32, ``vllm/entrypoints/serve/dev/cache``), and
when to ask: vLLM counts a request a moment after its last token went out, so counters are read once they stand still.
Leaves what they mean to :mod:`~pytest_gpulayout.server_window` and the lines of the log to
:mod:`~pytest_gpulayout.iteration_log`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

import orjson

from pytest_gpulayout.adapters.server_address import Asker, locate
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.iteration_log import ServingLog, monitors_compilations, read_serving_log
from pytest_gpulayout.ports import Endpoint
from pytest_gpulayout.server_window import (
    EngineDelta,
    EngineSnapshot,
    PrefixReset,
    ServerWindow,
    deltas,
    parse_metrics,
)
from pytest_gpulayout.workload import Workload

PAUSE_S = 0.1
"""Between two looks at what has to come to rest."""
RESET_S = 2.0
"""For how long a server may refuse to forget its prefixes; it does while it still holds blocks of a request."""

_TIMEOUT_S = 5.0
_WORST_FIRST: tuple[PrefixReset, ...] = ("refused", "unavailable", "done")

_Counters = Mapping[str, Mapping[str, EngineSnapshot]]


class ServerWatch:
    """Looks at a server from entering to leaving; what cannot be read becomes a note in what it saw.

    :param endpoint: what the load goes to; its key is sent along. :param workload: of the load.
    :param logs: those of the server, or of its replicas, where they are at hand.
    :param replicas: base URLs of the servers behind the endpoint, where there are several.
    :param settle_s: how long the counters may take to come to rest, before the load and after it.
    :param clock: in seconds, monotonic.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        workload: Workload,
        *,
        logs: Sequence[Path] = (),
        replicas: Sequence[str] = (),
        settle_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._endpoint = endpoint
        self._workload = workload
        self._logs = tuple(logs)
        self._urls = tuple(url.rstrip("/") for url in replicas) or (endpoint.url,)
        self._settle_s = settle_s
        self._clock = clock
        self._sleep = sleep
        self._askers: dict[str, Asker] = {}
        self._notes: list[str] = []
        self._reset: PrefixReset = "not asked" if workload.shares_prefix else "unavailable"
        self._before: _Counters | None = None
        self._rested = True
        self._log_starts: dict[Path, int] = {}
        self._seen = ServerWindow()

    def __enter__(self) -> ServerWatch:
        try:
            for url in self._urls:
                self._askers[url] = Asker(locate(replace(self._endpoint, url=url), _TIMEOUT_S), _TIMEOUT_S)
            if not self._workload.shares_prefix:
                self._reset = self._forget_prefixes()
            self._before = self._counters_at_rest("before")
        except MeasurementError as error:
            self._note(error)
        self._log_starts = {log: _size(log) for log in self._logs}
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            if exc_info[0] is None:  # nobody asks what was seen of a load that broke off
                self._seen = self._look_back()
        finally:
            for asker in self._askers.values():
                asker.close()

    @property
    def seen(self) -> ServerWindow:
        """What the server counted, timed and logged meanwhile."""
        return self._seen

    def _look_back(self) -> ServerWindow:
        engines = self._growth()
        logged = [self._read_log(log) for log in self._logs]
        if not logged:
            self._notes.append("the server's log is not at hand, so compilations meanwhile would go unseen")
        return ServerWindow(
            engines=engines,
            replicas=self._urls if len(self._urls) > 1 else (),
            settled=self._rested,
            prefix_reset=self._reset,
            jit=tuple(line for log in logged for line in log.jit),
            steps=tuple(times for log in logged for times in log.steps),
            notes=tuple(dict.fromkeys(self._notes)),
        )

    def _note(self, error: MeasurementError) -> None:
        """What was required, found, and where, as one sentence; what to do next is not for now."""
        self._notes.append("; ".join(line.strip() for line in str(error).splitlines()[:3]))

    # -- counters --------------------------------------------------------------------------------------------------

    def _growth(self) -> tuple[EngineDelta, ...]:
        """All replicas or none: a sum that lacks one would be taken for a wrong count."""
        if self._before is None:
            return ()
        try:
            after = self._counters_at_rest("after")
            return tuple(delta for url in self._urls for delta in deltas(self._before[url], after[url]))
        except MeasurementError as error:
            self._note(error)
            return ()

    def _counters_at_rest(self, when: str) -> _Counters:
        """Read the counters until two readings are equal and nothing is in flight, or time is up.

        :param when: ``before`` or ``after`` the load.
        """
        deadline = self._clock() + self._settle_s
        last = self._read_counters()
        while self._clock() < deadline:
            self._sleep(PAUSE_S)
            now = self._read_counters()
            if now == last and not _in_flight(now):
                return now
            last = now
        self._rested = False
        self._notes.append(f"the server's counters did not come to rest within {self._settle_s:g} s {when} the load")
        return last

    def _read_counters(self) -> _Counters:
        return {url: parse_metrics(self._get_metrics(url), url) for url in self._urls}

    def _get_metrics(self, url: str) -> str:
        status, body = self._askers[url].ask("GET", "/metrics")
        if status != HTTPStatus.OK:
            raise MeasurementError(
                f"the server's counters are needed\n  found: HTTP {status}\n  at {url}/metrics\n"
                "  use the address of a vLLM server"
            )
        return body.decode("utf-8", "replace")

    # -- the prefix cache --------------------------------------------------------------------------------------------

    def _forget_prefixes(self) -> PrefixReset:
        """Ask each replica, and return the worst answer."""
        answers = {self._forget_prefixes_of(url) for url in self._urls}
        return next(answer for answer in _WORST_FIRST if answer in answers)

    def _forget_prefixes_of(self, url: str) -> PrefixReset:
        deadline = self._clock() + RESET_S
        while True:
            status, body = self._askers[url].ask("POST", "/reset_prefix_cache")
            success = _success(body) if status == HTTPStatus.OK else None
            if success is None:
                found = "does not say whether it did" if status == HTTPStatus.OK else f"answers HTTP {status}"
                advice = "; vLLM offers it with VLLM_SERVER_DEV_MODE=1" if status == HTTPStatus.NOT_FOUND else ""
                self._notes.append(f"asked to empty its prefix cache before the load, {url} {found}{advice}")
                return "unavailable"
            if success:
                return "done"
            if self._clock() >= deadline:
                self._notes.append(f"{url} refused for {RESET_S:g} s to empty its prefix cache before the load")
                return "refused"
            self._sleep(PAUSE_S)

    # -- the log -----------------------------------------------------------------------------------------------------

    def _read_log(self, log: Path) -> ServingLog:
        try:
            start, end = self._log_starts[log], log.stat().st_size
            if end < start:
                self._notes.append(f"{log} was cut while it was measured, so compilations would go unseen")
            elif not monitors_compilations(_lines(log, 0, start)):
                self._notes.append("the server does not log compilations, so they would go unseen")
            return read_serving_log(_lines(log, start, end))
        except OSError as error:
            self._notes.append(f"the server's log cannot be read: {error}")
            return ServingLog((), ())


def _size(log: Path) -> int:
    try:
        return log.stat().st_size
    except OSError:
        return 0  # reading it will tell why


def _in_flight(counters: _Counters) -> float:
    return sum(engine.in_flight for engines in counters.values() for engine in engines.values())


def _success(body: bytes) -> bool | None:
    """What ``{"success": ...}`` says; vLLM before it had this key answers nothing."""
    try:
        document = orjson.loads(body)
    except ValueError:
        return None
    success = document.get("success") if isinstance(document, dict) else None
    return success if isinstance(success, bool) else None


def _lines(path: Path, start: int, end: int) -> Iterator[str]:
    """The lines between two sizes of a file, one at a time: a log with a line for each step can be long."""
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (line := file.readline()):
            start += len(line)
            yield line.decode("utf-8", "replace").rstrip("\r\n")
