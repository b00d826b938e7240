"""Whether client and server agree on what happened: requests and tokens exactly, latency within what lies between.

Knows which number of the one side is which of the other (vLLM 0.32, ``vllm/v1/metrics/stats.py``). Leaves counting to
:mod:`~pytest_gpulayout.server_window` and :mod:`~pytest_gpulayout.trace`, and what follows from a disagreement to
:mod:`~pytest_gpulayout.validity`. A window begins after the warm-up, so that both sides count the same requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from pytest_gpulayout.server_window import ServerWindow
from pytest_gpulayout.trace import RunTrace

_GOOD_ENDS = frozenset({"stop", "length"})
_E2EL_SHARE = 0.02
_E2EL_LEAST_MS = 2.0


@dataclass(frozen=True, slots=True)
class BothSides:
    """One count, as each side has it. :param server: over all engines."""

    client: int
    server: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Both sides of one run.

    :param requests: completed, and finished with ``stop`` or ``length``. :param prompt_tokens: of these.
    :param output_tokens: of these; the server also counts those of requests that failed later.
    :param ended_otherwise: requests by ``finished_reason``, such as ``abort``.
    :param preemptions: requests that the server put off after it had begun with them.
    :param client_e2el_ms: mean. :param server_e2el_ms: mean of ``vllm:e2e_request_latency_seconds``, which begins
        when the API server has read the request and ends with its last token.
    """

    requests: BothSides
    prompt_tokens: BothSides
    output_tokens: BothSides
    ended_otherwise: dict[str, int]
    preemptions: int
    client_e2el_ms: float | None
    server_e2el_ms: float | None

    @property
    def e2el_excess_ms(self) -> float | None:
        """Mean E2EL of the client less the server's: network, proxies and the two ends' own work."""
        if self.client_e2el_ms is None or self.server_e2el_ms is None:
            return None
        return self.client_e2el_ms - self.server_e2el_ms

    @property
    def e2el_close(self) -> bool | None:
        """Whether the excess is at least 0 and at most 2 % or 2 ms, as between two processes of an idle host.

        A burst of requests takes longer: vLLM reads them one by one, and its clock starts with each when it is read.
        """
        excess_ms = self.e2el_excess_ms
        if excess_ms is None or self.server_e2el_ms is None:
            return None
        return 0 <= excess_ms <= max(_E2EL_LEAST_MS, _E2EL_SHARE * self.server_e2el_ms)


def compare_sides(run: RunTrace, window: ServerWindow) -> Agreement:
    """Put what the client and what the server counted side by side."""
    completed = [request for request in run.requests if request.ok]
    finished: Counter[str] = Counter()
    for engine in window.engines:
        finished.update(engine.finished)
    return Agreement(
        requests=BothSides(len(completed), sum(finished[reason] for reason in _GOOD_ENDS)),
        prompt_tokens=BothSides(sum(request.prompt_tokens for request in completed), window.prompt_tokens),
        output_tokens=BothSides(sum(request.output_tokens for request in completed), window.generation_tokens),
        ended_otherwise={reason: number for reason, number in finished.items() if reason not in _GOOD_ENDS},
        preemptions=sum(engine.preemptions for engine in window.engines),
        client_e2el_ms=fmean(request.e2el_ns / 1e6 for request in completed) if completed else None,
        server_e2el_ms=window.mean_ms("e2e_request_latency"),
    )


def agreement(run: RunTrace, window: ServerWindow) -> tuple[str, ...]:
    """Return a sentence for each count that client and server do not agree on; empty when all are equal.

    When requests failed the server may have counted more, for them. Latencies are told and not judged: what lies
    between the two clocks belongs to the way of the answers, and can be long without being wrong.
    """
    return tuple(_disagreements(compare_sides(run, window), run, window))


def agreement_document(run: RunTrace, window: ServerWindow) -> dict[str, Any]:
    """Return the same as an object for a result."""
    sides = compare_sides(run, window)
    excess_ms, close = sides.e2el_excess_ms, sides.e2el_close
    complaints = list(_disagreements(sides, run, window))
    return {**asdict(sides), "e2el_excess_ms": excess_ms, "e2el_close": close, "complaints": complaints}


def _disagreements(sides: Agreement, run: RunTrace, window: ServerWindow) -> Iterator[str]:
    cause = "use a server that nobody else uses, and an address behind which there is only one"
    if not window.settled:
        cause = f"its counters were still moving when they were read; {cause}"
    uncounted = any(request.ok and not request.output_tokens for request in run.requests)
    for what, both in (
        ("completed requests", sides.requests),
        ("prompt tokens", sides.prompt_tokens),
        ("output tokens", sides.output_tokens),
    ):
        explained = both.server > both.client and bool(run.failed)
        unknown = uncounted and what == "output tokens"  # which is a finding of its own
        if both.client != both.server and not explained and not unknown:
            yield f"the client counted {both.client} {what} and the server {both.server}; {cause}"
    if sides.ended_otherwise and not run.failed:
        ends = ", ".join(f"{number} with {reason!r}" for reason, number in sorted(sides.ended_otherwise.items()))
        yield f"the server ended requests that the client did not see fail: {ends}; {cause}"
