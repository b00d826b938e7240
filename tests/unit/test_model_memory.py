from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulayout.layout import Layout, parse_layout
from pytest_gpulayout.model_memory import (
    CacheGroup,
    activation_bytes,
    block_bytes,
    cache_groups,
    cached_request_bytes,
    cached_token_bytes,
    fit,
    pipeline_stages,
    request_blocks,
    split_problem,
    stage_weights,
    token_bytes,
    total_bytes,
)
from pytest_gpulayout.model_tensors import parameters
from tests.support.model_configs import model_of, shape_of

# -- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "stages", "sizes"),
    [
        (48, 1, [48]),
        (48, 4, [12, 12, 12, 12]),
        (61, 2, [31, 30]),
        (61, 4, [15, 15, 16, 15]),
        (62, 4, [15, 16, 16, 15]),
        (63, 4, [16, 16, 16, 15]),
        (5, 3, [2, 2, 1]),
    ],
)
def test_stages_are_those_of_vllm(layers: int, stages: int, sizes: list[int]) -> None:
    """``get_pp_indices``: what is left over goes to the stages before the last, from the back."""
    found = pipeline_stages(layers, stages)
    assert [len(stage) for stage in found] == sizes
    assert [index for stage in found for index in stage] == list(range(layers))


def weights_of(name: str, layout: str, **changes: Any) -> list[int]:
    model = model_of(name, **changes)
    return [stage.total for stage in stage_weights(model.shape, model.stored, parse_layout(layout))]


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-30b-a3b", "gemma-2-9b", "falcon-7b", "deepseek-v2-lite"])
def test_one_gpu_holds_every_parameter(name: str) -> None:
    assert weights_of(name, "tp1") == [2 * sum(parameters(shape_of(name)).values())]


def test_first_and_last_stage_hold_embedding_and_head() -> None:
    model = model_of("llama-3.1-8b")
    first, last = stage_weights(model.shape, model.stored, Layout(pp=2))
    assert (first.parts.get("embedding"), first.parts.get("head")) == (2 * 128_256 * 4096, None)
    assert (last.parts.get("embedding"), last.parts.get("head")) == (None, 2 * 128_256 * 4096)
    assert first.total + last.total == 2 * 8_030_261_248


def test_a_tied_table_is_on_both_ends_and_read_on_the_last() -> None:
    model, table = model_of("gemma-2-9b"), 2 * 256_000 * 3584
    first, last = stage_weights(model.shape, model.stored, Layout(pp=2))
    assert first.parts["embedding"] == last.parts["embedding"] == table
    assert first.each_step == first.total - table
    assert last.each_step == last.total
    (only,) = stage_weights(model.shape, model.stored, Layout())
    assert only.total == only.each_step == 2 * 9_241_705_984


