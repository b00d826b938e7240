"""Two groups of starts are told from one that scatters."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pytest_gpulayout.bimodality import find_modes


def two_groups(count: int, share: float, gap: float, seed: int = 1) -> list[float]:
    draw = random.Random(seed)
    upper = round(share * count)
    values = [draw.gauss(0.0, 0.01) for _ in range(count - upper)] + [draw.gauss(gap, 0.01) for _ in range(upper)]
    draw.shuffle(values)
    return values


def test_two_groups_with_their_shares_and_centers() -> None:
    values = two_groups(20, 0.4, 0.12)
    low, high = find_modes(values)
    assert (low.share, high.share) == (0.6, 0.4)
    ordered = np.sort(values)
    assert low.center == pytest.approx(ordered[:12].mean())
    assert high.center == pytest.approx(ordered[12:].mean())


@pytest.mark.parametrize(
    ("count", "share", "gap"),
    [(15, 0.4, 0.12), (20, 0.4, 0.02), (20, 0.1, 0.12), (20, 0.0, 0.0)],
    ids=["too few", "too near", "outliers", "one group"],
)
def test_what_are_no_two_groups(count: int, share: float, gap: float) -> None:
    assert find_modes(two_groups(count, share, gap)) == ()


def test_equal_numbers_are_one_group() -> None:
    assert find_modes([0.5] * 20) == ()


@pytest.mark.parametrize(("count", "most"), [(16, 0.045), (24, 0.02), (60, 0.005)])
def test_normal_numbers_are_rarely_called_two_groups(count: int, most: float) -> None:
    draw = random.Random(7)
    found = sum(bool(find_modes([draw.gauss(0.0, 1.0) for _ in range(count)])) for _ in range(600))
    assert found / 600 <= most
