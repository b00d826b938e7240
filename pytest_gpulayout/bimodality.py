"""Whether server starts fall into two groups, as with an autotuner that chooses now one kernel and now another.

One mean and one spread describe neither group, and a gate on them sees little. Knows numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_gpulayout.stats import mean, sum_of_squares

FEWEST_STARTS = 16
"""Starts that it takes to tell; fewer fall into two groups by chance too often."""

SMALLEST_SHARE = 0.15
"""A group with a smaller share of the starts is taken for outliers."""

_GAP = 4.0


@dataclass(frozen=True, slots=True)
class Mode:
    """A group of starts. :param center: mean of their logs. :param share: of all starts."""

    center: float
    share: float


def find_modes(logs: Sequence[float]) -> tuple[Mode, ...]:
    """Return the two groups that the starts fall into, the lower one first; empty where they do not.

    2-means in one dimension, solved exactly: of all cuts through the sorted values the one with the least squares
    within. They are two groups where the centers are further apart than 4 times the larger standard deviation within,
    and each has 15 % of the starts. Many normal numbers leave centers 2.6 standard deviations within apart; of 16 of
    them 3 samples in 100 are called two groups, of 24 one (simulated, 3000 samples each).

    :param logs: (n_starts,), in any order.
    """
    values = sorted(logs)
    count = len(values)
    if count < FEWEST_STARTS:
        return ()
    fewest = math.ceil(SMALLEST_SHARE * count)
    cuts = [(values[:cut], values[cut:]) for cut in range(1, count)]
    low, high = min(cuts, key=lambda parts: sum_of_squares(parts[0]) + sum_of_squares(parts[1]))
    if min(len(low), len(high)) < fewest:
        return ()
    within = max(math.sqrt(sum_of_squares(part) / (len(part) - 1)) for part in (low, high))
    modes = tuple(Mode(mean(part), len(part) / count) for part in (low, high))
    return modes if modes[1].center - modes[0].center > _GAP * within else ()
