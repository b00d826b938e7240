"""How far our load client's TTFT and ITL are from the truth, and how far those of ``vllm bench serve`` are.

A scripted server in a process of its own streams answers with a fixed TTFT and ITL and stamps each chunk just before
it writes it. Both clocks are ``CLOCK_MONOTONIC``, so the error of a client is the difference of two statistics: what
the client reports, less what the server did (first chunk - request received, and chunk - chunk before). The clients
take turns, round by round, on the same server, each as it is: ours takes real-time priority where it may. From the
repository's root::

    python benchmarks/client_accuracy.py --streams 1,10,50
    python benchmarks/client_accuracy.py --streams 50 --vllm-python ../venv/bin/python --tokenizer MODEL_FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np

from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
from pytest_gpulayout.metrics import vllm_result
from pytest_gpulayout.ports import Endpoint
from pytest_gpulayout.workload import Workload

_ROOT = Path(__file__).resolve().parent.parent
_STATISTICS = ("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms", "std_itl_ms")
_NS_PER_MS = 1e6

# What the command `vllm bench serve` runs; the command itself does not start where the distribution has another
# name than "vllm", as the CPU build has.
_VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True, slots=True)
class Bench:
    """What to run. :param url: of the scripted server. :param rounds: each client's number of runs."""

    url: str
    rounds: int
    requests_per_stream: int
    input_tokens: int
    output_tokens: int
    vllm_python: str | None
    tokenizer: str | None


def main() -> None:
    """Run the comparison and print it."""
    arguments = _arguments()
    _print_machine(arguments)
    with _server(arguments.ttft_ms, arguments.itl_ms) as url:
        bench = Bench(
            url=url,
            rounds=arguments.rounds,
            requests_per_stream=arguments.requests_per_stream,
            input_tokens=arguments.input_tokens,
            output_tokens=arguments.output_tokens,
            vllm_python=arguments.vllm_python,
            tokenizer=arguments.tokenizer,
        )
        print(f"{'streams':>7} {'client':<17}" + "".join(f"{name:>16}" for name in _STATISTICS))
        for streams in arguments.streams:
            _compare(bench, streams)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="error of the load client against the server's own stamps, in ms")
    parser.add_argument("--streams", type=_numbers, default=[1, 10, 50], help="concurrencies, e.g. 1,10,50")
    parser.add_argument("--ttft-ms", type=float, default=50.0)
    parser.add_argument("--itl-ms", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests-per-stream", type=int, default=4)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--vllm-python", help="also run `vllm bench serve` of this interpreter")
    parser.add_argument("--tokenizer", help="folder with a tokenizer, for `vllm bench serve`")
    arguments = parser.parse_args()
    if arguments.vllm_python and not arguments.tokenizer:
        parser.error("--vllm-python needs --tokenizer FOLDER")
    return arguments


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _print_machine(arguments: argparse.Namespace) -> None:
    load = "/".join(f"{value:.2f}" for value in os.getloadavg())
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {platform.machine()}, {os.cpu_count()} CPUs, load {load}")
    print(f"Linux {platform.release()}, Python {platform.python_version()}, httptools {version('httptools')}")
    print(f"pytest-gpulayout {version('pytest-gpulayout')}", end="")
    if arguments.vllm_python:
        code = "import vllm; print(vllm.__version__)"
        print(", vllm", _vllm(arguments.vllm_python, ["-c", code]).splitlines()[-1], end="")
    print(f"\nserver: TTFT {arguments.ttft_ms:g} ms, ITL {arguments.itl_ms:g} ms; ", end="")
    print(f"median of {arguments.rounds} rounds; values are client - server, in ms")


@contextmanager
def _server(ttft_ms: float, itl_ms: float) -> Iterator[str]:
    command = [
        sys.executable,
        "-m",
        "tests.support.stream_server",
        "--ttft-ms",
        str(ttft_ms),
        "--itl-ms",
        str(itl_ms),
    ]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def _compare(bench: Bench, streams: int) -> None:
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    for number in range(bench.rounds):
        ours.append(_our_error(bench, streams, seed=time.time_ns()))
        if bench.vllm_python:
            theirs.append(_vllm_error(bench, streams, seed=number))
    mine = _print_row(streams, "pytest-gpulayout", ours)
    print(f"{'':>7} stamp after write: median {_median(ours, 'stamp_median_ms'):.3f} ms,", end=" ")
    print(f"p99 {_median(ours, 'stamp_p99_ms'):.3f} ms; own estimate {_median(ours, 'lag_max_ms'):.3f} ms")
    if theirs:
        other = _print_row(streams, "vllm bench serve", theirs)
        ratios = [abs(other[name]) / max(abs(mine[name]), 1e-3) for name in _STATISTICS]
        print(f"{streams:>7} {'vllm / ours':<17}" + "".join(f"{ratio:>15.1f}x" for ratio in ratios))


