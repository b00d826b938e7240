"""Command-line options and their ini keys, as declared; :mod:`~pytest_gpulayout.settings` reads and checks them.

Imported at every pytest start, so it imports nothing beyond the standard library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

GROUP = "gpu layout"


class Option(NamedTuple):
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
    Option(
        "nodes",
        "NAME,NAME,...",
        "hosts of layouts over several nodes (@N), in the order of their ranks; the first is the head and serves; "
        "local is this host",
    ),
    Option(
        "node-command",
        "COMMAND",
        "what runs a command on a node, {node} being its name, such as 'kubectl exec -i {node} --' or "
        "'srun -N1 -n1 -w {node}' (default: ssh, which must not ask for a password)",
        "ssh -oBatchMode=yes -oServerAliveInterval=5 {node}",
    ),
    Option(
        "node-python",
        "PATH",
        "the Python on the nodes that has pytest-gpulayout and vLLM (default: the path of the one that runs now)",
    ),
    Option(
        "master-addr",
        "ADDRESS",
        "where the nodes reach the head (default: its first address that is not loopback)",
    ),
    Option("transport", "LIST", "transports allowed, such as p2p,nvls; default: all but NET/Socket and CPU/GLOO"),
    Option(
        "workload",
        "NAME_OR_FILE",
        "workload of tests that do not name one: a built-in one (smoke, structured-100, random-300, "
        "single-image-latency), one of pyproject.toml, FILE.toml or FILE.json, FILE#NAME (default: smoke)",
        "smoke",
    ),
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
    Option(
        "write-in-ci",
        "no|yes",
        "whether baselines may be written where the environment variable CI is set (default: no)",
        "no",
        ("no", "yes"),
    ),
    Option("tolerance", "METRIC=5%,...", "how much worse a metric may get; a metric named here becomes gated"),
    Option(
        "base",
        "PYTHON_OR_VENV_OR_URL",
        "judge against another vLLM instead of a stored baseline: fresh servers of both in turn on the same GPUs, "
        "until the verdict is clear; a Python, a folder of a virtual environment, or a URL",
    ),
    Option(
        "base-vllm-args",
        "ARGS",
        "arguments of the base's server in place of those of --gpu-vllm-args; without --gpu-base the base is this "
        "Python, and arguments are compared",
    ),
    Option(
        "starts",
        "N",
        "most fresh server starts per performance gate, and one more that confirms a regression (default: 3); "
        "with --gpu-base most starts of each side (default: 8)",
    ),
    Option(
        "server-url",
        "URL",
        "gate a server that already runs (Kubernetes, Slurm) in place of starting one; it must say itself that it "
        "has the layout; its key is taken from the environment variable GPULAYOUT_SERVER_API_KEY",
    ),
    Option("nccl-log", "GLOB", "log files of NCCL of the server at --gpu-server-url: what proves its transports"),
    Option("budget", "SECONDS", "most seconds of measuring per performance gate (default: no limit)"),
    Option(
        "inconclusive",
        "warn|fail",
        "what an inconclusive verdict does; it is never shown as passed (default: warn)",
        "warn",
        ("warn", "fail"),
    ),
    Option(
        "hour-cost",
        "USD",
        "price of one GPU (with --gpu-platform=cpu of one core) for an hour: adds what 1000 requests and a million "
        "output tokens cost to the table of layouts",
    ),
    Option("results", "FILE.json", "write machine-readable results"),
    Option("start-timeout", "SECONDS", "how long a server may take to start (default: 900)", "900"),
    Option("wait", "SECONDS", "how long to wait for other processes to leave the chosen GPUs (default: 0)", "0"),
)

OPTION = {option.name: option for option in OPTIONS}
"""The same by name."""


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
    return raw_value(config, "layout")


def raw_value(config: pytest.Config, name: str) -> str:
    """The text of an option: of the command line, else of the ini file, else its default."""
    option = OPTION[name]
    value: Any = config.getoption(option.dest)
    if isinstance(value, list):  # --gpu-layout may be repeated
        value = ",".join(value)
    return str(config.getini(option.ini) if value is None else value).strip()


def gpu_options(arguments: Sequence[str]) -> list[str]:
    """Our options among the arguments of a command line, each as one word: ``--gpu-layout=tp2``."""
    found = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith("--gpu-"):
            found.append(argument if "=" in argument else f"{argument}={following}")
    return found
