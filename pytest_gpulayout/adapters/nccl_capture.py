"""The files that NCCL of a server's processes writes its log to, and what keeps channels out of them."""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

NCCL_SUBSYSTEMS = "INIT,ENV,GRAPH,P2P,SHM,NET,NVLS"
"""Those that name transports and explain them, and no more."""

_TRANSPORTS = ("P2P", "SHM", "NET")
_CLOCK_SLACK_S = 2.0  # file systems keep times less exactly than the clock


@dataclass(frozen=True, slots=True)
class NcclCapture:
    """Where NCCL of one server writes its log, and what keeps channels out of it; from NCCL 2.30, ``src/debug.cc``.

    :param environment: the server's; without ``NCCL_DEBUG_FILE`` there is nothing. :param folder: its working folder.
    :param since_s: when it started, on the wall clock: what was written before is of somebody else.
    """

    environment: Mapping[str, str]
    folder: Path
    since_s: float

    def files(self, pids: Collection[int]) -> list[Path]:
        """Return the files of these processes; with a name that holds no ``%p``, the one file of all."""
        pattern = self.environment.get("NCCL_DEBUG_FILE")
        if not pattern:
            return []
        names = {expand_debug_file(pattern, host, pid) for host in _host_names() for pid in pids}
        return sorted(path for path in (self.folder / name for name in names) if self._is_fresh(path))

    def _is_fresh(self, path: Path) -> bool:
        try:
            status = path.stat()
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_mtime >= self.since_s - _CLOCK_SLACK_S

    def obstacle(self) -> str | None:
        """Return what hides channels, and what to do; ``None`` when nothing does."""
        found = [self._level_obstacle(), self._subsystem_obstacle(), self._file_obstacle()]
        return "; ".join(words for words in found if words) or None

    def _level_obstacle(self) -> str | None:
        level = self.environment.get("NCCL_DEBUG")
        if level is None or level.upper() in ("INFO", "ABORT", "TRACE"):
            return None
        return f"NCCL_DEBUG={level} is set in the environment and hides all channels: unset it"

    def _subsystem_obstacle(self) -> str | None:
        """Channel lines are of INIT and of their transport; one of both is enough."""
        text = self.environment.get("NCCL_DEBUG_SUBSYS")
        if text is None:
            return None
        named = set(text.upper().removeprefix("^").split(","))
        is_inverted = text.startswith("^")
        hidden = [name for name in ("INIT", *_TRANSPORTS) if (name in named or "ALL" in named) is is_inverted]
        if "INIT" not in hidden or hidden == ["INIT"]:
            return None
        lost = ", ".join(hidden[1:])
        return f"NCCL_DEBUG_SUBSYS={text} is set in the environment and hides channels over {lost}: unset it"

    def _file_obstacle(self) -> str | None:
        text = self.environment.get("NCCL_DEBUG_FILE")
        if text is None:
            return None
        where = f"NCCL_DEBUG_FILE={text} is set in the environment"
        path = self.folder / expand_debug_file(text, _host_names()[0], os.getpid())
        if not text or str(path.parent) in ("/dev", "/dev/fd", "/proc/self/fd"):
            return f"{where}, so NCCL writes between other output, which can look like it, and is not read: unset it"
        if not path.parent.is_dir():
            return f"{where}, and the folder {path.parent} is not there: make it, or unset the variable"
        if expand_debug_file(text, "h", 1) == expand_debug_file(text, "h", 2):
            return f"{where} without %p, so processes overwrite each other's lines: add .%p to the name, or unset it"
        return None


def expand_debug_file(pattern: str, host: str, pid: int) -> str:
    """Return the name of the file that NCCL of one process opens; it expands ``%h``, ``%p``, ``%%``, and no ``~``."""
    words = {"%h": host, "%p": str(pid), "%%": "%"}
    return re.sub(r"%.", lambda match: words.get(match[0], match[0]), pattern)


def _host_names() -> list[str]:
    """The host's name as NCCL writes it, cut at the first dot and safe in a path; then the whole name."""
    name = re.sub("[%/]", "-", socket.gethostname())
    return list(dict.fromkeys([name.partition(".")[0], name]))