def _print_row(streams: int, client: str, errors: Sequence[dict[str, float]]) -> dict[str, float]:
    medians = {name: _median(errors, name) for name in _STATISTICS}
    print(f"{streams:>7} {client:<17}" + "".join(f"{medians[name]:>16.3f}" for name in _STATISTICS))
    return medians


def _median(errors: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(error[name] for error in errors)


def _our_error(bench: Bench, streams: int, *, seed: int) -> dict[str, float]:
    workload = Workload(
        name="accuracy",
        input_tokens=bench.input_tokens,
        output_tokens=bench.output_tokens,
        concurrency=streams,
        requests=streams * bench.requests_per_stream,
        batches=1,
    )
    _sent(bench)
    run = OpenAiStreamDriver().run(Endpoint(bench.url, "m"), workload, seed=seed, progress=lambda _line: None)
    records = {record["fingerprint"]: record for record in _sent(bench)}
    pairs = [(trace, records[str(trace.system_fingerprint)]) for trace in run.requests]
    stamps_ms = [
        (ours - theirs) / _NS_PER_MS
        for trace, record in pairs
        for ours, theirs in zip(trace.chunk_ns, record["chunk_ns"], strict=True)
    ]
    errors = _difference(vllm_result(run, workload, model="m"), _truth([record for _, record in pairs]))
    return errors | {
        "stamp_median_ms": float(np.median(stamps_ms)),
        "stamp_p99_ms": float(np.percentile(stamps_ms, 99)),
        "lag_max_ms": run.loop_lag_max_ns / _NS_PER_MS,
    }


def _vllm_error(bench: Bench, streams: int, *, seed: int) -> dict[str, float]:
    requests = streams * bench.requests_per_stream
    _sent(bench)
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "--backend": "openai",
            "--base-url": bench.url,
            "--model": "m",
            "--tokenizer": bench.tokenizer,
            "--dataset-name": "random",
            "--random-input-len": bench.input_tokens,
            "--random-output-len": bench.output_tokens,
            "--num-prompts": requests,
            "--max-concurrency": streams,
            "--num-warmups": streams,
            "--seed": seed,
            "--result-dir": folder,
            "--result-filename": "result.json",
        }
        words = [str(word) for option in options.items() for word in option]
        _vllm(str(bench.vllm_python), ["-c", _VLLM_BENCH_SERVE, "--save-result", *words])
        result = json.loads((Path(folder) / "result.json").read_text())
    return _difference(result, _truth(_sent(bench)[-requests:]))


def _vllm(python: str, arguments: Sequence[str]) -> str:
    environment = {**os.environ, "VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run([python, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def _sent(bench: Bench) -> list[dict[str, Any]]:
    """Take the server's records; the next call returns only newer ones."""
    with urlopen(f"{bench.url}/sent", timeout=10) as response:
        records: list[dict[str, Any]] = json.load(response)
    return records


def _truth(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    ttft = [(record["chunk_ns"][0] - record["received_ns"]) / _NS_PER_MS for record in records]
    itl = [(b - a) / _NS_PER_MS for record in records for a, b in pairwise(record["chunk_ns"])]
    return {
        "median_ttft_ms": float(np.median(ttft)),
        "p99_ttft_ms": float(np.percentile(ttft, 99)),
        "median_itl_ms": float(np.median(itl)),
        "p99_itl_ms": float(np.percentile(itl, 99)),
        "std_itl_ms": float(np.std(itl)),
    }


def _difference(client: dict[str, Any], truth: dict[str, float]) -> dict[str, float]:
    return {name: client[name] - truth[name] for name in _STATISTICS}


if __name__ == "__main__":
    main()
