"""Baselines in a folder or behind an fsspec URL. A reader never meets half a file.

In a folder each write is a rename. Object stores (``s3://``, ``gs://``) replace an object as a whole.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pytest_gpulayout.errors import BaselineError
from pytest_gpulayout.ports import BaselineStore


class BaselineFolder:
    """A folder of baseline documents. :param root: need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self._root = root

    def read(self, path: str) -> str | None:
        """Return the text under ``path``, ``None`` when there is none.

        :raises BaselineError: it is there, and cannot be read as UTF-8 text.
        """
        file = self._inside(path)
        try:
            return file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise BaselineError(
                f"a baseline must be a readable text file, found: {error}\n  in {file}\n"
                "  restore it (git checkout), or record it again: --gpu-baseline=update",
                path=str(file),
            ) from error

    def update(self, path: str, change: Callable[[str | None], str | None]) -> bool:
        """Replace what is under ``path`` by what ``change`` makes of it."""
        before = self.read(path)
        after = change(before)
        if after is not None:
            self._write(path, after)
        return before is not None

    def _write(self, path: str, text: str) -> None:
        """Replace what is under ``path`` in one step.

        :raises BaselineError: the folder cannot be written to.
        """
        file = self._inside(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as out:
                    out.write(text)
                    out.flush()
                    os.fsync(out.fileno())
                os.chmod(temporary, 0o644)
                os.replace(temporary, file)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise BaselineError(
                f"the baseline could not be stored: {error}\n  in {file}\n"
                "  name a folder that can be written to: --gpu-baseline-dir=DIR",
                path=str(file),
            ) from error

    def paths(self) -> Sequence[str]:
        """Return all stored paths, relative and sorted."""
        return sorted(str(file.relative_to(self._root)) for file in self._root.rglob("*.json"))

    def _inside(self, path: str) -> Path:
        """The file of a relative path; names come from data, so they are not trusted to stay inside."""
        file = (self._root / path).resolve()
        if not file.is_relative_to(self._root.resolve()):
            raise BaselineError(f"a baseline must lie inside {self._root}, found the path {path!r}", path=str(file))
        return file


class RemoteBaselines:
    """Baselines behind any fsspec URL.

    :raises BaselineError: fsspec, or the package that speaks the protocol, is not installed.
    """

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        try:
            from fsspec.core import url_to_fs

            filesystem, folder = url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise BaselineError(
                f"a folder or an fsspec URL was required for baselines, found {url}: {error}\n"
                "  in --gpu-baseline-dir\n  install what the URL needs, e.g. pip install fsspec s3fs",
                path=url,
            ) from error
        self._files: Any = filesystem
        self._folder = str(folder).rstrip("/")

    def read(self, path: str) -> str | None:
        """Return the text under ``path``, ``None`` when there is none.

        :raises BaselineError: it is there, and cannot be read as UTF-8 text.
        """
        file = self._inside(path)
        try:
            text: str = self._files.cat_file(file).decode()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise BaselineError(
                f"a baseline must be readable text, found: {error}\n  in {self.root}/{path}\n"
                "  check the access to it, or record it again: --gpu-baseline=update",
                path=file,
            ) from error
        return text

    def update(self, path: str, change: Callable[[str | None], str | None]) -> bool:
        """Replace what is under ``path`` by what ``change`` makes of it."""
        before = self.read(path)
        after = change(before)
        if after is not None:
            self._write(path, after)
        return before is not None

    def _write(self, path: str, text: str) -> None:
        """Replace what is under ``path``.

        :raises BaselineError: it cannot be written.
        """
        file = self._inside(path)
        try:
            self._files.makedirs(file.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(file, text.encode())
        except OSError as error:
            raise BaselineError(
                f"the baseline could not be stored: {error}\n  in {self.root}/{path}\n"
                "  name a place that can be written to: --gpu-baseline-dir=URL",
                path=file,
            ) from error

    def paths(self) -> Sequence[str]:
        """Return all stored paths, relative and sorted."""
        found = (str(file) for file in self._files.find(self._folder))
        return sorted(file[len(self._folder) :].lstrip("/") for file in found if file.endswith(".json"))

    def _inside(self, path: str) -> str:
        if path.startswith("/") or ".." in path.split("/"):
            raise BaselineError(f"a baseline must lie inside {self.root}, found the path {path!r}", path=path)
        return f"{self._folder}/{path}"


def open_baselines(place: str) -> BaselineStore:
    """Return the store of a folder, or of an fsspec URL such as ``s3://bucket/baselines``."""
    place = place.removeprefix("file://")  # fsspec would not replace a file in one step
    return RemoteBaselines(place) if "://" in place else BaselineFolder(Path(place))
