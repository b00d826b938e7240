"""All options, read and checked: the frozen :class:`Settings` of a run, and what a marker's arguments mean.

Imported when a layout was asked for.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast
from urllib.parse import urlsplit

import pytest

from pytest_gpulayout.errors import GpuLayoutError, LayoutSyntaxError, MarkerError
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_requirement
from pytest_gpulayout.options import OPTION, raw_value
from pytest_gpulayout.relative import parse_claim
from pytest_gpulayout.servers import ModelSpec
from pytest_gpulayout.tolerance import parse_tolerances
from pytest_gpulayout.transport import parse_allowed
from pytest_gpulayout.workload import as_workload

if TYPE_CHECKING:
    from pytest_gpulayout.judging import BaselineMode
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.links import LinkRequirement
    from pytest_gpulayout.ports import Platform
    from pytest_gpulayout.relative import Claim
    from pytest_gpulayout.tolerance import Tolerance
    from pytest_gpulayout.transport import AllowedTransports
    from pytest_gpulayout.workload import Workload

T = TypeVar("T")

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
    "--node-rank": "--gpu-nodes",
    "-r": "--gpu-nodes",
    "--headless": "--gpu-nodes",
    "--master-addr": "--gpu-master-addr",
    "--master-port": "nothing: a free port is chosen",
    "--api-server-count": "nothing: one front end answers",
    "-asc": "nothing: one front end answers",
    "--fingerprint-mode": "nothing: the fingerprint proves the layout",
    "--fingerprint-value": "nothing: the fingerprint proves the layout",
    "--device-ids": "--gpu-devices",
}
"""Arguments of ``vllm serve`` that this plugin sets itself -> what to use instead."""

STORED_STARTS = 3
"""Most starts of a gate against a stored baseline, where nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class BaseChoice:
    """What ``--gpu-base`` names.

    :param name: for reports. :param python: interpreter of its servers, ``""`` for a URL.
    :param url: of a server that already runs, ``""`` for a Python.
    :param vllm_args: of its servers; ``None`` for those of the candidate.
    """

    name: str
    python: str = ""
    url: str = ""
    vllm_args: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class AttachChoice:
    """What ``--gpu-server-url`` names. :param nccl_logs: absolute pattern of ``--gpu-nccl-log``, ``""`` for none."""

    url: str
    nccl_logs: str = ""


@dataclass(frozen=True, slots=True)
class NodeChoice:
    """The hosts of layouts over several nodes.

    :param names: in the order of their ranks, empty where the options name none.
    :param command: prefix that runs a command on one, with ``{node}`` for its name.
    :param python: interpreter on the nodes. :param master_addr: of the head, ``None`` for its first address.
    """

    names: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    python: str = sys.executable
    master_addr: str | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """All options, read and checked.

    :param vllm_args: split as a shell would. :param workloads: the user's own, of ``pyproject.toml``, by name.
    :param may_write: baselines may be stored: not in CI, unless ``--gpu-write-in-ci=yes``.
    :param base: what to judge against in place of a stored baseline. :param starts: with it, of each side.
    :param hour_cost_usd: of one GPU, on the CPU platform of one core.
    :param attach: the server to gate in place of starting one.
    :param nodes: the hosts of layouts over several nodes.
    """

    layouts: tuple[Layout, ...]
    model: str | None
    vllm_args: tuple[str, ...]
    platform: Platform
    link: LinkRequirement
    devices: tuple[str, ...] | None
    topology_file: Path | None
    transports: AllowedTransports
    workload: Workload
    workloads: Mapping[str, Workload]
    baseline_mode: BaselineMode
    baseline_dir: str
    may_write: bool
    tolerances: dict[str, Tolerance]
    base: BaseChoice | None
    attach: AttachChoice | None
    nodes: NodeChoice
    starts: int
    budget_s: float | None
    inconclusive: Literal["warn", "fail"]
    hour_cost_usd: float | None
    results_file: Path | None
    start_timeout_s: float
    wait_s: float


