from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_gpulayout.errors import ModelConfigError
from pytest_gpulayout.model_config import read_shape
from pytest_gpulayout.model_quantization import read_quantization
from pytest_gpulayout.model_shape import Experts, Latent, MultiHead
from pytest_gpulayout.model_tensors import active_parameters, parameters
from tests.support.model_configs import FOLDER, config_of, shape_of

NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def test_a_dense_model() -> None:
    shape = shape_of("llama-3.1-8b")
    assert shape.attention == MultiHead(heads=32, kv_heads=8, head_dim=128)
    assert {(layer.window, layer.mlp_width, layer.experts) for layer in shape.layers} == {(None, 14336, None)}
    assert (shape.hidden, shape.vocab, shape.tied, shape.dtype) == (4096, 128256, False, "bfloat16")


def test_experts_of_each_family() -> None:
    assert shape_of("qwen3-30b-a3b").experts == Experts(count=128, per_token=8, width=768)
    assert shape_of("mixtral-8x7b").experts == Experts(8, 2, 14336, module="block_sparse_moe")
    assert shape_of("deepseek-v3").experts == Experts(256, 8, 2048, shared_width=2048, correction=True)
    assert shape_of("deepseek-v2-lite").experts == Experts(64, 6, 1408, shared_width=2816)
    assert shape_of("gpt-oss-20b").experts == Experts(32, 4, 2880, biases=True)
    assert shape_of("llama-3.1-8b").experts is None


@pytest.mark.parametrize(
    ("name", "changes", "dense"),
    [
        ("deepseek-v3", {}, {0, 1, 2}),
        ("deepseek-v2-lite", {}, {0}),
        ("qwen3-30b-a3b", {}, set()),
        ("qwen3-30b-a3b", {"mlp_only_layers": [5]}, {5}),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 2}, set(range(0, 48, 2))),
    ],
)
def test_layers_without_experts(name: str, changes: dict[str, Any], dense: set[int]) -> None:
    layers = shape_of(name, **changes).layers
    assert {index for index, layer in enumerate(layers) if layer.experts is None} == dense


def test_latent_attention() -> None:
    attention = shape_of("deepseek-v3").attention
    assert attention == Latent(128, query_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    assert attention.cached == 576
    lite = shape_of("deepseek-v2-lite").attention
    assert isinstance(lite, Latent)
    assert lite.query_rank is None


@pytest.mark.parametrize(
    ("name", "changes", "sliding"),
    [
        ("llama-3.1-8b", {}, set()),
        ("mistral-7b-v0.1", {}, set(range(32))),
        ("mistral-7b-v0.1", {"sliding_window": None}, set()),
        ("gemma-2-9b", {}, set(range(0, 42, 2))),
        ("gemma-3-4b", {}, set(range(34)) - {5, 11, 17, 23, 29}),
        ("gpt-oss-20b", {}, set(range(0, 24, 2))),
        ("gpt-oss-20b", {"layer_types": ["full_attention"] * 23 + ["sliding_attention"]}, {23}),
        ("qwen2.5-7b", {}, set()),
        ("qwen2.5-7b", {"use_sliding_window": True, "max_window_layers": 20}, set(range(20, 28))),
    ],
)
def test_layers_with_a_window(name: str, changes: dict[str, Any], sliding: set[int]) -> None:
    layers = shape_of(name, **changes).layers
    assert {index for index, layer in enumerate(layers) if layer.window is not None} == sliding


def test_what_a_config_leaves_out_is_that_of_its_family() -> None:
    gemma = shape_of("gemma-3-4b")
    assert gemma.attention == MultiHead(8, 4, 256, head_norms=True)
    assert (gemma.vocab, gemma.tied, gemma.norms) == (262208, True, 4)
    falcon = shape_of("falcon-7b")
    assert falcon.attention == MultiHead(heads=71, kv_heads=1, head_dim=64)
    assert (falcon.tied, falcon.parallel, falcon.gated, falcon.layers[0].mlp_width) == (True, True, False, 18176)


def test_parts_that_are_not_counted_are_told() -> None:
    assert shape_of("gemma-3-4b").not_counted == ("the vision part",)
    assert shape_of("llama-3.1-8b").not_counted == ()
    assert shape_of("deepseek-v3").draft_layers == 1


def test_a_model_that_sees_may_keep_its_language_model_beside_the_rest() -> None:
    config = config_of("qwen2.5-7b", architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl")
    shape = read_shape({**config, "vision_config": {}}, "config.json")
    assert shape.layers == shape_of("qwen2.5-7b").layers
    assert shape.not_counted == ("the vision part",)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["JambaForCausalLM"]}, "found JambaForCausalLM\n  in x.json\n  understood are: Deepseek"),
        ({"architectures": []}, '"architectures" with the name of one model class was expected, found []'),
        ({"architectures": "LlamaForCausalLM"}, "found 'LlamaForCausalLM'"),
        ({"layer_types": ["full_attention", "linear_attention"] * 16}, "found also: linear_attention"),
        ({"mamba_d_state": 16}, "found also: mamba_d_state"),
        ({"hidden_size": None}, '"hidden_size" as a whole number was expected, found None'),
        ({"hidden_size": "4096"}, "found '4096'"),
        ({"num_hidden_layers": 0}, '"num_hidden_layers" as a whole number was expected, found 0'),
        ({"num_key_value_heads": True}, "found True"),
        ({"attention_bias": 1}, '"attention_bias" as true or false was expected, found 1'),
        ({"torch_dtype": "int8"}, "a dtype of weights was expected (bfloat16, float16"),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "opt"}},
            "found LlavaForConditionalGeneration around 'opt'",
        ),
        (
            {"layer_types": ["sliding_attention"], "sliding_window": 128},
            '"layer_types" of 32 layers was expected, found 1',
        ),
    ],
)
def test_what_is_not_understood_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        read_shape(config_of("llama-3.1-8b", **changes), "x.json")
    assert told in str(caught.value)
    assert "\n  in x.json\n" in str(caught.value)


@pytest.mark.parametrize("document", [None, [], "text", 1])
def test_what_is_no_object_is_refused(document: object) -> None:
    with pytest.raises(ModelConfigError, match="a JSON object was expected, found"):
        read_shape(document, "x.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted({key for name in NAMES for key in config_of(name)} | {"layer_types", "text_config", "mlp_only_layers"})
QUANTIZATION = (
    *("quant_method", "bits", "group_size", "weight_block_size", "ignore", "config_groups", "quant_algo"),
    *("modules_to_not_convert", "weights", "targets"),
)
METHODS = st.sampled_from(["fp8", "awq", "gptq", "mxfp4", "modelopt", "compressed-tensors"])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_any_config_is_read_or_refused(name: str, changes: dict[str, Any]) -> None:
    try:
        shape = read_shape(config_of(name, **changes), "x.json")
    except ModelConfigError as error:
        told = str(error)
    else:
        assert all(count >= 0 for count in parameters(shape).values())
        assert active_parameters(shape) <= sum(parameters(shape).values())
        return
    assert "\n  in x.json\n" in told


@given(METHODS, st.dictionaries(st.sampled_from(QUANTIZATION), JSON, max_size=4))
def test_any_quantisation_is_read_or_refused(method: str, said: dict[str, Any]) -> None:
    try:
        found = read_quantization({"quantization_config": {"quant_method": method, **said}}, "x.json")
    except ModelConfigError as error:
        told = str(error)
    else:
        assert found is not None
        weights = found.format_of("model.layers.0.mlp.up_proj", is_expert=True)
        assert weights is None or weights.bytes_of(64, 64) > 0
        return
    assert "\n  in x.json\n" in told
