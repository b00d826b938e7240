"""What the gate needs from the outside world, as Protocols; :mod:`pytest_gpulayout.adapters` implements them.

Nothing here opens a file, socket or process. Public fakes for every port are in :mod:`pytest_gpulayout.testing`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from pytest_gpulayout.layout import Layout
from pytest_gpulayout.proofs import Sight, Statement, statements_of

if TYPE_CHECKING:
    from pytest_gpulayout.calibration import Calibration
    from pytest_gpulayout.collectives import ProbePlan, ProbeRun
    from pytest_gpulayout.occupancy import Occupancy, OccupancyReport
    from pytest_gpulayout.server_info import ServerInfo
    from pytest_gpulayout.surroundings import Surroundings
    from pytest_gpulayout.topology import Device, Topology
    from pytest_gpulayout.trace import RunTrace
    from pytest_gpulayout.workload import Workload

Platform = Literal["cuda", "cpu"]

Seen_co = TypeVar("Seen_co", covariant=True)

Progress = Callable[[str], None]
"""Takes one short line that says what is going on now; shown live, the last one wins."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible server as a client sees it.

    :param url: base URL without a trailing slash and without ``/v1``, e.g. ``http://127.0.0.1:40123``.
    :param model: the name the server serves the model under.
    :param api_key: bearer token; never printed.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)


class TopologySource(Protocol):
    """Lists devices and the links between them."""

    def probe(self) -> Topology:
        """Return what is there now.

        :raises pytest_gpulayout.errors.TopologyError: the devices cannot be listed.
        """


class GpuProcessSource(Protocol):
    """Lists who computes on the GPUs of this machine."""

    def snapshot(self) -> Occupancy:
        """Return all GPUs, whatever this process may use of them, and the processes that compute on them now.

        :raises pytest_gpulayout.errors.TopologyError: the driver does not answer.
        """

    def describe(self, pid: int) -> str:
        """Return what runs under a process id, such as ``python train.py (user bob)``; ``""`` if it is not seen."""


class Watch(Protocol[Seen_co]):
    """Looks at something while it is entered; what it saw can be had once it was left."""

    def __enter__(self) -> object:
        """Begin to look."""

    def __exit__(self, *exc_info: object) -> None:
        """Stop looking; never raises because something could not be seen, but says so in what it saw."""

    @property
    def seen(self) -> Seen_co:
        """What it saw between entering and leaving."""


class Calibrator(Protocol):
    """Finds out how far the load driver is from the truth on this host."""

    def calibrate(self, streams: int, progress: Progress) -> Calibration:
        """Measure a server that knows what it did; takes about two seconds, and is done once for each number.

        :param streams: requests in flight.
        :raises pytest_gpulayout.errors.MeasurementError: nothing could be measured.
        """


class LoadDriver(Protocol):
    """Sends a workload to a server and records what happened to every request."""

    def run(
        self,
        endpoint: Endpoint,
        workload: Workload,
        *,
        seed: int,
        progress: Progress,
        window: AbstractContextManager[object] | None = None,
    ) -> RunTrace:
        """Warm up, then send all batches of the workload.

        :param seed: of the prompts and the arrivals; a new one for each run, so that no prefix cache can answer.
        :param window: entered after the warm-up, when nothing is in flight, and left after the last batch: what is
            observed inside is what the batches caused.
        :raises pytest_gpulayout.errors.MeasurementError: nothing could be measured.
        """


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """Everything that makes one server differ from another; equal specs can share a server.

    :param arguments: extra ``vllm serve`` arguments, without model, address, key and layout.
    :param devices: one per rank, in rank order.
    :param python: interpreter that has vLLM installed.
    """

    layout: Layout
    model: str
    arguments: tuple[str, ...]
    platform: Platform
    devices: tuple[Device, ...]
    python: str
    start_timeout_s: float


@dataclass(frozen=True, slots=True)
class NodeProof:
    """One host of a server that spans several.

    :param name: as the user named it. :param host: its host name. :param address: where the other nodes reach it.
    :param ranks: of the layout, those whose processes it holds. :param command: of its main process, without secrets.
    :param binding: the CPUs and NUMA nodes that it was bound to, or why not, in words.
    """

    name: str
    host: str
    address: str
    ranks: tuple[int, ...]
    command: tuple[str, ...]
    binding: str = ""


@dataclass(frozen=True, slots=True)
class ServerProof:
    """What a running server said and showed about itself, as opposed to how it was started.

    :param fingerprint: ``system_fingerprint`` of a completion that it answered.
    :param rank_pids: process id of each rank, from the process table.
    :param start_s: seconds from start to the first completion; ``None`` of a server that somebody else started.
    :param binding: the CPUs and NUMA nodes that it was bound to, or why not, in words; ``""`` where none apply.
    :param proxy: what stands in front of its replicas, ``nginx/1.22.1 (SCHED_FIFO)``; ``""`` where nothing does.
    :param moe: whether its data-parallel engines work in step, as those of a model with experts do.
    :param info: what it tells of its configuration, ``None`` where it was not asked or does not say.
    :param api_servers: how many front ends answer requests.
    :param sight: of a server that somebody else started, what could be seen of it; ``None`` of one of ours.
    :param nodes: of a layout over several nodes, in order of their ranks.
    """

    vllm_version: str
    fingerprint: str
    rank_pids: Mapping[int, int]
    start_s: float | None
    binding: str = ""
    proxy: str = ""
    moe: bool = False
    info: ServerInfo | None = None
    api_servers: int = 1
    sight: Sight | None = None
    nodes: tuple[NodeProof, ...] = ()

    @property
    def is_attached(self) -> bool:
        """Whether somebody else started it, so that it is neither stopped nor started anew."""
        return self.sight is not None

    @property
    def statements(self) -> tuple[Statement, ...]:
        """What a report says of a server that somebody else runs, the proved with their evidence; else nothing."""
        return () if self.sight is None else statements_of(self.sight)

    @property
    def not_proved(self) -> tuple[str, ...]:
        """What no evidence was found for, with what would bring some; empty for a server of ours."""
        return tuple(str(statement) for statement in self.statements if not statement.is_proved)