def settings_from_config(config: pytest.Config) -> Settings:
    """Read and check all options.

    :raises pytest.UsageError: one of them is wrong; the message names the option.
    """

    from pytest_gpulayout.adapters.workload_files import project_workloads

    def read(name: str, parse: Callable[[str], T]) -> T:
        return _read(config, name, parse)

    topology = raw_value(config, "topology")
    results = raw_value(config, "results")
    may_write = read("write-in-ci", _choice("write-in-ci")) == "yes" or not is_ci(os.environ)
    attach = _attach(config, read)
    base = _base(config, read)
    layouts = read("layout", lambda text: tuple(dict.fromkeys(parse_layout(part) for part in text.split(","))))
    return Settings(
        layouts=layouts,
        model=read("model", str if attach else check_model) if raw_value(config, "model") else None,
        vllm_args=read("vllm-args", parse_vllm_arguments),
        platform=cast("Platform", read("platform", _choice("platform"))),
        link=read("link", parse_requirement),
        devices=tuple(part.strip() for part in raw_value(config, "devices").split(","))
        if raw_value(config, "devices")
        else None,
        topology_file=config.invocation_params.dir / topology if topology else None,
        transports=read("transport", parse_allowed),
        workload=read("workload", partial(_workload, config)),
        workloads=read("workload", lambda _: project_workloads(config.rootpath)),
        baseline_mode=cast("BaselineMode", read("baseline", partial(_baseline_mode, may_write=may_write))),
        baseline_dir=_baseline_dir(config),
        may_write=may_write,
        tolerances=read("tolerance", parse_tolerances),
        base=base,
        attach=attach,
        nodes=_nodes(config, read, layouts),
        starts=read("starts", partial(_starts, is_paired=base is not None, is_attached=attach is not None)),
        budget_s=read("budget", _positive()) if raw_value(config, "budget") else None,
        inconclusive=cast("Literal['warn', 'fail']", read("inconclusive", _choice("inconclusive"))),
        hour_cost_usd=read("hour-cost", _positive()) if raw_value(config, "hour-cost") else None,
        results_file=config.invocation_params.dir / results if results else None,
        start_timeout_s=read("start-timeout", _positive()),
        wait_s=read("wait", _positive(or_zero=True)),
    )


def _read(config: pytest.Config, name: str, parse: Callable[[str], T]) -> T:
    """Apply a parser and turn what it raises into pytest's way of saying that an option is wrong."""
    try:
        return parse(raw_value(config, name))
    except (GpuLayoutError, ValueError) as error:
        option = OPTION[name]
        raise pytest.UsageError(f"{option.flag} (ini: {option.ini}): {error}") from error


def _choice(name: str) -> Callable[[str], str]:
    """Check a value that may come from an ini file, where argparse does not look."""

    def parse(text: str) -> str:
        if text not in OPTION[name].choices:
            raise ValueError(f"one of {', '.join(OPTION[name].choices)} was expected, found {text!r}")
        return text

    return parse


def is_ci(environment: Mapping[str, str]) -> bool:
    """Whether this is continuous integration: ``CI`` is set there, to anything but nothing, ``0``, ``false``, ``no``.

    GitHub Actions, GitLab CI, Buildkite, CircleCI and others set it to ``true``.
    """
    return environment.get("CI", "").strip().lower() not in ("", "0", "false", "no")


def _baseline_mode(text: str, *, may_write: bool) -> str:
    """Refuse ``update`` where nothing may be written: it would measure for long and keep nothing."""
    mode = _choice("baseline")(text)
    if mode == "update" and not may_write:
        raise ValueError(
            "update writes baselines, and in CI nothing is written\n"
            "  found the environment variable CI\n"
            "  update them elsewhere and commit the files, or add --gpu-write-in-ci=yes"
        )
    return mode


def _base(config: pytest.Config, read: Callable[[str, Callable[[str], Any]], Any]) -> BaseChoice | None:
    """Read ``--gpu-base`` and ``--gpu-base-vllm-args``, which paired mode is asked for by."""
    text, words = raw_value(config, "base"), raw_value(config, "base-vllm-args")
    has_words = bool(words) or config.getoption(OPTION["base-vllm-args"].dest) is not None
    if not text and not has_words:
        return None
    if (mode := raw_value(config, "baseline")) in ("new", "update"):
        raise pytest.UsageError(
            f"--gpu-base and --gpu-baseline={mode} were both asked for: a comparison in pairs stores nothing\n"
            f"  leave one of them out; to store what runs now: --gpu-baseline={mode} alone"
        )
    vllm_args = read("base-vllm-args", parse_vllm_arguments) if has_words else None
    choice: BaseChoice = read("base", partial(parse_base, folder=_folder_of(config, "base"), vllm_args=vllm_args))
    return choice


def parse_base(text: str, *, folder: Path, vllm_args: tuple[str, ...] | None = None) -> BaseChoice:
    """Read what ``--gpu-base`` names; nothing means the Python that runs now.

    :param folder: that a relative path starts from. :param vllm_args: of ``--gpu-base-vllm-args``.
    :raises ValueError: a URL with a secret in it, or with arguments; a path without a Python.
    """
    from pytest_gpulayout.adapters.base_side import KEY_VARIABLE, is_url, resolve_python

    suffix = "" if vllm_args is None else f" with {shlex.join(vllm_args) or 'no arguments'}"
    if not text:
        return BaseChoice(f"this Python{suffix}", python=sys.executable, vllm_args=vllm_args)
    if not is_url(text):
        return BaseChoice(f"{text}{suffix}", python=resolve_python(text, folder), vllm_args=vllm_args)
    url = parse_server_url(text, KEY_VARIABLE)
    if vllm_args is not None:
        raise ValueError("a server that already runs takes no arguments\n  leave --gpu-base-vllm-args out")
    return BaseChoice(text, url=url)


