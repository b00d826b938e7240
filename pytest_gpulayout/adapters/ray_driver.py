"""The one process that talks to Ray, so that none of Ray's threads, signal handlers and deaths are the test run's.

A Ray driver ends its own process when the cluster's control store goes away, which must not end pytest. So this is a
script for a child process, with Ray and the standard library only: ``python -P ray_driver.py TASK JSON``. What it
holds in the cluster (actors, GPUs) belongs to Ray's job of this process and is freed by Ray when the process ends, in
whatever way. Nothing is started that outlives it, and no cluster is started at all.

Tasks, each with one JSON object as its argument, ``address`` (as in ``RAY_ADDRESS``) among its members:

``nodes``
    prints the living nodes, and where this process is.
``run``, with ``node`` and ``command``
    runs a command on a node, and passes standard input, output and errors on, as ``kubectl exec -i`` does. In the
    command ``{python}`` stands for the interpreter of the node.
``hold``, with ``gpus`` (node id -> number) and ``leave`` (node id -> those that stay free, each by all its names)
    takes GPUs out of circulation, says so, and ends when its standard input does.
``workers``, with ``drivers`` (process ids) and ``driver_address``
    prints the living actors that these processes have started.

Standard output of all but ``run``: one JSON object. Exit code 1 and the last line of standard error say what went
wrong: in words for ``run``, for the others as ``{"error": KIND, "text": ...}`` with one of :data:`ErrorKind`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, NoReturn, Protocol, TypedDict

ErrorKind = Literal["missing", "address", "unreachable", "version", "lost", "busy"]
"""Ray is not installed; an address that is no driver's; nobody answers; other versions; a node has gone; no GPU."""

_MOST_BYTES = 1 << 20
_MOST_ERRORS = 8192
_ERRORS_WAIT_S = 2.0
_HOLD_LIMIT_S = 60.0
_LISTENER_S = 10.0
_POLL_S = 0.2
# Ray kills the children of a worker that ends, which would leave what they started: a grandchild in a session of its
# own is not among them (RAY_kill_child_processes_on_worker_exit, Ray's guide "Lifetimes of a User-Spawn Process").
_DETACH = """
import os, sys
if os.fork():
    os._exit(0)
os.setsid()
try:
    os.execvp(sys.argv[1], sys.argv[1:])
except OSError as error:
    os.write(2, f"{sys.argv[1]}: {error.strerror}".encode())
    os._exit(127)
"""


class DriverError(Exception):
    """What the test run has to be told. :param kind: for the program. :param text: for people."""

    def __init__(self, kind: ErrorKind, text: str) -> None:
        self.kind = kind
        super().__init__(text)


class NodeEntry(TypedDict):
    """A living node. ``gpus``: what Ray may hand out there, ``free_gpus``: what nobody has, whole ones."""

    id: str
    name: str
    hostname: str
    address: str
    gpus: int
    free_gpus: int


class ClusterEntry(TypedDict):
    """Versions of this process's Ray and Python, the address of the control store, the node this process is on."""

    ray: str
    python: str
    address: str
    home: str
    nodes: list[NodeEntry]


class WorkerEntry(TypedDict):
    """A living actor and the process that is it."""

    name: str
    class_name: str
    node: str
    pid: int


class Streams(Protocol):
    """A command that runs on a node; every call raises :class:`DriverError` when the node has gone."""

    def write(self, data: bytes) -> None:
        """Pass on to its standard input; what comes after its end is dropped."""

    def close(self) -> None:
        """End its standard input."""

    def read(self) -> bytes:
        """Wait for output and return it, nothing at its end."""

    def errors(self) -> str:
        """Return the end of what it wrote to standard error."""


