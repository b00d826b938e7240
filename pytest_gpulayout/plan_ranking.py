"""Which layouts are worth trying: all that a machine could have, ranked by goal, with the difference that decided.

Goals are one request's latency, throughput, and GPU time for a request, which is its cost. All rankings follow from
estimates. Leaves single layouts to :mod:`~pytest_gpulayout.planning`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pytest_gpulayout.layout import Layout
from pytest_gpulayout.model_memory import split_problem
from pytest_gpulayout.model_shape import Latent, ModelShape
from pytest_gpulayout.plan_inputs import Demand, Machine, PlannedModel, ServerOptions
from pytest_gpulayout.planning import LayoutPlan, plan_layout
from pytest_gpulayout.step_time import COMPONENTS

Goal = Literal["latency", "throughput", "cost"]
GOALS: tuple[Goal, ...] = ("latency", "throughput", "cost")

NEAR = 0.05
"""Estimates that differ by no more are not told apart in words."""


def candidates(model: PlannedModel, machine: Machine) -> tuple[Layout, ...]:
    """Return layouts that vLLM can run and that use some or all GPUs: one factor, or two that fill the machine."""
    count = len(machine.topology.usable)
    sizes = sorted({2**power for power in range(count.bit_length()) if 2**power <= count} | {count})
    found: list[Layout] = []
    for tp in sizes:
        rest = count // tp
        found.append(Layout(tp=tp))
        if rest > 1:
            found += [Layout(tp=tp, replicas=rest), Layout(tp=tp, pp=rest)]
        if model.shape.experts is not None:
            found += [Layout(tp=tp, ep=True)] if tp > 1 else []
            found += [Layout(tp=tp, dp=rest, ep=True)] if rest > 1 else []
        found += [Layout(tp=tp, dcp=dcp) for dcp in (_most_dcp(model.shape, tp),) if dcp > 1]
    return tuple(layout for layout in found if split_problem(model.shape, model.stored, layout) is None)


def _most_dcp(shape: ModelShape, tp: int) -> int:
    """How far the cache can be spread over tp instead of being copied."""
    attention = shape.attention
    return tp if isinstance(attention, Latent) else max(1, tp // attention.kv_heads)


@dataclass(frozen=True, slots=True)
class Ranking:
    """Layouts for one goal, the best first. :param rule: what decided, in a sentence."""

    goal: Goal
    plans: tuple[LayoutPlan, ...]
    rule: str


def rank(plans: Sequence[LayoutPlan], goal: Goal) -> Ranking:
    """Rank the layouts that fit; of those equal to three digits, fewer GPUs and then a simpler layout are better."""
    fitting = [plan for plan in plans if plan.estimate is not None]
    ordered = sorted(
        fitting, key=lambda plan: (float(f"{_seconds(plan, goal):.3g}"), plan.layout.gpus, len(str(plan.layout)))
    )
    return Ranking(goal, tuple(ordered), _rule(ordered, goal))


def goal_parts(plan: LayoutPlan, goal: Goal) -> dict[str, float]:
    """Return what a goal makes small, by component: seconds of a request, of the layout for one, of all its GPUs."""
    assert plan.estimate is not None
    if goal == "latency":
        return dict(plan.estimate.latency)
    factor = plan.layout.gpus if goal == "cost" else 1
    return {name: factor * seconds for name, seconds in plan.estimate.per_request.items()}


def _seconds(plan: LayoutPlan, goal: Goal) -> float:
    return sum(goal_parts(plan, goal).values())


_RULES: Mapping[Goal, str] = {
    "latency": "a request alone takes {mine} on {best}, {other} on {second}",
    "throughput": "{best} completes a request every {mine}, {second} every {other}",
    "cost": "a request takes {mine} of GPU time on {best}, {other} on {second}",
}


def _rule(ordered: Sequence[LayoutPlan], goal: Goal) -> str:
    """Say what decided between the best layout and the first that is worse by more than estimates can tell."""
    if not ordered:
        return "no layout fits"
    best, limit = ordered[0], _seconds(ordered[0], goal) * (1 + NEAR)
    near = [str(plan.layout) for plan in ordered[1:] if _seconds(plan, goal) <= limit]
    second = next((plan for plan in ordered if _seconds(plan, goal) > limit), None)
    told = f"; within {NEAR:.0%} of it: {', '.join(near)}" if near else ""
    if second is None:
        return f"{best.layout} is {'the best' if near else 'the only layout that fits'}{told}"
    mine, other = goal_parts(best, goal), goal_parts(second, goal)
    why = max(COMPONENTS, key=lambda name: other[name] - mine[name])
    text = _RULES[goal].format(
        best=best.layout, second=second.layout, mine=_ms(sum(mine.values())), other=_ms(sum(other.values()))
    )
    return f"{text}; most of the difference is {_WORDS[why]}: {_ms(mine[why])} against {_ms(other[why])}{told}"


_WORDS = {
    "reading": "reading weights and cache",
    "arithmetic": "arithmetic",
    "communication": "communication",
    "fixed": "small kernels",
}


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


# -- the whole plan --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that ``gpulayout plan`` has to say.

    :param asked: layouts that were asked for. :param others: further ones that this machine could have.
    :param rankings: of all that fit, by goal.
    :param total_size: bytes of all tensors, as the index of the model's files says; ``None`` where there is none.
    :param gpu_hour_cost: USD, ``None`` where it is not known.
    """

    model: PlannedModel
    machine: Machine
    demand: Demand
    options: ServerOptions
    asked: tuple[LayoutPlan, ...]
    others: tuple[LayoutPlan, ...]
    rankings: tuple[Ranking, ...]
    total_size: int | None = None
    gpu_hour_cost: float | None = None

    @property
    def plans(self) -> tuple[LayoutPlan, ...]:
        """Layouts that were asked for, then the others."""
        return self.asked + self.others

    @property
    def anything_fits(self) -> bool:
        """Whether one of the layouts that were asked for fits, or any where none was."""
        return any(plan.problem is None for plan in self.asked or self.others)


def make_plan(
    model: PlannedModel,
    machine: Machine,
    layouts: Sequence[Layout],
    demand: Demand,
    options: ServerOptions,
    *,
    total_size: int | None = None,
    gpu_hour_cost: float | None = None,
) -> Plan:
    """Plan the layouts that are asked for, and all others that the machine could have, and rank them."""
    asked = tuple(plan_layout(model, machine, layout, demand, options) for layout in layouts)
    more = [layout for layout in candidates(model, machine) if layout not in layouts]
    others = tuple(plan_layout(model, machine, layout, demand, options) for layout in more)
    rankings = tuple(rank(asked + others, goal) for goal in GOALS)
    return Plan(model, machine, demand, options, asked, others, rankings, total_size, gpu_hour_cost)
