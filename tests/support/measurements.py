"""Measurements, keys and baselines with chosen numbers, for tests of whatever decides on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pytest_gpulayout.baseline import Baseline, BaselineKey, BaselineRun, BaselineSession
from pytest_gpulayout.measurement import Identity, Measurement
from pytest_gpulayout.report import performance_record, results_document
from pytest_gpulayout.trace import BatchTrace, RequestTrace, RunTrace
from pytest_gpulayout.verdict import Status, Verdict
from pytest_gpulayout.workload import Workload

US = 1_000
WORKLOAD = Workload(name="small", input_tokens=8, output_tokens=3, concurrency=1, requests=1, batches=2)
FINGERPRINT = "vllm-0.32.0-tp2-0a1b2c3d"
H200 = {
    "platform": "cuda",
    "device": "NVIDIA H200",
    "count": 2,
    "memory_gib": 141,
    "power_limit_w": 700,
    "links": ["NV18"],
}


def key(**parts: Any) -> BaselineKey:
    """A key of two H200; ``hardware`` is merged into theirs."""
    hardware = H200 | parts.pop("hardware", {})
    standard = BaselineKey(
        model={"name": "org/tiny", "revision": "default", "dtype": "bfloat16", "arguments": ""},
        layout="tp2",
        hardware=hardware,
        workload={"name": WORKLOAD.name, "fingerprint": WORKLOAD.fingerprint()},
    )
    return replace(standard, **parts)


def identity(**parts: Any) -> Identity:
    """What was measured on; ``parts`` replace fields of the key."""
    return Identity(key(**parts), {"driver": "570.1"}, {"vllm": "0.32.0"}, {"host": "node1"})


def run_of(*factors: float, error: str | None = None, fingerprints: Sequence[str] = (FINGERPRINT,)) -> RunTrace:
    """One start with a batch of one request per factor: TTFT 100 ms, TPOT 10 ms, 1 req/s, all times the factor."""
    batches = []
    for index, factor in enumerate(factors):
        chunks = tuple(round(ms * 1000 * factor) * US for ms in (100, 110, 120))
        request = RequestTrace(
            index=index,
            batch=index,
            prompt_tokens=8,
            output_tokens=3,
            send_ns=0,
            chunk_ns=chunks if error is None else (),
            end_ns=chunks[-1],
            error=error,
            system_fingerprint=fingerprints[index % len(fingerprints)],
        )
        batches.append(BatchTrace(index=index, requests=(request,), start_ns=0, end_ns=round(1e6 * factor) * US))
    return RunTrace(
        batches=tuple(batches), seed=1, warmup_requests=1, connections=1, timestamp_source="test", started_s=0.0
    )


def measurement_of(*factors: float, **parts: Any) -> Measurement:
    """One start per factor, two batches each."""
    return Measurement(identity(**parts), WORKLOAD, tuple(run_of(factor, factor) for factor in factors))


def session_of(*factors: float, recorded: str = "2026-11-20T08:00:00Z") -> BaselineSession:
    """A stored session with one start per factor."""
    return measurement_of(*factors).as_session(recorded)


def baseline_of(*sessions: Sequence[float], **parts: Any) -> Baseline:
    """A baseline with these sessions, each a sequence of factors."""
    return Baseline(key(**parts), tuple(session_of(*factors) for factors in sessions))


def plain_session(*values: float, metric: str = "median_tpot_ms") -> BaselineSession:
    """A stored session of one start with one metric."""
    return BaselineSession("2026-11-20T08:00:00Z", {}, {}, {}, (BaselineRun(4, {metric: values}),))


def results_of(*measurements: Measurement, status: Status = Status.PASS, reasons: tuple[str, ...] = ()) -> str:
    """Text of results with these measurements, each of a test of its own, all with the same verdict."""
    records = [
        (f"t.py::test_{number}", performance_record(Verdict(status, reasons), measurement))
        for number, measurement in enumerate(measurements, 1)
    ]
    return json.dumps(results_document(records, created="2026-11-21T08:00:00Z", platform="cuda", version="0.1.0"))
