"""Finds out what ``--gpu-base`` names: another Python with vLLM in it, or a server that already runs.

Knows virtual environments and package metadata. Leaves asking a server to
:mod:`~pytest_gpulayout.adapters.running_server`, starting one to :mod:`~pytest_gpulayout.adapters.vllm_process`, and
measuring both to the plugin.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from pytest_gpulayout.adapters.host import DISTRIBUTIONS
from pytest_gpulayout.adapters.running_server import Role, find_running_server
from pytest_gpulayout.errors import MeasurementError, ServerStartFailed
from pytest_gpulayout.ports import Endpoint

KEY_VARIABLE = "GPULAYOUT_BASE_API_KEY"
"""Environment variable that holds the key of a base that is a URL."""

_TIMEOUT_S = 60.0
_BASE = Role("base", KEY_VARIABLE)
_MARK = "gpulayout-base:"
_VENV_PYTHONS = ("bin/python", "bin/python3")
_NAME_IT = "name a Python, a folder of a virtual environment, or a URL: --gpu-base=/opt/vllm-old"
_SCRIPT = f"""
import json, sys
from importlib import metadata, util
found = {{"python": "%d.%d" % sys.version_info[:2]}}
for name, distributions in {dict(DISTRIBUTIONS)!r}.items():
    for distribution in distributions:
        try:
            found.setdefault(name, metadata.version(distribution))
        except metadata.PackageNotFoundError:
            pass
spec = util.find_spec("vllm")
found["folder"] = next(iter(spec.submodule_search_locations or ()), None) if spec else None
print({_MARK!r} + json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class BasePython:
    """A Python that has vLLM. :param name: as the user named it. :param versions: of ``vllm``, ``torch``, ...

    :param folder: from which it imports vLLM, where that is known.
    """

    name: str
    python: str
    versions: Mapping[str, str | None]
    folder: str | None = None


@dataclass(frozen=True, slots=True)
class BaseServer:
    """A server that already runs. :param version: of its vLLM, ``None`` where it does not tell.

    :param models: the names that it serves.
    """

    name: str
    endpoint: Endpoint
    version: str | None
    models: tuple[str, ...]

    def serving(self, model: str) -> Endpoint:
        """Return where it answers for a model.

        :raises MeasurementError: it does not serve a model of this name.
        """
        if model in self.models:
            return Endpoint(self.endpoint.url, model, self.endpoint.api_key)
        raise MeasurementError(
            f"the base must serve the model under the same name, {model}; found {', '.join(self.models) or 'none'}\n"
            f"  at {self.endpoint.url}\n"
            f"  start it with --served-model-name {model}, or name its model: --gpu-model=..."
        )


def is_url(text: str) -> bool:
    """Whether a base is a server that already runs."""
    return text.startswith(("http://", "https://"))


def resolve_python(text: str, folder: Path) -> str:
    """Return the interpreter that a path, a folder of a virtual environment or a command names.

    :param folder: that a relative path starts from.
    :raises ValueError: there is none.
    """
    path = Path(os.path.abspath(folder / Path(text).expanduser()))  # a symbolic link is what makes it a venv's
    if path.is_dir():
        inside = next((path / name for name in _VENV_PYTHONS if os.access(path / name, os.X_OK)), None)
        if inside is None:
            raise ValueError(f"a folder with bin/python was required, found none\n  in {path}\n  {_NAME_IT}")
        return str(inside)
    if path.is_file():
        if not os.access(path, os.X_OK):
            raise ValueError(f"a Python that can be run was required, found a file\n  at {path}\n  {_NAME_IT}")
        return str(path)
    if os.sep not in text and (command := shutil.which(text)):
        return command
    raise ValueError(f"a Python with vLLM was required, found nothing\n  at {path}\n  {_NAME_IT}")


def find_base_python(name: str, python: str) -> BasePython:
    """Run an interpreter once, as its server will be run, and read which vLLM it has, without importing it.

    It sees the same environment and folder as the server, so that a ``PYTHONPATH`` that brings in another vLLM than
    the installed one shows here. Its input is closed, and what it loads has a time limit.

    :param name: as the user named it.
    :raises ServerStartFailed: it cannot be run, or has no vLLM.
    """
    try:
        done = subprocess.run(
            [python, "-c", _SCRIPT],
            check=False,
            timeout=_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _unusable(python, str(error)) from error
    line = next((line for line in done.stdout.splitlines() if line.startswith(_MARK)), None)
    if done.returncode != 0 or line is None:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise _unusable(python, f"exit code {done.returncode}: {last[:200]}")
    found: dict[str, Any] = orjson.loads(line.removeprefix(_MARK))
    if found.get("folder") is None:
        raise ServerStartFailed(
            "a base with vLLM was required, and vLLM is not installed in it\n"
            f"  in {python}\n  install it there ({python} -m pip install vllm), or name another one: --gpu-base=..."
        )
    versions = {name: found.get(name) for name in ("python", *DISTRIBUTIONS)}
    return BasePython(name, python, versions, found["folder"])


def shared_vllm(base: BasePython, python: str = sys.executable) -> str | None:
    """Return the folder from which both sides import vLLM; ``None`` where each has its own, or that is unknown."""
    if base.folder is None or base.python == python:
        return base.folder
    try:
        candidate = find_base_python("candidate", python)
    except ServerStartFailed:  # its launcher says so, or has no need of it
        return None
    return base.folder if candidate.folder == base.folder else None


def find_base_server(url: str) -> BaseServer:
    """Ask a server what it is. Its key is taken from :data:`KEY_VARIABLE`.

    :param url: without a trailing slash; ``/v1`` may stand at its end.
    :raises MeasurementError: it does not answer, or refuses the key.
    """
    found = find_running_server(url, _BASE)
    return BaseServer(found.endpoint.url, found.endpoint, found.version, tuple(model.name for model in found.models))


def _unusable(python: str, found: str) -> ServerStartFailed:
    return ServerStartFailed(
        f"a Python with vLLM was required as base, and it cannot be run: {found}\n  at {python}\n"
        f"  check that it starts: {python} --version"
    )