def parse_server_url(text: str, key_variable: str) -> str:
    """Read the address of a server that already runs.

    :param key_variable: environment variable of its key, which does not belong into an address.
    :raises ValueError: a secret in it, or no address of a server; a secret is not repeated.
    """
    parts = urlsplit(text)
    if parts.username or parts.password or parts.query or parts.fragment or "@" in text:
        raise ValueError(f"a URL without user, key and query was expected\n  put the key into {key_variable}")
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"a URL such as http://HOST:8000 was expected, found {text!r}")
    if not parts.hostname:
        raise ValueError(f"a URL with a host was expected, found {text!r}")
    return text


_OF_ITS_OWNER = {
    "base": "a comparison in pairs starts servers in turn",
    "base-vllm-args": "a comparison in pairs starts servers in turn",
    "vllm-args": "a server that already runs takes no arguments",
    "nodes": "its nodes are those of whoever runs it",
}
"""Options that have no meaning for a server that somebody else runs, and why."""


def _attach(config: pytest.Config, read: Callable[[str, Callable[[str], Any]], Any]) -> AttachChoice | None:
    """Read ``--gpu-server-url`` and ``--gpu-nccl-log``, and refuse what cannot go with them."""
    url, pattern = raw_value(config, "server-url"), raw_value(config, "nccl-log")
    if not url:
        if pattern:
            raise pytest.UsageError(
                f"{OPTION['nccl-log'].flag}: the logs of a server that somebody else runs were given, and no server\n"
                "  name it: --gpu-server-url=http://HOST:8000; logs alone are read by: gpulayout nccl FILE..."
            )
        return None
    from pytest_gpulayout.adapters.attached_server import KEY_VARIABLE

    choice = AttachChoice(read("server-url", partial(parse_server_url, key_variable=KEY_VARIABLE)))
    for name, reason in _OF_ITS_OWNER.items():
        is_typed = config.getoption(OPTION[name].dest) is not None
        if raw_value(config, name) or (name == "base-vllm-args" and is_typed):
            raise _clash(name, reason)
    if raw_value(config, "devices") and not raw_value(config, "topology"):
        raise _clash("devices", "they name GPUs of a recorded topology (--gpu-topology=FILE), which is not given")
    if len({part.strip() for part in raw_value(config, "layout").split(",")}) > 1:
        raise pytest.UsageError(
            f"one layout was expected with --gpu-server-url, found {raw_value(config, 'layout')}\n"
            "  a server has one: ask for it alone, and run once for each server"
        )
    if not pattern:
        return choice
    folder = _folder_of(config, "nccl-log")
    return replace(choice, nccl_logs=str(folder / Path(pattern).expanduser()))


def _nodes(
    config: pytest.Config, read: Callable[[str, Callable[[str], Any]], Any], layouts: Sequence[Layout]
) -> NodeChoice:
    """Read the options on nodes, and refuse what cannot go with a layout over several."""
    choice = NodeChoice(
        names=read("nodes", parse_nodes),
        command=read("node-command", parse_node_command),
        python=raw_value(config, "node-python") or sys.executable,
        master_addr=raw_value(config, "master-addr") or None,
    )
    widest = max(layouts, key=lambda layout: layout.nodes)
    if 0 < len(choice.names) < widest.nodes:
        raise pytest.UsageError(
            f"--gpu-nodes: layout {widest} needs {widest.nodes} nodes, found {len(choice.names)}: "
            f"{', '.join(choice.names)}\n  name them all, in the order of their ranks: --gpu-nodes=NAME,NAME,..."
        )
    if widest.nodes > 1 and raw_value(config, "topology") and not raw_value(config, "server-url"):
        raise pytest.UsageError(
            f"--gpu-topology and layout {widest} were both asked for: each node's topology is looked at on the node\n"
            "  leave --gpu-topology out"
        )
    return choice


def parse_nodes(text: str) -> tuple[str, ...]:
    """Read names of nodes.

    :raises ValueError: one is missing, stands twice, or looks like an option of the command that it is put into.
    """
    names = tuple(part.strip() for part in text.split(",")) if text else ()
    for name in names:
        if not name or name.startswith("-") or any(sign.isspace() for sign in name):
            raise ValueError(f"names of hosts, separated by commas, were expected, found {name!r}")
        if names.count(name) > 1:
            raise ValueError(f"different nodes were expected, found {name} twice")
    return names


