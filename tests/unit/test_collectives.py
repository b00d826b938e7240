"""Messages of a probe, what their times mean, and what becomes of a link that is slow."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from pytest_gpulayout import collectives, judging
from pytest_gpulayout.attribution import told_of_links, with_links
from pytest_gpulayout.baseline import Baseline
from pytest_gpulayout.baseline_text import baseline_from_text, baseline_to_text
from pytest_gpulayout.collectives import (
    CollectiveMeasurement,
    GroupTimes,
    ProbePlan,
    ProbeRun,
    bus_bandwidth_gb_per_s,
    no_probe_needed,
    plan_of_document,
    probe_groups,
    probe_tolerances,
    serving_tolerances,
    transports_text,
)
from pytest_gpulayout.errors import WorkloadError
from pytest_gpulayout.gated import documented_prior, gated_of
from pytest_gpulayout.judging import BaselineMode, GateInputs, GatePolicy, judge_performance
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.link_limits import LATENCY_US, judge_bandwidth, limit_between
from pytest_gpulayout.links import parse_link_class
from pytest_gpulayout.measurement import Identity
from pytest_gpulayout.metrics import COLLECTIVES, METRICS
from pytest_gpulayout.ports import ProbeSpec
from pytest_gpulayout.stats import NoisePrior
from pytest_gpulayout.testing import FakeCollectiveProbe, InMemoryBaselines
from pytest_gpulayout.tolerance import parse_tolerances
from pytest_gpulayout.topology import Device, NvLinks, PcieLink, Topology
from pytest_gpulayout.verdict import MetricVerdict, Status, Verdict
from pytest_gpulayout.workload import Workload
from tests.support.measurements import key

PLAN = ProbePlan(hidden_size=4096)
NOW = "2026-11-21T08:00:00Z"
MIB = 2**20


def identity(**covariates: str) -> Identity:
    workload = {"name": PLAN.name, "fingerprint": PLAN.fingerprint()}
    return Identity(key(model=PLAN.model_identity(), workload=workload), {"driver": "570.1"}, {}, covariates)


def spec(layout: str = "tp2") -> ProbeSpec:
    parsed = parse_layout(layout)
    devices = tuple(map(Device, range(parsed.gpus)))
    return ProbeSpec(parsed, probe_groups(parsed), devices, "cuda", "python", PLAN)


def measured(probe: FakeCollectiveProbe, layout: str = "tp2", starts: int = 1) -> CollectiveMeasurement:
    measurement = CollectiveMeasurement(identity(transport="P2P/CUMEM"), PLAN, ())
    for _ in range(starts):
        measurement = measurement.with_run(probe.run(spec(layout), lambda text: None))
    return measurement


# -- messages --------------------------------------------------------------------------------------------------------


def test_messages_are_those_of_decode_steps_and_of_a_prefill() -> None:
    """Hidden size 4096 in bfloat16: 8 KiB a token, 64 MiB for 8192 of them."""
    assert [(m.name, m.metric, m.size_bytes) for m in PLAN.messages()] == [
        ("batch1", "all_reduce_batch1_us", 8 * 1024),
        ("batch8", "all_reduce_batch8_us", 64 * 1024),
        ("batch64", "all_reduce_batch64_us", 512 * 1024),
        ("prefill", "all_reduce_prefill_gb_per_s", 64 * MIB),
    ]
    assert [m.size_bytes for m in replace(PLAN, dtype="float32").messages()][-1] == 128 * MIB
    assert {m.metric for m in PLAN.messages()} == set(COLLECTIVES) <= set(METRICS)


def test_fingerprint_is_of_the_messages_and_not_of_how_often_they_are_sent() -> None:
    same = (replace(PLAN, rounds=3), replace(PLAN, origin="a file"), replace(PLAN, timeout_s=9, least_share=0.1))
    assert {plan.fingerprint() for plan in same} == {PLAN.fingerprint()}
    others = (replace(PLAN, hidden_size=2048), replace(PLAN, dtype="float16"), replace(PLAN, decode_iterations=7))
    assert len({plan.fingerprint() for plan in (PLAN, *others)}) == 4


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ({"hidden_size": 0}, "hidden_size 0"),
        ({"rounds": -1, "timeout_s": 0}, "rounds -1, timeout_s 0"),
        ({"dtype": "fp8"}, "dtype 'fp8'"),
        ({"least_share": 1.5}, "least_share 1.5"),
    ],
)
def test_plan_that_cannot_be(parts: dict[str, Any], found: str) -> None:
    with pytest.raises(WorkloadError) as error:
        ProbePlan(**parts)
    assert f"\n  found: {found}\n  in a ProbePlan\n" in str(error.value)
    assert str(error.value).endswith("where the fixture gpu_probe_plan is overridden")


@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        ("tp1", ()),
        ("dp2", ()),
        ("tp1x2", ()),
        ("tp4", ((0, 1, 2, 3),)),
        ("tp2pp2", ((0, 1), (2, 3))),
        ("tp2x2", ((0, 1), (2, 3))),
        ("pp2", ((0, 1),)),
        ("dp2ep", ((0, 1),)),
    ],
)
def test_groups_are_the_ranks_that_add_up_together(layout: str, groups: tuple[tuple[int, ...], ...]) -> None:
    assert probe_groups(parse_layout(layout)) == groups


def test_layout_without_links_says_so() -> None:
    assert no_probe_needed(parse_layout("tp1")) == "tp1: no ranks talk to each other, so there is no link to probe"


# -- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size_bytes", "time_us", "ranks", "gb_per_s"),
    [
        (1_000_000_000, 1_000_000, 2, 1.0),  # 1 GB in 1 s: each of two ranks sends as much as the message has
        (1_000_000_000, 1_000_000, 4, 1.5),
        (1_000_000_000, 1_000_000, 8, 1.75),
        (64 * MIB, 181.375, 2, 370.0),
    ],
)
def test_bus_bandwidth_as_nccl_tests_computes_it(
    size_bytes: int, time_us: float, ranks: int, gb_per_s: float
) -> None:
    assert bus_bandwidth_gb_per_s(size_bytes, time_us, ranks) == pytest.approx(gb_per_s, rel=1e-4)


def test_a_round_is_as_slow_as_its_slowest_group() -> None:
    fast = {"batch1": 10.0, "batch8": 11.0, "batch64": 12.0, "prefill": 200.0}
    slow = {**fast, "batch8": 20.0, "prefill": 2000.0}
    run = ProbeRun((GroupTimes((0, 1), (fast, fast)), GroupTimes((2, 3), (fast, slow))), 1.0, "nccl 2.27.5")
    first, second = run.rounds(PLAN)
    assert first["all_reduce_batch8_us"] == 11.0
    assert second["all_reduce_batch8_us"] == 20.0
    assert second["all_reduce_prefill_gb_per_s"] == pytest.approx(first["all_reduce_prefill_gb_per_s"] / 10)


def test_fake_has_the_bandwidth_that_it_was_given() -> None:
    measurement = measured(FakeCollectiveProbe(latency_us=0.0, gb_per_s=370.0), "tp4")
    assert measurement.bandwidth_gb_per_s(0) == pytest.approx(370.0)
    assert measurement.samples("all_reduce_prefill_gb_per_s")[0].value == pytest.approx(370.0)
    assert measurement.samples("median_ttft_ms") == ()
    assert transports_text(measurement.runs) == "P2P/CUMEM"


def test_session_keeps_every_round() -> None:
    measurement = measured(FakeCollectiveProbe(noise=0.02), starts=2)
    session = measurement.as_session(NOW)
    assert [len(run.metrics["all_reduce_batch1_us"]) for run in session.runs] == [PLAN.rounds] * 2
    assert [run.batch_size for run in session.runs] == list(measurement.batch_sizes())
    baseline = Baseline(measurement.identity.key, (session,))
    assert baseline_from_text(baseline_to_text(baseline), "file.json") == baseline
    assert baseline.key.path.startswith("hidden-4096/tp2/")
    assert baseline.key.path.endswith("/collectives.json")


def test_a_row_without_time_is_no_measurement() -> None:
    row = {"batch1": 0.0, "batch8": 11.0, "batch64": 12.0, "prefill": 0.0}
    run = ProbeRun((GroupTimes((0, 1), (row,) * PLAN.rounds),), 1.0, "nccl")
    measurement = CollectiveMeasurement(identity(), PLAN, (run,))
    assert measurement.problems() == (
        "unfit-metrics: all_reduce_batch1_us must be a number above zero, found 0, 0, 0, 0, 0, 0, 0 (probe start 1)",
        "unfit-metrics: all_reduce_prefill_gb_per_s must be a number above zero, found 0, 0, 0, 0, 0, 0, 0 "
        "(probe start 1)",
    )
    assert CollectiveMeasurement(identity(), PLAN, ()).problems() == ("no start of the probe was measured",)


# -- judged like a server's numbers ----------------------------------------------------------------------------------

TOLERANCES = probe_tolerances(parse_tolerances(""))
CALM = NoisePrior(start_sd=0.004, session_sd=0.004)


def judge(
    store: InMemoryBaselines, probe: FakeCollectiveProbe, mode: BaselineMode = "check"
) -> tuple[Verdict, CollectiveMeasurement]:
    inputs = GateInputs(
        store,
        GatePolicy(mode, TOLERANCES, CALM, starts=3),
        lambda so_far: so_far.with_run(probe.run(spec(), lambda text: None)),
        lambda: NOW,
        lambda: 1.0,
        lambda line: None,
    )
    return judge_performance(measured(probe), inputs)


@pytest.fixture
def store() -> InMemoryBaselines:
    """With nine sessions of a link of 370 GB/s and 10 us."""
    baselines = InMemoryBaselines()
    probe = FakeCollectiveProbe(noise=0.002, seed=7)
    sessions = tuple(measured(probe, starts=3).as_session(f"2026-11-{day:02}T08:00:00Z") for day in range(1, 10))
    found = Baseline(identity().key, sessions)
    baselines.texts[found.key.path] = baseline_to_text(found)
    return baselines


def test_recording_tells_what_was_recorded() -> None:
    store = InMemoryBaselines()
    verdict, measurement = judge(store, FakeCollectiveProbe(), "new")
    assert (verdict.status, verdict.stored, len(measurement.runs)) == (Status.NO_BASELINE, "recorded", 3)
    assert verdict.reasons[0].startswith("recorded from 3 probe starts in memory/hidden-4096/tp2/")


def test_the_same_link_passes(store: InMemoryBaselines) -> None:
    verdict, _ = judge(store, FakeCollectiveProbe(noise=0.002))
    assert verdict.status is Status.PASS
    assert [metric.name for metric in verdict.metrics] == list(COLLECTIVES)


def test_a_link_with_half_the_bandwidth_is_a_regression_of_the_large_messages(store: InMemoryBaselines) -> None:
    verdict, _ = judge(store, FakeCollectiveProbe(noise=0.002, gb_per_s=185.0))
    assert verdict.status is Status.REGRESSION
    worse = [metric.name for metric in verdict.metrics if metric.status is Status.REGRESSION]
    assert worse == ["all_reduce_batch64_us", "all_reduce_prefill_gb_per_s"]
    assert verdict.cause[0].startswith("all_reduce_prefill_gb_per_s fell by ")
    assert "latency" not in verdict.cause[0]
    assert "KV-cache" not in " ".join(verdict.cause)


def test_another_transport_is_named_with_the_regression(store: InMemoryBaselines) -> None:
    probe = FakeCollectiveProbe(latency_us=60.0, gb_per_s=12.0)
    inputs: GateInputs[CollectiveMeasurement] = GateInputs(
        store,
        GatePolicy("check", TOLERANCES, CALM, starts=1),
        lambda so_far: replace(so_far, runs=(*so_far.runs, *measured(probe).runs)),
        lambda: NOW,
        lambda: 1.0,
        lambda line: None,
    )
    now = replace(measured(probe), identity=identity(transport="SHM/direct/direct"))
    verdict, _ = judge_performance(now, inputs)
    assert verdict.status is Status.REGRESSION
    assert "along with it, the transport changed from P2P/CUMEM to SHM/direct/direct" in verdict.cause[0]


def test_fewer_rounds_than_asked_for_are_no_measurement(store: InMemoryBaselines) -> None:
    full = measured(FakeCollectiveProbe())
    group = full.runs[0].groups[0]
    short = replace(full, runs=(replace(full.runs[0], groups=(replace(group, rounds=group.rounds[:2]),)),))
    policy = GatePolicy("check", TOLERANCES, CALM, 1)
    inputs: GateInputs[CollectiveMeasurement] = GateInputs(
        store, policy, lambda so_far: so_far, lambda: NOW, lambda: 1.0, lambda line: None
    )
    verdict, _ = judge_performance(short, inputs)
    assert verdict.status is Status.INVALID
    assert verdict.reasons[0].startswith("too-few-samples: 7 rounds were asked for, found 2 (probe start 1)")


def test_a_key_tells_what_is_gated_and_what_noise_is_assumed() -> None:
    named = parse_tolerances("all_reduce_batch1_us=30%")
    of_links, of_server = identity().key, key()
    assert gated_of(of_links, named) == probe_tolerances(named)
    assert gated_of(of_server, named) == serving_tolerances(named)
    assert documented_prior(of_links) == collectives.NOISE_PRIORS["cuda"]
    assert documented_prior(of_server) == judging.NOISE_PRIORS["cuda"]


def test_no_workload_has_the_name_of_the_probe() -> None:
    with pytest.raises(WorkloadError, match="rename the workload"):
        Workload(name=PLAN.name, input_tokens=1, output_tokens=1, requests=1, concurrency=1)


def test_the_plan_of_a_document_is_the_plan() -> None:
    plan = replace(PLAN, dtype="float32", rounds=3, decode_iterations=5, prefill_iterations=2)
    assert plan_of_document(plan.to_document()) == plan


def test_tolerances_of_servers_and_of_links_are_kept_apart() -> None:
    named = parse_tolerances("median_tpot_ms=3%,all_reduce_batch1_us=30%")
    assert set(serving_tolerances(named)) == {"request_throughput", "median_ttft_ms", "median_tpot_ms"}
    of_links = probe_tolerances(named)
    assert set(of_links) == set(COLLECTIVES)
    assert (of_links["all_reduce_batch1_us"].fraction, of_links["all_reduce_batch8_us"].fraction) == (0.30, 0.15)


# -- published limits ------------------------------------------------------------------------------------------------

NVLINK4 = (NvLinks(tuple(range(18)), active=True, remote="switch", version="4.0", speed_mbps=26562),)
GEN5 = PcieLink(generation=1, width=16, max_generation=5, max_width=16)


def machine(link: str | None, *devices: Device, platform: Any = "cuda") -> Topology:
    links = {} if link is None else dict.fromkeys(combinations(range(len(devices)), 2), parse_link_class(link))
    return Topology(devices, links, "described", recorded=False, platform=platform)


def h100(index: int) -> Device:
    return Device(index, name="NVIDIA H100", nvlinks=NVLINK4, pcie=GEN5)


PAIR = machine("NV18", h100(0), h100(1))
OF_PAIR = "NV18 between GPU 0 and GPU 1 (18 x NVLink 4.0 = 450 GB/s each way)"


@pytest.mark.parametrize(
    ("link", "device", "gb_per_s", "words"),
    [
        ("NV18", {"nvlinks": NVLINK4}, 450.0, "18 x NVLink 4.0"),
        ("NV4", {"nvlinks": (NvLinks((0, 1, 2, 3), active=True, version="3.0"),)}, 100.0, "4 x NVLink 3.0"),
        ("NV4", {"nvlinks": (NvLinks((0, 1), active=True, speed_mbps=14062),)}, 56.2, "4 x NVLink at 14062 MB/s"),
        ("PIX", {"pcie": PcieLink(1, 16, 4, 16)}, 31.5, "PCIe 4.0 x16"),
        ("SYS", {"pcie": PcieLink(5, 8, 5, 8)}, 31.5, "PCIe 5.0 x8"),
    ],
)
def test_limit_of_a_link(link: str, device: dict[str, Any], gb_per_s: float, words: str) -> None:
    limit = limit_between(machine(link, Device(0, **device), Device(1, **device)), 0, 1)
    assert limit is not None
    assert limit.gb_per_s == pytest.approx(gb_per_s, rel=0.002)
    assert limit.words == words


@pytest.mark.parametrize(
    ("link", "device", "platform"),
    [
        ("NV18", {}, "cuda"),
        ("NV18", {"nvlinks": (NvLinks((0,), active=True), *NVLINK4)}, "cuda"),
        ("PHB", {"pcie": PcieLink(4, 16)}, "cuda"),
        (None, {"nvlinks": NVLINK4}, "cuda"),
        ("XGMI", {"pcie": GEN5}, "rocm"),
        ("NODE", {"pcie": GEN5}, "cpu"),
    ],
)
def test_link_of_which_nothing_is_published(link: str | None, device: dict[str, Any], platform: str) -> None:
    assert limit_between(machine(link, Device(0, **device), Device(1, **device), platform=platform), 0, 1) is None


def test_the_slower_of_two_devices_decides() -> None:
    slow = Device(1, pcie=PcieLink(1, 4, 3, 4))
    limit = limit_between(machine("PHB", Device(0, pcie=GEN5), slow), 0, 1)
    assert limit is not None
    assert str(limit) == "PHB between GPU 0 and GPU 1 (PCIe 3.0 x4 = 3.94 GB/s each way)"


def test_least_bandwidth_leaves_time_beside_the_wire() -> None:
    """64 MiB between two H100: at half of 450 GB/s 298 us on the wire, and 100 us beside it."""
    limit = limit_between(machine("NV18", h100(0), h100(1)), 0, 1)
    assert limit is not None
    assert limit.wire_us(64 * MIB, 2) == pytest.approx(298.26, abs=0.01)
    assert limit.least_gb_per_s(64 * MIB, 2) == pytest.approx(64 * MIB / (298.26 + LATENCY_US) / 1e3, abs=0.01)


def test_link_that_is_fast_enough_is_told_and_no_finding() -> None:
    report = judge_bandwidth(measured(FakeCollectiveProbe(gb_per_s=370.0)), PAIR, (0, 1))
    assert report.findings == ()
    assert report.remarks == (
        f"ranks 0,1 reach 351 GB/s with messages of 64 MiB, at least 169 GB/s required of {OF_PAIR}",
    )


def test_nvlink_that_is_as_slow_as_pcie_is_named() -> None:
    report = judge_bandwidth(measured(FakeCollectiveProbe(gb_per_s=24.0)), PAIR, (0, 1))
    assert report.remarks == ()
    assert report.findings == (
        f"ranks 0,1 reach 23.9 GB/s with messages of 64 MiB, at least 169 GB/s required of {OF_PAIR}",
    )


def test_the_worst_link_of_a_group_counts_and_each_group_has_its_own() -> None:
    """Two pairs with a bridge each: tp2x2 stays on them, tp4 must leave them."""
    devices = tuple(map(h100, range(4)))
    links = dict.fromkeys(combinations(range(4), 2), parse_link_class("SYS"))
    links |= {(0, 1): parse_link_class("NV18"), (2, 3): parse_link_class("NV18")}
    bridged = Topology(devices, links, "described", recorded=False)
    probe = FakeCollectiveProbe(gb_per_s=28.0)
    assert len(judge_bandwidth(measured(probe, "tp2x2"), bridged, (0, 1, 2, 3)).findings) == 2
    of_four = judge_bandwidth(measured(probe, "tp4"), bridged, (0, 1, 2, 3))
    assert of_four.findings == ()
    assert "of SYS between GPU 0 and GPU 2 (PCIe 5.0 x16 = 63 GB/s each way)" in of_four.remarks[0]


def test_message_that_is_too_small_for_the_link_proves_nothing() -> None:
    plan = ProbePlan(hidden_size=256)
    run = FakeCollectiveProbe(gb_per_s=1.0).run(replace(spec(), plan=plan), lambda text: None)
    small = CollectiveMeasurement(identity(), plan, (run,))
    report = judge_bandwidth(small, machine("NV18", h100(0), h100(1)), (0, 1))
    assert report.findings == ()
    assert report.remarks[0].startswith("not held against the published limit: a message of 4 MiB is too small to ")


@pytest.mark.parametrize(
    ("topology", "told"),
    [
        (machine("NODE", Device(0), Device(1), platform="cpu"), "sockets on one host have none"),
        (machine("NV18", Device(0), Device(1)), "what NV18 between GPU 0 and GPU 1 carries is not known"),
        (machine(None, h100(0), h100(1)), "what an unknown link between GPU 0 and GPU 1 carries is not known"),
    ],
)
def test_why_a_link_is_not_held_against_a_limit(topology: Topology, told: str) -> None:
    report = judge_bandwidth(measured(FakeCollectiveProbe(gb_per_s=0.1)), topology, (0, 1))
    assert (report.findings, report.remarks) == ((), (f"not held against a published limit: {told}",))


def test_share_of_the_limit_can_be_chosen() -> None:
    measurement = measured(FakeCollectiveProbe(gb_per_s=24.0))
    topology = machine("NV18", h100(0), h100(1))
    lower = replace(measurement, plan=replace(PLAN, least_share=0.04))
    assert judge_bandwidth(lower, topology, (0, 1)).findings == ()
    off = replace(measurement, plan=replace(PLAN, least_share=0))
    assert judge_bandwidth(off, topology, (0, 1)).remarks == (
        "not held against a published limit: the plan says so (least_share 0)",
    )


# -- beside a server that got slower ---------------------------------------------------------------------------------


def metric(status: Status, change: float, name: str = "all_reduce_prefill_gb_per_s") -> MetricVerdict:
    return MetricVerdict(name, status, 370.0, 210.0, change, (change, change), 0.15, 0.05, 3, 9)


@pytest.mark.parametrize(
    ("verdict", "told"),
    [
        (
            Verdict(Status.REGRESSION, metrics=(metric(Status.REGRESSION, -0.43),)),
            "the link itself is slower, without a server: all_reduce_prefill_gb_per_s fell by 43%",
        ),
        (Verdict(Status.PASS, metrics=(metric(Status.PASS, 0.0),)), "the link itself is as fast as its baseline"),
        (
            Verdict(Status.IMPROVEMENT, metrics=(metric(Status.IMPROVEMENT, 0.5),)),
            "the link itself is not slower: all_reduce_prefill_gb_per_s rose by 50%",
        ),
        (
            Verdict(Status.INCONCLUSIVE, metrics=(metric(Status.INCONCLUSIVE, -0.08),)),
            "whether the link itself is slower is open: all_reduce_prefill_gb_per_s -8.0%",
        ),
        (
            Verdict(Status.NO_BASELINE, reasons=("no baseline of it is stored",)),
            "the link itself was probed and not judged: no baseline of it is stored",
        ),
    ],
)
def test_what_is_known_of_the_link_stands_beside_the_cause(verdict: Verdict, told: str) -> None:
    assert told_of_links(verdict) == told
    cause = ("median_tpot_ms rose by 200%: decode takes longer", "a row")
    assert with_links(cause, told) == (f"{cause[0]}; {told}", "a row")


def test_a_link_below_its_limit_is_told_first_and_nothing_is_told_where_nothing_is_known() -> None:
    passed = Verdict(Status.PASS, metrics=(metric(Status.PASS, 0.0),))
    assert told_of_links(passed, ("ranks 0,1 reach 24 GB/s",)) == "the link itself is slow: ranks 0,1 reach 24 GB/s"
    assert with_links(("sentence",), "") == ("sentence",)
    assert with_links((), "the link itself is slow") == ()
