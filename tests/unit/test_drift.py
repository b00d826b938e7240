from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pytest_gpulayout.baseline import Baseline
from pytest_gpulayout.baseline_text import baseline_from_text, baseline_to_text
from pytest_gpulayout.drift import describe_drift, wiring_document
from pytest_gpulayout.errors import BaselineNotFound
from pytest_gpulayout.gate import PlacedLayout, place_layout
from pytest_gpulayout.judging import GateInputs, GatePolicy, judge_performance
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_link_class, parse_requirement
from pytest_gpulayout.measurement import Measurement
from pytest_gpulayout.report import verdict_lines
from pytest_gpulayout.stats import NoisePrior
from pytest_gpulayout.testing import InMemoryBaselines
from pytest_gpulayout.tolerance import parse_tolerances
from pytest_gpulayout.topology import Device, NvLinks, PcieLink, Topology
from pytest_gpulayout.verdict import Status, Verdict
from tests.support.measurements import baseline_of, measurement_of

WIRING = {
    "links": {"0-1": "NV12"},
    "numa_node": {"0": "0", "1": "0"},
    "pcie": {"0": "x16 gen4", "1": "x16 gen4"},
    "nvlinks": {"0": "12 up at 25000 MB/s", "1": "12 up at 25000 MB/s"},
}


def a100(index: int) -> Device:
    return Device(
        index=index,
        numa_node=0,
        pcie=PcieLink(generation=1, width=16, max_generation=4, max_width=16),
        nvlinks=(NvLinks(tuple(range(12)), active=True, remote="switch", speed_mbps=25000),),
    )


def placed(*devices: Device, link: str | None = "NV12") -> PlacedLayout:
    links = {} if link is None else {(0, 1): parse_link_class(link)}
    topology = Topology(devices or (a100(0), a100(1)), links, "NVML", recorded=False)
    return place_layout(topology, parse_layout("tp2"), None, parse_requirement("any"))


def test_what_is_stored() -> None:
    assert wiring_document(placed()) == WIRING


def test_what_is_not_known_is_left_out() -> None:
    assert wiring_document(placed(Device(index=0), Device(index=1), link=None)) == {}


def test_an_idle_gpu_that_lowered_its_pcie_generation_is_no_drift() -> None:
    busy = replace(a100(0), pcie=PcieLink(generation=4, width=16, max_generation=4, max_width=16))
    assert describe_drift(WIRING, wiring_document(placed(busy, a100(1)))) == ""


CHANGES: list[tuple[Callable[[], PlacedLayout], str]] = [
    (lambda: placed(), ""),
    (lambda: placed(link="NV10"), "ranks 0-1 NV12 -> NV10"),
    (lambda: placed(link="PHB"), "ranks 0-1 NV12 -> PHB"),
    (lambda: placed(a100(0), replace(a100(1), numa_node=1)), "rank 1 NUMA node 0 -> 1"),
    (lambda: placed(a100(0), replace(a100(1), numa_node=None)), ""),
    (
        lambda: placed(replace(a100(0), pcie=PcieLink(width=8, max_generation=4)), a100(1)),
        "rank 0 PCIe x16 gen4 -> x8 gen4",
    ),
    (
        lambda: placed(
            replace(
                a100(0),
                nvlinks=(
                    NvLinks((0, 1), active=False),
                    NvLinks(tuple(range(2, 11)), active=True, speed_mbps=25000),
                    NvLinks((11,), active=True, speed_mbps=12500),
                ),
            ),
            a100(1),
            link="NV10",
        ),
        "ranks 0-1 NV12 -> NV10; rank 0 NVLinks 12 up at 25000 MB/s -> 9 up at 25000 MB/s and 1 up at 12500 MB/s",
    ),
]


@pytest.mark.parametrize(("now", "changes"), CHANGES)
def test_drift_is_one_line(now: Callable[[], PlacedLayout], changes: str) -> None:
    line = describe_drift(WIRING, wiring_document(now()))
    assert line == (f"wiring differs from the baseline's: {changes}" if changes else "")


def test_nothing_stored_is_no_drift() -> None:
    assert describe_drift({}, WIRING) == ""
    assert describe_drift(WIRING, {}) == ""


def on(measurement: Measurement, **wiring: dict[str, str]) -> Measurement:
    """The measurement on this wiring."""
    return replace(measurement, identity=replace(measurement.identity, topology=WIRING | wiring))


def stored(baseline: Baseline) -> Baseline:
    return replace(baseline, sessions=tuple(replace(session, topology=WIRING) for session in baseline.sessions))


def judge(measurement: Measurement, store: InMemoryBaselines, mode: str = "check") -> Verdict:
    tolerances = parse_tolerances("median_tpot_ms=15%,median_ttft_ms=15%,request_throughput=15%")
    policy = GatePolicy(mode, tolerances, NoisePrior(0.01, 0.01), starts=1)  # type: ignore[arg-type]
    said: list[str] = []
    inputs: GateInputs[Measurement] = GateInputs(
        store, policy, lambda m: m, lambda: "2026-11-21T08:00:00Z", lambda: 1.0, said.append
    )
    return judge_performance(measurement, inputs)[0]


SOCKETS = {"numa_node": {"0": "0", "1": "1"}}


def test_a_baseline_keeps_its_wiring() -> None:
    baseline = stored(baseline_of([1.0]))
    assert baseline_from_text(baseline_to_text(baseline), "path").sessions[0].topology == WIRING


def test_another_socket_is_told_before_any_number() -> None:
    baseline = stored(baseline_of([1.0, 1.0], [1.0], [1.0]))
    verdict = judge(
        on(measurement_of(1.0), **SOCKETS), InMemoryBaselines({baseline.key.path: baseline_to_text(baseline)})
    )
    assert verdict.status is Status.PASS
    assert verdict.drift == "wiring differs from the baseline's: rank 1 NUMA node 0 -> 1"
    assert verdict_lines(verdict, "layout tp2", "pytest ...")[0] == verdict.drift


def test_other_links_have_no_baseline_and_the_drift_is_the_first_line() -> None:
    baseline = stored(baseline_of([1.0]))
    store = InMemoryBaselines({baseline.key.path: baseline_to_text(baseline)})
    measurement = on(measurement_of(1.0, hardware={"links": ["NV10"]}), links={"0-1": "NV10"})
    with pytest.raises(BaselineNotFound) as error:
        judge(measurement, store)
    assert str(error.value).splitlines()[0] == "wiring differs from the baseline's: ranks 0-1 NV12 -> NV10"
    assert judge(measurement, store, "new").drift == "wiring differs from the baseline's: ranks 0-1 NV12 -> NV10"


def test_other_hardware_is_not_called_drift() -> None:
    baseline = stored(baseline_of([1.0]))
    store = InMemoryBaselines({baseline.key.path: baseline_to_text(baseline)})
    measurement = on(measurement_of(1.0, hardware={"device": "NVIDIA H100"}), links={"0-1": "NV10"})
    assert judge(measurement, store, "new").drift == ""
