"""What a model is made of: layers, heads, experts and widths; values, without where they come from.

Leaves reading a ``config.json`` to :mod:`~pytest_gpulayout.model_config`, the tensors that follow to
:mod:`~pytest_gpulayout.model_tensors`, quantisation to :mod:`~pytest_gpulayout.model_quantization`.
"""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "half": 2, "float": 4}
"""Bytes of a weight that is not quantised, by the names of ``torch_dtype`` and of vLLM's ``--dtype``."""


@dataclass(frozen=True, slots=True)
class MultiHead:
    """Attention that caches keys and values by head: MHA, GQA and MQA.

    :param heads: of queries. :param kv_heads: of keys, and as many of values. :param head_dim: elements of each.
    :param qkv_bias: whether queries, keys and values have a bias. :param out_bias: whether the output has one.
    :param head_norms: whether queries and keys are normalised head by head (two norms of ``head_dim``).
    :param sinks: whether each head has one learned sink (gpt-oss).
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    head_norms: bool = False
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek): one latent vector and one rotary key a token are cached, for all heads.

    :param query_rank: width that queries are compressed to, ``None`` where they are not.
    :param kv_rank: width of the latent. :param nope_dim: of a head's key without rotation, :param rope_dim: with it.
    :param value_dim: of a head's value.
    """

    heads: int
    query_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    @property
    def cached(self) -> int:
        """Elements that are cached for a token and layer."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of one layer, and those that every token passes.

    :param count: routed experts. :param per_token: how many of them a token passes. :param width: of one of them.
    :param shared_width: of the shared experts together, 0 for none. :param shared_gate: whether a gate weighs them.
    :param correction: whether the router has a float32 correction for each expert (DeepSeek-V3).
    :param biases: whether router and experts have biases (gpt-oss).
    :param module: what checkpoints call the block that holds them.
    """

    count: int
    per_token: int
    width: int
    shared_width: int = 0
    shared_gate: bool = False
    correction: bool = False
    biases: bool = False
    module: str = "mlp"


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer.

    :param window: how many of the last tokens it attends to, ``None`` for all.
    :param mlp_width: of its dense MLP, 0 where it has experts.
    """

    window: int | None
    mlp_width: int
    experts: Experts | None = None


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only language model.

    :param layers: (n_layers,), from first to last.
    :param tied: the head is the embedding. :param gated: the MLP has a gate beside its up projection.
    :param norms: elements of the norms of a layer, in units of ``hidden``. :param final_norm: the same, of the last.
    :param parallel: attention and MLP run side by side, so a layer is reduced once.
    :param max_context: the longest context it was made for, in tokens.
    :param dtype: of the weights in the files, as the config says.
    :param draft_layers: layers for speculative decoding (MTP) that the files hold and vLLM loads on request alone.
    :param not_counted: parts that are in the files and not in these numbers, in words.
    """

    architecture: str
    source: str
    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    attention: MultiHead | Latent
    tied: bool
    dtype: str
    max_context: int
    gated: bool = True
    mlp_bias: bool = False
    norms: int = 2
    final_norm: int = 1
    parallel: bool = False
    modules: str = "llama"
    draft_layers: int = 0
    not_counted: tuple[str, ...] = ()

    @property
    def expert_layers(self) -> int:
        """How many layers have experts."""
        return sum(layer.experts is not None for layer in self.layers)

    @property
    def experts(self) -> Experts | None:
        """The experts, which are the same in all layers that have some."""
        return next((layer.experts for layer in self.layers if layer.experts is not None), None)
