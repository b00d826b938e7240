"""What the GPUs of a layout say to each other in one step: which collectives, how often, how many bytes.

Knows where vLLM 0.32 communicates; :func:`step_traffic` is one table of it. Leaves times to
:mod:`~pytest_gpulayout.link_speeds`. Message sizes are exact; the number of ranks that a token's experts lie on is an
expectation with uniform routing, and used for all-to-all alone.

Sources, vLLM 0.32: ``vocab_parallel_embedding.py`` (all-reduce after the lookup), ``linear.py``
(``RowParallelLinear``), ``logits_processor.py`` (all-gather of logits), ``sequence.py`` and ``parallel_state.py``
(``isend_tensor_dict``: hidden state and residual, each rank of tp a part, then an all-gather),
``fused_moe/runner/moe_runner.py``, ``fused_moe/prepare_finalize/naive_dp_ep.py`` and ``all2all.py``
(``AgRsAll2AllManager``: all-gather of hidden states, weights and ids of experts, then a reduce-scatter),
``models/utils.py`` (``sequence_parallel_chunk``), ``v1/attention/ops/dcp.py`` (``cp_lse_ag_out_rs``) and ``pcp.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pytest_gpulayout.layout import Layout
from pytest_gpulayout.model_shape import Experts, Latent, ModelShape
from pytest_gpulayout.model_tensors import is_sequence_parallel, padded

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send"]
Group = Literal["tp", "pp", "dp", "ep", "dcp", "pcp"]

ALL_TO_ALL = ("allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency")
"""Ways to send tokens to experts that are counted, by the names of ``--all2all-backend``; the first is vLLM's own."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One kind of message of one step.

    :param group: ranks that take part, as vLLM calls the group. :param ranks: how many they are.
    :param count: how often in a step, over all stages one after the other.
    :param size: bytes: of an all-reduce the tensor; of an all-gather what each rank has afterwards; of a
        reduce-scatter what each rank brings; of an all-to-all what each rank sends; of a send what one rank sends.
    :param what: what it is for.
    """

    operation: Operation
    group: Group
    ranks: int
    count: int
    size: int
    what: str


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one engine.

    :param tokens: that its ranks compute together; with pcp each rank has its part of them.
    :param sequences: whose next token is sampled. :param decode: whether each sequence has one token in it.
    :param elsewhere: tokens that each other engine of dp computes meanwhile, ``None`` for as many.
    """

    tokens: int
    sequences: int
    decode: bool
    elsewhere: int | None = None


def tokens_of_all(layout: Layout, step: Step) -> int:
    """Return the tokens of all engines that share experts."""
    return step.tokens + (layout.dp - 1) * (step.tokens if step.elsewhere is None else step.elsewhere)


def step_traffic(
    shape: ModelShape,
    layout: Layout,
    step: Step,
    *,
    element_bytes: int = 2,
    to_experts: str = ALL_TO_ALL[0],
) -> tuple[Collective, ...]:
    """Return what is sent in one step, over all stages; nothing where one GPU does it alone.

    :param element_bytes: of an activation.
    :param to_experts: how tokens get to experts on other ranks, one of :data:`ALL_TO_ALL`.
    """
    return (
        *_tensor_parallel(shape, layout, step, element_bytes),
        *_pipeline(shape, layout, step, element_bytes),
        *_context(shape, layout, step, element_bytes),
        *_experts(shape, layout, step, element_bytes, to_experts),
    )


