"""What verdicts are to pytest: which fail a test, which have a letter and a count of their own, and JUnit properties.

Knows records as :func:`~pytest_gpulayout.report.performance_record` makes them; they come through pytest-xdist as
well. Leaves printing them to :mod:`~pytest_gpulayout.report`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pytest_gpulayout.verdict import Status

if TYPE_CHECKING:
    from pytest_gpulayout.report import Record
    from pytest_gpulayout.settings import Settings
    from pytest_gpulayout.verdict import Verdict


def fails_test(verdict: Verdict, settings: Settings) -> bool:
    """Whether a test with this verdict fails.

    ``no-baseline`` is what recording ends with as well, and what ``--gpu-baseline=off`` asks for; nothing else may
    go without a baseline.
    """
    if verdict.status is Status.NO_BASELINE:
        return not verdict.stored and settings.baseline_mode != "off"
    if verdict.status is Status.INCONCLUSIVE:
        return settings.inconclusive == "fail"
    return not verdict.status.passed


def outcome_of(records: Sequence[Record]) -> tuple[str, str, str] | None:
    """Count, letter and word of a test that did not fail; ``None`` where all that it asked is a pass.

    :param records: ``verdict`` and ``stored`` of each call of ``perf_gate``.
    """
    if any(record["verdict"] == Status.INCONCLUSIVE for record in records):
        return "inconclusive", "?", "INCONCLUSIVE"
    if any(record["stored"] for record in records):
        return "baseline recorded", "b", "BASELINE RECORDED"
    if any(record["verdict"] == Status.NO_BASELINE for record in records):
        return "not judged", "o", "NOT JUDGED"
    return None


def junit_properties(record: Record) -> Iterator[tuple[str, str]]:
    """Yield what JUnit's readers get as properties of the test: the verdict, and each gated metric in numbers.

    ``gpulayout.smoke.median_ttft_ms.change`` is a fraction, ``0.05`` for 5 % more; so are the ends of its interval.
    """
    head = f"gpulayout.{record['workload']['name']}"
    yield f"{head}.verdict", str(record["verdict"])
    for metric in record["metrics"]:
        low, high = metric["ci"]
        numbers = {"change": metric["change"], "ci_low": low, "ci_high": high}
        yield f"{head}.{metric['name']}.verdict", str(metric["verdict"])
        yield from ((f"{head}.{metric['name']}.{name}", f"{value:.6g}") for name, value in numbers.items())


def relative_properties(record: Record) -> Iterator[tuple[str, str]]:
    """Yield the same of a relative gate: ``gpulayout.smoke.better_than.tp1.request_throughput.ratio`` and more."""
    head = f"gpulayout.{record['workload']['name']}.better_than.{record['other']}.{record['metric']}"
    low, high = record["ci"]
    yield f"{head}.verdict", record["verdict"]
    numbers = {"factor": record["factor"], "ratio": record["ratio"], "ci_low": low, "ci_high": high}
    yield from ((f"{head}.{name}", f"{value:.6g}") for name, value in numbers.items())
