"""Who computes on which GPU: every rank on its own, nothing of the server on another, and nobody else beside it.

Knows how to judge what a driver lists, and how to wait until others have left. Leaves asking the driver to a
:class:`~pytest_gpulayout.ports.GpuProcessSource`. Three kinds of evidence, the strongest that there is is used:

- ``process list``: the server's own process ids stand in the driver's lists.
- ``new processes``: the lists hold other ids, those of the host, since this is a container; then the processes that
  are new since before the start must be one for each rank.
- ``device memory``: the driver lists nothing (WSL2, some virtual GPUs); then the memory in use must have grown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pytest_gpulayout.errors import DevicesBusy

if TYPE_CHECKING:
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.ports import GpuProcessSource, Progress
    from pytest_gpulayout.topology import Device

ProvedBy = Literal["process list", "new processes", "device memory"]

LEAST_GROWTH_BYTES = 256 * 2**20
"""A rank's context with the kernels and workspaces of PyTorch takes more on any GPU that vLLM runs on."""
GRACE_S = 5.0
"""A server that has just been stopped may stand in the driver's list for a moment."""
POLL_S = 0.5

_PIDS_ARE_HIDDEN = "the driver lists process ids of the host, unknown here: docker run --pid=host shows them"


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds a compute context on a GPU.

    :param uuid: of the GPU. :param pid: as the driver tells it, which is the host's where a container hides them.
    :param memory_bytes: GPU memory of this process, ``None`` where the driver does not tell.
    """

    uuid: str
    pid: int
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class GpuUse:
    """One GPU at one moment.

    :param used_bytes: memory in use by whomever. :param listed: whether the driver lists the processes on it.
    """

    index: int
    uuid: str
    used_bytes: int | None = None
    listed: bool = True

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.uuid})"


@dataclass(frozen=True, slots=True)
class Occupancy:
    """All GPUs of a machine and the processes that compute on them, at one moment."""

    gpus: tuple[GpuUse, ...] = ()
    processes: tuple[GpuProcess, ...] = ()

    def gpu(self, device: Device) -> GpuUse | None:
        """Return the GPU that a device of a topology is: by its UUID; by its index where the topology has none."""
        if device.uuid is None:
            return next((gpu for gpu in self.gpus if gpu.index == device.index), None)
        return next((gpu for gpu in self.gpus if gpu.uuid == device.uuid), None)

    def on(self, gpu: GpuUse) -> tuple[GpuProcess, ...]:
        """Return the processes on one GPU."""
        return tuple(process for process in self.processes if process.uuid == gpu.uuid)


@dataclass(frozen=True, slots=True)
class OccupancyViolation:
    """A process that is not where it must be, or a rank of which nothing shows that it is.

    :param kind: ``stray``: of the server, on a GPU where it must not be; ``missing``: a rank that is not listed on
        its GPU; ``foreign``: not of the server, on one of its GPUs; ``idle``: a GPU whose memory use has not grown;
        ``unknown``: a GPU that the driver does not show.
    :param gpu: text that names the GPU. :param memory: text, of the process or of the growth.
    :param home: the GPU that a stray rank belongs on. :param title: of the process, ``""`` where it is not known.
    """

    kind: Literal["stray", "missing", "foreign", "idle", "unknown"]
    gpu: str
    rank: int | None = None
    pid: int | None = None
    title: str = ""
    memory: str = ""
    home: str = ""

    def __str__(self) -> str:
        match self.kind:
            case "stray":
                if self.home:
                    return f"{self._who} holds a context on {self.gpu}, {self.memory}; its own is {self.home}"
                return f"{self._who} holds a context on {self.gpu} outside the layout, {self.memory}"
            case "missing":
                return f"{self._who} has no context on {self.gpu}"
            case "foreign":
                return f"{self._who} is not of the server and computes on {self.gpu}, {self.memory}"
            case "idle":
                least = memory_text(LEAST_GROWTH_BYTES)
                return f"{self._who}: memory in use on {self.gpu} must have grown by {least}, found {self.memory}"
            case "unknown":
                return f"{self._who} belongs on {self.gpu}, which is not among the GPUs that the driver shows"

    @property
    def _who(self) -> str:
        process = "" if self.pid is None else f"pid {self.pid} {self.title}".rstrip()
        if self.rank is None:
            return process
        return f"rank {self.rank} ({process})" if process else f"rank {self.rank}"


@dataclass(frozen=True, slots=True)
class RankOccupancy:
    """Where a rank computes. :param pid: as the driver lists it, ``None`` where it does not."""

    rank: int
    gpu: GpuUse
    pid: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class OccupancyReport:
    """What the driver's lists prove about a server.

    :param ranks: those that were found, in rank order. :param not_proved: what this evidence cannot show.
    :param remarks: what is worth knowing and breaks no rule.
    """

    proved_by: ProvedBy
    ranks: tuple[RankOccupancy, ...] = ()
    violations: tuple[OccupancyViolation, ...] = ()
    not_proved: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every rank is on its GPU, as far as it can be seen."""
        return not self.violations

    def summary(self) -> str:
        """One line: what was found, and by which evidence."""
        if self.violations:
            more = f" and {len(self.violations) - 1} more" if len(self.violations) > 1 else ""
            return f"{self.violations[0]}{more} ({self.proved_by})"
        if self.proved_by == "device memory":
            return "memory in use has grown on the GPU of each rank; other GPUs not proved (device memory)"
        rest = "no other" if not self.not_proved else "no other as far as it can be seen"
        return f"each rank on its GPU and {rest} ({self.proved_by})"


