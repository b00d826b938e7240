"""The process that stands between pytest and a server, so that nothing outlives pytest.

Run as a script with the standard library only: ``python -I keeper.py CONFIG_JSON``. vLLM's engine and worker
processes survive the death of their API server (there is no parent-death signal in vLLM), and pytest itself may
be killed with SIGKILL. So the keeper makes itself a *child subreaper* (prctl(2)): every descendant that loses its
parent becomes the keeper's child, and none can escape. It ends all of them when its standard input closes, which
the kernel does for us whatever way pytest ended.

Standard input: ``note`` remembers the shared-memory segments mapped now; ``stop`` or end of file ends the server.
Standard output, one JSON object a line: ``{"started": pid}``, ``{"exited": code}`` (the server went away by itself,
negative for a signal), ``{"stopped": {"killed": [pids], "segments": [names]}}`` when all is gone.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypedDict

SHARED_MEMORY = "/dev/shm/"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.1
_FIRST_INHERITED, _BEYOND_INHERITED = 3, 1024


class KeeperConfig(TypedDict):
    """What the keeper is told, as one JSON argument; secrets travel in the environment.

    ``cpus`` are those that the server may use; with an empty list it inherits the keeper's.
    """

    command: list[str]
    cpus: list[int]
    log: str
    run_dir: str
    locks: list[str]
    term_timeout_s: float


def descendants(root: int) -> list[int]:
    """Process ids below ``root``, parents first, as /proc shows them now; zombies are left out."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (status := _stat(int(entry))) and status[1] != "Z":
            children.setdefault(status[0], []).append(int(entry))
    found, queue = [], [root]
    while queue:
        for child in children.get(queue.pop(0), []):
            found.append(child)
            queue.append(child)
    return found


def _stat(pid: int) -> tuple[int, str] | None:
    """(parent pid, state) of a process, ``None`` when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]  # the name before it may hold blanks and brackets
    return int(parent), state


def mapped_segments(pids: Iterable[int]) -> set[str]:
    """Names under /dev/shm that these processes have mapped and that still exist there."""
    names: set[str] = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        names |= {line[line.index(SHARED_MEMORY) :] for line in lines if SHARED_MEMORY in line}
    return {name for name in names if os.path.exists(name)}


class Keeper:
    """Owns one server process and everything below it."""

    def __init__(self, config: KeeperConfig) -> None:
        self._config = config
        self._segments: set[str] = set()
        # A model's weights may lie in shared memory, too, and the server maps them: what was there is not ours.
        self._foreign = set(map(str, Path(SHARED_MEMORY).glob("*")))
        self._exit_code: int | None = None
        self._input = ""
        self._stop_wanted = False

    def stop(self, *_: object) -> None:
        """End the server soon; a signal handler."""
        self._stop_wanted = True

    def run(self) -> None:
        """Start the server, wait for it or for pytest, and leave nothing behind."""
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        if self._config["cpus"]:
            os.sched_setaffinity(0, self._config["cpus"])  # the server inherits them from us
        with open(self._config["log"], "ab") as log:
            server = subprocess.Popen(
                self._config["command"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_keeper,
            )
        self._say({"started": server.pid})
        self._wait(server.pid)
        killed = self._end_all(server.pid)
        removed = self._remove_segments()
        shutil.rmtree(self._config["run_dir"], ignore_errors=True)
        os.closerange(_FIRST_INHERITED, _BEYOND_INHERITED)  # the locks among them, which are held until now
        for lock in self._config["locks"]:
            _remove_lock(lock)
        self._say({"stopped": {"killed": killed, "segments": removed}})

    def _wait(self, server_pid: int) -> None:
        """Return when the server has gone, or pytest wants it to go, or pytest has gone."""
        while True:
            self._reap(server_pid)
            if self._exit_code is not None:
                self._say({"exited": self._exit_code})
                return
            if self._stop_wanted:
                return
            if not select.select([0], [], [], _POLL_S)[0]:
                continue
            chunk = os.read(0, 4096).decode()
            if not chunk:
                return
            self._input += chunk
            *commands, self._input = self._input.split("\n")
            if "note" in commands:
                self._segments |= mapped_segments(descendants(os.getpid()))
            self._stop_wanted |= "stop" in commands

    def _reap(self, server_pid: int) -> bool:
        """Collect who has ended; ``False`` when nobody is left, orphans included, since they become our children."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == server_pid:
                self._exit_code = os.waitstatus_to_exitcode(status)

    def _end_all(self, server_pid: int) -> list[int]:
        """SIGTERM first, so that vLLM frees what it holds; SIGKILL for what is left. Returns what was killed.

        The server ends its own processes. What it leaves behind when it has gone gets SIGTERM from us. An engine that
        is still loading goes on for a while and maps more shared memory, so that is looked at until the end.
        """
        deadline = time.monotonic() + self._config["term_timeout_s"]
        asked: set[int] = set()
        while self._reap(server_pid) and time.monotonic() < deadline:
            alive = descendants(os.getpid())
            self._segments |= mapped_segments(alive)
            for pid in [server_pid] if self._exit_code is None else alive:
                if pid not in asked:
                    _signal(pid, signal.SIGTERM)
                    asked.add(pid)
            time.sleep(_POLL_S)
        killed: set[int] = set()
        while self._reap(server_pid):
            alive = descendants(os.getpid())
            self._segments |= mapped_segments(alive)
            for pid in alive:
                _signal(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(_POLL_S)
        return sorted(killed)

    def _remove_segments(self) -> list[str]:
        """Unlink what the server left in shared memory, unless somebody else has it mapped.

        vLLM's CPU communicator never unlinks its segments (``vllm_dist_<id>-tp:0-...``); they are named after a
        file that it makes in its temporary folder, which is ours.
        """
        for marker in Path(self._config["run_dir"]).rglob("vllm_dist_*"):
            self._segments |= {str(path) for path in Path(SHARED_MEMORY).glob(f"{marker.name}*")}
        # shm_open(3) knows no folders, so a file in one is no segment either.
        ours = {name for name in self._segments - self._foreign if os.path.dirname(name) + "/" == SHARED_MEMORY}
        left = {name for name in ours if os.path.exists(name)}
        in_use = mapped_segments(_other_processes()) if left else set()
        for name in left - in_use:
            os.unlink(name)
        return sorted(left - in_use)

    @staticmethod
    def _say(message: dict[str, object]) -> None:
        try:
            os.write(1, (json.dumps(message) + "\n").encode())
        except BrokenPipeError:
            pass  # pytest is gone; there is nobody to tell, and the work still has to be done


def _die_with_keeper() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _remove_lock(path: str) -> None:
    """Unlink a lock file that nobody holds any more: pytest may, and keepers of other servers on these devices."""
    try:
        file = os.open(path, os.O_RDWR)
    except (FileNotFoundError, PermissionError):
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_ino == os.stat(path).st_ino:
            os.unlink(path)
    except (BlockingIOError, FileNotFoundError, PermissionError):
        pass  # the last holder removes it; in /tmp only its owner may, and without a holder it locks nothing
    finally:
        os.close(file)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _other_processes() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid())


def main() -> None:
    """Entry point: ignore the terminal's signals, take SIGTERM as the wish to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    keeper = Keeper(json.loads(sys.argv[1]))
    signal.signal(signal.SIGTERM, keeper.stop)
    keeper.run()


if __name__ == "__main__":
    main()