class Cluster(Protocol):
    """The small part of Ray that is used here, connected."""

    def describe(self) -> ClusterEntry:
        """Return the living nodes."""

    def start(self, node: str, command: Sequence[str]) -> Streams:
        """Start a command on a node."""

    def take(self, node: str, gpus: int) -> Callable[[], None]:
        """Take free GPUs of a node out of circulation; the answer gives them back."""

    def taken(self, give_back: Callable[[], None]) -> list[str] | None:
        """Return the ids of the GPUs that were taken; ``None`` until Ray has handed them out."""

    def workers(self, drivers: Sequence[int], driver_address: str) -> list[WorkerEntry]:
        """Return the living actors that these processes of a node have started."""


# -- tasks -----------------------------------------------------------------------------------------------------------


def run_command(cluster: Cluster, node: str, command: Sequence[str], source: int, sink: int) -> str:
    """Run a command on a node until its output ends; return the end of its standard error.

    :param source: file descriptor whose bytes are its input. :param sink: likewise of its output.
    :raises DriverError: the node has gone.
    """
    streams = cluster.start(node, command)
    threading.Thread(target=_feed, args=(streams, source), daemon=True).start()
    while data := streams.read():
        _write_all(sink, data)
    return streams.errors()


def _feed(streams: Streams, source: int) -> None:
    try:
        while data := os.read(source, _MOST_BYTES):
            streams.write(data)
        streams.close()
    except DriverError:
        pass  # whoever reads is told the same


def _write_all(sink: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(sink, view) :]


class _Held(NamedTuple):
    node: str
    give_back: Callable[[], None]
    gpus: list[str]


