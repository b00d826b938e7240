"""How long one step takes: a roofline of memory and arithmetic, plus what is said between GPUs. All of it estimates.

A step reads the weights that its tokens pass (of the experts those that at least one token is sent to) and, when it
decodes, the cache of its sequences; it multiplies; it communicates; and each layer costs a fixed time for its small
kernels. The larger of reading and multiplying counts, the rest is added. Leaves bytes to
:mod:`~pytest_gpulayout.model_memory`, messages to :mod:`~pytest_gpulayout.model_traffic`.

Sources: S. Williams et al., "Roofline", CACM 52(4), 2009, for the model; two operations for each weight that a token
passes, and four for each head dimension and token attended to (J. Kaplan et al., arXiv:2001.08361, table 1). The
shares of the peaks that are reached and the fixed time are assumptions (:data:`MEMORY_SHARE`,
:data:`ARITHMETIC_SHARE`, :data:`LAYER_US`); measure to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pytest_gpulayout.gpu_specs import GpuSpec
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.link_speeds import (
    Duration,
    LinkSpeed,
    all_gather,
    all_reduce,
    all_to_all,
    reduce_scatter,
    send,
)
from pytest_gpulayout.model_memory import StageWeights, token_bytes
from pytest_gpulayout.model_shape import Experts, Latent, ModelShape
from pytest_gpulayout.model_traffic import (
    Collective,
    Group,
    Step,
    step_traffic,
    tokens_of_a_rank,
    tokens_of_all,
)

MEMORY_SHARE = 0.8
"""Share of the memory bandwidth that large reads reach; an assumption."""
ARITHMETIC_SHARE = 0.6
"""Share of the dense peak that large matrix products reach; an assumption."""
LAYER_US = 20.0
"""Norms, rotations, routing and gaps between kernels of one layer, with CUDA graphs; an assumption."""

COMPONENTS = ("reading", "arithmetic", "communication", "fixed")


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine on its GPUs: all that the time of a step depends on.

    :param stages: weights of each pipeline stage. :param speeds: of the links within each kind of group.
    :param cache_element_bytes: of a cached element. :param to_experts: as in ``--all2all-backend``.
    """

    shape: ModelShape
    layout: Layout
    stages: tuple[StageWeights, ...]
    spec: GpuSpec
    speeds: Mapping[Group, LinkSpeed]
    cache_element_bytes: float
    to_experts: str


@dataclass(frozen=True, slots=True)
class StepTime:
    """The time of one step, through all stages one after the other; all in microseconds.

    :param reading: of stages that wait for memory. :param arithmetic: of stages that wait for it.
    :param slowest: of the slowest stage, with its share of communication.
    :param messages: each kind of message with the time of one.
    """

    reading: float
    arithmetic: float
    communication: float
    fixed: float
    slowest: float
    messages: tuple[tuple[Collective, Duration], ...]

    @property
    def total(self) -> float:
        """From the first stage to the last."""
        return self.reading + self.arithmetic + self.communication + self.fixed

    @property
    def communication_share(self) -> float:
        """Which part of it is communication."""
        return self.communication / self.total

    def parts(self) -> dict[str, float]:
        """The time by component."""
        return {name: getattr(self, name) for name in COMPONENTS}


def step_time(engine: Engine, step: Step, context: float) -> StepTime:
    """Return the time of one step.

    :param context: tokens that each of its tokens attends to, on average.
    """
    traffic = step_traffic(engine.shape, engine.layout, step, to_experts=engine.to_experts)
    messages = tuple((message, _duration(message, engine.speeds[message.group])) for message in traffic)
    communication = sum(message.count * duration.us for message, duration in messages)
    memory = [_memory_us(engine, stage, step, context) for stage in engine.stages]
    arithmetic = [_arithmetic_us(engine, stage, step, context) for stage in engine.stages]
    fixed = [len(stage.layers) * LAYER_US for stage in engine.stages]
    stages = list(zip(memory, arithmetic, fixed, strict=True))
    return StepTime(
        reading=sum(read for read, multiply, _ in stages if read >= multiply),
        arithmetic=sum(multiply for read, multiply, _ in stages if read < multiply),
        communication=communication,
        fixed=sum(fixed),
        slowest=max(max(read, multiply) + small for read, multiply, small in stages) + communication / len(stages),
        messages=messages,
    )


def touched_share(experts: Experts, tokens: int) -> float:
    """Return the expected share of a layer's experts that some tokens are sent to, each to its own at random.

    An expert is missed by one token with probability ``1 - per_token / count``, by all of them with its power.
    """
    return 1 - (1 - experts.per_token / experts.count) ** tokens


def _memory_us(engine: Engine, stage: StageWeights, step: Step, context: float) -> float:
    experts, layout = engine.shape.experts, engine.layout
    size = float(stage.each_step)
    if experts is not None:
        size += stage.routed * touched_share(experts, tokens_of_all(layout, step))
    if step.decode:
        of_layer = token_bytes(engine.shape, layout, engine.cache_element_bytes) / layout.dcp
        size += tokens_of_a_rank(layout, step) * of_layer * _attended(engine, stage, context)
    return size / (engine.spec.memory_gb_per_s * 1e3 * MEMORY_SHARE)


def _arithmetic_us(engine: Engine, stage: StageWeights, step: Step, context: float) -> float:
    experts, layout, spec = engine.shape.experts, engine.layout, engine.spec
    tokens = tokens_of_a_rank(layout, step)
    operations = 2.0 * (tokens * stage.elements + step.sequences * stage.head_elements)
    if experts is not None:
        routed = stage.routed_elements * experts.per_token / experts.count
        operations += 2.0 * tokens_of_all(layout, step) * routed
    operations += tokens * _attention_operations(engine) * _attended(engine, stage, context)
    peak = spec.bf16_tflops
    if spec.fp8_tflops is not None:
        peak = 1 / (stage.fp8 / spec.fp8_tflops + (1 - stage.fp8) / spec.bf16_tflops)
    return operations / (peak * 1e6 * ARITHMETIC_SHARE)


def _attended(engine: Engine, stage: StageWeights, context: float) -> float:
    """Tokens attended to, summed over the layers of a stage; a window ends some of them."""
    windows = (engine.shape.layers[index].window for index in stage.layers)
    return sum(context if window is None else min(window, context) for window in windows)


def _attention_operations(engine: Engine) -> float:
    """Of one token and one that it attends to, in one layer on one GPU: scores, and the sum of values."""
    attention = engine.shape.attention
    if isinstance(attention, Latent):
        return 2.0 * attention.heads / engine.layout.tp * (attention.cached + attention.kv_rank)
    return 4.0 * attention.heads / engine.layout.tp * attention.head_dim


def _duration(message: Collective, speed: LinkSpeed) -> Duration:
    ranks, size = message.ranks, message.size
    match message.operation:
        case "all-reduce":
            return all_reduce(ranks, size, speed)
        case "all-gather":
            return all_gather(ranks, size, speed)
        case "reduce-scatter":
            return reduce_scatter(ranks, size, speed)
        case "all-to-all":
            return all_to_all(ranks, size, speed)
        case "send":
            return send(size, speed)
