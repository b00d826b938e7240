"""Starts vLLM's API server as a process of ours, proves that it is the layout that was asked for, and ends it.

The server is started as ``python -m vllm.entrypoints.openai.api_server`` (the ``vllm`` command of the CPU build looks
for package metadata that is not there), below a keeper process (:mod:`~pytest_gpulayout.adapters.keeper`).
Ready means: the process lives, ``/health`` answers 200, a completion comes back whose ``system_fingerprint`` names
the layout, and the process table shows every rank. ``/health`` alone proves nothing: it is 200 while an engine hangs.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import requests

from pytest_gpulayout.adapters import dev_guard
from pytest_gpulayout.adapters import keeper as keeper_script
from pytest_gpulayout.adapters.cpu_host import BIND_VARIABLE, binding_of, format_cpus
from pytest_gpulayout.adapters.device_lock import DeviceLocks, LentLocks, lock_names
from pytest_gpulayout.adapters.http_session import open_session
from pytest_gpulayout.adapters.kept_process import KeptProcess, describe_exit
from pytest_gpulayout.adapters.nccl_capture import NCCL_SUBSYSTEMS, NcclCapture
from pytest_gpulayout.adapters.numa_binding import Binding, bind_server
from pytest_gpulayout.adapters.process_table import parents_of, title_of
from pytest_gpulayout.adapters.surroundings import read_surroundings
from pytest_gpulayout.errors import ServerError, ServerExited, ServerStartFailed, ServerStartTimeout
from pytest_gpulayout.fingerprint import parse_fingerprint
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.occupancy import Occupancy, OccupancyReport, await_idle_devices, judge_occupancy
from pytest_gpulayout.ports import Endpoint, GpuProcessSource, Progress, ServerProof, ServerSpec
from pytest_gpulayout.process_titles import api_servers, has_joined_engines, rank_pids
from pytest_gpulayout.server_info import SERVER_INFO_PATH, ServerInfo, parse_server_info
from pytest_gpulayout.surroundings import Surroundings
from pytest_gpulayout.topology import Device
from pytest_gpulayout.vllm_log import error_cause

TERM_TIMEOUT_S = 20.0
_KEEPER_GRACE_S = 15.0
_POLL_S = 0.25
_DYING_S = 5.0
_TAIL_LINES = 8
_REQUEST_TIMEOUT_S = 60.0
_LONGEST_SOCKET_FOLDER = 60  # vLLM makes Unix sockets named by a UUID in it, and sun_path holds 107 characters
_LOG_PREFIX = re.compile(r"^\((?P<who>\w+)[^)]*\) [A-Z]+ \d\d-\d\d [\d:]+ \[[^]]*\] ")
_FIND_VLLM = """
import importlib.util, pathlib, sys
spec = importlib.util.find_spec("vllm")
if spec is None:
    sys.exit(1)
