"""``gpulayout measure``: the load generator on its own, once or at growing loads."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.cli_common import FAILED, FINE, Outcome, as_count, command, typed
from pytest_gpulayout.errors import GpuLayoutError

if TYPE_CHECKING:
    from pytest_gpulayout.observing import Observer
    from pytest_gpulayout.ports import Endpoint, Progress
    from pytest_gpulayout.trace import RunTrace
    from pytest_gpulayout.validity import Problem
    from pytest_gpulayout.workload import Workload

_PROGRESS_INTERVAL_S = 30.0
_SWEEP_DOUBLINGS = 8
_SWEEP_WAVES = 4
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ARRIVALS = {"concurrency", "rate", "ramp_up", "burstiness"}
_FIELDS = (
    *("concurrency", "rate", "burstiness", "ramp_up", "requests", "input_tokens", "output_tokens"),
    *("batches", "warmup_requests", "api", "goodput"),
)


def declare_measure(commands: Any) -> None:
    """Declare the subcommand."""
    from pytest_gpulayout.metrics import definitions_text

    parser = command(
        commands,
        "measure",
        _measure,
        "send a load to a running server and say how fast it answers",
        "gpulayout measure --url http://127.0.0.1:8000 --model Qwen/Qwen3-8B \\",
        "    --concurrency 8 --requests 64 --input-tokens 512 --output-tokens 128 --save result.json",
        "gpulayout measure ... --rate 4 --burstiness 0.5 --goodput ttft:200 tpot:20",
        "gpulayout measure ... --workload random-300 --api-key-env VLLM_API_KEY",
        "gpulayout measure ... --requests 64 --sweep            concurrency 1, 2, 4, ... until it stops paying",
        "gpulayout measure --from result.json                   print a result, ours or of vllm bench serve",
        more=("metrics:", *(f"  {line}".rstrip() for line in definitions_text()), ""),
    )
    parser.add_argument("--url", help="of the server, without /v1; http:// or https://")
    parser.add_argument("--model", metavar="M", help="name that the server serves the model under")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the key")
    _declare_load(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--save", metavar="FILE", help="write the result, with the keys of vllm bench serve")
    output.add_argument("--from", dest="source", metavar="FILE", help="print a stored result, and measure nothing")


def _declare_load(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load", "options override the fields of --workload")
    add = load.add_argument
    add("--workload", metavar="NAME_OR_FILE", help="a built-in workload, one of pyproject.toml, or a file of one")
    add("--concurrency", type=typed(as_count), metavar="N", help="requests in flight (default: 1 without --rate)")
    add("--rate", type=typed(_positive), metavar="R", help="requests per second, inf for all at once")
    add("--burstiness", type=typed(_positive), metavar="B", help="of the arrivals: 1 Poisson (default), inf constant")
    add("--ramp-up", type=typed(_ramp_up), metavar="linear:R1:R2", help="a rate that grows; or exponential:R1:R2")
    add("--requests", type=typed(as_count), metavar="N", help="requests of one batch")
    add("--input-tokens", type=typed(as_count), metavar="N", help="of each prompt")
    add("--output-tokens", type=typed(as_count), metavar="N", help="of each answer")
    add("--batches", type=typed(as_count), metavar="N", help="batches (default: 1)")
    add("--warmup-requests", type=typed(as_count), metavar="N", help="not measured (default: one wave)")
    add("--chat", dest="api", action="store_const", const="chat", help="use /v1/chat/completions")
    add("--goodput", nargs="+", type=typed(_limit), metavar="ttft:MS", help="limits: ttft, tpot, e2el, in ms")
    add("--seed", type=int, help="of prompts and arrivals (default: a new one)")
    add("--processes", type=typed(as_count), metavar="N", help="of the client (default: as many as it needs)")
    add("--no-calibration", action="store_true", help="do not measure the client's own error first (2 s)")
    add("--sweep", action="store_true", help="measure at 1, 2, 4, ... and find the knee; with --rate R at R, 2R, ...")
    add("--sweep-to", type=typed(_positive), metavar="N", help="the greatest load to try")


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise ValueError(f"a number above 0 (or inf) was expected, found {text!r}")
    return number


def _ramp_up(text: str) -> dict[str, Any]:
    strategy, _, rates = text.partition(":")
    start, _, end = rates.partition(":")
    if strategy in ("linear", "exponential"):
        return {"strategy": strategy, "start_rate": _positive(start), "end_rate": _positive(end)}
    raise ValueError(f"linear:R1:R2 or exponential:R1:R2 was expected, found {text!r}")


def _limit(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    return name, _positive(limit)


# -- the command -----------------------------------------------------------------------------------------------------


def _measure(arguments: argparse.Namespace) -> Outcome:
    if arguments.source is not None:
        return _print_stored(arguments.source)
    task = _task(arguments)
    if arguments.save is not None:
        _check_writable(arguments.save)
    outcome = _sweep(task, arguments.sweep_to) if arguments.sweep else _once(task)
    if arguments.save is not None:
        _save(arguments.save, outcome.document)
    return outcome


def _print_stored(source: str) -> Outcome:
    from pytest_gpulayout.bench_result import bench_result_lines, read_bench_result

    result = read_bench_result(Path(source).read_text(encoding="utf-8"), source)
    return Outcome(FAILED if result.failed else FINE, result.document, bench_result_lines(result))


@dataclass(frozen=True, slots=True)
class _Task:
    """What to measure, where, and with what."""

    endpoint: Endpoint
    workload: Workload
    observer: Observer
    seed: int | None
    progress: Progress

    def run(self, workload: Workload) -> tuple[RunTrace, tuple[Problem, ...], dict[str, Any]]:
        """Return what was measured, what is wrong with it, and its document."""
        import secrets

        from pytest_gpulayout.validity import find_problems
        from pytest_gpulayout.vllm_result import vllm_result

        seed = secrets.randbits(48) if self.seed is None else self.seed
        run = self.observer.run(self.endpoint, workload, seed=seed, progress=self.progress, server=None)
        problems = find_problems(run, workload)
        document = vllm_result(run, workload, model=self.endpoint.model)
        document["gpulayout"]["problems"] = [{"kind": problem.kind, "text": problem.text} for problem in problems]
        return run, problems, document


def _once(task: _Task) -> Outcome:
    from pytest_gpulayout.measure_text import measured_lines

    run, problems, document = task.run(task.workload)
    lines = measured_lines(run, task.workload, task.endpoint, problems)
    return Outcome(FAILED if problems else FINE, document, lines)


def _sweep(task: _Task, limit: float | None) -> Outcome:
    from pytest_gpulayout.knee import SweepPoint, run_sweep
    from pytest_gpulayout.measure_text import sweep_lines

    documents: list[dict[str, Any]] = []
    wrong: list[str] = []

    def measure(load: float) -> SweepPoint:
        _, problems, document = task.run(_with_load(task.workload, load))
        documents.append({"load": load, **document})
        wrong.extend(f"at {load:g}: {problem}" for problem in problems)
        return SweepPoint(
            load=load,
            throughput=document["request_throughput"],
            latency_s=document["median_e2el_ms"] / 1e3,
        )

    is_open = task.workload.is_open
    start = (task.workload.rate or 1.0) if is_open else 1.0
    knee = run_sweep(measure, start=start, limit=limit or start * 2**_SWEEP_DOUBLINGS, whole=not is_open)
    documents.sort(key=lambda document: document["load"])
    found = {"load": knee.point.load, "power": knee.point.power, "saturated": knee.saturated}
    lines = sweep_lines(documents, knee, task.workload)
    return Outcome(FAILED if wrong else FINE, {"points": documents, "knee": found}, [*lines, *wrong])


def _with_load(workload: Workload, load: float) -> Workload:
    """The same requests at another load: so many in flight, four waves at least, or so many per second."""
    if workload.is_open:
        return replace(workload, rate=load, ramp_up=None)
    streams = int(load)
    return replace(
        workload,
        concurrency=streams,
        requests=max(workload.requests, _SWEEP_WAVES * streams),
        warmup_requests=streams,
    )


def _task(arguments: argparse.Namespace) -> _Task:
    from pytest_gpulayout.ports import Endpoint

    for name in ("url", "model"):
        if not getattr(arguments, name):
            raise GpuLayoutError(
                f"a server and its model are required, found no --{name}\n  in the command line\n"
                "  name both: --url http://127.0.0.1:8000 --model NAME; or print a stored result: --from FILE"
            )
    workload = _workload(arguments)
    url = arguments.url.rstrip("/").removesuffix("/v1")
    endpoint = Endpoint(url, arguments.model, _api_key(arguments.api_key_env))
    return _Task(endpoint, workload, _observer(arguments, url), arguments.seed, stderr_progress())


def _workload(arguments: argparse.Namespace) -> Workload:
    """The workload of the options, on top of the named one."""
    from pytest_gpulayout.adapters.workload_files import load_workload
    from pytest_gpulayout.workload import workload_from_mapping

    given = {name: value for name in _FIELDS if (value := getattr(arguments, name)) is not None}
    if "goodput" in given:
        given["goodput"] = dict(given["goodput"])
    for name in ("rate", "burstiness"):
        if given.get(name) == math.inf:
            given[name] = "inf"
    if arguments.workload is None:
        return workload_from_mapping(_completed(given))
    named = load_workload(arguments.workload, folder=Path.cwd())
    if not given:
        return named
    document = named.to_document()
    if _ARRIVALS & given.keys():  # one way to arrive takes the place of another, and of its warm-up wave
        document = {key: value for key, value in document.items() if key not in {*_ARRIVALS, "warmup_requests"}}
    if given.keys() - {"batches", "goodput"}:  # another load, which must not go under the name of the first
        del document["name"]
    return workload_from_mapping({**document, **given})


def _completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options without a workload: one batch, and one request at a time unless something says how they arrive."""
    closed = {} if {"rate", "ramp_up"} & given.keys() else {"concurrency": 1}
    return {"batches": 1, **closed, **given}


