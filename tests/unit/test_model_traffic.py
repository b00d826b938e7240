from __future__ import annotations

import pytest

from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.model_traffic import (
    ALL_TO_ALL,
    Collective,
    Group,
    Step,
    group_ranks,
    step_traffic,
    talking_groups,
    tokens_of_a_rank,
)
from tests.support.model_configs import shape_of

DECODE, PREFILL = Step(100, 100, decode=True), Step(1000, 1, decode=False)


Row = tuple[object, ...]


def traffic(name: str, layout: str, step: Step = DECODE, *, to_experts: str = ALL_TO_ALL[0]) -> list[Row]:
    """Operation, group, ranks, count and bytes of each kind of message."""
    found = step_traffic(shape_of(name), parse_layout(layout), step, to_experts=to_experts)
    return [(m.operation, m.group, m.ranks, m.count, m.size) for m in found]


@pytest.mark.parametrize("layout", ["tp1", "tp1x4", "dp4"])
def test_nothing_is_sent_where_one_gpu_does_it_alone(layout: str) -> None:
    assert traffic("llama-3.1-8b", layout) == []


def test_tensor_parallelism_of_a_dense_model() -> None:
    """An all-reduce after the table of tokens, two a layer, and the logits of each sequence at the end."""
    state = 100 * 4096 * 2
    assert traffic("llama-3.1-8b", "tp2") == [
        ("all-reduce", "tp", 2, 1, state),
        ("all-reduce", "tp", 2, 32, state),
        ("all-reduce", "tp", 2, 32, state),
        ("all-gather", "tp", 2, 1, 100 * 128_256 * 2),
    ]


def test_a_prompt_sends_all_its_tokens_and_the_logits_of_one() -> None:
    found = traffic("llama-3.1-8b", "tp2", PREFILL)
    assert {size for *_, size in found[:3]} == {1000 * 4096 * 2}
    assert found[3] == ("all-gather", "tp", 2, 1, 128_256 * 2)


def test_qwen3_30b_has_97_all_reduces() -> None:
    found = traffic("qwen3-30b-a3b", "tp4")
    assert sum(int(str(count)) for operation, _, _, count, _ in found if operation == "all-reduce") == 97
    assert {size for operation, *_, size in found if operation == "all-reduce"} == {100 * 2048 * 2}


def test_branches_side_by_side_are_reduced_once() -> None:
    found = step_traffic(shape_of("falcon-7b"), parse_layout("tp2"), DECODE)
    assert [(m.count, m.what) for m in found if m.operation == "all-reduce"] == [
        (1, "embedding"),
        (32, "attention and MLP together"),
    ]


def test_experts_of_one_engine_are_summed_up_as_an_mlp_is() -> None:
    assert traffic("qwen3-30b-a3b", "tp4ep") == traffic("qwen3-30b-a3b", "tp4")


@pytest.mark.parametrize("layout", ["dp4", "dp4ep"])
def test_engines_of_a_model_with_experts_gather_tokens_and_scatter_results(layout: str) -> None:
    state = 4 * 100 * 2048 * 2
    assert traffic("qwen3-30b-a3b", layout) == [
        ("all-gather", "dp", 4, 48, state + 4 * 100 * 8 * 8),
        ("reduce-scatter", "dp", 4, 48, state),
    ]


def test_with_tp_dp_and_ep_tokens_are_spread_before_experts() -> None:
    own, state = 100 * 2048 * 2, 2 * 100 * 2048 * 2
    assert traffic("qwen3-30b-a3b", "dp2tp2ep") == [
        ("all-reduce", "tp", 2, 1, own),
        ("all-reduce", "tp", 2, 48, own),
        ("all-gather", "tp", 2, 1, 100 * 151_936 * 2),
        ("all-gather", "ep", 4, 48, state + 2 * 100 * 8 * 8),
        ("reduce-scatter", "ep", 4, 48, state),
        ("all-gather", "tp", 2, 48, own),
    ]


@pytest.mark.parametrize(("to_experts", "reached"), [(ALL_TO_ALL[1], 4 * (1 - (3 / 4) ** 8)), (ALL_TO_ALL[2], 8.0)])
def test_all_to_all_sends_a_token_to_the_ranks_of_its_experts(to_experts: str, reached: float) -> None:
    """fp8 with a float32 for 128 elements there, bfloat16 back; a quarter of them stays."""
    sent = 100 * reached * 3 / 4 * 2048
    found = traffic("qwen3-30b-a3b", "dp4ep", to_experts=to_experts)
    assert [message[:4] for message in found] == [("all-to-all", "ep", 4, 48)] * 2
    assert [message[4] for message in found] == [round(sent * (1 + 4 / 128)), round(sent * 2)]


