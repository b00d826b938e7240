"""``gpulayout plan``: what a model takes under a layout, what its GPUs send, and which layouts are worth trying."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_gpulayout.cli_common import (
    FAILED,
    FINE,
    Outcome,
    as_count,
    as_layout,
    command,
    read_text,
    read_topology,
    typed,
)

if TYPE_CHECKING:
    from pytest_gpulayout.gpu_specs import GpuSpec
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.link_speeds import Network
    from pytest_gpulayout.links import LinkClass
    from pytest_gpulayout.plan_inputs import Machine, PlannedModel, ServerOptions

_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
_ADVICE = "give the config.json of a model, or its folder: --model CONFIG_OR_DIR"
_MOST_GPUS, _MOST_BYTES = 1024, 2**63


def declare_plan(commands: Any) -> None:
    """Declare the subcommand."""
    parser = command(
        commands,
        "plan",
        _plan,
        "say what a model takes under a layout, what its GPUs send, and which layouts are worth trying",
        "gpulayout plan --model models/Qwen3-30B-A3B --gpu H200:4",
        "gpulayout plan --model config.json --layout tp1,tp4,tp1x4 --gpu H200:4 --link phb",
        "gpulayout plan --model config.json --layout tp2 --topology topology.json --json",
        more=["weights, cache and messages are exact; reserves and times are estimates", ""],
    )
    parser.add_argument("--model", required=True, metavar="CONFIG_OR_DIR", help="a config.json, or its folder")
    parser.add_argument(
        "--layout", type=typed(_as_layouts), action="append", metavar="SPEC[,SPEC]", help="layouts; default: all"
    )
    _declare_machine(parser)
    _declare_demand(parser)
    _declare_server(parser)


def _declare_machine(parser: Any) -> None:
    group = parser.add_argument_group("GPUs")
    group.add_argument("--topology", metavar="FILE", help="a recorded topology, - for standard input; default: NVML")
    group.add_argument(
        "--gpu", type=typed(_as_gpus), metavar="NAME[:COUNT]", help="GPUs by their data sheet, such as H200:4"
    )
    group.add_argument(
        "--link",
        type=typed(_as_link),
        metavar="CLASS",
        help="how the GPUs of --gpu are linked: nvlink, nv4, pix, pxb, phb, node, sys; default: as they usually are",
    )
    group.add_argument(
        "--network",
        type=typed(_as_network),
        metavar="KIND:GBIT",
        help="what a GPU has to other nodes: socket:25 (default), rdma:400",
    )


def _declare_demand(parser: Any) -> None:
    group = parser.add_argument_group("demand")
    for name, default in (("--input-tokens", 1000), ("--output-tokens", 500), ("--concurrency", 100)):
        group.add_argument(name, type=typed(as_count), default=default, metavar="N", help=f"({default})")
    group.add_argument("--gpu-hour-cost", type=typed(_as_positive), metavar="USD", help="adds the cost of tokens")


def _declare_server(parser: Any) -> None:
    group = parser.add_argument_group("server, as vllm serve takes them")
    group.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    group.add_argument("--kv-cache-dtype", choices=("auto", "fp8", "fp8_e4m3", "fp8_e5m2"), default="auto")
    group.add_argument("--gpu-memory-utilization", type=typed(_as_share), metavar="SHARE", help="(0.92)")
    group.add_argument("--max-num-batched-tokens", type=typed(as_count), metavar="N")
    group.add_argument("--max-num-seqs", type=typed(as_count), metavar="N")
    group.add_argument("--all2all-backend", type=typed(_as_backend), metavar="NAME", help="(allgather_reducescatter)")
    group.add_argument(
        "--reserve-gib", type=typed(_as_positive), metavar="GIB", help="for activations and graphs; else estimated"
    )


def _plan(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.plan_inputs import Demand
    from pytest_gpulayout.plan_ranking import make_plan
    from pytest_gpulayout.plan_text import plan_document, plan_lines

    model, total_size = _model(arguments)
    layouts = list(dict.fromkeys(layout for given in arguments.layout or () for layout in given))
    plan = make_plan(
        model,
        _machine(arguments),
        layouts,
        Demand(arguments.input_tokens, arguments.output_tokens, arguments.concurrency),
        _options(arguments),
        total_size=total_size,
        gpu_hour_cost=arguments.gpu_hour_cost,
    )
    document, lines = plan_document(plan), plan_lines(plan)
    if plan.anything_fits:
        return Outcome(FINE, document, lines)
    failed = [f"failed: {found.layout}: {found.problem}" for found in plan.asked or plan.others]
    return Outcome(FAILED, document, lines, failed)


# -- the model -------------------------------------------------------------------------------------------------------


def _model(arguments: argparse.Namespace) -> tuple[PlannedModel, int | None]:
    """The model, and the size of all its tensors where an index lies beside its config."""
    from pytest_gpulayout.model_config import read_shape
    from pytest_gpulayout.model_quantization import read_quantization
    from pytest_gpulayout.plan_inputs import planned_model

    path = Path(arguments.model)
    path = path / _CONFIG if path.is_dir() else path
    config = _json(path)
    shape = read_shape(config, str(path))
    quantization = read_quantization(config, str(path))
    model = planned_model(shape, quantization, dtype=arguments.dtype, cache_dtype=arguments.kv_cache_dtype)
    return model, _total_size(path.with_name(_INDEX))


def _json(path: Path) -> Any:
    from pytest_gpulayout.errors import ModelConfigError

    try:
        return json.loads(read_text(str(path), "a model's config was expected", _ADVICE))
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(f"a JSON document was expected, found: {error}\n  in {path}\n  {_ADVICE}") from error
    except OSError as error:
        raise ModelConfigError(
            f"a model's config was expected, found none: {error.strerror}\n  in {path}\n  {_ADVICE}"
        ) from error


def _total_size(path: Path) -> int | None:
    """What the index of a model's files says of all tensors; ``None`` where there is none, or it does not say."""
    from pytest_gpulayout.errors import ModelConfigError

    if not path.is_file():
        return None
    document = _json(path)
    metadata = document.get("metadata") if isinstance(document, Mapping) else None
    size = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size < _MOST_BYTES:
        raise ModelConfigError(
            f"a number of bytes was expected as total_size, found {size!r}\n  in {path}\n"
            "  download the model again, or give its config.json alone"
        )
    return int(size)


