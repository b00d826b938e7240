"""How far our load client's TTFT and ITL are from the truth, and how far those of other load clients are.

The truth is the package's own mock server (``python -m pytest_gpulayout.adapters.mock_server``), which stamps each
chunk right before it sends it. Its clock and ours are ``CLOCK_MONOTONIC`` of one host, so a client's error is the
difference of two statistics by one definition: what the client reports, less what the server did in that client's own
requests (first chunk sent - request received, and chunk - chunk before). The clients take turns, round by round, on
one server, each a fresh process, each as it is (ours takes real-time priority where it may), each warmed up with one
answer per stream. Server and clients are pinned apart where there are two CPUs or more: the last is the server's.

A server that is late sends one message after the other as fast as it can, and to that any client keeps up. So a round
counts only if the server kept its timetable: its 99th percentile of lateness within half an ITL. Column "kept" says
how many rounds did; a row in which none did is marked "!" and proves nothing. Let nothing else run on the machine.

GuideLLM reports no gaps, only each request's mean gap: its ITL columns compare that, on both sides.

From the repository's root; ours alone, then with the others::

    python benchmarks/client_accuracy.py
    python benchmarks/client_accuracy.py --streams 100,250,1000 --rounds 5 --json accuracy.json \
        --tokenizer FOLDER --vllm-python VENV/bin/python --vllm-rs vllm-rs --guidellm VENV/bin/guidellm \
        --aiperf VENV/bin/aiperf
    python benchmarks/client_accuracy.py --memory

``FOLDER`` holds a tokenizer: ``python examples/model_repo/make_model.py FOLDER`` writes one (it needs ``tokenizers``,
which comes with vLLM). ``vllm-rs`` is vLLM's client in Rust, a file of the wheel ``vllm==0.33.0``; it needs no GPU::

    pip download vllm==0.33.0 --no-deps --only-binary=:all: && unzip -j vllm-0.33.0-*.whl vllm/vllm-rs
    chmod +x vllm-rs

``VENV`` of the others: ``pip install guidellm==0.8.1`` and ``pip install aiperf==0.13.0``, each in its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from pytest_gpulayout.adapters.calibrator import RunningMock, running_mock
from pytest_gpulayout.adapters.cpu_host import cpu_model
from pytest_gpulayout.calibration import LatencyFigures, SentAnswer, kept_time, latency_figures, lateness_ms

_HERE = Path(__file__).resolve().parent
_STATISTICS = tuple(field.name for field in fields(LatencyFigures))
_HEADINGS = ("TTFT median", "TTFT p99", "ITL median", "ITL p99", "duration s", "CPU us/event", "server late p99")
_NS_PER_MS = 1e6
_KIB_PER_MIB = 1024
_PER_MILLION = 1e6
_TIMEOUT_S = 600
_OURS = "pytest-gpulayout"
_MEMORY_STREAMS, _MEMORY_TOKENS, _MEMORY_ITL_MS = 100, 256, 5.0

# Most error allowed to ours, ms, by number of streams.
_CRITERIA: Mapping[int, Mapping[str, float]] = {
    100: {"median_ttft_ms": 0.3, "p99_ttft_ms": 3.0},
    250: {"median_ttft_ms": 0.5, "p99_ttft_ms": 5.0, "p99_itl_ms": 1.0},
    1000: {"median_ttft_ms": 5.0, "p99_ttft_ms": 25.0},
}

# What the command `vllm bench serve` runs; the command itself does not start where the distribution has another
# name than "vllm", as the CPU build has.
_VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


class CannotRun(Exception):
    """A client did not measure; its text is the reason."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a client is to send. :param folder: empty, for its files. :param tokenizer: folder with one."""

    url: str
    streams: int
    requests: int
    input_tokens: int
    output_tokens: int
    seed: int
    folder: Path
    tokenizer: str


@dataclass(frozen=True, slots=True)
class Told:
    """What a client says of a run.

    :param requests: that it speaks of. :param mean_gaps: its ITL is per request.
    :param waited_ms: longest time that one of its processes was ready to run and had no CPU.
    """

    figures: LatencyFigures
    duration_s: float
    requests: int
    cpu_us_per_event: float | None = None
    waited_ms: float | None = None
    mean_gaps: bool = False


@dataclass(frozen=True, slots=True)
class Client:
    """One load client. :param command: None where no path was given; ``missing`` then says which option wants it."""

    name: str
    measure: Callable[[str, Load], Told]
    command: str | None
    version: Sequence[str]
    missing: str = ""


