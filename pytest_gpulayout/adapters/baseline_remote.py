"""Baselines behind an fsspec URL: ``s3://``, ``gs://``, ``abfs://``, ``memory://``, ``sftp://`` and others.

Writers take turns by a lock object beside the baseline (:mod:`~pytest_gpulayout.adapters.baseline_lock`), and read
back what they wrote. Object stores replace an object as a whole, and refuse to create one twice; of other protocols
neither is known, so there a writer that is killed may leave half a document (which is refused when it is read), and
the lock is as good as its half second of looking twice.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from pytest_gpulayout.adapters.baseline_files import MOST_BYTES
from pytest_gpulayout.adapters.baseline_lock import LockObject, Time
from pytest_gpulayout.errors import BaselineError

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl"}
"""Protocols that know no folders, and create an object only once when asked to: ``pipe_file(mode="create")`` of
s3fs 2026.9 (a PUT with ``If-None-Match``), gcsfs 2026.10 and adlfs 2026.8. A server that speaks S3 without that
condition overwrites, which is why it is tried."""

_ONE_AT_A_TIME = threading.RLock()
"""Threads of this process take turns without asking the place; ``memory://`` is nobody else's, and needs no more."""

_PASSWORD = re.compile(r"(?<=://)([^/@\s:]*):[^/@\s]*@")


class RemoteBaselines:
    """Baselines behind any fsspec URL. :param time: what waiting goes by.

    :raises BaselineError: fsspec, or the package that speaks the protocol, is not installed.
    """

    def __init__(self, url: str, time: Time | None = None) -> None:
        self.root = _without_password(url.rstrip("/"))
        self._time = time or Time()
        with _told(
            f"a folder or an fsspec URL was required for baselines, found {self.root}:",
            "--gpu-baseline-dir",
            "install what the URL needs, e.g. pip install fsspec s3fs",
        ):
            from fsspec.core import url_to_fs

            filesystem, folder = url_to_fs(url.rstrip("/"))
        self._files: Any = filesystem
        self._folder = str(folder).rstrip("/")
        protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
        self._is_object_store = bool(protocols & OBJECT_STORES)
        self._is_here = "memory" in protocols
        self._creates_once: bool | None = None

    def read(self, path: str) -> str | None:
        """Return the text under ``path``, ``None`` when there is none.

        :raises BaselineError: it is there, and cannot be read as UTF-8 text.
        """
        file = self._inside(path)
        advice = "check the access to it; if it is damaged, remove it and record it again: --gpu-baseline=new"
        with _told("a baseline must be readable text, found:", f"{self.root}/{path}", advice):
            content = self.content(file)
            return None if content is None else _limited(content).decode()

    def update(self, path: str, change: Callable[[str | None], str | None]) -> bool:
        """Replace what is under ``path`` by what ``change`` makes of it; see :class:`BaselineStore`.

        :raises BaselineError: it cannot be read or written, or others do not let go of it.
        """
        file = self._inside(path)
        lock = LockObject(self, f"{file}.lock", f"{self.root}/{path}.lock", self._time)
        with _ONE_AT_A_TIME:
            with self._writing(path):
                lock.take()
            try:
                before = self.read(path)
                after = change(before)
                if after != before:
                    lock.check()
                    with self._writing(path):
                        self._replace(file, after)
                    self._verify(path, after)
            finally:
                with self._writing(path):
                    lock.release()
            if after is None:
                self._tidy(file)
        return before is not None

    def _replace(self, file: str, text: str | None) -> None:
        if text is None:
            self.remove(file)
        else:
            self._files.pipe_file(file, _limited(text.encode()))

    def _verify(self, path: str, text: str | None) -> None:
        if self.read(path) != text:
            raise BaselineError(
                "what was stored had to be what is there now, and it is not: somebody writes past the lock, or the "
                f"place answers from a cache\n  in {self.root}/{path}\n"
                "  look at what is there (gpulayout baseline show), and run the same command again",
                path=path,
            )

    def _tidy(self, file: str) -> None:
        """Remove the folders that nothing is left in, below the root; object stores have none."""
        folder = file.rpartition("/")[0]
        while not self._is_object_store and folder.startswith(f"{self._folder}/"):
            try:
                if self._files.ls(folder, detail=False):
                    return
                self._files.rmdir(folder)
            except (OSError, NotImplementedError):
                return  # another writer was first, or such a place keeps its folders
            folder = folder.rpartition("/")[0]

    def paths(self) -> Sequence[str]:
        """Return all stored paths, relative and sorted.

        :raises BaselineError: they cannot be listed.
        """
        advice = "check the access to it, or name another place: --gpu-baseline-dir=URL"
        with _told("a place that lists its baselines was required, found:", self.root, advice):
            self._files.invalidate_cache()  # others write, too
            try:
                found = [str(file) for file in self._files.find(self._folder)]
            except FileNotFoundError:
                found = []
        return sorted(file[len(self._folder) :].lstrip("/") for file in found if file.endswith(".json"))

    # -- lock objects ------------------------------------------------------------------------------------------------

    def create(self, name: str, content: bytes) -> None:
        """Create an object. :raises FileExistsError: there is one of the name, as far as the place can tell."""
        if not self._creates_once and self.content(name) is not None:
            raise FileExistsError(name)
        if self._is_object_store:
            self._files.pipe_file(name, content, mode="create")
        else:
            self._files.makedirs(name.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(name, content)

    def content(self, name: str) -> bytes | None:
        """Return what is in an object, ``None`` when there is none."""
        try:
            found: bytes = self._files.cat_file(name)
        except FileNotFoundError:
            return None
        return found

    def remove(self, name: str) -> None:
        """Remove an object; it may be gone."""
        try:
            self._files.rm_file(name)
        except FileNotFoundError:
            pass  # whoever took it over was first

    def is_exclusive(self, name: str, /) -> bool:
        """Whether the place refuses to create this object, which exists, a second time; asked once."""
        if self._creates_once is None:
            self._creates_once = self._is_object_store and self._refuses_second(name)
        return self._creates_once or self._is_here

    def _refuses_second(self, name: str) -> bool:
        try:
            self._files.pipe_file(name, self._files.cat_file(name), mode="create")
        except FileExistsError:
            return True
        return False

    def _writing(self, path: str) -> AbstractContextManager[None]:
        return _told(
            "the baseline could not be stored:",
            f"{self.root}/{path}",
            "check the access to it, or name a place that can be written to: --gpu-baseline-dir=URL",
        )

    def _inside(self, path: str) -> str:
        if path.startswith("/") or ".." in path.split("/"):
            raise BaselineError(
                f"a baseline must lie inside {self.root}, found the path {path!r}\n  in {self.root}\n"
                "  name a path that gpulayout baseline list shows",
                path=path,
            )
        return f"{self._folder}/{path}"


def _limited(content: bytes) -> bytes:
    if len(content) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"it holds {len(content)} bytes, more than the {MOST_BYTES} of any baseline")
    return content


@contextmanager
def _told(required: str, where: str, advice: str) -> Iterator[None]:
    """Turn the errors of fsspec, and of what it speaks through, into ours; they have no base in common."""
    try:
        yield
    except BaselineError:
        raise
    except Exception as error:
        found = _without_password(str(error)) or type(error).__name__
        raise BaselineError(f"{required} {found}\n  in {where}\n  {advice}", path=where) from error


def _without_password(text: str) -> str:
    return _PASSWORD.sub(r"\1:***@", text)
