"""Paired mode's statistics: fresh servers of two sides in turn, judged after a few blocks, at most at five looks.

A *block* is one fresh server of each side on the same devices, one after the other. What both share (the node, its
temperature, its neighbours) is gone from their difference, which is why no stored baseline is needed::

    d[j] = ln(candidate[j]) - ln(base[j])        larger is worse
    t    = mean(d) / sqrt(s^2 / n)               s^2 = (nu0 * 2 * sigma_R^2 + SS) / (nu0 + n - 1)

``SS`` is the sum of squares of d about its mean. What is stored of the spread between starts (sigma_R^2 on nu0
degrees of freedom, :data:`MOST_STORED_DF` at most) is pooled in, unless the blocks vary so much more that an F test
at 10 % says that it is of another time.

Looking after each of several blocks and stopping when it suits is a sequential test: every look is made at one
constant level, so small that all looks together keep the level that is meant (Pocock, Biometrika 64, 1977, with
Student's t in place of known variances). The levels were found by simulation; ``benchmarks/paired_levels.py`` derives
them again.

=============  ==================================================================================================
regression     t shows it at the level of a false alarm, and the mean is at least half the margin
improvement    the mirror image
pass           a change of the margin is ruled out, and one of that size could be seen
inconclusive   neither, so far; after the last block for good
=============  ==================================================================================================

The smallest change that can be seen is one that the whole procedure finds in 80 of 100 runs: one that an early look
passes is not found, although that pass is right about the margin.

A metric that a look has decided stays decided. Levels: 1 % for a false alarm over all gated metrics together
(Bonferroni, which holds whenever one stops), 5 % for a miss of each. Knows nothing of servers and of time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pytest_gpulayout.baseline import is_measurement
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.stats import POWER, SMALLEST_VARIANCE, Effect, mean, sum_of_squares, t_quantile
from pytest_gpulayout.tolerance import Tolerance, relative_change
from pytest_gpulayout.verdict import (
    FALSE_ALARM,
    MISS,
    MetricSample,
    MetricVerdict,
    Requirement,
    Samples,
    Status,
)

LOOKS = (3, 4, 5, 6, 8)
"""Blocks after which there is a look."""

LATER_LOOKS = (12, 16, 24)
"""Further ones, where more blocks than eight are allowed; all looks are made at a lower level then."""

FEWEST_BLOCKS = LOOKS[0]
USUAL_BLOCKS = LOOKS[-1]
MOST_BLOCKS = LATER_LOOKS[-1]

MOST_STORED_DF = 16.0
"""Weight of the stored spread between starts, however many starts are stored: it is of another day."""

_GUARD = 0.90
_PRECISION = 1e-3
_MOST_NONCENTRALITY = 30.0

OVERALL = (0.05, 0.01, 0.005, 0.0033, 0.0025, 0.002, 0.0016, 0.0014, 0.0012, 0.001, 0.0005)
"""Overall levels of the tables: a miss, and a false alarm of 1, 2, 3, 4, 5, 6, 7, 8, 10 and 20 gated metrics."""

Shares = Mapping[int, tuple[float, ...]]
"""Degrees of freedom of what is stored -> the level of each look, as a share of each of :data:`OVERALL`."""

_SHARES: Shares = {
    0: (0.337, 0.274, 0.258, 0.250, 0.245, 0.241, 0.237, 0.237, 0.235, 0.232, 0.223),
    2: (0.366, 0.305, 0.288, 0.280, 0.271, 0.267, 0.264, 0.262, 0.262, 0.257, 0.246),
    4: (0.379, 0.320, 0.303, 0.292, 0.286, 0.281, 0.276, 0.275, 0.275, 0.273, 0.258),
    8: (0.387, 0.329, 0.309, 0.301, 0.292, 0.287, 0.285, 0.281, 0.281, 0.279, 0.271),
    16: (0.391, 0.334, 0.315, 0.306, 0.300, 0.296, 0.294, 0.292, 0.290, 0.285, 0.262),
}
_LATER_SHARES: Shares = {
    0: (0.213, 0.171, 0.160, 0.154, 0.151, 0.150, 0.147, 0.147, 0.146, 0.145, 0.140),
    2: (0.229, 0.186, 0.174, 0.169, 0.165, 0.164, 0.162, 0.159, 0.158, 0.155, 0.146),
    4: (0.237, 0.195, 0.182, 0.175, 0.171, 0.169, 0.165, 0.164, 0.163, 0.162, 0.157),
    8: (0.242, 0.198, 0.184, 0.179, 0.175, 0.173, 0.170, 0.169, 0.169, 0.167, 0.160),
    16: (0.246, 0.207, 0.195, 0.188, 0.183, 0.179, 0.178, 0.177, 0.173, 0.172, 0.164),
}


@dataclass(frozen=True, slots=True)
class StartSpread:
    """What is stored of the spread between starts of one session. :param variance: of the logarithms."""

    variance: float
    df: float


@dataclass(frozen=True, slots=True)
class PairedHistory:
    """One metric in all blocks so far.

    :param candidate: and ``base``: (n_blocks,) one start of each side per block, in the order of the blocks.
    :param stored: the spread that is known from stored sessions, if it is.
    :param base_restarts: ``False`` where the base was one server throughout (it cannot be restarted): its luck is in
        every block then, and it counts as one draw.
    """

    tolerance: Tolerance
    candidate: Sequence[MetricSample]
    base: Sequence[MetricSample]
    stored: StartSpread | None = None
    base_restarts: bool = True


def spread_of_starts(groups: Sequence[Samples]) -> StartSpread | None:
    """Pool what stored sessions show of the spread between their starts; ``None`` where each has only one.

    :param groups: (n_groups,) of (n_sessions,) of (n_starts,) samples of one metric.
    """
    sessions = [[math.log(sample.value) for sample in session] for group in groups for session in group]
    df = sum(len(session) - 1 for session in sessions)
    return StartSpread(sum(map(sum_of_squares, sessions)) / df, float(df)) if df > 0 else None


def judge_pairs(
    histories: Sequence[PairedHistory], *, most: int = USUAL_BLOCKS, is_last: bool = False
) -> tuple[MetricVerdict, ...]:
    """Judge the gated metrics of all blocks so far.

    All looks are made anew, in their order, so that the answer depends on nothing but the blocks: a metric that an
    early look decided has the verdict, the numbers and the count of blocks of that look.

    :param histories: (n_metrics,), all with the same blocks, at least two.
    :param most: blocks that there may be, from :data:`FEWEST_BLOCKS` to :data:`MOST_BLOCKS`.
    :param is_last: no block will follow, although ``most`` is not reached: there is a look at what there is.
    :returns: per metric; ``inconclusive`` is a metric that is not decided yet. ``n_current`` counts blocks,
        ``n_baseline`` starts of the base.
    :raises MeasurementError: a side lacks a metric in a block, or it is zero or not finite.
    """
    blocks = _blocks_of(histories)
    looks = [look for look in looks_of(most) if look <= blocks]
    if is_last and blocks not in looks and blocks >= FEWEST_BLOCKS:
        looks.append(blocks)
    ends = is_last and blocks < most
    return tuple(_judge(_Pairs(history, most, len(histories)), looks, blocks, is_last=ends) for history in histories)


def looks_of(most: int) -> tuple[int, ...]:
    """The numbers of blocks after which there is a look. :param most: the last one."""
    return (*(look for look in (*LOOKS, *LATER_LOOKS) if look < most), most)


def is_look(blocks: int, most: int) -> bool:
    """Whether there is a look after so many blocks."""
    return blocks in looks_of(most)


def sign_count(history: PairedHistory) -> str:
    """``worse in 7 of 8 blocks``, a check of the mean that needs no assumption about noise."""
    differences = _differences(history)
    return f"worse in {sum(d > 0 for d in differences)} of {len(differences)} blocks"


def level_per_look(overall: float, stored_df: float, most: int) -> float:
    """The level at which each look is made, so that all of them keep ``overall``.

    Between the simulated levels the share of the next lower one is taken, and below the least of them the looks
    share alike, which always holds (Bonferroni): never more than was meant.

    :param stored_df: degrees of freedom of the stored spread that is pooled in; 0 for none.
    """
    few = most <= USUAL_BLOCKS
    table, looks = (_SHARES, LOOKS) if few else (_LATER_SHARES, (*LOOKS, *LATER_LOOKS))
    shares = table[max(df for df in table if df <= stored_df)]
    known = (share for level, share in zip(OVERALL, shares, strict=True) if level <= overall * (1 + 1e-9))
    return overall * next(known, 1 / len(looks))


@dataclass(frozen=True, slots=True)
class _Pairs:
    """One metric with all that a look needs."""

    history: PairedHistory
    most: int
    metrics: int

    @property
    def sign(self) -> float:
        return -1.0 if METRICS[self.history.tolerance.metric].better == "higher" else 1.0

    def stored(self, differences: Sequence[float]) -> tuple[float, float]:
        """Variance of a difference, and its degrees of freedom, as stored; (0, 0) where it is not to be used."""
        stored = self.history.stored
        if stored is None or stored.df <= 0:
            return 0.0, 0.0
        df = min(stored.df, MOST_STORED_DF)
        variance = stored.variance * (2 if self.history.base_restarts else 1)
        own_df = len(differences) - 1
        if sum_of_squares(differences) / own_df > variance * _f_quantile(_GUARD, own_df, df):
            return 0.0, 0.0
        return variance, df

    def effect(self, differences: Sequence[float]) -> tuple[Effect, float, float]:
        """The estimate, the variance of a difference, and the stored degrees of freedom in it."""
        stored, stored_df = self.stored(differences)
        df = stored_df + len(differences) - 1
        variance = max((stored_df * stored + sum_of_squares(differences)) / df, SMALLEST_VARIANCE)
        return Effect(mean(differences), self.error(variance, len(differences)), df), variance, stored_df

    def error(self, variance: float, blocks: int) -> float:
        """Standard error of the mean difference; a base that is one draw adds the variance of a start."""
        return math.sqrt(variance / blocks + (0.0 if self.history.base_restarts else variance))

    def levels(self, stored_df: float) -> tuple[float, float]:
        """Of a false alarm and of a miss at each look."""
        alarm = level_per_look(FALSE_ALARM / self.metrics, stored_df, self.most)
        return alarm, level_per_look(MISS, stored_df, self.most)

    def missed(self, change: float, variance: float, stored_df: float, blocks: int, most: int) -> float:
        """Bound on the probability that a true change is not found, log scale: passed early, or not seen at the end.

        :param blocks: after which is the last look. :param most: that the levels are made for.
        """
        margin = self.history.tolerance.margin
        ruled_out = level_per_look(MISS, stored_df, most)
        early = math.fsum(
            self._probability_below(change - margin, -_bound(ruled_out, stored_df, look), variance, stored_df, look)
            for look in looks_of(most)
            if look < blocks
        )
        return min(1.0, early + self.unseen(change, variance, stored_df, blocks, most, margin / 2))

    def unseen(
        self, change: float, variance: float, stored_df: float, blocks: int, most: int, at_least: float
    ) -> float:
        """Probability that the last look does not show a true change, with an estimate of ``at_least``."""
        alarm = level_per_look(FALSE_ALARM / self.metrics, stored_df, most)
        not_certain = self._probability_below(change, _bound(alarm, stored_df, blocks), variance, stored_df, blocks)
        too_small = _normal_cdf((at_least - change) / self.error(variance, blocks)) if at_least else 0.0
        return max(not_certain, too_small)  # both come from a mean that is low by chance

    def _probability_below(self, shift: float, bound: float, variance: float, stored_df: float, blocks: int) -> float:
        """Probability that t after so many blocks is below ``bound``, with a true mean of ``shift``."""
        return _noncentral_t_cdf(bound, stored_df + blocks - 1, shift / self.error(variance, blocks))


def _smallest(missed: Callable[[float], float], near: float) -> float:
    """Smallest change, log scale, that is missed in 20 of 100 runs at most. :param near: where to begin to look."""
    high = near
    while missed(high) > 1 - POWER:
        high *= 2
    low = 0.0
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if missed(middle) > 1 - POWER else (low, middle)
    return high


def _judge(pairs: _Pairs, looks: Sequence[int], blocks: int, *, is_last: bool) -> MetricVerdict:
    """Make the looks in their order; the first that decides is the answer."""
    differences = _differences(pairs.history)
    for look in looks:
        last = blocks if is_last and look == blocks else pairs.most
        status = _status(pairs, differences[:look], last)
        if status is not Status.INCONCLUSIVE:
            return _verdict(pairs, differences[:look], last, status)
    return _verdict(pairs, differences, blocks if is_last else pairs.most, Status.INCONCLUSIVE)


def _status(pairs: _Pairs, differences: Sequence[float], last: int) -> Status:
    """What one look says. :param last: blocks after which is the last look."""
    effect, variance, stored_df = pairs.effect(differences)
    alarm, miss = pairs.levels(stored_df)
    margin = pairs.history.tolerance.margin
    if effect.lower(alarm) > 0 and effect.size >= margin / 2:
        return Status.REGRESSION
    if effect.upper(alarm) < 0 and effect.size <= -margin / 2:
        return Status.IMPROVEMENT
    if effect.upper(miss) >= margin:
        return Status.INCONCLUSIVE
    sees = pairs.missed(margin, variance, stored_df, last, pairs.most) <= 1 - POWER
    return Status.PASS if sees else Status.INCONCLUSIVE


def _verdict(pairs: _Pairs, differences: Sequence[float], last: int, status: Status) -> MetricVerdict:
    tolerance, sign, blocks = pairs.history.tolerance, pairs.sign, len(differences)
    effect, variance, stored_df = pairs.effect(differences)
    alarm, miss = pairs.levels(stored_df)
    below, above = (miss, alarm) if status is Status.IMPROVEMENT else (alarm, miss)
    reach = _smallest(lambda c: pairs.missed(c, variance, stored_df, last, pairs.most), tolerance.margin)
    base = mean([math.log(sample.value) for sample in pairs.history.base[:blocks]])
    bounds = sorted((relative_change(sign * effect.lower(below)), relative_change(sign * effect.upper(above))))
    return MetricVerdict(
        name=tolerance.metric,
        status=status,
        baseline=math.exp(base),
        current=math.exp(base + sign * effect.size),
        change=relative_change(sign * effect.size),
        ci=(bounds[0], bounds[1]),
        tolerance=tolerance.fraction,
        min_detectable=tolerance.fraction_of(reach),
        n_current=blocks,
        n_baseline=blocks if pairs.history.base_restarts else 1,
        n_sessions=0,
        is_settled=True,
        requirement=_require(pairs, variance, stored_df) if status is Status.INCONCLUSIVE else None,
    )


def _require(pairs: _Pairs, variance: float, stored_df: float) -> Requirement:
    """Find the blocks that show a change as large as the margin, with noise as it was found."""
    tolerance = pairs.history.tolerance
    enough = (
        blocks
        for blocks in range(FEWEST_BLOCKS, MOST_BLOCKS + 1)
        if pairs.missed(tolerance.margin, variance, stored_df, blocks, blocks) <= 1 - POWER
    )
    most = MOST_BLOCKS
    smallest = _smallest(lambda c: pairs.unseen(c, variance, stored_df, most, most, 0.0), tolerance.margin)
    return Requirement(starts=next(enough, None), sessions=None, smallest=tolerance.fraction_of(smallest))


def _blocks_of(histories: Sequence[PairedHistory]) -> int:
    """How many blocks there are, the same for all metrics and both sides."""
    for history in histories:
        values = [batch for side in (history.candidate, history.base) for sample in side for batch in sample.batches]
        if not is_measurement(values):
            raise MeasurementError(
                f"{history.tolerance.metric}: numbers above zero were required in every batch, found "
                f"{next((value for value in values if not is_measurement([value])), 'none')}\n"
                "  in the starts of the two sides\n"
                "  leave the metric out of --gpu-tolerance, or look at the runs: --gpu-results=FILE.json"
            )
    counts = {len(side) for history in histories for side in (history.candidate, history.base)}
    if len(counts) != 1 or min(counts) < 2:
        found = ", ".join(map(str, sorted(counts))) or "none"
        raise MeasurementError(
            f"at least two blocks, with one start of each side for every metric, were required, found {found}\n"
            f"  in {', '.join(history.tolerance.metric for history in histories) or 'no metric'}\n"
            "  gate only metrics that this workload has: --gpu-tolerance=METRIC=5%"
        )
    return counts.pop()


def _differences(history: PairedHistory) -> list[float]:
    """(n_blocks,) of candidate less base on the log scale, larger is worse."""
    sign = -1.0 if METRICS[history.tolerance.metric].better == "higher" else 1.0
    return [sign * math.log(c.value / b.value) for c, b in zip(history.candidate, history.base, strict=True)]


def _f_quantile(probability: float, df: float, other_df: float) -> float:
    from scipy.special import fdtri  # imported late: it brings numpy, which a run without a gate never needs

    return float(fdtri(df, other_df, probability))


@lru_cache(maxsize=1024)
def _bound(level: float, stored_df: float, blocks: int) -> float:
    return t_quantile(1 - level, stored_df + blocks - 1)


def _noncentral_t_cdf(value: float, df: float, noncentrality: float) -> float:
    """Probability that a noncentral t is below ``value``.

    Far out by Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.10, where a series has no digits left.
    """
    from scipy.special import nctdtr

    if value < 0:
        return 1 - _noncentral_t_cdf(-value, df, -noncentrality)
    if abs(noncentrality) < _MOST_NONCENTRALITY:
        found = float(nctdtr(df, noncentrality, value))
        if 0 <= found <= 1:
            return found
    return _normal_cdf((value * (1 - 1 / (4 * df)) - noncentrality) / math.sqrt(1 + value**2 / (2 * df)))


def _normal_cdf(value: float) -> float:
    return (1 + math.erf(value / math.sqrt(2))) / 2
