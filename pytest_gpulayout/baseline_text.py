"""The text form of a baseline document, made for review: the key in full, and each session one line.

Appending a session is a diff of one line (and a comma); nothing else moves. Documents of older schema versions are
read and brought to the newest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pytest_gpulayout.baseline import Baseline, BaselineKey, BaselineRun, BaselineSession, LevelStart
from pytest_gpulayout.errors import BaselineCorrupt
from pytest_gpulayout.schemas import read_document

SCHEMA_VERSION = 2


def baseline_to_text(baseline: Baseline) -> str:
    """Write the document: the key indented, one line per session, a newline at the end.

    :raises BaselineCorrupt: it could not be read back, and so must not be stored.
    """
    sessions = ",\n".join("  " + json.dumps(_session_document(item), sort_keys=True) for item in baseline.sessions)
    key = json.dumps(asdict(baseline.key), indent=2, sort_keys=True).replace("\n", "\n ")
    text = f'{{\n "schema_version": {SCHEMA_VERSION},\n "key": {key},\n "sessions": [\n{sessions}\n ]\n}}\n'
    baseline_from_text(text, baseline.key.path)
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
    :raises BaselineCorrupt: not JSON, not the document of the schema, or a value that is no positive number.
    """
    document, problems = read_document(text, "baseline", migrate=_migrate)
    if problems:
        raise _corrupt(path, "; ".join(problems[:3]))
    key = BaselineKey(**document["key"])
    return Baseline(key, tuple(_session(item) for item in document["sessions"]))


def _migrate(document: Any) -> Any:
    """Bring a document of schema version 1 to version 2: what the key did not tell then is not known.

    Anything that is no such document is returned as it is, for the schema to say what is wrong with it.
    """
    if not isinstance(document, dict) or document.get("schema_version") != 1:
        return document
    return {**document, "schema_version": SCHEMA_VERSION}


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
        "  restore it (git checkout), or record it again: --gpu-baseline=update",
        path=path,
    )
