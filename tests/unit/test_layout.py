from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulayout.errors import LayoutSyntaxError
from pytest_gpulayout.layout import Layout, parse_layout


@pytest.mark.parametrize(
    ("text", "canonical", "layout", "gpus"),
    [
        ("tp1", "tp1", Layout(), 1),
        ("pp1dp1", "tp1", Layout(), 1),
        ("tp2", "tp2", Layout(tp=2), 2),
        ("tp10", "tp10", Layout(tp=10), 10),
        ("pp2", "pp2", Layout(pp=2), 2),
        ("tp1pp2", "pp2", Layout(pp=2), 2),
        ("tp2pp2", "tp2pp2", Layout(tp=2, pp=2), 4),
        ("pp2-tp2", "tp2pp2", Layout(tp=2, pp=2), 4),
        ("dp2tp2ep", "dp2tp2ep", Layout(tp=2, dp=2, ep=True), 4),
        ("eptp2", "tp2ep", Layout(tp=2, ep=True), 2),
        ("ep_dp2", "dp2ep", Layout(dp=2, ep=True), 2),
        ("tp1ep", "tp1ep", Layout(ep=True), 1),
        ("tp4pcp2dcp2", "tp4pcp2dcp2", Layout(tp=4, pcp=2, dcp=2), 8),
        ("tp2pcp2dcp4", "tp2pcp2dcp4", Layout(tp=2, pcp=2, dcp=4), 4),
        ("dcp2tp4", "tp4dcp2", Layout(tp=4, dcp=2), 4),
        ("tp2x2", "tp2x2", Layout(tp=2, replicas=2), 4),
        ("tp1x4", "tp1x4", Layout(replicas=4), 4),
        ("tp2x1@1", "tp2", Layout(tp=2), 2),
        ("tp2epx3", "tp2epx3", Layout(tp=2, ep=True, replicas=3), 6),
        ("tp8pp2@2", "tp8pp2@2", Layout(tp=8, pp=2, nodes=2), 16),
        ("tp2x2@2", "tp2x2@2", Layout(tp=2, replicas=2, nodes=2), 4),
        ("tp99999", "tp99999", Layout(tp=99999), 99999),
    ],
)
def test_reads(text: str, canonical: str, layout: Layout, gpus: int) -> None:
    found = parse_layout(text)
    assert (str(found), found, found.gpus) == (canonical, layout, gpus)


FACTOR = "expected a factor (tpN, ppN, dpN, pcpN, dcpN) or ep, found"


@pytest.mark.parametrize(
    ("text", "column", "reason"),
    [
        ("", 1, f"{FACTOR} nothing"),
        ("2", 1, f"{FACTOR} '2'"),
        ("TP2", 1, f"{FACTOR} 'TP2'"),
        (" tp2", 1, f"{FACTOR} ' tp2'"),
        ("tp2 ", 4, f"{FACTOR} ' '"),
        ("tp2\n", 4, f"{FACTOR} '\\n'"),
        ("-tp2", 1, f"{FACTOR} '-tp2'"),
        ("tp2-", 5, f"{FACTOR} nothing"),
        ("tp2--pp2", 5, f"{FACTOR} '-pp2'"),
        ("tp2-x2", 5, f"{FACTOR} 'x2'"),
        ("tp2,pp2", 4, f"{FACTOR} ',pp2'"),
        ("tp2sp2", 4, f"{FACTOR} 'sp2'"),
        ("x2", 1, f"{FACTOR} 'x2'"),
        ("@2", 1, f"{FACTOR} '@2'"),
        ("ep2tp2", 3, f"{FACTOR} '2tp2'"),
        ("epoch", 3, f"{FACTOR} 'och'"),
        ("tp", 3, "expected a number after 'tp'"),
        ("tp2pp", 6, "expected a number after 'pp'"),
        ("tp-2", 3, "expected a number after 'tp'"),
        ("tp２", 3, "expected a number after 'tp'"),
        ("tp2x", 5, "expected a number after 'x'"),
        ("tp2@", 5, "expected a number after '@'"),
        ("tp0", 3, "the number after 'tp' must be at least 1: 0"),
        ("tp2x00", 5, "the number after 'x' must be at least 1: 00"),
        ("tp02", 3, "the number after 'tp' has a leading zero: 02"),
        ("tp100000", 3, "the number after 'tp' must have at most 5 digits"),
        ("tp" + "9" * 5000, 3, "the number after 'tp' must have at most 5 digits"),
        ("tp2tp2", 4, "tp stands twice"),
        ("tp2_pp2_tp2", 9, "tp stands twice"),
        ("eptp2ep", 6, "ep stands twice"),
        ("epep", 3, "ep stands twice"),
        ("ep", 1, "expected a factor beside ep, such as tp2 or dp2"),
        ("epx2", 1, "expected a factor beside ep, such as tp2 or dp2"),
        ("tp2x2x2", 6, "expected the end of the layout, found 'x'"),
        ("tp2@2x2", 6, "expected the end of the layout, found 'x'"),
        ("tp2x2pp2", 6, "expected the end of the layout, found 'p'"),
        ("tp3dcp2", 4, "dcp2 must divide tp3: decode context parallelism shares the GPUs of tp"),
        ("tp3pcp2dcp4", 8, "dcp4 must divide tp3 * pcp2: decode context parallelism shares the GPUs of both"),
        ("dcp4tp2", 1, "dcp4 must divide tp2: decode context parallelism shares the GPUs of tp"),
        ("tp3@2", 4, "3 GPUs cannot be spread evenly over 2 nodes"),
    ],
)
def test_refuses_with_column_and_reason(text: str, column: int, reason: str) -> None:
    with pytest.raises(LayoutSyntaxError) as error:
        parse_layout(text)
    assert (error.value.text, error.value.column, error.value.reason) == (text, column, f"layout: {reason}")
    assert str(error.value) == f"layout: {reason}\n  {text}\n  {' ' * (column - 1)}^ column {column}"


