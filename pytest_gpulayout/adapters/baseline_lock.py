"""One writer at a time: on a local folder by ``flock(2)``, elsewhere by an object that only one writer can create.

Knows how to wait, how long a lock lasts, and whom a dead writer's lock goes to; what is written under it is
:mod:`~pytest_gpulayout.adapters.baseline_files`' and :mod:`~pytest_gpulayout.adapters.baseline_remote`'s matter.

The kernel frees a folder's lock with its holder, and nothing is left behind. A lock object stays when its writer is
killed: whoever has seen it unchanged for :data:`STALE_S` takes it over. Waiting writers judge by their own clock, so
clocks may differ. A holder that was held up for :data:`LEASE_S` writes nothing any more.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pytest_gpulayout.errors import BaselineError

STALE_S = 60.0
"""A lock object that did not change for so long is a dead writer's."""

LEASE_S = STALE_S / 2
"""So long a writer may hold a lock object: well before anybody takes it for dead."""

WAIT_S = 180.0
"""So long a writer waits for the others; each needs some milliseconds."""

SETTLE_S = 0.5
"""Where two writers can create the same object: the time after which the second one's would be seen."""

LOCK_NAME = ".gpulayout.lock"
"""The lock object of a folder whose filesystem is not local, or has no ``flock``."""

