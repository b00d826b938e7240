"""Nodes of a Ray cluster that runs already, and what vLLM's Ray executor needs of it.

Knows how to ask a child process that talks to Ray (:mod:`~pytest_gpulayout.adapters.ray_driver`) and how to say what
went wrong. Leaves which rank lands where to :mod:`~pytest_gpulayout.ray_placement`, and what an agent on a node does
to :mod:`~pytest_gpulayout.adapters.ray_agent`. Never starts a cluster; what it has in one ends with its processes.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from pytest_gpulayout.adapters import ray_driver
from pytest_gpulayout.adapters.node_command import CommandChannel
from pytest_gpulayout.adapters.ray_driver import ClusterEntry, NodeEntry
from pytest_gpulayout.errors import NodeError
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.ports import Progress
from pytest_gpulayout.ray_placement import (
    RayExecutor,
    RayNode,
    RayWorker,
    choose_nodes,
    prove_ranks,
    rank_of_worker,
    ray_environment,
    to_hold,
    workers_in_log,
)

NODE_PYTHON = "{python}"
"""The interpreter that Ray runs in on a node; the driver knows it."""

AGENT = ("-P", "-m", "pytest_gpulayout.adapters.ray_agent")
"""What an interpreter runs on a node."""

_LIMIT_S = 60.0  # a driver joins in two to five seconds; Ray itself gives up after about half a minute
_HOLD_LIMIT_S = 90.0
_END_LIMIT_S = 15.0


class RayNodes:
    """The nodes of a layout in a cluster.

    :param address: as in ``RAY_ADDRESS``.
    :param gpus_per_node: that each node must have free, of all layouts of the run the most; 0 without GPUs.
    :param executor: which of its two vLLM takes. :param node_python: has pytest-gpulayout and vLLM on the nodes.
    :param python: has Ray here.

    :ivar nodes: those of the layout in the order of its ranks, once they are chosen.
    """

    def __init__(
        self,
        address: str,
        gpus_per_node: int,
        *,
        executor: RayExecutor = "v2",
        node_python: str = NODE_PYTHON,
        python: str = sys.executable,
    ) -> None:
        self._address = address
        self._gpus_per_node = gpus_per_node
        self._executor = executor
        self._node_python = node_python
        self._python = python
        self._cluster: ClusterEntry | None = None
        self.nodes: tuple[RayNode, ...] = ()

    def open(self, count: int, progress: Progress) -> Sequence[CommandChannel]:
        """Return an agent on each of so many nodes, in the order of their ranks.

        :raises NodeError: Ray is missing or does not answer, or too few nodes have what is needed.
        """
        progress("asking Ray for its nodes")
        self.choose(count)
        with ExitStack() as undo:
            channels = []
            for node in self.nodes:
                progress(f"starting an agent on node {node.name}")
                channel = CommandChannel(node.name, self.command(node, [self._node_python, *AGENT]))
                undo.callback(channel.close)
                channels.append(channel)
            undo.pop_all()
        return channels

    def choose(self, count: int) -> None:
        """Choose so many nodes, and start nothing.

        :raises NodeError: as :meth:`open`.
        """
        self._cluster = self._ask("nodes")
        nodes = ray_nodes(self._cluster["nodes"])
        self.nodes = choose_nodes(nodes, count, self._gpus_per_node, self._cluster["home"], self._executor)

    def command(self, node: RayNode, command: Sequence[str]) -> list[str]:
        """Return the command that runs a command on a node with its input and output connected to this host."""
        return self._driver("run", {"node": node.node_id, "command": list(command)})

    # -- vLLM's Ray executor -------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """Return what the server's environment needs on the first node; once nodes are chosen."""
        assert self._cluster is not None
        return ray_environment(self._cluster["address"], self.nodes[0].address)

    @contextmanager
    def held(self, layout: Layout, leave: Mapping[str, Sequence[Sequence[str]]] | None = None) -> Iterator[None]:
        """Keep GPUs that the layout does not use from vLLM while it asks for its own; once nodes are chosen.

        :param leave: the GPUs that it shall use, where a node has more of them free: node id -> GPUs, each by all
            names that Ray may know it by. Ray chooses where nothing is said.
        :raises NodeError: Ray does not hand them out.
        """
        free_now = ray_nodes(self._ask("nodes")["nodes"])
        gpus = to_hold(free_now, self.nodes[: layout.nodes], layout.gpus_per_node)
        if not gpus:
            yield
            return
        wish = {"gpus": gpus, "leave": {node: spared for node, spared in (leave or {}).items() if node in gpus}}
        with self._start("hold", wish) as process:
            try:
                self._await_hold(process)
                yield
            finally:
                _end(process)

    def _await_hold(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], _HOLD_LIMIT_S)
        if ready and process.stdout.readline():
            return
        process.kill()
        assert process.stderr is not None
        raise self._failure(process.stderr.read() if ready else "", _HOLD_LIMIT_S if not ready else None)

    def ranks(self, layout: Layout, drivers: Sequence[int], log: Iterable[str]) -> dict[int, tuple[RayNode, int]]:
        """Return where each rank is: its node and its process id there.

        Ray lists the workers by name; those of the older executor have none, and are known by the server's log.

        :param drivers: process ids of the server on the first node, vLLM's engine among them.
        :param log: lines of the server's log.
        :raises NodeError: a rank is missing, or not on the node of the layout.
        """
        nodes = self.nodes[: layout.nodes]
        if self._executor == "v1":
            return prove_ranks(workers_in_log(log, nodes), layout, nodes)
        wish = {"drivers": list(drivers), "driver_address": self.nodes[0].address}
        named = [(rank_of_worker(entry["name"], layout), entry) for entry in self._ask("workers", wish)["workers"]]
        workers = [RayWorker(rank, entry["node"], entry["pid"]) for rank, entry in named if rank is not None]
        return prove_ranks(workers, layout, nodes)

    # -- the child process ---------------------------------------------------------------------------------------

    def _driver(self, task: str, wish: Mapping[str, Any]) -> list[str]:
        document = json.dumps({"address": self._address, **wish})
        return [self._python, "-P", str(ray_driver.__file__), task, document]

    def _start(self, task: str, wish: Mapping[str, Any]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._driver(task, wish),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _ask(self, task: str, wish: Mapping[str, Any] | None = None) -> Any:
        try:
            done = subprocess.run(
                self._driver(task, wish or {}),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_LIMIT_S,
                start_new_session=True,
                check=False,
            )
        except OSError as error:
            raise self._failure(f"{self._python}: {error.strerror}", None) from error
        except subprocess.TimeoutExpired as error:
            raise self._failure("", _LIMIT_S) from error
        answer = done.stdout.strip().rpartition("\n")[2]
        if done.returncode != 0 or not answer:
            raise self._failure(done.stderr, None)
        return json.loads(answer)

    def _failure(self, errors: str, limit_s: float | None) -> NodeError:
        """Turn what the child wrote last into the one message a user gets."""
        told = last_error(errors)
        if limit_s is not None:
            told = ("unreachable", f"no answer within {limit_s:.0f} s")
        if told is None:
            last = errors.strip().rpartition("\n")[2] or "it ended without a word"
            told = ("unreachable", last)
        kind, text = told
        if kind == "unreachable" and any(words in errors for words in _ASKS_FOR_TOKEN):
            kind = "token"
        wanted, advice = _WORDS.get(kind, _WORDS["unreachable"])
        return NodeError(f"{wanted}: {text}\n  at RAY_ADDRESS={self._address}\n  {advice}", node=self._address)


# Ray 2.60: its control store's answer, which Ray only logs, and its own word where it should have one and finds none.
_ASKS_FOR_TOKEN = ("InvalidAuthToken", "no authentication token was found")
_OR_NAME_THEM = "; without Ray: --gpu-nodes=NAME,NAME"
_WORDS = {
    "missing": (
        "Ray is required to reach the nodes of its cluster, and cannot be imported",
        "install the cluster's version: pip install ray==VERSION; any version: pip install 'pytest-gpulayout[ray]'"
        + _OR_NAME_THEM,
    ),
    "address": (
        "the address of a Ray cluster as its nodes know it is required",
        "run pytest on a node of the cluster with RAY_ADDRESS=auto, or as a job: ray job submit -- pytest ..."
        + _OR_NAME_THEM,
    ),
    "unreachable": (
        "a Ray cluster that answers is required, with this machine as one of its nodes",
        "see whether it does: ray status; join it: ray start --address=HEAD:6379" + _OR_NAME_THEM,
    ),
    "token": (
        "the token of the Ray cluster is required",
        "give it as its nodes have it: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN=..., RAY_AUTH_TOKEN_PATH=FILE or "
        "~/.ray/auth_token" + _OR_NAME_THEM,
    ),
    "version": (
        "the Ray cluster's own versions of Ray and Python are required",
        "run pytest with the Python of the cluster's nodes, or install its Ray: pip install ray==VERSION",
    ),
    "lost": (
        "all nodes of the Ray cluster must stay while a layout runs on them",
        "see which are there: ray list nodes",
    ),
    "busy": (
        "GPUs that a layout does not use must be held while vLLM asks Ray for its own",
        "see who has them, and run it again on a cluster that nobody else uses at the time: ray status",
    ),
}
"""By kind of error: what was required, and what to type next."""


def last_error(errors: str) -> tuple[str, str] | None:
    """Return kind and text of what a driver process said last; ``None`` when it said nothing of its own."""
    line = errors.strip().rpartition("\n")[2]
    if not line.startswith('{"error": '):
        return None
    told = json.loads(line)
    return str(told["error"]), str(told["text"])


def ray_nodes(entries: Sequence[NodeEntry]) -> tuple[RayNode, ...]:
    """Return the nodes with names for people: what the user called it, else its host name, else its address.

    A name that two of them have (two nodes on one host) is not taken.
    """
    choices = [(_given_name(entry), entry["hostname"], entry["address"]) for entry in entries]
    known = [Counter(names) for names in zip(*choices, strict=True)]
    found = []
    for entry, names in zip(entries, choices, strict=True):
        unique = [name for name, times in zip(names, known, strict=True) if name and times[name] == 1]
        name = unique[0] if unique else f"{entry['address']} ({entry['id'][:8]})"
        found.append(RayNode(entry["id"], name, entry["address"], entry["gpus"], entry["free_gpus"]))
    return tuple(found)


def _given_name(entry: NodeEntry) -> str:
    """``ray start --node-name``; Ray puts the address there where nothing was given."""
    return "" if entry["name"] == entry["address"] else entry["name"]


def _end(process: subprocess.Popen[str]) -> None:
    """Close its input, which ends it; and end it in any case."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(_END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
