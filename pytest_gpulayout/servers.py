"""Who owns the running server, and what a test sees of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_gpulayout.errors import ServerError
from pytest_gpulayout.ports import Server, ServerLauncher, ServerSpec

if TYPE_CHECKING:
    import requests

    from pytest_gpulayout.live import LiveLine
    from pytest_gpulayout.occupancy import OccupancyReport


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The model a test wants. :param arguments: of its marker; they belong to the key of its baselines."""

    name: str
    arguments: tuple[str, ...] = ()


class ServerOwner:
    """Keeps at most one server: the one that the running tests need.

    A server that failed to start is not started again; whoever asks gets the first failure.
    """

    def __init__(self, launcher: Callable[[], ServerLauncher], live: LiveLine) -> None:
        self._make_launcher = launcher
        self._launcher: ServerLauncher | None = None
        self._live = live
        self._failures: dict[ServerSpec, ServerError] = {}
        self.current: Server | None = None
        self.wanted: ServerSpec | None = None
        """What the tests need; another server may have its place for a while (:meth:`lend`)."""

    def get(self, spec: ServerSpec) -> Server:
        """Return the server of ``spec``, starting it if it does not run.

        :raises ServerError: it does not start, or it has gone away since it was last used.
        """
        if self.current is not None and self.current.spec == spec:
            self.check()
            self.wanted = spec
            return self.current
        self.wanted = None
        server = self.lend(spec)
        self.wanted = spec
        return server

    def restart(self) -> Server:
        """Replace the current server by a fresh one of the spec that the tests need.

        :raises ServerError: it does not start, or somebody else runs it.
        """
        spec = self.wanted
        assert spec is not None
        if self.current is not None and self.current.proof.is_attached:
            raise ServerError(
                f"a fresh start of the server was required, and somebody else runs it: it is never started anew\n"
                f"  at {self.current.endpoint.url}\n  leave --gpu-server-url out, and pytest starts servers"
            )
        self._end()
        self.current = self._start(spec)
        return self.current

    def lend(self, spec: ServerSpec) -> Server:
        """Put a fresh server of another spec in the place of the current one; :meth:`needed` brings that one back.

        :raises ServerError: it does not start.
        """
        if spec in self._failures:
            raise self._failures[spec]
        self._end()
        try:
            self.current = self._start(spec)
        except ServerError as error:
            self._failures[spec] = error
            raise
        return self.current

    def end_loan(self) -> None:
        """End a server that has the place of the one that the tests need, and free its devices."""
        if self.current is not None and self.current.spec != self.wanted:
            self._end()

    def needed(self) -> Server:
        """Return the server that the tests need, starting it again where another has had its place.

        :raises ServerError: it has been stopped, or it does not start.
        """
        if self.wanted is None:
            raise ServerError("a running server was required, and it has been stopped; ask for vllm_server again")
        if self.current is not None and self.current.spec == self.wanted:
            return self.current
        return self.get(self.wanted)

    def vacate(self) -> None:
        """End the server that runs, if one does, and free its devices; :meth:`needed` starts it again."""
        self._end()

    def check(self) -> None:
        """Do nothing while the current server runs; clear away one that does not, so that the next is fresh.

        :raises ServerError: it has gone away.
        """
        if self.current is not None:
            try:
                self.current.check_alive()
            except ServerError:
                self.stop()
                raise

    def stop(self) -> None:
        """End the current server, if there is one; nothing is needed any more."""
        self.wanted = None
        self._end()

    def _end(self) -> None:
        server, self.current = self.current, None
        if server is not None:
            if not server.proof.is_attached:
                self._live.update(f"{server.spec.layout}: stopping the server")
            server.stop()
            self._live.clear()

    def _start(self, spec: ServerSpec) -> Server:
        self._launcher = self._launcher or self._make_launcher()
        try:
            server = self._launcher.launch(spec, self._live.update)
        except KeyboardInterrupt:
            message = f"interrupted while the server of layout {spec.layout} was loading; it was stopped"
            raise pytest.exit.Exception(message, returncode=pytest.ExitCode.INTERRUPTED) from None
        finally:
            self._live.clear()
        self._live.say(f"{spec.layout}: {_ready(server)}")
        return server


def _ready(server: Server) -> str:
    proof = server.proof
    if proof.start_s is None:
        return f"attached to vLLM {proof.vllm_version} at {server.endpoint.url}"
    return f"vLLM {proof.vllm_version} ready in {proof.start_s:.0f} s"


class ServerView:
    """What the ``vllm_server`` fixture gives: the server that runs now, also after a gate has restarted it."""

    def __init__(self, owner: ServerOwner) -> None:
        self._owner = owner
        self._client: requests.Session | None = None

    @property
    def url(self) -> str:
        """Base URL, e.g. ``http://127.0.0.1:40123``; changes when a gate restarts the server."""
        return self.server.endpoint.url

    @property
    def model(self) -> str:
        """Name that requests must give as ``model``."""
        return self.server.endpoint.model

    @property
    def log(self) -> Path:
        """The server's log file.

        :raises ServerError: somebody else runs the server, and has its log.
        """
        server = self.server
        if server.log is None:
            raise ServerError(
                "the log of the server was required, and it is not at hand: somebody else runs it\n"
                f"  at {server.endpoint.url}\n"
                "  leave out what reads it; or leave --gpu-server-url out, and pytest starts servers"
            )
        return server.log

    @property
    def pids(self) -> Mapping[int, int]:
        """Process id of each rank, by rank."""
        return self.server.proof.rank_pids

    @property
    def not_proved(self) -> tuple[str, ...]:
        """What could not be proved of a server that somebody else runs; empty for one that pytest has started."""
        return self.server.proof.not_proved

    @property
    def fingerprint(self) -> str:
        """``system_fingerprint`` of its first completion, which proves the layout."""
        return self.server.proof.fingerprint

    @property
    def gpu_processes(self) -> OccupancyReport | None:
        """On which GPUs its processes compute now, with ``violations``; ``None`` on the CPU platform."""
        return self.server.gpu_processes()

    @property
    def client(self) -> requests.Session:
        """An HTTP session with the server's key: ``client.post("/v1/completions", json={...})``."""
        if self._client is None:
            from pytest_gpulayout.adapters.http_session import open_session

            self._client = open_session(lambda: self.server.endpoint)
        return self._client

    def close(self) -> None:
        """Close the client, if a test used it."""
        if self._client is not None:
            self._client.close()

    @property
    def server(self) -> Server:
        """The port behind this view, for code that needs more than a test should.

        Started again here where a gate in paired mode ended with a server of the base in its place.
        """
        return self._owner.needed()