def parse_node_command(text: str) -> tuple[str, ...]:
    """Split a command as a shell would.

    :raises ValueError: there is no place for the node's name, or quotes do not close.
    """
    words = tuple(shlex.split(text))
    if not any("{node}" in word for word in words):
        raise ValueError(f"{{node}} was expected in the command, for the name of the node, found none in {text!r}")
    return words


def _clash(name: str, reason: str) -> pytest.UsageError:
    flag = OPTION[name].flag
    return pytest.UsageError(
        f"--gpu-server-url and {flag} were both asked for: {reason}\n"
        f"  leave one of them out; where the ini file has {OPTION[name].ini}, empty it: {flag}="
    )


def _folder_of(config: pytest.Config, name: str) -> Path:
    """What a relative path starts from: where it was written, the command line or the ini file."""
    is_typed = config.getoption(OPTION[name].dest) is not None
    return config.invocation_params.dir if is_typed else config.rootpath


def _starts(text: str, *, is_paired: bool, is_attached: bool = False) -> int:
    """Read ``--gpu-starts``, whose default and limits are others in paired mode, and of a server of somebody else."""
    from pytest_gpulayout.pairs import FEWEST_BLOCKS, MOST_BLOCKS, USUAL_BLOCKS

    if not text:
        return USUAL_BLOCKS if is_paired else 1 if is_attached else STORED_STARTS
    starts = int(_positive(whole=True)(text))
    if is_attached and starts != 1:
        raise ValueError(
            f"1 start was expected with --gpu-server-url, found {starts}: a server that somebody else runs is not "
            "started anew\n  leave --gpu-starts out"
        )
    if is_paired and not FEWEST_BLOCKS <= starts <= MOST_BLOCKS:
        raise ValueError(
            f"{FEWEST_BLOCKS} to {MOST_BLOCKS} starts of each side were expected with --gpu-base, found {starts}"
        )
    return starts


def _positive(*, whole: bool = False, or_zero: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        kind = "a whole number" if whole else "a number"
        try:
            value = float(int(text)) if whole else float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > 0 or (or_zero and value == 0))):
            raise ValueError(f"{kind} {'not below 0' if or_zero else 'above 0'} was expected, found {text!r}")
        return value

    return parse


def _baseline_dir(config: pytest.Config) -> str:
    text = raw_value(config, "baseline-dir")
    return text if "://" in text else str(config.rootpath / text)


def _workload(config: pytest.Config, text: str) -> Workload:
    """Read a workload; a file's path is relative to where it was written: the command line or the ini file."""
    from pytest_gpulayout.adapters.workload_files import load_workload

    is_typed = config.getoption(OPTION["workload"].dest) is not None
    folder = config.invocation_params.dir if is_typed else config.rootpath
    return load_workload(text, folder=folder, project=config.rootpath)


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


def model_of_marker(marker: pytest.Mark, check: Callable[[str], str] = check_model) -> ModelSpec:
    """Read ``gpu_model(id, **vllm_args)``.

    :param check: of its name: a folder of another host cannot be looked at.
    :raises MarkerError: not one model, a folder that is missing, or an argument that this plugin sets itself.
    """
    try:
        return ModelSpec(check(_only_argument(marker, "model")), marker_arguments(marker.kwargs))
    except ValueError as error:
        raise MarkerError(f"marker gpu_model: {error}") from error


def workload_of_marker(marker: pytest.Mark, known: Mapping[str, Workload] = MappingProxyType({})) -> Workload:
    """Read ``gpu_workload(name_or_dict)``.

    :param known: the user's own workloads, by name.
    :raises MarkerError: not one workload. :raises WorkloadError: it is unknown, or does not follow its schema.
    """
    try:
        wanted = _only_argument(marker, "workload")
    except ValueError as error:
        raise MarkerError(f"marker gpu_workload: {error}") from error
    return as_workload(wanted, known)


def claim_of_marker(marker: pytest.Mark) -> Claim:
    """Read ``gpu_better_than(other, metric, factor)``.

    :raises MarkerError: too few arguments, or one that cannot be read.
    """
    try:
        return parse_claim(*marker.args, **marker.kwargs)
    except (TypeError, LayoutSyntaxError) as error:
        raise MarkerError(f"marker gpu_better_than(other, metric, factor): {error}") from error


def _only_argument(marker: pytest.Mark, noun: str) -> Any:
    if len(marker.args) != 1:
        raise ValueError(f"one {noun} is expected, found {len(marker.args) or 'none'}")
    return marker.args[0]


def marker_arguments(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Turn keyword arguments of the ``gpu_model`` marker into ``vllm serve`` arguments.

    ``max_num_seqs=8`` -> ``--max-num-seqs 8``; ``True`` -> the flag, ``False`` -> ``--no-flag``; a list -> several
    values; a mapping -> JSON.

    :raises ValueError: an argument that this plugin sets itself.
    """
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