def memory_text(memory_bytes: int | None) -> str:
    """``"30.5 GiB"``, ``"512 MiB"``, ``"memory unknown"``."""
    if memory_bytes is None:
        return "memory unknown"
    mib = memory_bytes / 2**20
    return f"{mib / 1024:.1f} GiB" if abs(mib) >= 1024 else f"{mib:.0f} MiB"


def foreign_processes(snapshot: Occupancy, devices: Sequence[Device]) -> tuple[GpuProcess, ...]:
    """Return the processes on these devices; called before a server starts, when all of them are somebody else's."""
    gpus = dict.fromkeys(gpu for gpu in map(snapshot.gpu, devices) if gpu is not None)
    return tuple(process for gpu in gpus for process in snapshot.on(gpu))


# -- before the start ------------------------------------------------------------------------------------------------


def await_idle_devices(
    source: GpuProcessSource,
    layout: Layout,
    devices: Sequence[Device],
    *,
    wait_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    progress: Progress,
) -> Occupancy:
    """Return what is on the GPUs once nobody else computes on the devices.

    :param wait_s: how long to wait for others; a few seconds are always given to what has just ended.
    :param clock: seconds, monotonic. :param sleep: waits for seconds.
    :raises DevicesBusy: somebody else is still there.
    """
    began = clock()
    limit_s = max(wait_s, GRACE_S)
    while True:
        now = source.snapshot()
        others = foreign_processes(now, devices)
        waited_s = clock() - began
        if not others:
            return now
        if waited_s >= limit_s:
            raise _busy(now, others, source, layout, waited_s)
        who = f"pid {others[0].pid} {source.describe(others[0].pid)}".rstrip()
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        progress(f"{layout}: waiting for {who}{more} to leave the GPUs, {waited_s:.0f} of {limit_s:.0f} s")
        sleep(min(POLL_S, limit_s - waited_s))


def _busy(
    now: Occupancy, others: Sequence[GpuProcess], source: GpuProcessSource, layout: Layout, waited_s: float
) -> DevicesBusy:
    gpus = {gpu.uuid: gpu for gpu in now.gpus}
    lines = [f"idle GPUs were required for layout {layout}, found other processes on them"]
    for process in others:
        name = source.describe(process.pid) or "(not visible from here)"
        lines.append(f"  {gpus[process.uuid]}: pid {process.pid} {name}, {memory_text(process.memory_bytes)}")
    lines += [
        f"  in the process list of the NVIDIA driver, {waited_s:.0f} s after they were first looked for",
        f"  end them, choose other GPUs with --gpu-devices, or wait for them with --gpu-wait={_longer(waited_s)}",
    ]
    return DevicesBusy("\n".join(lines), pids=[process.pid for process in others])