@dataclass(frozen=True, slots=True)
class Round:
    """One run of one client.

    :param error: client - server. :param truth: what the server did in this run. :param late_ms: how late it was.
    :param kept: it kept its timetable.
    """

    error: LatencyFigures
    truth: LatencyFigures
    late_ms: float
    kept: bool
    duration_s: float
    cpu_us_per_event: float | None
    waited_ms: float | None


def main() -> None:
    """Run the comparison and print it."""
    arguments = _arguments()
    _allow_many_connections()
    clients = _clients(arguments)
    machine = _machine(clients)
    print("\n".join(machine))
    with _pinned() as pin:
        document = (
            _memory(arguments.memory_requests, pin) if arguments.memory else _comparison(arguments, clients, pin)
        )
    if arguments.json:
        text = json.dumps({"machine": machine, "options": vars(arguments), **document}, indent=1)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="error of load clients against the server's own stamps, in ms")
    parser.add_argument("--streams", type=_numbers, default=[100, 250, 1000], help="requests in flight: 100,250,1000")
    parser.add_argument("--ttft-ms", type=float, default=20.0)
    parser.add_argument("--itl-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests-per-stream", type=int, default=4)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--tokenizer", default="", help="folder with a tokenizer, for all clients but ours")
    parser.add_argument("--vllm-python", help="Python of a venv with vLLM: also run `vllm bench serve`")
    parser.add_argument("--vllm-rs", help="vLLM's executable in Rust: also run `vllm-rs bench serve`")
    parser.add_argument("--guidellm", help="also run this GuideLLM (0.8)")
    parser.add_argument("--aiperf", help="also run this AIPerf (0.13)")
    parser.add_argument("--memory", action="store_true", help="only measure how much memory our client needs")
    parser.add_argument("--memory-requests", type=_numbers, default=[1000, 4000], help="the run lengths compared")
    parser.add_argument("--json", metavar="FILE", help="also write all figures of all rounds there")
    arguments = parser.parse_args()
    others = (arguments.vllm_python, arguments.vllm_rs, arguments.guidellm, arguments.aiperf)
    if any(others) and not arguments.tokenizer:
        parser.error("the other clients need --tokenizer FOLDER")
    return arguments


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _clients(arguments: argparse.Namespace) -> list[Client]:
    python, rust = arguments.vllm_python, arguments.vllm_rs
    vllm_version = (python, "-c", "import vllm; print(vllm.__version__)")
    return [
        Client(_OURS, _ours, sys.executable, ()),
        Client("vllm bench serve", _vllm_bench, python, vllm_version, "--vllm-python"),
        Client("vllm-rs bench", _vllm_rs, rust, (rust, "--version"), "--vllm-rs"),
        Client("GuideLLM", _guidellm, arguments.guidellm, (arguments.guidellm, "--version"), "--guidellm"),
        Client("AIPerf", _aiperf, arguments.aiperf, (arguments.aiperf, "--version"), "--aiperf"),
    ]


def _machine(clients: Sequence[Client]) -> list[str]:
    load = "/".join(f"{value:.2f}" for value in os.getloadavg())
    cpus = len(os.sched_getaffinity(0))
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {cpu_model()}, {cpus} CPUs, load {load}",
        f"Linux {platform.release()}, Python {platform.python_version()}, httptools {version('httptools')}",
    ]
    told = [f"{_OURS} {version(_OURS)}"]
    for client in clients[1:]:
        if client.command is not None:
            told.append(f"{client.name} {_version(client)}")
    return [*lines, ", ".join(told)]


def _version(client: Client) -> str:
    try:
        return _run(client.version).split()[-1]
    except (CannotRun, IndexError):
        return "(unknown version)"


