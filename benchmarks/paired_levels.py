"""Derives the levels of the looks of paired mode, and checks that they hold; see pytest_gpulayout/pairs.py.

Under "nothing has changed" the smallest p-value of all looks is drawn many times. Its quantile at the overall level
is the constant level of a look: with it so many of these draws, and no more, are false alarms. Two standard errors
of the quantile are taken off, and the share is rounded down, so that the table errs to the careful side.

The check draws anew, with the shipped table and everything that the derivation leaves out: the test that drops what
is stored, and a base that cannot be restarted, whose luck is in every block. From the repository's root::

    python benchmarks/paired_levels.py                  # some minutes on one core
    python benchmarks/paired_levels.py --draws 400000   # the same, coarser
    python benchmarks/paired_levels.py --only check
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import numpy as np
from scipy.special import fdtri, stdtr

from pytest_gpulayout.pairs import LATER_LOOKS, LOOKS, MOST_BLOCKS, OVERALL, USUAL_BLOCKS, level_per_look, looks_of

STORED_DF = (0, 2, 4, 8, 16)
CHUNK = 100_000
DROPPED_FROM = 0.90


def smallest_p(rng: np.random.Generator, draws: int, looks: tuple[int, ...], stored_df: int) -> np.ndarray:
    """Draw the smallest one-sided p-value of all looks, with nothing changed and one variance throughout.

    :returns: (draws,).
    """
    z = rng.standard_normal((draws, max(looks)))
    stored = rng.chisquare(stored_df, draws) if stored_df else np.zeros(draws)
    least = np.ones(draws)
    for n in looks:
        mean, squares = _moments(z[:, :n])
        df = stored_df + n - 1
        least = np.minimum(least, stdtr(df, -mean / np.sqrt((squares + stored) / df / n)))
    return least


def shares(draws: int, looks: tuple[int, ...], stored_df: int, seed: int) -> list[float]:
    """The level of each look, as a share of each overall level, never too large."""
    rng = np.random.default_rng([seed, len(looks), stored_df])
    p = np.concatenate([smallest_p(rng, CHUNK, looks, stored_df) for _ in range(math.ceil(draws / CHUNK))])
    careful = [level - 2 * math.sqrt(level * (1 - level) / p.size) for level in OVERALL]
    quantiles = np.quantile(p, careful)
    return [math.floor(1000 * float(q) / level) / 1000 for q, level in zip(quantiles, OVERALL, strict=True)]


def false_alarms(
    rng: np.random.Generator, draws: int, overall: float, most: int, stored_df: int, *, base_restarts: bool = True
) -> float:
    """Share of false alarms of the whole procedure with nothing changed."""
    z = rng.standard_normal((draws, most))
    luck = np.zeros(draws) if base_restarts else rng.standard_normal(draws)
    stored = rng.chisquare(stored_df, draws) if stored_df else np.zeros(draws)
    alarm = np.zeros(draws, bool)
    for n in looks_of(most):
        mean, squares = _moments(z[:, :n])
        dropped = np.zeros(draws, bool)
        if stored_df:
            dropped = squares / (n - 1) > stored / stored_df * fdtri(n - 1, stored_df, DROPPED_FROM)
        df = np.where(dropped, n - 1, stored_df + n - 1)
        variance = np.where(dropped, squares, squares + stored) / df
        error = np.sqrt(variance * (1 / n + (0 if base_restarts else 1)))
        level = np.where(dropped, level_per_look(overall, 0, most), level_per_look(overall, stored_df, most))
        alarm |= stdtr(df, -(mean + luck) / error) < level
    return float(alarm.mean())


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = x.mean(1)
    return mean, ((x - mean[:, None]) ** 2).sum(1)


def tables(draws: int, seed: int) -> Iterator[str]:
    """The lines of the two tables."""
    for name, looks in (("_SHARES", LOOKS), ("_LATER_SHARES", (*LOOKS, *LATER_LOOKS))):
        yield f"{name}: Shares = {{"
        for df in STORED_DF:
            row = np.minimum.accumulate(shares(draws, looks, df, seed))
            yield f"    {df}: ({', '.join(f'{share:.3f}' for share in row)}),"
        yield "}"


def checks(draws: int, seed: int) -> Iterator[str]:
    """A line per plan: how often the shipped procedure raises a false alarm where 5 % and 1 % are meant."""
    rng = np.random.default_rng(seed + 1)
    for base_restarts in (True, False):
        for most in (3, 5, 7, USUAL_BLOCKS, 10, MOST_BLOCKS):
            for df in (0, 1, 3, 8, 16):
                found = [
                    false_alarms(rng, draws, overall, most, df, base_restarts=base_restarts)
                    for overall in (0.05, 0.01, 0.01 / 3)
                ]
                kind = "fresh base" if base_restarts else "one base"
                rates = ", ".join(f"{100 * rate:.3f}%" for rate in found)
                yield f"{kind:10s} blocks <= {most:2d}, stored df {df:2d}: {rates}  (meant: 5%, 1%, 0.333%)"


def main() -> None:
    """Print the tables, then what they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4_000_000)
    parser.add_argument("--seed", type=int, default=20_261_121)
    parser.add_argument("--only", choices=("tables", "check"))
    options = parser.parse_args()
    if options.only != "check":
        for line in tables(options.draws, options.seed):
            print(line, flush=True)
    if options.only != "tables":
        for line in checks(options.draws // 20, options.seed):
            print(line, flush=True)


if __name__ == "__main__":
    main()
