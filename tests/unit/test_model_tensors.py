from __future__ import annotations

from typing import Any

import pytest

from pytest_gpulayout.layout import Layout, parse_layout
from pytest_gpulayout.model_memory import token_bytes
from pytest_gpulayout.model_tensors import (
    Part,
    active_parameters,
    draft_parameters,
    embedding,
    head,
    layer_tensors,
    padded,
    parameters,
)
from tests.support.model_configs import shape_of

# Parameters as the models' pages give them. Bytes of a token in the cache, by hand, with 2 bytes an element:
# 2 (key and value) x KV heads x head size x layers x 2, of DeepSeek (latent + rotary key) x layers x 2.
KNOWN = {
    "llama-3.1-8b": (8_030_261_248, 2 * 8 * 128 * 32 * 2),  # 131072
    "llama-3.1-70b": (70_553_706_496, 2 * 8 * 128 * 80 * 2),  # 327680
    "qwen2.5-7b": (7_615_616_512, 2 * 4 * 128 * 28 * 2),  # 57344
    "qwen3-8b": (8_190_735_360, 2 * 8 * 128 * 36 * 2),  # 147456
    "qwen3-30b-a3b": (30_532_122_624, 2 * 4 * 128 * 48 * 2),  # 98304
    "mixtral-8x7b": (46_702_792_704, 2 * 8 * 128 * 32 * 2),  # 131072
    "mistral-7b-v0.1": (7_241_732_096, 2 * 8 * 128 * 32 * 2),  # 131072
    "phi-3-mini-4k": (3_821_079_552, 2 * 32 * 96 * 32 * 2),  # 393216
    "deepseek-v2-lite": (15_706_484_224, (512 + 64) * 27 * 2),  # 31104
    "deepseek-v3": (671_026_419_200, (512 + 64) * 61 * 2),  # 70272
    "gemma-2-9b": (9_241_705_984, 2 * 8 * 256 * 42 * 2),  # 344064
    "gemma-3-4b": (3_880_263_168, 2 * 4 * 256 * 34 * 2),  # 139264, its language model
    "falcon-7b": (6_921_720_704, 2 * 1 * 64 * 32 * 2),  # 8192
    "gpt-oss-20b": (20_914_757_184, 2 * 8 * 64 * 24 * 2),  # 49152
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_of_well_known_models(name: str) -> None:
    assert sum(parameters(shape_of(name)).values()) == KNOWN[name][0]


@pytest.mark.parametrize("name", KNOWN)
def test_cache_of_a_token_of_well_known_models(name: str) -> None:
    shape = shape_of(name)
    assert len(shape.layers) * token_bytes(shape, Layout(), 2) == KNOWN[name][1]


def test_parameters_by_part() -> None:
    hidden, width, layers = 2048, 768, 48
    assert parameters(shape_of("qwen3-30b-a3b")) == {
        "embedding": 151936 * hidden,
        "attention": layers * (2 * hidden * 32 * 128 + 2 * hidden * 4 * 128),
        "norms": layers * (2 * hidden + 2 * 128) + hidden,
        "router": layers * 128 * hidden,
        "experts": layers * 128 * 3 * hidden * width,
        "head": 151936 * hidden,
    }


def test_a_tied_head_is_counted_once() -> None:
    assert "head" not in parameters(shape_of("gemma-2-9b"))
    untied = parameters(shape_of("gemma-2-9b", tie_word_embeddings=False))
    assert untied["head"] == untied["embedding"] == 256_000 * 3584


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-30b-a3b", 3.35), ("mixtral-8x7b", 12.88), ("deepseek-v3", 37.55), ("llama-3.1-8b", 8.03)],
)
def test_active_parameters(name: str, billions: float) -> None:
    assert active_parameters(shape_of(name)) / 1e9 == pytest.approx(billions, abs=0.01)


def test_layers_for_speculative_decoding() -> None:
    # 187121664 attention and norms + 11320164608 experts, 2 x 7168^2 + 3 x 7168, 2 x 129280 x 7168.
    expected = 187_121_664 + 11_320_164_608 + 2 * 7168**2 + 3 * 7168 + 2 * 129_280 * 7168
    assert draft_parameters(shape_of("deepseek-v3")) == expected
    assert draft_parameters(shape_of("qwen3-8b")) == 0


# -- what lies on one GPU --------------------------------------------------------------------------------------------


def on_one_gpu(name: str, layout: str, part: Part, **changes: Any) -> int:
    """Elements of a part in the last layer."""
    shape = shape_of(name, **changes)
    tensors = layer_tensors(shape, shape.layers[-1])
    return sum(tensor.on_one_gpu(parse_layout(layout)).elements for tensor in tensors if tensor.part == part)


@pytest.mark.parametrize(
    ("layout", "kv_heads"), [("tp1", 8), ("tp2", 4), ("tp8", 1), ("tp16", 1), ("tp4pp2", 2), ("dp4", 8)]
)
def test_kv_heads_are_split_until_each_rank_has_one(layout: str, kv_heads: int) -> None:
    tp, hidden = parse_layout(layout).tp, 8192
    queries_and_output = 2 * hidden * (64 // tp) * 128
    expected = queries_and_output + 2 * hidden * kv_heads * 128
    assert on_one_gpu("llama-3.1-70b", layout, "attention") == expected


def test_what_mla_compresses_lies_on_every_rank() -> None:
    hidden, tp = 7168, 8
    whole = 1536 * hidden + 576 * hidden
    split = 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * hidden
    assert on_one_gpu("deepseek-v3", "tp8", "attention") == whole + split // tp


@pytest.mark.parametrize(
    ("layout", "experts", "width"),
    [
        ("tp4", 128, 768 // 4),
        ("tp2dp2", 128, 768 // 4),
        ("dp4", 128, 768 // 4),
        ("tp4ep", 128 // 4, 768),
        ("dp4ep", 128 // 4, 768),
        ("dp2tp2ep", 128 // 4, 768),
        ("pp4", 128, 768),
        ("tp1x4", 128, 768),
    ],
)
def test_experts_are_split_over_tp_and_dp_or_dealt_out(layout: str, experts: int, width: int) -> None:
    assert on_one_gpu("qwen3-30b-a3b", layout, "experts") == experts * 3 * 2048 * width
    assert on_one_gpu("qwen3-30b-a3b", layout, "router") == 128 * 2048


@pytest.mark.parametrize(("layout", "ranks"), [("tp8", 8), ("tp8ep", 8), ("dp8ep", 1), ("dp2tp4ep", 1)])
def test_shared_experts_are_whole_where_tokens_are_spread(layout: str, ranks: int) -> None:
    assert on_one_gpu("deepseek-v3", layout, "shared experts") == 3 * 7168 * 2048 // ranks


def test_biases_of_what_is_split_by_inputs_stay_whole() -> None:
    split = 2048 * 1 + 2 * 4 * 64 + 64 // 2  # qkv biases and sinks at tp2, in elements
    matrices = (4096 + 2 * 512) * 2880 // 2 + 4096 * 2880 // 2
    assert on_one_gpu("gpt-oss-20b", "tp2", "attention") == matrices + split + 2880


def test_vocabularies_are_padded_to_64() -> None:
    assert (padded(151_936), padded(50_257), padded(1)) == (151_936, 50_304, 64)
    shape = shape_of("llama-3.1-8b", vocab_size=50_257)
    assert embedding(shape).on_one_gpu(Layout(tp=4)).elements == 50_304 // 4 * 4096
    assert head(shape).on_one_gpu(Layout()).elements == 50_304 * 4096
