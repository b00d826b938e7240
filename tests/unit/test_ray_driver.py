"""The tasks of the process that talks to Ray, on a cluster that is made up."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from pytest_gpulayout.adapters import ray_driver
from pytest_gpulayout.adapters.ray_driver import (
    ClusterEntry,
    DriverError,
    Relay,
    Streams,
    WorkerEntry,
    connect,
    hold_gpus,
    node_environment,
    perform,
    run_command,
)


class Echo:
    """A command that answers each line with the same in capitals. :param lost_after: answers, and the node goes."""

    def __init__(self, lost_after: int = 1000) -> None:
        self._answers: list[bytes] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._left = lost_after

    def write(self, data: bytes) -> None:
        with self._changed:
            self._answers.append(data.upper())
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def read(self) -> bytes:
        with self._changed:
            if self._left == 0:
                raise DriverError("lost", "node b has gone")
            self._left -= 1
            self._changed.wait_for(lambda: self._answers or self._is_closed, timeout=10)
            return self._answers.pop(0) if self._answers else b""

    def errors(self) -> str:
        return "a warning\n"


@dataclass
class FakeCluster:
    """Hands out the GPUs of each node from the first; :ivar log: what was done."""

    gpus: dict[str, list[str]] = field(default_factory=dict)
    streams: Streams = field(default_factory=Echo)
    log: list[str] = field(default_factory=list)
    given: dict[Callable[[], None], list[str] | None] = field(default_factory=dict)

    def describe(self) -> ClusterEntry:
        return {"ray": "2", "python": "3", "address": "192.0.2.1:6379", "home": "a", "nodes": []}

    def start(self, node: str, command: Sequence[str]) -> Streams:
        self.log.append(f"{node}: {' '.join(command)}")
        return self.streams

    def take(self, node: str, gpus: int) -> Callable[[], None]:
        free = self.gpus.get(node, [])
        taken = [free.pop(0) for _ in range(gpus)] if len(free) >= gpus else None

        def give_back() -> None:
            free.extend(taken or [])

        self.given[give_back] = taken
        return give_back

    def taken(self, give_back: Callable[[], None]) -> list[str] | None:
        return self.given[give_back]

    def workers(self, drivers: Sequence[int], driver_address: str) -> list[WorkerEntry]:
        return []


@pytest.fixture
def pipes() -> Iterator[tuple[int, int, int, int]]:
    """(read, write) of a standard input, and of a standard output."""
    ends = (*os.pipe(), *os.pipe())
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            pass  # the test has closed it


# -- run -------------------------------------------------------------------------------------------------------------


def test_input_and_output_of_a_command_are_passed_on_until_both_end(pipes: tuple[int, int, int, int]) -> None:
    source, write_end, read_end, sink = pipes
    cluster = FakeCluster()
    os.write(write_end, b"hello")
    os.close(write_end)

    errors = run_command(cluster, "b", ["{python}", "-m", "agent"], source, sink)

    assert os.read(read_end, 100) == b"HELLO"
    assert errors == "a warning\n"
    assert cluster.log == ["b: {python} -m agent"]


def test_a_node_that_goes_ends_the_command(pipes: tuple[int, int, int, int]) -> None:
    *_, sink = pipes
    source = os.open(os.devnull, os.O_RDONLY)  # stays open: the thread that reads it may do so later

    with pytest.raises(DriverError, match="node b has gone") as caught:
        run_command(FakeCluster(streams=Echo(lost_after=0)), "b", ["agent"], source, sink)

    assert caught.value.kind == "lost"


# -- hold ------------------------------------------------------------------------------------------------------------


def test_so_many_gpus_of_a_node_are_held() -> None:
    cluster = FakeCluster({"a": ["0", "1", "2", "3"], "b": ["0", "1"]})

    hold_gpus(cluster, {"a": 3, "b": 2}, {})

    assert cluster.gpus == {"a": ["3"], "b": []}


def test_certain_gpus_stay_free_and_the_others_of_their_node_are_held() -> None:
    cluster = FakeCluster({"a": ["0", "1", "2", "3"], "b": ["0"]})

    hold_gpus(cluster, {"a": 2, "b": 1}, {"a": [["1"], ["GPU-3", "3"]]})

    assert cluster.gpus == {"a": ["1", "3"], "b": []}


def test_a_gpu_that_somebody_else_has_cannot_stay_free() -> None:
    cluster = FakeCluster({"a": ["0", "2", "3"]})

    with pytest.raises(DriverError, match="GPU 1 of node a is not free, or Ray does not have it") as caught:
        hold_gpus(cluster, {"a": 1}, {"a": [["1"], ["GPU-3", "3"]]})

    assert caught.value.kind == "busy"


def test_gpus_that_ray_does_not_hand_out_are_not_waited_for_for_ever() -> None:
    waited: list[float] = []

    with pytest.raises(DriverError, match=r"does not hand out GPUs .* on node b"):
        hold_gpus(
            FakeCluster({"a": ["0"], "b": []}), {"a": 1, "b": 1}, {}, clock=lambda: sum(waited), sleep=waited.append
        )

    assert 30 < sum(waited) < 90


# -- on a node -------------------------------------------------------------------------------------------------------


@pytest.fixture
def start_relay() -> Iterator[Callable[[Sequence[str]], Relay]]:
    """Starts commands; their pipes, which else end with the actor's process, are closed."""
    with ExitStack() as stack:

        def start(command: Sequence[str]) -> Relay:
            relay = Relay(command)
            stack.enter_context(relay._process)
            return relay

        yield start


