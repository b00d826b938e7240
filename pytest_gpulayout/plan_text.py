"""A plan as lines of text and as a JSON document; prints nothing.

What is exact and what is estimated is said in both: weights, cache and messages follow from the model's config and
vLLM's rules; reserves and times are estimates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pytest_gpulayout.layout import Layout
from pytest_gpulayout.model_memory import (
    StageWeights,
    cached_request_bytes,
    stored_tensors,
    token_bytes,
    total_bytes,
)
from pytest_gpulayout.model_shape import DTYPE_BYTES, Latent, ModelShape
from pytest_gpulayout.model_tensors import active_parameters, draft_parameters, parameters
from pytest_gpulayout.plan_inputs import DATA_SHEET, PlannedModel
from pytest_gpulayout.plan_ranking import Plan, Ranking
from pytest_gpulayout.planning import Estimate, LayoutPlan
from pytest_gpulayout.report import aligned, plural
from pytest_gpulayout.step_time import StepTime

PLAN_SCHEMA_VERSION = 1
ESTIMATES = (
    "weights, KV cache and messages are exact by the model's config and the rules of vLLM 0.32; "
    "reserves, and all times and what follows from them, are estimates"
)
_SHOWN_RANKS = 5


# -- text ------------------------------------------------------------------------------------------------------------


def plan_lines(plan: Plan) -> list[str]:
    """Return the plan for people."""
    lines = [*_model_lines(plan), "", *_machine_lines(plan), f"note: {ESTIMATES}", ""]
    lines += aligned([_HEADS, *(_row(found, plan) for found in plan.plans if found.estimate is not None)])
    lines += [f"{found.layout}: {found.problem}" for found in plan.plans if found.problem is not None]
    for found in plan.asked:
        lines += _traffic_lines(found)
    for ranking in plan.rankings:
        lines += ["", *_ranking_lines(ranking, plan)]
    return lines


def _model_lines(plan: Plan) -> Iterator[str]:
    model, shape = plan.model, plan.model.shape
    count, active = sum(parameters(shape).values()), active_parameters(shape)
    text = f"{shape.architecture}, {count:,} parameters"
    if active != count:
        text += f" ({active:,} active for a token)"
    stored = f"{model.dtype}{f', {model.quantization}' if model.quantization else ''}"
    yield f"{text}, {stored}, {plural(len(shape.layers), 'layer')}, in {shape.source}"
    parts = total_bytes(model.stored)
    yield f"  weights {_gib(sum(parts.values()))}: " + ", ".join(f"{part} {_gib(n)}" for part, n in parts.items())
    yield f"  KV cache {_token_text(model)}"
    if sentence := windows_text(shape):
        yield f"  {sentence}"
    yield from (f"  not counted: {part}" for part in shape.not_counted)
    if shape.draft_layers:
        yield f"  not loaded: {plural(shape.draft_layers, 'layer')} for speculative decoding"
    if plan.total_size is not None:
        yield f"  {index_text(model, plan.total_size)}"


def _token_text(model: PlannedModel) -> str:
    """``98304 bytes a token: 48 layers x 2 x 4 heads x 128 x 2 bytes``."""
    shape, bits = model.shape, model.cache_bits
    attention, layers = shape.attention, len(shape.layers)
    each = "1 byte" if bits == 8 else f"{bits // 8} bytes"
    if isinstance(attention, Latent):
        what = f"({attention.kv_rank} latent + {attention.rope_dim} rotary)"
    else:
        what = f"2 x {plural(attention.kv_heads, 'head')} x {attention.head_dim}"
    return f"{model_token_bytes(model)} bytes a token: {plural(layers, 'layer')} x {what} x {each}"


def model_token_bytes(model: PlannedModel) -> int:
    """Return what one token takes in the cache of all layers on one GPU that holds the whole model."""
    return round(len(model.shape.layers) * token_bytes(model.shape, Layout(), model.cache_bits / 8))


def windows_text(shape: ModelShape) -> str | None:
    """Say which layers keep the last tokens only; ``None`` where all keep all."""
    windows = [layer.window for layer in shape.layers if layer.window is not None]
    if not windows:
        return None
    return f"{len(windows)} of {len(shape.layers)} layers keep the last {max(windows)} tokens alone"


def index_text(model: PlannedModel, total_size: int) -> str:
    """Compare the weights with what the index of the files says, and explain a difference as far as it is known."""
    shape = model.shape
    computed = sum(total_bytes(stored_tensors(shape, model.quantization, shape.dtype)).values())
    difference = total_size - computed
    if difference == 0:
        return f"the index of the files says the same: {total_size} bytes"
    share = f"{difference:+} bytes, {difference / computed:+.2%}"
    reasons = list(shape.not_counted)
    if shape.draft_layers:
        size = draft_parameters(shape) * DTYPE_BYTES[shape.dtype]
        reasons.append(f"the layers for speculative decoding ({_gib(size)} unquantised)")
    if shape.tied:
        reasons.append("a second copy of the tied embedding")
    if model.quantization is not None:
        reasons.append("scales in another dtype")
    why = ", ".join(reasons) or "something in these files that is not understood"
    return f"the index of the files says {total_size} bytes, computed are {computed} ({share}); it may be {why}"


def _machine_lines(plan: Plan) -> Iterator[str]:
    machine, spec = plan.machine, plan.machine.spec
    usable = machine.topology.usable
    source = machine.topology.source
    if machine.topology.recorded and source != DATA_SHEET:
        source = f"recorded in {source}"
    fp8 = "" if spec.fp8_tflops is None else f", {spec.fp8_tflops:g} fp8"
    yield (
        f"{len(usable)} x {spec.name} ({source}): {_gib(machine.memory_bytes)}, {spec.memory_gb_per_s:g} GB/s, "
        f"{spec.bf16_tflops:g} bf16{fp8} TFLOPS dense"
    )
    demand, (tokens, sequences) = plan.demand, plan.options.limits(machine)
    yield (
        f"  asked for: {plural(demand.concurrency, 'request')} at once, {demand.input_tokens} tokens in, "
        f"{demand.output_tokens} out; the server may use {plan.options.utilization:g} of the memory, "
        f"{tokens} tokens and {sequences} sequences a step"
    )


_HEADS = (
    *("layout", "GPUs", "weights", "reserve", "KV a token", "KV cache", "context", "requests"),
    *("TTFT alone", "step alone", "talk", "step busy", "batch", "talk", "req/s", "tok/s a GPU"),
)


def _row(found: LayoutPlan, plan: Plan) -> tuple[str, ...]:
    assert found.fit is not None
    assert found.estimate is not None
    fit, estimate = found.fit, found.estimate
    return (
        str(found.layout),
        str(found.layout.gpus),
        _gib(max(stage.total for stage in found.stages)),
        _gib(fit.reserve),
        f"{found.token_bytes:g} B",
        _gib(fit.cache),
        str(fit.context),
        f"{found.requests:.1f}",
        f"{1e3 * estimate.ttft_s:.1f} ms",
        f"{1e3 * estimate.tpot_alone_s:.2f} ms",
        f"{estimate.alone.communication_share:.0%}",
        f"{1e3 * estimate.tpot_s:.2f} ms",
        str(estimate.batch),
        f"{estimate.busy.communication_share:.0%}",
        f"{estimate.requests_per_s:.2f}",
        f"{estimate.requests_per_s * plan.demand.output_tokens / found.layout.gpus:.0f}",
    )


def _traffic_lines(found: LayoutPlan) -> Iterator[str]:
    if found.estimate is None:
        return
    steps = (("a decoding step", found.estimate.busy), ("a prompt", found.estimate.prompt))
    if not any(step.messages for _, step in steps):
        yield ""
        yield f"{found.layout}: nothing is sent between GPUs"
        return
    assert found.speeds is not None
    links = ", ".join(f"{group} over {speed.name}" for group, speed in found.speeds.items())
    yield ""
    yield f"{found.layout}: {links}"
    for name, step in steps:
        share = f"{step.communication / 1e3:.2f} of {step.total / 1e3:.2f} ms ({step.communication_share:.0%})"
        yield f"  {name} (estimates): communication {share}"
        yield from aligned(
            [
                (
                    f"    {message.count} x {message.operation}",
                    f"{message.group} of {message.ranks}",
                    f"{message.size:,} bytes",
                    f"{duration.us:.1f} us each",
                    duration.by,
                    message.what,
                )
                for message, duration in step.messages
            ]
        )


_TITLES: Mapping[str, str] = {
    "latency": "for one request's latency",
    "throughput": "for throughput",
    "cost": "for GPU time, and so cost, of a request",
}


def _ranking_lines(ranking: Ranking, plan: Plan) -> Iterator[str]:
    order = " > ".join(_ranked(found, ranking, plan) for found in ranking.plans[:_SHOWN_RANKS])
    yield f"worth trying {_TITLES[ranking.goal]} (estimates):"
    yield f"  {order or 'none'}"
    yield f"  {ranking.rule}"


def _ranked(found: LayoutPlan, ranking: Ranking, plan: Plan) -> str:
    assert found.estimate is not None
    if ranking.goal == "latency":
        return f"{found.layout} {found.estimate.latency_s:.2f} s"
    if ranking.goal == "throughput":
        return f"{found.layout} {found.estimate.requests_per_s:.2f} req/s"
    usd = _usd_per_million(found, plan)
    each = found.layout.gpus / found.estimate.requests_per_s
    return f"{found.layout} {each:.3f} GPU s" + ("" if usd is None else f" ({usd:.2f} USD per M tokens)")


def _usd_per_million(found: LayoutPlan, plan: Plan) -> float | None:
    """Price of a million generated tokens, at the demanded mix of input and output."""
    if plan.gpu_hour_cost is None or found.estimate is None:
        return None
    seconds = found.layout.gpus / (found.estimate.requests_per_s * plan.demand.output_tokens)
    return 1e6 * seconds * plan.gpu_hour_cost / 3600


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


# -- JSON ------------------------------------------------------------------------------------------------------------


def plan_document(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON. Bytes are whole numbers, times are in the unit that ends their name."""
    return {
        "schema_version": PLAN_SCHEMA_VERSION,
        "note": ESTIMATES,
        "model": _model_document(plan),
        "machine": _machine_document(plan),
        "demand": {
            "input_tokens": plan.demand.input_tokens,
            "output_tokens": plan.demand.output_tokens,
            "concurrency": plan.demand.concurrency,
        },
        "layouts": [_layout_document(found, plan, asked=found in plan.asked) for found in plan.plans],
        "ranking": {
            ranking.goal: {"layouts": [str(found.layout) for found in ranking.plans], "rule": ranking.rule}
            for ranking in plan.rankings
        },
    }


