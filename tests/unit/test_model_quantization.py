from __future__ import annotations

from typing import Any

import pytest

from pytest_gpulayout.errors import ModelConfigError
from pytest_gpulayout.model_memory import total_bytes
from pytest_gpulayout.model_quantization import Quantization, WeightFormat, read_quantization
from tests.support.model_configs import model_of

LINEAR = "model.layers.0.mlp.up_proj"
FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
FP8_CHANNELS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


def read(**said: Any) -> Quantization:
    found = read_quantization({"quantization_config": said}, "x.json")
    assert found is not None
    return found


def compressed(weights: dict[str, Any], *, targets: tuple[str, ...] = ("Linear",), **more: Any) -> Quantization:
    group = {"targets": list(targets), "weights": weights, "input_activations": more.pop("inputs", None)}
    said = {"ignore": ["lm_head"], **more, "quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return read(**said)


def test_nothing_is_quantised_without_a_word() -> None:
    assert read_quantization({"architectures": ["LlamaForCausalLM"]}, "x.json") is None


@pytest.mark.parametrize(
    ("weights", "rows", "columns", "size"),
    [
        (WeightFormat("fp8", 8), 100, 64, 6400),
        (WeightFormat("fp8", 8, 4), 100, 64, 6400 + 4),  # one scale
        (WeightFormat("fp8", 8, 4, 1), 100, 64, 6400 + 4 * 100),  # one for each output
        (WeightFormat("fp8", 8, 4, 128, 128), 256, 512, 256 * 512 + 4 * 2 * 4),
        (WeightFormat("fp8", 8, 4, 128, 128), 130, 129, 130 * 129 + 4 * 2 * 2),  # blocks cut short
        (WeightFormat("int4", 4, 2, 1, 128), 64, 256, 64 * 128 + 2 * 64 * 2),
        (WeightFormat("awq", 4, 2, 1, 128, 4), 64, 256, 64 * 128 + 2 * 64 * 2 + 64 * 2 // 2),
        (WeightFormat("mxfp4", 4, 1, 1, 32), 64, 64, 64 * 32 + 64 * 2),
    ],
)
def test_bytes_of_a_matrix(weights: WeightFormat, rows: int, columns: int, size: int) -> None:
    assert weights.bytes_of(rows, columns) == size


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (read(**FP8_BLOCKS), (8, 4, 128, 128, 0, "fp8")),
        (read(quant_method="fp8", activation_scheme="static"), (8, 4, 0, 0, 0, "fp8")),
        (read(quant_method="awq", bits=4, group_size=128), (4, 2, 1, 128, 4, "bf16")),
        (read(quant_method="awq", w_bit=4, q_group_size=64), (4, 2, 1, 64, 4, "bf16")),
        (read(quant_method="gptq", bits=8, group_size=-1), (8, 2, 1, 0, 8, "bf16")),
        (compressed(INT4), (4, 2, 1, 128, 0, "bf16")),
        (compressed({**INT4, "symmetric": False}), (4, 2, 1, 128, 4, "bf16")),
        (compressed(FP8_CHANNELS, inputs={}), (8, 4, 1, 0, 0, "fp8")),
        (compressed(FP8_CHANNELS), (8, 4, 1, 0, 0, "bf16")),
        (compressed({"num_bits": 8, "type": "int", "strategy": "tensor"}, inputs={}), (8, 4, 0, 0, 0, "bf16")),
        (
            compressed({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 32]}),
            (8, 4, 64, 32, 0, "bf16"),
        ),
        (
            compressed({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
            (4, 1, 1, 16, 0, "bf16"),
        ),
        (read(quant_method="modelopt", quant_algo="FP8"), (8, 4, 0, 0, 0, "fp8")),
        (read(quant_method="modelopt", quantization={"quant_algo": "NVFP4"}), (4, 1, 1, 16, 0, "bf16")),
    ],
)
def test_formats(found: Quantization, expected: tuple[object, ...]) -> None:
    weights = found.format_of(LINEAR)
    assert weights is not None
    assert expected == (
        *(weights.bits, weights.scale_bytes, weights.scale_rows, weights.scale_columns),
        *(weights.zero_bits, weights.compute),
    )


@pytest.mark.parametrize(
    ("pattern", "module", "ignored"),
    [
        ("lm_head", "lm_head", True),
        ("model.layers.3.mlp.gate", "model.layers.3.mlp.gate", True),
        ("model.layers.3.mlp.gate", "model.layers.3.mlp.gate_proj", False),
        ("model.layers.3", "model.layers.3.self_attn.q_proj", True),
        ("model.layers.3", "model.layers.31.self_attn.q_proj", False),
        ("self_attn", "model.layers.3.self_attn.q_proj", True),
        ("model.layers.*.self_attn", "model.layers.3.self_attn.q_proj", True),
        ("model.layers.*.self_attn", "model.layers.3.mlp.up_proj", False),
        ("re:.*shared_experts.*", "model.layers.3.mlp.shared_experts.up_proj", True),
        ("re:.*lm_head", "model.layers.3.mlp.up_proj", False),
        ("language_model.model.layers.0.self_attn", "model.layers.0.self_attn.q_proj", True),
    ],
)
def test_what_is_left_as_it_was(pattern: str, module: str, ignored: bool) -> None:
    found = read(**FP8_BLOCKS, modules_to_not_convert=[pattern])
    assert (found.format_of(module) is None) is ignored


def test_mxfp4_is_for_experts_alone() -> None:
    found = read(quant_method="mxfp4")
    assert found.format_of("model.layers.0.mlp.experts.0.up_proj", is_expert=True) is not None
    assert found.format_of("model.layers.0.self_attn.q_proj") is None


def test_targets_by_name_come_in_their_order() -> None:
    groups = {
        "a": {"targets": ["re:.*down_proj"], "weights": FP8_CHANNELS},
        "b": {"targets": ["Linear"], "weights": INT4},
    }
    found = read(quant_method="compressed-tensors", config_groups=groups)
    formats = {name: found.format_of(f"model.layers.0.mlp.{name}") for name in ("down_proj", "up_proj")}
    assert {name: found and found.bits for name, found in formats.items()} == {"down_proj": 8, "up_proj": 4}


@pytest.mark.parametrize(
    ("found", "head"),
    [
        (read(**FP8_BLOCKS), False),
        (read(quant_method="gptq", bits=4, group_size=128), False),
        (read(quant_method="gptq", bits=4, group_size=128, lm_head=True), True),
        (compressed(INT4), False),
        (compressed(INT4, ignore=[]), True),
        (compressed(INT4, targets=("re:.*mlp.*",), ignore=[]), False),
    ],
)
def test_the_head(found: Quantization, head: bool) -> None:
    assert found.head is head


@pytest.mark.parametrize(
    ("found", "bits"),
    [
        (compressed(FP8_CHANNELS), None),
        (compressed(FP8_CHANNELS, kv_cache_scheme={"type": "float", "num_bits": 8}), 8),
        (read(quant_method="modelopt", quant_algo="FP8", kv_cache_quant_algo="FP8"), 8),
        (read(quant_method="modelopt", quant_algo="FP8", kv_cache_quant_algo=None), None),
    ],
)
def test_models_made_for_a_quantised_cache(found: Quantization, bits: int | None) -> None:
    assert found.kv_bits == bits


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"quant_method": "bitsandbytes"}, "gptq, modelopt, modelopt_fp4, mxfp4), found 'bitsandbytes'"),
        ({"bits": 4}, "a known quantisation was required"),
        ({"quant_method": "gptq", "bits": 4}, '"group_size" as a whole number was expected, found None'),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "found 0"),
        ({"quant_method": "gptq", "bits": "4", "group_size": 128}, "found '4'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:x": {}}}, 'found "dynamic" ones'),
        ({"quant_method": "fp8", "weight_block_size": [128]}, '"weight_block_size" as two whole numbers'),
        ({"quant_method": "modelopt", "quant_algo": "INT4"}, "FP8 or NVFP4 was expected, found 'INT4'"),
        ({"quant_method": "compressed-tensors"}, '"config_groups" was expected, found None'),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": INT4}}},
            None,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"targets": ["Linear"], "weights": {**INT4, "strategy": "token"}}},
            },
            "\"strategy\" tensor, channel, group or block was expected, found 'token'",
        ),
    ],
)
def test_what_is_not_known_is_refused(said: dict[str, Any], told: str | None) -> None:
    if told is None:  # a group without targets means no matrix
        assert read(**said).formats == ()
        return
    with pytest.raises(ModelConfigError) as caught:
        read(**said)
    assert told in str(caught.value)
    assert "\n  in x.json\n" in str(caught.value)


