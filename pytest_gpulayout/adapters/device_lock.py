"""One lock file per device, so that two CI jobs or two xdist workers never measure on the same hardware.

``flock(2)`` on an open file: the kernel frees it with the last process that holds the file, so a dead owner never
blocks anyone. The keeper inherits the open file and thereby holds the lock for the life of the server.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_gpulayout.ports import Platform, Progress
from pytest_gpulayout.topology import Device

LOCK_FOLDER = "/tmp"  # not TMPDIR: CI systems give every job its own
_POLL_S = 0.2


class DeviceLocks:
    """Locks on a set of devices, taken in one order so that two owners cannot wait for each other."""

    def __init__(self, names: Sequence[str], owner: str, progress: Progress) -> None:
        """Take the locks, waiting for as long as somebody else holds one.

        :param names: identities of the devices (GPU UUIDs, or one name for all cores).
        :param owner: shown to whoever has to wait.
        """
        self._files: list[int] = []
        self.paths: list[str] = []
        try:
            for name in sorted(set(names)):
                path = _lock_path(name)
                self._files.append(_lock(path, name, owner, progress))
                self.paths.append(str(path))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Free the locks; call it when the server is gone."""
        while self.paths:
            remove_lock(self._files.pop(), self.paths.pop())

    def lend(self) -> LentLocks:
        """Return the same locks for one of several servers; this object stays their owner, and frees them."""
        return LentLocks(self.files, tuple(self.paths))

    @property
    def files(self) -> tuple[int, ...]:
        """Open files that a child must inherit to hold the locks, too."""
        return tuple(self._files)


@dataclass(frozen=True, slots=True)
class LentLocks:
    """Locks that are held together with their owner, whose they stay."""

    files: tuple[int, ...]
    paths: tuple[str, ...]

    def release(self) -> None:
        """Leave that to the owner."""

    def lend(self) -> LentLocks:
        """Return these: their owner stays the same."""
        return self


def lock_names(platform: Platform, devices: Sequence[Device]) -> list[str]:
    """Return one name per GPU; all cores together are one device, since ranks, front end and client share them."""
    if platform == "cpu":
        return ["cpu"]
    return [device.uuid or f"gpu-{device.index}" for device in devices]


def remove_lock(file: int, path: str) -> None:
    """Unlink the lock file while it is held, unless somebody has made a new one, and close it."""
    try:
        if os.fstat(file).st_ino == os.stat(path).st_ino:
            os.unlink(path)
    except (FileNotFoundError, PermissionError):
        pass  # the keeper was first; or it is another user's, and without a holder it locks nothing
    finally:
        os.close(file)


def _lock_path(name: str) -> Path:
    folder = LOCK_FOLDER if os.access(LOCK_FOLDER, os.W_OK) else tempfile.gettempdir()
    return Path(folder) / f"gpulayout-{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.lock"


def _open_lock(path: Path) -> int:
    """Open the lock file, making it if needed, in a way that works between users.

    Linux refuses ``O_CREAT`` on another user's file in /tmp (fs.protected_regular), so opening comes first.
    """
    while True:
        try:
            return os.open(path, os.O_RDWR)
        except FileNotFoundError:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                continue  # somebody else made it in between
            os.fchmod(file, 0o666)
            return file


def _lock(path: Path, name: str, owner: str, progress: Progress) -> int:
    while True:
        file = _open_lock(path)
        try:
            if _holds(file, path):
                os.ftruncate(file, 0)
                os.pwrite(file, f"{owner} (pid {os.getpid()})".encode(), 0)
                return file
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        progress(f"waiting for {name}, held by {holder}")
        time.sleep(_POLL_S)


def _holds(file: int, path: Path) -> bool:
    """Try the lock; a file that its last owner has unlinked in the meantime locks nothing."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(file).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False
