"""Baselines as they were in a revision of a git repository. Reads only; nothing is checked out."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from pytest_gpulayout.errors import BaselineError


def read_revision(revision: str, folder: Path) -> dict[str, str]:
    """Return the text of each baseline that a folder held in a revision, by its path in the folder.

    :param revision: anything that git understands, such as ``origin/main``. :param folder: need not exist any more.
    :raises BaselineError: no repository, no such revision, no git, or a file that is not UTF-8.
    """
    place = folder.resolve()
    top = next(parent for parent in (place, *place.parents) if parent.is_dir())
    inside = place.relative_to(top).as_posix()
    commit = _git(top, revision, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    listed = _git(top, revision, "ls-tree", "-r", "-z", "--name-only", commit.strip(), "--", f"./{inside}")
    paths = [name for name in listed.split("\0") if name.endswith(".json")]
    return {
        os.path.relpath(top / path, place): _git(top, revision, "cat-file", "blob", f"{commit.strip()}:./{path}")
        for path in paths
    }


def _git(where: Path, revision: str, *arguments: str) -> str:
    command = ["git", "-C", str(where), *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
        )
        if done.returncode == 0:
            return done.stdout.decode()
        said = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
    except (OSError, UnicodeDecodeError, subprocess.TimeoutExpired) as error:
        said = str(error)
    raise BaselineError(
        f"a revision with baselines was required, git says: {said}\n  {revision} of the repository at {where}\n"
        "  name one that git log knows, and fetch it where the clone is shallow: git fetch origin REV",
        path=str(where),
    )
