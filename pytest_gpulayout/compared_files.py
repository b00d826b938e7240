"""What the files of a comparison hold, whoever wrote them, brought to one form.

Knows which documents can be compared: baselines, results of ``--gpu-results``, and results of ``vllm bench serve``
and ``gpulayout measure`` in every form that :mod:`~pytest_gpulayout.bench_result` reads. Leaves matching and judging
to :mod:`~pytest_gpulayout.comparing`.

A file of ``vllm bench serve`` tells neither hardware nor layout, and not whether several results in it are of several
server starts. The reading that claims least is taken: results of one load are batches of one start, whose luck they
share.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pytest_gpulayout.baseline import Baseline, BaselineKey, BaselineRun, BaselineSession, is_measurement
from pytest_gpulayout.baseline_text import baseline_from_text
from pytest_gpulayout.bench_result import BenchResult, read_bench_results
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.report import plural
from pytest_gpulayout.results import RecordedMeasurement, measurements_from_text

Load = Mapping[str, str | float]
"""What a file tells of the load, by the names that vLLM's files use; what it does not tell is left out."""

_KIND = re.compile(r'"(sessions|records)"\s*:')
_SETTINGS = ("num_prompts", "request_rate", "burstiness", "max_concurrency")


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a file holds of one thing that was measured.

    :param title: for people. :param place: the file.
    :param baseline: its sessions; a measurement is one with a single session.
    :param load: see :data:`Load`. :param whole: (n_starts,), one value for each start instead of one for each batch;
        empty where only batches are known.
    :param kind: of a file of ``vllm bench serve`` or ``gpulayout measure`` the key is not known.
    :param problems: why these numbers must not be judged. :param notes: how the file was read.
    :param unfit: metrics whose value is none, with what stands there.
    """

    title: str
    place: str
    baseline: Baseline
    load: Load
    whole: tuple[BaselineRun, ...] = ()
    kind: Literal["baseline", "results", "bench"] = "bench"
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unfit: Mapping[str, str] = field(default_factory=dict)

    @property
    def newest(self) -> BaselineSession:
        """The session that is judged when this is the measurement."""
        return self.baseline.sessions[-1]

    @property
    def is_identified(self) -> bool:
        """Whether the key is known; then its sessions have a value for each batch, too."""
        return self.kind != "bench"

    def by_start(self) -> Recorded:
        """Return the same with one value for each start, where that is known."""
        if not self.whole:
            return self
        session = replace(self.newest, runs=self.whole)
        return replace(self, baseline=replace(self.baseline, sessions=(session,)))


def read_recorded(text: str, place: str, *, platform: str) -> tuple[Recorded, ...]:
    """Read all that a file holds, at least one.

    :param place: the file, for messages. :param platform: of files that do not tell it.
    :raises BaselineCorrupt: :raises MeasurementError: it is none of the documents that can be compared.
    """
    kind = _kind_of(text)
    if kind == "sessions":
        return (_of_baseline(baseline_from_text(text, place), place),)
    if kind == "records":
        return _of_results(text, place)
    try:
        return _of_bench(read_bench_results(text, place), place, platform)
    except (ValueError, OverflowError, RecursionError) as error:
        raise MeasurementError(
            "a baseline, results of --gpu-results, or a result of vllm bench serve was required, found JSON that "
            f"nothing writes: {error}\n  in {place}\n  write one: vllm bench serve --save-result"
        ) from error


def _kind_of(text: str) -> str:
    """The member that tells the document, also of one that breaks off, so that its own reader says what is wrong."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        found = _KIND.search(text)
        return found[1] if found else ""
    names = document if isinstance(document, dict) else ()
    return next((name for name in ("sessions", "records") if name in names), "")


# -- ours --------------------------------------------------------------------------------------------------------


def _of_baseline(baseline: Baseline, place: str) -> Recorded:
    key = baseline.key
    sizes = {run.batch_size for session in baseline.sessions for run in session.runs}
    load: dict[str, str | float] = {"model": key.model["name"], "workload": key.workload["fingerprint"]}
    if len(sizes) == 1:
        load["num_prompts"] = sizes.pop()
    return Recorded(_title(key), place, baseline, load, kind="baseline")


def _of_results(text: str, place: str) -> tuple[Recorded, ...]:
    measurements = measurements_from_text(text, place)
    if not measurements:
        raise MeasurementError(
            f"a measurement was required, and the results hold no measurement\n  in {place}\n"
            "  measure speed, too: pytest --pyargs pytest_gpulayout.gates --gpu-layout=SPEC --gpu-results=FILE.json"
        )
    return tuple(_of_measurement(measurement, place) for measurement in measurements)


