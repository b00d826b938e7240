from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pytest_gpulayout.gate import PlacedLayout, place_layout
from pytest_gpulayout.judging import NOISE_PRIORS, GatePolicy, judge_once
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_requirement
from pytest_gpulayout.nccl_log import parse_nccl_log
from pytest_gpulayout.report import (
    devices_text,
    link_failure,
    metric_lines,
    performance_record,
    plural,
    quantity,
    results_document,
    source_text,
    summary_lines,
    topology_record,
    transport_failure,
    transport_record,
    verdict_lines,
    worst_link_text,
)
from pytest_gpulayout.schemas import validate
from pytest_gpulayout.testing import FakeTopologySource
from pytest_gpulayout.tolerance import parse_tolerances
from pytest_gpulayout.transport import AllowedTransports, forbidden, parse_allowed
from pytest_gpulayout.transport_nccl import judge_nccl
from pytest_gpulayout.verdict import Look, MetricVerdict, Status, Verdict
from tests.support.measurements import baseline_of, measurement_of

WHERE = "layout tp2 on 2 x NVIDIA H200 (GPU 0, 1), model org/tiny, workload small"
UPDATE = "pytest --gpu-layout=tp2 --gpu-baseline=update 'tests/test_a.py::test_speed'"

TPOT = MetricVerdict(
    name="median_tpot_ms",
    status=Status.REGRESSION,
    baseline=9.8,
    current=11.9,
    change=0.2143,
    ci=(0.1, 0.3312),
    tolerance=0.05,
    min_detectable=0.045,
    n_current=3,
    n_baseline=9,
)
RATE = replace(
    TPOT,
    name="request_throughput",
    status=Status.PASS,
    baseline=100.0,
    current=99.0,
    change=-0.01,
    ci=(-0.03, 0.01),
    tolerance=0.025,
    n_current=1,
)


def placed(layout: str = "tp2", requirement: str = "nvlink", **source: Any) -> PlacedLayout:
    topology = FakeTopologySource(**source).probe()
    return place_layout(topology, parse_layout(layout), None, parse_requirement(requirement))


def recorded(place: PlacedLayout) -> PlacedLayout:
    return replace(place, topology=replace(place.topology, recorded=True, source="topo.txt"))


# -- failures: what was required, what was found, where, what to type next -------------------------------------------


def test_link_failure() -> None:
    place = recorded(placed("tp4", gpus=4, links={(0, 1): "SYS", (2, 3): None}))
    assert link_failure(place) == (
        "links of class nvlink or better are required between GPUs that communicate\n"
        "  rank 0 - rank 1: SYS (GPU 0 - GPU 1)\n"
        "  rank 2 - rank 3: unknown (GPU 2 - GPU 3)\n"
        "  layout tp4 on 4 x NVIDIA H200 (GPU 0, 1, 2, 3), topology from recorded in topo.txt\n"
        "  no choice among the 4 GPUs of this machine was found that satisfies it\n"
        "  look at the wiring: gpulayout topo; accept it: --gpu-link=any"
    )


def test_transport_failure_over_sockets() -> None:
    head = "node1:{0}:{0} [0] NCCL INFO Channel 00/0 : {1}[{1}] -> {2}[{2}] [send] via NET/Socket/0"
    report = judge_nccl(parse_nccl_log([head.format(10, 0, 1), head.format(11, 1, 0)], "n.log"), parse_layout("tp2"))
    lines = transport_failure("tp2", report, forbidden(report, AllowedTransports()), AllowedTransports()).split("\n")
    assert lines[0] == (
        "transports allowed between ranks: all but NET/Socket and CPU/GLOO; every communicating pair must show one"
    )
    assert lines[1] == "  found: ranks 0 -> 1: transport NET/Socket/0, allowed: all but NET/Socket and CPU/GLOO"
    assert f"    n.log:1: {head.format(10, 0, 1)}" in lines
    assert lines[-2:] == [
        "  layout tp2",
        "  allow it: --gpu-transport=LIST; see more: NCCL_DEBUG=INFO, and /dev/shm of the container",
    ]


def test_transport_failure_without_evidence() -> None:
    report = judge_nccl(parse_nccl_log([], "n.log"), parse_layout("tp2"))
    lines = transport_failure("tp2", report, (), parse_allowed("p2p")).split("\n")
    assert lines[:2] == [
        "transports allowed between ranks: P2P; every communicating pair must show one",
        "  found: no-evidence, no evidence",
    ]
    assert lines[2:4] == ["  no line of NCCL", "    n.log"]


