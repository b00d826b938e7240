"""Looks at the nodes of a server while a load runs on it: their devices, and the log that the head writes.

Leaves the devices of one node to its agent, and what was seen to :mod:`~pytest_gpulayout.telemetry`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Generic, Literal, TypeVar

from pytest_gpulayout.adapters.node_fleet import on_each
from pytest_gpulayout.adapters.node_host import machine_identity, namespace
from pytest_gpulayout.adapters.remote_part import RemotePart
from pytest_gpulayout.errors import NodeError
from pytest_gpulayout.node_documents import telemetry_from_document
from pytest_gpulayout.nodes import NodeFacts, joined_telemetry
from pytest_gpulayout.ports import Platform, Watch
from pytest_gpulayout.telemetry import Telemetry

Seen = TypeVar("Seen")

_INTERVAL_S = 0.5
_START_S = 45.0  # NVML without its persistence mode loads the driver first


class AfterCopy(Generic[Seen]):
    """A watch that reads copies of logs: they are brought up to date before it begins, and before it ends.

    :param copy: does that.
    """

    def __init__(self, watch: Watch[Seen], copy: Callable[[], None]) -> None:
        self._watch = watch
        self._copy = copy

    def __enter__(self) -> AfterCopy[Seen]:
        """Copy, and begin to look."""
        self._copy_what_there_is()
        self._watch.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Copy, and stop looking."""
        self._copy_what_there_is()
        self._watch.__exit__(*exc_info)

    @property
    def seen(self) -> Seen:
        """What the watch saw."""
        return self._watch.seen

    def _copy_what_there_is(self) -> None:
        try:
            self._copy()
        except NodeError:
            pass  # whoever asks the server whether it lives is told; here there is nothing more to see


class NodesTelemetry:
    """Samples the devices of all nodes; none fails because something cannot be sampled.

    Work on the CPUs is foreign where it is neither of a node on the same machine nor of the test run: several nodes
    may be namespaces of one machine, as in tests.
    """

    def __init__(self, parts: Sequence[RemotePart], platform: Platform) -> None:
        self._parts = tuple(parts)
        self._platform: Platform = platform
        self._seen = Telemetry(source=self._source, interval_s=_INTERVAL_S)

    def __enter__(self) -> NodesTelemetry:
        """Begin on all nodes side by side."""
        on_each(self._parts, self._begin)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop on all nodes, and bring back what was seen."""
        found = on_each(self._parts, self._end)
        self._seen = joined_telemetry([(part.name, own) for part, own in zip(self._parts, found, strict=True)])

    @property
    def seen(self) -> Telemetry:
        """What was sampled, the head's with that of the others beside it."""
        return self._seen

    @property
    def _source(self) -> Literal["NVML", "/proc"]:
        return "NVML" if self._platform == "cuda" else "/proc"

    def _begin(self, part: RemotePart) -> None:
        try:
            part.node.ask(
                "telemetry_start",
                timeout_s=_START_S,
                platform=self._platform,
                devices=part.devices,
                pids=self._known_beside(part.node.facts),
            )
        except NodeError:
            pass  # the end says so

    def _end(self, part: RemotePart) -> Telemetry:
        try:
            document = part.node.ask("telemetry_stop")
        except NodeError as error:
            return self._nothing(str(error).partition("\n")[0])
        return self._nothing("it did not begin") if document is None else telemetry_from_document(document)

    def _nothing(self, why: str) -> Telemetry:
        return Telemetry(source=self._source, interval_s=_INTERVAL_S, notes=(f"not sampled: {why}",))

    def _known_beside(self, node: NodeFacts) -> list[int]:
        """Processes at the top of trees whose work on this node's machine is not foreign, as far as it sees them."""
        facts = [part.node.facts for part in self._parts]
        same = [other for other in facts if (other.machine, other.processes) == (node.machine, node.processes)]
        is_here = node.machine and (node.machine, node.processes) == (machine_identity(), namespace("pid"))
        return [other.pid for other in same] + ([os.getpid()] if is_here else [])