def _longer(waited_s: float) -> int:
    return max(600, 2 * round(waited_s))


# -- while it runs ---------------------------------------------------------------------------------------------------


def judge_occupancy(
    before: Occupancy,
    now: Occupancy,
    devices: Sequence[Device],
    rank_pids: Mapping[int, int],
    server_pids: Mapping[int, str],
    describe: Callable[[int], str] = lambda pid: "",  # noqa: ARG005
) -> OccupancyReport:
    """Judge where the processes of a server compute.

    :param before: from before its start. :param devices: (n_ranks,), in rank order.
    :param rank_pids: process id of each rank. :param server_pids: title of every process of the server, by id.
    :param describe: says what runs under a process id that is not of the server.
    """
    titles = dict.fromkeys(rank_pids.values(), "") | dict(server_pids)
    return _Judge(before, now, devices, rank_pids, titles, describe).report()


@dataclass(slots=True)
class _Judge:
    before: Occupancy
    now: Occupancy
    devices: Sequence[Device]
    rank_pids: Mapping[int, int]
    titles: Mapping[int, str]
    describe: Callable[[int], str]
    homes: dict[int, GpuUse] = field(init=False)
    ranks: dict[int, RankOccupancy] = field(default_factory=dict)
    violations: list[OccupancyViolation] = field(default_factory=list)
    not_proved: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        found = {rank: self.now.gpu(device) for rank, device in enumerate(self.devices)}
        self.homes = {rank: gpu for rank, gpu in found.items() if gpu is not None}
        for rank, gpu in found.items():
            if gpu is None:
                device = self.devices[rank]
                name = f"GPU {device.index}" + (f" ({device.uuid})" if device.uuid else "")
                self.violations.append(OccupancyViolation("unknown", name, rank))

    def report(self) -> OccupancyReport:
        proved_by = self._judge()
        return OccupancyReport(
            proved_by,
            ranks=tuple(self.ranks[rank] for rank in sorted(self.ranks)),
            violations=tuple(self.violations),
            not_proved=tuple(self.not_proved),
            remarks=tuple(self.remarks),
        )

    def _judge(self) -> ProvedBy:
        if any(process.pid in self.titles for process in self.now.processes):
            self._by_process_list()
            return "process list"
        known = {(process.uuid, process.pid) for process in self.before.processes}
        new = [process for process in self.now.processes if (process.uuid, process.pid) not in known]
        if new:
            self._by_new_processes(new)
            return "new processes"
        for rank in self.homes:
            self._by_memory(rank)
        self._foreign(process for process in self.now.processes)
        self._leave_unproved(gpu for gpu in self.now.gpus if gpu not in self.homes.values())
        return "device memory"

    # -- the server's process ids are in the lists ---------------------------------------------------------------

    def _by_process_list(self) -> None:
        rank_of = {pid: rank for rank, pid in self.rank_pids.items()}
        own = [process for process in self.now.processes if process.pid in self.titles]
        for rank, gpu in self.homes.items():
            self._place(rank, gpu, [process for process in self.now.on(gpu) if rank_of.get(process.pid) == rank])
        for process in own:
            found = rank_of.get(process.pid)
            if found is None:
                self._beside_the_ranks(process)
            elif found in self.homes and process.uuid != self.homes[found].uuid:
                self._stray(process, found)
        self._foreign(process for process in self.now.processes if process not in own)
        self._leave_unproved(gpu for gpu in self.now.gpus if not gpu.listed and gpu not in self.homes.values())

    def _beside_the_ranks(self, process: GpuProcess) -> None:
        """An engine core or front end: it may share a GPU of the layout, though it should not need one."""
        if not self._is_chosen(process):
            self._stray(process, None)
            return
        who = f"pid {process.pid} {self.titles[process.pid]}".rstrip()
        self.remarks.append(
            f"{who} is no rank and holds a context on {self._gpu(process)}, {memory_text(process.memory_bytes)}"
        )

    # -- the lists hold ids of the host --------------------------------------------------------------------------

    def _by_new_processes(self, new: Sequence[GpuProcess]) -> None:
        """A new process belongs on that GPU of the layout where it uses most memory, and nowhere else."""
        belongs: dict[int, int] = {}
        for rank, gpu in reversed(self.homes.items()):
            for process in self._of(new, gpu):
                elsewhere = [p for p in new if p.pid == process.pid and self._is_chosen(p)]
                if _memory(process) == max(map(_memory, elsewhere)):
                    belongs[process.pid] = rank
        for rank, gpu in self.homes.items():
            own = [process for process in self._of(new, gpu) if belongs[process.pid] == rank]
            self._place(rank, gpu, own)
            if len(own) > 1:
                pids = ", ".join(str(process.pid) for process in own)
                self.not_proved.append(f"{gpu}: that all {len(own)} new processes (pid {pids}) are the server's")
        for process in new:
            if process.pid not in belongs:
                where = self._gpu(process)
                self.not_proved.append(f"{where}: that its new process (pid {process.pid}) is not the server's")
            elif self.homes[belongs[process.pid]].uuid != process.uuid:
                self._stray(process, belongs[process.pid])
        self._foreign(process for process in self.now.processes if process not in new)
        self._leave_unproved(gpu for gpu in self.now.gpus if not gpu.listed and gpu not in self.homes.values())
        self.remarks.append(_PIDS_ARE_HIDDEN)

    def _of(self, processes: Sequence[GpuProcess], gpu: GpuUse) -> list[GpuProcess]:
        return [process for process in processes if process.uuid == gpu.uuid]

    # -- findings ------------------------------------------------------------------------------------------------

    def _place(self, rank: int, gpu: GpuUse, own: Sequence[GpuProcess]) -> None:
        """Say where a rank is. :param own: its processes on its GPU, of which the largest is the rank."""
        if own:
            process = max(own, key=_memory)
            self.ranks[rank] = RankOccupancy(rank, gpu, process.pid, process.memory_bytes)
        elif not gpu.listed:
            self._by_memory(rank)
            self.not_proved.append(f"{gpu}: that nobody else computes there; the driver does not list its processes")
        else:
            pid = self.rank_pids.get(rank)
            self.violations.append(
                OccupancyViolation("missing", str(gpu), rank, pid, "" if pid is None else self.titles.get(pid, ""))
            )

    def _by_memory(self, rank: int) -> None:
        gpu = self.homes[rank]
        earlier = next((known.used_bytes for known in self.before.gpus if known.uuid == gpu.uuid), None)
        growth = None if earlier is None or gpu.used_bytes is None else gpu.used_bytes - earlier
        if growth is not None and growth >= LEAST_GROWTH_BYTES:
            self.ranks[rank] = RankOccupancy(rank, gpu)
        else:
            found = "that the driver does not tell it" if growth is None else memory_text(growth)
            self.violations.append(OccupancyViolation("idle", str(gpu), rank, memory=found))

    def _stray(self, process: GpuProcess, rank: int | None) -> None:
        self.violations.append(
            OccupancyViolation(
                "stray",
                self._gpu(process),
                rank,
                process.pid,
                self.titles.get(process.pid, ""),
                memory_text(process.memory_bytes),
                "" if rank is None else str(self.homes[rank]),
            )
        )

    def _foreign(self, processes: Iterator[GpuProcess]) -> None:
        """Report those on GPUs of the layout."""
        for process in filter(self._is_chosen, processes):
            self.violations.append(
                OccupancyViolation(
                    "foreign",
                    self._gpu(process),
                    pid=process.pid,
                    title=self.describe(process.pid),
                    memory=memory_text(process.memory_bytes),
                )
            )

    def _leave_unproved(self, gpus: Iterator[GpuUse]) -> None:
        self.not_proved += [f"{gpu}: that the server has no context there" for gpu in gpus]

    def _is_chosen(self, process: GpuProcess) -> bool:
        return any(process.uuid == gpu.uuid for gpu in self.homes.values())

    def _gpu(self, process: GpuProcess) -> str:
        return next((str(gpu) for gpu in self.now.gpus if gpu.uuid == process.uuid), process.uuid)


def _memory(process: GpuProcess) -> int:
    return process.memory_bytes or 0
