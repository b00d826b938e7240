"""Command-line options and ini keys, and the frozen :class:`Settings` they become.

Imported at every pytest start, so it imports nothing beyond the standard library before a layout is asked for.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

if TYPE_CHECKING:
    import pytest

    from pytest_gpulayout.gate import BaselineMode
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.ports import Platform
    from pytest_gpulayout.tolerance import Tolerance
    from pytest_gpulayout.topology import LinkRequirement
    from pytest_gpulayout.transport import AllowedTransports
    from pytest_gpulayout.workload import Workload

T = TypeVar("T")

GROUP = "gpu layout"
RESERVED_ARGUMENTS = {
    "--model": "--gpu-model",
    "--host": "nothing: the server listens on loopback",
    "--port": "nothing: a free port is chosen",
    "--api-key": "nothing: a random key is made for each server",
    "--tensor-parallel-size": "--gpu-layout",
    "-tp": "--gpu-layout",
    "--pipeline-parallel-size": "--gpu-layout",
    "-pp": "--gpu-layout",
    "--data-parallel-size": "--gpu-layout",
    "-dp": "--gpu-layout",
    "--prefill-context-parallel-size": "--gpu-layout",
    "-pcp": "--gpu-layout",
    "--decode-context-parallel-size": "--gpu-layout",
    "-dcp": "--gpu-layout",
    "--enable-expert-parallel": "--gpu-layout",
    "-ep": "--gpu-layout",
    "--nnodes": "--gpu-layout",
    "-n": "--gpu-layout",
    "--fingerprint-mode": "nothing: the fingerprint proves the layout",
    "--fingerprint-value": "nothing: the fingerprint proves the layout",
    "--device-ids": "--gpu-devices",
}
"""Arguments of ``vllm serve`` that this plugin sets itself -> what to use instead."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option with its ini key. :param ini_default: the value when neither is given."""

    name: str
    metavar: str
    help: str
    ini_default: str = ""
    choices: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """``layout`` -> ``--gpu-layout``."""
        return f"--gpu-{self.name}"

    @property
    def ini(self) -> str:
        """``baseline-dir`` -> ``gpulayout_baseline_dir``."""
        return "gpulayout_" + self.name.replace("-", "_")

    @property
    def dest(self) -> str:
        """Attribute of ``config.option``; prefixed, since pytest has one namespace for all plugins."""
        return self.ini


OPTIONS = (
    Option(
        "layout",
        "SPEC[,SPEC]",
        "layouts to run, such as tp1,tp2 (may be repeated). Tests that need a layout run once for each; "
        "without it they are skipped",
    ),
    Option("model", "ID_OR_PATH", "model to serve: a hub id or a folder with a config.json"),
    Option("vllm-args", "ARGS", "more arguments for vllm serve, in one string"),
    Option(
        "platform",
        "cuda|cpu",
        "where vLLM runs; cpu is vLLM's CPU build and is never chosen silently (default: cuda)",
        "cuda",
        ("cuda", "cpu"),
    ),
    Option(
        "link", "REQ", "worst link allowed between communicating GPUs: nvlink, nv4, pix, pxb, phb, node, any", "any"
    ),
    Option("devices", "0,1", "use exactly these GPUs (indices or UUIDs); default: the best placement"),
    Option("topology", "FILE", "a recorded topology (JSON, or nvidia-smi topo -m text) in place of probing"),
    Option("transport", "LIST", "transports allowed, such as p2p,nvls; default: all but NET/Socket and CPU/GLOO"),
    Option("workload", "NAME", "workload of tests that do not name one (default: smoke)", "smoke"),
    Option(
        "baseline",
        "check|new|update|off",
        "check: judge, and fail when nothing is stored; new: record what is missing; update: record again; "
        "off: do not judge (default: check)",
        "check",
        ("check", "new", "update", "off"),
    ),
    Option(
        "baseline-dir", "DIR_OR_URL", "where baselines are (default: gpu-baselines in the rootdir)", "gpu-baselines"
    ),
    Option("tolerance", "METRIC=5%,...", "how much worse a metric may get; a metric named here becomes gated"),
    Option("starts", "N", "most fresh server starts per performance gate (default: 3)", "3"),
    Option("budget", "SECONDS", "most seconds of measuring per performance gate (default: no limit)"),
    Option(
        "inconclusive",
        "warn|fail",
        "what an inconclusive verdict does; it is never shown as passed (default: warn)",
        "warn",
        ("warn", "fail"),
    ),
    Option("results", "FILE.json", "write machine-readable results"),
    Option("start-timeout", "SECONDS", "how long a server may take to start (default: 900)", "900"),
)
_BY_NAME = {option.name: option for option in OPTIONS}