LOCAL_FILESYSTEMS = frozenset(
    {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
)
"""Where ``flock`` on a folder keeps all writers apart. On NFS, SMB or FUSE it succeeds, and holds for this machine
alone: Linux passes it on for files only (``fs/nfs/dir.c``: the operations on folders have no ``flock``)."""

_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 0.5
_NO_FLOCK = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What a kernel or a sandbox answers that has no ``flock`` on folders."""


class FolderGone(Exception):
    """Somebody removed the folder between looking and locking; begin again."""


@dataclass(frozen=True, slots=True)
class Time:
    """The clock that is waited by; another one for tests. :param clock: seconds, never going back."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class LockObjects(Protocol):
    """A place for lock objects."""

    def create(self, name: str, content: bytes) -> None:
        """Create an object. :raises FileExistsError: there is one of the name."""

    def content(self, name: str) -> bytes | None:
        """Return what is in an object, ``None`` when there is none."""

    def remove(self, name: str) -> None:
        """Remove an object; it may be gone."""

    def is_exclusive(self, name: str, /) -> bool:
        """Whether of two writers that create an object at once one is refused. :param name: of one that exists."""


class LockObject:
    """A lock by exclusive creation, for one writer.

    :param name: of the object. :param shown: where it is, for messages.
    """

    def __init__(self, objects: LockObjects, name: str, shown: str, time: Time) -> None:
        self._objects, self._name, self._shown, self._time = objects, name, shown, time
        self._owner = f"{socket.gethostname()} pid {os.getpid()} {uuid.uuid4().hex}\n".encode()
        self._taken_at = 0.0

    def take(self) -> None:
        """Wait for the lock and take it.

        :raises BaselineError: others held it for :data:`WAIT_S`.
        """
        deadline = self._time.clock() + WAIT_S
        seen, since, pause = b"", self._time.clock(), _PAUSE_S
        while not self._try():
            holder, now = self._objects.content(self._name) or b"", self._time.clock()
            if holder != seen:
                seen, since = holder, now
            elif now - since >= STALE_S:
                self._break(holder)
            if now >= deadline:
                raise _waited_in_vain(self._shown, f"held by {holder.decode(errors='replace').strip() or 'nobody'}")
            self._time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _try(self) -> bool:
        self._taken_at = self._time.clock()
        try:
            self._objects.create(self._name, self._owner)
        except FileExistsError:  # ours, where a request that had succeeded was repeated
            return self._objects.content(self._name) == self._owner
        if self._objects.is_exclusive(self._name):
            return True
        self._time.sleep(SETTLE_S)
        return self._objects.content(self._name) == self._owner

    def _break(self, holder: bytes) -> None:
        """Remove a dead writer's lock. Only one writer may, and only this lock: a second one could be a living one's.

        :param holder: what the lock held all the time.
        """
        marker = f"{self._name}.{hashlib.sha256(holder).hexdigest()[:12]}"
        try:
            self._objects.create(marker, self._owner)
        except FileExistsError:
            return
        if self._objects.content(self._name) == holder:
            self._objects.remove(self._name)
        self._objects.remove(marker)

    def check(self) -> None:
        """Do nothing while the lock is certain.

        :raises BaselineError: it was held for so long that others may have taken it over.
        """
        held_s = self._time.clock() - self._taken_at
        if held_s >= LEASE_S:
            raise BaselineError(
                f"a baseline had to be changed within {LEASE_S:.0f} s, found {held_s:.0f} s: nothing was written\n"
                f"  in {self._shown}\n  run the same command again",
                path=self._shown,
            )

    def release(self) -> None:
        """Free the lock; one that is not certain any more is left to whoever takes it over."""
        if self._time.clock() - self._taken_at < LEASE_S:
            self._objects.remove(self._name)


@contextmanager
def locked_folder(folder: Path, time: Time) -> Iterator[Callable[[], None]]:
    """Hold the lock on a folder; it may be entered once per thread.

    :returns: what is called right before something is changed: it raises where the lock is not certain any more.
    :raises FolderGone: it was removed before it was locked.
    :raises OSError: it cannot be opened.
    :raises BaselineError: others held the lock for :data:`WAIT_S`.
    """
    descriptor = _open_folder(folder)
    try:
        if _filesystem(descriptor) not in LOCAL_FILESYSTEMS or not _flock(descriptor, folder, time):
            lock = LockObject(_Files(descriptor), LOCK_NAME, str(folder / LOCK_NAME), time)
            lock.take()
            try:
                yield lock.check
            finally:
                lock.release()
            return
        try:
            if not _is_still_there(descriptor, folder):
                raise FolderGone
            yield lambda: None
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would not free it where a child process was forked
    finally:
        os.close(descriptor)


def _open_folder(folder: Path) -> int:
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise FolderGone from error


def _is_still_there(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _filesystem(descriptor: int) -> str:
    """The type of the filesystem that an open file is on, ``""`` where /proc does not tell (proc(5), mountinfo)."""
    try:
        facts = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="utf-8").splitlines()
        mount = next(line.split()[1] for line in facts if line.startswith("mnt_id:"))
        mounts = os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines()
        return next(line.partition(" - ")[2].split()[0] for line in mounts if line.split()[0] == mount)
    except (OSError, StopIteration, IndexError):
        return ""


def _flock(descriptor: int, folder: Path, time: Time) -> bool:
    """Wait for the kernel's lock; ``False`` where the filesystem has none."""
    deadline, pause = time.clock() + WAIT_S, _PAUSE_S / 10
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.clock() >= deadline:
                raise _waited_in_vain(str(folder), "its lock (flock) held by another process") from None
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _PAUSE_S)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            return False
        else:
            return True


class _Files:
    """Lock objects that are files of an open folder."""

    def __init__(self, folder: int) -> None:
        self._folder = folder

    def create(self, name: str, content: bytes) -> None:
        try:
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=self._folder)
        except FileNotFoundError as error:
            raise FolderGone from error
        try:
            os.write(file, content)
        finally:
            os.close(file)

    def content(self, name: str) -> bytes | None:
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._folder)
        except FileNotFoundError:
            return None
        try:
            return os.read(file, 1000)
        finally:
            os.close(file)

    def remove(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._folder)
        except FileNotFoundError:
            pass  # whoever took it over was first

    def is_exclusive(self, _: str, /) -> bool:
        return True


def _waited_in_vain(place: str, found: str) -> BaselineError:
    return BaselineError(
        f"a baseline is changed by one writer at a time, found it {found} for {WAIT_S:.0f} s\n  in {place}\n"
        "  end that process, or remove the lock if nobody writes; then run the same command again",
        path=place,
    )
