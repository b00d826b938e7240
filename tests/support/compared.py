"""Two sides of a comparison that differ in nothing, ours and those of ``vllm bench serve``."""

from __future__ import annotations

import json
from typing import Any

from tests.support.measurements import baseline_of

NOISE = (1.0, 1.01, 0.99)
MANY = baseline_of(*[[factor * shift for factor in NOISE] for shift in (0.995, 1.0, 1.005) * 4])
WIDE = "request_throughput=40%,median_ttft_ms=40%,median_tpot_ms=40%"

# As vLLM 0.32 writes it with --save-result, without the keys that say nothing about speed.
BENCH: dict[str, Any] = {
    "date": "20261121-101126",
    "endpoint_type": "openai",
    "backend": "openai",
    "label": None,
    "model_id": "org/tiny",
    "tokenizer_id": "org/tiny",
    "num_prompts": 200,
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": 8,
    "duration": 20.0,
    "completed": 200,
    "failed": 0,
    "total_input_tokens": 20_000,
    "total_output_tokens": 6_000,
    "request_throughput": 10.0,
    "request_goodput": None,
    "output_throughput": 300.0,
    "total_token_throughput": 1300.0,
    "mean_ttft_ms": 100.0,
    "median_ttft_ms": 95.0,
    "std_ttft_ms": 1.0,
    "p99_ttft_ms": 130.0,
    "mean_tpot_ms": 10.0,
    "median_tpot_ms": 9.8,
    "std_tpot_ms": 0.1,
    "p99_tpot_ms": 12.0,
    "mean_itl_ms": 10.0,
    "median_itl_ms": 9.7,
    "std_itl_ms": 1.0,
    "p99_itl_ms": 14.0,
}


def bench(**changes: Any) -> str:
    """Text of such a file, with other values."""
    return json.dumps(BENCH | changes)
