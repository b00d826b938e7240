"""Starts vLLM's API server as a process of ours, proves that it is the layout that was asked for, and ends it.

The server is started as ``python -m vllm.entrypoints.openai.api_server`` (the ``vllm`` command of the CPU build looks
for package metadata that is not there), below a keeper process (:mod:`~pytest_gpulayout.adapters.keeper`).
Ready means: the process lives, ``/health`` answers 200, a completion comes back whose ``system_fingerprint`` names
the layout, and the process table shows every rank. ``/health`` alone proves nothing: it is 200 while an engine hangs.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from pytest_gpulayout.adapters import dev_guard
from pytest_gpulayout.adapters import keeper as keeper_script
from pytest_gpulayout.adapters.cpu_host import BIND_VARIABLE, binding_of
from pytest_gpulayout.adapters.device_lock import DeviceLocks
from pytest_gpulayout.adapters.http_session import open_session
from pytest_gpulayout.adapters.nccl_capture import NCCL_SUBSYSTEMS, NcclCapture
from pytest_gpulayout.adapters.numa_binding import Binding, bind_server
from pytest_gpulayout.adapters.surroundings import read_surroundings
from pytest_gpulayout.errors import ServerError, ServerExited, ServerStartFailed, ServerStartTimeout
from pytest_gpulayout.fingerprint import parse_fingerprint
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.occupancy import Occupancy, OccupancyReport, await_idle_devices, judge_occupancy
from pytest_gpulayout.ports import Endpoint, GpuProcessSource, Progress, ServerProof, ServerSpec
from pytest_gpulayout.surroundings import Surroundings
from pytest_gpulayout.vllm_log import error_cause

TERM_TIMEOUT_S = 20.0
_KEEPER_GRACE_S = 15.0
_POLL_S = 0.25
_DYING_S = 5.0
_TAIL_LINES = 8
_REQUEST_TIMEOUT_S = 60.0
_LONGEST_SOCKET_FOLDER = 60  # vLLM makes Unix sockets named by a UUID in it, and sun_path holds 107 characters
_WORKER_TITLE = re.compile(r"VLLM::Worker(?P<coordinates>(?:_[A-Z]+\d+)*)")
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
_NUMA_OPTION = "--numa-bind"
_TIMINGS_OPTION = "--enable-per-request-metrics"
_MIDDLEWARE_OPTION = "--middleware"
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
        options = require_vllm(spec.python)
        binding = bind_server(spec, has_flag=_NUMA_OPTION in options)
        self._started += 1
        log_dir = self._log_dir / f"server-{self._started}-{spec.layout}"
        log_dir.mkdir(parents=True)
        with ExitStack() as undo:
            locks = DeviceLocks(_lock_names(spec), f"pytest, layout {spec.layout}", progress)
            undo.callback(locks.release)
            watch = self._await_idle(spec, progress)
            server = VllmServer(spec, log_dir, locks, binding, watch, options=options)
            undo.pop_all()  # the server frees them when it has ended
            undo.callback(server.stop)
            server.start(progress)
            undo.pop_all()
        return server

    def _await_idle(self, spec: ServerSpec, progress: Progress) -> _GpuWatch | None:
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
        return _GpuWatch(self._processes, before)


@dataclass(frozen=True, slots=True)
class _GpuWatch:
    """:param before: who was on the GPUs before the server started."""

    source: GpuProcessSource
    before: Occupancy


class VllmServer:
    """One vLLM server: its process tree, its address, its logs.

    :param options: those of :func:`require_vllm` that its vLLM has.
    :ivar binding: the CPUs and NUMA nodes that it is bound to, or why not, in words.
    """

    def __init__(
        self,
        spec: ServerSpec,
        log_dir: Path,
        locks: DeviceLocks,
        binding: Binding,
        watch: _GpuWatch | None = None,
        *,
        options: Collection[str] = (),
    ) -> None:
        self.spec = spec
        self._watch = watch
        self.binding = binding.words
        self._cpus = sorted(binding.cpus or ())
        self.log = log_dir / "server.log"
        self._nccl_dir = log_dir / "nccl"
        self._locks = locks
        self.endpoint = Endpoint(f"http://127.0.0.1:{_free_port()}", spec.model, secrets.token_urlsafe(24))
        guarded = _MIDDLEWARE_OPTION in options and not _serves_in_rust()
        self.command = _command(spec, self.endpoint, binding, _measuring_arguments(spec, options, guarded=guarded))
        self._keeper: subprocess.Popen[str] | None = None
        self._messages: dict[str, object] = {}
        self._http = open_session(lambda: self.endpoint)
        self._run_dir = Path(tempfile.mkdtemp(prefix="gpulayout-", dir=_short_temporary_folder()))
        guard = _install_guard(self._run_dir) if guarded else None
        environment = server_environment(spec, self.endpoint, self._run_dir, self._nccl_dir, guard)
        self._environment = environment
        self._nccl = NcclCapture(environment if spec.platform == "cuda" else {}, Path.cwd(), time.time())
        self._seen: set[int] = set()

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self, progress: Progress) -> None:
        """Start the processes and return when the server has proved itself; see :meth:`VllmLauncher.launch`."""
        self._nccl_dir.mkdir(mode=0o700)
        self.log.touch()
        started = time.monotonic()
        self._start_keeper()
        self._wait_for_health(started, progress)
        progress(f"{self.spec.layout}: first completion")
        fingerprint = self._first_completion()
        version = self._prove_layout(fingerprint)
        rank_pids = self._prove_ranks()
        self.proof = ServerProof(version, fingerprint, rank_pids, time.monotonic() - started, self.binding)
        self._tell_keeper("note")

    def _start_keeper(self) -> None:
        config: keeper_script.KeeperConfig = {
            "command": list(self.command),
            "cpus": self._cpus,
            "log": str(self.log),
            "run_dir": str(self._run_dir),
            "locks": self._locks.paths,
            "term_timeout_s": TERM_TIMEOUT_S,
        }
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", str(keeper_script.__file__), json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
            start_new_session=True,  # Ctrl-C in the terminal is for pytest, which then asks the keeper to stop
            pass_fds=self._locks.files,
        )
        assert self._keeper.stdout is not None
        os.set_blocking(self._keeper.stdout.fileno(), False)

    def stop(self) -> None:
        """End the whole process tree, free the locks, remove temporary files; may be called again.

        :raises ServerError: it cannot be ended; the locks stay, since its devices are not free.
        """
        if self._keeper is not None:
            self._tell_keeper("stop")
            try:
                self._keeper.communicate(timeout=TERM_TIMEOUT_S + _KEEPER_GRACE_S)
            except subprocess.TimeoutExpired as error:
                raise self._still_running() from error
            self._keeper = None
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
        return {process.pid: _title(process) for process in self._processes()}

    def gpu_processes(self) -> OccupancyReport | None:
        """Return on which GPUs its processes compute now; ``None`` where nobody was asked before the start."""
        if self._watch is None:
            return None
        source, earlier = self._watch.source, self.pids()
        now = source.snapshot()
        pids = {**earlier, **self.pids()}  # what has ended or begun meanwhile is the server's as well
        titles = {pid: title.partition(" --")[0] for pid, title in pids.items()}
        ranks = self.proof.rank_pids
        return judge_occupancy(self._watch.before, now, self.spec.devices, ranks, titles, source.describe)

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

    def _first_completion(self) -> str:
        """Return the ``system_fingerprint`` of a short completion; an engine that cannot compute dies here."""
        body = {"model": self.spec.model, "prompt": "Hello", "max_tokens": 2, "temperature": 0}
        timeout = min(_REQUEST_TIMEOUT_S, self.spec.start_timeout_s)
        try:
            response = self._http.post("/v1/completions", json=body, timeout=timeout)
        except requests.RequestException as error:
            raise self._died_at_first_request(f"no answer ({type(error).__name__})") from error
        if response.status_code != 200:
            raise self._died_at_first_request(f"HTTP {response.status_code} {response.text[:300]}")
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

    def _prove_ranks(self) -> Mapping[int, int]:
        found = rank_pids(self.spec.layout, {process.pid: _title(process) for process in self._processes()})
        missing = sorted(set(range(self.spec.layout.ranks)) - set(found))
        if missing:
            titles = ", ".join(sorted(title for title in self.pids().values() if "VLLM::" in title)) or "no VLLM::..."
            raise ServerStartFailed(
                f"layout {self.spec.layout} needs {self.spec.layout.ranks} worker processes, "
                f"found none for rank {', '.join(map(str, missing))}\n  process table of the server: {titles}\n"
                f"  read its log: less {self.log}\n"
                f"  vLLM names its processes with setproctitle: {self.spec.python} -m pip install setproctitle",
                command=self.command,
            )
        return found

    # -- the process tree ------------------------------------------------------------------------------------------

    def _processes(self) -> Iterator[psutil.Process]:
        if self._keeper is None:
            return
        try:
            processes = psutil.Process(self._keeper.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        self._seen.update(process.pid for process in processes)
        yield from processes

    def _exit_code(self) -> int | None:
        """The server's exit code, ``None`` while it runs; a keeper that died counts as a server that was killed."""
        keeper = self._keeper
        if keeper is not None and keeper.stdout is not None:
            while line := keeper.stdout.readline():
                self._messages.update(json.loads(line))
            if "exited" not in self._messages and keeper.poll() is not None:
                self._messages["exited"] = keeper.returncode
        code = self._messages.get("exited")
        return code if isinstance(code, int) else None

    def _tell_keeper(self, command: str) -> None:
        assert self._keeper is not None
        assert self._keeper.stdin is not None
        if self._keeper.stdin.closed:  # which tells it to stop, too
            return
        try:
            self._keeper.stdin.write(command + "\n")
            self._keeper.stdin.flush()
        except BrokenPipeError:
            pass  # it has already ended everything and gone

    def _still_running(self) -> ServerError:
        pids = " ".join(str(process.pid) for process in self._processes())
        limit = f"{TERM_TIMEOUT_S + _KEEPER_GRACE_S:.0f} s"
        return ServerError(
            f"the server of layout {self.spec.layout} must be gone {limit} after it was asked to end, and is not\n"
            f"  its processes: {pids or 'only its keeper'}\n"
            f"  end them: kill -9 {pids} {self._keeper.pid if self._keeper else ''}".rstrip(),
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
        ending = "" if code is None else f" ({_describe_exit(code)})"
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
    command = [python, "-c", _FIND_VLLM, _NUMA_OPTION, _TIMINGS_OPTION, _MIDDLEWARE_OPTION]
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


def rank_pids(layout: Layout, titles: Mapping[int, str]) -> dict[int, int]:
    """Find the process of each rank by the titles that vLLM gives its workers.

    ``VLLM::Worker_DP0_PP1_TP0_EP0`` (``vllm/v1/executor/multiproc_executor.py``); sizes of 1 are left out. A server
    with one rank has ``VLLM::Worker``, or computes in ``VLLM::EngineCore`` itself.

    With several ranks a worker without coordinates is one that has not got its title yet.

    :param titles: process id -> title. :returns: rank -> process id, for the ranks that were found.
    """
    found: dict[int, int] = {}
    for pid, title in titles.items():
        match = _WORKER_TITLE.match(title)
        if match and (match["coordinates"] or layout.ranks == 1):
            at = dict(re.findall(r"_([A-Z]+)(\d+)", match["coordinates"]))
            dp, pp, pcp, tp = (int(at.get(name, 0)) for name in ("DP", "PP", "PCP", "TP"))
            found[((dp * layout.pp + pp) * layout.pcp + pcp) * layout.tp + tp] = pid
    if layout.ranks == 1 and not found:
        found.update((0, pid) for pid, title in titles.items() if title.startswith("VLLM::EngineCore"))
    return found


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


def _lock_names(spec: ServerSpec) -> list[str]:
    """One lock per GPU; all cores together are one device, since ranks, front end and client share them."""
    if spec.platform == "cpu":
        return ["cpu"]
    return [device.uuid or f"gpu-{device.index}" for device in spec.devices]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _short_temporary_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= _LONGEST_SOCKET_FOLDER else "/tmp"


def _inductor_cache() -> str:
    return str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}")


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def _tail(path: Path, lines: int) -> list[str]:
    """The last lines that hold text; reads the end of the file only, since this is asked several times a second."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-lines:]


def _describe_exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