def tokens_of_a_rank(layout: Layout, step: Step) -> int:
    """Return the tokens that a rank computes: pcp spreads prefills, and decodes while each rank has a whole cache."""
    if layout.pcp == 1 or (step.decode and layout.dcp > 1):
        return step.tokens
    return -(-step.tokens // layout.pcp)


def _tensor_parallel(shape: ModelShape, layout: Layout, step: Step, element_bytes: int) -> Iterator[Collective]:
    if layout.tp == 1:
        return
    tp, layers = layout.tp, len(shape.layers)
    state = tokens_of_a_rank(layout, step) * shape.hidden * element_bytes
    yield Collective("all-reduce", "tp", tp, 1, state, "embedding")
    if shape.parallel:
        yield Collective("all-reduce", "tp", tp, layers, state, "attention and MLP together")
    else:
        yield Collective("all-reduce", "tp", tp, layers, state, "attention")
        if dense := layers - shape.expert_layers:
            yield Collective("all-reduce", "tp", tp, dense, state, "MLP")
        if shape.expert_layers and not is_sequence_parallel(layout):
            yield Collective("all-reduce", "tp", tp, shape.expert_layers, state, "experts")
    logits = step.sequences * padded(shape.vocab) * element_bytes
    yield Collective("all-gather", "tp", tp, 1, logits, "logits")


def _pipeline(shape: ModelShape, layout: Layout, step: Step, element_bytes: int) -> Iterator[Collective]:
    """Hidden state and residual go from stage to stage; a model whose branches run side by side has no residual."""
    if layout.pp == 1:
        return
    tensors = 1 if shape.parallel else 2
    state = tokens_of_a_rank(layout, step) * shape.hidden * element_bytes
    borders = layout.pp - 1
    part = state // layout.tp if (state // element_bytes) % layout.tp == 0 else state
    yield Collective("send", "pp", 2, tensors * borders, part, "hidden state" + " and residual" * (tensors - 1))
    if layout.tp > 1 and part != state:
        yield Collective("all-gather", "tp", layout.tp, tensors * borders, state, "what a stage received")


def _context(shape: ModelShape, layout: Layout, step: Step, element_bytes: int) -> Iterator[Collective]:
    attention, layers = shape.attention, len(shape.layers)
    if layout.pcp > 1 and not (step.decode and layout.dcp > 1) and isinstance(attention, Latent):
        size = tokens_of_a_rank(layout, step) * layout.pcp * attention.cached * element_bytes
        yield Collective("all-gather", "pcp", layout.pcp, layers, size, "keys and values for the cache")
    if layout.dcp == 1 or not step.decode:  # a prompt without earlier context attends to itself alone
        return
    heads = attention.heads // layout.tp * layout.dcp
    if isinstance(attention, Latent):
        query, output = attention.cached, attention.kv_rank
    else:
        query = output = attention.head_dim
    tokens, dcp = step.tokens, layout.dcp
    yield Collective("all-gather", "dcp", dcp, layers, tokens * heads * query * element_bytes, "queries")
    yield Collective("all-gather", "dcp", dcp, layers, dcp * tokens * heads * 4, "softmax sums")
    yield Collective("reduce-scatter", "dcp", dcp, layers, tokens * heads * output * element_bytes, "attention")


def _experts(
    shape: ModelShape, layout: Layout, step: Step, element_bytes: int, to_experts: str
) -> Iterator[Collective]:
    """How tokens of several engines, or parts of the tokens of one, get to experts and back.

    Within one engine (dp1, pcp1) nothing is sent: every rank of tp has all tokens, and the all-reduce sums up
    what their experts found, split or whole.
    """
    experts = shape.experts
    if experts is None or layout.dp * layout.pcp == 1:
        return
    group: Group = "ep" if is_sequence_parallel(layout) or (layout.ep and layout.pcp > 1) else "dp"
    group = group if layout.dp > 1 or group == "ep" else "pcp"
    ranks = {"ep": layout.tp * layout.dp * layout.pcp, "dp": layout.dp, "pcp": layout.pcp}[group]
    tokens = tokens_of_all(layout, step)
    layers = shape.expert_layers
    state = tokens * shape.hidden * element_bytes
    if to_experts == ALL_TO_ALL[0] or not layout.ep:
        routing = tokens * experts.per_token * 8  # a float32 weight and an int32 id
        yield Collective("all-gather", group, ranks, layers, state + routing, "tokens to experts")
        yield Collective("reduce-scatter", group, ranks, layers, state, "experts' results")
    else:
        yield from _to_all(shape, experts, layout, step, element_bytes, copies=to_experts == ALL_TO_ALL[2])
    if is_sequence_parallel(layout):
        own = step.tokens * shape.hidden * element_bytes
        yield Collective("all-gather", "tp", layout.tp, layers, own, "tokens of the engine")


def _to_all(
    shape: ModelShape, experts: Experts, layout: Layout, step: Step, element_bytes: int, *, copies: bool
) -> Iterator[Collective]:
    """DeepEP: a token in fp8 to each rank that has one of its experts (low latency: to each expert), results back."""
    ranks = layout.tp * layout.dp * layout.pcp
    tokens = -(-step.tokens // (layout.tp * layout.pcp))
    elsewhere = (ranks - 1) / ranks
    reached = experts.per_token if copies else ranks * (1 - (1 - 1 / ranks) ** experts.per_token)
    sent = tokens * reached * elsewhere * shape.hidden
    layers = shape.expert_layers
    yield Collective("all-to-all", "ep", ranks, layers, round(sent * (1 + 4 / 128)), "tokens to experts")
    yield Collective("all-to-all", "ep", ranks, layers, round(sent * element_bytes), "experts' results")


def group_ranks(layout: Layout, group: Group) -> tuple[tuple[int, ...], ...]:
    """Return the ranks of each group of a kind, of one replica; as ``initialize_model_parallel`` makes them.

    :returns: of pp the pairs of neighbouring stages, which are those that talk.
    """
    at = {
        (dp, pp, pcp, tp): ((dp * layout.pp + pp) * layout.pcp + pcp) * layout.tp + tp
        for dp in range(layout.dp)
        for pp in range(layout.pp)
        for pcp in range(layout.pcp)
        for tp in range(layout.tp)
    }
    if group == "pp":
        pairs = [(rank, at.get((dp, pp + 1, pcp, tp))) for (dp, pp, pcp, tp), rank in at.items()]
        return tuple((rank, other) for rank, other in pairs if other is not None)
    kinds: dict[Group, tuple[int, ...]] = {"tp": (3,), "dp": (0,), "pcp": (2,), "ep": (0, 2, 3), "dcp": (3,)}
    axes = kinds[group]
    if group == "dcp" and layout.pcp > 1:
        axes = (2,) if layout.dcp == layout.pcp else (2, 3)
    found: dict[tuple[int, ...], list[int]] = {}
    for place, rank in at.items():
        fixed = tuple(number for axis, number in enumerate(place) if axis not in axes)
        if group == "dcp" and layout.pcp == 1:
            fixed += (place[3] // layout.dcp,)
        found.setdefault(fixed, []).append(rank)
    return tuple(tuple(ranks) for ranks in found.values())


def talking_groups(shape: ModelShape, layout: Layout, to_experts: str) -> tuple[Group, ...]:
    """Return the kinds of groups that send anything, in decoding or in prefills."""
    steps = (Step(1, 1, decode=True), Step(1, 1, decode=False))
    traffic = (step_traffic(shape, layout, step, to_experts=to_experts) for step in steps)
    return tuple(sorted({message.group for messages in traffic for message in messages}))