for folder in map(pathlib.Path, spec.submodule_search_locations or ()):
    for file in (*folder.glob("engine/arg_utils.py"), *folder.glob("entrypoints/**/cli_args.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        for option in sys.argv[1:]:
            field = "\\n    " + option[2:].replace("-", "_") + ": "
            if '"' + option + '"' in text or field in text:
                print(option)
"""
NUMA_OPTION = "--numa-bind"
_TIMINGS_OPTION = "--enable-per-request-metrics"
_MIDDLEWARE_OPTION = "--middleware"
_ENGINE_HEADER = "X-data-parallel-rank"  # vllm/entrypoints/generate/base/serving.py, _get_data_parallel_rank
_WITHOUT_TIMINGS = frozenset({"--disable-log-stats", "--config"})  # vLLM refuses both, and a file may say so, too
_KEEP_ALIVE_S = 120
_GUARD_MODULE = "gpulayout_dev_guard"


class VllmLauncher:
    """Launches servers on this machine.

    :param log_dir: an existing folder; every server gets its own folder for its logs there.
    :param processes: lists who computes on the GPUs; without it nothing is known of that.
    :param wait_s: how long to wait for others to leave the devices. :param clock: in seconds, monotonic.
    """

    def __init__(
        self,
        log_dir: Path,
        processes: GpuProcessSource | None = None,
        *,
        wait_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._log_dir = log_dir
        self._processes = processes
        self._wait_s = wait_s
        self._clock = clock
        self._sleep = sleep
        self._started = 0

    def launch(self, spec: ServerSpec, progress: Progress) -> VllmServer:
        """Start a server and wait until it has proved its layout.

        :raises ServerStartFailed: it ended, or proved to be something else. :raises ServerStartTimeout: too slow.
        :raises DevicesBusy: others compute on its devices.
        """
        place = self.reserve(spec, progress)
        with ExitStack() as undo:
            undo.callback(place.locks.release)
            server = prepare_server(spec, place)
            undo.pop_all()  # the server frees them when it has ended
            undo.callback(server.stop)
            server.start(progress)
            undo.pop_all()
        return server

    def reserve(self, spec: ServerSpec, progress: Progress) -> Place:
        """Return where a server may be started, once its devices are ours and nobody else computes on them.

        :raises ServerStartFailed: no vLLM. :raises DevicesBusy: others compute on its devices.
        """
        options = require_vllm(spec.python)
        self._started += 1
        folder = self._log_dir / f"server-{self._started}-{spec.layout}"
        with ExitStack() as undo:
            locks = DeviceLocks(lock_names(spec.platform, spec.devices), f"pytest, layout {spec.layout}", progress)
            undo.callback(locks.release)
            watch = self._await_idle(spec, progress)
            undo.pop_all()
        return Place(folder, locks, watch, options)

    def _await_idle(self, spec: ServerSpec, progress: Progress) -> GpuWatch | None:
        """Wait until nobody else computes on the GPUs; the locks keep out only those who take them, too."""
        if self._processes is None or spec.platform == "cpu":
            return None
        before = await_idle_devices(
            self._processes,
            spec.layout,
            spec.devices,
            wait_s=self._wait_s,
            clock=self._clock,
            sleep=self._sleep,
            progress=progress,
        )
        return GpuWatch(self._processes, before)


@dataclass(frozen=True, slots=True)
class GpuWatch:
    """:param before: who was on the GPUs before the server started."""

    source: GpuProcessSource
    before: Occupancy

    def report(
        self, devices: Sequence[Device], rank_pids: Mapping[int, int], pids: Callable[[], Mapping[int, str]]
    ) -> OccupancyReport:
        """Return on which GPUs the processes of a server compute now.

        :param devices: (n_ranks,), in rank order. :param pids: lists all of its processes, pid -> title.
        """
        earlier = pids()
        now = self.source.snapshot()
        every = {**earlier, **pids()}  # what has ended or begun meanwhile is the server's as well
        titles = {pid: title.partition(" --")[0] for pid, title in every.items()}
        return judge_occupancy(self.before, now, devices, rank_pids, titles, self.source.describe)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server may be started.

    :param folder: for its logs, which is made for it. :param locks: on its devices.
    :param watch: on its GPUs, ``None`` where nobody lists who computes on them.
    :param options: those of :func:`require_vllm` that its vLLM has.
    """

    folder: Path
    locks: DeviceLocks | LentLocks
    watch: GpuWatch | None
    options: frozenset[str]


def prepare_server(
    spec: ServerSpec, place: Place, *, api_key: str | None = None, cpus: Collection[int] = ()
) -> VllmServer:
    """Return a server that can be started; it frees the locks of its place when it is stopped.

    :param api_key: ``None`` for a key of its own.
    :param cpus: that all of its processes are kept on; empty for those that are near its devices.
    """
    binding = bind_server(spec, has_flag=NUMA_OPTION in place.options)
    if cpus:
        binding = replace(binding, cpus=frozenset(cpus), words=f"all processes on cores {format_cpus(sorted(cpus))}")
    place.folder.mkdir(parents=True)
    return VllmServer(spec, place.folder, place.locks, binding, place.watch, options=place.options, api_key=api_key)


class VllmServer:
    """One vLLM server: its process tree, its address, its logs.

    :param options: those of :func:`require_vllm` that its vLLM has.
    :param api_key: what its requests must carry, ``None`` for a key of its own.
    :param run_in: where its temporary folder is made, ``None`` for the usual place.
    :ivar binding: the CPUs and NUMA nodes that it is bound to, or why not, in words.
    """

    def __init__(
        self,
        spec: ServerSpec,
        log_dir: Path,
        locks: DeviceLocks | LentLocks,
        binding: Binding,
        watch: GpuWatch | None = None,
        *,
        options: Collection[str] = (),
        api_key: str | None = None,
        run_in: Path | None = None,
    ) -> None:
        self.spec = spec
        self._watch = watch
        self.binding = binding.words
        self._cpus = sorted(binding.cpus or ())
        self.log = log_dir / "server.log"
        self._nccl_dir = log_dir / "nccl"
        self._locks = locks
        self.endpoint = Endpoint(f"http://127.0.0.1:{free_port()}", spec.model, api_key or secrets.token_urlsafe(24))
        guarded = _MIDDLEWARE_OPTION in options and not _serves_in_rust()
        self.command = _command(spec, self.endpoint, binding, _measuring_arguments(spec, options, guarded=guarded))
        self._kept: KeptProcess | None = None
        self._started_s = 0.0
        self._http = open_session(lambda: self.endpoint)
        self._run_dir = Path(tempfile.mkdtemp(prefix="gpulayout-", dir=_short(run_in or tempfile.gettempdir())))
        guard = _install_guard(self._run_dir) if guarded else None
        environment = server_environment(spec, self.endpoint, self._run_dir, self._nccl_dir, guard)
        self._environment = environment
        self._nccl = NcclCapture(environment if spec.platform == "cuda" else {}, Path.cwd(), time.time())
        self._seen: set[int] = set()

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self, progress: Progress) -> None:
        """Start the processes and return when the server has proved itself; see :meth:`VllmLauncher.launch`."""
        self.begin()
        self.finish_start(progress)

    def begin(self) -> None:
        """Start the processes, and return while they load."""
        self._nccl_dir.mkdir(mode=0o700)
        self.log.touch()
        self._started_s = time.monotonic()
        self._kept = KeptProcess(
            self.command,
            self._environment,
            log=self.log,
            run_dir=self._run_dir,
            locks=self._locks,
            cpus=self._cpus,
            term_timeout_s=TERM_TIMEOUT_S,
        )

    def finish_start(self, progress: Progress) -> None:
        """Return when the server that was begun has proved itself; see :meth:`VllmLauncher.launch`."""
        self._wait_for_health(self._started_s, progress)
        progress(f"{self.spec.layout}: first completion")
        fingerprint = self._first_completions()
        start_s = time.monotonic() - self._started_s
        version = self._prove_layout(fingerprint)
        info = self._prove_configuration()
        ranks, titles = self._prove_ranks()
        self.proof = ServerProof(
            version,
            fingerprint,
            ranks,
            start_s,
            self.binding,
            moe=has_joined_engines(titles),
            info=info,
            api_servers=api_servers(titles),
        )
        self.note_segments()

    def note_segments(self) -> None:
        """Let the keeper remember the shared memory that is mapped now."""
        if self._kept is not None:
            self._kept.note_segments()

    def ask_to_end(self) -> None:
        """Begin to end it, so that several servers can end side by side; :meth:`stop` waits."""
        if self._kept is not None:
            self._kept.ask_to_end()

    def stop(self) -> None:
        """End the whole process tree, free the locks, remove temporary files; may be called again.

        :raises ServerError: it cannot be ended; the locks stay, since its devices are not free.
        """
        if self._kept is not None:
            try:
                self._kept.end(TERM_TIMEOUT_S + _KEEPER_GRACE_S)
            except subprocess.TimeoutExpired as error:
                raise self._still_running(self._kept) from error
        self._http.close()
        shutil.rmtree(self._run_dir, ignore_errors=True)  # the keeper did, unless it never started
        self._locks.release()

    def check_alive(self) -> None:
        """Raise :class:`ServerExited` with the cause from the log when the server is gone."""
        if self._exit_code() is not None:
            raise self._error(ServerExited, f"the vLLM server for {self.spec.layout} went away while it was in use")

    # -- evidence --------------------------------------------------------------------------------------------------

    def nccl_logs(self) -> Sequence[Path]:
        """Return NCCL's files of this server's processes, those that have ended included, sorted by name."""
        self.pids()
        return self._nccl.files(self._seen)

    def nccl_log_obstacle(self) -> str | None:
        """Return why NCCL's files may show no channel, as far as the environment tells."""
        return self._nccl.obstacle()

    def surroundings(self) -> Surroundings:
        """Return what surrounds the processes of its ranks now."""
        return read_surroundings(self.proof.rank_pids)

    def mapped_segments(self) -> Mapping[int, Collection[str]]:
        """Return the segments under /dev/shm that each rank has mapped now."""
        return {rank: keeper_script.mapped_segments([pid]) for rank, pid in self.proof.rank_pids.items()}

    def pids(self) -> Mapping[int, str]:
        """Return the server's processes now, pid -> title."""
        return {process.pid: title_of(process) for process in self._processes()}

    def gpu_processes(self) -> OccupancyReport | None:
        """Return on which GPUs its processes compute now; ``None`` where nobody was asked before the start."""
        if self._watch is None:
            return None
        return self._watch.report(self.spec.devices, self.proof.rank_pids, self.pids)

    def parts(self) -> tuple[VllmServer]:
        """Return this server alone."""
        return (self,)

    # -- getting ready ---------------------------------------------------------------------------------------------

    def _wait_for_health(self, started: float, progress: Progress) -> None:
        deadline = started + self.spec.start_timeout_s
        while not self._healthy():
            headline = f"vLLM did not start layout {self.spec.layout}"
            if self._exit_code() is not None:
                raise self._error(ServerStartFailed, headline)
            if time.monotonic() > deadline:
                limit = f"within {self.spec.start_timeout_s:.0f} s (--gpu-start-timeout=SECONDS gives it more)"
                raise self._error(ServerStartTimeout, f"{headline} {limit}")
            elapsed = time.monotonic() - started
            progress(f"{self.spec.layout}: vLLM is loading, {elapsed:.0f} s, {self._last_log_message()}")
            time.sleep(_POLL_S)

    def _healthy(self) -> bool:
        try:
            return self._http.get("/health", timeout=2).status_code == 200
        except requests.RequestException:
            return False

    def _first_completions(self) -> str:
        """Return the ``system_fingerprint`` of a short completion; an engine that cannot compute dies here.

        Every data-parallel engine answers one: the balancing of load would let one that cannot go unseen.
        """
        engines = self.spec.layout.dp
        told = [self._first_completion(engine if engines > 1 else None) for engine in range(engines)]
        return told[0]

    def _first_completion(self, engine: int | None) -> str:
        """Return the fingerprint of one completion.

        :param engine: the data-parallel engine that is to answer; ``None`` where there is one.
        """
        chosen = {} if engine is None else {_ENGINE_HEADER: str(engine)}
        who = "" if engine is None else f"engine {engine}: "
        body = {"model": self.spec.model, "prompt": "Hello", "max_tokens": 2, "temperature": 0}
        timeout = min(_REQUEST_TIMEOUT_S, self.spec.start_timeout_s)
        try:
            response = self._http.post("/v1/completions", json=body, headers=chosen, timeout=timeout)
        except requests.RequestException as error:
            raise self._died_at_first_request(f"{who}no answer ({type(error).__name__})") from error
        if response.status_code != 200:
            raise self._died_at_first_request(f"{who}HTTP {response.status_code} {response.text[:300]}")
        return _system_fingerprint(response)

    def _died_at_first_request(self, answer: str) -> ServerError:
        deadline = time.monotonic() + _DYING_S
        while self._exit_code() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)  # vLLM answers first and writes its traceback then
        headline = f"vLLM loaded layout {self.spec.layout} and then failed at the first request"
        return self._error(ServerStartFailed, headline, otherwise=answer)

    def _prove_layout(self, text: str) -> str:
        fingerprint = parse_fingerprint(text)
        if fingerprint is None:
            raise ServerStartFailed(
                f"the server does not say which layout it runs: system_fingerprint is {text!r}, "
                f"vllm-<version>-{self.spec.layout}-<hash> was expected\n"
                f"  where: POST {self.endpoint.url}/v1/completions\n"
                f"  vLLM >= 0.26 says it unless its fingerprint mode was changed: remove that argument",
                command=self.command,
            )
        if contradiction := fingerprint.contradiction(self.spec.layout):
            raise ServerStartFailed(
                f"the server is not the layout that was asked for: {contradiction} ({text})\n"
                f"  where: system_fingerprint of POST {self.endpoint.url}/v1/completions\n"
                "  leave it to --gpu-layout: take sizes such as --tensor-parallel-size out of the server's arguments",
                command=self.command,
            )
        return fingerprint.version

    def _prove_configuration(self) -> ServerInfo | None:
        """Check what the server tells of its factors, where the layout has more than one; ``None`` if it does not."""
        layout = self.spec.layout
        if layout == Layout(tp=layout.tp, replicas=layout.replicas, nodes=layout.nodes):
            return None  # its fingerprint has told all
        info = self._server_info()
        if info is not None and (contradiction := info.contradiction(layout)):
            raise ServerStartFailed(
                f"the server is not the layout that was asked for: {contradiction}\n"
                f"  where: GET {self.endpoint.url}{SERVER_INFO_PATH}\n"
                "  leave it to --gpu-layout: take what changes its factors out of the server's arguments",
                command=self.command,
            )
        return info

    def _server_info(self) -> ServerInfo | None:
        try:
            response = self._http.get(SERVER_INFO_PATH, timeout=_REQUEST_TIMEOUT_S)
            return parse_server_info(response.json()) if response.status_code == 200 else None
        except requests.RequestException:  # also an answer that is no JSON
            return None

    def _prove_ranks(self) -> tuple[Mapping[int, int], Collection[str]]:
        """Return the process of each rank, and the titles of all processes."""
        processes = list(self._processes())
        titles = {process.pid: title_of(process) for process in processes}
        found = rank_pids(self.spec.layout, titles, parents_of(processes))
        missing = sorted(set(range(self.spec.layout.ranks)) - set(found))
        if missing:
            table = ", ".join(sorted(title for title in titles.values() if "VLLM::" in title)) or "no VLLM::..."
            raise ServerStartFailed(
                f"layout {self.spec.layout} needs {self.spec.layout.ranks} worker processes, "
                f"found none for rank {', '.join(map(str, missing))}\n  process table of the server: {table}\n"
                f"  read its log: less {self.log}\n"
                f"  vLLM names its processes with setproctitle: {self.spec.python} -m pip install setproctitle",
                command=self.command,
            )
        return found, titles.values()

    # -- the process tree ------------------------------------------------------------------------------------------

    def _processes(self) -> Iterator[psutil.Process]:
        processes = [] if self._kept is None else self._kept.processes()
        self._seen.update(process.pid for process in processes)
        yield from processes

    def _exit_code(self) -> int | None:
        """The server's exit code, ``None`` while it runs, and before it was started."""
        return None if self._kept is None else self._kept.exit_code

    def _still_running(self, kept: KeptProcess) -> ServerError:
        pids = " ".join(str(process.pid) for process in self._processes())
        limit = f"{TERM_TIMEOUT_S + _KEEPER_GRACE_S:.0f} s"
        return ServerError(
            f"the server of layout {self.spec.layout} must be gone {limit} after it was asked to end, and is not\n"
            f"  its processes: {pids or 'only its keeper'}\n"
            f"  end them: kill -9 {pids} {kept.keeper_pid}",
            command=self.command,
        )

    # -- messages --------------------------------------------------------------------------------------------------

    def _last_log_message(self) -> str:
        lines = _tail(self.log, 4)
        return _LOG_PREFIX.sub("", lines[-1]).strip()[:60] if lines else "no output yet"

    def _error(self, kind: type[ServerError], headline: str, otherwise: str = "") -> ServerError:
        """Build the one message a user gets: what was required, the cause from the log, where, what to do next.

        :param otherwise: the cause to give when the log has none.
        """
        code = self._exit_code()
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = [line for line in lines if line.strip()][-_TAIL_LINES:]
        cause = error_cause(lines) or otherwise or "the log does not say"
        ending = "" if code is None else f" ({describe_exit(code)})"
        message = "\n".join(
            [
                f"{headline}{ending}",
                f"  cause: {cause}",
                f"  command: {' '.join(self.command)}",
                f"  log: {self.log}, its last lines:",
                *(f"    {line[:200]}" for line in tail),
                f"  read it: less {self.log}",
            ]
        )
        return kind(message, command=self.command, exit_code=code, log_tail=tail)