def test_a_command_runs_with_the_interpreter_of_its_node_and_is_read_and_written(
    start_relay: Callable[[Sequence[str]], Relay],
) -> None:
    code = "import sys; sys.stdout.write(sys.stdin.read().upper()); sys.stderr.write('done')"
    relay = start_relay(["{python}", "-c", code])
    relay.write(b"hello")
    relay.close()
    relay.write(b"too late")

    assert relay.read() == b"HELLO"
    assert relay.read() == b""
    assert relay.errors() == "done"


def test_a_command_is_no_child_of_the_actor_and_has_a_session_of_its_own(
    start_relay: Callable[[Sequence[str]], Relay],
) -> None:
    relay = start_relay(["{python}", "-c", "import os; print(os.getpid(), os.getppid(), os.getsid(0))"])

    words = b"".join(iter(relay.read, b"")).split()

    assert words[1] != str(os.getpid()).encode()
    assert words[2] != str(os.getsid(0)).encode()


def test_a_command_that_is_not_there_says_so(start_relay: Callable[[Sequence[str]], Relay]) -> None:
    relay = start_relay(["/no/such/python"])

    assert relay.read() == b""
    assert relay.errors() == "/no/such/python: No such file or directory"


def test_a_command_has_the_environment_that_ray_was_started_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("GPULAYOUT_TEST", "bar")

    of_parent = node_environment(os.getppid())
    of_nobody = node_environment(2**22 + 1)

    assert "GPULAYOUT_TEST" not in of_parent
    assert "PATH" in of_parent
    assert of_nobody["GPULAYOUT_TEST"] == "bar"
    assert not {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"} & set(of_nobody)


# -- joining ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "http://10.0.0.1:8265"])
def test_an_address_of_another_kind_is_refused(address: str) -> None:
    with pytest.raises(DriverError, match=address) as caught:
        connect(address)

    assert caught.value.kind == "address"


def test_a_python_without_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_driver, "find_spec", lambda name: None)

    with pytest.raises(DriverError, match="ray is not installed in ") as caught:
        connect("auto")

    assert caught.value.kind == "missing"


def test_an_unknown_task_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="found 'restart'"):
        perform("restart", {"address": "auto"}, lambda address: FakeCluster())
