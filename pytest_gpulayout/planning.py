"""What one layout takes on a machine, and what it is expected to do.

Puts memory, traffic and step times together. Leaves choosing among layouts to :mod:`~pytest_gpulayout.plan_ranking`,
text and JSON to :mod:`~pytest_gpulayout.plan_text`. Weights, cache and message sizes are exact; times are estimates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from pytest_gpulayout.errors import TopologyError
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.link_speeds import LinkSpeed, link_speed, network_speed, worst_speed
from pytest_gpulayout.model_memory import (
    FIXED_BYTES,
    Fit,
    StageWeights,
    activation_bytes,
    cache_groups,
    cached_token_bytes,
    fit,
    request_blocks,
    split_problem,
    stage_weights,
)
from pytest_gpulayout.model_shape import DTYPE_BYTES, ModelShape
from pytest_gpulayout.model_traffic import Group, Step, group_ranks, talking_groups
from pytest_gpulayout.placement import choose_placement
from pytest_gpulayout.plan_inputs import Demand, Machine, PlannedModel, ServerOptions
from pytest_gpulayout.step_time import COMPONENTS, Engine, StepTime, step_time


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a layout is expected to do; times are estimates.

    :param batch: sequences that an engine decodes at once under the demand.
    :param alone: a decoding step with one sequence. :param busy: one with the batch, of a pipeline one of its parts.
    :param prompt: a step that reads a prompt, or a part of one, while all engines do.
    :param ttft_s: of one request alone. :param tpot_alone_s: of one request alone. :param tpot_s: under the demand.
    :param latency: seconds of one request alone, by component.
    :param per_request: seconds of the layout for a request under the demand, by component; the inverse of its rate.
    """

    batch: int
    alone: StepTime
    busy: StepTime
    prompt: StepTime
    ttft_s: float
    tpot_alone_s: float
    tpot_s: float
    latency: Mapping[str, float]
    per_request: Mapping[str, float]

    @property
    def latency_s(self) -> float:
        """Seconds of one request alone."""
        return sum(self.latency.values())

    @property
    def requests_per_s(self) -> float:
        """Requests that are completed under the demand."""
        return 1 / sum(self.per_request.values())


@dataclass(frozen=True, slots=True)
class LayoutPlan:
    """One layout on the machine.

    :param problem: why it cannot be, ``None`` when it can. What follows is empty or ``None`` where that is so.
    :param speeds: of the links within each kind of group.
    :param token_bytes: what a token takes in the cache of a GPU. :param requests: of the demanded length that fit at
        once, over all engines.
    """

    layout: Layout
    problem: str | None = None
    placement: tuple[int, ...] = ()
    speeds: Mapping[Group, LinkSpeed] | None = None
    stages: tuple[StageWeights, ...] = ()
    fit: Fit | None = None
    token_bytes: float = 0.0
    requests: float = 0.0
    estimate: Estimate | None = None


def plan_layout(
    model: PlannedModel, machine: Machine, layout: Layout, demand: Demand, options: ServerOptions
) -> LayoutPlan:
    """Return what a layout takes and what it is expected to do."""
    placement, problem = _placement(model, machine, layout)
    if problem is not None:
        return LayoutPlan(layout, problem)
    speeds, unknown = _speeds(model.shape, machine, layout, placement, options.to_experts)
    if unknown is not None:
        return LayoutPlan(layout, unknown, placement)
    stages, cache_bytes = stage_weights(model.shape, model.stored, layout), model.cache_bits / 8
    found = _fit(model, machine, layout, stages, options)
    requests = _requests(model, machine, layout, found, demand, options)
    plan = LayoutPlan(
        layout=layout,
        problem=_room_problem(found, requests, demand),
        placement=placement,
        speeds=speeds,
        stages=stages,
        fit=found,
        token_bytes=cached_token_bytes(model.shape, layout, cache_bytes),
        requests=requests,
    )
    if plan.problem is not None:
        return plan
    engine = Engine(model.shape, layout, stages, machine.spec, speeds, cache_bytes, options.to_experts)
    return replace(plan, estimate=_estimate(engine, demand, options.limits(machine), requests))


def _placement(model: PlannedModel, machine: Machine, layout: Layout) -> tuple[tuple[int, ...], str | None]:
    """The devices of one node's ranks; or what to say where the layout cannot be."""
    problem = split_problem(model.shape, model.stored, layout)
    if problem is not None:
        return (), problem
    try:
        return choose_placement(machine.topology, layout), None
    except TopologyError as error:
        return (), str(error).partition("\n")[0]


