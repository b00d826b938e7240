"""Reads result documents of ``vllm bench serve``, and ours, which have the same keys.

Knows what vLLM wrote from 0.9 to 0.33 (``vllm/benchmarks/serve.py``; before, ``benchmarks/benchmark_serving.py``):
``--save-result`` leaves the arrays of single requests out unless ``--save-detailed`` is given, ``--append-result``
makes a line of JSON per run, ``vllm bench sweep serve`` gathers the runs of a combination in a list
(``summary.json``). Older ones call the goodput ``request_goodput:`` and count no failures. Leaves writing to
:mod:`~pytest_gpulayout.vllm_result`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.metrics import LATENCIES, TAIL_REQUESTS
from pytest_gpulayout.report import aligned, plural, quantity

_REQUIRED = ("duration", "completed", "total_input_tokens", "request_throughput")
_RATES = {
    "request_throughput": "req/s",
    "request_goodput": "req/s",
    "output_throughput": "tok/s",
    "total_token_throughput": "tok/s",
}
_LATENCY_WORDS = (*LATENCIES, "client_queue_time", "e2el_including_client_queue")
_MS_PER_S = 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """One result document. :param path: where it came from. :param number: of the documents there, from 1.

    :param count: documents in that file. :param ours: whether it has our object ``gpulayout``.
    :param date: local time as vLLM writes it, ``20261121-101126``; ``""`` where there is none.
    :param request_rate: req/s, ``inf`` for all at once. :param max_concurrency: ``None`` for no limit.
    :param num_prompts: requests that were sent. :param failed: of them; counted where the file does not say.
    :param metrics: numbers by vLLM's keys, without those that do not exist (``null``, and 0 for a latency).
    :param ttfts_ms: (num_prompts,), ``None`` of a failed request; the array is ``None`` where the file has none.
    :param latencies_ms: E2EL, likewise. :param itls_ms: gaps between chunks of each request, likewise.
    :param document: all of it.
    """

    path: str
    number: int
    count: int
    ours: bool
    model: str
    backend: str
    date: str
    request_rate: float
    burstiness: float
    max_concurrency: int | None
    num_prompts: int
    completed: int
    failed: int
    duration_s: float
    metrics: Mapping[str, float]
    ttfts_ms: tuple[float | None, ...] | None
    latencies_ms: tuple[float | None, ...] | None
    itls_ms: tuple[tuple[float, ...] | None, ...] | None
    document: Mapping[str, Any]


def read_bench_result(text: str, path: str) -> BenchResult:
    """Read a result; of a file with several the last one, which is the newest.

    :param path: where it came from, for messages.
    :raises MeasurementError: not JSON, or not a result.
    """
    return read_bench_results(text, path)[-1]


def read_bench_results(text: str, path: str) -> tuple[BenchResult, ...]:
    """Read all results of a file, in its order, at least one; see :func:`read_bench_result`."""
    documents = _documents(text, path)
    return tuple(_result(document, path, number, len(documents)) for number, document in enumerate(documents, 1))


# -- reading ------------------------------------------------------------------------------------------------------


def _documents(text: str, path: str) -> list[Mapping[str, Any]]:
    parsed = _parse(text, path)
    if isinstance(parsed, dict):
        parsed = parsed.get("points", [parsed])
    if not isinstance(parsed, list) or not parsed:
        raise _no_result(f"{_kind(parsed)} with nothing in it that could be one", path)
    for number, document in enumerate(parsed, 1):
        where = f"{path}, result {number} of {len(parsed)}" if len(parsed) > 1 else path
        if not isinstance(document, dict):
            raise _no_result(_kind(document), where)
        if missing := [key for key in _REQUIRED if key not in document]:
            raise _no_result(f"an object without {', '.join(missing)}", where)
    return parsed


def _parse(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2:
            raise _no_result(f"text that is no JSON ({error})", path) from None
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise _no_result(f"text that is neither JSON nor a line of JSON per run ({error})", path) from None


def _result(document: Mapping[str, Any], path: str, number: int, count: int) -> BenchResult:
    facts = _Facts(document, path)
    completed, prompts = facts.whole("completed"), facts.whole("num_prompts", facts.whole("completed"))
    answered = _answered(facts)
    sent = len(answered) if answered else max(prompts, completed)
    concurrency = document.get("max_concurrency")
    return BenchResult(
        path=path,
        number=number,
        count=count,
        ours=isinstance(document.get("gpulayout"), dict),
        model=str(document.get("model_id", "unknown model")),
        backend=str(document.get("backend", document.get("endpoint_type", "openai"))),
        date=str(document.get("date", "")),
        request_rate=facts.number("request_rate", math.inf),
        burstiness=facts.number("burstiness", 1.0),
        max_concurrency=None if concurrency is None else facts.whole("max_concurrency"),
        num_prompts=sent,
        completed=completed,
        failed=facts.whole("failed", sent - completed),
        duration_s=facts.number("duration"),
        metrics=dict(_metrics(facts)),
        ttfts_ms=_per_request(facts, "ttfts", answered),
        latencies_ms=_per_request(facts, "latencies", answered),
        itls_ms=_gaps(facts, answered),
        document=document,
    )


@dataclass(frozen=True, slots=True)
class _Facts:
    """Values of a document by key, of the kind that is wanted.

    :raises MeasurementError: (all methods) a value of another kind.
    """

    document: Mapping[str, Any]
    path: str

    def number(self, key: str, default: float | None = None) -> float:
        """One number; the words ``inf`` and ``nan`` count as such."""
        value = self.document.get(key, default)
        if value in ("inf", "nan"):
            return float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _no_result(f"{key} = {value!r}, which is no number", self.path)
        return float(value)

    def whole(self, key: str, default: int | None = None) -> int:
        """One whole number."""
        value = self.number(key, default)
        if not value.is_integer():
            raise _no_result(f"{key} = {value:g}, which is no whole number", self.path)
        return int(value)

    def numbers(self, key: str) -> list[float] | None:
        """A list of numbers, ``None`` where there is none."""
        values = self.document.get(key)
        if values is None:
            return None
        if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
            raise _no_result(f"{key} that is no list of numbers", self.path)
        return values


def _answered(facts: _Facts) -> list[bool]:
    """Whether each request was answered, (num_prompts,); empty where the file has no single requests.

    A failed one has an error, or 0 where a latency is expected; one that broke off keeps its TTFT. Answers that are
    not streamed have no TTFT at all.
    """
    errors = facts.document.get("errors")
    evidence = [[not error for error in errors]] if isinstance(errors, list) else []
    for key in ("ttfts", "latencies"):
        found = facts.numbers(key)
        if found and any(found):
            evidence.append([value > 0 for value in found])
    if len({len(values) for values in evidence}) > 1:
        raise _no_result("errors, ttfts and latencies of different lengths", facts.path)
    return [all(values) for values in zip(*evidence, strict=True)]


def _metrics(facts: _Facts) -> Iterator[tuple[str, float]]:
    document = facts.document
    if document.get("request_goodput", document.get("request_goodput:")) is not None:
        yield (
            "request_goodput",
            facts.number("request_goodput" if "request_goodput" in document else "request_goodput:"),
        )
    for name, value in document.items():
        is_latency = name.endswith("_ms") and any(name.endswith(f"_{word}_ms") for word in _LATENCY_WORDS)
        if value is None or not (is_latency or name in _RATES) or name == "request_goodput":
            continue
        number = facts.number(name)
        may_be_zero = not is_latency or "queue" in name or name.startswith("std_")
        if math.isfinite(number) and (number > 0 or may_be_zero):
            yield name, number


def _per_request(facts: _Facts, key: str, answered: Sequence[bool]) -> tuple[float | None, ...] | None:
    values_s = facts.numbers(key)
    if not values_s or not any(values_s):
        return None
    return tuple(value * _MS_PER_S if ok else None for value, ok in zip(values_s, answered, strict=True))


def _gaps(facts: _Facts, answered: Sequence[bool]) -> tuple[tuple[float, ...] | None, ...] | None:
    gaps = facts.document.get("itls")
    if gaps is None:
        return None
    if (
        not isinstance(gaps, list)
        or len(gaps) != len(answered)
        or not all(isinstance(of_one, list) for of_one in gaps)
    ):
        raise _no_result("itls that are no list of lists, one for each request", facts.path)
    return tuple(
        tuple(gap * _MS_PER_S for gap in of_one) if ok else None for of_one, ok in zip(gaps, answered, strict=True)
    )


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value), "a number")


def _no_result(found: str, path: str) -> MeasurementError:
    return MeasurementError(
        "a result of gpulayout measure --save or of vllm bench serve --save-result is required\n"
        f"  found: {found}\n  in {path}\n"
        "  write one: gpulayout measure --url URL --model M --requests 64 --input-tokens 512 --output-tokens 128 "
        "--save FILE.json"
    )


# -- telling ------------------------------------------------------------------------------------------------------


def bench_result_lines(result: BenchResult) -> list[str]:
    """Return what a result says as a table for people."""
    writer = "gpulayout measure" if result.ours else "vllm bench serve"
    of_several = f", result {result.number} of {result.count}" if result.count > 1 else ""
    lines = [f"{result.model}, by {writer}{f' on {result.date}' if result.date else ''}{of_several}"]
    lines.append(f"{plural(result.num_prompts, 'request')}, {_load_text(result)}, {quantity(result.duration_s, 's')}")
    if result.failed:
        lines.append(f"{result.failed} of {result.num_prompts} requests failed{_first_error(result)}")
    rates = [(name, quantity(result.metrics[name], unit)) for name, unit in _RATES.items() if name in result.metrics]
    return [*lines, *aligned(rates), *_latency_table(result.metrics), *_tail_warning(result), *_own_lines(result)]


def _load_text(result: BenchResult) -> str:
    limit = result.max_concurrency
    if math.isinf(result.request_rate):
        ramp = result.document.get("ramp_up_strategy")
        how = f"{ramp} ramp" if ramp else ("all at once" if limit is None else "")
    else:
        how = f"{result.request_rate:g} req/s, burstiness {result.burstiness:g}"
    return ", ".join(filter(None, [how, f"{limit} at a time" if limit is not None else ""]))


def _first_error(result: BenchResult) -> str:
    errors = [error for error in result.document.get("errors") or () if error]
    # vLLM keeps a whole traceback; its last line says what happened.
    return f"; the first: {str(errors[0]).strip().splitlines()[-1]}" if errors else ""


def _latency_table(metrics: Mapping[str, float]) -> Iterator[str]:
    rows = {}
    for word in _LATENCY_WORDS:
        suffix = f"_{word}_ms"
        found = {name.removesuffix(suffix): value for name, value in metrics.items() if name.endswith(suffix)}
        if found:
            rows[word] = found
    columns = list(dict.fromkeys(statistic for found in rows.values() for statistic in found))
    if columns:
        cells = (
            (f"{word.replace('_', ' ')} ms", *(f"{found[c]:.3f}" if c in found else "-" for c in columns))
            for word, found in rows.items()
        )
        yield from aligned([("", *columns), *cells])


def _tail_warning(result: BenchResult) -> Iterator[str]:
    shown = [p for p in TAIL_REQUESTS if any(name.startswith(f"p{p}_") for name in result.metrics)]
    if short := [p for p in shown if result.completed < TAIL_REQUESTS[p]]:
        needed = ", ".join(f"p{p} needs {TAIL_REQUESTS[p]}" for p in short)
        yield f"{plural(result.completed, 'request')} cannot tell such tails: {needed}"


def _own_lines(result: BenchResult) -> Iterator[str]:
    """What only our files tell, as far as this one does."""
    own = result.document.get("gpulayout")
    if not isinstance(own, dict):
        return
    if isinstance(telemetry := own.get("telemetry"), dict) and telemetry.get("summary"):
        yield str(telemetry["summary"])
    if isinstance(steady := own.get("steady_state"), dict):
        yield f"steady state: {str(steady.get('verdict')).replace('_', ' ')}"
    for problem in own.get("problems") or ():
        yield f"invalid: {problem['kind']}: {problem['text']}"
