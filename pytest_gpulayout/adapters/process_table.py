"""What the table of processes tells of some that may end while it is read."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import psutil


def title_of(process: psutil.Process) -> str:
    """Return its command line, which vLLM overwrites with a title; ``""`` where it has ended or hides it."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def parents_of(processes: Iterable[psutil.Process]) -> dict[int, int]:
    """Return the parent of each by process id, without those that have ended."""
    found = {}
    for process in processes:
        with suppress(psutil.Error):
            found[process.pid] = process.ppid()
    return found
