"""What a measurement is compared with: the baseline document, its key, and where it belongs.

Knows the document's fields, its text form and its path; :mod:`~pytest_gpulayout.adapters.baseline_files` knows files.
The text form is made for review: the key in full, and each session one line, so that a re-recording is a short diff.

Identity has four parts. The *key* must match exactly (model, layout, hardware, workload). The *epoch* (driver, CUDA,
NCCL, kernel) and the *software under test* (vLLM, torch, arguments) do not: a change of either is named in the
verdict. *Covariates* (host, load, core binding) are recorded, and named too where they differ.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pytest_gpulayout.errors import BaselineCorrupt
from pytest_gpulayout.schemas import read_document
from pytest_gpulayout.verdict import MetricSample

SCHEMA_VERSION = 1
PROTOCOL = 1
"""Counts up when the way of measuring changes, so that numbers of different meaning are never compared."""

_UNSAFE = re.compile(r"[^A-Za-z0-9._+@-]+")
_LONGEST_NAME = 80


@dataclass(frozen=True, slots=True)
class BaselineKey:
    """What a stored number is valid for; equal keys are comparable, all others are not.

    :param model: ``name``, ``revision`` (of a folder: a hash of its config.json), ``arguments`` of its marker.
    :param layout: canonical text. :param hardware: ``platform``, ``device``, ``count``, ``memory_gib``, ``links``.
    :param workload: ``name`` and ``fingerprint``.
    """

    model: Mapping[str, str]
    layout: str
    hardware: Mapping[str, Any]
    workload: Mapping[str, str]
    protocol: int = PROTOCOL

    @property
    def path(self) -> str:
        """``<model>/<layout>/<hardware>/<workload>.json``, safe as file names whatever the model is called."""
        hardware = [f"{self.hardware['count']}x", self.hardware["device"], *sorted(set(self.hardware["links"]))]
        parts = (self.model["name"], self.layout, " ".join(hardware), self.workload["name"])
        return "/".join(safe_name(part) for part in parts) + ".json"

    def differences(self, other: BaselineKey) -> tuple[str, ...]:
        """Name each field in which ``other`` differs, as ``hardware.links: stored ['NV18'], now ['SYS']``."""
        mine, theirs = _flatten(asdict(self)), _flatten(asdict(other))
        return tuple(
            f"{name}: stored {theirs.get(name)!r}, now {mine.get(name)!r}"
            for name in dict.fromkeys([*mine, *theirs])
            if mine.get(name) != theirs.get(name)
        )


@dataclass(frozen=True, slots=True)
class BaselineRun:
    """One server start. :param metrics: each metric's value in each batch, (n_batches,) in the metric's unit."""

    requests: int
    metrics: Mapping[str, tuple[float, ...]]


def fold_batches(batches: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    """Turn (n_batches,) of metrics into each metric's (n_batches,) values; one that a batch lacks is left out."""
    names = [name for name in batches[0] if all(name in batch for batch in batches)]
    return {name: tuple(batch[name] for batch in batches) for name in names}


@dataclass(frozen=True, slots=True)
class BaselineSession:
    """The starts of one measuring session, and what the machine and the software were then.

    :param topology: the wiring, as :func:`~pytest_gpulayout.drift.wiring_document` gives it.
    """

    recorded: str
    epoch: Mapping[str, Any]
    sut: Mapping[str, Any]
    covariates: Mapping[str, Any]
    runs: tuple[BaselineRun, ...]
    topology: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Baseline:
    """Everything stored under one key, oldest session first."""

    key: BaselineKey
    sessions: tuple[BaselineSession, ...] = field(default=())

    def samples(self, metric: str) -> tuple[tuple[MetricSample, ...], ...]:
        """Return (sessions,) of (starts,) samples of one metric; sessions that never measured it are left out."""
        sessions = (
            tuple(MetricSample(run.metrics[metric]) for run in session.runs if metric in run.metrics)
            for session in self.sessions
        )
        return tuple(filter(None, sessions))


def baseline_to_text(baseline: Baseline) -> str:
    """Write the document: the key indented, one line per session, a newline at the end.

    :raises BaselineCorrupt: it could not be read back, and so must not be stored.
    """
    sessions = ",\n".join("  " + json.dumps(asdict(session), sort_keys=True) for session in baseline.sessions)
    key = json.dumps(asdict(baseline.key), indent=2, sort_keys=True).replace("\n", "\n ")
    text = f'{{\n "schema_version": {SCHEMA_VERSION},\n "key": {key},\n "sessions": [\n{sessions}\n ]\n}}\n'
    baseline_from_text(text, baseline.key.path)
    return text


def baseline_from_text(text: str, path: str) -> Baseline:
    """Read a document.

    :param path: where it came from, for messages.
    :raises BaselineCorrupt: not JSON, not the document of the schema, or a value that is no positive number.
    """
    document, problems = read_document(text, "baseline")
    if problems:
        raise _corrupt(path, "; ".join(problems[:3]))
    key = BaselineKey(**document["key"])
    return Baseline(key, tuple(_session(item) for item in document["sessions"]))


def _session(item: Mapping[str, Any]) -> BaselineSession:
    runs = tuple(
        BaselineRun(run["requests"], {name: tuple(values) for name, values in run["metrics"].items()})
        for run in item["runs"]
    )
    return BaselineSession(
        item["recorded"], item["epoch"], item["sut"], item["covariates"], runs, item.get("topology", {})
    )


def _corrupt(path: str, reason: str) -> BaselineCorrupt:
    return BaselineCorrupt(
        f"a baseline document was required, and this file is none: {reason}\n  in {path}\n"
        "  restore it (git checkout), or record it again: --gpu-baseline=update",
        path=path,
    )


def safe_name(text: str) -> str:
    """Turn any text into one portable file name; texts that had to be changed get a hash, so that none collide."""
    name = _UNSAFE.sub("-", text).strip("-.")[:_LONGEST_NAME]
    if name and name == text:
        return name
    return f"{name or 'x'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _flatten(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, object] = {}
    for name, item in value.items():
        flat |= _flatten(item, f"{prefix}.{name}" if prefix else str(name))
    return flat


def is_measurement(values: Sequence[float]) -> bool:
    """Whether these can be stored and judged: at least one, all finite and above zero."""
    return bool(values) and all(math.isfinite(value) and value > 0 for value in values)
