"""Baselines in a folder: a reader never meets half a file, and of writers at the same time each one's change stays.

A write goes to a temporary file that is renamed over the old one, under the folder's lock. A writer that is killed
leaves the old file or the new one, and perhaps its temporary file, which is never read and which the next writer
removes. Behind a URL baselines are kept by :mod:`~pytest_gpulayout.adapters.baseline_remote`.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pytest_gpulayout.adapters.baseline_lock import FolderGone, Time, locked_folder
from pytest_gpulayout.errors import BaselineError
from pytest_gpulayout.ports import BaselineStore

MOST_BYTES = 32 * 2**20
"""Of one baseline; ten thousand sessions are smaller."""

_TEMPORARY = (".gpulayout-", ".tmp")
"""How the name of a temporary file begins and ends; no baseline's name begins with a dot."""

_MOST_ATTEMPTS = 100
"""To lock a folder that others remove again and again because nothing is left in it."""


class BaselineFolder:
    """A folder of baseline documents. :param root: need not exist yet. :param time: what waiting goes by."""

    def __init__(self, root: Path, time: Time | None = None) -> None:
        self.root = str(root)
        self._root = root
        self._time = time or Time()

    def read(self, path: str) -> str | None:
        """Return the text under ``path``, ``None`` when there is none.

        :raises BaselineError: it is there, and is no readable UTF-8 text.
        """
        file = self._inside(path)
        try:
            return _read_file(file)
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise BaselineError(
                f"a baseline must be a readable text file, found: {error}\n  in {file}\n"
                "  restore it (git checkout), or remove it and record it again: --gpu-baseline=new",
                path=str(file),
            ) from error

    def update(self, path: str, change: Callable[[str | None], str | None]) -> bool:
        """Replace what is under ``path`` by what ``change`` makes of it; see :class:`BaselineStore`.

        :raises BaselineError: it cannot be read, or the folder cannot be written to; all is as it was.
        """
        for _ in range(_MOST_ATTEMPTS):
            file = self._inside(path)
            try:
                return self._update(path, file, change)
            except FolderGone:
                continue
        raise _not_stored(FileNotFoundError(errno.ENOENT, "the folder disappears again and again"), file)

    def _update(self, path: str, file: Path, change: Callable[[str | None], str | None]) -> bool:
        stored = None
        try:
            with ExitStack() as lock:
                with _told(file):
                    _make_folder(file.parent)
                    check = lock.enter_context(locked_folder(file.parent, self._time))
                    _remove_temporaries(file.parent)
                before = stored = self.read(path)
                after = change(before)
                if after != before:
                    with _told(file):
                        _replace(file, after, check)
                    stored = after
            return before is not None
        finally:
            if stored is None:
                self._tidy(file.parent)

    def _tidy(self, folder: Path) -> None:
        """Remove the folders that nothing is left in, up to the root, which stays."""
        root = self._root.resolve()
        while folder != root and folder.is_relative_to(root):
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass  # it was never made, or another writer was first
            except OSError:
                return  # something is in it
            folder = folder.parent

    def paths(self) -> Sequence[str]:
        """Return all stored paths, relative and sorted.

        :raises BaselineError: a folder cannot be listed.
        """
        found = []
        try:
            for folder, _, names in os.walk(self._root, onerror=_raise):
                inside = Path(folder).relative_to(self._root)
                found += [(inside / name).as_posix() for name in names if _is_baseline(name)]
        except OSError as error:
            raise BaselineError(
                f"a readable folder of baselines was required, found: {error}\n  in {self._root}\n"
                "  name another one: --gpu-baseline-dir=DIR",
                path=self.root,
            ) from error
        return sorted(found)

    def _inside(self, path: str) -> Path:
        """The file of a relative path; names come from data, and links from whoever made them: neither is trusted."""
        file = (self._root / path).resolve()
        if not file.is_relative_to(self._root.resolve()):
            raise BaselineError(
                f"a baseline must lie inside {self._root}, found the path {path!r}\n  which is {file}\n"
                "  remove the link that leads there, or name its target: --gpu-baseline-dir=DIR",
                path=str(file),
            )
        return file


def open_baselines(place: str) -> BaselineStore:
    """Return the store of a folder, or of an fsspec URL such as ``s3://bucket/baselines``."""
    from pytest_gpulayout.adapters.baseline_remote import RemoteBaselines

    place = place.removeprefix("file://").removeprefix("local://")  # fsspec would not replace a file in one step
    return RemoteBaselines(place) if "://" in place else BaselineFolder(Path(place))


def _is_baseline(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(".")


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # no folder, or one that was removed meanwhile, holds no baseline
        raise error


def _read_file(file: Path) -> str:
    with open(file, "rb", opener=_without_waiting) as readable:
        found = os.fstat(readable.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        if found.st_size > MOST_BYTES:
            raise OSError(errno.EFBIG, f"it holds {found.st_size} bytes, more than the {MOST_BYTES} of any baseline")
        return readable.read().decode()


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe in place of a file would wait for a writer


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """Turn what the system refuses into an error that says what to type."""
    try:
        yield
    except FileNotFoundError as error:
        raise FolderGone from error
    except (OSError, UnicodeEncodeError) as error:
        raise _not_stored(error, file) from error


def _not_stored(error: Exception, file: Path) -> BaselineError:
    return BaselineError(
        f"the baseline could not be stored, and nothing was changed: {error}\n  in {file}\n"
        "  make room or allow writing there, or name another folder: --gpu-baseline-dir=DIR",
        path=str(file),
    )


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, each one durable in the one that holds it."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for made in reversed(missing):
        try:
            made.mkdir()
        except FileExistsError:
            continue  # another writer was first; where it is a file, opening it as a folder will say so
        _sync_folder(made.parent)


def _remove_temporaries(folder: Path) -> None:
    """Remove what dead writers left: who holds the lock is the only one who may have a temporary file."""
    begin, end = _TEMPORARY
    for name in os.listdir(folder):
        if name.startswith(begin) and name.endswith(end):
            (folder / name).unlink(missing_ok=True)


def _replace(file: Path, text: str | None, check: Callable[[], None]) -> None:
    """Put the new text in place of the file, or remove it, in one step. :param check: called right before."""
    if text is None:
        check()
        file.unlink()
    else:
        temporary = file.with_name(uuid.uuid4().hex.join(_TEMPORARY))
        try:
            _write_new(temporary, text.encode(), like=file)
            check()
            os.replace(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    try:
        _sync_folder(file.parent)
    except OSError as error:
        raise BaselineError(
            f"the baseline was replaced, and the disk did not confirm it: {error}\n  in {file}\n"
            "  check the disk; until then the old text may come back when the machine stops",
            path=str(file),
        ) from error


def _write_new(temporary: Path, content: bytes, *, like: Path) -> None:
    """Write a new file to the disk. :param like: where it exists, its owner and permissions are taken over."""
    if len(content) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"{len(content)} bytes are more than the {MOST_BYTES} of any baseline")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if like.exists():
            _take_over_permissions(descriptor, like)
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_over_permissions(descriptor: int, like: Path) -> None:
    if not os.access(like, os.W_OK):
        raise PermissionError(errno.EACCES, "it is write-protected", str(like))
    old = like.stat()
    try:
        os.fchown(descriptor, old.st_uid, old.st_gid)
    except PermissionError:
        pass  # only root may give a file away; the rights below are the same ones
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def _sync_folder(folder: Path) -> None:
    """Make names durable, too; some network filesystems cannot, and need not."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
