"""What a model takes on each GPU of a layout, and what is left for requests.

Knows vLLM's pipeline partition, what lies on the first and the last stage, the pool of KV blocks (groups of layers,
sliding windows, context parallelism) and what vLLM keeps free. Leaves single tensors to
:mod:`~pytest_gpulayout.model_tensors`. Weights and cache are exact; what activations, CUDA graphs and libraries
take is an estimate (:func:`activation_bytes`, :data:`FIXED_BYTES`), as vLLM measures it when it starts.

Sources, vLLM 0.32: ``distributed/utils.py`` (``get_pp_indices``), ``v1/core/kv_cache_utils.py``
(``_get_kv_cache_groups_uniform_page_size``, ``get_max_concurrency_for_kv_cache_config``), ``kv_cache_interface.py``
(``FullAttentionSpec``, ``SlidingWindowSpec``, ``MLAAttentionSpec``), ``config/cache.py`` (``gpu_memory_utilization``
0.92, blocks of 16 tokens), ``config/vllm.py`` (``max_in_flight_tokens``), ``config/model.py``
(``verify_with_parallel_config``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pytest_gpulayout.layout import Layout
from pytest_gpulayout.model_quantization import Quantization, WeightFormat
from pytest_gpulayout.model_shape import DTYPE_BYTES, Latent, ModelShape
from pytest_gpulayout.model_tensors import (
    Part,
    Tensor,
    embedding,
    expert_ranks,
    head,
    last_norm,
    layer_tensors,
    padded,
)

BLOCK_TOKENS = 16
DEFAULT_UTILIZATION = 0.92

FIXED_BYTES = 3 * 2**29
"""Allowance of 1.5 GiB for the CUDA context, libraries, NCCL's buffers and CUDA graphs; no formula says it."""


# -- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, where it is and how its elements are stored.

    :param layer: its layer; -1 for the embedding, ``n_layers`` for what comes after the last.
    :param element_bytes: of an element that is not quantised.
    """

    layer: int
    tensor: Tensor
    format: WeightFormat | None
    element_bytes: int

    def bytes_of(self, part: Tensor) -> int:
        """Return the bytes of the tensor, or of the part of it that a GPU holds."""
        if self.format is not None:
            return part.copies * self.format.bytes_of(part.rows, part.columns)
        return part.elements * self.element_bytes


def stored_tensors(shape: ModelShape, quantization: Quantization | None, dtype: str) -> tuple[StoredTensor, ...]:
    """Return all tensors of a model with their formats; a tied head is left out.

    :param dtype: of what is not quantised.
    """
    count = len(shape.layers)
    prefix = "transformer.h" if shape.modules == "falcon" else "model.layers"
    stored = [_stored(-1, embedding(shape), "", None, dtype)]
    for index, layer in enumerate(shape.layers):
        tensors = layer_tensors(shape, layer)
        stored += [_stored(index, tensor, f"{prefix}.{index}.", quantization, dtype) for tensor in tensors]
    stored.append(_stored(count, last_norm(shape), "", None, dtype))
    if not shape.tied:
        of_head = quantization if quantization is not None and quantization.head else None
        stored.append(_stored(count, head(shape), "", of_head, dtype))
    return tuple(stored)


def _stored(layer: int, tensor: Tensor, prefix: str, quantization: Quantization | None, dtype: str) -> StoredTensor:
    weights = None
    if quantization is not None and tensor.is_matrix:
        weights = quantization.format_of(prefix + tensor.module, is_expert=tensor.part == "experts")
    return StoredTensor(layer, tensor, weights, DTYPE_BYTES[tensor.dtype or dtype])


def total_bytes(stored: Sequence[StoredTensor]) -> dict[Part, int]:
    """Return the bytes of all weights by part, as they lie in the model's files."""
    found: dict[Part, int] = {}
    for item in stored:
        found[item.tensor.part] = found.get(item.tensor.part, 0) + item.bytes_of(item.tensor)
    return found


@dataclass(frozen=True, slots=True)
class StageWeights:
    """The weights on one GPU of a pipeline stage; where ranks differ, of the fullest.

    :param layers: of the stage. :param parts: bytes by part.
    :param each_step: bytes that every step reads: all but the table of tokens and routed experts.
    :param routed: bytes of the routed experts. :param elements: of matrices that every token passes but the head's.
    :param routed_elements: of matrices of routed experts. :param head_elements: of the head, for sampled tokens only.
    :param fp8: share of all elements computed in fp8.
    """

    layers: range
    parts: Mapping[Part, int]
    each_step: int
    routed: int
    elements: int
    routed_elements: int
    head_elements: int
    fp8: float

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def pipeline_stages(layers: int, stages: int) -> tuple[range, ...]:
    """Return the layers of each stage: those left over go to the stages before the last, from the back."""
    sizes = [layers // stages] * stages
    for position in range(2, layers % stages + 2):
        sizes[-position] += 1
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))


