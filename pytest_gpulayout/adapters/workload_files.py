"""Reads the workloads that users describe: in ``pyproject.toml``, or in TOML and JSON files.

Knows where they stand and how prompts lie beside them. Leaves what a workload may say to
:mod:`~pytest_gpulayout.workload`.

A file describes one workload, or several by name. One table stands in each ``pyproject.toml``::

    [tool.pytest-gpulayout.workloads.chat-16]
    api = "chat"
    input_tokens = 512
    output_tokens = 128
    concurrency = 16
    requests = 64
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_gpulayout.errors import WorkloadError
from pytest_gpulayout.workload import BUILTIN_WORKLOADS, Workload, find_workload, workload_from_mapping

PROJECT_FILE = "pyproject.toml"
PROJECT_TABLE = ("tool", "pytest-gpulayout", "workloads")

_SUFFIXES = (".toml", ".json")
_REQUIRED_KEY = "output_tokens"


def load_workload(text: str, *, folder: Path, project: Path | None = None) -> Workload:
    """Return the workload that an option names.

    :param text: the name of a built-in workload or of one in ``pyproject.toml``; or a file, ``FILE.toml`` or
        ``FILE.json``, and ``FILE.toml#NAME`` for one of several in it.
    :param folder: that a file's path is relative to. :param project: folder of ``pyproject.toml``; ``folder`` unless
        given.
    :raises WorkloadError: there is no such workload or file, or it does not follow the schema.
    """
    path, _, name = text.partition("#")
    if not path.lower().endswith(_SUFFIXES):
        return find_workload(text, project_workloads(folder if project is None else project))
    return _from_file(folder / path, name)


def project_workloads(folder: Path) -> dict[str, Workload]:
    """Return the workloads in the ``pyproject.toml`` of a folder, by name; none where there is no such file.

    :raises WorkloadError: the file cannot be read, or one of them does not follow the schema.
    """
    path = folder / PROJECT_FILE
    return _read_all(_table(_parse(path), path), path) if path.is_file() else {}


def _from_file(path: Path, name: str) -> Workload:
    document = _parse(path)
    table = _table(document, path) if path.name == PROJECT_FILE else document
    if _REQUIRED_KEY in table or not all(isinstance(value, dict) for value in table.values()):
        if name:
            raise _fault("several workloads by name are required", f"one without a name, #{name} was asked for", path)
        return _read({"name": path.stem, **table}, path)
    known = _read_all(table, path)
    if not name and len(known) == 1:
        return next(iter(known.values()))
    if name not in known:
        found = f"#{name}" if name else f"no name, and {len(known) or 'no'} workloads"
        choice = ", ".join(f"{path.name}#{key}" for key in known) or "nothing yet: describe one first"
        raise _fault("one workload of the file must be named", found, path, f"use one of: {choice}")
    return known[name]


def _read_all(table: Mapping[str, Any], path: Path) -> dict[str, Workload]:
    for name, mapping in table.items():
        if not isinstance(mapping, dict):
            raise _fault("each workload must be a table of its own", f"{name} = {mapping!r}", path)
        if mapping.get("name", name) != name:
            found = f"name = {mapping['name']!r} in the table {name!r}"
            raise _fault("a workload in a table has the table's name", found, path, "leave the key out")
    return {name: _read({"name": name, **mapping}, path) for name, mapping in table.items()}


def _read(mapping: Mapping[str, Any], path: Path) -> Workload:
    if (name := mapping["name"]) in BUILTIN_WORKLOADS:
        advice = f"choose another name; the built-in ones are {', '.join(BUILTIN_WORKLOADS)}"
        raise _fault("a workload needs a name of its own", f"{name!r}, which is built in", path, advice)
    try:
        return workload_from_mapping(_with_prompts(mapping, path))
    except WorkloadError as error:
        raise WorkloadError(f"{error}\n  (in {path})") from error


def _with_prompts(mapping: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Put the texts of ``prompts_file`` in its place."""
    document = dict(mapping)
    if (name := document.pop("prompts_file", None)) is None:
        return document
    if "prompts" in document:
        raise _fault("prompts stand in the workload or in a file", "both prompts and prompts_file", path)
    place = (path.parent / name).resolve() if isinstance(name, str) and name else None
    if place is None or not place.is_relative_to(path.parent.resolve()):
        advice = "put the file beside the one that names it, or in a folder below"
        raise _fault("prompts_file must be a path inside its own folder", f"prompts_file = {name!r}", path, advice)
    return {**document, "prompts": list(_prompts(place))}


def _prompts(path: Path) -> Iterator[str]:
    """Yield a prompt for each line that is not blank; a ``.jsonl`` file has objects with ``prompt``."""
    lines = [(number, line) for number, line in enumerate(_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise _fault("at least one prompt is required", "no line that is not blank", path)
    for number, line in lines:
        yield _prompt_of_object(line, number, path) if path.suffix.lower() == ".jsonl" else line.rstrip("\r")


def _prompt_of_object(line: str, number: int, path: Path) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        prompt, found = None, f"{type(error).__name__}: {error}"
    else:
        found = f"prompt = {prompt!r}"
    if not isinstance(prompt, str) or not prompt:
        advice = f"correct line {number}, or call the file .txt if each line is a prompt as it stands"
        raise _fault('each line of JSONL must be an object such as {"prompt": "a text"}', found, path, advice)
    return prompt


def _table(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    table: Any = document
    for key in PROJECT_TABLE:
        table = table.get(key, {})
        if not isinstance(table, dict):
            raise _fault(f"[{'.'.join(PROJECT_TABLE)}.NAME] must be a table", f"{key} = {table!r}", path)
    return dict(table)


def _parse(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        document = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _fault(f"a file of workloads must be {path.suffix[1:].upper()}", str(error), path) from error
    if not isinstance(document, dict):
        raise _fault("a file of workloads must hold an object", f"a {type(document).__name__}", path)
    return document


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        advice = "name a text file in UTF-8 that this user can read"
        raise _fault("a file that can be read is required", found, path, advice) from error


def _fault(required: str, found: str, path: Path, advice: str = "correct the file") -> WorkloadError:
    return WorkloadError(f"{required}\n  found: {found}\n  in {path}\n  {advice}")