def _allow_many_connections() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def _pinned() -> Iterator[Callable[[RunningMock], None]]:
    """Keep this process and its children off the last CPU; yield what puts a server there."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) == 1:
        print("not pinned: there is one CPU")
        yield lambda _mock: None
        return
    os.sched_setaffinity(0, cpus[:-1])
    print(f"clients on CPUs {cpus[0]}-{cpus[-2]}, server on CPU {cpus[-1]}")
    try:
        yield lambda mock: os.sched_setaffinity(mock.pid, cpus[-1:])
    finally:
        os.sched_setaffinity(0, cpus)


# -- accuracy --------------------------------------------------------------------------------------------------------


def _comparison(
    arguments: argparse.Namespace, clients: Sequence[Client], pin: Callable[[RunningMock], None]
) -> dict[str, Any]:
    reasons = {client.name: f"no {client.missing} given" for client in clients if client.command is None}
    results: dict[int, dict[str, list[Round]]] = {}
    print(f"server: TTFT {arguments.ttft_ms:g} ms, ITL {arguments.itl_ms:g} ms; {arguments.rounds} rounds")
    with running_mock(ttft_ms=arguments.ttft_ms, itl_ms=arguments.itl_ms, model="m") as mock:
        pin(mock)
        for streams in arguments.streams:
            results[streams] = _rounds(arguments, clients, mock, streams, reasons)
            _print_table(streams, results[streams])
    for name, reason in reasons.items():
        print(f"did not run: {name}: {reason}")
    for streams, by_client in results.items():
        _print_criteria(streams, by_client.get(_OURS, []))
    rounds = {
        str(streams): {name: [asdict(one) for one in many] for name, many in by_client.items()}
        for streams, by_client in results.items()
    }
    return {"rounds": rounds, "did_not_run": reasons}


def _rounds(
    arguments: argparse.Namespace,
    clients: Sequence[Client],
    mock: RunningMock,
    streams: int,
    reasons: dict[str, str],
) -> dict[str, list[Round]]:
    """Let the clients take turns; one that cannot run at this load is left out from then on, with its reason."""
    rounds: dict[str, list[Round]] = {}
    given_up = set()
    for seed in range(arguments.rounds):
        for client in clients:
            if client.command is None or client.name in given_up:
                continue
            try:
                rounds.setdefault(client.name, []).append(_one_round(arguments, client, mock, streams, seed))
            except CannotRun as reason:
                reasons[f"{client.name} at {streams} streams, round {seed + 1}"] = str(reason)
                given_up.add(client.name)
    return rounds


def _one_round(arguments: argparse.Namespace, client: Client, mock: RunningMock, streams: int, seed: int) -> Round:
    mock.take_sent()
    with tempfile.TemporaryDirectory() as folder:
        load = Load(
            url=mock.url,
            streams=streams,
            requests=streams * arguments.requests_per_stream,
            input_tokens=arguments.input_tokens,
            output_tokens=arguments.output_tokens,
            seed=seed,
            folder=Path(folder),
            tokenizer=os.path.abspath(arguments.tokenizer),
        )
        told = client.measure(str(client.command), load)
    measured = _measured(mock.take_sent(), told, load)
    truth = _truth(measured, told)
    late_ms = lateness_ms(measured, ttft_ms=arguments.ttft_ms, itl_ms=arguments.itl_ms)
    kept = kept_time(late_ms, arguments.itl_ms)
    return Round(told.figures - truth, truth, late_ms, kept, told.duration_s, told.cpu_us_per_event, told.waited_ms)


def _measured(sent: Sequence[SentAnswer], told: Told, load: Load) -> Sequence[SentAnswer]:
    """The requests that a client speaks of: the last ones, those before were its warm-up."""
    if told.requests != load.requests:
        raise CannotRun(f"it speaks of {told.requests} requests, {load.requests} were asked for")
    measured = sent[-told.requests :]
    chunks = {len(answer.chunk_ns) for answer in measured}
    if len(measured) < told.requests or chunks != {load.output_tokens}:
        raise CannotRun(f"the server sent {len(measured)} answers of {chunks} chunks, not of {load.output_tokens}")
    return measured


def _truth(measured: Sequence[SentAnswer], told: Told) -> LatencyFigures:
    """What the server did, by the client's own definition."""
    if told.mean_gaps:
        gap_ns = [(answer.chunk_ns[-1] - answer.chunk_ns[0]) / (len(answer.chunk_ns) - 1) for answer in measured]
        ttft_ns = [answer.chunk_ns[0] - answer.received_ns for answer in measured]
        return _figures(np.array(ttft_ns) / _NS_PER_MS, np.array(gap_ns) / _NS_PER_MS)
    return latency_figures((answer.received_ns, answer.chunk_ns) for answer in measured)


def _figures(ttft_ms: Sequence[float] | np.ndarray, gap_ms: Sequence[float] | np.ndarray) -> LatencyFigures:
    return LatencyFigures(
        *(float(np.percentile(sample, share)) for sample in (ttft_ms, gap_ms) for share in (50, 99))
    )


# -- the clients -----------------------------------------------------------------------------------------------------