def stage_weights(shape: ModelShape, stored: Sequence[StoredTensor], layout: Layout) -> tuple[StageWeights, ...]:
    """Return what lies on one GPU of each stage, from first to last."""
    stages = pipeline_stages(len(shape.layers), layout.pp)
    found = []
    for stage, layers in enumerate(stages):
        ends: set[int] = {-1} if stage == 0 else set()
        is_last = stage == len(stages) - 1
        if is_last:
            ends |= {len(shape.layers)} | ({-1} if shape.tied else set())
        here = [item for item in stored if item.layer in layers or item.layer in ends]
        found.append(_sum_up(here, layers, layout, reads_table=is_last and shape.tied))
    return tuple(found)


def _sum_up(items: Sequence[StoredTensor], layers: range, layout: Layout, *, reads_table: bool) -> StageWeights:
    parts: dict[Part, int] = {}
    elements = {"routed": 0, "always": 0, "head": 0, "fp8": 0}
    each_step = 0
    for item in items:
        tensor = item.tensor.on_one_gpu(layout)
        size, part = item.bytes_of(tensor), tensor.part
        parts[part] = parts.get(part, 0) + size
        is_read = part not in ("experts", "embedding") or (part == "embedding" and reads_table)
        each_step += size if is_read else 0
        if tensor.columns > 1 and (is_read or part == "experts"):
            elements[_USE.get(part, "always")] += tensor.elements
            elements["fp8"] += tensor.elements if item.format is not None and item.format.compute == "fp8" else 0
    every = elements["routed"] + elements["always"] + elements["head"]
    return StageWeights(
        layers=layers,
        parts=parts,
        each_step=each_step,
        routed=parts.get("experts", 0),
        elements=elements["always"],
        routed_elements=elements["routed"],
        head_elements=elements["head"],
        fp8=elements["fp8"] / every if every else 0.0,
    )


_USE: Mapping[Part, str] = {"experts": "routed", "head": "head", "embedding": "head"}


# -- what vLLM refuses -----------------------------------------------------------------------------------------------


def split_problem(shape: ModelShape, stored: Sequence[StoredTensor], layout: Layout) -> str | None:
    """Return why vLLM cannot split the model so, ``None`` when it can."""
    return (
        _heads_problem(shape, layout)
        or _widths_problem(shape, layout)
        or _context_problem(shape, layout)
        or _blocks_problem(stored, layout)
    )


def _heads_problem(shape: ModelShape, layout: Layout) -> str | None:
    tp, heads = layout.tp, shape.attention.heads
    if heads % tp:
        return f"{heads} attention heads cannot be split over tp{tp}"
    if isinstance(shape.attention, Latent):
        return None
    kv_heads = shape.attention.kv_heads
    if max(tp, kv_heads) % min(tp, kv_heads):
        return f"{kv_heads} KV heads can neither be split over tp{tp} nor copied evenly"
    return None


def _widths_problem(shape: ModelShape, layout: Layout) -> str | None:
    if layout.pp > len(shape.layers):
        return f"{len(shape.layers)} layers cannot be split into {layout.pp} stages"
    if padded(shape.vocab) % layout.tp:
        return f"a vocabulary of {padded(shape.vocab)} rows (padded) cannot be split over tp{layout.tp}"
    widths = {layer.mlp_width for layer in shape.layers if layer.experts is None}
    if bad := sorted(width for width in widths if width % layout.tp):
        return f"an MLP {bad[0]} wide cannot be split over tp{layout.tp}"
    return _experts_problem(shape, layout)


def _experts_problem(shape: ModelShape, layout: Layout) -> str | None:
    experts, ranks = shape.experts, expert_ranks(layout)
    if experts is None:
        return "ep needs experts, this model has none" if layout.ep else None
    if layout.ep:
        return f"{experts.count} experts are fewer than the {ranks} ranks of ep" if experts.count < ranks else None
    if layout.tp > experts.count:
        return f"tp{layout.tp} is more than the {experts.count} experts"
    if experts.width % ranks:
        return f"experts {experts.width} wide cannot be split over {ranks} ranks (tp x dp x pcp)"
    if experts.shared_width % layout.tp:
        return f"shared experts {experts.shared_width} wide cannot be split over tp{layout.tp}"
    return None


