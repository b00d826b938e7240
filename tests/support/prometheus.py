"""``/metrics`` in the form of vLLM 0.32 (``vllm/v1/metrics/loggers.py``), with the numbers that a test wants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

_COUNTERS = {
    "prefix_cache_queries": "Prefix cache queries, in terms of number of queried tokens.",
    "prefix_cache_hits": "Prefix cache hits, in terms of number of cached tokens.",
    "num_preemptions": "Cumulative number of preemption from the engine.",
    "prompt_tokens": "Number of prefill tokens processed.",
    "prompt_tokens_cached": "Number of cached prompt tokens (local + external).",
    "generation_tokens": "Number of generation tokens processed.",
}
_HISTOGRAMS = (
    *("time_to_first_token", "inter_token_latency", "request_time_per_output_token", "e2e_request_latency"),
    *("request_queue_time", "request_inference_time", "request_prefill_time", "request_decode_time"),
)
_ENDS = ("stop", "length", "abort", "error")


def metrics_text(*engines: Mapping[str, float], started: float | None = 1.5) -> str:
    """What ``GET /metrics`` answers. :param engines: of each rank the numbers that are not 0: a counter's or a part's
    name without ``vllm:``, a ``finished_reason``, ``running`` and ``waiting``."""
    lines = (
        []
        if started is None
        else ["# TYPE process_start_time_seconds gauge", f"process_start_time_seconds {started}"]
    )
    lines += _samples(
        "num_requests_running", "gauge", "", ((e, "", n.get("running", 0)) for e, n in enumerate(engines))
    )
    lines += _samples(
        "num_requests_waiting", "gauge", "", ((e, "", n.get("waiting", 0)) for e, n in enumerate(engines))
    )
    for name, text in _COUNTERS.items():
        values = ((e, "", numbers.get(f"{name}_total", 0)) for e, numbers in enumerate(engines))
        lines += _samples(f"{name}_total", "counter", text, values)
    ends = ((e, f'finished_reason="{end}",', n.get(end, 0)) for e, n in enumerate(engines) for end in _ENDS)
    lines += _samples("request_success_total", "counter", "Count of successfully processed requests.", ends)
    for name in _HISTOGRAMS:
        lines += _histogram(f"{name}_seconds", engines)
    return "\n".join([*lines, ""])


def _samples(name: str, kind: str, text: str, values: Iterable[tuple[int, str, float]]) -> Iterator[str]:
    yield f"# HELP vllm:{name} {text}"
    yield f"# TYPE vllm:{name} {kind}"
    for engine, labels, value in values:
        yield f'vllm:{name}{{engine="{engine}",{labels}model_name="some/model"}} {float(value)}'
    if kind == "counter":
        created = name.removesuffix("_total") + "_created"
        yield f"# TYPE vllm:{created} gauge"
        yield f'vllm:{created}{{engine="0",model_name="some/model"}} 1.7e+09'


def _histogram(name: str, engines: tuple[Mapping[str, float], ...]) -> Iterator[str]:
    yield f"# HELP vllm:{name} Histogram."
    yield f"# TYPE vllm:{name} histogram"
    for engine, numbers in enumerate(engines):
        labels = f'engine="{engine}",model_name="some/model"'
        count = float(numbers.get(f"{name}_count", 0))
        yield f'vllm:{name}_bucket{{engine="{engine}",le="0.3",model_name="some/model"}} {count}'
        yield f'vllm:{name}_bucket{{engine="{engine}",le="+Inf",model_name="some/model"}} {count}'
        yield f"vllm:{name}_count{{{labels}}} {count}"
        yield f"vllm:{name}_sum{{{labels}}} {float(numbers.get(f'{name}_sum', 0))}"