def _model_document(plan: Plan) -> dict[str, Any]:
    model, shape = plan.model, plan.model.shape
    weights = total_bytes(model.stored)
    return {
        "source": shape.source,
        "architecture": shape.architecture,
        "parameters": sum(parameters(shape).values()),
        "active_parameters": active_parameters(shape),
        "parameters_by_part": parameters(shape),
        "layers": len(shape.layers),
        "windows": [layer.window for layer in shape.layers],
        "max_context": shape.max_context,
        "dtype": model.dtype,
        "quantization": None if model.quantization is None else str(model.quantization),
        "weights_bytes": sum(weights.values()),
        "weights_bytes_by_part": weights,
        "kv_bytes_per_token": model_token_bytes(model),
        "not_counted": list(shape.not_counted),
        "index_total_size": plan.total_size,
        "index": None if plan.total_size is None else index_text(model, plan.total_size),
    }


def _machine_document(plan: Plan) -> dict[str, Any]:
    machine, (tokens, sequences) = plan.machine, plan.options.limits(plan.machine)
    return {
        "source": machine.topology.source,
        "recorded": machine.topology.recorded,
        "gpu": machine.spec.name,
        "count": len(machine.topology.usable),
        "memory_bytes": machine.memory_bytes,
        "memory_gb_per_s": machine.spec.memory_gb_per_s,
        "bf16_tflops": machine.spec.bf16_tflops,
        "fp8_tflops": machine.spec.fp8_tflops,
        "gpu_memory_utilization": plan.options.utilization,
        "max_num_batched_tokens": tokens,
        "max_num_seqs": sequences,
        "all2all_backend": plan.options.to_experts,
    }


