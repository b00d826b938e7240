"""The ``config.json`` of a Hugging Face model, read as a :class:`~pytest_gpulayout.model_shape.ModelShape`.

Knows the families of models whose layers can be counted exactly, by their names in ``architectures`` and
``model_type``, and which of their layers attend to a window. A family not in the table, and a layer of another
kind (Mamba, linear or chunked attention), is refused: nothing is counted as something else. Leaves
``quantization_config`` to :mod:`~pytest_gpulayout.model_quantization`.

Sources: ``vllm/model_executor/models/*.py`` (0.32) for what a family has, ``transformers``, ``configuration_*.py``
(5.x) for the values that a config may leave out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pytest_gpulayout.errors import ModelConfigError
from pytest_gpulayout.model_shape import DTYPE_BYTES, Experts, Latent, Layer, ModelShape, MultiHead

_Windows = Literal["none", "all", "from-layer", "even", "five-of-six"]


@dataclass(frozen=True, slots=True)
class _Family:
    """What the models of a family have in common, and what their configs leave out.

    :param windows: which layers have one, where the config has no ``layer_types``: those of Qwen from
        ``max_window_layers`` on if ``use_sliding_window`` says so, of Gemma 2 and gpt-oss every other one from the
        first, of Gemma 3 all but every sixth.
    """

    qkv_bias: bool | None = None
    out_bias: bool | None = None
    head_norms: bool = False
    sinks: bool = False
    tied: bool = False
    norms: int = 2
    windows: _Windows = "none"
    experts: Literal["none", "mixtral", "qwen", "deepseek", "gpt-oss"] = "none"
    latent: bool = False
    defaults: tuple[tuple[str, int], ...] = ()


_GEMMA_3 = (
    ("vocab_size", 262_208),
    ("num_attention_heads", 8),
    ("num_key_value_heads", 4),
    ("head_dim", 256),
    ("max_position_embeddings", 131_072),
    ("sliding_window", 4096),
)

_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(qkv_bias=False, out_bias=False, windows="all"),
    "qwen2": _Family(qkv_bias=True, out_bias=False, windows="from-layer"),
    "qwen3": _Family(head_norms=True, windows="from-layer"),
    "phi3": _Family(qkv_bias=False, out_bias=False, windows="all"),
    "gemma": _Family(tied=True),
    "gemma2": _Family(tied=True, norms=4, windows="even"),
    "gemma3": _Family(tied=True, norms=4, head_norms=True, windows="five-of-six", defaults=_GEMMA_3),
    "mixtral": _Family(qkv_bias=False, out_bias=False, windows="all", experts="mixtral"),
    "qwen2_moe": _Family(qkv_bias=True, out_bias=False, windows="from-layer", experts="qwen"),
    "qwen3_moe": _Family(head_norms=True, windows="from-layer", experts="qwen"),
    "deepseek": _Family(latent=True, experts="deepseek"),
    "gpt_oss": _Family(qkv_bias=True, out_bias=True, sinks=True, windows="even", experts="gpt-oss"),
    "falcon": _Family(tied=True),
}

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV2ForCausalLM": "deepseek",
    "DeepseekV3ForCausalLM": "deepseek",
    "GptOssForCausalLM": "gpt_oss",
    "FalconForCausalLM": "falcon",
    "RWForCausalLM": "falcon",
}

_WITH_OTHER_PARTS = {
    "Gemma3ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
}
"""Models that see or hear; their language model is one of the families."""

_MODEL_TYPES = {
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt_oss",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    **{name: name for name in ("gemma", "gemma2", "llama", "mistral", "mixtral", "phi3")},
    **{name: name for name in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")},
}
"""Family of the language model inside another model, by its ``model_type``."""

_MOST_LAYERS = 10_000
_UNDERSTOOD_LAYERS = ("full_attention", "sliding_attention")
_OTHER_KINDS = (
    "attn_layer_period",
    "attention_chunk_size",
    "hybrid_override_pattern",
    "index_topk",
    "linear_num_key_heads",
    "mamba_d_state",
    "ssm_cfg",
    "block_configs",
)
"""Keys of configs whose layers are of kinds that are not counted here."""


def read_shape(config: object, source: str) -> ModelShape:
    """Return the shape of the model that a ``config.json`` describes.

    :param config: the parsed document. :param source: name of the file, for messages.
    :raises ModelConfigError: it is no config of a model, or of a model whose layers are not understood.
    """
    if not isinstance(config, Mapping):
        raise _error("a JSON object was expected", f"found {type(config).__name__}", source)
    architecture = _architecture(config, source)
    text = config.get("text_config") if architecture in _WITH_OTHER_PARTS else None
    inner: Mapping[str, Any] = text if isinstance(text, Mapping) else config
    name = _family_name(architecture, inner, source)
    family = _FAMILIES[name]
    _refuse_other_layers(inner, source)
    reader = _Reader(
        {**dict(family.defaults), **{key: value for key, value in inner.items() if value is not None}}, source
    )
    if name == "falcon":
        return _falcon(reader, architecture)
    return ModelShape(
        architecture=architecture,
        source=source,
        hidden=reader.size("hidden_size"),
        vocab=reader.size("vocab_size"),
        layers=_layers(reader, family),
        attention=_latent(reader) if family.latent else _multi_head(reader, family),
        tied=bool(inner.get("tie_word_embeddings", config.get("tie_word_embeddings", family.tied))),
        dtype=_dtype(config, inner, source),
        max_context=reader.size("max_position_embeddings"),
        mlp_bias=reader.flag("mlp_bias"),
        norms=family.norms,
        modules=name,
        draft_layers=reader.size("num_nextn_predict_layers", 0),
        not_counted=_other_parts(config, architecture),
    )


def _architecture(config: Mapping[str, Any], source: str) -> str:
    names = config.get("architectures")
    if not isinstance(names, Sequence) or isinstance(names, str) or len(names) != 1 or not isinstance(names[0], str):
        raise _error('"architectures" with the name of one model class was expected', f"found {names!r}", source)
    return names[0]


def _family_name(architecture: str, inner: Mapping[str, Any], source: str) -> str:
    if architecture in _ARCHITECTURES:
        return _ARCHITECTURES[architecture]
    model_type = inner.get("model_type")
    if architecture in _WITH_OTHER_PARTS and isinstance(model_type, str) and model_type in _MODEL_TYPES:
        return _MODEL_TYPES[model_type]
    found = f"found {architecture}" + (f" around {model_type!r}" if architecture in _WITH_OTHER_PARTS else "")
    raise ModelConfigError(
        f"a model whose layers can be counted was required, {found}\n  in {source}\n"
        f"  understood are: {', '.join(sorted({*_ARCHITECTURES, *_WITH_OTHER_PARTS}))}"
    )


def _refuse_other_layers(config: Mapping[str, Any], source: str) -> None:
    kinds = _listed(config, "layer_types", source)
    other = sorted({str(kind) for kind in kinds if kind not in _UNDERSTOOD_LAYERS})
    other += [key for key in _OTHER_KINDS if config.get(key)]
    if other:
        raise ModelConfigError(
            f"layers with full or sliding attention were required, found also: {', '.join(other)}\n  in {source}\n"
            "  what such layers keep for a token is not known here; the log of a server says: GPU KV cache size"
        )


def _other_parts(config: Mapping[str, Any], architecture: str) -> tuple[str, ...]:
    names = [key.removesuffix("_config") for key in config if key in ("vision_config", "audio_config")]
    if not names and architecture in _WITH_OTHER_PARTS:
        names = ["multimodal"]
    return tuple(f"the {name} part" for name in names)


def _dtype(config: Mapping[str, Any], inner: Mapping[str, Any], source: str) -> str:
    """Read what the config says; if nothing, vLLM looks into the files, which nearly always are bfloat16."""
    said = next((c[key] for c in (config, inner) for key in ("dtype", "torch_dtype") if c.get(key)), "bfloat16")
    if not isinstance(said, str) or said not in DTYPE_BYTES:
        raise _error(f"a dtype of weights was expected ({', '.join(DTYPE_BYTES)})", f"found {said!r}", source)
    return said


# -- layers ----------------------------------------------------------------------------------------------------------


def _multi_head(reader: _Reader, family: _Family) -> MultiHead:
    heads = reader.size("num_attention_heads")
    bias = reader.flag("attention_bias")
    return MultiHead(
        heads=heads,
        kv_heads=reader.size("num_key_value_heads", heads),
        head_dim=reader.size("head_dim", max(1, reader.size("hidden_size") // heads)),
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        out_bias=bias if family.out_bias is None else family.out_bias,
        head_norms=family.head_norms,
        sinks=family.sinks,
    )


def _latent(reader: _Reader) -> Latent:
    return Latent(
        heads=reader.size("num_attention_heads"),
        query_rank=reader.size("q_lora_rank", 0) or None,
        kv_rank=reader.size("kv_lora_rank"),
        nope_dim=reader.size("qk_nope_head_dim"),
        rope_dim=reader.size("qk_rope_head_dim"),
        value_dim=reader.size("v_head_dim"),
    )


def _layers(reader: _Reader, family: _Family) -> tuple[Layer, ...]:
    windows = _windows(reader, family)
    experts = _experts(reader, family)
    if experts is not None and experts.per_token > experts.count:
        raise reader.error(f"at most {experts.count} experts for a token were expected", f"found {experts.per_token}")
    width = reader.size("intermediate_size") if family.experts in ("none", "qwen", "deepseek") else 0
    layers = []
    for index, window in enumerate(windows):
        if experts is not None and _has_experts(reader, family, index):
            layers.append(Layer(window, 0, experts))
        else:
            layers.append(Layer(window, width))
    return tuple(layers)


def _experts(reader: _Reader, family: _Family) -> Experts | None:
    if family.experts == "none":
        return None
    per_token = reader.size("num_experts_per_tok")
    if family.experts == "mixtral":
        width = reader.size("intermediate_size")
        return Experts(reader.size("num_local_experts"), per_token, width, module="block_sparse_moe")
    if family.experts == "gpt-oss":
        return Experts(reader.size("num_local_experts"), per_token, reader.size("intermediate_size"), biases=True)
    width = reader.size("moe_intermediate_size")
    if family.experts == "qwen":
        shared = reader.size("shared_expert_intermediate_size", 0)
        return Experts(reader.size("num_experts"), per_token, width, shared, shared_gate=shared > 0)
    return Experts(
        count=reader.size("n_routed_experts"),
        per_token=per_token,
        width=width,
        shared_width=width * reader.size("n_shared_experts", 0),
        correction=reader.config.get("topk_method") == "noaux_tc",
    )


def _has_experts(reader: _Reader, family: _Family, index: int) -> bool:
    """Whether the layer has experts; the rules of Qwen's and DeepSeek's model classes."""
    if family.experts == "qwen":
        dense = _listed(reader.config, "mlp_only_layers", reader.source)
        return index not in dense and (index + 1) % reader.size("decoder_sparse_step", 1) == 0
    if family.experts == "deepseek":
        return index >= reader.size("first_k_dense_replace", 0) and index % reader.size("moe_layer_freq", 1) == 0
    return True


def _windows(reader: _Reader, family: _Family) -> tuple[int | None, ...]:
    """(n_layers,), the window of each layer, ``None`` for full attention."""
    count = reader.size("num_hidden_layers")
    if count > _MOST_LAYERS:
        raise reader.error(f"at most {_MOST_LAYERS} layers were expected", f"found {count}")
    kinds = _listed(reader.config, "layer_types", reader.source)
    window = reader.size("sliding_window", 0) or None
    if window is None or (family.windows == "from-layer" and not reader.flag("use_sliding_window")):
        return (None,) * count
    if kinds:
        if len(kinds) != count:
            raise reader.error(f'"layer_types" of {count} layers was expected', f"found {len(kinds)}")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = reader.size("max_window_layers", 0)
    pattern = reader.size("sliding_window_pattern", 6)
    slides: Mapping[_Windows, Collection[int]] = {
        "none": (),
        "all": range(count),
        "from-layer": range(first, count),
        "even": range(0, count, 2),
        "five-of-six": [index for index in range(count) if (index + 1) % pattern],
    }
    return tuple(window if index in slides[family.windows] else None for index in range(count))


def _falcon(reader: _Reader, architecture: str) -> ModelShape:
    """The first Falcon models, whose configs use other names and defaults (``vllm/.../models/falcon.py``)."""
    heads = reader.size("num_attention_heads", reader.size("n_head", 71))
    hidden, new = reader.size("hidden_size", 4544), reader.flag("new_decoder_architecture")
    one_head = reader.flag("multi_query", default=True)
    parallel = reader.flag("parallel_attn", default=True)
    norms = 2 if not parallel or reader.size("num_ln_in_parallel_attn", 2 if new else 1) == 2 else 1
    bias = reader.flag("bias")
    kv_heads = reader.size("num_kv_heads", reader.size("n_head_kv", heads)) if new else 1 if one_head else heads
    layers = reader.size("num_hidden_layers", reader.size("n_layer", 32))
    return ModelShape(
        architecture=architecture,
        source=reader.source,
        hidden=hidden,
        vocab=reader.size("vocab_size", 65_024),
        layers=(Layer(None, reader.size("ffn_hidden_size", 4 * hidden)),) * layers,
        attention=MultiHead(heads, kv_heads, hidden // heads, qkv_bias=bias, out_bias=bias),
        tied=reader.flag("tie_word_embeddings", default=True),
        dtype=_dtype(reader.config, reader.config, reader.source),
        max_context=reader.size("max_position_embeddings", 2048),
        gated=False,
        mlp_bias=bias,
        norms=2 * norms,
        final_norm=2,
        parallel=parallel or new,
        modules="falcon",
    )


# -- values ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Reader:
    """Values of a config, each checked when it is asked for."""

    config: Mapping[str, Any]
    source: str

    def size(self, key: str, default: int | None = None) -> int:
        """Return a whole number above 0; 0 is one where it is what a missing one means."""
        value = self.config.get(key, default)
        least = 0 if default == 0 else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(f'"{key}" as a whole number was expected', f"found {value!r}")
        return value

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return a truth value."""
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f'"{key}" as true or false was expected', f"found {value!r}")
        return value

    def error(self, expected: str, found: str) -> ModelConfigError:
        """Say what was expected and what was found, in this file."""
        return _error(expected, found, self.source)


def _listed(config: Mapping[str, Any], key: str, source: str) -> Sequence[Any]:
    """Return a list of the config, empty where it has none."""
    found = config.get(key) or ()
    if not isinstance(found, list | tuple):
        raise _error(f'"{key}" as a list was expected', f"found {found!r}", source)
    return found


def _error(expected: str, found: str, source: str) -> ModelConfigError:
    return ModelConfigError(
        f"{expected}, {found}\n  in {source}\n  give the config.json of a model, or its folder: --model CONFIG_OR_DIR"
    )