def _ours(python: str, load: Load) -> Told:
    options = {
        "--streams": load.streams,
        "--requests": load.requests,
        "--input-tokens": load.input_tokens,
        "--output-tokens": load.output_tokens,
    }
    told = json.loads(_run([python, str(_HERE / "own_client.py"), load.url, *_words(options)]))
    if told["failed"]:
        raise CannotRun(f"{told['failed']} requests failed")
    figures = LatencyFigures(*(told[name] for name in _STATISTICS))
    return Told(figures, told["duration_s"], load.requests, told["cpu_us_per_event"], told["waited_ms"])


def _vllm_bench(python: str, load: Load) -> Told:
    _run([python, "-c", _VLLM_BENCH_SERVE, *_vllm_options(load)])
    return _vllm_result(load)


def _vllm_rs(executable: str, load: Load) -> Told:
    _run([executable, "bench", "serve", *_vllm_options(load)])
    return _vllm_result(load)


def _vllm_options(load: Load) -> list[str]:
    options = {
        "--backend": "openai",
        "--base-url": load.url,
        "--model": "m",
        "--tokenizer": load.tokenizer,
        "--dataset-name": "random",
        "--random-input-len": load.input_tokens,
        "--random-output-len": load.output_tokens,
        "--num-prompts": load.requests,
        "--max-concurrency": load.streams,
        "--num-warmups": load.streams,
        "--seed": load.seed,
        "--result-dir": load.folder,
        "--result-filename": "result.json",
    }
    return ["--ignore-eos", "--save-result", *_words(options)]


def _vllm_result(load: Load) -> Told:
    result = json.loads((load.folder / "result.json").read_text(encoding="utf-8"))
    figures = LatencyFigures(*(float(result[name]) for name in _STATISTICS))
    return Told(figures, result["duration"], result["completed"])


def _guidellm(executable: str, load: Load) -> Told:
    path = load.folder / "result.json"
    settings = {
        "--backend": f"kind=openai_http,target={load.url},model=m,request_format=/v1/completions",
        "--profile": f"kind=concurrent,streams={load.streams}",
        "--constraint": f"kind=max_requests,count={load.streams + load.requests}",
        "--tokenizer": f"kind=huggingface_auto,model={load.tokenizer}",
        "--data": f"kind=synthetic_text,prompt_tokens={load.input_tokens},output_tokens={load.output_tokens}",
        "--seed": f"kind=static,value={load.seed}",
        "--output": f"kind=json,path={path}",
    }
    _run([executable, "run", "--disable-console", *_words(settings)])
    (benchmark,) = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    # It has a warm-up, but lists those requests too; the first ones to start are left out here.
    answered = sorted(benchmark["requests"]["successful"], key=lambda request: float(request["request_start_time"]))
    requests = answered[load.streams :]
    ttft_ms = [request["time_to_first_token_ms"] for request in requests]
    gap_ms = [request["inter_token_latency_ms"] for request in requests]
    if not requests:
        raise CannotRun("it reports no successful request")
    return Told(_figures(ttft_ms, gap_ms), benchmark["duration"], len(requests), mean_gaps=True)


