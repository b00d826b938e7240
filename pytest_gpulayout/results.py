"""Reads back what ``--gpu-results`` wrote: measurements with their identity, so that they can be judged elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pytest_gpulayout.baseline import BaselineKey, BaselineRun, fold_batches, is_measurement
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.measurement import Identity
from pytest_gpulayout.schemas import read_document
from pytest_gpulayout.verdict import MetricSample


@dataclass(frozen=True, slots=True)
class RecordedMeasurement:
    """A measurement as the results keep it: metrics per batch, no single requests.

    :param test: node id of the test that measured. :param runs: (n_starts,), oldest first; empty with problems.
    :param problems: why these numbers must not be judged; empty when they are sound.
    """

    test: str
    identity: Identity
    runs: tuple[BaselineRun, ...]
    problems: tuple[str, ...]

    def samples(self, metric: str) -> tuple[MetricSample, ...]:
        """Return (n_starts,) samples of one metric; starts that do not have it are left out."""
        return tuple(MetricSample(run.metrics[metric]) for run in self.runs if metric in run.metrics)


def measurements_from_text(text: str, path: str) -> tuple[RecordedMeasurement, ...]:
    """Read all measurements of a results file, in the order they were made.

    :param path: where it came from, for messages.
    :raises MeasurementError: not JSON, or not the document of the schema.
    """
    document, faults = read_document(text, "results")
    if faults:
        raise MeasurementError(
            f"a results file was required, and this file is none: {'; '.join(faults[:3])}\n  in {path}\n"
            "  write one: pytest --gpu-layout=SPEC --gpu-results=FILE.json"
        )
    return tuple(_measurement(record) for record in document["records"] if record["kind"] == "performance")


def _measurement(record: Mapping[str, Any]) -> RecordedMeasurement:
    identity = record["identity"]
    key = BaselineKey(**identity["key"])
    problems = _problems(record["runs"])
    if record["verdict"] == "invalid":
        problems = tuple(record["reasons"]) or ("it was invalid, for a reason that is not recorded",)
    return RecordedMeasurement(
        test=record["test"],
        identity=Identity(
            key, identity["epoch"], identity["sut"], identity["covariates"], identity.get("topology", {})
        ),
        runs=() if problems else tuple(map(_run, record["runs"])),
        problems=problems,
    )


def _problems(runs: list[Mapping[str, Any]]) -> tuple[str, ...]:
    found = [] if runs else ["no server start was measured"]
    for number, run in enumerate(runs, 1):
        own = run["gpulayout"]
        values = [value for batch in own["batches"] for value in (batch["metrics"] or {"none": 0}).values()]
        if known := own.get("problems"):
            found += [f"{problem['kind']}: {problem['text']} (server start {number})" for problem in known]
        elif run["failed"]:  # the first versions did not keep their findings
            found.append(f"{run['failed']} of {run['num_prompts']} requests failed on server start {number}")
        elif not is_measurement(values):
            found.append(f"a metric of server start {number} is zero, missing or not finite")
    return tuple(found)


def _run(run: Mapping[str, Any]) -> BaselineRun:
    return BaselineRun(run["num_prompts"], fold_batches([batch["metrics"] for batch in run["gpulayout"]["batches"]]))
