"""A process of ours below a keeper, which ends it and all that it started, whatever way pytest ended.

Knows how to start a keeper (:mod:`~pytest_gpulayout.adapters.keeper`), what to tell it and what it says. Leaves to
its owner what the process is, when it is ready, and how its end is explained.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from pytest_gpulayout.adapters import keeper as keeper_script
from pytest_gpulayout.adapters.device_lock import DeviceLocks, LentLocks


class KeptProcess:
    """One running process and its keeper.

    :param command: argument list, without secrets. :param environment: of the process, secrets included.
    :param log: where its output goes. :param run_dir: a folder of its own, which goes with it.
    :param locks: that are held while it runs. :param cpus: that it may use, empty for those of this process.
    :param term_timeout_s: how long it may take to end when it is asked to.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        log: Path,
        run_dir: Path,
        locks: DeviceLocks | LentLocks,
        cpus: Sequence[int] = (),
        term_timeout_s: float,
    ) -> None:
        config: keeper_script.KeeperConfig = {
            "command": list(command),
            "cpus": list(cpus),
            "log": str(log),
            "run_dir": str(run_dir),
            "locks": list(locks.paths),
            "term_timeout_s": term_timeout_s,
        }
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", str(keeper_script.__file__), json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment),
            start_new_session=True,  # Ctrl-C in the terminal is for pytest, which then asks the keeper to stop
            pass_fds=locks.files,
        )
        assert self._keeper.stdout is not None
        os.set_blocking(self._keeper.stdout.fileno(), False)
        self._messages: dict[str, object] = {}
        self._is_gone = False

    @property
    def keeper_pid(self) -> int:
        """Process id of the keeper, for messages."""
        return self._keeper.pid

    @property
    def exit_code(self) -> int | None:
        """Of the process, ``None`` while it runs; a keeper that died counts as a process that was killed."""
        assert self._keeper.stdout is not None
        if not self._is_gone:
            while line := self._keeper.stdout.readline():
                self._messages.update(json.loads(line))
            if "exited" not in self._messages and self._keeper.poll() is not None:
                self._messages["exited"] = self._keeper.returncode
        code = self._messages.get("exited")
        return code if isinstance(code, int) else None

    def processes(self) -> list[psutil.Process]:
        """Return it and all that it started, as far as they live."""
        if self._is_gone:
            return []
        try:
            return psutil.Process(self._keeper.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def note_segments(self) -> None:
        """Let the keeper remember the shared memory that is mapped now."""
        self._tell("note")

    def ask_to_end(self) -> None:
        """Begin to end it; does not wait."""
        if not self._is_gone:
            self._tell("stop")

    def end(self, timeout_s: float) -> None:
        """End it and all that it started, and return when they are gone; may be called again.

        :raises subprocess.TimeoutExpired: some of it still runs.
        """
        if self._is_gone:
            return
        self.ask_to_end()
        self._keeper.communicate(timeout=timeout_s)
        self._is_gone = True

    def _tell(self, command: str) -> None:
        assert self._keeper.stdin is not None
        if self._keeper.stdin.closed:  # which tells it to stop, too
            return
        try:
            self._keeper.stdin.write(command + "\n")
            self._keeper.stdin.flush()
        except BrokenPipeError:
            pass  # it has already ended everything and gone


def describe_exit(code: int) -> str:
    """``exit code 1``, ``ended by SIGKILL``. :param code: negative for a signal."""
    return f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