sizes = st.integers(1, 12)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    dcp, nodes = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return Layout(
        tp=draw(sizes) * dcp * nodes,
        pp=draw(sizes),
        dp=draw(sizes),
        pcp=draw(sizes),
        dcp=dcp,
        ep=draw(st.booleans()),
        replicas=draw(sizes),
        nodes=nodes,
    )


@given(layouts())
def test_canonical_text_is_read_back(layout: Layout) -> None:
    assert parse_layout(str(layout)) == layout


@given(layouts(), st.randoms(), st.lists(st.sampled_from(["", "-", "_"]), min_size=6, max_size=6))
def test_order_and_separators_do_not_matter(layout: Layout, random: Any, separators: list[str]) -> None:
    factors = [f"{name}{getattr(layout, name)}" for name in ("tp", "pp", "dp", "pcp", "dcp")]
    factors += ["ep"] if layout.ep else []
    random.shuffle(factors)
    text = factors[0] + "".join(map("".join, zip(separators, factors[1:], strict=False)))
    assert parse_layout(f"{text}x{layout.replicas}@{layout.nodes}") == layout


def test_every_order_without_separators_is_one_layout() -> None:
    texts = ["".join(order) for order in permutations(["tp2", "pp2", "dp2", "dcp2", "pcp3", "ep"])]
    assert {str(parse_layout(text)) for text in texts} == {"dp2tp2pp2pcp3dcp2ep"}


@given(st.text(alphabet="tpdce x@-_0123456789", max_size=12))
def test_any_text_is_read_or_refused_inside_its_columns(text: str) -> None:
    try:
        layout = parse_layout(text)
    except LayoutSyntaxError as error:
        column = error.column
    else:
        assert parse_layout(str(layout)) == layout
        return
    assert 1 <= column <= len(text) + 1


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("tp1", ""),
        ("tp1x4", ""),
        ("tp2", "01"),
        ("tp4", "01 02 03 12 13 23"),
        ("pp3", "01 12"),
        ("tp2pp2", "01 02 13 23"),
        ("dp2", ""),
        ("dp2ep", "01"),
        ("dp2tp2", "01 23"),
        ("dp2tp2ep", "01 02 03 12 13 23"),
        ("dp2tp2pp2ep", "01 02 04 05 13 14 15 23 26 27 36 37 45 46 57 67"),
        ("tp2x2", "01 23"),
        ("pcp2", "01"),
        ("tp2pcp2", "01 02 13 23"),
        ("tp2pcp2dcp4", "01 02 03 12 13 23"),
        ("tp2pcp2ep", "01 02 03 12 13 23"),
        ("tp4dcp2", "01 02 03 12 13 23"),
        ("tp2dcp2", "01"),
    ],
)
def test_pairs_that_communicate(text: str, pairs: str) -> None:
    found = [f"{a}{b}" for a, b in parse_layout(text).communicating_pairs()]
    assert found == pairs.split()


@pytest.mark.parametrize(
    ("text", "dense", "moe"),
    [
        ("dp2", "", "01"),
        ("dp2tp2", "01 23", "01 02 13 23"),
        ("dp2pp2", "01 23", "01 02 13 23"),
        ("dp2tp2x2", "01 23 45 67", "01 02 13 23 45 46 57 67"),
        ("tp2", "01", "01"),
    ],
)
def test_engines_talk_when_the_model_has_experts(text: str, dense: str, moe: str) -> None:
    layout = parse_layout(text)
    for expected, has_experts in ((dense, False), (moe, True)):
        found = [f"{a}{b}" for a, b in layout.communicating_pairs(moe=has_experts)]
        assert found == expected.split()


def test_pairs_of_a_node() -> None:
    layout = parse_layout("dp2tp2@2")
    assert (layout.node_pairs(0), layout.node_pairs(1)) == (((0, 1),), ((0, 1),))
    assert parse_layout("dp4@2").node_pairs(1, moe=True) == ((0, 1),)


