from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest

from pytest_gpulayout.calibration import Calibration
from pytest_gpulayout.errors import MeasurementError, ServerExited
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.observing import MOST_STREAMS, Observer, client_cpus, streams_of
from pytest_gpulayout.ports import Endpoint, Progress, ServerSpec
from pytest_gpulayout.server_window import ServerWindow
from pytest_gpulayout.telemetry import Telemetry
from pytest_gpulayout.testing import FakeLoadDriver, FakeServer
from pytest_gpulayout.trace import Observations, RunTrace
from pytest_gpulayout.workload import RampUp, Workload

ENDPOINT = Endpoint("http://127.0.0.1:9", "m")
CLOSED = Workload(name="w", input_tokens=8, output_tokens=4, concurrency=4, requests=8)
WINDOW = ServerWindow(notes=("seen",))
TELEMETRY = Telemetry(source="/proc", interval_s=0.5)
CALIBRATION = Calibration(
    streams=4,
    ttft_ms=20.0,
    itl_ms=20.0,
    seconds=1.0,
    events_per_s=100.0,
    median_ttft_error_ms=0.1,
    p99_ttft_error_ms=0.2,
    median_itl_error_ms=0.0,
    p99_itl_error_ms=0.1,
    cpu_us_per_event=5.0,
)
Seen = TypeVar("Seen")


class Eye(Generic[Seen]):
    """Watches, and writes down when it does. :param fails: raised on entering."""

    def __init__(self, name: str, log: list[str], sees: Seen, fails: BaseException | None = None) -> None:
        self._name, self._log, self._sees, self._fails = name, log, sees, fails

    def __enter__(self) -> object:
        if self._fails is not None:
            raise self._fails
        self._log.append(f"{self._name} opens")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._log.append(f"{self._name} closes")

    @property
    def seen(self) -> Seen:
        return self._sees


class Ruler:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def calibrate(self, streams: int, progress: Progress) -> Calibration:
        self._log.append(f"calibrated at {streams}")
        return CALIBRATION


class Driver(FakeLoadDriver):
    """Writes down when the load runs. :param enters: whether it cares for the window at all."""

    def __init__(self, log: list[str], *, enters: bool = True, **more: Any) -> None:
        super().__init__(**more)
        self._log, self._enters = log, enters

    def run(self, endpoint: Endpoint, workload: Workload, **more: Any) -> RunTrace:
        if not self._enters:
            more["window"] = None
        self._log.append("warm-up")
        return super().run(endpoint, workload, **more)


def observe(observer: Observer, **more: Any) -> RunTrace:
    return observer.run(ENDPOINT, CLOSED, seed=1, progress=lambda _: None, **more)


def test_everything_is_seen_in_its_order() -> None:
    log: list[str] = []
    asked = []

    def watch_server(endpoint: Endpoint, workload: Workload) -> Eye[ServerWindow]:
        asked.append((endpoint, workload))
        return Eye("server", log, WINDOW)

    run = observe(
        Observer(
            Driver(log),
            calibrator=Ruler(log),
            watch_server=watch_server,
            watch_devices=lambda: Eye("devices", log, TELEMETRY),
        )
    )

    assert log == [
        "calibrated at 4",
        "warm-up",
        "server opens",
        "devices opens",
        "devices closes",
        "server closes",
    ]
    assert asked == [(ENDPOINT, CLOSED)]
    assert run.observations == Observations(calibration=CALIBRATION, server=WINDOW, telemetry=TELEMETRY)
    assert len(run.requests) == CLOSED.requests * CLOSED.batches


def test_what_a_driver_saw_itself_stays_where_nobody_else_looks() -> None:
    own = Observations(calibration=CALIBRATION, server=ServerWindow(notes=("own",)))
    run = observe(Observer(FakeLoadDriver(observations=own)))
    assert run.observations is not None
    assert run.observations == own

    run = observe(Observer(FakeLoadDriver(observations=own), watch_server=lambda *_: Eye("server", [], WINDOW)))
    assert run.observations == Observations(calibration=CALIBRATION, server=WINDOW)


def test_a_driver_that_opens_no_window_has_seen_nothing() -> None:
    log: list[str] = []
    watch: Callable[..., Eye[ServerWindow]] = lambda *_: Eye("server", log, WINDOW)  # noqa: E731
    run = observe(Observer(Driver(log, enters=False), watch_server=watch))
    assert (log, run.observations) == (["warm-up"], Observations())


def test_a_watch_that_does_not_open_closes_those_before_it() -> None:
    log: list[str] = []
    observer = Observer(
        Driver(log),
        watch_server=lambda *_: Eye("server", log, WINDOW),
        watch_devices=lambda: Eye("devices", log, TELEMETRY, fails=KeyboardInterrupt()),
    )
    with pytest.raises(KeyboardInterrupt):
        observe(observer)
    assert log == ["warm-up", "server opens", "server closes"]


def test_nothing_measured_is_the_driver_s_error(tmp_path: Any) -> None:
    server = FakeServer(spec(), tmp_path, transport=None)
    observer = Observer(FakeLoadDriver(errors={1: MeasurementError("refused"), 2: MeasurementError("refused")}))
    with pytest.raises(MeasurementError, match="refused"):
        observe(observer, server=server)

    server.die("out of memory")
    with pytest.raises(ServerExited, match="out of memory"):
        observe(observer, server=server)


def spec() -> ServerSpec:
    return ServerSpec(
        layout=parse_layout("tp1"),
        model="m",
        arguments=(),
        platform="cpu",
        devices=(),
        python="python",
        start_timeout_s=1.0,
    )


@pytest.mark.parametrize(
    ("load", "streams"),
    [
        ({"concurrency": 16}, 16),
        ({"concurrency": 5000}, MOST_STREAMS),
        ({"rate": math.inf}, MOST_STREAMS),
        ({"rate": math.inf, "requests": 200}, 200),
        ({"rate": 0.01}, 1),
        ({"rate": 2.5}, 25),
        ({"rate": 2.5, "concurrency": 10}, 10),
        ({"ramp_up": RampUp("linear", 1.0, 4.0)}, 40),
    ],
)
def test_streams_that_the_client_is_calibrated_at(load: dict[str, Any], streams: int) -> None:
    many: dict[str, Any] = {"name": "w", "input_tokens": 8, "output_tokens": 4, "requests": 6000}
    assert streams_of(Workload(**(many | load))) == streams


@pytest.mark.parametrize(
    ("all_cpus", "server_cpus", "cpus"),
    [
        (range(8), range(4), (4, 5, 6, 7)),
        (range(8), range(6), (6, 7)),
        (range(8), range(7), None),  # a single core
        (range(2), range(2), None),  # a rank on every core, as on the CPU platform by default
        (range(8), (), None),  # the server runs anywhere
        ((4, 5, 6), range(4), (4, 5, 6)),  # the rest of the machine is not ours
    ],
)
def test_cores_of_the_client(all_cpus: range, server_cpus: range, cpus: tuple[int, ...] | None) -> None:
    assert client_cpus(all_cpus, server_cpus) == cpus
