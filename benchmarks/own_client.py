"""Runs this package's load client once, in a process of its own, and prints what it measured as JSON.

What ``client_accuracy.py`` starts, so that our client gets no more than the others: a fresh process. By hand, against
the mock of ``python -m pytest_gpulayout.adapters.mock_server``::

    python benchmarks/own_client.py http://127.0.0.1:PORT --streams 10 --requests 40 --output-tokens 64
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
from pytest_gpulayout.calibration import latency_figures
from pytest_gpulayout.ports import Endpoint
from pytest_gpulayout.workload import Workload

_NS_PER_US = 1e3
_NS_PER_MS = 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    arguments = parser.parse_args()
    workload = Workload(
        name="accuracy",
        input_tokens=arguments.input_tokens,
        output_tokens=arguments.output_tokens,
        concurrency=arguments.streams,
        requests=arguments.requests,
        batches=1,
    )
    print(json.dumps(_measured(Endpoint(arguments.url, "m"), workload)))


def _measured(endpoint: Endpoint, workload: Workload) -> dict[str, object]:
    run = OpenAiStreamDriver().run(endpoint, workload, seed=time.time_ns(), progress=lambda _line: None)
    peak_kib = _peak_memory_kib()  # before the statistics below need some themselves
    clients = [client for batch in run.batches for client in batch.clients]
    messages = sum(len(request.chunk_ns) for request in run.requests)
    return {
        **asdict(latency_figures((request.send_ns, request.chunk_ns) for request in run.requests)),
        "failed": len(run.failed),
        "duration_s": run.duration_s,
        "messages": messages,
        "cpu_us_per_event": sum(client.cpu_ns for client in clients) / _NS_PER_US / messages,
        "waited_ms": max((client.wait_ns or 0) for client in clients) / _NS_PER_MS,
        "peak_memory_kib": peak_kib,
        "processes": len(clients),
        "unstamped": sum(client.unstamped for client in clients),
        "scheduling": run.scheduling,
        "timestamp_source": run.timestamp_source,
    }


def _peak_memory_kib() -> int:
    """Most memory this process has held (``VmHWM``); ``getrusage`` would count that of the parent before ``exec``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise SystemExit("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    main()