def test_qwen3_30b_on_four_gpus() -> None:
    """By hand: everything in four parts but routers and norms; 1 KV head a rank."""
    norms = 48 * (2 * 2048 + 256) + 2048
    whole = 48 * 128 * 2048 + norms
    expected = 2 * (whole + (30_532_122_624 - whole) // 4)
    assert weights_of("qwen3-30b-a3b", "tp4") == [expected]
    assert expected / 2**30 == pytest.approx(14.24, abs=0.01)


@pytest.mark.parametrize(
    ("layout", "routed"),
    [("tp1", 1), ("tp4", 4), ("dp4", 4), ("dp4ep", 4), ("tp1x4", 1), ("tp2pp2", 4), ("tp2x2", 2)],
)
def test_routed_experts_of_a_gpu(layout: str, routed: int) -> None:
    model = model_of("qwen3-30b-a3b")
    stages = stage_weights(model.shape, model.stored, parse_layout(layout))
    assert {stage.routed for stage in stages} == {2 * 48 * 128 * 3 * 2048 * 768 // routed}


def test_what_is_computed_in_fp8() -> None:
    model = model_of("deepseek-v3")
    (stage,) = stage_weights(model.shape, model.stored, Layout(tp=8, ep=True))
    assert 0.99 < stage.fp8 < 1
    plain = model_of("qwen3-8b")
    assert stage_weights(plain.shape, plain.stored, Layout())[0].fp8 == 0


# -- what vLLM refuses -----------------------------------------------------------------------------------------------

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("name", "layout", "changes", "told"),
    [
        ("falcon-7b", "tp2", {}, "71 attention heads cannot be split over tp2"),
        ("qwen2.5-7b", "tp8", {}, "28 attention heads cannot be split over tp8"),
        ("qwen2.5-7b", "tp7", {}, "4 KV heads can neither be split over tp7 nor copied evenly"),
        ("llama-3.1-8b", "pp33", {}, "32 layers cannot be split into 33 stages"),
        ("llama-3.1-8b", "tp2", {"intermediate_size": 14337}, "an MLP 14337 wide cannot be split over tp2"),
        ("qwen3-30b-a3b", "tp4", {"moe_intermediate_size": 770}, "experts 770 wide cannot be split over 4 ranks"),
        ("deepseek-v3", "dp2tp4", {"n_routed_experts": 128, "moe_intermediate_size": 2049}, "experts 2049 wide"),
        ("llama-3.1-8b", "tp2ep", {}, "ep needs experts, this model has none"),
        ("mixtral-8x7b", "tp16", {}, "tp16 is more than the 8 experts"),
        ("mixtral-8x7b", "dp2tp8ep", {}, "8 experts are fewer than the 16 ranks of ep"),
        ("llama-3.1-8b", "tp8dcp2", {}, "dcp needs tp above the 8 KV heads"),
        ("qwen3-30b-a3b", "tp8dcp4", {}, "dcp4 must divide the 2 copies of each KV head at tp8"),
        ("gpt-oss-20b", "tp16dcp2", {}, "dcp cannot split layers with a sliding window"),
        ("llama-3.1-8b", "pcp2", {}, "pcp needs multi-head latent attention"),
        ("deepseek-v3", "tp4pcp2dcp4", {}, "with pcp2, dcp must be 1, 2 or 8"),
    ],
)
def test_layouts_that_cannot_be(name: str, layout: str, changes: dict[str, Any], told: str) -> None:
    model = model_of(name, **changes)
    problem = split_problem(model.shape, model.stored, parse_layout(layout))
    assert problem is not None
    assert told in problem


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama-3.1-70b", "tp8"),
        ("llama-3.1-70b", "tp16dcp2"),
        ("qwen3-30b-a3b", "tp8dcp2"),
        ("qwen3-30b-a3b", "dp2tp2ep"),
        ("deepseek-v3", "tp8dcp8"),
        ("deepseek-v3", "tp4pcp2"),
        ("falcon-7b", "pp2"),
        ("gpt-oss-20b", "tp8"),
    ],
)
def test_layouts_that_can_be(name: str, layout: str) -> None:
    model = model_of(name)
    assert split_problem(model.shape, model.stored, parse_layout(layout)) is None


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ("tp2", None),
        ("tp4", "192 outputs of mlp.experts.0.gate_proj on a GPU are no multiple of its blocks of 128"),
        ("tp4ep", None),
    ],
)
def test_shards_of_fp8_must_hold_whole_blocks(layout: str, told: str | None) -> None:
    """Experts 768 wide: two ranks have 3 blocks of 128 each, four have one and a half."""
    model = model_of("qwen3-30b-a3b", quantization_config=FP8)
    assert split_problem(model.shape, model.stored, parse_layout(layout)) == told


def test_shards_of_packed_bits_must_hold_whole_groups() -> None:
    quantized = {"quant_method": "gptq", "bits": 4, "group_size": 256}
    model = model_of("qwen2.5-7b", quantization_config=quantized)
    assert split_problem(model.shape, model.stored, parse_layout("tp2")) is None
    told = "896 inputs of self_attn.o_proj on a GPU are no multiple of its blocks of 256"
    assert split_problem(model.shape, model.stored, parse_layout("tp4")) == told


