"""vLLM's own code computes the same numbers from our requests, and its tools take our files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_gpulayout.vllm_result import vllm_result
from pytest_gpulayout.workload import Workload
from tests.support.traces import failed, request, run_of

pytestmark = [pytest.mark.real_vllm, pytest.mark.xdist_group("real vllm")]

WORKLOAD = Workload(
    name="mixed",
    input_tokens=10,
    output_tokens=40,
    rate=20.0,
    concurrency=64,
    requests=200,
    batches=1,
    goodput={"ttft": 300, "tpot": 30, "e2el": 1200},
)

VLLM_SAYS = """
import json, sys
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
from vllm.benchmarks.plot import construct_timeline_data
from vllm.benchmarks.serve import calculate_metrics
from vllm.benchmarks.sweep.plot import _convert_inf_nan_strings, _get_group
from vllm.benchmarks.sweep.plot_pareto import _prepare_records
from vllm.benchmarks.sweep.serve_workload import _estimate_workload_value

with open(sys.argv[1]) as file:
    ours = json.load(file)
names = dict(ttft="ttfts", itl="itls", latency="latencies", output_tokens="output_lens", prompt_len="input_lens",
             start_time="start_times", error="errors")
rows = [{name: ours[key][i] for name, key in names.items()} for i in range(ours["num_prompts"])]
outputs = [RequestFuncOutput(success=not row["error"], **row) for row in rows]
limits = {"ttft": 300.0, "tpot": 30.0, "e2el": 1200.0}
metrics, output_lens = calculate_metrics([], outputs, ours["duration"], None, [50, 90, 95, 99], limits)
said = {"completed": metrics.completed, "failed": metrics.failed, "total_input_tokens": metrics.total_input,
        "total_output_tokens": metrics.total_output}
for name in ("request_throughput", "request_goodput", "output_throughput", "total_token_throughput",
             "max_output_tokens_per_s", "max_concurrent_requests", "rtfx"):
    said[name] = getattr(metrics, name)
for word in ("ttft", "tpot", "itl", "e2el"):
    for statistic in ("mean", "median", "std"):
        said[f"{statistic}_{word}_ms"] = getattr(metrics, f"{statistic}_{word}_ms")
    for percentile, value in getattr(metrics, f"percentiles_{word}_ms"):
        said[f"p{percentile}_{word}_ms"] = value
read = {
    "output_lens": output_lens,
    "pareto": len(_prepare_records([ours], user_count_var="max_concurrency", gpu_count_var=None)[0]),
    "group": _get_group(_convert_inf_nan_strings([ours])[0], ["request_rate", "max_concurrency"]),
    "load": _estimate_workload_value(ours, "max_concurrency"),
    "segments": len(construct_timeline_data(rows, [0.025, 0.05], ["a", "b", "c"])),
}
print("\\n" + json.dumps({"said": said, "read": read}, default=float))
"""


def test_vllm_computes_our_numbers_and_reads_our_file(tmp_path: Path) -> None:
    rng = random.Random(5)
    requests = []
    for index in range(WORKLOAD.requests):
        instants = [1000 + rng.randint(0, 9000)]
        tokens = rng.randint(1, WORKLOAD.output_tokens)
        instants += [rng.randint(1, 60) + (270 if number == 0 else 0) for number in range(tokens)]
        chunks = [sum(instants[: number + 2]) for number in range(tokens)]
        requests.append(request(index, instants[0], *chunks, output_tokens=tokens))
    requests[7] = failed(7)
    ours = vllm_result(run_of(tuple(requests), batch_ms=12_000), WORKLOAD, model="m")
    path = tmp_path / "ours.json"
    path.write_text(json.dumps(ours), encoding="utf-8")

    process = subprocess.run(
        [sys.executable, "-c", VLLM_SAYS, str(path)], capture_output=True, text=True, timeout=300, check=False
    )

    assert process.returncode == 0, process.stderr
    answer = json.loads(process.stdout.splitlines()[-1])
    # vLLM adds up gaps as floats, so a chunk at the very edge of a second may fall into the other one.
    assert ours["max_output_tokens_per_s"] == pytest.approx(answer["said"].pop("max_output_tokens_per_s"), rel=0.01)
    assert {name: ours[name] for name in answer["said"]} == pytest.approx(answer["said"], rel=1e-9)
    assert 0 < ours["request_goodput"] < ours["request_throughput"]
    assert answer["read"]["output_lens"] == ours["output_lens"]
    assert answer["read"]["pareto"] == 1
    assert answer["read"]["group"] == [["request_rate", "20.0"], ["max_concurrency", "64"]]
    assert answer["read"]["load"] == pytest.approx(ours["request_throughput"] * ours["mean_e2el_ms"] / 1000)
    assert answer["read"]["segments"] == 200 + sum(map(len, ours["itls"]))
