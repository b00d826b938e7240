"""Traces with chosen instants, for tests of whatever is computed from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pytest_gpulayout.trace import BatchTrace, ClientWork, RequestTrace, RunTrace

MS = 1_000_000


def request(
    index: int, send_ms: int, *chunks_ms: int, batch: int = 0, output_tokens: int = 3, **parts: Any
) -> RequestTrace:
    """A request that was sent at an instant, and whose chunks came at others; it ends 1 ms after the last."""
    return RequestTrace(
        index=index,
        batch=batch,
        prompt_tokens=10,
        output_tokens=output_tokens,
        send_ns=send_ms * MS,
        chunk_ns=tuple(ms * MS for ms in chunks_ms),
        end_ns=(chunks_ms[-1] + 1) * MS if chunks_ms else send_ms * MS,
        system_fingerprint="vllm-0.32.0-tp2-0a1b2c3d",
        text="abc",
        **parts,
    )


def failed(index: int, error: str = "HTTP 500: boom", batch: int = 0) -> RequestTrace:
    """A request without an answer."""
    return replace(request(index, 1000, batch=batch, output_tokens=0), error=error)


def run_of(*batches: tuple[RequestTrace, ...], batch_ms: int = 2000, **parts: Any) -> RunTrace:
    """A run of batches that all begin at 1 s."""
    standard = RunTrace(
        batches=tuple(
            BatchTrace(
                index=index,
                requests=requests,
                start_ns=1000 * MS,
                end_ns=(1000 + batch_ms) * MS,
                reconnects=1,
                clients=(ClientWork(lag_max_ns=(index + 1) * MS, cpu_ns=100 * MS),),
            )
            for index, requests in enumerate(batches)
        ),
        seed=7,
        warmup_requests=2,
        connections=2,
        timestamp_source="test",
        started_s=0.0,
    )
    return replace(standard, **parts)


FAST = request(0, 1000, 1100, 1110, 1130)
"""TTFT 100, ITL 10 and 20, E2EL 130, TPOT 15 ms."""
SLOW = request(1, 1000, 1300, 1330, 1400)
"""TTFT 300, ITL 30 and 70, E2EL 400, TPOT 50 ms."""
