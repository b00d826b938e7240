"""What the gate needs from the outside world, as Protocols; :mod:`pytest_gpulayout.adapters` implements them.

Nothing here opens a file, socket or process. Public fakes for every port are in :mod:`pytest_gpulayout.testing`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from pytest_gpulayout.layout import Layout

if TYPE_CHECKING:
    from pytest_gpulayout.calibration import Calibration
    from pytest_gpulayout.occupancy import Occupancy, OccupancyReport
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
class ServerProof:
    """What a running server said and showed about itself, as opposed to how it was started.

    :param fingerprint: ``system_fingerprint`` of a completion that it answered.
    :param rank_pids: process id of each rank, from the process table.
    :param start_s: seconds from start to the first completion.
    :param binding: the CPUs and NUMA nodes that it was bound to, or why not, in words; ``""`` where none apply.
    """

    vllm_version: str
    fingerprint: str
    rank_pids: Mapping[int, int]
    start_s: float
    binding: str = ""


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
    def log(self) -> Path:
        """Its log file."""

    def nccl_logs(self) -> Sequence[Path]:
        """Return NCCL's log files, one per process of this server that loaded NCCL; never those of others."""

    def nccl_log_obstacle(self) -> str | None:
        """Return why they may show no channel, in words a person can act on; ``None`` when nothing hides them."""

    def surroundings(self) -> Surroundings:
        """Return what surrounds the processes of its ranks: environment, namespaces, /dev/shm, the machine."""

    def mapped_segments(self) -> Mapping[int, Collection[str]]:
        """Return the shared-memory segments (paths) each rank has mapped now, by rank."""

    def gpu_processes(self) -> OccupancyReport | None:
        """Return on which GPUs its processes compute now; ``None`` on the CPU platform.

        :raises pytest_gpulayout.errors.TopologyError: the driver does not answer.
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
