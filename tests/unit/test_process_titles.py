"""Ranks by titles and parents. The titles are as the methods of vLLM 0.32 build them that each table names."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulayout.layout import Layout, parse_layout
from pytest_gpulayout.process_titles import api_servers, has_joined_engines, rank_pids

MAIN = "python -m vllm.entrypoints.openai.api_server --model m"


@pytest.mark.parametrize(
    ("layout", "titles", "ranks"),
    [
        ("tp1", ["VLLM::Worker"], {0: 0}),
        ("tp1", ["python -m vllm", "VLLM::EngineCore"], {0: 1}),
        ("tp1", ["VLLM::EngineCore", "VLLM::Worker   "], {0: 1}),
        ("tp2", ["VLLM::Worker_TP1", "VLLM::Worker_TP0", "VLLM::EngineCore"], {0: 1, 1: 0}),
        ("tp2", ["VLLM::EngineCore"], {}),
        ("pp2", ["VLLM::Worker_PP1", "VLLM::Worker_PP0"], {0: 1, 1: 0}),
        ("tp2pp2", [f"VLLM::Worker_PP{pp}_TP{tp}" for pp in (0, 1) for tp in (0, 1)], {0: 0, 1: 1, 2: 2, 3: 3}),
        ("dp2tp2ep", ["VLLM::Worker_DP1_TP0_EP2", "VLLM::Worker_DP0_TP1_EP1"], {2: 0, 1: 1}),
        ("dp2tp1pp2ep", ["VLLM::Worker_DP0_PP1_TP0_EP0", "VLLM::Worker_DP1_PP1_TP0_EP1"], {1: 0, 3: 1}),
        ("tp2pcp2", ["VLLM::Worker_PCP1_TP0", "VLLM::Worker_PCP0_TP1"], {2: 0, 1: 1}),
        ("tp4dcp2", ["VLLM::Worker_TP3_DCP1", "VLLM::Worker_TP2_DCP0"], {3: 0, 2: 1}),
        ("tp2", ["VLLM::Worker_TP0", "VLLM::Worker", "python VLLM::Worker_TP1"], {0: 0}),
        ("dp2", ["VLLM::EngineCore_DP0", "VLLM::EngineCore_DP1"], {}),
        ("tp1ep", ["VLLM::EngineCore", "VLLM::Worker_EP0"], {0: 1}),
    ],
)
def test_rank_by_title(layout: str, titles: list[str], ranks: dict[int, int]) -> None:
    assert rank_pids(parse_layout(layout), dict(enumerate(titles))) == ranks


@pytest.mark.parametrize(
    ("layout", "title"),
    [
        ("tp4dcp2", "VLLM::Worker_TP3"),  # a server without the factor that no fingerprint names
        ("tp4dcp2", "VLLM::Worker_TP3_DCP0"),
        ("tp4", "VLLM::Worker_TP3_DCP1"),
        ("tp2pcp2", "VLLM::Worker_TP1"),
        ("tp2", "VLLM::Worker_TP0_EP0"),
        ("tp2ep", "VLLM::Worker_TP0"),
        ("tp2", "VLLM::Worker_TP2"),
        ("tp2", "VLLM::Worker_PP1_TP0"),
        ("dp2ep", "VLLM::Worker_DP1_EP0"),
        ("dp2ep", "VLLM::Worker_DP2_EP2"),
        ("tp2", "VLLM::Worker_TP0x"),
        ("tp2", "VLLM::Worker_TP99999999999999999999"),
    ],
)
def test_worker_that_the_layout_does_not_have(layout: str, title: str) -> None:
    assert rank_pids(parse_layout(layout), {1: title}) == {}


def test_two_that_claim_a_rank_leave_it_open() -> None:
    titles = {10: "VLLM::Worker_TP0", 11: "VLLM::Worker_TP1", 12: "VLLM::Worker_TP0"}
    assert rank_pids(parse_layout("tp2"), titles) == {1: 11}


# -- engines of data parallelism -------------------------------------------------------------------------------------

# EngineCoreProc.run_engine_core (v1/engine/core.py) sets EngineCore_DP<n>; reconfigure_for_independent_dp_rank
# (config/parallel.py) makes the engine of a dense model a world of its own, so setup_proc_title_and_log_prefix
# (v1/executor/multiproc_executor.py) sees a dp group of one.
DENSE_DP2TP2 = {
    1: MAIN,
    2: "VLLM::DPCoordinator",
    10: "VLLM::EngineCore_DP0",
    11: "VLLM::Worker_TP0",
    12: "VLLM::Worker_TP1",
    20: "VLLM::EngineCore_DP1",
    21: "VLLM::Worker_TP0",
    22: "VLLM::Worker_TP1",
}
PARENTS = {1: 0, 2: 1, 10: 1, 11: 10, 12: 10, 20: 1, 21: 20, 22: 20}


def test_engine_of_a_dense_model_tells_which_workers_are_its_own() -> None:
    assert rank_pids(parse_layout("dp2tp2"), DENSE_DP2TP2, PARENTS) == {0: 11, 1: 12, 2: 21, 3: 22}
    assert rank_pids(parse_layout("dp2tp2"), DENSE_DP2TP2) == {}
    assert not has_joined_engines(DENSE_DP2TP2.values())


def test_workers_without_any_coordinate() -> None:
    titles = {10: "VLLM::EngineCore_DP0", 11: "VLLM::Worker", 20: "VLLM::EngineCore_DP1", 21: "VLLM::Worker"}
    assert rank_pids(parse_layout("dp2"), titles, PARENTS) == {0: 11, 1: 21}
    titles[21] = "python spawn_main"  # has not got its title yet
    assert rank_pids(parse_layout("dp2"), titles, PARENTS) == {0: 11}


def test_process_between_engine_and_worker() -> None:
    """A fork server, or a wrapper of the interpreter."""
    titles = {10: "VLLM::EngineCore_DP0", 11: "VLLM::Worker", 20: "VLLM::EngineCore_DP1", 22: "VLLM::Worker"}
    assert rank_pids(parse_layout("dp2"), titles, {11: 10, 22: 21, 21: 20, 20: 1, 10: 1}) == {0: 11, 1: 22}
    assert rank_pids(parse_layout("dp2"), titles, {11: 10, 22: 21, 21: 22}) == {0: 11}


def test_engines_of_a_model_with_experts_name_themselves_in_their_workers() -> None:
    titles = {10: "VLLM::EngineCore_DP0", 11: "VLLM::Worker_DP0", 20: "VLLM::EngineCore_DP1", 21: "VLLM::Worker_DP1"}
    assert rank_pids(parse_layout("dp2"), titles, PARENTS) == rank_pids(parse_layout("dp2"), titles) == {0: 11, 1: 21}
    assert has_joined_engines(titles.values())


def test_worker_below_another_engine_than_it_names() -> None:
    titles = {10: "VLLM::EngineCore_DP0", 11: "VLLM::Worker_DP1_EP1"}
    assert rank_pids(parse_layout("dp2ep"), titles, PARENTS) == {}


def test_one_engine_too_many() -> None:
    assert rank_pids(parse_layout("tp2"), DENSE_DP2TP2, PARENTS) == {0: 11, 1: 12}
    assert rank_pids(parse_layout("tp2"), DENSE_DP2TP2, {}) == {}


@given(
    st.builds(Layout, tp=st.integers(1, 3), pp=st.integers(1, 3), dp=st.integers(1, 3), pcp=st.integers(1, 3)),
    st.booleans(),
    st.randoms(),
)
def test_every_rank_is_found_in_any_process_table(layout: Layout, moe: bool, random: Random) -> None:
    sizes = {"DP": layout.dp if moe else 1, "PP": layout.pp, "PCP": layout.pcp, "TP": layout.tp}
    titles, parents, wanted = {1: MAIN}, {1: 0}, {}
    for rank in range(layout.ranks):
        places = layout.places(rank)
        engine = 10 + places["DP"]
        titles[engine] = f"VLLM::EngineCore_DP{places['DP']}" if layout.dp > 1 else "VLLM::EngineCore"
        titles[100 + rank] = "VLLM::Worker" + "".join(f"_{axis}{places[axis]}" for axis in sizes if sizes[axis] > 1)
        parents |= {engine: 1, 100 + rank: engine}
        wanted[rank] = 100 + rank
    random.shuffle(order := list(titles))

    assert rank_pids(layout, {pid: titles[pid] for pid in order}, parents) == wanted
    assert has_joined_engines(titles.values()) is (moe and layout.dp > 1)


# -- front ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("titles", "count"),
    [
        ([MAIN, "VLLM::EngineCore"], 1),
        # run_api_server_worker_proc (v1/utils.py)
        (["vllm serve m", "VLLM::APIServer_0", "VLLM::APIServer_1", "VLLM::EngineCore_DP0"], 2),
    ],
)
def test_front_ends(titles: list[str], count: int) -> None:
    assert api_servers(titles) == count
