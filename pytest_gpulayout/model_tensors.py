"""The tensors of a model, one by one, and what of each lies on one GPU.

Knows the shapes of the weights of every layer, and how vLLM splits them: by outputs (column parallel), by inputs
(row parallel), by KV heads until there is one for a rank and then in copies, by vocabulary padded to 64, by experts,
or not at all. Leaves bytes to :mod:`~pytest_gpulayout.model_quantization`, stages and sums to
:mod:`~pytest_gpulayout.model_memory`.

Sources: vLLM 0.32, ``model_executor/layers/linear.py`` (``QKVParallelLinear``, ``MergedColumnParallelLinear``,
``RowParallelLinear``, ``ReplicatedLinear``), ``vocab_parallel_embedding.py`` (``DEFAULT_VOCAB_PADDING_SIZE``),
``fused_moe/config.py`` (``FusedMoEParallelConfig.make``), ``models/deepseek_v2.py`` for MLA.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from pytest_gpulayout.layout import Layout
from pytest_gpulayout.model_shape import Experts, Latent, Layer, ModelShape, MultiHead

VOCAB_PADDING = 64

Part = Literal["embedding", "attention", "mlp", "experts", "shared experts", "router", "norms", "head"]


class Split(Enum):
    """How vLLM spreads a tensor."""

    WHOLE = "whole"
    COLUMNS = "by outputs"
    ROWS = "by inputs"
    KV_HEADS = "by KV heads"
    VOCABULARY = "by vocabulary"
    SHARED_COLUMNS = "by outputs, as shared experts are"
    SHARED_ROWS = "by inputs, as shared experts are"
    EXPERT_COLUMNS = "by experts or their outputs"
    EXPERT_ROWS = "by experts or their inputs"
    EXPERTS = "by experts"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight, or several of one shape.

    :param part: what it is counted as. :param module: its name in the layer, as checkpoints have it.
    :param rows: outputs. :param columns: inputs, 1 for biases and norms.
    :param is_matrix: whether it can be quantised. :param copies: how many there are, such as one for each expert.
    :param head_rows: rows of one KV head. :param dtype: what it is stored as whatever the model's dtype is.
    """

    part: Part
    module: str
    rows: int
    columns: int = 1
    split: Split = Split.WHOLE
    is_matrix: bool = False
    copies: int = 1
    head_rows: int = 0
    dtype: str | None = None

    @property
    def elements(self) -> int:
        """Weights in all copies."""
        return self.rows * self.columns * self.copies

    def on_one_gpu(self, layout: Layout) -> Tensor:
        """Return what of it one GPU of the layout holds; of uneven parts the largest."""
        rows, columns, copies = self.rows, self.columns, self.copies
        tp, shared, experts = layout.tp, _shared_ranks(layout), expert_ranks(layout)
        match self.split:
            case Split.COLUMNS:
                rows = _divided(rows, tp)
            case Split.ROWS:
                columns = _divided(columns, tp)
            case Split.KV_HEADS:
                rows = max(self.head_rows, _divided(rows, tp))
            case Split.VOCABULARY:
                rows = _divided(padded(rows), tp)
            case Split.SHARED_COLUMNS:
                rows = _divided(rows, shared)
            case Split.SHARED_ROWS:
                columns = _divided(columns, shared)
            case Split.EXPERT_COLUMNS if not layout.ep:
                rows = _divided(rows, experts)
            case Split.EXPERT_ROWS if not layout.ep:
                columns = _divided(columns, experts)
            case Split.EXPERT_COLUMNS | Split.EXPERT_ROWS | Split.EXPERTS if layout.ep:
                copies = _divided(copies, experts)
        return Tensor(self.part, self.module, rows, columns, self.split, self.is_matrix, copies, dtype=self.dtype)


def expert_ranks(layout: Layout) -> int:
    """Over how many ranks the experts of a layer are spread: tp x dp x pcp, with and without expert parallelism."""
    return layout.tp * layout.dp * layout.pcp


def is_sequence_parallel(layout: Layout) -> bool:
    """Whether tokens are spread over tp before experts, so that shared experts are whole on every rank.

    (``vllm/config/parallel.py``, ``use_sequence_parallel_moe``)
    """
    return layout.ep and layout.tp > 1 and layout.dp > 1