def test_regression() -> None:
    verdict = Verdict(
        Status.REGRESSION,
        metrics=(RATE, TPOT),
        changed=("driver: 570.1 -> 580.2",),
        provisional="1 stored session; the spread rests partly on the documented prior",
        baseline_path="gpu-baselines/tiny/tp2/smoke.json",
    )
    assert verdict_lines(verdict, WHERE, UPDATE) == [
        "regression: median_tpot_ms 11.9 ms, allowed <= 10.3 ms (baseline 9.80 ms + 5%)",
        "    change +21.4%, interval +10.0% to +33.1%, n = 3 starts against 9, "
        "smallest change that could be seen 4.5%",
        "pass: request_throughput 99.0 req/s, allowed >= 97.5 req/s (baseline 100 req/s - 2.5%)",
        "    change -1.0%, interval -3.0% to +1.0%, n = 1 start against 9, smallest change that could be seen 4.5%",
        "  changed since the baseline: driver: 570.1 -> 580.2",
        "  provisional: 1 stored session; the spread rests partly on the documented prior",
        f"  {WHERE}",
        "  gpu-baselines/tiny/tp2/smoke.json",
        f"  accept it: {UPDATE}",
    ]


def test_the_sentence_comes_first_and_the_table_after_the_numbers_with_each_change_once() -> None:
    verdict = Verdict(
        Status.REGRESSION,
        reasons=("a waiver ended on 2026-11-20 (new kernel): judged against the level before it",),
        metrics=(TPOT,),
        changed=("driver: 570.1 -> 580.2",),
        cause=(
            "median_tpot_ms rose by 21%: decode takes longer",
            "a table",
            "changed since the baseline: driver ...",
        ),
        drift="wiring differs from the baseline's: ranks 0-1 NV18 -> NV12",
    )
    lines = verdict_lines(verdict, WHERE, UPDATE)
    assert lines[:2] == [verdict.drift, "regression: median_tpot_ms rose by 21%: decode takes longer"]
    assert lines[2].startswith("regression: median_tpot_ms 11.9 ms, allowed")
    assert lines[4:7] == [f"  {verdict.reasons[0]}", "  a table", "  changed since the baseline: driver ..."]
    assert lines[7] == f"  {WHERE}"


def test_inconclusive_gives_its_reasons_first() -> None:
    unclear = replace(TPOT, status=Status.INCONCLUSIVE)
    verdict = Verdict(Status.INCONCLUSIVE, ("too noisy",), metrics=(RATE, unclear), baseline_path="b.json")
    lines = verdict_lines(verdict, WHERE, UPDATE)
    assert lines[0] == "inconclusive: too noisy"
    assert lines[1].startswith("inconclusive: median_tpot_ms")
    assert lines[3].startswith("pass: request_throughput")


def test_an_improvement_beside_what_is_inconclusive_is_called_so() -> None:
    unclear, better = replace(TPOT, status=Status.INCONCLUSIVE), replace(RATE, status=Status.IMPROVEMENT)
    verdict = Verdict(Status.INCONCLUSIVE, ("too noisy",), metrics=(better, unclear), cause=("it rose", "a table"))
    lines = verdict_lines(verdict, WHERE, UPDATE)
    assert lines[:2] == ["inconclusive: too noisy", "improvement: it rose"]
    assert "  a table" in lines


def test_invalid() -> None:
    verdict = Verdict(Status.INVALID, ("1 of 4 requests failed",), baseline_path="b.json")
    assert verdict_lines(verdict, WHERE, UPDATE) == [
        "invalid: 1 of 4 requests failed",
        f"  {WHERE}",
        "  b.json",
        "  nothing was judged or stored: mend the cause and run again",
    ]


def test_not_judged_has_no_place_and_nothing_to_accept() -> None:
    verdict = Verdict(Status.NO_BASELINE, ("not judged: --gpu-baseline=off",))
    assert verdict_lines(verdict, WHERE, UPDATE) == [
        "no-baseline: not judged: --gpu-baseline=off",
        f"  {WHERE}",
    ]


def test_metric_lines_are_one_headline_and_one_line_of_evidence() -> None:
    assert len(metric_lines(TPOT)) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1234 ms"),
        (99.96, "100.0 ms"),
        (45.67, "45.7 ms"),
        (1.0, "1.00 ms"),
        (0.5, "0.500 ms"),
        (0.01234, "0.0123 ms"),
        (0.00000123, "0.00000123 ms"),
        (0.0, "0 ms"),
    ],
)
def test_quantity(value: float, text: str) -> None:
    assert quantity(value, "ms") == text


def test_plural() -> None:
    assert (plural(1, "start"), plural(2, "start"), plural(0, "start")) == ("1 start", "2 starts", "0 starts")


# -- places ----------------------------------------------------------------------------------------------------------


def test_devices_of_the_cpu_platform_are_the_cores_of_each_rank() -> None:
    assert devices_text(placed(gpus=2, platform="cpu")) == "rank 0 on core 0; rank 1 on core 1"