def _aiperf(executable: str, load: Load) -> Told:
    options = {
        "--model": "m",
        "--url": load.url,
        "--endpoint-type": "completions",
        "--concurrency": load.streams,
        "--request-count": load.requests,
        "--warmup-request-count": load.streams,
        "--isl": load.input_tokens,
        "--osl": load.output_tokens,
        "--extra-inputs": "ignore_eos:true",
        "--tokenizer": load.tokenizer,
        "--random-seed": load.seed + 1,
        "--artifact-dir": load.folder,
        "--export-level": "records",
        "--ui": "none",
    }
    flags = ("--streaming", "--use-server-token-count", "--use-legacy-max-tokens", "--no-server-metrics")
    # AIPerf loads no tokenizer from a folder when the hub is switched off, which to it is any value but an empty one.
    _run([executable, "profile", *flags, "--no-gpu-telemetry", *_words(options)], {"HF_HUB_OFFLINE": ""})
    lines = (load.folder / "profile_export.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    measured = [one["metrics"] for one in records if one["metadata"]["benchmark_phase"] == "profiling"]
    summary = json.loads((load.folder / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    ttft_ms = [metrics["time_to_first_token"]["value"] for metrics in measured]
    gap_ms = [gap for metrics in measured for gap in metrics["inter_chunk_latency"]["value"]]
    return Told(_figures(ttft_ms, gap_ms), summary["benchmark_duration"]["avg"], len(measured))


def _words(options: Mapping[str, object]) -> list[str]:
    return [str(word) for option in options.items() for word in option]


def _run(command: Sequence[str], settings: Mapping[str, str] = MappingProxyType({})) -> str:
    """Run a client and return its standard output.

    :param settings: of its environment. :raises CannotRun: it ended with an error, did not end, or is not there.
    """
    constant = {"HF_HUB_OFFLINE": "1", "VLLM_TARGET_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1"}
    environment = {**os.environ, **constant, **settings}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotRun(str(error)) from error
    if done.returncode:
        raise CannotRun(f"it ended with {done.returncode}: {_complaint(done.stderr + done.stdout)}")
    return done.stdout


def _complaint(output: str) -> str:
    """The first line that speaks of an error, or else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")[:300]


# -- memory ----------------------------------------------------------------------------------------------------------


def _memory(lengths: Sequence[int], pin: Callable[[RunningMock], None]) -> dict[str, Any]:
    """Compare the peak of two run lengths; what both need, such as the interpreter, cancels out."""
    peaks = []
    for requests in lengths:
        with running_mock(ttft_ms=_MEMORY_ITL_MS, itl_ms=_MEMORY_ITL_MS, model="m") as mock:
            pin(mock)
            options = {
                "--streams": _MEMORY_STREAMS,
                "--requests": requests,
                "--output-tokens": _MEMORY_TOKENS,
            }
            told = json.loads(_run([sys.executable, str(_HERE / "own_client.py"), mock.url, *_words(options)]))
        peaks.append(told)
        peak_mib, cpu_us = told["peak_memory_kib"] / _KIB_PER_MIB, told["cpu_us_per_event"]
        print(f"{told['messages']:>9} events: peak {peak_mib:.1f} MiB, {cpu_us:.1f} us of CPU time per event")
    grown_kib = peaks[-1]["peak_memory_kib"] - peaks[0]["peak_memory_kib"]
    mib = grown_kib / _KIB_PER_MIB / (peaks[-1]["messages"] - peaks[0]["messages"]) * _PER_MILLION
    print(f"{mib:.1f} MiB per million events, in answers of {_MEMORY_TOKENS} tokens")
    return {"memory": peaks, "mib_per_million_events": mib}


# -- what is printed -------------------------------------------------------------------------------------------------


def _print_table(streams: int, by_client: Mapping[str, Sequence[Round]]) -> None:
    print(f"\n{streams} streams; client - server in ms, median over the rounds that count [least..most]")
    print(f"{'':<18}{'kept':>6}" + "".join(f"{heading:>28}" for heading in _HEADINGS))
    for name, rounds in by_client.items():
        if not rounds:
            continue
        kept = [one for one in rounds if one.kept]
        shown = kept or rounds
        cells = [_cell([getattr(one.error, statistic) for one in shown], 3) for statistic in _STATISTICS]
        cells.append(_cell([one.duration_s for one in shown], 2))
        cells.append(_cell([one.cpu_us_per_event for one in shown if one.cpu_us_per_event is not None], 1))
        cells.append(_cell([one.late_ms for one in shown], 2))
        mark = f"{len(kept)}/{len(rounds)}" + ("" if kept else "!")
        print(f"{name:<18}{mark:>6}" + "".join(f"{cell:>28}" for cell in cells))
        if any(one.waited_ms is not None for one in shown):
            waits = ", ".join(f"{one.waited_ms:.1f}" for one in shown if one.waited_ms is not None)
            print(f"{'':<24}others kept its thread from running for {waits} ms in these rounds")
    truths = [one.truth for rounds in by_client.values() for one in rounds if one.kept]
    cells = [_cell([getattr(truth, statistic) for truth in truths], 3) for statistic in _STATISTICS]
    print(f"{'(the server did)':<24}" + "".join(f"{cell:>28}" for cell in cells))


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} [{least:.{digits}f}..{most:.{digits}f}]"


def _print_criteria(streams: int, ours: Sequence[Round]) -> None:
    kept = [one for one in ours if one.kept]
    for statistic, allowed in _CRITERIA.get(streams, {}).items():
        if not kept:
            late = f"the server was late in all of {len(ours)} rounds" if ours else "it was not measured"
            print(f"{streams} streams, {statistic}: allowed {allowed:g} ms: NOT SHOWN, {late}")
            continue
        error = statistics.median(abs(getattr(one.error, statistic)) for one in kept)
        verdict = "met" if error <= allowed else "MISSED"
        print(f"{streams} streams, {statistic}: error {error:.3f} ms, allowed {allowed:g} ms: {verdict}")


if __name__ == "__main__":
    main()