def _speeds(
    shape: ModelShape, machine: Machine, layout: Layout, placement: Sequence[int], to_experts: str
) -> tuple[dict[Group, LinkSpeed], str | None]:
    """The worst link within each kind of group that talks, over all replicas; and what to say if one is unknown."""
    speeds: dict[Group, LinkSpeed] = {}
    for group in talking_groups(shape, layout, to_experts):
        pairs = {
            (a + replica * layout.ranks, b + replica * layout.ranks)
            for ranks in group_ranks(layout, group)
            for a, b in combinations(ranks, 2)
            for replica in range(layout.replicas)
        }
        found = [_speed_between(machine, layout, placement, *pair) for pair in sorted(pairs)]
        if unknown := next((text for text in found if isinstance(text, str)), None):
            return {}, unknown
        worst = worst_speed(speed for speed in found if isinstance(speed, LinkSpeed))
        if worst is not None:
            speeds[group] = worst
    return speeds, None


def _speed_between(machine: Machine, layout: Layout, placement: Sequence[int], a: int, b: int) -> LinkSpeed | str:
    """The link of two ranks; nodes hold consecutive ranks and are alike."""
    size = layout.gpus_per_node
    if a // size != b // size:
        return network_speed(machine.network, machine.spec)
    first, second = placement[a % size], placement[b % size]
    link = machine.topology.link(first, second)
    if link is None:
        return f"the link between GPUs {first} and {second} is unknown"
    status = machine.topology.p2p_status(first, second, "r")
    return link_speed(link, machine.spec, peer_access=None if status is None else status == "OK")


def _fit(
    model: PlannedModel, machine: Machine, layout: Layout, stages: Sequence[StageWeights], options: ServerOptions
) -> Fit:
    tokens, sequences = options.limits(machine)
    width = DTYPE_BYTES[model.dtype]
    reserve = options.reserve_bytes
    if reserve is None:
        reserve = FIXED_BYTES + activation_bytes(
            model.shape, layout, tokens=tokens, sequences=sequences, element_bytes=width
        )
    return fit(
        model.shape,
        stages,
        layout,
        memory=machine.memory_bytes,
        utilization=options.utilization,
        reserve=reserve,
        cache_element_bytes=model.cache_bits / 8,
        in_flight=_in_flight(tokens, layout),
    )


def _in_flight(step_tokens: int, layout: Layout) -> int:
    """Tokens of all steps that are under way: one more than there are stages (``max_concurrent_batches``)."""
    return step_tokens * (layout.pp + 1)


def _requests(
    model: PlannedModel, machine: Machine, layout: Layout, found: Fit, demand: Demand, options: ServerOptions
) -> float:
    tokens, _ = options.limits(machine)
    blocks = request_blocks(cache_groups(model.shape), demand.tokens, _in_flight(tokens, layout), layout.dcp)
    return found.blocks / blocks * layout.dp * layout.replicas


def _room_problem(found: Fit, requests: float, demand: Demand) -> str | None:
    if found.weights + found.reserve > found.usable:
        short = (found.weights + found.reserve - found.usable) / 2**30
        return f"does not fit: weights and reserve are {short:.1f} GiB more than a GPU may use"
    if not found.fits or requests < 1 or found.context < demand.tokens:
        return f"does not fit: a request can have {found.context} tokens, {demand.tokens} are asked for"
    return None


# -- times -----------------------------------------------------------------------------------------------------------


def _estimate(engine: Engine, demand: Demand, limits: tuple[int, int], requests: float) -> Estimate:
    layout, (step_tokens, sequences) = engine.layout, limits
    engines = layout.dp * layout.replicas
    batch = max(1, min(-(-demand.concurrency // engines), int(requests / engines), sequences))
    context = demand.input_tokens + demand.output_tokens / 2
    alone, tpot_alone = _decode(engine, 1, context)
    busy, tpot = _decode(engine, batch, context)
    steps = -(-demand.input_tokens // step_tokens)
    size, attended = -(-demand.input_tokens // steps), demand.input_tokens / 2
    first = step_time(engine, Step(size, 1, decode=False, elsewhere=1), attended)
    prompt = step_time(engine, Step(size, 1, decode=False), attended)
    ttft = first.total + (steps - 1) * first.slowest
    return Estimate(
        batch=batch,
        alone=alone,
        busy=busy,
        prompt=prompt,
        ttft_s=1e-6 * ttft,
        tpot_alone_s=1e-6 * tpot_alone,
        tpot_s=1e-6 * tpot,
        latency=_seconds_by_component((first, ttft), (alone, tpot_alone * (demand.output_tokens - 1))),
        per_request=_seconds_by_component(
            (prompt, steps * prompt.slowest / engines), (busy, tpot * demand.output_tokens / (batch * engines))
        ),
    )


def _seconds_by_component(*times: tuple[StepTime, float]) -> dict[str, float]:
    """Add times (us) up, each divided into components as its step is."""
    return {name: 1e-6 * sum(us * step.parts()[name] / step.total for step, us in times) for name in COMPONENTS}


def _decode(engine: Engine, sequences: int, context: float) -> tuple[StepTime, float]:
    """A step of one of the parts that a pipeline divides its sequences into, and the time between tokens, in us."""
    size = -(-sequences // engine.layout.pp)
    parts = -(-sequences // size)
    step = step_time(engine, Step(size, size, decode=True), context)
    return step, max(step.total, parts * step.slowest)