def _context_problem(shape: ModelShape, layout: Layout) -> str | None:
    """The rules of ``verify_with_parallel_config``, and that only MLA's backends can split prefills."""
    tp, dcp, pcp, attention = layout.tp, layout.dcp, layout.pcp, shape.attention
    if isinstance(attention, Latent):
        fits = pcp == 1 or dcp in (1, pcp, tp * pcp)
        return None if fits else f"with pcp{pcp}, dcp must be 1, {pcp} or {tp * pcp}"
    if pcp > 1:
        return "pcp needs multi-head latent attention (MLA)"
    if dcp == 1:
        return None
    if any(layer.window is not None for layer in shape.layers):
        return "dcp cannot split layers with a sliding window"
    if tp <= attention.kv_heads:
        return f"dcp needs tp above the {attention.kv_heads} KV heads"
    copies = tp // attention.kv_heads
    if dcp > copies or (attention.heads // attention.kv_heads) % dcp:
        return f"dcp{dcp} must divide the {copies} copies of each KV head at tp{tp}"
    return None


def _blocks_problem(stored: Sequence[StoredTensor], layout: Layout) -> str | None:
    """Shards of a quantised matrix must hold whole blocks (``validate_fp8_block_shape``, GPTQ and AWQ alike)."""
    for item in stored:
        weights, whole = item.format, item.tensor
        if weights is None or not weights.must_divide:
            continue
        part = whole.on_one_gpu(layout)
        if part.rows != whole.rows and weights.scale_rows > 1 and part.rows % weights.scale_rows:
            block = weights.scale_rows
            return f"{part.rows} outputs of {whole.module} on a GPU are no multiple of its blocks of {block}"
        if part.columns != whole.columns and weights.scale_columns and part.columns % weights.scale_columns:
            return (
                f"{part.columns} inputs of {whole.module} on a GPU are no multiple of its blocks of "
                f"{weights.scale_columns}"
            )
    return None


# -- the KV cache ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share block tables. :param window: theirs, ``None`` for full attention."""

    layers: tuple[int, ...]
    window: int | None


def cache_groups(shape: ModelShape) -> tuple[CacheGroup, ...]:
    """Return the groups that vLLM makes: of one size, layers of a kind dealt out to them in turn."""
    kinds: dict[int | None, list[int]] = {}
    for index, layer in enumerate(shape.layers):
        kinds.setdefault(layer.window, []).append(index)
    sizes = [len(layers) for layers in kinds.values()]
    size = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)
    groups = []
    for window, layers in kinds.items():
        count = -(-len(layers) // size)
        groups += [CacheGroup(tuple(layers[position::count]), window) for position in range(count)]
    return tuple(groups)


def token_bytes(shape: ModelShape, layout: Layout, element_bytes: float) -> float:
    """Return what one token takes in the cache of one layer, on one GPU that holds it.

    KV heads are split by tp until there is one for a rank, then every rank has a copy; the latent of MLA is on every
    rank. Context parallelism spreads tokens, not what a token takes.
    """
    if isinstance(shape.attention, Latent):
        return shape.attention.cached * element_bytes
    kv_heads = max(1, shape.attention.kv_heads // layout.tp)
    return 2 * kv_heads * shape.attention.head_dim * element_bytes


def cached_token_bytes(shape: ModelShape, layout: Layout, element_bytes: float) -> float:
    """Return what a token takes in all layers on one GPU of the fullest stage, on average over the ranks of dcp."""
    most = max(len(layers) for layers in pipeline_stages(len(shape.layers), layout.pp))
    return most * token_bytes(shape, layout, element_bytes) / layout.dcp


def cached_request_bytes(shape: ModelShape, layout: Layout, element_bytes: float, tokens: int) -> float:
    """Return what a request keeps on one GPU of the fullest stage; layers with a window keep no more than that."""
    each = token_bytes(shape, layout, element_bytes) / layout.dcp
    kept = [tokens if layer.window is None else min(layer.window, tokens) for layer in shape.layers]
    return max(each * sum(kept[index] for index in stage) for stage in pipeline_stages(len(kept), layout.pp))


def request_blocks(groups: Sequence[CacheGroup], tokens: int, in_flight: int, dcp: int) -> int:
    """Return the blocks that vLLM reserves for a request of so many tokens, over all groups.

    :param in_flight: tokens that may be scheduled and not yet settled; layers with a window keep them, too.
    """
    blocks = 0
    for group in groups:
        if group.window is None:
            blocks += -(-tokens // (BLOCK_TOKENS * dcp))
        else:
            blocks += -(-min(group.window - 1 + in_flight, tokens) // BLOCK_TOKENS) + 1
    return blocks


def block_bytes(groups: Sequence[CacheGroup], layers: range, layer_token_bytes: float) -> float:
    """Return what a block takes on a GPU of a stage: as many layers as the largest group has there."""
    most = max(sum(index in layers for index in group.layers) for group in groups)
    return most * BLOCK_TOKENS * layer_token_bytes


# -- what fits -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fit:
    """The memory of one GPU, of the stage that has the least room.

    :param memory: of the GPU, bytes. :param usable: what vLLM may take of it. :param weights: bytes, exact.
    :param reserve: bytes for activations, graphs and libraries, an estimate. :param cache: bytes left for the cache.
    :param blocks: of the cache, on each engine. :param tokens: that these can hold.
    :param context: longest request that fits, up to the model's own limit; 0 where nothing does.
    """

    memory: int
    usable: int
    weights: int
    reserve: int
    cache: int
    blocks: int
    tokens: int
    context: int

    @property
    def fits(self) -> bool:
        """Whether at least a short request can be served."""
        return self.context >= BLOCK_TOKENS


def fit(
    shape: ModelShape,
    stages: Sequence[StageWeights],
    layout: Layout,
    *,
    memory: int,
    utilization: float,
    reserve: int,
    cache_element_bytes: float,
    in_flight: int,
) -> Fit:
    """Return what fits on GPUs of this memory.

    :param memory: bytes of one GPU. :param utilization: share of it that vLLM may take.
    :param reserve: bytes that are not for weights and cache.
    """
    groups, usable = cache_groups(shape), int(memory * utilization)
    of_layer = token_bytes(shape, layout, cache_element_bytes)
    left = [usable - stage.total - reserve for stage in stages]
    blocks = [
        max(0, int(room // block_bytes(groups, stage.layers, of_layer)))
        for room, stage in zip(left, stages, strict=True)
    ]
    tight = min(range(len(stages)), key=lambda stage: (blocks[stage], left[stage]))
    least = blocks[tight]
    return Fit(
        memory=memory,
        usable=usable,
        weights=stages[tight].total,
        reserve=reserve,
        cache=max(0, left[tight]),
        blocks=least,
        tokens=least // len(groups) * BLOCK_TOKENS * layout.dcp,
        context=_longest(shape, groups, least, in_flight, layout.dcp),
    )


def _longest(shape: ModelShape, groups: Sequence[CacheGroup], blocks: int, in_flight: int, dcp: int) -> int:
    low, high = 0, shape.max_context
    while low < high:
        middle = (low + high + 1) // 2
        if request_blocks(groups, middle, in_flight, dcp) <= blocks:
            low = middle
        else:
            high = middle - 1
    return low


def activation_bytes(shape: ModelShape, layout: Layout, *, tokens: int, sequences: int, element_bytes: int) -> int:
    """Return an estimate of the most that activations take in a step.

    The hidden state and its residual, the widest of what attention, MLP or experts make of it (``fused_moe.py`` keeps
    two buffers of tokens x experts per token), and logits of all sequences, in the model's dtype and twice in float32
    for sampling.

    :param tokens: of the largest step. :param sequences: of the largest batch.
    """
    attention = shape.attention
    if isinstance(attention, Latent):
        wide = attention.heads * (attention.nope_dim + attention.rope_dim + attention.value_dim) // layout.tp
        wide += attention.cached
    else:
        wide = (2 * attention.heads + 2 * attention.kv_heads) * attention.head_dim // layout.tp
    wide = max([wide, *(3 * layer.mlp_width // layout.tp for layer in shape.layers)])
    if shape.experts is not None:
        width = shape.experts.width // (1 if layout.ep else expert_ranks(layout))
        routed = shape.experts.per_token * (max(2 * width, shape.hidden) + width)
        wide = max(wide, routed * layout.dp)
    logits = sequences * padded(shape.vocab) * (element_bytes + 8)
    return tokens * (2 * shape.hidden + wide) * element_bytes + logits
