"""Stored sessions with chosen dates, levels and software, and the results files that they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_gpulayout.baseline import Baseline, BaselineSession, LevelStart
from pytest_gpulayout.baseline_text import baseline_to_text
from pytest_gpulayout.measurement import Measurement
from pytest_gpulayout.report import performance_record, results_document
from pytest_gpulayout.verdict import Status, Verdict
from tests.support.measurements import key, measurement_of, session_of

NOISE = (1.0, 1.004, 0.997, 1.002, 0.995, 1.006, 0.999, 1.003, 0.996, 1.001)
"""Factors that scatter by less than half a percent."""


def day(number: int) -> str:
    """The time of a session; day 1 is the first of October 2026."""
    return f"2026-{10 + (number - 1) // 30:02d}-{(number - 1) % 30 + 1:02d}T08:00:00Z"


def dated(number: int, *factors: float, begins: LevelStart | None = None, **parts: Any) -> BaselineSession:
    """A session of that day, one start per factor. :param parts: other fields, such as ``epoch``."""
    return replace(session_of(*factors, recorded=day(number)), begins=begins, **parts)


def quiet_session(number: int, *, factor: float = 1.0, begins: LevelStart | None = None) -> BaselineSession:
    """A session of three starts with hardly any noise, different each day."""
    own = NOISE[number % len(NOISE)]
    unique = own + number * 3.7e-5
    return dated(number, *(factor * unique * part for part in (0.9987, 1.0, 1.0009)), begins=begins)


def stored(*sessions: BaselineSession, **parts: Any) -> Baseline:
    """A baseline of these sessions. :param parts: of the key."""
    return Baseline(key(**parts), sessions)


def quiet_baseline(count: int = 10, **parts: Any) -> Baseline:
    """A baseline that has settled: as many sessions on as many days, with hardly any noise."""
    return stored(*(quiet_session(number) for number in range(1, count + 1)), **parts)


def write_baseline(baseline: Baseline, folder: str = "gpu-baselines", path: str | None = None) -> str:
    """Store it in the current folder and return its path in there."""
    place = path or baseline.key.path
    file = Path(folder) / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(baseline_to_text(baseline), encoding="utf-8")
    return place


def results_text(
    *measurements: Measurement,
    created: str = "2026-11-21T08:00:00Z",
    recorded_topology: bool = False,
    status: Status = Status.PASS,
    reasons: Sequence[str] = (),
) -> str:
    """What ``--gpu-results`` writes of these measurements, one test each."""
    records = [
        (f"t.py::test_{number}", performance_record(Verdict(status, tuple(reasons)), measurement))
        for number, measurement in enumerate(measurements, 1)
    ]
    document = results_document(records, created=created, platform="cuda", version="0.1.0")
    if recorded_topology:
        document["records"].append(
            {
                "test": "t.py::test_links",
                "kind": "topology",
                "layout": "tp2",
                "source": "topo.txt",
                "recorded": True,
                "devices": [],
                "links": [],
                "worst": "NV18",
                "required": "any",
                "faults": [],
                "notes": [],
                "ok": True,
            }
        )
    return json.dumps(document)


def write_results(name: str, *measurements: Measurement, **options: Any) -> str:
    """Write :func:`results_text` to a file of the current folder and return its name."""
    Path(name).write_text(results_text(*measurements, **options), encoding="utf-8")
    return name


def measured(factor: float = 1.0, **parts: Any) -> Measurement:
    """Three starts of about this factor."""
    return measurement_of(*(factor * part for part in (0.9991, 1.0003, 1.0011)), **parts)