# -- groups, against vLLM's own arithmetic ---------------------------------------------------------------------------


def groups_of_vllm(layout: Layout) -> dict[str, list[list[int]]]:
    """``initialize_model_parallel`` of ``vllm/distributed/parallel_state.py`` (0.32), line by line, in numpy.

    ``all_ranks.transpose(a, b)`` of torch is ``swapaxes(a, b)``, ``unbind(0)`` and ``tolist()`` are ``tolist()``. As
    for a model with experts, there is one world of all engines.
    """
    dp, pp, pcp, tp, dcp = layout.dp, layout.pp, layout.pcp, layout.tp, layout.dcp
    all_ranks = np.arange(layout.ranks).reshape(-1, dp, pp, pcp, tp)
    groups = {"tp": all_ranks.reshape(-1, tp)}
    dcp_ranks = all_ranks.swapaxes(-1, -2) if dcp > 1 else all_ranks
    groups["dcp"] = dcp_ranks.reshape(-1, dcp)
    groups["pcp"] = all_ranks.swapaxes(3, 4).reshape(-1, pcp)
    groups["pp"] = all_ranks.swapaxes(2, 4).reshape(-1, pp)
    groups["dp"] = all_ranks.swapaxes(1, 4).reshape(-1, dp)
    groups["ep"] = all_ranks.swapaxes(1, 2).reshape(-1, dp * pcp * tp)
    return {name: of_kind.tolist() for name, of_kind in groups.items()}


@st.composite
def native_layouts(draw: st.DrawFn) -> Layout:
    tp, pcp = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    dcp = draw(st.sampled_from([size for size in range(1, tp * pcp + 1) if tp * pcp % size == 0]))
    pp, dp, ep = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    return Layout(tp=tp, pp=pp, dp=dp, pcp=pcp, dcp=dcp, ep=ep)


@given(native_layouts(), st.booleans())
def test_groups_are_those_that_vllm_makes(layout: Layout, moe: bool) -> None:
    made = groups_of_vllm(layout)
    if not layout.ep:
        del made["ep"]
        if not moe:
            del made["dp"]  # every engine is a world of its own
    wanted = {
        name: {frozenset(ranks) for ranks in groups} for name, groups in made.items() if len(groups) < layout.ranks
    }

    found = layout.communication_groups(moe=moe)

    assert {name: set(map(frozenset, groups)) for name, groups in found.items()}.items() <= wanted.items()
    assert set(map(frozenset, wanted.values())) == {frozenset(map(frozenset, groups)) for groups in found.values()}


@given(native_layouts())
def test_places_are_those_of_vllms_titles(layout: Layout) -> None:
    made = groups_of_vllm(layout)
    for rank in range(layout.ranks):
        rank_in_group = {
            name.upper(): next(ranks.index(rank) for ranks in groups if rank in ranks)
            for name, groups in made.items()
        }
        places = layout.places(rank)
        assert places == rank_in_group
        assert layout.rank_at(**{axis: places[axis.upper()] for axis in ("dp", "pp", "pcp", "tp")}) == rank


def test_no_rank_outside_the_layout() -> None:
    layout = parse_layout("dp2tp2")
    assert [layout.rank_at(dp=2), layout.rank_at(tp=2), layout.rank_at(pp=1), layout.rank_at(tp=-1)] == [None] * 4


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("tp1", "--tensor-parallel-size 1"),
        ("tp2x4", "--tensor-parallel-size 2"),
        ("pp2", "--tensor-parallel-size 1 --pipeline-parallel-size 2"),
        ("dp2tp4ep", "--tensor-parallel-size 4 --data-parallel-size 2 --enable-expert-parallel"),
        (
            "tp4pcp2dcp2",
            "--tensor-parallel-size 4 --prefill-context-parallel-size 2 --decode-context-parallel-size 2",
        ),
    ],
)
def test_arguments_of_vllm(text: str, arguments: str) -> None:
    assert parse_layout(text).engine_arguments() == arguments.split()


def test_arguments_of_several_nodes() -> None:
    layout = parse_layout("tp2@2")
    head = layout.engine_arguments(master_addr="10.0.0.1")
    second = layout.engine_arguments(node_rank=1, master_addr="10.0.0.1", master_port=29501)
    assert head[2:] == ["--nnodes", "2", "--node-rank", "0", "--master-addr", "10.0.0.1"]
    assert second[2:] == [
        *("--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1"),
        *("--master-port", "29501", "--headless"),
    ]


def test_arguments_of_several_nodes_need_the_head_and_a_rank_that_exists() -> None:
    layout = parse_layout("tp2@2")
    with pytest.raises(ValueError, match=r"^layout tp2@2 spans 2 nodes: master_addr is required$"):
        layout.engine_arguments()
    with pytest.raises(ValueError, match=r"^layout tp2@2 has nodes 0 to 1, not 2$"):
        layout.engine_arguments(node_rank=2, master_addr="10.0.0.1")