def test_pipelines_send_hidden_state_and_residual() -> None:
    state = 100 * 4096 * 2
    assert traffic("llama-3.1-8b", "pp4") == [("send", "pp", 2, 2 * 3, state)]
    assert traffic("llama-3.1-8b", "tp2pp2")[-2:] == [
        ("send", "pp", 2, 2, state // 2),
        ("all-gather", "tp", 2, 2, state),
    ]
    assert traffic("falcon-7b", "pp2") == [("send", "pp", 2, 1, 100 * 4544 * 2)]


def test_decode_context_parallelism_gathers_queries_and_scatters_results() -> None:
    heads = 32 // 8 * 2
    assert traffic("qwen3-30b-a3b", "tp8dcp2")[-3:] == [
        ("all-gather", "dcp", 2, 48, 100 * heads * 128 * 2),
        ("all-gather", "dcp", 2, 48, 2 * 100 * heads * 4),
        ("reduce-scatter", "dcp", 2, 48, 100 * heads * 128 * 2),
    ]
    heads = 128 // 8 * 8
    found = [message for message in traffic("deepseek-v3", "tp8dcp8") if message[1] == "dcp"]
    assert [message[4] for message in found] == [100 * heads * 576 * 2, 8 * 100 * heads * 4, 100 * heads * 512 * 2]
    assert "dcp" not in {message[1] for message in traffic("deepseek-v3", "tp8dcp8", PREFILL)}


def test_prefill_context_parallelism_gathers_what_is_cached() -> None:
    found = traffic("deepseek-v2-lite", "pcp2", PREFILL)
    assert found[0] == ("all-gather", "pcp", 2, 27, 1000 * 576 * 2)
    assert {message[1] for message in found} == {"pcp"}


@pytest.mark.parametrize(
    ("layout", "step", "tokens"),
    [("tp4", PREFILL, 1000), ("pcp2", PREFILL, 500), ("pcp2", DECODE, 50), ("pcp2tp2dcp2", DECODE, 100)],
)
def test_tokens_of_a_rank(layout: str, step: Step, tokens: int) -> None:
    assert tokens_of_a_rank(parse_layout(layout), step) == tokens


@pytest.mark.parametrize(
    ("layout", "group", "ranks"),
    [
        ("tp2pp2", "tp", ((0, 1), (2, 3))),
        ("tp2pp2", "pp", ((0, 2), (1, 3))),
        ("pp3", "pp", ((0, 1), (1, 2))),
        ("dp2tp2", "dp", ((0, 2), (1, 3))),
        ("dp2tp2ep", "ep", ((0, 1, 2, 3),)),
        ("dp2tp2pp2ep", "ep", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("tp4dcp2", "dcp", ((0, 1), (2, 3))),
        ("tp2pcp2", "pcp", ((0, 2), (1, 3))),
        ("tp2pcp2dcp2", "dcp", ((0, 2), (1, 3))),
    ],
)
def test_ranks_of_groups(layout: str, group: Group, ranks: tuple[tuple[int, ...], ...]) -> None:
    assert group_ranks(parse_layout(layout), group) == ranks


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2pp2", "dp2tp2ep", "dp4ep", "tp2dp2pp2ep"])
def test_groups_are_those_of_the_layout(layout: str) -> None:
    """What is found here is what :mod:`pytest_gpulayout.layout` says of pairs that communicate."""
    parsed = parse_layout(layout)
    pairs = {
        (min(a, b), max(a, b))
        for group in talking_groups(shape_of("qwen3-30b-a3b"), parsed, ALL_TO_ALL[0])
        for ranks in group_ranks(parsed, group)
        for a in ranks
        for b in ranks
        if a != b
    }
    assert pairs <= set(parsed.communicating_pairs())


def test_what_a_message_is_for_is_said() -> None:
    first = step_traffic(shape_of("llama-3.1-8b"), parse_layout("tp2"), DECODE)[0]
    assert first == Collective("all-reduce", "tp", 2, 1, 100 * 4096 * 2, "embedding")