# -- whole models ----------------------------------------------------------------------------------------------------


def test_gpt_oss_is_as_large_as_its_index_says() -> None:
    """13761264768 bytes: experts at 4 bits and a byte for 32, everything else bfloat16."""
    assert sum(total_bytes(model_of("gpt-oss-20b").stored).values()) == 13_761_264_768


def test_deepseek_in_fp8() -> None:
    """A byte for each matrix element outside head and routers, 4 for each block of 128 x 128."""
    found = total_bytes(model_of("deepseek-v3").stored)
    expert = 3 * 7168 * 2048
    scales = 3 * 56 * 16 * 4
    assert found["experts"] == 58 * 256 * (expert + scales)
    assert found["embedding"] == found["head"] == 2 * 129_280 * 7168
    assert found["router"] == 58 * 256 * (2 * 7168 + 4)
    # kv_a_proj_with_mqa has 576 outputs: 5 blocks, the last one cut short.
    attention = ((1536, 7168), (24_576, 1536), (576, 7168), (32_768, 512), (7168, 16_384))
    one = sum(rows * columns + 4 * -(-rows // 128) * -(-columns // 128) for rows, columns in attention)
    assert found["attention"] == 61 * one


def test_awq_of_a_dense_model() -> None:
    """Qwen2.5-7B: 28 layers of 4-bit matrices with a scale and a zero point for 128 inputs, biases in float16."""
    quantized = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    found = total_bytes(model_of("qwen2.5-7b", quantization_config=quantized).stored)
    matrices = 3 * 3584 * 18944
    assert found["mlp"] == 28 * (matrices // 2 + matrices // 128 * 2 + matrices // 128 // 2)
    assert found["head"] == 2 * 152_064 * 3584
