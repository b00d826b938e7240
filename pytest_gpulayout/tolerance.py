"""The smallest change that matters, per metric: which metrics are gated, and by how much they may get worse.

A tolerance is policy, set by people; it is never derived from noise. Noise decides only whether a change of that
size can be seen (:mod:`~pytest_gpulayout.verdict`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from pytest_gpulayout.errors import LayoutSyntaxError
from pytest_gpulayout.metrics import METRICS

DEFAULT_TOLERANCES: Mapping[str, float] = {
    "request_throughput": 0.05,
    "median_ttft_ms": 0.08,
    "median_tpot_ms": 0.05,
}
"""Gated without being asked for. Tails are advisory until a tolerance names them: a p99 of few requests is noise."""

LARGEST_LOG = 700.0
"""A change beyond this factor on the log scale has no floating-point number; it is shown as this one."""

_ENTRY = re.compile(r"\s*(?P<name>\w+)\s*=\s*(?P<value>\d+(?:\.\d+)?)\s*(?P<percent>%?)\s*")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How much worse one metric may get. :param fraction: of the baseline, 0.05 for 5 %."""

    metric: str
    fraction: float

    @property
    def margin(self) -> float:
        """The fraction on the log scale: ln(1 + f) for a time that rises, -ln(1 - f) for a rate that falls."""
        if METRICS[self.metric].better == "higher":
            return -math.log1p(-self.fraction)
        return math.log1p(self.fraction)

    def fraction_of(self, margin: float) -> float:
        """The fraction of another margin on the log scale; the inverse of :attr:`margin`."""
        log = min(margin, LARGEST_LOG)
        return -math.expm1(-log) if METRICS[self.metric].better == "higher" else math.expm1(log)


def relative_change(log_ratio: float) -> float:
    """``ln(1.05)`` -> 0.05; what is too large for a number is cut at :data:`LARGEST_LOG`."""
    return math.expm1(min(log_ratio, LARGEST_LOG))


def percent_text(fraction: float) -> str:
    """``0.05`` -> ``5%``, ``0.025`` -> ``2.5%``."""
    return f"{round(100 * fraction, 4):g}%"


def parse_tolerances(text: str) -> dict[str, Tolerance]:
    """Read ``median_tpot_ms=5%,request_throughput=0.1`` on top of the defaults.

    :returns: by metric name; metrics that are named become gated.
    :raises LayoutSyntaxError: an unknown metric, not a number, or outside what is possible.
    """
    fractions = dict(DEFAULT_TOLERANCES)
    column = 1
    for entry in text.split(",") if text.strip() else []:
        name, fraction = _parse_entry(text, entry, column)
        fractions[name] = fraction
        column += len(entry) + 1
    return {name: Tolerance(name, fraction) for name, fraction in fractions.items()}


def _parse_entry(text: str, entry: str, column: int) -> tuple[str, float]:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        expected = "tolerance: expected METRIC=5% or METRIC=0.05"
        raise LayoutSyntaxError(text, column, f"{expected}, found {entry.strip()!r}")
    name = match["name"]
    if name not in METRICS:
        near = get_close_matches(name, METRICS, n=3) or sorted(METRICS)
        raise LayoutSyntaxError(text, column, f"tolerance: unknown metric {name!r}, did you mean {', '.join(near)}?")
    fraction = float(match["value"]) / (100 if match["percent"] else 1)
    is_rate = METRICS[name].better == "higher"
    if fraction >= 1 and not match["percent"]:
        value = match["value"]
        raise LayoutSyntaxError(text, column, f"tolerance: {name}={value} is ambiguous, write {value}% or a fraction")
    if not 0 < fraction < (1 if is_rate else math.inf):
        limit = "between 0 % and 100 %" if is_rate else "above 0 %"
        raise LayoutSyntaxError(text, column, f"tolerance: {name} needs {limit}, found {entry.strip()!r}")
    return name, fraction
