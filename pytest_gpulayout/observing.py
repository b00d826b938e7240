"""Measuring a server with everything that tells whether the numbers may be used: one run, observed.

Knows the order: how far the client is from the truth on this host, then the load, and the server and its devices in
exactly the window of the load. Leaves seeing to the :class:`~pytest_gpulayout.ports.Watch` it is given, and what
follows to :mod:`~pytest_gpulayout.validity`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.errors import MeasurementError

if TYPE_CHECKING:
    from types import TracebackType

    from pytest_gpulayout.ports import Calibrator, Endpoint, LoadDriver, Progress, Server, Watch
    from pytest_gpulayout.server_window import ServerWindow
    from pytest_gpulayout.telemetry import Telemetry
    from pytest_gpulayout.trace import Observations, RunTrace
    from pytest_gpulayout.workload import Workload

MOST_STREAMS = 256
"""Calibrated at: on two cores, of which the client has one, the mock keeps to its timetable up to several hundred."""
LONG_ANSWER_S = 10.0
"""Assumed of open arrivals, whose number in flight nobody knows before."""
CORES_FOR_CLIENT = 2
"""One for the load loop and one for whatever else runs here: on a single core it would only be more in the way."""

_END_IS_KNOWN_S = 5.0
_END_IS_KNOWN_OVER_NODES_S = 15.0
_LOOK_AGAIN_S = 0.2


class Observer:
    """Runs workloads and attaches what was seen meanwhile.

    :param calibrator: of this driver, ``None`` where its error is unknown or of no interest.
    :param watch_server: gives what looks at the server in one window. :param watch_devices: at its devices.
    """

    def __init__(
        self,
        driver: LoadDriver,
        *,
        calibrator: Calibrator | None = None,
        watch_server: Callable[[Endpoint, Workload], Watch[ServerWindow]] | None = None,
        watch_devices: Callable[[], Watch[Telemetry]] | None = None,
    ) -> None:
        self._driver = driver
        self._calibrator = calibrator
        self._watch_server = watch_server
        self._watch_devices = watch_devices

    def run(
        self, endpoint: Endpoint, workload: Workload, *, seed: int, progress: Progress, server: Server | None = None
    ) -> RunTrace:
        """Return one run with its observations; a driver's own observations stay where nobody else looked.

        :param seed: of prompts and arrivals.
        :param server: asked whether it still lives when nothing could be measured.
        :raises MeasurementError: nothing could be measured. :raises ServerExited: because the server is gone.
        """
        seen: dict[str, Any] = {}
        if self._calibrator is not None:
            seen["calibration"] = self._calibrator.calibrate(streams_of(workload), progress)
        of_server = self._watch_server(endpoint, workload) if self._watch_server is not None else None
        of_devices = self._watch_devices() if self._watch_devices is not None else None
        window = _Window([watch for watch in (of_server, of_devices) if watch is not None])
        try:
            run = self._driver.run(endpoint, workload, seed=seed, progress=progress, window=window)
        except MeasurementError:
            if server is not None:
                _require_alive(server)  # a dead server explains more than the requests that it left behind
            raise
        if window.was_left and of_server is not None:
            seen["server"] = of_server.seen
        if window.was_left and of_devices is not None:
            seen["telemetry"] = of_devices.seen
        observations: Observations = replace(run.observations, **seen)
        return replace(run, observations=observations)


def _require_alive(server: Server) -> None:
    """Look for a while: answers break off before the end of what gave them is known, above all on another node."""
    limit_s = _END_IS_KNOWN_OVER_NODES_S if server.spec.layout.nodes > 1 else _END_IS_KNOWN_S
    deadline = time.monotonic() + limit_s
    server.check_alive()
    while time.monotonic() < deadline:
        time.sleep(_LOOK_AGAIN_S)
        server.check_alive()


class _Window(AbstractContextManager["_Window"]):
    """Enters watches when the load begins, and leaves them in reverse: the last one is closest to the load."""

    def __init__(self, watches: Sequence[Watch[object]]) -> None:
        self._watches = watches
        self._stack = ExitStack()
        self.was_left = False

    def __enter__(self) -> _Window:
        with ExitStack() as stack:
            for watch in self._watches:
                stack.enter_context(watch)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        self.was_left = True


def streams_of(workload: Workload) -> int:
    """Return how many requests will be in flight, as far as that is known before.

    In a closed loop its concurrency; of open arrivals those of :data:`LONG_ANSWER_S`.
    """
    most = min(workload.in_flight, MOST_STREAMS)
    rate = workload.rate
    if workload.ramp_up is not None:
        rate = max(workload.ramp_up.start_rate, workload.ramp_up.end_rate)
    if rate is None or math.isinf(rate):
        return most
    return max(1, min(most, math.ceil(rate * LONG_ANSWER_S)))


def client_cpus(all_cpus: Collection[int], server_cpus: Collection[int]) -> tuple[int, ...] | None:
    """Return the cores for the client; ``None`` to leave it to the system where too few would be its own.

    :param all_cpus: that this process may use. :param server_cpus: that the server's ranks are bound to; empty, or
        all, where they are not bound: then no core is known to be free.
    """
    free = tuple(sorted(set(all_cpus) - set(server_cpus)))
    return free if server_cpus and len(free) >= CORES_FOR_CLIENT else None