@dataclass(frozen=True, slots=True)
class Settings:
    """All options, read and checked. :param vllm_args: split as a shell would. :param rootdir: pytest's."""

    layouts: tuple[Layout, ...]
    model: str | None
    vllm_args: tuple[str, ...]
    platform: Platform
    link: LinkRequirement
    devices: tuple[str, ...] | None
    topology_file: Path | None
    transports: AllowedTransports
    workload: Workload
    baseline_mode: BaselineMode
    baseline_dir: str
    tolerances: dict[str, Tolerance]
    starts: int
    budget_s: float | None
    inconclusive: Literal["warn", "fail"]
    results_file: Path | None
    start_timeout_s: float


def declare(parser: pytest.Parser) -> None:
    """Add the option group and the ini keys."""
    group = parser.getgroup("gpulayout", GROUP)
    for option in OPTIONS:
        group.addoption(
            option.flag,
            dest=option.dest,
            metavar=option.metavar,
            action="append" if option.name == "layout" else "store",
            default=None,
            choices=option.choices or None,
            help=option.help,
        )
        parser.addini(option.ini, f"default of {option.flag}", type="string", default=option.ini_default)


def layouts_wanted(config: pytest.Config) -> str:
    """The raw text of ``--gpu-layout`` or its ini key; empty when no layout was asked for."""
    return _raw(config, "layout")


def settings_from_config(config: pytest.Config) -> Settings:
    """Read and check all options.

    :raises pytest.UsageError: one of them is wrong; the message names the option.
    """
    from pytest_gpulayout.layout import parse_layout
    from pytest_gpulayout.tolerance import parse_tolerances
    from pytest_gpulayout.topology import parse_requirement
    from pytest_gpulayout.transport import parse_allowed
    from pytest_gpulayout.workload import find_workload

    def read(name: str, parse: Callable[[str], T]) -> T:
        return _read(config, name, parse)

    topology = _raw(config, "topology")
    results = _raw(config, "results")
    return Settings(
        layouts=read("layout", lambda text: tuple(dict.fromkeys(parse_layout(part) for part in text.split(",")))),
        model=read("model", check_model) if _raw(config, "model") else None,
        vllm_args=read("vllm-args", parse_vllm_arguments),
        platform=cast("Platform", read("platform", _choice("platform"))),
        link=read("link", parse_requirement),
        devices=tuple(part.strip() for part in _raw(config, "devices").split(","))
        if _raw(config, "devices")
        else None,
        topology_file=config.invocation_params.dir / topology if topology else None,
        transports=read("transport", parse_allowed),
        workload=read("workload", find_workload),
        baseline_mode=cast("BaselineMode", read("baseline", _choice("baseline"))),
        baseline_dir=_baseline_dir(config),
        tolerances=read("tolerance", parse_tolerances),
        starts=int(read("starts", _positive(whole=True))),
        budget_s=read("budget", _positive()) if _raw(config, "budget") else None,
        inconclusive=cast("Literal['warn', 'fail']", read("inconclusive", _choice("inconclusive"))),
        results_file=config.invocation_params.dir / results if results else None,
        start_timeout_s=read("start-timeout", _positive()),
    )


