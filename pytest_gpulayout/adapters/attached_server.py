"""A server that somebody else runs: asked what it is, looked at as far as it can be seen, never stopped or changed.

It counts as what it says and shows: models, version, the fingerprint of an answer, its counters. Where it runs on
this host, its processes, GPUs and shared memory are evidence as well
(:mod:`~pytest_gpulayout.adapters.server_processes`). What stays without evidence is listed by
:mod:`~pytest_gpulayout.proofs`.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path

import orjson

from pytest_gpulayout.adapters.cpu_host import BIND_VARIABLE, CpuTopology
from pytest_gpulayout.adapters.keeper import mapped_segments
from pytest_gpulayout.adapters.nccl_capture import NCCL_SUBSYSTEMS
from pytest_gpulayout.adapters.running_server import Role, RunningServer, find_running_server
from pytest_gpulayout.adapters.server_address import locate
from pytest_gpulayout.adapters.server_processes import SeenProcesses, processes_behind
from pytest_gpulayout.adapters.sse import error_message
from pytest_gpulayout.adapters.surroundings import read_surroundings
from pytest_gpulayout.adapters.vllm_process import GpuWatch
from pytest_gpulayout.errors import (
    MeasurementError,
    ServerError,
    ServerExited,
    ServerStartFailed,
    TopologyError,
)
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.occupancy import Occupancy, OccupancyReport
from pytest_gpulayout.ports import (
    Endpoint,
    GpuProcessSource,
    Platform,
    Progress,
    ServerProof,
    ServerSpec,
    TopologySource,
)
from pytest_gpulayout.proofs import (
    NOT_KNOWN_HERE,
    Sight,
    confirm_configuration,
    confirm_layout,
    require_one_server,
    unknown_topology,
    utc_text,
)
from pytest_gpulayout.server_info import SERVER_INFO_PATH, ServerInfo, parse_server_info
from pytest_gpulayout.server_window import parse_metrics
from pytest_gpulayout.surroundings import Surroundings
from pytest_gpulayout.topology import Topology

KEY_VARIABLE = "GPULAYOUT_SERVER_API_KEY"
"""Environment variable that holds the key of the server."""

CLOCKS_S = 120.0
"""By how much the clocks of two hosts may differ: a log that is older than its server by more is of another one."""

_ROLE = Role("server to gate", KEY_VARIABLE)
_ANSWER_S = 10.0
_COMPLETION_S = 60.0
_BROKEN = HTTPStatus.INTERNAL_SERVER_ERROR
_CONNECTIONS = 4  # what balances load chooses anew for each, so several servers show themselves
_START_WITH = f"NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS={NCCL_SUBSYSTEMS} NCCL_DEBUG_FILE=/shared/nccl.%h.%p.log"


@dataclass(frozen=True, slots=True)
class _Here:
    """What is seen of the server on this host.

    :param topology: of the host. :param devices: index of each rank's device in it, in rank order.
    """

    processes: SeenProcesses
    topology: Topology | None = None
    devices: tuple[int, ...] = ()


class Attachment:
    """Where the server is, and the way to it: gives its models and devices, and stands in for what launches servers.

    :param url: base address; a slash, or ``/v1``, may stand at its end.
    :param nccl_logs: pattern of the files that are said to be its own, ``""`` for none.
    :param recorded: a topology that somebody recorded or describes, ``None`` to look at this host.
    :param gpus: gives what GPUs this host has. :param gpu_processes: gives who computes on them.
    """

    def __init__(
        self,
        url: str,
        platform: Platform,
        *,
        nccl_logs: str = "",
        recorded: TopologySource | None = None,
        gpus: Callable[[], TopologySource] | None = None,
        gpu_processes: Callable[[], GpuProcessSource | None] = lambda: None,
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._platform = platform
        self._nccl_logs = nccl_logs
        self._recorded = recorded
        self._gpus = gpus
        self._gpu_processes = gpu_processes
        self._found: RunningServer | None = None
        self._seen: dict[Layout, _Here | None] = {}

    # -- what it is ------------------------------------------------------------------------------------------------

    def find(self) -> RunningServer:
        """Return what the server says it is; asked once.

        :raises MeasurementError: it does not answer, refuses the key, or serves no model.
        """
        if self._found is None:
            self._found = find_running_server(self._url, _ROLE)
        return self._found

    def check(self, model: str | None) -> None:
        """Do nothing where it answers and serves a model. :param model: ``None`` where that is said by the tests.

        :raises MeasurementError: it does not answer. :raises ServerError: it serves another model.
        """
        self.find()
        if model is not None:
            self.served(model)

    def summary(self) -> str:
        """Return in a line what will be gated, or why nothing can be."""
        try:
            found = self.find()
        except MeasurementError as error:
            return str(error).partition("\n")[0]
        names = ", ".join(model.name for model in found.models)
        return f"vLLM {found.version or 'of unknown version'} at {found.endpoint.url}, which serves {names}"

    def served(self, wanted: str | None) -> str:
        """Return the name that requests must give for a model.

        :param wanted: its name, or what its weights came from; ``None`` for the only one that it serves.
        :raises ServerError: it serves another one, or several and none is wanted.
        """
        models = self.find().models
        if wanted is not None:
            name = next((m.name for m in models if wanted in (m.name, m.root)), None)
        else:
            whole = [model for model in models if not model.parent]
            name = whole[0].name if len({model.root or model.name for model in whole}) == 1 else None
        if name is not None:
            return name
        names = ", ".join(dict.fromkeys(model.name for model in models))
        required = "one model" if wanted is None else f"the model {wanted}"
        raise ServerError(
            f"{required} was required of the server, found {names}\n  at {self.find().endpoint.url}/v1/models\n"
            f"  ask for what it serves: --gpu-model={models[0].name}"
        )

    # -- where it runs -----------------------------------------------------------------------------------------------

    def topology_of(self, layout: Layout) -> Topology:
        """Return its devices and links: as recorded, as seen on this host, or that nothing is known of them.

        :raises TopologyError: what was recorded cannot be read.
        """
        if self._recorded is not None:
            return self._recorded.probe()
        here = self._here(layout)
        if here is not None and here.topology is not None:
            return here.topology
        return unknown_topology(layout, self._platform, self._url)

    def devices_of(self, layout: Layout, topology: Topology) -> tuple[str, ...]:
        """Return the devices that it uses, in rank order, as ``--gpu-devices`` names them.

        :raises TopologyError: a recorded topology has more devices than it uses.
        """
        here = None if self._recorded is not None else self._here(layout)
        if here is not None and here.topology is not None:
            return tuple(map(str, here.devices))
        indices = tuple(str(device.index) for device in topology.usable)
        if len(indices) <= layout.gpus_per_node:  # too few are told by who places ranks on them
            return indices
        first = ",".join(indices[: layout.gpus_per_node])
        raise TopologyError(
            f"the {layout.gpus_per_node} devices that the server uses were required, found {len(indices)}\n"
            f"  in {topology.source}\n  say which they are, in rank order: --gpu-devices={first}"
        )

    @property
    def sees_devices(self) -> bool:
        """Whether the devices that it runs on can be looked at from here."""
        return any(here is not None and here.topology is not None for here in self._seen.values())

    def _here(self, layout: Layout) -> _Here | None:
        """What is seen on this host, looked for once; anew by :meth:`launch`."""
        if layout not in self._seen:
            self._seen[layout] = self._look(layout)
        return self._seen[layout]

    def _look(self, layout: Layout) -> _Here | None:
        processes = processes_behind(locate(self.find().endpoint, _ANSWER_S), layout)
        if processes is None:
            return None
        here = _Here(processes)
        if self._recorded is not None or processes.computing != layout.ranks:
            return here
        return self._on_cores(here) if self._platform == "cpu" else self._on_gpus(here)

    def _on_cores(self, here: _Here) -> _Here:
        """The cores are those of vLLM's own variable; without it they are all, as the ranks share them."""
        environments = [rank.environment or {} for rank in read_surroundings(here.processes.ranks).ranks.values()]
        bind = next((names[BIND_VARIABLE] for names in environments if names.get(BIND_VARIABLE)), "auto")
        ranks = range(len(here.processes.ranks))
        return replace(here, topology=CpuTopology(len(ranks), bind).probe(), devices=tuple(ranks))

    def _on_gpus(self, here: _Here) -> _Here:
        """The GPUs are those on which the driver lists the ranks; in a container it may list other process ids."""
        source = self._gpu_processes()
        if source is None or self._gpus is None:
            return here
        try:
            topology, now = self._gpus().probe(), source.snapshot()
        except TopologyError:  # a server with GPUs that this process cannot ask
            return here
        devices = [_gpu_of(pid, now, topology) for _, pid in sorted(here.processes.ranks.items())]
        known = tuple(index for index in devices if index is not None)
        return here if len(known) < len(devices) else replace(here, topology=topology, devices=known)

    # -- in place of a launcher ------------------------------------------------------------------------------------

    def launch(self, spec: ServerSpec, progress: Progress) -> AttachedServer:
        """Return the server, once it has proved its layout with a real completion; nothing is started.

        :raises ServerStartFailed: it does not answer, is another layout, or is several servers.
        """
        progress(f"{spec.layout}: first completion of {self._url}")
        require_one_server(spec.layout)
        self._seen.pop(spec.layout, None)  # it may have been started anew since
        try:
            endpoint = replace(self.find().endpoint, model=self.served(spec.model))
            said = self._ask(endpoint, spec.layout)
            here = self._here(spec.layout)
        except MeasurementError as error:
            raise ServerStartFailed(str(error)) from error
        if here is not None:
            _require_no_more_ranks(here.processes, spec.layout, endpoint.url)
        sight = self._with_what_is_here(said, here)
        moe = (here is not None and here.processes.moe) or (said.info is not None and said.info.moe is True)
        proof = ServerProof(
            said.version, said.fingerprint, sight.rank_pids, None, moe=moe, info=said.info, sight=sight
        )
        return AttachedServer(spec, endpoint, proof, self._evidence(here))

    def _ask(self, endpoint: Endpoint, layout: Layout) -> Sight:
        """Return what the server says of itself, once that is the layout that was asked for."""
        text = first_completion(endpoint)
        version = confirm_layout(text, layout, endpoint.url).version
        info = server_info(endpoint)
        confirm_configuration(info, layout, endpoint.url)
        return Sight(
            url=endpoint.url,
            layout=layout,
            platform=self._platform,
            fingerprint=text,
            version=version,
            started_s=process_start(endpoint),
            info=info,
        )

    def _with_what_is_here(self, said: Sight, here: _Here | None) -> Sight:
        """Add what is seen on this host, and what somebody recorded."""
        topology = self.topology_of(said.layout)
        source = f"recorded in {topology.source}" if topology.recorded else topology.source
        return replace(
            said,
            topology="" if topology.source == NOT_KNOWN_HERE else source,
            rank_pids={} if here is None else here.processes.ranks,
            sees_devices=here is not None and here.topology is not None,
            has_nccl_logs=bool(self._nccl_logs) and bool(said.layout.communicating_pairs()),
        )

    def _evidence(self, here: _Here | None) -> _Evidence:
        source = self._gpu_processes() if here is not None and here.topology is not None else None
        processes = None if here is None else here.processes
        return _Evidence(self._nccl_logs, processes, None if source is None else GpuWatch(source, Occupancy()))


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What there is beside the server's answers.

    :param nccl_logs: pattern of files. :param watch: on GPUs, where those of the server are seen.
    """

    nccl_logs: str = ""
    processes: SeenProcesses | None = None
    watch: GpuWatch | None = None


@dataclass(frozen=True, slots=True)
class AttachedServer:
    """One server that somebody else runs, as the gate sees it; stopping it is letting it be."""

    spec: ServerSpec
    endpoint: Endpoint
    proof: ServerProof
    evidence: _Evidence = field(default_factory=_Evidence, repr=False)

    @property
    def command(self) -> Sequence[str]:
        """Nothing: what it was started with is not seen."""
        return ()

    @property
    def log(self) -> None:
        """Nothing: its log is where whoever runs it keeps it."""

    @property
    def started_s(self) -> float | None:
        """When its process started, as it told when it was attached to; seconds since the epoch on its clock."""
        return None if self.proof.sight is None else self.proof.sight.started_s

    def parts(self) -> tuple[AttachedServer]:
        """Return this server alone."""
        return (self,)

    def nccl_logs(self) -> Sequence[Path]:
        """Return the files of the pattern that was given, sorted, without those that are older than the server."""
        return [path for path in self._files() if not self._is_stale(path)]

    def nccl_log_obstacle(self) -> str | None:
        """Return why they may show no channel, in words a person can act on; ``None`` when nothing hides them."""
        pattern = self.evidence.nccl_logs
        if not pattern:
            return f"start the server with {_START_WITH} and give the files: --gpu-nccl-log='/shared/nccl.*.log'"
        files = self._files()
        if not files:
            return f"--gpu-nccl-log={pattern} matches no file: name those that the server's processes write"
        if stale := [path for path in files if self._is_stale(path)]:
            assert self.started_s is not None
            return (
                f"{len(stale)} of {len(files)} files of --gpu-nccl-log, such as {stale[0]}, were last written before "
                f"the server started ({utc_text(self.started_s)}): give those of this start"
            )
        return None

    def _files(self) -> list[Path]:
        found = glob.glob(self.evidence.nccl_logs, recursive=True) if self.evidence.nccl_logs else []
        return sorted(path for path in map(Path, found) if path.is_file())

    def _is_stale(self, path: Path) -> bool:
        started_s = self.started_s
        return started_s is not None and path.stat().st_mtime < started_s - CLOCKS_S

    def surroundings(self) -> Surroundings:
        """Return what surrounds its ranks, where they are on this host; else that nothing is known."""
        return read_surroundings(self.proof.rank_pids) if self.proof.rank_pids else Surroundings()

    def mapped_segments(self) -> Mapping[int, Collection[str]]:
        """Return the segments under /dev/shm that each rank of this host has mapped now."""
        return {rank: mapped_segments([pid]) for rank, pid in self.proof.rank_pids.items()}

    def gpu_processes(self) -> OccupancyReport | None:
        """Return on which GPUs its processes compute now; ``None`` where they are not seen."""
        watch, processes = self.evidence.watch, self.evidence.processes
        if watch is None or processes is None:
            return None
        return watch.report(self.spec.devices, self.proof.rank_pids, lambda: processes.titles)

    def check_alive(self) -> None:
        """Do nothing while the same server answers.

        :raises ServerExited: it does not, or it was started anew meanwhile.
        """
        try:
            status, _ = locate(self.endpoint, _ANSWER_S).ask("GET", "/health", timeout_s=_ANSWER_S)
            started_s = process_start(self.endpoint, connections=1) if status < _BROKEN else None
        except (MeasurementError, ServerStartFailed) as error:
            raise self._gone(str(error)) from error
        if status >= _BROKEN:
            raise self._gone(f"HTTP {status}")
        if started_s != self.started_s:
            raise self._gone("another process answers: it was started anew")

    def _gone(self, found: str) -> ServerExited:
        return ServerExited(
            f"the server that was attached to went away while it was in use\n"
            f"  found: {found.replace(chr(10), chr(10) + '  ')}\n  at {self.endpoint.url}\n"
            "  look at its log where it runs, and run again when it is back"
        )

    def stop(self) -> None:
        """Let it be: it belongs to whoever started it."""


def _gpu_of(pid: int, now: Occupancy, topology: Topology) -> int | None:
    """Index of the GPU on which a process has most memory, ``None`` where it is on none that is known."""
    own = [process for process in now.processes if process.pid == pid]
    if not own:
        return None
    home = max(own, key=lambda process: process.memory_bytes or 0)
    for device in topology.devices:
        gpu = now.gpu(device)
        if gpu is not None and gpu.uuid == home.uuid:
            return device.index
    return None


def _require_no_more_ranks(processes: SeenProcesses, layout: Layout, url: str) -> None:
    """Refuse a server with more ranks than were asked for, which a fingerprint without sizes does not tell."""
    if processes.computing > layout.ranks:
        raise ServerStartFailed(
            f"the server is not the layout that was asked for: {layout} has {layout.ranks} ranks, found "
            f"{processes.computing} that compute\n  where: below pid {processes.top}, which answers at {url}\n"
            "  ask for the layout that it has: --gpu-layout=..."
        )


def first_completion(endpoint: Endpoint) -> str:
    """Return the ``system_fingerprint`` of a short completion, or what was answered in its place.

    :raises MeasurementError: no answer. :raises ServerStartFailed: it cannot compute.
    """
    body = {"model": endpoint.model, "prompt": "Hello", "max_tokens": 2, "temperature": 0}
    address = locate(endpoint, _ANSWER_S)
    status, answer = address.ask("POST", "/v1/completions", orjson.dumps(body), timeout_s=_COMPLETION_S)
    if status != HTTPStatus.OK:
        raise ServerStartFailed(
            f"a completion was required of the server, found HTTP {status}: {error_message(answer)}\n"
            f"  where: POST {endpoint.url}/v1/completions, model {endpoint.model}\n"
            "  look at its log where it runs"
        )
    try:
        document = orjson.loads(answer)
    except ValueError:
        document = None
    if isinstance(document, dict):
        return str(document.get("system_fingerprint"))
    return answer[:80].decode("utf-8", "replace")


def process_start(endpoint: Endpoint, *, connections: int = _CONNECTIONS) -> float | None:
    """Return when the process behind an address started, seconds since the epoch on its clock.

    :param connections: new ones, each with a question: of several servers behind one address they reach different
        ones, mostly.
    :returns: ``None`` where it does not tell (several API servers of one vLLM, or no counters to be had).
    :raises MeasurementError: no answer. :raises ServerStartFailed: several processes answer.
    """
    address = locate(endpoint, _ANSWER_S)
    starts = {_start_told(endpoint.url, *address.ask("GET", "/metrics")) for _ in range(connections)}
    if len(starts) > 1:
        told = ", ".join(sorted("unknown" if start is None else utc_text(start) for start in starts))
        raise ServerStartFailed(
            f"one server was required, found {len(starts)} behind one address: started {told}\n"
            f"  where: {endpoint.url}/metrics, asked on {connections} connections\n"
            "  give the address of one of them, such as that of a pod: what is proved of one is not proved of all"
        )
    return starts.pop()


def _start_told(url: str, status: int, body: bytes) -> float | None:
    if status != HTTPStatus.OK:
        return None
    try:
        engines = parse_metrics(body.decode("utf-8", "replace"), url)
    except MeasurementError:
        return None
    return next((engine.process_start_s for engine in engines.values()), None)


def server_info(endpoint: Endpoint) -> ServerInfo | None:
    """Return what the server tells of its configuration; ``None`` where it does not, as in production.

    :raises MeasurementError: no answer.
    """
    status, body = locate(endpoint, _ANSWER_S).ask("GET", SERVER_INFO_PATH, timeout_s=_COMPLETION_S)
    if status != HTTPStatus.OK:
        return None
    try:
        return parse_server_info(orjson.loads(body))
    except ValueError:
        return None
