"""Nodes that a command reaches: ``ssh NODE``, ``kubectl exec -i POD --``, ``srun -w NODE``, ``ip netns exec NS``.

Knows how to start an agent (:mod:`~pytest_gpulayout.adapters.node_agent`) by a command and to exchange requests and
replies with it over the command's input and output. Leaves what to ask to
:mod:`~pytest_gpulayout.adapters.node_fleet`.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from pytest_gpulayout.errors import NodeError, NodeLost
from pytest_gpulayout.ports import Progress

LOCAL = "local"
"""Name of the node that needs no command: this host."""

CLOSE_S = 60.0
"""How long an agent may take to end what it has started: vLLM gets 20 s of it, its keeper the rest."""

_AGENT = ("-P", "-m", "pytest_gpulayout.adapters.node_agent")
_EXIT_S = 5.0
_LAST_WORDS = 4096
_TAIL_LINES = 4


class CommandNodes:
    """The nodes that the options name.

    :param names: in order of their ranks; the first one is the head. :data:`LOCAL` is this host.
    :param command: prefix that runs the words behind it on a node; ``{node}`` in it becomes the name.
    :param python: interpreter on the nodes that has pytest-gpulayout and vLLM.
    """

    def __init__(self, names: Sequence[str], command: Sequence[str], python: str) -> None:
        self._names = tuple(names)
        self._command = tuple(command)
        self._python = python

    def open(self, count: int, progress: Progress) -> Sequence[CommandChannel]:
        """Start an agent on each of the first ``count`` nodes.

        :raises NodeError: fewer are named, or a command cannot be started.
        """
        if count > len(self._names):
            raise NodeError(
                f"{count} nodes are required, found {len(self._names)}: {', '.join(self._names)}\n"
                "  in --gpu-nodes\n"
                "  name them all, in the order of their ranks: --gpu-nodes=NAME,NAME,...",
                node=f"number {len(self._names) + 1}",
            )
        with ExitStack() as undo:
            channels = []
            for name in self._names[:count]:
                progress(f"starting an agent on node {name}")
                channel = CommandChannel(name, self._words(name))
                undo.callback(channel.close)
                channels.append(channel)
            undo.pop_all()
        return channels

    def _words(self, name: str) -> list[str]:
        if name == LOCAL:
            return [sys.executable, *_AGENT]
        return [*(word.replace("{node}", name) for word in self._command), self._python, *_AGENT]


class CommandChannel:
    """An agent at the other end of a command's input and output.

    :param name: of the node, as the user gave it. :param command: that starts the agent there.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self._name = name
        self._command = tuple(command)
        self._lock = threading.Lock()
        self._number = 0
        self._unread = b""
        self._lost: str | None = None
        self._has_answered = False
        self._is_closed = False
        self._stack = ExitStack()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the stack
        self._stack.callback(self._errors.close)
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                start_new_session=True,  # Ctrl-C in the terminal is for pytest, which then ends the agent
            )
        except OSError as error:
            self._stack.close()
            raise NodeError(
                f"a command that runs another one on node {name} is required, found one that cannot be started: "
                f"{error.strerror}\n  {self._words}\n  correct it: --gpu-node-command='ssh {{node}}'",
                node=name,
            ) from error

    @property
    def name(self) -> str:
        """The node, as the user named it."""
        return self._name

    @property
    def _words(self) -> str:
        return " ".join(self._command)

    def request(self, method: str, arguments: Mapping[str, Any], *, timeout_s: float) -> Any:
        """Ask, and return the answer; threads take turns.

        :raises NodeError: the agent refuses, or cannot. :raises NodeLost: no answer came in time, or none will come.
        """
        with self._lock:
            if self._lost is not None:
                raise self._failure(self._lost)
            self._number += 1
            wanted = self._number
            self._send({"id": wanted, "method": method, "arguments": dict(arguments)})
            deadline = time.monotonic() + timeout_s
            while (reply := json.loads(self._line(deadline, timeout_s))).get("id") != wanted:
                continue  # an answer to a question that nobody waits for any more
            self._has_answered = True
        if "error" in reply:
            raise NodeError(f"{reply['error']['text']}\n  on node {self._name}", node=self._name)
        return reply["result"]

    def close(self) -> None:
        """End all that the agent has started, and the agent; may be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self.request("bye", {}, timeout_s=CLOSE_S)
        except NodeError:
            pass  # the end of its input says the same
        self._lost = self._lost or "it was asked to end"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stack.close()

    # -- lines -----------------------------------------------------------------------------------------------------

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        text = json.dumps(request).encode() + b"\n"
        try:
            while text:
                text = text[os.write(self._process.stdin.fileno(), text) :]
        except (BrokenPipeError, ValueError) as error:
            raise self._lose("its agent has ended") from error

    def _line(self, deadline: float, timeout_s: float) -> bytes:
        """Return the next line of the agent that is an object; what a login shell prints before is passed over."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while True:
            line, found, rest = self._unread.partition(b"\n")
            if found:
                self._unread = rest
                if line.startswith(b"{"):
                    return line
                continue
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([descriptor], [], [], left_s)[0]:
                raise self._lose(f"no answer within {timeout_s:.0f} s")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise self._lose("its agent has ended")
            self._unread += chunk

    # -- what is told of a node that is lost -------------------------------------------------------------------------

    def _lose(self, reason: str) -> NodeError:
        """Remember why nothing more is expected; a command that still runs is ended, so that its node notices."""
        self._lost = reason
        try:
            self._process.wait(0 if reason.startswith("no answer") else _EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return self._failure(reason)

    def _failure(self, reason: str) -> NodeError:
        said = self._last_words()
        code = self._process.poll()
        ending = "" if code is None or reason.startswith("no answer") else f" (exit code {code})"
        lines = [f"  {line}" for line in said] or ["  it has said nothing"]
        if self._has_answered:
            headline = f"node {self._name} must stay while a layout runs on it, and is lost: {reason}{ending}"
            advice = "see whether it runs and can be reached, and why its agent ended"
            return NodeLost("\n".join([headline, f"  {self._words}", *lines, f"  {advice}"]), node=self._name)
        headline = f"node {self._name} must answer, by an agent of pytest-gpulayout, and does not: {reason}{ending}"
        advice = (
            "see whether the command above works by itself; it needs a Python with pytest-gpulayout and vLLM there "
            "(--gpu-node-python=PATH), and a way there that asks nothing (--gpu-node-command='ssh {node}')"
        )
        return NodeError("\n".join([headline, f"  {self._words}", *lines, f"  {advice}"]), node=self._name)

    def _last_words(self) -> list[str]:
        """The last lines of its standard error."""
        if self._errors.closed:
            return []
        size = os.fstat(self._errors.fileno()).st_size
        text = os.pread(self._errors.fileno(), _LAST_WORDS, max(0, size - _LAST_WORDS)).decode(errors="replace")
        return [line.strip()[:200] for line in text.splitlines() if line.strip()][-_TAIL_LINES:]