def _raw(config: pytest.Config, name: str) -> str:
    option = _BY_NAME[name]
    value: Any = config.getoption(option.dest)
    if isinstance(value, list):  # --gpu-layout may be repeated
        value = ",".join(value)
    return str(config.getini(option.ini) if value is None else value).strip()


def _read(config: pytest.Config, name: str, parse: Callable[[str], T]) -> T:
    """Apply a parser and turn what it raises into pytest's way of saying that an option is wrong."""
    import pytest

    from pytest_gpulayout.errors import GpuLayoutError

    try:
        return parse(_raw(config, name))
    except (GpuLayoutError, ValueError) as error:
        option = _BY_NAME[name]
        raise pytest.UsageError(f"{option.flag} (ini: {option.ini}): {error}") from error


def _choice(name: str) -> Callable[[str], str]:
    """Check a value that may come from an ini file, where argparse does not look."""

    def parse(text: str) -> str:
        if text not in _BY_NAME[name].choices:
            raise ValueError(f"one of {', '.join(_BY_NAME[name].choices)} was expected, found {text!r}")
        return text

    return parse


def _positive(*, whole: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        kind = "a whole number" if whole else "a number"
        try:
            value = float(int(text)) if whole else float(text)
        except ValueError:
            value = 0.0
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{kind} above 0 was expected, found {text!r}")
        return value

    return parse


def _baseline_dir(config: pytest.Config) -> str:
    text = _raw(config, "baseline-dir")
    return text if "://" in text else str(config.rootpath / text)


def check_model(text: str) -> str:
    """Check a model that is named by its path; hub ids are left to vLLM.

    :raises ValueError: the folder, or its config.json, is missing.
    """
    path = os.path.expanduser(text)
    if not (os.path.exists(path) or text.startswith(("/", ".", "~")) or text.count("/") > 1):
        return text
    if not os.path.isdir(path):
        raise ValueError(
            f"a model folder was required, found {'a file' if os.path.exists(path) else 'nothing'}\n"
            f"  at {os.path.abspath(path)}\n  name a folder with a config.json, or a hub id such as Qwen/Qwen3-8B"
        )
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(
            f"a model folder with a config.json was required, found none\n  in {os.path.abspath(path)}\n"
            "  name the folder that holds config.json and the weights"
        )
    return str(Path(path))


def parse_vllm_arguments(text: str) -> tuple[str, ...]:
    """Split arguments as a shell would.

    :raises ValueError: an argument that this plugin sets itself, or quotes that do not close.
    """
    arguments = tuple(shlex.split(text))
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if reserved := _reserved(name):
            raise ValueError(f"{name} is set by pytest-gpulayout; use {RESERVED_ARGUMENTS[reserved]}")
    return arguments


def _reserved(name: str) -> str | None:
    """The reserved argument that vLLM's parser takes this for; it accepts abbreviations of long ones."""
    if name in RESERVED_ARGUMENTS:
        return name
    is_long = name.startswith("--") and len(name) > 2
    return next((known for known in RESERVED_ARGUMENTS if is_long and known.startswith(name)), None)


def only_argument(marker: pytest.Mark, noun: str) -> Any:
    """Return the one positional argument of a marker. :param noun: what it names.

    :raises ValueError: none, or several are given.
    """
    if len(marker.args) != 1:
        raise ValueError(f"one {noun} is expected, found {len(marker.args) or 'none'}")
    return marker.args[0]


def marker_arguments(arguments: dict[str, Any]) -> tuple[str, ...]:
    """Turn keyword arguments of the ``gpu_model`` marker into ``vllm serve`` arguments.

    ``max_num_seqs=8`` -> ``--max-num-seqs 8``; ``True`` -> the flag, ``False`` -> ``--no-flag``; a list -> several
    values; a mapping -> JSON.

    :raises ValueError: an argument that this plugin sets itself.
    """
    import json

    words: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is False:
            words.append("--no-" + flag[2:])
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        else:
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return parse_vllm_arguments(shlex.join(words))
