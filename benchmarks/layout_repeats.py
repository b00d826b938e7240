"""Whether comparisons of layouts agree with each other: the same ones again and again, on real vLLM's CPU build.

Each run starts every layout afresh, in an order that turns around from run to run, measures once, and ends in an
advice. Printed are the throughput of each layout and who is named for it; at the end how far the starts of one layout
lie apart, beside what was assumed of that. From the repository's root, after ``make install-cpu`` and with nginx::

    python examples/model_repo/make_model.py build/tiny-qwen2
    .venv/bin/python benchmarks/layout_repeats.py --model build/tiny-qwen2 --runs 5 --requests 8
    .venv/bin/python benchmarks/layout_repeats.py --model build/tiny-qwen2 --runs 5 --requests 160
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pytest_gpulayout.adapters.cpu_host import cpu_model

SUITE = """
import pytest

@pytest.mark.gpu_workload({{
    "name": "repeated", "input_tokens": 32, "output_tokens": 16,
    "concurrency": 4, "requests": {requests}, "batches": 3,
}})
def test_speed(measure):
    measure()
"""


def compare(folder: Path, model: Path, layouts: list[str]) -> list[dict[str, Any]]:
    """Compare them once. :returns: the records of the run. :raises FileNotFoundError: pytest ended before it."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--gpu-platform=cpu", f"--gpu-model={model}"]
    command += ["--gpu-vllm-args=--load-format dummy --enforce-eager --max-model-len 2048", "--gpu-baseline=off"]
    command += [f"--gpu-layout={','.join(layouts)}", "--gpu-results=results.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    path = folder / "results.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: pytest wrote no results\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    records: list[dict[str, Any]] = json.loads(path.read_text())["records"]
    path.unlink()
    return records


def main() -> None:
    """Print a line per run, and the spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model")
    parser.add_argument("--layouts", default="tp1,tp2,tp1x2")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=8, help="in each of three batches")
    arguments = parser.parse_args()
    layouts = arguments.layouts.split(",")
    print(f"{cpu_model()}, {os.cpu_count()} CPUs; 3 batches of {arguments.requests} requests")
    rates: dict[str, list[float]] = {layout: [] for layout in layouts}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "test_it.py").write_text(SUITE.format(requests=arguments.requests))
        (folder / "pytest.ini").write_text("[pytest]\n")
        for number in range(arguments.runs):
            records = compare(folder, arguments.model.resolve(), layouts if number % 2 == 0 else layouts[::-1])
            table = next((record for record in records if record["kind"] == "comparison"), None)
            if table is None:
                print(f"{number + 1}: no two layouts with sound numbers", flush=True)
                continue
            found = {row["layout"]: row["figures"]["request_throughput"]["value"] for row in table["rows"]}
            for layout, rate in found.items():
                rates[layout].append(rate)
            seconds = fmean(run["duration"] for record in records for run in record.get("runs", ()))
            told = ", ".join(f"{layout} {rate:.1f}" for layout, rate in found.items())
            named = " or ".join(sorted(table["advice"]["winners"]["throughput"]))
            print(f"{number + 1}: {seconds:.2g} s a start, req/s: {told}; for throughput: {named}")
            print(f"   {table['advice']['reasons'][-1]}", flush=True)
    for layout, values in rates.items():
        if len(values) > 1:
            spread = stdev(map(math.log, values))
            print(f"{layout}: {len(values)} starts, spread between them {spread:.0%}")


if __name__ == "__main__":
    main()