# -- the machine -----------------------------------------------------------------------------------------------------


def _machine(arguments: argparse.Namespace) -> Machine:
    from pytest_gpulayout.errors import PlanError
    from pytest_gpulayout.link_speeds import DEFAULT_NETWORK
    from pytest_gpulayout.plan_inputs import machine_of, uniform_topology

    spec, count = arguments.gpu or (None, None)
    network = arguments.network or DEFAULT_NETWORK
    if arguments.topology is None and spec is not None:
        topology = uniform_topology(spec, count or 1, _link(arguments.link, spec))
        return machine_of(topology, spec, network)
    if count is not None or arguments.link is not None:
        raise PlanError(
            "one description of GPUs and links was required, found a topology, and a count or a link beside it\n"
            "  in --gpu and --link\n  name only their kind, --gpu NAME, or leave --topology out"
        )
    topology = read_topology(arguments.topology, "say what to plan for: --gpu NAME:COUNT, or --topology FILE")
    return machine_of(topology, spec, network)


def _link(given: LinkClass | Literal["nvlink"] | None, spec: GpuSpec) -> LinkClass | None:
    from pytest_gpulayout.errors import PlanError
    from pytest_gpulayout.links import LinkClass

    if given != "nvlink":
        return given
    if not spec.nvlinks:
        raise PlanError(
            f"a GPU with NVLinks was required, {spec.name} has none\n  in --link nvlink\n"
            "  name a PCIe class: --link phb"
        )
    return LinkClass("NV", spec.nvlinks)


def _options(arguments: argparse.Namespace) -> ServerOptions:
    from pytest_gpulayout.model_memory import DEFAULT_UTILIZATION
    from pytest_gpulayout.model_traffic import ALL_TO_ALL
    from pytest_gpulayout.plan_inputs import ServerOptions

    reserve = arguments.reserve_gib
    return ServerOptions(
        utilization=arguments.gpu_memory_utilization or DEFAULT_UTILIZATION,
        step_tokens=arguments.max_num_batched_tokens,
        sequences=arguments.max_num_seqs,
        reserve_bytes=None if reserve is None else int(reserve * 2**30),
        to_experts=arguments.all2all_backend or ALL_TO_ALL[0],
    )


# -- types of arguments ----------------------------------------------------------------------------------------------


def _as_layouts(text: str) -> tuple[Layout, ...]:
    return tuple(as_layout(part) for part in text.split(","))


def _as_gpus(text: str) -> tuple[GpuSpec, int | None]:
    from pytest_gpulayout.gpu_specs import find_gpu

    name, colon, count = text.partition(":")
    number = as_count(count) if colon else None
    if number is not None and number > _MOST_GPUS:
        raise ValueError(f"at most {_MOST_GPUS} GPUs were expected, found {number}")
    return find_gpu(name), number


def _as_link(text: str) -> LinkClass | Literal["nvlink"]:
    """Read a link class in any case; ``nvlink`` stands for as many links as the GPU has."""
    from pytest_gpulayout.links import parse_link_class

    return "nvlink" if text.lower() == "nvlink" else parse_link_class(text.upper())


def _as_network(text: str) -> Network:
    """Read ``socket:25`` or ``rdma:400``.

    :raises ValueError: it is neither.
    """
    from pytest_gpulayout.link_speeds import Network

    kind, _, speed = text.partition(":")
    if kind not in ("socket", "rdma"):
        raise ValueError(f"socket:GBIT or rdma:GBIT was expected, found {text!r}")
    return Network(_as_positive(speed), rdma=kind == "rdma")


def _as_backend(text: str) -> str:
    from pytest_gpulayout.model_traffic import ALL_TO_ALL

    if text not in ALL_TO_ALL:
        raise ValueError(f"one of {', '.join(ALL_TO_ALL)} was expected, found {text!r}")
    return text


def _as_positive(text: str) -> float:
    """Read a number above 0.

    :raises ValueError: it is none.
    """
    number = float(text)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"a number above 0 was expected, found {text!r}")
    return number


def _as_share(text: str) -> float:
    number = _as_positive(text)
    if number > 1:
        raise ValueError(f"a share of at most 1 was expected, found {text!r}")
    return number