@pytest.mark.parametrize(
    ("layout", "source", "worst"),
    [
        ("tp1", {}, "none needed"),
        ("tp2", {}, "NV18"),
        ("tp2", {"gpus": 2, "link": None}, "unknown"),
        ("tp4", {"gpus": 4, "links": {(0, 3): "PHB"}}, "PHB"),
    ],
)
def test_worst_link(layout: str, source: dict[str, Any], worst: str) -> None:
    assert worst_link_text(placed(layout, **source)) == worst


def test_a_recorded_topology_is_called_so() -> None:
    assert source_text(placed()) == "fake"
    assert source_text(recorded(placed())) == "recorded in topo.txt"


# -- records and the summary -----------------------------------------------------------------------------------------


def performance(factor: float, **changes: Any) -> dict[str, Any]:
    measurement = measurement_of(factor, factor)
    policy = GatePolicy("check", parse_tolerances(""), NOISE_PRIORS["cuda"], starts=3)
    verdict = judge_once(measurement, baseline_of([1.0] * 3), policy, Look(1, 1), place="b.json")
    return performance_record(replace(verdict, **changes), measurement)


def document(*records: dict[str, Any]) -> dict[str, Any]:
    tests = [("t.py::test_a", record) for record in records]
    return results_document(tests, created="2026-11-21T08:00:00Z", platform="cuda", version="0.1.0")


def test_records_follow_the_schema_and_survive_json() -> None:
    report = judge_nccl(parse_nccl_log([], "n.log"), parse_layout("tp2"))
    invalid = performance_record(Verdict(Status.INVALID, ("no",)), measurement_of(1.0))
    records = [topology_record(placed()), transport_record("tp2", report, ()), performance(1.5), invalid]
    written = document(*records)
    assert validate(json.loads(json.dumps(written)), "results") == []
    assert [record["test"] for record in written["records"]] == ["t.py::test_a"] * 4
    assert [record.get("ok") for record in written["records"]] == [True, False, None, None]


def test_a_performance_record_holds_identity_and_vllm_s_own_results() -> None:
    record = performance(1.5)
    assert record["identity"]["key"]["hardware"]["links"] == ["NV18"]
    assert [run["num_prompts"] for run in record["runs"]] == [2, 2]
    assert [metric["verdict"] for metric in record["metrics"]] == ["regression"] * 3
    assert {"name", "verdict", "change", "ci", "tolerance", "min_detectable"} <= set(record["metrics"][0])


def test_the_topology_record_says_what_is_violated() -> None:
    record = topology_record(placed(gpus=2, link=None))
    assert (record["ok"], record["worst"], record["required"]) == (False, "unknown", "nvlink")
    assert record["links"] == [{"a": 0, "b": 1, "class": None}]


def test_summary() -> None:
    records = [
        ("t.py::test_a", topology_record(recorded(placed(gpus=2, link="SYS")))),
        ("t.py::test_a", performance(1.5, changed=("driver: 570.1 -> 580.2",))),
    ]
    lines = summary_lines(records)
    assert lines[:4] == [
        "tp2: worst link SYS (recorded in topo.txt) FAILED",
        "  small: regression, 2 server starts  [t.py::test_a]",
        "    request_throughput fell by 33%, median_ttft_ms rose by 50% and median_tpot_ms rose by 50%: the first "
        "token takes longer (100 -> 150 ms) and decode takes longer (10.0 -> 15.0 ms a token); nothing else that was "
        "recorded changed: same vLLM and driver; not compared, since not recorded on both sides: wiring, "
        "transport, clocks, KV-cache size and arguments",
        "    metric                    value    baseline  change  verdict",
    ]
    assert "    median_ttft_ms           150 ms      100 ms  +50.0%  regression" in lines
    assert "    p99_tpot_ms             15.0 ms     10.0 ms  +50.0%  not gated" in lines
    assert lines[-1] == "    decode, per token, median    10.0 ms a token  15.0 ms a token  +50.0%"


def test_summary_of_results_without_a_cause() -> None:
    record = performance(1.0, changed=("driver: 570.1 -> 580.2",), reasons=())
    assert record["cause"] == []
    for written in (record, {name: value for name, value in record.items() if name != "cause"}):
        lines = summary_lines([("t", written)])
        assert lines[2].split() == ["metric", "value", "baseline", "change", "verdict"]
        assert lines[-1] == "    changed since the baseline: driver: 570.1 -> 580.2"


def test_summary_of_a_recording() -> None:
    measurement = measurement_of(1.0)
    verdict = Verdict(Status.NO_BASELINE, ("recorded from 1 server start in b.json",), stored="recorded")
    lines = summary_lines([("t", {**performance_record(verdict, measurement), "layout": "tp2"})])
    assert lines[1] == "  small: recorded, 1 server start  [t]"
    assert lines[-1] == "    recorded from 1 server start in b.json"