def hold_gpus(
    cluster: Cluster,
    gpus: Mapping[str, int],
    leave: Mapping[str, Sequence[Sequence[str]]],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Take GPUs out of circulation, and return when all of them are.

    Which GPUs Ray hands out cannot be asked for. So where certain ones are to stay free, all are taken, one by one,
    and those are given back.

    :param gpus: how many of each node.
    :param leave: those that must stay free, by node id, each by all names that Ray may know it by (index, UUID);
        ``gpus`` counts those that must not.
    :raises DriverError: Ray does not hand them out.
    """
    wanted = [(node, 1) for node, spared in leave.items() for _ in range(gpus.get(node, 0) + len(spared))]
    wanted += [(node, number) for node, number in gpus.items() if node not in leave and number]
    held = _await_all(cluster, [(node, cluster.take(node, number)) for node, number in wanted], clock, sleep)
    for node, spared in leave.items():
        for names in spared:
            found = next((one for one in held if one.node == node and set(one.gpus) & set(names)), None)
            if found is None:
                raise DriverError("busy", f"GPU {names[0]} of node {node} is not free, or Ray does not have it")
            found.give_back()


def _await_all(
    cluster: Cluster,
    taking: Sequence[tuple[str, Callable[[], None]]],
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> list[_Held]:
    deadline = clock() + _HOLD_LIMIT_S
    waiting, held = list(taking), []
    while waiting:
        answers = [(node, give_back, cluster.taken(give_back)) for node, give_back in waiting]
        held += [_Held(node, give_back, ids) for node, give_back, ids in answers if ids is not None]
        waiting = [(node, give_back) for node, give_back, ids in answers if ids is None]
        if waiting and clock() > deadline:
            nodes = ", ".join(sorted({node for node, _ in waiting}))
            raise DriverError("busy", f"Ray does not hand out GPUs that were free a moment ago, on node {nodes}")
        if waiting:
            sleep(_POLL_S)
    return held


# -- on a node -------------------------------------------------------------------------------------------------------


class Relay:
    """A Ray actor: starts a command on its node and passes its streams on.

    Sent to the node by value, so that nothing of this package is needed there until the command needs it.

    :param command: ``{python}`` in it stands for the interpreter of the node.
    """

    def __init__(self, command: Sequence[str]) -> None:
        words = [word.replace("{python}", sys.executable) for word in command]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _DETACH, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=node_environment(os.getppid()),
        )
        self._process.wait()  # the process in between; the command goes on
        self._errors: deque[bytes] = deque(maxlen=64)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        stream = _pipe(self._process.stderr)
        while data := stream.read(_MOST_ERRORS):
            self._errors.append(data)

    def write(self, data: bytes) -> None:
        """Pass bytes on to the command; what comes after its end is dropped."""
        stream = _pipe(self._process.stdin)
        view = memoryview(data)
        try:
            while view:
                view = view[stream.write(view) :]
        except (BrokenPipeError, ValueError):
            pass  # it has ended, which its output tells, or its input was closed

    def close(self) -> None:
        """End the command's standard input."""
        _pipe(self._process.stdin).close()

    def read(self) -> bytes:
        """Wait for output of the command and return it, nothing at its end."""
        return _pipe(self._process.stdout).read(_MOST_BYTES)

    def errors(self) -> str:
        """Return the end of what the command wrote to standard error."""
        self._listener.join(_ERRORS_WAIT_S)
        return b"".join(self._errors)[-_MOST_ERRORS:].decode(errors="replace")


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def node_environment(raylet: int) -> dict[str, str]:
    """Return the environment that Ray was started in on this node.

    A Ray worker's own has changed: GPUs are hidden from an actor without any, and ``OMP_NUM_THREADS`` is 1. Where the
    other cannot be read, those two are left out.

    :param raylet: process id of the worker's parent.
    """
    try:
        text = Path(f"/proc/{raylet}/environ").read_bytes().decode(errors="surrogateescape")
    except OSError:
        text = ""
    found = dict(part.split("=", 1) for part in text.split("\0") if "=" in part)
    if found:
        return found
    hidden = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return {name: value for name, value in os.environ.items() if name not in hidden}


class Holder:
    """A Ray actor that has GPUs and does nothing with them."""

    def gpus(self) -> list[str]:
        """Return the ids of its GPUs as Ray knows them: indices, or what ``CUDA_VISIBLE_DEVICES`` listed."""
        import ray

        return [str(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids()["GPU"]]


# -- Ray -------------------------------------------------------------------------------------------------------------


class RayCluster:
    """A connected cluster. :param ray: the module."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._waiting: dict[Callable[[], None], Any] = {}

    def describe(self) -> ClusterEntry:
        """Return the living nodes."""
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
        context = self._ray.get_runtime_context()
        nodes: list[NodeEntry] = [
            {
                "id": node["NodeID"],
                "name": node.get("NodeName") or "",
                "hostname": node.get("NodeManagerHostname") or "",
                "address": node["NodeManagerAddress"],
                "gpus": int(node["Resources"].get("GPU", 0)),
                "free_gpus": int(free.get(node["NodeID"], {}).get("GPU", 0)),
            }
            for node in self._ray.nodes()
            if node["Alive"]
        ]
        python = ".".join(map(str, sys.version_info[:3]))
        return {
            "ray": self._ray.__version__,
            "python": python,
            "address": context.gcs_address,
            "home": context.get_node_id(),
            "nodes": nodes,
        }

    def _on(self, node: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node_id=node, soft=False)

    def start(self, node: str, command: Sequence[str]) -> Streams:
        """Start a command on a node, by an actor that can be read and written at the same time."""
        options = {"num_cpus": 0, "max_concurrency": 8, "max_restarts": 0, "scheduling_strategy": self._on(node)}
        actor = self._ray.remote(Relay).options(**options).remote(list(command))
        return _RayStreams(self._ray, actor)

    def take(self, node: str, gpus: int) -> Callable[[], None]:
        """Ask for an actor with free GPUs of a node; the answer ends it."""
        options = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": 0, "scheduling_strategy": self._on(node)}
        actor = self._ray.remote(Holder).options(**options).remote()

        def give_back() -> None:
            self._ray.kill(actor)

        self._waiting[give_back] = actor.gpus.remote()
        return give_back

    def taken(self, give_back: Callable[[], None]) -> list[str] | None:
        """Return the ids of the GPUs that were taken; ``None`` until Ray has handed them out."""
        answer = self._waiting[give_back]
        done, _ = self._ray.wait([answer], timeout=0)
        if not done:
            return None
        with _node_errors(self._ray):
            ids: list[str] = self._ray.get(answer)
        return ids

    def workers(self, drivers: Sequence[int], driver_address: str) -> list[WorkerEntry]:
        """Return the living actors of Ray's jobs whose driver is one of these processes."""
        from ray._private.state import actors, jobs

        mine = {
            job["JobID"]
            for job in jobs()
            if job["DriverPid"] in drivers and job["DriverIPAddress"] == driver_address and not job["IsDead"]
        }
        return [
            {
                "name": actor["Name"] or "",
                "class_name": actor["ActorClassName"],
                "node": actor["Address"]["NodeID"],
                "pid": actor["Pid"],
            }
            for actor in actors().values()
            if actor["State"] == "ALIVE" and actor["JobID"] in mine
        ]


class _RayStreams:
    """What :class:`Relay` does, from this side."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray = ray
        self._actor = actor

    def _ask(self, call: Any) -> Any:
        with _node_errors(self._ray):
            return self._ray.get(call)

    def write(self, data: bytes) -> None:
        """See :meth:`Relay.write`."""
        self._ask(self._actor.write.remote(data))

    def close(self) -> None:
        """See :meth:`Relay.close`."""
        self._ask(self._actor.close.remote())

    def read(self) -> bytes:
        """See :meth:`Relay.read`."""
        data: bytes = self._ask(self._actor.read.remote())
        return data

    def errors(self) -> str:
        """See :meth:`Relay.errors`."""
        text: str = self._ask(self._actor.errors.remote())
        return text


@contextmanager
def _node_errors(ray: Any) -> Iterator[None]:
    """Say that a node has gone, in place of Ray's errors."""
    try:
        yield
    except ray.exceptions.RayError as error:
        raise DriverError("lost", _first_lines(str(error))) from error


def _first_lines(text: str, most: int = 3) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[:most])[:400]


def connect(address: str) -> RayCluster:
    """Join a cluster that runs.

    :raises DriverError: Ray is not installed, the address is of another kind, nobody answers, or versions differ.
    """
    if "://" in address:
        raise DriverError("address", f"{address} is none (HOST:PORT, or auto)")
    if find_spec("ray") is None:
        raise DriverError("missing", f"the package ray is not installed in {sys.executable}")
    _require_listener(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        text = str(error)
        kind: ErrorKind = "version" if "Version mismatch" in text else "unreachable"
        raise DriverError(kind, _first_lines(text, most=8)) from error
    return RayCluster(ray)


def _require_listener(address: str) -> None:
    """Find out in a moment what takes Ray a minute. :param address: ``HOST:PORT``; others are left to Ray."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _LISTENER_S).close()
    except (OSError, OverflowError) as error:
        raise DriverError("unreachable", f"nobody listens there ({error})") from error


# -- the script ------------------------------------------------------------------------------------------------------


def perform(task: str, wish: Mapping[str, Any], join: Callable[[str], Cluster] = connect) -> None:
    """Do one task; see above. :param join: connects to the cluster."""
    cluster = join(wish["address"])
    if task == "nodes":
        _say(cluster.describe())
    elif task == "workers":
        _say({"workers": cluster.workers(wish["drivers"], wish["driver_address"])})
    elif task == "run":
        sys.stderr.write(run_command(cluster, wish["node"], wish["command"], 0, 1))
    elif task == "hold":
        hold_gpus(cluster, wish["gpus"], wish["leave"])
        _say({"held": True})
        while os.read(0, _MOST_BYTES):
            pass
    else:
        raise ValueError(f"one of nodes, run, hold, workers was expected, found {task!r}")


def _say(message: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> NoReturn:
    """Entry point. The process ends at once, since nothing it has in the cluster outlives it."""
    code = 0
    try:
        perform(sys.argv[1], json.loads(sys.argv[2]))
    except DriverError as error:
        told = str(error) if sys.argv[1] == "run" else json.dumps({"error": error.kind, "text": str(error)})
        sys.stderr.write(f"\n{told}\n")
        code = 1
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