def _of_measurement(measurement: RecordedMeasurement, place: str) -> Recorded:
    key, runs = measurement.identity.key, measurement.documents
    whole = tuple(BaselineRun(run["num_prompts"], _positive_metrics(run)) for run in runs)
    return Recorded(
        f"{_title(key)} ({measurement.test})",
        place,
        Baseline(key, (measurement.as_session(),)),
        {**_load_of(runs), "model": key.model["name"], "workload": key.workload["fingerprint"]},
        whole if all(run.metrics for run in whole) else (),
        kind="results",
        problems=measurement.problems,
    )


def _title(key: BaselineKey) -> str:
    return f"{key.layout}: {key.workload['name']} on {key.model['name']}"


# -- of vllm bench serve -----------------------------------------------------------------------------------------


def _of_bench(results: Sequence[BenchResult], place: str, platform: str) -> tuple[Recorded, ...]:
    """One for each load, in the order of the file."""
    loads: dict[tuple[object, ...], list[BenchResult]] = {}
    for result in results:
        settings = (result.request_rate, result.burstiness, result.max_concurrency)
        loads.setdefault((result.model, result.num_prompts, *settings), []).append(result)
    return tuple(_of_load(of_one, place, platform) for of_one in loads.values())


def _of_load(results: Sequence[BenchResult], place: str, platform: str) -> Recorded:
    first = results[0]
    documents = [result.document for result in results]
    values = [_positive_metrics(document) for document in documents]
    names = [name for name in values[0] if all(name in one for one in values)]
    run = BaselineRun(
        sum(result.num_prompts for result in results),
        {name: tuple(value for one in values for value in one[name]) for name in names},
    )
    key = BaselineKey(
        model={"name": first.model, "revision": "", "dtype": "", "arguments": ""},
        layout="unknown layout",
        hardware={
            "platform": platform,
            "device": "unknown",
            "count": 1,
            "memory_gib": None,
            "power_limit_w": None,
            "links": [],
        },
        workload={"name": "unknown workload", "fingerprint": ""},
    )
    return Recorded(
        f"{first.model}, {_load_text(first)}",
        place,
        Baseline(key, (BaselineSession("", {}, {}, {}, (run,)),)),
        _load_of(documents),
        (run,),
        problems=tuple(problem for result in results for problem in _problems(result)),
        notes=_notes(results, place),
        unfit={name: text for document in documents for name, text in _unfit_metrics(document)},
    )


def _load_text(result: BenchResult) -> str:
    rate = "" if math.isinf(result.request_rate) else f", {result.request_rate:g} req/s"
    limit = "" if result.max_concurrency is None else f", {result.max_concurrency} at a time"
    return f"{plural(result.num_prompts, 'request')}{rate}{limit}"


def _notes(results: Sequence[BenchResult], place: str) -> tuple[str, ...]:
    if len(results) == 1:
        return ()
    return (
        f"{place} holds {len(results)} results of one load: taken as batches of one server start, since nothing in "
        "it tells that the server was started anew",
    )


def _problems(result: BenchResult) -> Iterable[str]:
    where = f"{result.path}, result {result.number} of {result.count}" if result.count > 1 else result.path
    if result.failed or result.completed != result.num_prompts:
        failed = max(result.failed, result.num_prompts - result.completed)
        yield f"failed-requests: {failed} of {result.num_prompts} requests failed (in {where})"
    own = result.document.get("gpulayout")
    for problem in (own.get("problems") if isinstance(own, dict) else None) or ():
        if isinstance(problem, dict) and problem.get("kind") != "failed-requests":
            yield f"{problem.get('kind')}: {problem.get('text')} (in {where})"


def _load_of(documents: Sequence[Mapping[str, Any]]) -> dict[str, str | float]:
    """What result documents of one load tell of it; numbers of tokens are means over their requests."""
    first: Mapping[str, Any] = documents[0] if documents else {}
    load: dict[str, str | float] = {}
    if "model_id" in first:
        load["model"] = str(first["model_id"])
    for name in _SETTINGS:
        if name in first:
            load[name] = "none" if first[name] is None else _number_or_text(first[name])
    for total, name in (("total_input_tokens", "input tokens"), ("total_output_tokens", "output tokens")):
        counts = [(document.get(total), document.get("completed")) for document in documents]
        known = [(tokens, requests) for tokens, requests in counts if tokens is not None and requests]
        if known:
            load[f"{name} per request"] = sum(t for t, _ in known) / sum(n for _, n in known)
    own = first.get("gpulayout")
    if isinstance(own, dict) and isinstance(own.get("workload_fingerprint"), str):
        load["workload"] = own["workload_fingerprint"]
    return load


def _number_or_text(value: object) -> float | str:
    try:
        return float(str(value))
    except ValueError:
        return str(value)


def _positive_metrics(document: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Those that can be judged, each as the value of one batch."""
    return {name: (float(document[name]),) for name in METRICS if _is_number(document.get(name))}


def _unfit_metrics(document: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Metrics with a value that is none, such as 0 ms; what is absent or null does not exist, which is no fault."""
    for name in METRICS:
        if document.get(name) is not None and not _is_number(document[name]):
            yield name, str(document[name])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and is_measurement([float(value)])