def _observer(arguments: argparse.Namespace, url: str) -> Observer:
    """Everything that can be seen of a server that somebody else runs; of its host only where it is this one."""
    from urllib.parse import urlsplit

    from pytest_gpulayout.adapters.calibrator import MockCalibrator
    from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
    from pytest_gpulayout.adapters.server_watch import ServerWatch
    from pytest_gpulayout.adapters.telemetry_watch import TelemetryWatch
    from pytest_gpulayout.observing import Observer

    is_here = urlsplit(url).hostname in _LOOPBACK
    return Observer(
        OpenAiStreamDriver(processes=arguments.processes),
        calibrator=None if arguments.no_calibration else MockCalibrator(),
        watch_server=ServerWatch,
        watch_devices=(lambda: TelemetryWatch("cpu", ())) if is_here else None,
    )


def _check_writable(path: str) -> None:
    """Tell before the load, and not after it, that the result cannot be kept."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise GpuLayoutError(
            f"a file that can be written was required for the result, found {path}\n"
            f"  in --save\n  name a file in a folder that exists and can be written to"
        )


def _save(path: str, document: Any) -> None:
    """Write the whole file or leave the old one."""
    target = Path(path).resolve()
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, delete=False) as file:
        json.dump(document, file)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, target)


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise GpuLayoutError(
            f"an API key was required in the environment variable {variable}, found none\n"
            f"  in --api-key-env={variable}\n  set it: export {variable}=..., or leave the option out"
        )
    return key


def stderr_progress(clock: Callable[[], float] = time.monotonic) -> Progress:
    """Rewrite one line of a terminal; where standard error is none (CI logs), print a line every 30 s."""
    if sys.stderr.isatty():
        return lambda text: print(f"\r\x1b[K{text}\r", end="", file=sys.stderr, flush=True)
    due = [clock() + _PROGRESS_INTERVAL_S]

    def tell(text: str) -> None:
        if clock() >= due[0]:
            due[0] = clock() + _PROGRESS_INTERVAL_S
            print(text, file=sys.stderr, flush=True)

    return tell