def _layout_document(found: LayoutPlan, plan: Plan, *, asked: bool) -> dict[str, Any]:
    fit = found.fit
    return {
        "layout": str(found.layout),
        "asked": asked,
        "gpus": found.layout.gpus,
        "problem": found.problem,
        "placement": list(found.placement),
        "links": {group: speed.name for group, speed in (found.speeds or {}).items()},
        "stages": [_stage_document(stage) for stage in found.stages],
        "kv_bytes_per_token": found.token_bytes,
        "kv_bytes_per_request": cached_request_bytes(
            plan.model.shape, found.layout, plan.model.cache_bits / 8, plan.demand.tokens
        ),
        "memory": None
        if fit is None
        else {
            "usable_bytes": fit.usable,
            "weights_bytes": fit.weights,
            "reserve_bytes_estimate": fit.reserve,
            "cache_bytes": fit.cache,
            "cache_blocks": fit.blocks,
            "cache_tokens": fit.tokens,
            "context_tokens": fit.context,
        },
        "requests": found.requests,
        "estimate": None if found.estimate is None else _estimate_document(found, found.estimate, plan),
    }


def _stage_document(stage: StageWeights) -> dict[str, Any]:
    return {
        "first_layer": stage.layers.start,
        "layers": len(stage.layers),
        "weights_bytes": stage.total,
        "by_part": dict(stage.parts),
    }


def _estimate_document(found: LayoutPlan, estimate: Estimate, plan: Plan) -> dict[str, Any]:
    tokens_per_s = estimate.requests_per_s * plan.demand.output_tokens
    return {
        "batch": estimate.batch,
        "ttft_alone_ms": 1e3 * estimate.ttft_s,
        "tpot_alone_ms": 1e3 * estimate.tpot_alone_s,
        "tpot_ms": 1e3 * estimate.tpot_s,
        "latency_alone_s": estimate.latency_s,
        "requests_per_s": estimate.requests_per_s,
        "output_tokens_per_s": tokens_per_s,
        "output_tokens_per_s_per_gpu": tokens_per_s / found.layout.gpus,
        "gpu_s_per_request": found.layout.gpus / estimate.requests_per_s,
        "usd_per_million_output_tokens": _usd_per_million(found, plan),
        "decode_alone": _step_document(estimate.alone),
        "decode": _step_document(estimate.busy),
        "prefill": _step_document(estimate.prompt),
    }


def _step_document(step: StepTime) -> dict[str, Any]:
    return {
        "total_us": step.total,
        **{f"{name}_us": value for name, value in step.parts().items()},
        "communication_share": step.communication_share,
        "messages": [
            {
                "operation": message.operation,
                "group": message.group,
                "ranks": message.ranks,
                "count": message.count,
                "bytes": message.size,
                "what": message.what,
                "us_each": duration.us,
                "by": duration.by,
            }
            for message, duration in step.messages
        ],
    }
