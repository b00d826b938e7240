"""Several workers of the load client at once, each in a process of its own, when one core is not enough.

Knows how to start them, what to tell them, and that none outlives its parent: a worker that reads the end of its
channel, or sees it while it measures, is gone. All of them share ``CLOCK_MONOTONIC``, and begin a batch at one
instant. What travels over the channels (socket pairs between this process and its own children) are the dataclasses
of :mod:`~pytest_gpulayout.adapters.load_worker`; the API key among them is on no command line.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection as Channel
from multiprocessing.connection import wait
from typing import IO, Any

from pytest_gpulayout.adapters.load_loop import OwnerGone, Tally
from pytest_gpulayout.adapters.load_worker import Share, ShareResult, Worker, WorkerPlan
from pytest_gpulayout.adapters.server_address import ServerAddress
from pytest_gpulayout.errors import MeasurementError

_MODULE = "pytest_gpulayout.adapters.load_child"
_CONNECT = "connect"
# All workers must have entered their loops by then; they wait for the instant with the kernel's own timer.
_HEAD_START_NS = 100_000_000
_GRACE_S = 2.0
_LAST_WORDS = 400


@dataclass(frozen=True, slots=True)
class _Ready:
    """The requests of a share are encoded."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """A worker gave up. :param expected: whether the text is a :class:`MeasurementError` in its four parts."""

    text: str
    expected: bool


class WorkerProcesses:
    """The workers of one run, as processes; nothing of them is left after :meth:`close`.

    :param plans: one for each.
    """

    def __init__(self, server: ServerAddress, plans: Sequence[WorkerPlan]) -> None:
        self._server = server
        self._children: list[_Child] = []
        try:
            for plan in plans:
                self._children.append(_Child(plan.number))
                self._send(self._children[-1], (server, plan))
        except BaseException:
            self.close()
            raise

    def connect(self) -> None:
        """Open what is not open and let the server answer once on it.

        :raises MeasurementError: one of them failed, or a worker did.
        """
        for child in self._children:
            self._send(child, _CONNECT)
        for child in self._children:
            self._receive(child)

    def run(self, shares: Sequence[Share], tell: Callable[[Tally], None]) -> list[ShareResult]:
        """Send a batch, all workers beginning at one instant; return what became of it, by worker.

        :raises MeasurementError: the server went away, or a worker did.
        """
        for child, share in zip(self._children, shares, strict=True):
            self._send(child, share)
        for child in self._children:
            self._receive(child)
        start_ns = time.monotonic_ns() + _HEAD_START_NS
        for child in self._children:
            self._send(child, start_ns)
        results: dict[int, ShareResult] = {}
        while len(results) < len(self._children):
            running = {child.channel: child for child in self._children if child.number not in results}
            for channel in wait(list(running)):
                child = running[channel]  # type: ignore[index]
                message = self._receive(child)
                if isinstance(message, ShareResult):
                    results[child.number] = message
                else:
                    tell(message)
        return [results[child.number] for child in self._children]

    def close(self) -> None:
        """End all workers; returns when they are gone."""
        for child in self._children:
            child.channel.close()
        for child in self._children:
            child.end()

    @property
    def pids(self) -> list[int]:
        """Process ids, by worker."""
        return [child.process.pid for child in self._children]

    def _send(self, child: _Child, message: object) -> None:
        try:
            child.channel.send(message)
        except OSError as error:
            # What it said before it ended is still to be read, and tells more than a broken pipe.
            self._receive(child)
            raise self._died(child) from error

    def _receive(self, child: _Child) -> Any:
        try:
            message = child.channel.recv()
        except (EOFError, OSError) as error:
            raise self._died(child) from error
        if isinstance(message, _Failure):
            raise MeasurementError(message.text) if message.expected else self._broke(child, message.text)
        return message

    def _died(self, child: _Child) -> MeasurementError:
        status = child.wait()
        how = f"it was ended by {signal.Signals(-status).name}" if status < 0 else f"it ended with status {status}"
        words = child.last_words()
        return self._broke(child, f"{how}{f'; {words}' if words else ''}")

    def _broke(self, child: _Child, found: str) -> MeasurementError:
        return self._server.fault(
            "all processes of the load client must live as long as the measurement",
            f"worker {child.number} (process {child.process.pid}): {found}",
            "look for the kernel's out-of-memory killer in `dmesg`, or measure with one process (--processes 1)",
        )


class _Child:
    """One worker process and the channel to it."""

    def __init__(self, number: int) -> None:
        self.number = number
        ours, theirs = socket.socketpair()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in end()
        with theirs:
            self.channel = Channel(ours.detach())
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is for the parent, which then ends it
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )

    def wait(self) -> int:
        """Return the exit status, of a process that has closed its channel or should have."""
        try:
            return self.process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def last_words(self) -> str:
        """Return the end of what it printed."""
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace").strip()[-_LAST_WORDS:]

    def end(self) -> None:
        """Return when it is gone."""
        self.wait()
        self._errors.close()


def serve(channel: Channel) -> None:
    """Be a worker until the channel ends."""
    server, plan = channel.recv()
    worker = Worker(server, plan)
    try:
        while True:
            _follow(worker, channel, channel.recv())
    except MeasurementError as error:
        channel.send(_Failure(str(error), expected=True))
    except (EOFError, OwnerGone, ConnectionError):
        pass  # the parent is gone, or has lost interest
    except Exception:  # noqa: BLE001 - the parent tells it; here nobody would read it
        channel.send(_Failure(traceback.format_exc()[-_LAST_WORDS:], expected=False))
    finally:
        worker.close()


def _follow(worker: Worker, channel: Channel, order: Share | str) -> None:
    if isinstance(order, Share):
        exchanges = worker.prepare(order)
        channel.send(_Ready())
        start_ns = channel.recv()
        channel.send(worker.run(order, exchanges, channel.send, start_ns=start_ns, owner=channel.fileno()))
    else:
        worker.connect()
        channel.send(None)
