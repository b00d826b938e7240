"""Reads back what ``--gpu-results`` wrote: measurements with their identity, so that they can be judged elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pytest_gpulayout.baseline import (
    BaselineKey,
    BaselineRun,
    BaselineSession,
    as_stored,
    fold_batches,
    is_measurement,
)
from pytest_gpulayout.baseline_text import complete_key
from pytest_gpulayout.collectives import CollectiveMeasurement, GroupTimes, ProbeRun, plan_of_document
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.measurement import Identity
from pytest_gpulayout.schemas import read_document
from pytest_gpulayout.verdict import MetricSample


@dataclass(frozen=True, slots=True)
class RecordedMeasurement:
    """A measurement as the results keep it: metrics per batch, no single requests.

    It is of a server, or a probe of the links, whose batches are its rounds.

    :param test: node id of the test that measured. :param runs: (n_starts,), oldest first; empty with problems.
    :param problems: why these numbers must not be judged; empty when they are sound.
    :param documents: (n_starts,) result documents of a server, as ``vllm bench serve`` writes them; none of links.
    :param created: when the results were written, UTC, ISO 8601.
    :param recorded_topology: the file that its topology was read from, ``""`` where the devices were probed.
    """

    test: str
    identity: Identity
    runs: tuple[BaselineRun, ...]
    problems: tuple[str, ...]
    documents: tuple[Mapping[str, Any], ...] = ()
    created: str = ""
    recorded_topology: str = ""

    def samples(self, metric: str) -> tuple[MetricSample, ...]:
        """Return (n_starts,) samples of one metric; starts that do not have it are left out."""
        return tuple(MetricSample(run.metrics[metric]) for run in self.runs if metric in run.metrics)

    def batch_sizes(self) -> tuple[float, ...]:
        """Return (n_starts,) numbers of requests in a batch."""
        return tuple(run.batch_size for run in self.runs)

    def observed(self) -> tuple[Mapping[str, float], ...]:
        """Return (n_starts,) of what else was seen, by the names of :data:`~pytest_gpulayout.observed.OBSERVED`."""
        return tuple(run.observed for run in self.runs)

    def as_session(self) -> BaselineSession:
        """Return what a baseline stores of this, as :meth:`Measurement.as_session` would have."""
        runs = (
            replace(run, metrics={name: tuple(map(as_stored, values)) for name, values in run.metrics.items()})
            for run in self.runs
        )
        identity = self.identity
        return BaselineSession(
            self.created, identity.epoch, identity.sut, identity.covariates, tuple(runs), identity.topology
        )


def measurements_from_text(text: str, path: str) -> tuple[RecordedMeasurement, ...]:
    """Read all measurements of a results file, in the order they were made.

    :param path: where it came from, for messages.
    :raises MeasurementError: not JSON, or not the document of the schema.
    """
    document, faults = read_document(text, "results", migrate=_complete_keys)
    if faults:
        raise MeasurementError(
            f"a results file was required, and this file is none: {'; '.join(faults[:3])}\n  in {path}\n"
            "  write one: pytest --gpu-layout=SPEC --gpu-results=FILE.json"
        )
    records = document["records"]
    topologies = [item for item in records if item["kind"] == "topology" and item["recorded"]]
    read_from = {item["layout"]: item["source"] for item in topologies}
    return tuple(
        replace(
            _measurement(record),
            created=document["created"],
            recorded_topology=read_from.get(record["layout"], ""),
        )
        for record in records
        if record["kind"] in ("performance", "collectives")
    )


def _complete_keys(document: Any) -> Any:
    """Let the keys of the first versions be as they are now; anything else is returned as it is."""
    records = document.get("records") if isinstance(document, dict) else None
    for record in records if isinstance(records, list) else ():
        identity = record.get("identity") if isinstance(record, dict) else None
        if isinstance(identity, dict):
            identity["key"] = complete_key(identity.get("key"), identity.get("topology"))
    return document


def _measurement(record: Mapping[str, Any]) -> RecordedMeasurement:
    found = record["identity"]
    key = BaselineKey(**found["key"])
    identity = Identity(key, found["epoch"], found["sut"], found["covariates"], found.get("topology", {}))
    is_server = record["kind"] == "performance"
    problems, runs = _of_server(record["runs"]) if is_server else _of_links(record, identity)
    if record["verdict"] == "invalid":
        problems = tuple(record["reasons"]) or ("it was invalid, for a reason that is not recorded",)
    return RecordedMeasurement(
        test=record["test"],
        identity=identity,
        runs=() if problems else runs,
        problems=problems,
        documents=tuple(record["runs"]) if is_server else (),
    )


def _of_links(record: Mapping[str, Any], identity: Identity) -> tuple[tuple[str, ...], tuple[BaselineRun, ...]]:
    """What is wrong with a probe of the links, and what it measured: see :func:`_of_server`.

    A link that is slower than its class must be is never the measure of what follows.
    """
    plan = plan_of_document(record["workload"])
    runs = tuple(
        ProbeRun(
            tuple(GroupTimes(tuple(group["ranks"]), tuple(group["rounds"])) for group in run["groups"]),
            run["duration_s"],
            record["backend"],
            record["transports"],
        )
        for run in record["runs"]
    )
    measurement = CollectiveMeasurement(identity, plan, runs)
    problems = (*measurement.problems(), *measurement.shortfalls(), *record["findings"])
    return problems, () if problems else measurement.as_session("").runs


def _of_server(
    runs: Sequence[Mapping[str, Any]],
) -> tuple[tuple[str, ...], tuple[BaselineRun, ...]]:
    """What is wrong with the numbers of a server, else its runs."""
    problems = _problems(runs)
    return problems, () if problems else tuple(map(_run, runs))


def _problems(runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
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
    own = run["gpulayout"]
    metrics = fold_batches([batch["metrics"] for batch in own["batches"]])
    return BaselineRun(run["num_prompts"], metrics, own.get("observed", {}))
