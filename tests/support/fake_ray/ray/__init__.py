"""The small part of Ray that :mod:`pytest_gpulayout.adapters.ray_driver` uses, in one process.

What the cluster is like stands in the environment variable ``FAKE_RAY``, as JSON: ``nodes`` (id -> its entries),
``free`` (id -> names of its free GPUs), ``actors`` and ``jobs`` as Ray lists them, ``error`` (what joining ends
with), ``log`` (what it writes before), ``silent`` (joining takes for ever), ``lost`` (ids of nodes whose actors have
died). Actors are objects here, and their methods run in threads, as those of Ray's threaded actors do.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from ray import exceptions as exceptions

__version__ = "2.99.0"
STATE: dict[str, Any] = json.loads(os.environ.get("FAKE_RAY", "{}"))
_free: dict[str, list[str]] = {node: list(gpus) for node, gpus in STATE.get("free", {}).items()}
_holding = threading.local()
_threads = ThreadPoolExecutor(max_workers=32)


def init(**wish: Any) -> None:
    """Join, or end as the state says."""
    if STATE.get("silent"):
        threading.Event().wait()
    sys.stderr.write(STATE.get("log", ""))
    if "error" in STATE:
        raise getattr(builtins, STATE.get("error_type", "ConnectionError"))(STATE["error"])


def nodes() -> list[dict[str, Any]]:
    """What ``ray.nodes()`` gives."""
    return [{"NodeID": node_id, **entries} for node_id, entries in STATE["nodes"].items()]


def get_runtime_context() -> SimpleNamespace:
    """Of the driver, or of the actor whose method runs in this thread."""
    return SimpleNamespace(
        gcs_address=STATE.get("address", "192.0.2.1:6379"),
        get_node_id=lambda: STATE["home"],
        get_accelerator_ids=lambda: {"GPU": getattr(_holding, "gpus", [])},
    )


class _Method:
    def __init__(self, actor: _Actor, name: str) -> None:
        self._actor, self._name = actor, name

    def remote(self, *arguments: Any) -> Future[Any]:
        return _threads.submit(self._call, *arguments)

    def _call(self, *arguments: Any) -> Any:
        if self._actor.node in STATE.get("lost", []):
            words = "The actor died unexpectedly before finishing this task.\nIts node has gone."
            raise exceptions.ActorDiedError(words)
        self._actor._ready.wait()
        _holding.gpus = self._actor._gpus
        return getattr(self._actor._object, self._name)(*arguments)


class _Actor:
    """An object of a class of ours. It waits for its GPUs."""

    def __init__(self, kind: type, options: dict[str, Any], arguments: tuple[Any, ...]) -> None:
        self.node = options["scheduling_strategy"].node_id
        self._object = None if self.node in STATE.get("lost", []) else kind(*arguments)
        self._ready = threading.Event()
        number, free = int(options.get("num_gpus", 0)), _free.get(self.node, [])
        self._gpus = [free.pop(0) for _ in range(number)] if len(free) >= number else []
        if len(self._gpus) == number:
            self._ready.set()

    def __getattr__(self, name: str) -> _Method:
        return _Method(self, name)


class _Class:
    def __init__(self, kind: type, **options: Any) -> None:
        self._kind, self._options = kind, options

    def options(self, **options: Any) -> _Class:
        return _Class(self._kind, **options)

    def remote(self, *arguments: Any) -> _Actor:
        return _Actor(self._kind, self._options, arguments)


def remote(kind: type) -> _Class:
    """Make an actor class."""
    return _Class(kind)


def get(answer: Future[Any]) -> Any:
    """Wait for an answer."""
    return answer.result()


def wait(answers: list[Future[Any]], *, timeout: float) -> tuple[list[Future[Any]], list[Future[Any]]]:
    """Look which are there; only a timeout of 0 is asked for."""
    assert timeout == 0
    done = [answer for answer in answers if answer.done()]
    return done, [answer for answer in answers if answer not in done]


def kill(actor: _Actor) -> None:
    """End an actor; its GPUs are free again."""
    _free.setdefault(actor.node, []).extend(actor._gpus)
