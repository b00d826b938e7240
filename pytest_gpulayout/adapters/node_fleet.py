"""The nodes of a run: opened when a layout needs them, asked who they are, and closed at its end.

Knows how several nodes are asked side by side. Leaves whether they fit together to
:mod:`~pytest_gpulayout.nodes`, and servers on them to :mod:`~pytest_gpulayout.adapters.node_server`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pytest_gpulayout.adapters.node_host import own_version
from pytest_gpulayout.errors import NodeError
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.nodes import NodeFacts, facts_from_document, ranks_of, require_same_software, taken_over
from pytest_gpulayout.ports import NodeChannel, NodeSource, Platform, Progress
from pytest_gpulayout.topology import Topology
from pytest_gpulayout.topology_document import topology_from_document

Answer = TypeVar("Answer")
Item = TypeVar("Item")

HELLO_S = 60.0
"""How long a node may take to answer first: a pod is reached, an interpreter starts, a network folder is read."""
ANSWER_S = 30.0
"""And later, where nothing is done but looking: NVML without its persistence mode loads the driver first."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a layout. :param rank: 0 is the head."""

    rank: int
    channel: NodeChannel
    facts: NodeFacts

    @property
    def name(self) -> str:
        """As the user named it."""
        return self.facts.name

    def ask(self, method: str, *, timeout_s: float = ANSWER_S, **arguments: Any) -> Any:
        """Return what its agent answers.

        :raises NodeError: it refuses. :raises NodeLost: no answer comes.
        """
        return self.channel.request(method, arguments, timeout_s=timeout_s)


class NodeFleet:
    """Keeps the nodes of a run open.

    :param master_addr: address at which the others reach the head, ``None`` for its first one.
    :param environment: of the test run.
    """

    def __init__(
        self,
        source: NodeSource,
        platform: Platform,
        *,
        master_addr: str | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._source = source
        self._platform: Platform = platform
        self._environment = environment
        self._nodes: tuple[Node, ...] = ()
        self.master_addr = master_addr

    def nodes(self, layout: Layout, progress: Progress) -> tuple[Node, ...]:
        """Return the nodes of a layout, in order of their ranks.

        :raises NodeError: one is missing, does not answer, or has other software than the rest.
        """
        if len(self._nodes) < layout.nodes:
            self.close()
            self._nodes = self._open(layout.nodes, progress)
        return self._nodes[: layout.nodes]

    def topologies(self, layout: Layout, progress: Progress) -> tuple[tuple[str, Topology], ...]:
        """Return name and topology of each node of a layout.

        :raises NodeError: one is missing, or its devices cannot be listed.
        """
        nodes = self.nodes(layout, progress)
        progress(f"{layout}: looking at the devices of {len(nodes)} nodes")

        def look(node: Node) -> Topology:
            ranks = ranks_of(layout, node.rank)
            answer = node.ask(
                "topology",
                platform=self._platform,
                ranks=len(ranks),
                first_rank=ranks.start,
                all_ranks=layout.gpus,
            )
            document = answer["topology"]
            topology = topology_from_document(document, f"the answer of node {node.name}")
            source = f"{document['source']} of node {node.name}"
            return replace(topology, recorded=False, source=source, busy=frozenset(answer["busy"]))

        return tuple((node.name, topology) for node, topology in zip(nodes, on_each(nodes, look), strict=True))

    def close(self) -> None:
        """Let all nodes go; they are opened anew when they are needed. May be called again."""
        nodes, self._nodes = self._nodes, ()
        if nodes:
            on_each(nodes, lambda node: node.channel.close())

    def _open(self, count: int, progress: Progress) -> tuple[Node, ...]:
        channels = self._source.open(count, progress)
        try:
            progress(f"asking {count} nodes who they are")
            taken = taken_over(self._environment)
            facts = _all_or_names(channels, lambda channel: _ask_who(channel, taken))
            require_same_software(facts, own_version())
        except BaseException:
            on_each(channels, lambda channel: channel.close())
            raise
        return tuple(Node(rank, *known) for rank, known in enumerate(zip(channels, facts, strict=True)))


def on_each(items: Sequence[Item], action: Callable[[Item], Answer]) -> list[Answer]:
    """Do something with each of several nodes side by side; return the answers in their order.

    :raises NodeError: it failed for one; of several the first is told.
    """
    with ThreadPoolExecutor(max_workers=max(1, len(items))) as pool:
        futures = [pool.submit(action, item) for item in items]
    return [future.result() for future in futures]


def _ask_who(channel: NodeChannel, environment: Mapping[str, str]) -> NodeFacts:
    answer = channel.request("hello", {"environment": dict(environment)}, timeout_s=HELLO_S)
    return facts_from_document(channel.name, answer)


def _all_or_names(channels: Sequence[NodeChannel], ask: Callable[[NodeChannel], NodeFacts]) -> list[NodeFacts]:
    """The answers of all; where some fail, the first failure, with the names of all that do."""

    def attempt(channel: NodeChannel) -> NodeFacts | NodeError:
        try:
            return ask(channel)
        except NodeError as error:
            return error

    answers = on_each(channels, attempt)
    failures = [answer for answer in answers if isinstance(answer, NodeError)]
    if len(failures) > 1:
        names = ", ".join(failure.node for failure in failures[1:])
        raise NodeError(f"{failures[0]}\n  nor do these answer as they must: {names}", node=failures[0].node)
    if failures:
        raise failures[0]
    return [answer for answer in answers if isinstance(answer, NodeFacts)]
