"""Starts a layout with replicas (``xN``) as N vLLM servers on devices of their own, behind one nginx.

The first replica is started alone: it fills the caches of files and compiled kernels for the others, shows what the
host's memory is needed for, and tells once what is wrong with all of them. The others load side by side where the
memory that is free holds twice what the first has taken for each of them (loading needs more than serving), else
one after the other. All share the locks on the devices of the layout, and one random key.

Leaves one server to :mod:`~pytest_gpulayout.adapters.vllm_process`, the proxy to
:mod:`~pytest_gpulayout.adapters.nginx_proxy`, and which devices are whose to :mod:`~pytest_gpulayout.replicas`.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import requests

from pytest_gpulayout.adapters.cpu_host import parse_cpus
from pytest_gpulayout.adapters.http_session import open_session
from pytest_gpulayout.adapters.nginx_proxy import REPLICA_HEADER, Nginx, NginxProxy, find_nginx
from pytest_gpulayout.adapters.surroundings import read_surroundings
from pytest_gpulayout.adapters.vllm_process import (
    Place,
    VllmLauncher,
    VllmServer,
    free_port,
    prepare_server,
)
from pytest_gpulayout.errors import ServerError, ServerStartFailed
from pytest_gpulayout.occupancy import OccupancyReport
from pytest_gpulayout.ports import Endpoint, Progress, ServerSpec
from pytest_gpulayout.replicas import Value, join_ranks, split_spec
from pytest_gpulayout.surroundings import Surroundings

_LOADING_FACTOR = 2
_TRIES_PER_REPLICA = 4
_REQUEST_TIMEOUT_S = 10.0


class ReplicaLauncher:
    """Launches layouts with replicas, and leaves all others to the launcher of single servers."""

    def __init__(self, launcher: VllmLauncher) -> None:
        self._launcher = launcher

    def launch(self, spec: ServerSpec, progress: Progress) -> VllmServer | ReplicatedServer:
        """Start the servers of a layout and wait until each has proved its part.

        :raises ServerStartFailed: nginx is missing, or a server ended or proved to be something else.
        :raises ServerStartTimeout: too slow. :raises DevicesBusy: others compute on its devices.
        """
        if spec.layout.replicas == 1:
            return self._launcher.launch(spec, progress)
        nginx = find_nginx()
        place = self._launcher.reserve(spec, progress)
        server = ReplicatedServer(spec, place, nginx)
        with ExitStack() as undo:
            undo.callback(server.stop)
            server.start(progress)
            undo.pop_all()
        return server


class ReplicatedServer:
    """Several vLLM servers and the proxy in front of them, as one server.

    :param place: of all of them; its locks are freed when all have ended.
    """

    def __init__(self, spec: ServerSpec, place: Place, nginx: Nginx) -> None:
        self.spec = spec
        self.log = place.folder / "proxy.log"
        self._place = place
        self._nginx = nginx
        self._api_key = secrets.token_urlsafe(24)
        self._replicas: list[VllmServer] = []
        self._proxy: NginxProxy | None = None

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self, progress: Progress) -> None:
        """Start all and return when each has proved its part; see :meth:`ReplicaLauncher.launch`."""
        started = time.monotonic()
        self._start_replicas(progress)
        self._require_equals()
        progress(f"{self.spec.layout}: {self._nginx.version} is starting")
        self._proxy = NginxProxy(
            self._nginx,
            [_address(replica) for replica in self._replicas],
            free_port(),
            log=self.log,
            locks=self._place.locks.lend(),
            where=f"the replicas of layout {self.spec.layout}",
        )
        self.endpoint = Endpoint(self._proxy.url, self.spec.model, self._api_key)
        self.command = self._proxy.command
        self._prove_that_all_are_reached()
        self.proof = replace(
            self._replicas[0].proof,
            rank_pids=self._by_rank([replica.proof.rank_pids for replica in self._replicas]),
            start_s=time.monotonic() - started,
            binding=_joined_words([replica.binding for replica in self._replicas]),
            proxy=f"{self._proxy.version} ({self._proxy.scheduling})",
        )

    def _start_replicas(self, progress: Progress) -> None:
        first, *others = specs = split_spec(self.spec)
        cores = _own_cores(specs)
        free_before = _free_memory()
        self._begin(first, cores[0])
        self._finish(0, progress)
        free = _free_memory()
        side_by_side = max(0, free_before - free) * _LOADING_FACTOR * len(others) <= free
        for number, spec in enumerate(others, 1):
            self._begin(spec, cores[number])
            if not side_by_side:
                self._finish(number, progress)
        if side_by_side:
            for number in range(1, len(self._replicas)):
                self._finish(number, progress)
        self._check_replicas()

    def _begin(self, spec: ServerSpec, cores: Collection[int]) -> None:
        number = len(self._replicas)
        place = self._place
        own = Place(place.folder / f"replica-{number}", place.locks.lend(), place.watch, place.options)
        self._replicas.append(prepare_server(spec, own, api_key=self._api_key, cpus=cores))
        self._replicas[number].begin()

    def _finish(self, number: int, progress: Progress) -> None:
        with self._naming(number):
            self._replicas[number].finish_start(
                lambda text: progress(f"{self.spec.layout}, replica {number}: {text}")
            )

    def _require_equals(self) -> None:
        found = [replica.proof.fingerprint for replica in self._replicas]
        if len(set(found)) > 1:
            listed = "".join(f"\n  replica {number}: {text}" for number, text in enumerate(found))
            raise ServerStartFailed(
                f"equal servers are required as replicas of layout {self.spec.layout}, found different ones by what "
                f"they say of themselves (system_fingerprint){listed}\n"
                "  set nothing that makes them differ: look at VLLM_* in the environment",
                command=self._replicas[0].command,
            )

    def _prove_that_all_are_reached(self) -> None:
        """Ask through the proxy until each replica has answered; among equals nginx takes one after the other."""
        waiting = {_address(replica) for replica in self._replicas}
        answer = "no answer"
        with open_session(lambda: self.endpoint) as session:
            for _ in range(_TRIES_PER_REPLICA * len(self._replicas)):
                try:
                    response = session.get("/v1/models", timeout=_REQUEST_TIMEOUT_S)
                except requests.RequestException as error:
                    answer = type(error).__name__
                    continue
                answer = f"HTTP {response.status_code}"
                if response.ok:
                    waiting.discard(response.headers.get(REPLICA_HEADER, "").rpartition(" ")[2])
                if not waiting:
                    return
        self._check_replicas()
        raise ServerStartFailed(
            f"each replica of layout {self.spec.layout} must be reached through nginx, found no answer of "
            f"{', '.join(sorted(waiting))}\n  where: GET {self.endpoint.url}/v1/models, the last one with {answer}\n"
            f"  read its log: less {self.log}",
            command=self.command,
        )

    def check_alive(self) -> None:
        """Do nothing while all run.

        :raises ServerExited: one is gone; it is named, with the cause from its log.
        """
        self._check_replicas()
        if self._proxy is not None:
            self._proxy.check_alive()

    def _check_replicas(self) -> None:
        for number, replica in enumerate(self._replicas):
            with self._naming(number):
                replica.check_alive()

    def stop(self) -> None:
        """End all side by side, free the locks, remove temporary files; may be called again.

        :raises ServerError: one of them cannot be ended; the locks stay, since its devices are not free.
        """
        running: list[NginxProxy | VllmServer] = [*self._replicas]
        if self._proxy is not None:
            running.insert(0, self._proxy)  # nobody is sent to a replica that ends
        for one in running:
            one.ask_to_end()
        failures: list[ServerError] = []
        for one in running:
            try:
                one.stop()
            except ServerError as error:
                failures.append(error)
        if failures:
            raise failures[0]
        self._place.locks.release()

    @contextmanager
    def _naming(self, number: int) -> Iterator[None]:
        """Let an error say which replica it is of."""
        try:
            yield
        except ServerError as error:
            devices = self._replicas[number].spec.devices
            on = "cores" if self.spec.platform == "cpu" else "GPU"
            where = ", ".join(str(device.cpu_affinity if on == "cores" else device.index) for device in devices)
            raise type(error)(
                f"replica {number} of layout {self.spec.layout} ({on} {where}): {error}",
                command=error.command,
                exit_code=error.exit_code,
                log_tail=error.log_tail,
            ) from error

    # -- evidence --------------------------------------------------------------------------------------------------

    def parts(self) -> Sequence[VllmServer]:
        """Return the replicas, in the order of their ranks."""
        return tuple(self._replicas)

    def nccl_logs(self) -> Sequence[Path]:
        """Return NCCL's files of all replicas, sorted by name."""
        return sorted({path for replica in self._replicas for path in replica.nccl_logs()})

    def nccl_log_obstacle(self) -> str | None:
        """Return why NCCL's files may show no channel; the environment of all replicas is the same."""
        return self._replicas[0].nccl_log_obstacle()

    def surroundings(self) -> Surroundings:
        """Return what surrounds the processes of all ranks now."""
        return read_surroundings(self.proof.rank_pids)

    def mapped_segments(self) -> Mapping[int, Collection[str]]:
        """Return the segments under /dev/shm that each rank has mapped now."""
        return self._by_rank([replica.mapped_segments() for replica in self._replicas])

    def pids(self) -> Mapping[int, str]:
        """Return the processes of all replicas now, pid -> title."""
        return {pid: title for replica in self._replicas for pid, title in replica.pids().items()}

    def gpu_processes(self) -> OccupancyReport | None:
        """Return on which GPUs the processes of all replicas compute now; ``None`` where nobody was asked before."""
        if self._place.watch is None:
            return None
        return self._place.watch.report(self.spec.devices, self.proof.rank_pids, self.pids)

    def _by_rank(self, of_replicas: Sequence[Mapping[int, Value]]) -> dict[int, Value]:
        return join_ranks(of_replicas, self.spec.layout.ranks)


def _address(replica: VllmServer) -> str:
    return replica.endpoint.url.removeprefix("http://")


def _own_cores(specs: Sequence[ServerSpec]) -> list[frozenset[int]]:
    """Cores that all processes of each replica are kept on; none where the platform is another, or cores are shared.

    vLLM's CPU backend binds the threads of its ranks, and leaves its front end and engine core to the system: with
    those on the cores of another replica, the one that has more to do takes the time of the other.
    """
    allowed = os.sched_getaffinity(0)
    cores = []
    for spec in specs:
        texts = [device.cpu_affinity or "" for device in spec.devices] if spec.platform == "cpu" else []
        cores.append(frozenset(allowed.intersection(parse_cpus(",".join(texts)))))
    are_shared = len(set[int]().union(*cores)) < sum(map(len, cores))
    return [frozenset[int]()] * len(cores) if are_shared else cores


def _joined_words(words: Sequence[str]) -> str:
    """What each replica is bound to, by number; nothing where none says anything."""
    return "; ".join(f"replica {number}: {text}" for number, text in enumerate(words)) if any(words) else ""


def _free_memory() -> int:
    """Bytes of this host that can be had without swapping."""
    return int(psutil.virtual_memory().available)