# -- the KV cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout", "size"),
    [
        ("qwen3-30b-a3b", "tp1", 98304),
        ("qwen3-30b-a3b", "tp2", 98304 // 2),
        ("qwen3-30b-a3b", "tp4", 98304 // 4),
        ("qwen3-30b-a3b", "tp8", 98304 // 4),  # one head for a rank, and then copies
        ("qwen3-30b-a3b", "tp8dcp2", 98304 // 8),  # unless tokens are spread
        ("qwen3-30b-a3b", "pp2", 98304 // 2),
        ("qwen3-30b-a3b", "dp4ep", 98304),  # each engine has its own
        ("qwen3-30b-a3b", "tp1x4", 98304),
        ("deepseek-v3", "tp8", 70272),  # the latent is on every rank
        ("deepseek-v3", "tp8dcp8", 70272 // 8),
        ("deepseek-v3", "tp8pp2", 31 * 576 * 2),
        ("falcon-7b", "tp1", 8192),
    ],
)
def test_cache_of_a_token_on_a_gpu(name: str, layout: str, size: int) -> None:
    assert cached_token_bytes(shape_of(name), parse_layout(layout), 2) == size


def test_a_quantised_cache_is_half_as_large() -> None:
    assert model_of("qwen3-8b").cache_bits == 16
    assert model_of("qwen3-8b", cache_dtype="fp8").cache_bits == 8
    assert token_bytes(shape_of("qwen3-8b"), Layout(), 1) == 2 * 8 * 128


@pytest.mark.parametrize(
    ("name", "tokens", "size"),
    [
        ("qwen3-30b-a3b", 60_000, 60_000 * 98304),
        ("mistral-7b-v0.1", 60_000, 4096 * 131072),
        ("gemma-2-9b", 8192, (4096 + 8192) * 344064 // 2),
        ("gpt-oss-20b", 1000, (128 + 1000) * 49152 // 2),
        ("gpt-oss-20b", 100, 100 * 49152),
    ],
)
def test_cache_of_a_request(name: str, tokens: int, size: int) -> None:
    assert cached_request_bytes(shape_of(name), Layout(), 2, tokens) == size


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("qwen3-8b", [(36, None)]),
        ("mistral-7b-v0.1", [(32, 4096)]),
        ("gpt-oss-20b", [(12, 128), (12, None)]),
        ("gemma-2-9b", [(21, 4096), (21, None)]),
        # 29 with a window and 5 without: groups of 5, the last with window has 4.
        ("gemma-3-4b", [(5, 1024)] * 5 + [(4, 1024)] + [(5, None)]),
    ],
)
def test_groups_of_layers(name: str, groups: list[tuple[int, int | None]]) -> None:
    found = cache_groups(shape_of(name))
    assert [(len(group.layers), group.window) for group in found] == groups
    assert sorted(index for group in found for index in group.layers) == list(range(len(shape_of(name).layers)))


FULL, WINDOW = CacheGroup((0, 1), None), CacheGroup((2, 3), 1024)


@pytest.mark.parametrize(
    ("groups", "tokens", "dcp", "blocks"),
    [
        ([FULL], 1, 1, 1),
        ([FULL], 16, 1, 1),
        ([FULL], 17, 1, 2),
        ([FULL], 17, 2, 1),
        ([WINDOW], 100, 1, 7 + 1),
        ([WINDOW], 100_000, 1, (1023 + 8192 + 15) // 16 + 1),
        ([FULL, WINDOW], 100_000, 1, 6250 + (1023 + 8192 + 15) // 16 + 1),
    ],
)
def test_blocks_of_a_request(groups: list[CacheGroup], tokens: int, dcp: int, blocks: int) -> None:
    assert request_blocks(groups, tokens, 8192, dcp) == blocks


def test_a_block_holds_as_many_layers_as_the_largest_group_has_on_the_stage() -> None:
    shape = shape_of("gpt-oss-20b")
    groups, of_layer = cache_groups(shape), 2 * 8 * 64 * 2
    assert block_bytes(groups, range(24), of_layer) == 12 * 16 * of_layer
    assert block_bytes(groups, range(7), of_layer) == 4 * 16 * of_layer


# -- what fits -------------------------------------------------------------------------------------------------------

GIB = 2**30


def fit_of(name: str, layout: str, *, memory: int, reserve: int = 0, in_flight: int = 8192, **changes: Any) -> Any:
    model, parsed = model_of(name, **changes), parse_layout(layout)
    stages = stage_weights(model.shape, model.stored, parsed)
    sizes: dict[str, Any] = {"memory": memory, "reserve": reserve, "in_flight": in_flight}
    return fit(model.shape, stages, parsed, utilization=1.0, cache_element_bytes=model.cache_bits / 8, **sizes)


def test_blocks_fill_what_weights_and_reserve_leave() -> None:
    weights, block = 2 * 30_532_122_624, 16 * 98304
    found = fit_of("qwen3-30b-a3b", "tp1", memory=weights + GIB + 10 * block + 5, reserve=GIB)
    assert (found.blocks, found.tokens, found.context) == (10, 160, 160)
    assert (found.cache, found.fits) == (10 * block + 5, True)


def test_a_request_is_no_longer_than_the_model_allows() -> None:
    assert fit_of("qwen3-30b-a3b", "tp1", memory=1000 * GIB).context == 262_144


@pytest.mark.parametrize("missing", [1, GIB])
def test_what_does_not_fit_has_no_block(missing: int) -> None:
    found = fit_of("qwen3-30b-a3b", "tp1", memory=2 * 30_532_122_624 - missing)
    assert (found.blocks, found.context, found.cache, found.fits) == (0, 0, 0, False)


def test_the_fullest_stage_counts() -> None:
    model = model_of("llama-3.1-8b")
    stages = stage_weights(model.shape, model.stored, Layout(pp=3))
    assert [len(stage.layers) for stage in stages] == [11, 11, 10]
    found = fit_of("llama-3.1-8b", "pp3", memory=8 * GIB)
    assert found.weights == stages[0].total  # the table of tokens lies there, and as many layers as on the second
    assert found.blocks == (8 * GIB - stages[0].total) // (11 * 16 * 4096)


def test_context_parallelism_multiplies_tokens() -> None:
    alone = fit_of("deepseek-v2-lite", "tp8", memory=16 * GIB)
    spread = fit_of("deepseek-v2-lite", "tp8dcp8", memory=16 * GIB)
    assert spread.blocks == alone.blocks
    assert spread.tokens == 8 * alone.tokens


@pytest.mark.parametrize(("layout", "tokens", "requests"), [("tp1", 1_048_576, 512), ("tp2", 2_097_152, 1024)])
def test_what_fits_is_what_vllm_says(layout: str, tokens: int, requests: int) -> None:
    """vLLM 0.32, CPU build, 1 GiB a rank: 1,048,576 and 2,097,152 tokens, for requests of 2,048 512.00x, 1024.00x."""
    (stage,) = stage_weights(model_of("tiny-qwen2").shape, model_of("tiny-qwen2").stored, parse_layout(layout))
    found = fit_of("tiny-qwen2", layout, memory=stage.total + GIB)
    blocks = request_blocks(cache_groups(shape_of("tiny-qwen2")), 2048, 8192, 1)
    assert (found.tokens, found.blocks / blocks) == (tokens, requests)


@given(st.integers(1, 400_000))
def test_the_context_is_the_longest_that_fits(more: int) -> None:
    memory = 2 * 7_241_732_096 + more * 1024
    found, groups = fit_of("mistral-7b-v0.1", "tp1", memory=memory), cache_groups(shape_of("mistral-7b-v0.1"))
    assert found.context == 0 or request_blocks(groups, found.context, 8192, 1) <= found.blocks
    longest = found.context == 32_768
    assert longest or request_blocks(groups, found.context + 1, 8192, 1) > found.blocks


def test_activations_grow_with_the_step_and_shrink_with_tp() -> None:
    def size(layout: str, tokens: int = 8192) -> int:
        shape = shape_of("llama-3.1-70b")
        return activation_bytes(shape, parse_layout(layout), tokens=tokens, sequences=256, element_bytes=2)

    logits = 256 * 128_256 * 10
    assert size("tp1") == 8192 * (2 * 8192 + 3 * 28_672) * 2 + logits
    assert size("tp1", 16_384) - logits == 2 * (size("tp1") - logits)
    assert size("tp8") < size("tp1")


def test_weights_of_a_file_are_those_of_one_gpu() -> None:
    model = model_of("gpt-oss-20b")
    (stage,) = stage_weights(model.shape, model.stored, Layout())
    assert stage.total == sum(total_bytes(model.stored).values())
