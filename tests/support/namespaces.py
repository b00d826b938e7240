"""Two network namespaces that stand for two hosts: joined by one virtual cable, and by nothing else.

Making them takes root and a kernel that lets it; where that is not so, a test that needs them is skipped and says
what was refused. They share the machine's processes, files and ``/dev/shm``.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Namespace:
    """One "host". :param address: of its end of the cable."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """The command that runs another one in it."""
        return ["ip", "netns", "exec", self.name, *words]


@contextmanager
def two_namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    """Make two namespaces and the cable between them; both are gone afterwards."""
    number = os.getpid()
    # A range for documentation (RFC 5737), which no host around uses.
    pair = Namespace(f"gl-a-{number}", "198.51.100.1"), Namespace(f"gl-b-{number}", "198.51.100.2")
    with ExitStack() as undo:
        for namespace in pair:
            _ip("netns", "add", namespace.name)
            undo.callback(_ip_at_the_end, "netns", "delete", namespace.name)
        a, b = pair
        _ip("link", "add", "cable0", "netns", a.name, "type", "veth", "peer", "name", "cable0", "netns", b.name)
        for namespace in pair:
            for interface in ("lo", "cable0"):
                _ip("-n", namespace.name, "link", "set", interface, "up")
            _ip("-n", namespace.name, "address", "add", f"{namespace.address}/30", "dev", "cable0")
            _run(namespace.command("true"))
        yield pair


def _ip(*words: str) -> None:
    _run(["ip", *words])


def _ip_at_the_end(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    except OSError as error:
        pytest.skip(f"needs network namespaces: {' '.join(command)}: {error.strerror} (Debian: iproute2)")
    if done.returncode != 0:
        pytest.skip(f"needs root and network namespaces: {' '.join(command)}: {done.stderr.strip()}")
