"""Which layout to take: winners, ties, and the reasons."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from pytest_gpulayout.advice import Advice, advice_lines, advise
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.layout_table import LayoutRow, LayoutTable
from pytest_gpulayout.stats import Effect
from pytest_gpulayout.workload import BUILTIN_WORKLOADS

STRUCTURED = BUILTIN_WORKLOADS["structured-100"].to_document()


def row(
    layout: str, rate: float, e2el_ms: float, *, tpot_ms: float = 20.0, se: float = 0.01, **parts: Any
) -> LayoutRow:
    """A layout with these figures; its starts, links and transport may be given as well."""
    parsed = parse_layout(layout)
    figures = {"request_throughput": rate, "median_e2el_ms": e2el_ms, "median_tpot_ms": tpot_ms}
    standard = LayoutRow(
        layout=parsed,
        units=parsed.gpus,
        starts=3,
        requests=200,
        levels={name: Effect(math.log(value), se, 6) for name, value in figures.items()},
    )
    return replace(standard, **parts)


def advice_for(*rows: LayoutRow, **parts: Any) -> Advice:
    table = LayoutTable(model={"name": "org/model"}, workload=STRUCTURED, platform="cuda", rows=rows)
    return advise(replace(table, **parts))


# The published figures; E2EL from TTFT + 499 ITL, since the article has none. The replicas are as it supposes them.
TP1 = row("tp1", 12.4, 450 + 499 * 22, tpot_ms=22)
TP4 = row("tp4", 8.1, 1250 + 499 * 68, tpot_ms=68, worst_link="PHB", transport="SHM/direct")
TP1X4 = row("tp1x4", 49.6, 450 + 499 * 22, tpot_ms=22)


def test_published_four_h200_over_pcie_lose_by_every_criterion() -> None:
    advice = advice_for(TP1, TP4)

    assert advice.winners == {"latency": ("tp1",), "throughput": ("tp1",), "cost per request": ("tp1",)}
    assert advice.sentence == (
        "take tp1 for latency (3.08 times as good as tp4), throughput (1.53 times as good as tp4) and cost per "
        "request (6.12 times as good as tp4): the 4 ranks of tp4 exchange data in every step over links of class PHB "
        "(PCIe) by SHM/direct"
    )


def test_published_four_replicas_win_on_throughput_and_cost_no_more_per_request() -> None:
    advice = advice_for(TP1, TP1X4, TP4)

    assert advice.winners["throughput"] == ("tp1x4",)
    assert set(advice.winners["latency"]) == set(advice.winners["cost per request"]) == {"tp1", "tp1x4"}
    assert advice.sentence.startswith(
        "take tp1 or tp1x4 for latency (not told apart) and cost per request (not told apart); tp1x4 for throughput "
        "(4 times as good as tp1): the replicas of tp1x4 exchange nothing; the 4 ranks of tp4 exchange data "
    )
    (cost,) = (reason for reason in advice.reasons if reason.startswith("cost per request (requests per GPU): "))
    assert "6.12 times as good as tp4 (" in cost


def test_what_a_token_s_time_is_spent_on_is_told_where_it_can_be() -> None:
    assert (
        "tp4: of 68 ms per token 5.5 ms is the work of tp1 split over 4 GPUs; the other 92% is communication, "
        "waiting for each other, and work that every rank does"
    ) in advice_for(TP1, TP4).reasons
    faster = replace(TP4, levels={**TP4.levels, "median_tpot_ms": Effect(math.log(5), 0.01, 6)})
    assert (
        "tp4: a token takes 5 ms, no more than the work of tp1 split over 4 GPUs" in advice_for(TP1, faster).reasons
    )


def test_published_one_and_two_rtx_4090_part_throughput_from_the_rest() -> None:
    """E2EL from the medians of TTFT and TPOT and the mean of 540 tokens an answer."""
    one = row("tp1", 6.21, 1818 + 538 * 48.38, tpot_ms=48.38)
    two = row("tp2", 8.55, 2227 + 539.6 * 54.67, tpot_ms=54.67, worst_link="SYS")

    advice = advice_for(one, two, workload=BUILTIN_WORKLOADS["random-300"].to_document())

    assert advice.winners == {"latency": ("tp1",), "throughput": ("tp2",), "cost per request": ("tp1",)}
    assert advice.sentence == (
        "take tp1 for latency (1.14 times as good as tp2) and cost per request (1.45 times as good as tp2); tp2 for "
        "throughput (1.38 times as good as tp1): the 2 ranks of tp2 exchange data in every step over links of class "
        "SYS (PCIe)"
    )
    assert not [reason for reason in advice.reasons if "per token" in reason]  # how many are in flight differs


def test_a_layout_that_shares_the_work_well_wins_on_latency() -> None:
    two = row("tp2", 19, 6000, worst_link="NV18", transport="P2P/CUMEM")

    advice = advice_for(row("tp1", 10, 10000), two)

    assert advice.winners == {"latency": ("tp2",), "throughput": ("tp2",), "cost per request": ("tp1",)}
    assert advice.sentence.endswith(
        ": the ranks of tp2 share the work of each token over links of class NV18 (NVLink) by P2P/CUMEM"
    )


def test_sockets_are_the_difference_between_two_layouts_that_are_else_the_same() -> None:
    near = row("tp2", 18, 20000, units=2, worst_link="NODE", transport="CPU/SHM")
    far = row("tp2@2", 9, 40000, units=2, worst_link="none needed", transport="CPU/GLOO")

    advice = advice_for(near, far, platform="cpu")

    assert set(advice.winners.values()) == {("tp2",)}
    assert "the ranks of tp2 share the work of each token over links of class NODE (memory of" in advice.sentence
    assert advice.sentence.endswith(
        "the 2 ranks of tp2@2 exchange data in every step over the network of 2 nodes by CPU/GLOO"
    )


def test_ranks_of_several_on_each_node_use_links_and_the_network() -> None:
    far = row("tp4@2", 9, 40000, worst_link="NV18", transport="P2P/CUMEM, NET/IB/0")

    assert advice_for(TP1, far).sentence.endswith(
        "the 4 ranks of tp4@2 exchange data in every step over links of class NV18 (NVLink) and the network of 2 "
        "nodes by P2P/CUMEM, NET/IB/0"
    )


def test_what_is_within_the_noise_is_not_called_a_difference() -> None:
    advice = advice_for(row("tp1", 10, 1000, units=1), row("tp2", 10.1, 990, units=1))

    assert {frozenset(winners) for winners in advice.winners.values()} == {frozenset({"tp1", "tp2"})}
    assert advice.sentence == "these numbers do not tell tp1 and tp2 apart, so take the smallest, tp1"


def test_more_noise_makes_a_winner_a_tie() -> None:
    rows = row("tp1", 10, 1000), row("tp1x2", 19, 990)
    noisy = [replace(one, levels={n: Effect(e.size, 0.4, 4) for n, e in one.levels.items()}) for one in rows]

    assert advice_for(*rows).winners["throughput"] == ("tp1x2",)
    assert set(advice_for(*noisy).winners["throughput"]) == {"tp1", "tp1x2"}


@pytest.mark.parametrize("others", [1, 2, 5])
def test_the_risk_is_shared_by_all_comparisons(others: int) -> None:
    """2.5 standard errors tell two layouts apart at 5 %, and not one of them from five others at once."""
    se = 0.01
    best = row("tp1", 10 * math.exp(2.5 * se * math.sqrt(2)), 1000, se=se, units=1)
    rest = [row(f"tp{2**n}", 10, 1000, se=se, units=1) for n in range(1, others + 1)]

    is_clear = len(advice_for(best, *rest).winners["throughput"]) == 1

    assert is_clear is (others < 5)


def test_where_arrivals_set_the_throughput_only_latency_is_compared() -> None:
    workload = {**BUILTIN_WORKLOADS["smoke"].to_document(), "rate": 2.5}

    advice = advice_for(row("tp1", 2.5, 1000), row("tp2", 2.5, 600), workload=workload)

    assert advice.winners == {"latency": ("tp2",)}
    assert advice.sentence.startswith("take tp2 for latency (1.67 times as good as tp1)")


def test_a_transport_that_nobody_looked_at_is_not_made_up() -> None:
    assert advice_for(TP1, replace(TP4, worst_link="", transport="")).sentence.endswith(
        ": the 4 ranks of tp4 exchange data in every step in a way that nobody looked at"
    )


def test_what_the_numbers_rest_on_is_the_last_reason() -> None:
    rows = [replace(one, starts=1, assumed="the documented prior, 1.5%") for one in (TP1, TP4)]

    assert advice_for(*rows).reasons[-1] == (
        "this rests on 1 server start of tp1 and tp4, and on a spread between starts that is assumed (the "
        "documented prior, 1.5%); more starts of each tell more: --gpu-baseline=new --gpu-starts=3; "
        "at a risk of 5% per criterion"
    )
    assert advice_for(TP1, TP4).reasons[-1] == (
        "this rests on 3 server starts of tp1 and tp4; at a risk of 5% per criterion"
    )


def test_each_criterion_has_its_figures_among_the_reasons() -> None:
    reasons = advice_for(TP1, TP4).reasons

    assert reasons[0].startswith("latency (E2EL, median): tp1 11428 ms +-2%, 3.08 times as good as tp4 (")
    assert reasons[1].startswith("throughput (requests): tp1 12.4 req/s +-2%, 1.53 times as good as tp4 (")
    assert reasons[2].startswith(
        "cost per request (requests per GPU): tp1 12.4 req/s +-2%, 6.12 times as good as tp4 ("
    )


def test_the_sentence_comes_first() -> None:
    advice = advice_for(TP1, TP4)

    lines = advice_lines(advice)

    assert lines[0] == f"  advice: {advice.sentence}"
    assert lines[1:] == [f"    {reason}" for reason in advice.reasons]
    assert advice.to_document()["winners"]["latency"] == ["tp1"]
