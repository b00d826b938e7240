"""A real Ray cluster on this host: one node per loopback address, each below a keeper of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from pytest_gpulayout.adapters.device_lock import LentLocks
from pytest_gpulayout.adapters.kept_process import KeptProcess
from pytest_gpulayout.adapters.ray_nodes import RayNodes
from pytest_gpulayout.errors import NodeError
from tests.support.processes import ROOT, wait_until

ADDRESSES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
"""Of nodes; Ray puts the address that leads to the internet in place of 127.0.0.1."""

GPUS = 2
"""That each node says it has; Ray believes it."""

NEEDS_RAY = [
    pytest.mark.end_to_end,
    pytest.mark.xdist_group("real ray"),
    pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'pytest-gpulayout[ray]'"),
]

_OURS = ("pytest_gpulayout", "gpulayout-node-", "gpulayout-nccl-", "keeper.py")
_START_S = 120.0
# Without it Ray 2.60 writes a token below the user's home, and asks for it from then on.
_AUTH = "RAY_AUTH_MODE"
os.environ.setdefault(_AUTH, "disabled")


class RayHosts:
    """A cluster; it ends with this process at the latest. :param folder: for logs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.address = f"{ADDRESSES[0]}:{_free_port()}"
        self.nodes: dict[str, KeptProcess] = {}
        self._killed: list[KeptProcess] = []
        self._run_dirs: list[Path] = []

    def start(self, address: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a node, the first one as the head of the cluster; return when Ray lists it.

        :param environment: of the node, in place of this process's own.
        """
        run_dir = Path(tempfile.mkdtemp(prefix="gl-ray-", dir="/tmp"))  # Ray's sockets need a short path
        self._run_dirs.append(run_dir)
        words = ["--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false"]
        words += [f"--temp-dir={run_dir}", "--disable-usage-stats"]
        if self.nodes:
            words = [f"--address={self.address}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *words, "--block"]
        command += [f"--node-ip-address={address}", "--num-cpus=1", f"--num-gpus={GPUS}"]
        command += ["--object-store-memory=100000000"]
        log = self._folder / f"{address}.log"
        log.touch()
        self.nodes[address] = KeptProcess(
            command,
            import_path(os.environ if environment is None else environment),
            log=log,
            run_dir=run_dir,
            locks=LentLocks((), ()),
            term_timeout_s=10,
        )
        wait_until(lambda: self._has(len(self.nodes)), f"node {address} of Ray, see {log}", timeout_s=_START_S)

    def _has(self, count: int) -> bool:
        try:
            RayNodes(self.address, 0).choose(count)
        except NodeError:
            assert all(node.exit_code is None for node in self.nodes.values())
            return False
        return True

    def kill(self, address: str) -> None:
        """Kill all that Ray has on a node, at once; not what we have there, but the node's keeper, which would."""
        node = self.nodes.pop(address)
        self._killed.append(node)
        processes = node.processes()
        mine = [process for process in processes if not any(word in _words(process) for word in _OURS)]
        os.kill(node.keeper_pid, signal.SIGKILL)
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none of it sees another one die
            for process in mine:
                with suppress(psutil.Error):
                    process.send_signal(number)

    def stop(self) -> None:
        """End all nodes, the head last."""
        for node in (*self._killed, *reversed(self.nodes.values())):
            node.end(60)
        for run_dir in self._run_dirs:
            shutil.rmtree(run_dir, ignore_errors=True)


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ADDRESSES[0], 0))
        return int(probe.getsockname()[1])


def import_path(environment: Mapping[str, str], *first: Path) -> dict[str, str]:
    """Return an environment in which this package is found. :param first: folders that come before it."""
    paths = [*map(str, first), str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths), _AUTH: "disabled"}
