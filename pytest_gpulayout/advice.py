"""Which of the layouts of a table to take: one sentence, and the reasons for it.

Knows by what layouts are chosen (latency, throughput, cost per request), from where on one is better than others, and
what is known to hold a layout back. Leaves the figures to :mod:`~pytest_gpulayout.layout_table`.

A layout is named where the risk that one of the others is better is 5 % at most; else all that may be the best are
named. That a slow layout has slow links is a fact; that the links are why is an inference, for which the layouts are
measured with everything else the same, and the sentence keeps to what the ranks do and over what.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpulayout.layout_table import FIGURES, figure_text, short_percent, starts_text
from pytest_gpulayout.relative import PER_UNIT, number_of
from pytest_gpulayout.verdict import MISS

if TYPE_CHECKING:
    from pytest_gpulayout.layout_table import LayoutRow, LayoutTable
    from pytest_gpulayout.report import Record
    from pytest_gpulayout.stats import Effect


class Criterion(NamedTuple):
    """What a layout is chosen for. :param figure: of the table, that decides."""

    name: str
    figure: str


CRITERIA = (
    Criterion("latency", "median_e2el_ms"),
    Criterion("throughput", "request_throughput"),
    Criterion("cost per request", f"request_throughput{PER_UNIT}"),
)
"""All of them. What a request costs is units / throughput, whatever a unit costs: the price need not be known."""

_FULL_EFFICIENCY = 0.95  # of throughput per GPU; what is above it is not asked why
_ENOUGH_STARTS = 3  # from which on more of them narrow the intervals slowly


@dataclass(frozen=True, slots=True)
class Standing:
    """Who is best by one criterion.

    :param best: by the estimates. :param level: others that may be as good. :param leads: (other, how many times as
        good the best is, logarithm) of all others, the nearest first.
    """

    criterion: Criterion
    best: LayoutRow
    level: tuple[LayoutRow, ...]
    leads: tuple[tuple[LayoutRow, Effect], ...]

    @property
    def winners(self) -> tuple[str, ...]:
        """The best and all that may be as good, by name."""
        return self.best.name, *(row.name for row in self.level)


@dataclass(frozen=True, slots=True)
class Advice:
    """Which layout to take.

    :param winners: criterion -> the layout, or those that the numbers do not tell apart.
    """

    sentence: str
    reasons: tuple[str, ...]
    winners: Mapping[str, tuple[str, ...]]

    def to_document(self) -> Record:
        """Return it as the results keep it."""
        winners = {name: list(layouts) for name, layouts in self.winners.items()}
        return {"sentence": self.sentence, "reasons": list(self.reasons), "winners": winners}


def advise(table: LayoutTable) -> Advice:
    """Say which layout wins by which criterion, and what is known of why."""
    criteria = CRITERIA[:1] if table.is_rate_bound else CRITERIA
    standings = [standing for one in criteria if (standing := _standing(table, one)) is not None]
    choice = _choice(table, standings)
    why = _joined(_why(table, standings), separator="; ")
    return Advice(
        f"{choice}: {why}" if why else choice,
        (*(_numbers(table, standing) for standing in standings), *_splits(table), _certainty(table)),
        {standing.criterion.name: standing.winners for standing in standings},
    )


# -- who wins ----------------------------------------------------------------------------------------------------


def _standing(table: LayoutTable, criterion: Criterion) -> Standing | None:
    """Compare the best with all others; ``None`` where no two have the figure."""
    known = [(row, level) for row in table.rows if (level := table.figure(row, criterion.figure)) is not None]
    if len(known) < 2:
        return None
    sign = 1 if FIGURES[criterion.figure].higher_is_better else -1
    best = max(known, key=lambda item: sign * item[1].size)[0]
    pairs = ((row, table.times_as_good(best, row, criterion.figure)) for row, _ in known if row is not best)
    leads = sorted(((row, lead) for row, lead in pairs if lead is not None), key=lambda item: item[1].size)
    risk = MISS / len(leads)  # of each comparison, so that all together keep it
    return Standing(criterion, best, tuple(row for row, lead in leads if lead.lower(risk) <= 0), tuple(leads))


def _choice(table: LayoutTable, standings: Sequence[Standing]) -> str:
    """``take tp1 for latency (3.08 times tp4) and cost per request (...), and tp1x4 for throughput (...)``."""
    everybody = len(table.rows)
    if all(len(standing.winners) == everybody for standing in standings):
        names = _joined(row.name for row in table.rows)
        return f"these numbers do not tell {names} apart, so take the smallest, {table.reference.name}"
    by_winners: dict[tuple[str, ...], list[Standing]] = {}
    for standing in standings:
        by_winners.setdefault(tuple(sorted(standing.winners)), []).append(standing)
    clauses = [
        f"{_named(of_these[0])} for {_joined(_criterion_text(standing) for standing in of_these)}"
        for of_these in by_winners.values()
    ]
    return f"take {_joined(clauses, separator='; ')}"


def _named(standing: Standing) -> str:
    return " or ".join(sorted(standing.winners))


def _criterion_text(standing: Standing) -> str:
    name = standing.criterion.name
    if standing.level:
        return f"{name} (not told apart)"
    row, lead = standing.leads[0]
    return f"{name} ({number_of(lead.size):.3g} times as good as {row.name})"


# -- why ---------------------------------------------------------------------------------------------------------


def _why(table: LayoutTable, standings: Sequence[Standing]) -> Iterator[str]:
    """What the ranks do, and over what: of layouts that gain less than their GPUs, and of those that gain."""
    latency = next((standing for standing in standings if standing.criterion is CRITERIA[0]), None)
    for row in table.rows:
        if not row.communicates:
            if row.layout.replicas > 1 and any(standing.winners == (row.name,) for standing in standings):
                yield f"the replicas of {row.name} exchange nothing"
            continue
        if row.layout.tp > 1 and latency is not None and latency.winners == (row.name,):
            yield f"the ranks of {row.name} share the work of each token {_way(table, row)}"
        elif _is_held_back(table, row):
            yield f"the {row.layout.ranks} ranks of {row.name} exchange data in every step {_way(table, row)}"


def _is_held_back(table: LayoutTable, row: LayoutRow) -> bool:
    """Whether it is clearly less than what its GPUs would be worth in the best layout of the table."""
    name = "median_e2el_ms" if table.is_rate_bound else f"request_throughput{PER_UNIT}"
    standing = _standing(table, Criterion("", name))
    if standing is None or standing.best is row:
        return False
    lead = next((lead for other, lead in standing.leads if other is row), None)
    return lead is not None and lead.lower(MISS) > 0 and number_of(-lead.size) < _FULL_EFFICIENCY


def _way(table: LayoutTable, row: LayoutRow) -> str:
    """``over links of class PHB (PCIe) by SHM/direct``, ``over the network of 2 nodes by NET/Socket``."""
    ways = [f"links of class {row.worst_link}{_kind_of(table, row.worst_link)}"] if row.has_link else []
    if row.layout.nodes > 1:
        ways.append(f"the network of {row.layout.nodes} nodes")
    over = f"over {_joined(ways)}" if ways else ""
    transport = f"by {row.transport}" if row.transport else ""
    return " ".join(filter(None, (over, transport))) or "in a way that nobody looked at"


def _kind_of(table: LayoutTable, link: str) -> str:
    """What a class stands for, where its name does not say so."""
    if table.platform == "cpu":
        return " (memory of one NUMA node)" if link == "NODE" else ""
    if link.startswith("NV"):
        return " (NVLink)"
    return " (PCIe)" if link in ("PIX", "PXB", "PHB", "NODE", "SYS") else ""


# -- reasons -----------------------------------------------------------------------------------------------------


def _numbers(table: LayoutTable, standing: Standing) -> str:
    """``latency (E2EL, median): tp1 11.4 s +-3%; 3.08 times as good as tp4 (2.88 to 3.29)``."""
    figure = FIGURES[standing.criterion.figure]
    label = figure.label.replace("per GPU", f"per {table.unit}")
    value = figure_text(figure.unit, table.figure(standing.best, standing.criterion.figure))
    risk = MISS / len(standing.leads)
    leads = _joined(
        f"{number_of(lead.size):.3g} times as good as {row.name} "
        f"({number_of(lead.lower(risk)):.3g} to {number_of(lead.upper(risk)):.3g})"
        for row, lead in standing.leads
    )
    return f"{standing.criterion.name} ({label}): {standing.best.name} {value}, {leads}"


def _splits(table: LayoutTable) -> Iterator[str]:
    """How much of a token's time is the work of the smallest layout, split evenly; the rest is what sharing costs."""
    for row in table.rows:
        split = table.work_per_token_ms(row)
        if split is None:
            continue
        found, even = split
        where = "on the same cores" if table.platform == "cpu" else f"split over {row.units} {table.unit}s"
        if even >= found:
            yield f"{row.name}: a token takes {found:.3g} ms, no more than the work of {table.reference.name} {where}"
            continue
        yield (
            f"{row.name}: of {found:.3g} ms per token {even:.3g} ms is the work of {table.reference.name} {where}; "
            f"the other {short_percent(1 - even / found)} is communication, waiting for each other, and work that "
            "every rank does"
        )


def _certainty(table: LayoutTable) -> str:
    """What the numbers rest on."""
    spreads: dict[str, dict[str, None]] = {}
    for source, _, spread in (row.assumed.rpartition(", ") for row in table.rows if row.assumed):
        spreads.setdefault(source, {})[spread] = None
    sources = [f"{source}, {_joined(found)}" for source, found in spreads.items()]
    assumed = f", and on a spread between starts that is assumed ({'; '.join(sources)})" if sources else ""
    more = ""
    if min(row.starts for row in table.rows) < _ENOUGH_STARTS:
        more = f"; more starts of each tell more: --gpu-baseline=new --gpu-starts={_ENOUGH_STARTS}"
    return f"this rests on {starts_text(table)}{assumed}{more}; at a risk of {MISS:.0%} per criterion"


def _joined(words: Iterable[str], *, separator: str = ", ") -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *others, end = [*words] or [""]
    if separator == ", ":
        return f"{separator.join(others)} and {end}" if others else end
    return separator.join([*others, end])


def advice_lines(advice: Advice) -> list[str]:
    """The sentence, then its reasons."""
    return [f"  advice: {advice.sentence}", *(f"    {reason}" for reason in advice.reasons)]