def padded(vocabulary: int) -> int:
    """Return the rows of an embedding of this vocabulary (``pad_vocab_size``)."""
    return -(-vocabulary // VOCAB_PADDING) * VOCAB_PADDING


def _shared_ranks(layout: Layout) -> int:
    return 1 if is_sequence_parallel(layout) else layout.tp


def _divided(size: int, ranks: int) -> int:
    return -(-size // ranks)


# -- the whole model -------------------------------------------------------------------------------------------------


def embedding(shape: ModelShape) -> Tensor:
    """The table of tokens."""
    name = "transformer.word_embeddings" if shape.modules == "falcon" else "model.embed_tokens"
    return Tensor("embedding", name, shape.vocab, shape.hidden, Split.VOCABULARY)


def head(shape: ModelShape) -> Tensor:
    """What turns the last hidden state into logits; the embedding itself where it is tied."""
    return Tensor("head", "lm_head", shape.vocab, shape.hidden, Split.VOCABULARY, is_matrix=True)


def last_norm(shape: ModelShape) -> Tensor:
    """The norm after the last layer."""
    return Tensor("norms", "norm", shape.final_norm * shape.hidden)


def layer_tensors(shape: ModelShape, layer: Layer) -> tuple[Tensor, ...]:
    """Return the tensors of one layer; their names begin after ``model.layers.N.``."""
    norms = Tensor("norms", "norms", shape.norms * shape.hidden)
    return (*_attention(shape), norms, *(_mlp(shape, layer) if layer.experts is None else _moe(shape, layer.experts)))


def all_tensors(shape: ModelShape) -> Iterator[Tensor]:
    """Every tensor of the model; a tied head is left out."""
    yield embedding(shape)
    for layer in shape.layers:
        yield from layer_tensors(shape, layer)
    yield last_norm(shape)
    if not shape.tied:
        yield head(shape)


def parameters(shape: ModelShape) -> dict[Part, int]:
    """Return the number of weights by part; their sum is what model cards call the model's parameters."""
    counts: dict[Part, int] = {}
    for tensor in all_tensors(shape):
        counts[tensor.part] = counts.get(tensor.part, 0) + tensor.elements
    return counts


def active_parameters(shape: ModelShape) -> int:
    """Return how many weights a token passes: of the routed experts those that it is sent to.

    The embedding counts once (a token reads one row of it, but a tied one is the head, too).
    """
    counts = parameters(shape)
    routed = counts.get("experts", 0)
    experts = shape.experts
    return sum(counts.values()) - routed + (0 if experts is None else routed * experts.per_token // experts.count)


def draft_parameters(shape: ModelShape) -> int:
    """Return the weights of the layers for speculative decoding, with their own embedding and head.

    As DeepSeek-V3 stores them (``vllm/model_executor/models/deepseek_mtp.py``): a decoder layer, a projection of two
    hidden states to one, three norms, the embedding and the head.
    """
    layer = sum(tensor.elements for tensor in layer_tensors(shape, shape.layers[-1]))
    more = 2 * shape.hidden**2 + 3 * shape.hidden + 2 * shape.vocab * shape.hidden
    return shape.draft_layers * (layer + more)


# -- layers ----------------------------------------------------------------------------------------------------------


def _matrix(part: Part, module: str, rows: int, columns: int, split: Split, copies: int = 1) -> Tensor:
    return Tensor(part, module, rows, columns, split, is_matrix=True, copies=copies)


def _attention(shape: ModelShape) -> Iterator[Tensor]:
    if isinstance(shape.attention, Latent):
        yield from _latent_attention(shape.hidden, shape.attention)
    else:
        yield from _head_attention(shape, shape.attention)


def _head_attention(shape: ModelShape, attention: MultiHead) -> Iterator[Tensor]:
    names = ("query_key_value", "query_key_value", "query_key_value", "dense")
    block = "self_attention"
    if shape.modules != "falcon":
        names, block = ("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"
    dim = attention.head_dim
    queries, keys = attention.heads * dim, attention.kv_heads * dim
    parts = ((queries, Split.COLUMNS, 0), (keys, Split.KV_HEADS, dim), (keys, Split.KV_HEADS, dim))
    for name, (rows, split, head_rows) in zip(names[:3], parts, strict=True):
        module = f"{block}.{name}"
        yield Tensor("attention", module, rows, shape.hidden, split, is_matrix=True, head_rows=head_rows)
        if attention.qkv_bias:
            yield Tensor("attention", f"{module}.bias", rows, 1, split, head_rows=head_rows)
    yield _matrix("attention", f"{block}.{names[3]}", shape.hidden, queries, Split.ROWS)
    if attention.out_bias:
        yield Tensor("attention", f"{block}.{names[3]}.bias", shape.hidden)
    if attention.sinks:
        yield Tensor("attention", f"{block}.sinks", attention.heads, 1, Split.COLUMNS)
    if attention.head_norms:
        yield Tensor("norms", f"{block}.head_norms", 2 * dim)


def _latent_attention(hidden: int, attention: Latent) -> Iterator[Tensor]:
    """What is compressed lies on every rank, what belongs to heads is split (``deepseek_v2.py``)."""
    key = attention.nope_dim + attention.rope_dim
    queries = attention.heads * key
    if attention.query_rank is None:
        yield _matrix("attention", "self_attn.q_proj", queries, hidden, Split.COLUMNS)
    else:
        rank = attention.query_rank
        yield _matrix("attention", "self_attn.q_a_proj", rank, hidden, Split.WHOLE)
        yield Tensor("norms", "self_attn.q_a_layernorm", rank)
        yield _matrix("attention", "self_attn.q_b_proj", queries, rank, Split.COLUMNS)
    yield _matrix("attention", "self_attn.kv_a_proj_with_mqa", attention.cached, hidden, Split.WHOLE)
    yield Tensor("norms", "self_attn.kv_a_layernorm", attention.kv_rank)
    values = attention.heads * (attention.nope_dim + attention.value_dim)
    yield _matrix("attention", "self_attn.kv_b_proj", values, attention.kv_rank, Split.COLUMNS)
    yield _matrix("attention", "self_attn.o_proj", hidden, attention.heads * attention.value_dim, Split.ROWS)


def _mlp(shape: ModelShape, layer: Layer) -> Iterator[Tensor]:
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down = "down_proj"
    if not shape.gated:
        up, down = ("dense_h_to_4h",), "dense_4h_to_h"
    for name in up:
        yield _matrix("mlp", f"mlp.{name}", layer.mlp_width, shape.hidden, Split.COLUMNS)
        if shape.mlp_bias:
            yield Tensor("mlp", f"mlp.{name}.bias", layer.mlp_width, 1, Split.COLUMNS)
    yield _matrix("mlp", f"mlp.{down}", shape.hidden, layer.mlp_width, Split.ROWS)
    if shape.mlp_bias:
        yield Tensor("mlp", f"mlp.{down}.bias", shape.hidden)


def _moe(shape: ModelShape, experts: Experts) -> Iterator[Tensor]:
    """Router, routed experts and shared ones; routers are on every rank and never quantised."""
    hidden, width, count = shape.hidden, experts.width, experts.count
    yield Tensor("router", f"{experts.module}.gate", count, hidden)
    if experts.correction:
        yield Tensor("router", f"{experts.module}.gate.e_score_correction_bias", count, dtype="float32")
    module = f"{experts.module}.experts.0"
    for name in ("gate_proj", "up_proj"):
        yield _matrix("experts", f"{module}.{name}", width, hidden, Split.EXPERT_COLUMNS, count)
    yield _matrix("experts", f"{module}.down_proj", hidden, width, Split.EXPERT_ROWS, count)
    if experts.biases:
        yield Tensor("router", f"{experts.module}.router.bias", count)
        yield Tensor("experts", f"{module}.up_bias", 2 * width, 1, Split.EXPERT_COLUMNS, copies=count)
        yield Tensor("experts", f"{module}.down_bias", hidden, 1, Split.EXPERTS, copies=count)
    if experts.shared_width:
        shared = f"{experts.module}.shared_experts"
        for name in ("gate_proj", "up_proj"):
            yield _matrix("shared experts", f"{shared}.{name}", experts.shared_width, hidden, Split.SHARED_COLUMNS)
        yield _matrix("shared experts", f"{shared}.down_proj", hidden, experts.shared_width, Split.SHARED_ROWS)
    if experts.shared_gate:
        yield Tensor("shared experts", f"{experts.module}.shared_expert_gate", 1, hidden)
