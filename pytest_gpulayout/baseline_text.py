"""The text form of a baseline document, made for review: the key in full, and each session one line.

Appending a session is a diff of one line: each session but the first begins with the comma, so that no other line
changes, and two branches that both appended merge by keeping both lines. Documents of older schema versions are read
and brought to the newest; those of newer ones, and merges that are not finished, are told apart from damage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pytest_gpulayout.baseline import Baseline, BaselineKey, BaselineRun, BaselineSession, LevelStart
from pytest_gpulayout.errors import BaselineCorrupt
from pytest_gpulayout.schemas import refuse_constant, validate

SCHEMA_VERSION = 2

_CONFLICT_MARKERS = ("<<<<<<<", "|||||||", "=======", ">>>>>>>")


def baseline_to_text(baseline: Baseline) -> str:
    """Write the document: the key indented, one line per session, a newline at the end.

    :raises BaselineCorrupt: it could not be read back, and so must not be stored.
    """
    sessions = "\n ,".join(_json(_session_document(item)) for item in baseline.sessions)
    key = _json(asdict(baseline.key), indent=2).replace("\n", "\n ")
    text = f'{{\n "schema_version": {SCHEMA_VERSION},\n "key": {key},\n "sessions": [\n  {sessions}\n ]\n}}\n'
    baseline_from_text(text, baseline.key.path)
    return text


def _json(document: Any, indent: int | None = None) -> str:
    """JSON in one stable order, in letters that a person reads where UTF-8 has them."""
    text = json.dumps(document, sort_keys=True, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a file name that was no text
        return json.dumps(document, sort_keys=True, indent=indent)
    return text


def _session_document(session: BaselineSession) -> dict[str, Any]:
    """The session without what it does not have."""
    document = asdict(session)
    for name in ("begins", "topology"):
        if not document[name]:
            del document[name]
    for run in document["runs"]:
        if not run["observed"]:
            del run["observed"]
    return document


def baseline_from_text(text: str, path: str) -> Baseline:
    """Read a document of this schema version or an older one.

    :param path: where it came from, for messages.
    :raises BaselineCorrupt: not JSON, not the document of the schema, a value that is no positive number, a merge
        that is not finished, or a document of a newer version of this package.
    """
    if line := _conflict_line(text):
        raise _unmerged(path, line)
    try:
        document = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"it is not JSON ({error})") from None
    if (version := _version(document)) > SCHEMA_VERSION:
        raise _newer(path, version)
    document = _migrate(document)
    if problems := validate(document, "baseline"):
        raise _corrupt(path, "; ".join(problems[:3]))
    key = BaselineKey(**document["key"])
    return Baseline(key, tuple(_session(item) for item in document["sessions"]))


def _version(document: Any) -> int:
    """The schema version, 0 where there is none."""
    version = document.get("schema_version") if isinstance(document, dict) else None
    return version if type(version) is int else 0  # True is an int, too


def _conflict_line(text: str) -> int:
    """1-based number of the first line that ``git merge`` marked, 0 without one; no line of JSON begins so."""
    lines = enumerate(text.split("\n"), start=1)
    return next((number for number, line in lines if line.startswith(_CONFLICT_MARKERS)), 0)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; of a name that is there twice, Python would silently take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} is there twice in one object")
    return found


def _migrate(document: Any) -> Any:
    """Bring a document of schema version 1 to version 2: what the key did not tell then is not known.

    Anything that is no such document is returned as it is, for the schema to say what is wrong with it.
    """
    if not isinstance(document, dict) or _version(document) != 1:
        return document
    sessions = document.get("sessions")
    newest = sessions[-1] if isinstance(sessions, list) and sessions else {}
    wiring = newest.get("topology") if isinstance(newest, dict) else None
    return {**document, "schema_version": SCHEMA_VERSION, "key": complete_key(document.get("key"), wiring)}


def complete_key(key: Any, wiring: Any) -> Any:
    """Bring the key of a first version to what it is now: unknown is null or ``""``, and links are by rank pair.

    Links were sorted then; their order is that of the wiring's pairs, where all of them are there.

    :param key: of a document. :param wiring: ``topology`` of the same session; ``None`` where there is none.
    :returns: the same where it is no such key, or is one of now.
    """
    old_model, old_hardware = (key.get("model"), key.get("hardware")) if isinstance(key, dict) else (None, None)
    if not isinstance(old_model, dict) or not isinstance(old_hardware, dict) or "dtype" in old_model:
        return key
    model = {"dtype": "", **old_model}
    if model.get("revision") == "default":
        model["revision"] = ""
    hardware = {"power_limit_w": None, **old_hardware}
    if isinstance(links := hardware.get("links"), list):
        hardware["links"] = _ordered_links(links, wiring)
    return {**key, "model": model, "hardware": hardware}


def _ordered_links(links: list[Any], wiring: Any) -> list[Any]:
    """The links by rank pair where the wiring tells all of them, else as they are."""
    pairs = wiring.get("links") if isinstance(wiring, dict) else None
    if not isinstance(pairs, dict):
        return links
    ordered = [pairs[pair] for pair in sorted(pairs, key=_ranks)]
    return ordered if sorted(map(str, ordered)) == sorted(map(str, links)) else links


def _ranks(pair: str) -> list[int]:
    """``"2-10"`` -> ``[2, 10]``: pairs in the order of ranks, not of letters."""
    return [int(rank) for rank in pair.split("-") if rank.isdecimal()]


def _session(item: Mapping[str, Any]) -> BaselineSession:
    begins = item.get("begins")
    return BaselineSession(
        item["recorded"],
        item["epoch"],
        item["sut"],
        item["covariates"],
        tuple(map(_run, item["runs"])),
        item.get("topology", {}),
        None if begins is None else LevelStart(begins["reason"], tuple(begins["changes"]), begins["until"]),
    )


def _run(item: Mapping[str, Any]) -> BaselineRun:
    metrics = {name: tuple(values) for name, values in item["metrics"].items()}
    return BaselineRun(item["requests"], metrics, item.get("observed", {}))


def _corrupt(path: str, reason: str) -> BaselineCorrupt:
    return BaselineCorrupt(
        f"a baseline document was required, and this file is none: {reason}\n  in {path}\n"
        "  restore it (git checkout), or remove it and record it again: --gpu-baseline=new",
        path=path,
    )


def _newer(path: str, version: int) -> BaselineCorrupt:
    return BaselineCorrupt(
        f"a baseline of schema version {SCHEMA_VERSION} or older was required, found {version}: it was written by a "
        f"newer pytest-gpulayout\n  in {path}\n  upgrade: pip install --upgrade pytest-gpulayout",
        path=path,
    )


def _unmerged(path: str, line: int) -> BaselineCorrupt:
    return BaselineCorrupt(
        f"a baseline document was required, found git's conflict markers: the merge is not finished\n"
        f"  in {path}, line {line}\n"
        "  keep the session lines of both sides and delete the lines that begin with <<<<<<<, |||||||, ======= and "
        ">>>>>>> (each session but the first begins with a comma), then git add it",
        path=path,
    )
