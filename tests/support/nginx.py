"""nginx for tests: whether it is there, and which processes are of it."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import pytest

from pytest_gpulayout.adapters.nginx_proxy import find_nginx
from pytest_gpulayout.errors import ServerStartFailed


def has_nginx() -> bool:
    try:
        find_nginx()
    except ServerStartFailed:
        return False
    return True


needs_nginx = pytest.mark.skipif(not has_nginx(), reason="needs nginx: apt-get install nginx-light")


def nginx_processes(folder: str) -> list[psutil.Process]:
    """Those of proxies whose own folder lies in this one; nginx overwrites its environment, so no marker tells."""
    found = [
        process for process in psutil.process_iter(["cmdline", "ppid"]) if _is_master(process.info["cmdline"], folder)
    ]
    pids = {process.pid for process in found}
    masters = [process for process in found if process.info["ppid"] not in pids]  # a worker is titled a moment later
    return [process for master in masters for process in (master, *master.children())]


def _is_master(command: Sequence[str] | None, folder: str) -> bool:
    words = " ".join(command or ())
    return words.startswith("nginx: master process ") and f" -p {folder}" in words


def are_gone(processes: Sequence[psutil.Process]) -> bool:
    return not any(map(_lives, processes))


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