def require_vllm(python: str) -> frozenset[str]:
    """Check that the interpreter has vLLM, and look up in its source which options its server has.

    :returns: those of ``--numa-bind``, ``--enable-per-request-metrics`` and ``--middleware``. vLLM 0.32 declares them
        in ``vllm/engine/arg_utils.py`` and as fields in ``vllm/entrypoints/launchers/cli_args.py``, a file that has
        moved before; importing it would take longer than all the rest.
    :raises ServerStartFailed: it has not, with the command that installs it; or it cannot be run.
    """
    command = [python, "-c", _FIND_VLLM, NUMA_OPTION, _TIMINGS_OPTION, _MIDDLEWARE_OPTION]
    try:
        done = subprocess.run(command, check=False, timeout=60, stdout=subprocess.PIPE, text=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerStartFailed(
            f"a Python that has vLLM is required to serve the model, and it cannot be run: {error}\n"
            f"  in {python}\n  check that it is there and starts: {python} --version"
        ) from error
    if done.returncode != 0:
        raise ServerStartFailed(
            "vLLM is required to serve the model, and is not installed\n"
            f"  in {python}\n"
            "  with NVIDIA GPUs: pip install 'pytest-gpulayout[vllm]'; "
            "without: pip install 'pytest-gpulayout[cpu]', and --gpu-platform=cpu"
        )
    return frozenset(done.stdout.split())


def server_environment(
    spec: ServerSpec, endpoint: Endpoint, run_dir: Path, nccl_dir: Path, guard: Path | None = None
) -> dict[str, str]:
    """Return the environment of a server: ours on top of the caller's, the caller's own choices kept.

    Whatever the caller has set for ``NCCL_DEBUG*`` or the CPU binding stays as it is. By default NCCL's channel lines
    go to a file per process in a folder of ours: in the server's log, text of a request could stand for them.
    Connections are kept for longer than a client pauses between two batches (vLLM: 5 s).

    :param guard: folder of the module that guards development endpoints, which are not offered without it.
    """
    environment = dict(os.environ)
    environment |= {
        "VLLM_API_KEY": endpoint.api_key or "",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_COLOR": "0",
        "NO_COLOR": "1",
        "TMPDIR": str(run_dir),
    }
    defaults = {"TORCHINDUCTOR_CACHE_DIR": _inductor_cache()}  # torch would look for it below TMPDIR
    defaults["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = str(_KEEP_ALIVE_S)
    if guard is not None:
        defaults["VLLM_SERVER_DEV_MODE"] = "1"
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(guard), environment.get("PYTHONPATH")]))
    if Path(spec.model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    if spec.platform == "cpu":
        environment["VLLM_TARGET_DEVICE"] = "cpu"
        defaults |= {"VLLM_CPU_KVCACHE_SPACE": "1", BIND_VARIABLE: binding_of(spec.devices)}
        if "|" in environment.get(BIND_VARIABLE, ""):  # the caller's lists, of which these ranks may have some only
            environment[BIND_VARIABLE] = binding_of(spec.devices)
    else:
        environment |= {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": ",".join(device.uuid or str(device.index) for device in spec.devices),
        }
        defaults |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": NCCL_SUBSYSTEMS}
        defaults |= {"NCCL_DEBUG_FILE": str(nccl_dir / "nccl.%h.%p.log")}
    # The caller's variables stay first: setproctitle finds a process's title by walking back from the first variable,
    # and gives up when that one was set again, as torch does with TORCHINDUCTOR_CACHE_DIR. No title, no rank proved.
    return environment | {name: value for name, value in defaults.items() if name not in environment}


def _system_fingerprint(response: requests.Response) -> str:
    """What the answer says, also when it is no vLLM that answers."""
    try:
        document = response.json()
    except requests.JSONDecodeError:
        document = None
    return str(document.get("system_fingerprint")) if isinstance(document, dict) else response.text[:80]


def _serves_in_rust() -> bool:
    """Whether the caller chose vLLM's other front end, which takes no Python middleware."""
    return os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0")


def _install_guard(run_dir: Path) -> Path:
    """Copy the guard to where the server's Python can import it and nothing else of ours; return the folder."""
    folder = run_dir / "guard"
    folder.mkdir()
    shutil.copyfile(dev_guard.__file__, folder / f"{_GUARD_MODULE}.py")
    return folder


def _measuring_arguments(spec: ServerSpec, options: Collection[str], *, guarded: bool) -> list[str]:
    """What lets a measurement see more, where this vLLM has it; the user's own arguments come later and win."""
    given = {argument.partition("=")[0].replace("_", "-") for argument in spec.arguments}
    arguments = [_TIMINGS_OPTION] if _TIMINGS_OPTION in options and not given & _WITHOUT_TIMINGS else []
    return arguments + ([_MIDDLEWARE_OPTION, f"{_GUARD_MODULE}.KeyGuard"] if guarded else [])


def _command(spec: ServerSpec, endpoint: Endpoint, binding: Binding, measuring: Sequence[str]) -> list[str]:
    port = endpoint.url.rpartition(":")[2]
    command = [spec.python, "-m", "vllm.entrypoints.openai.api_server", "--model", spec.model]
    command += ["--host", "127.0.0.1", "--port", port, *spec.layout.engine_arguments(), *binding.arguments]
    return [*command, *measuring, *spec.arguments]


def free_port() -> int:
    """Return a port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _short(folder: Path | str) -> str:
    """This folder, or one whose name leaves room for that of a socket."""
    return str(folder) if len(str(folder)) <= _LONGEST_SOCKET_FOLDER else "/tmp"


def _inductor_cache() -> str:
    return str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}")


def _tail(path: Path, lines: int) -> list[str]:
    """The last lines that hold text; reads the end of the file only, since this is asked several times a second."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-lines:]