class Server(Protocol):
    """A server that has proved to be what was asked for."""

    @property
    def spec(self) -> ServerSpec:
        """What it was started as."""

    @property
    def endpoint(self) -> Endpoint:
        """Where it answers."""

    @property
    def proof(self) -> ServerProof:
        """What it showed about itself."""

    @property
    def command(self) -> Sequence[str]:
        """The argument list of its main process, without secrets."""

    @property
    def log(self) -> Path | None:
        """Its log file; ``None`` where it is not at hand: somebody else runs it."""

    def nccl_logs(self) -> Sequence[Path]:
        """Return NCCL's log files, one per process of this server that loaded NCCL; never those of others."""

    def nccl_log_obstacle(self) -> str | None:
        """Return why they may show no channel, in words a person can act on; ``None`` when nothing hides them."""

    def surroundings(self) -> Surroundings:
        """Return what surrounds the processes of its ranks: environment, namespaces, /dev/shm, the machine."""

    def mapped_segments(self) -> Mapping[int, Collection[str]]:
        """Return the shared-memory segments (paths) each rank has mapped now, by rank."""

    def gpu_processes(self) -> OccupancyReport | None:
        """Return on which GPUs its processes compute now; ``None`` on the CPU platform, and where that is not seen.

        :raises pytest_gpulayout.errors.TopologyError: the driver does not answer.
        """

    def parts(self) -> Sequence[Server]:
        """Return the servers behind it, one per replica of the layout; itself alone where there is one.

        What is proved of a server is proved of each of them: rank r of replica k is rank k * ranks + r of the whole.
        """

    def check_alive(self) -> None:
        """Do nothing while the server runs.

        :raises pytest_gpulayout.errors.ServerExited: it is gone; with the cause from its log.
        """

    def stop(self) -> None:
        """End the server and everything it started; return when all is gone. May be called again."""


class ServerLauncher(Protocol):
    """Starts servers."""

    def launch(self, spec: ServerSpec, progress: Progress) -> Server:
        """Start a server and return it once it has proved its layout with a real completion.

        :raises pytest_gpulayout.errors.ServerError: it did not come up; nothing of it is left.
        """


class NodeChannel(Protocol):
    """One node as the test run talks to it: an agent there answers requests.

    What can be asked is listed in :mod:`pytest_gpulayout.adapters.node_agent`.
    """

    @property
    def name(self) -> str:
        """The node, as the user named it."""

    def request(self, method: str, arguments: Mapping[str, Any], *, timeout_s: float) -> Any:
        """Return what the agent answers: what JSON can hold.

        :raises pytest_gpulayout.errors.NodeError: it refuses, or cannot. :raises pytest_gpulayout.errors.NodeLost: no
            answer came in time, or none will come any more.
        """

    def close(self) -> None:
        """End all that the agent has started there, and the agent; may be called again."""


class NodeSource(Protocol):
    """Finds the hosts of a layout over several nodes."""

    def open(self, count: int, progress: Progress) -> Sequence[NodeChannel]:
        """Return so many nodes, in the order of their ranks, all of which answer; the first one is the head.

        :raises pytest_gpulayout.errors.NodeError: a node is missing or does not answer; it is named.
        """


@dataclass(frozen=True, slots=True)
class ProbeSpec:
    """One start of the collective probe.

    :param groups: (n_groups,) of ranks that add up messages together, all groups at the same time.
    :param devices: one per rank, in rank order. :param python: interpreter that has PyTorch installed.
    """

    layout: Layout
    groups: tuple[tuple[int, ...], ...]
    devices: tuple[Device, ...]
    platform: Platform
    python: str
    plan: ProbePlan


class CollectiveProbe(Protocol):
    """Measures what it costs the ranks of a layout to add up a message, without a server."""

    def run(self, spec: ProbeSpec, progress: Progress) -> ProbeRun:
        """Start a process for each rank, measure, and return when all of them are gone.

        :raises pytest_gpulayout.errors.MeasurementError: a rank failed, took too long, or got a wrong sum.
        :raises pytest_gpulayout.errors.DevicesBusy: others compute on the devices.
        """


class BaselineStore(Protocol):
    """Keeps baseline documents under relative paths such as ``model/tp2/h200/smoke.json``."""

    root: str

    def read(self, path: str) -> str | None:
        """Return the text stored under ``path``, ``None`` when there is none.

        :raises pytest_gpulayout.errors.BaselineError: it is there, and cannot be read.
        """

    def update(self, path: str, change: Callable[[str | None], str | None]) -> bool:
        """Replace what is stored by what ``change`` makes of it; no other writer comes between.

        A reader sees the old text or the new one, never a part.

        :param change: takes the text now, ``None`` when there is none, and returns the new one, ``None`` to remove
            it. May be called again when another writer was faster, and must not change the store itself; what it
            raises leaves all as it was.
        :returns: whether something was stored before.
        :raises pytest_gpulayout.errors.BaselineError: it cannot be read or written; nothing was changed, unless the
            message says otherwise.
        """

    def paths(self) -> Sequence[str]:
        """Return all stored paths, sorted.

        :raises pytest_gpulayout.errors.BaselineError: they cannot be listed.
        """
