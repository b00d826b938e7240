"""Which part of the latency moved, and what else did: first a sentence, then a table, and never a claim of proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from pytest_gpulayout.attribution import explain
from pytest_gpulayout.baseline import BaselineSession, Reference
from pytest_gpulayout.judging import what_changed
from pytest_gpulayout.measurement import Identity, Measurement
from pytest_gpulayout.results import RecordedMeasurement
from pytest_gpulayout.verdict import MetricVerdict, Status
from tests.support.measurements import WORKLOAD, identity, measurement_of, run_of

SEEN = {
    "start_s": 40.0,
    "kv_cache_tokens": 1_048_576.0,
    "preemptions": 0.0,
    "client_ms": 0.1,
    "network_and_frontend_ms": 2.0,
    "queue_ms": 0.5,
    "prefill_ms": 20.0,
    "decode_per_token_ms": 9.8,
    "sm_clock_mhz": 1980.0,
    "power_w": 1200.0,
}
BEFORE = replace(
    identity(),
    sut={"vllm": "0.32.0", "torch": "2.13", "arguments": ""},
    covariates={"host": "node1", "transport": "P2P/CUMEM", "all_reduce": "CUSTOM, PYNCCL"},
    topology={"links": {"0-1": "NV18"}},
)


def metric(name: str = "median_tpot_ms", change: float = 2.071, status: Status = Status.REGRESSION) -> MetricVerdict:
    return MetricVerdict(name, status, 9.8, 30.1, change, (1.9, 2.2), 0.05, 0.04, 3, 9)


def measured(where: Identity, *starts: Mapping[str, float], factor: float = 1.0) -> Measurement:
    measurement = Measurement(where, WORKLOAD, ())
    for seen in starts:
        measurement = measurement.with_run(run_of(factor, factor), observed=seen)
    return measurement


def stored(*factors: float) -> tuple[BaselineSession, ...]:
    """A session of one start per factor on all numbers."""
    starts = [{name: value * factor for name, value in SEEN.items()} for factor in factors]
    return (measured(BEFORE, *starts).as_session("2026-11-20T08:00:00Z"),)


REFERENCE = Reference(stored(0.99, 1.0, 1.01) * 3)


def explained(
    now: Identity = BEFORE,
    *,
    metrics: tuple[MetricVerdict, ...] = (metric(),),
    reference: Reference = REFERENCE,
    seen: Mapping[str, float] | None = None,
) -> tuple[str, ...]:
    measurement = measured(now, *[{**SEEN, **(seen or {})}] * 3)
    return explain(metrics, reference, measurement, what_changed(reference.newest, now))


def elsewhere(**parts: Mapping[str, Any]) -> Identity:
    """The same place, but for some of its fields."""
    merged: dict[str, Any] = {name: {**getattr(BEFORE, name), **values} for name, values in parts.items()}
    return replace(BEFORE, **merged)


# -- what moved ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "sentence"),
    [
        (
            {"decode_per_token_ms": 30.1},
            "decode takes longer (9.80 -> 30.1 ms a token), client, network/front end, queue and prefill are as "
            "before",
        ),
        (
            {"prefill_ms": 31.0},
            "prefill takes longer (20.0 -> 31.0 ms), client, network/front end, queue and decode are as before",
        ),
        (
            {"queue_ms": 210.0},
            "requests wait longer in the queue (0.500 -> 210 ms), client, network/front end, prefill and decode are "
            "as before",
        ),
        (
            {"client_ms": 12.0},
            "the client takes longer to send (0.100 -> 12.0 ms), network/front end, queue, prefill and decode are as "
            "before",
        ),
        (
            {"network_and_frontend_ms": 6.0},
            "network and front end take longer (2.00 -> 6.00 ms), client, queue, prefill and decode are as before",
        ),
        (
            {"prefill_ms": 12.0, "queue_ms": 40.0},
            "requests wait longer in the queue (0.500 -> 40.0 ms) and prefill takes shorter (20.0 -> 12.0 ms), "
            "client, network/front end and decode are as before",
        ),
    ],
)
def test_the_part_that_moved_is_named_with_its_numbers(seen: dict[str, float], sentence: str) -> None:
    first, header, *_ = explained(seen=seen)
    assert first.startswith(f"median_tpot_ms rose by 207%: {sentence}; ")
    assert header.split() == ["beside", "the", "verdict", "baseline", "now", "change"]


def test_a_part_that_adds_next_to_nothing_is_no_matter_of_the_sentence() -> None:
    first, *table = explained(seen={"queue_ms": 0.7, "decode_per_token_ms": 30.1})
    assert "queue (" not in first
    assert "queue                  0.500 ms         0.700 ms         +40.0%" in table


def test_a_change_within_the_scatter_is_named_as_such() -> None:
    first, *table = explained(seen={"decode_per_token_ms": 10.1})
    assert (
        "no part of the latency moved by more than it scatters; most of all, decode takes longer "
        "(9.80 -> 10.1 ms a token); nothing else"
    ) in first
    assert "decode, per token      9.80 ms a token  10.1 ms a token  +3.1% as before" in table


def test_the_scatter_of_stored_starts_decides_what_moved() -> None:
    noisy = Reference(stored(0.7, 0.9, 1.0, 1.1, 1.3))
    assert "no part of the latency moved" in explained(reference=noisy, seen={"prefill_ms": 26.0})[0]
    assert "prefill takes longer" in explained(seen={"prefill_ms": 26.0})[0]


def test_one_odd_stored_start_hides_nothing() -> None:
    odd = Reference(stored(0.99, 1.0, 1.0, 1.01, 9.0))
    assert "prefill takes longer (20.0 -> 26.0 ms)" in explained(reference=odd, seen={"prefill_ms": 26.0})[0]


def test_several_metrics_are_told_in_one_sentence_the_worst_first() -> None:
    metrics = (
        metric("median_ttft_ms", 0.3),
        metric("p99_itl_ms", -0.2, Status.IMPROVEMENT),
        metric("request_throughput", -0.674),
        metric("output_throughput", -0.6, Status.INCONCLUSIVE),
        metric("median_tpot_ms", 0.05),
    )
    first, *_ = explained(metrics=metrics)
    assert first.startswith(
        "request_throughput fell by 67%, median_ttft_ms rose by 30%, median_tpot_ms rose by 5.0% and "
        "1 more metric moved: "
    )


def test_an_improvement_is_explained_too() -> None:
    metrics = (metric(change=-0.5, status=Status.IMPROVEMENT),)
    first, *_ = explained(elsewhere(sut={"vllm": "0.33.0"}), metrics=metrics, seen={"decode_per_token_ms": 4.9})
    assert first.startswith("median_tpot_ms fell by 50%: decode takes shorter (9.80 -> 4.90 ms a token), ")
    assert first.endswith("; along with it, vLLM changed from 0.32.0 to 0.33.0 since the baseline")


@pytest.mark.parametrize("status", [Status.PASS, Status.INCONCLUSIVE])
def test_where_nothing_is_known_to_have_moved_nothing_is_explained(status: Status) -> None:
    assert (
        explained(elsewhere(epoch={"driver": "580.2"}), metrics=(metric(status=status),), seen={"queue_ms": 9.0})
        == ()
    )


# -- what changed along with it --------------------------------------------------------------------------------------


def test_changes_are_told_along_with_it_the_most_telling_first() -> None:
    now = elsewhere(
        covariates={"transport": "SHM", "host": "node2"}, epoch={"driver": "580.2"}, sut={"torch": "2.14"}
    )
    first, *table = explained(now, seen={"decode_per_token_ms": 30.1})
    assert first.endswith(
        "along with it, the transport changed from P2P/CUMEM to SHM, torch from 2.13 to 2.14 and the driver from "
        "570.1 to 580.2 since the baseline (1 more change below)"
    )
    assert [line for line in table if line.startswith("changed")] == [
        "changed since the baseline: transport: P2P/CUMEM -> SHM",
        "changed since the baseline: torch: 2.13 -> 2.14",
        "changed since the baseline: driver: 570.1 -> 580.2",
        "changed since the baseline: host: node1 -> node2",
    ]
    assert "because" not in first


@pytest.mark.parametrize(
    ("seen", "told_first"),
    [
        ({"decode_per_token_ms": 30.1}, "the transport changed from P2P/CUMEM to SHM"),
        ({"prefill_ms": 90.0}, "the transport changed from P2P/CUMEM to SHM"),
        ({"queue_ms": 90.0}, "the KV cache changed from 1,048,576 tokens to 65,536 tokens"),
        ({"client_ms": 90.0}, "the client's scheduling changed from SCHED_FIFO to SCHED_OTHER"),
        ({"network_and_frontend_ms": 90.0}, "the client's scheduling changed from SCHED_FIFO to SCHED_OTHER"),
    ],
)
def test_what_can_act_on_the_part_that_moved_comes_first(seen: dict[str, float], told_first: str) -> None:
    reference = Reference(
        tuple(
            replace(session, covariates={**session.covariates, "client scheduling": "SCHED_FIFO"})
            for session in REFERENCE.sessions
        )
    )
    now = elsewhere(covariates={"transport": "SHM", "client scheduling": "SCHED_OTHER"})
    first, *_ = explained(now, reference=reference, seen={**seen, "kv_cache_tokens": 65_536.0})
    assert f"; along with it, {told_first}" in first


def test_a_clock_that_fell_is_a_change_and_power_is_only_shown() -> None:
    first, *table = explained(seen={"sm_clock_mhz": 1410.0, "power_w": 800.0, "decode_per_token_ms": 13.0})
    assert first.endswith("along with it, the SM clock changed from 1,980 MHz to 1,410 MHz since the baseline")
    assert "SM clock               1,980 MHz        1,410 MHz        -28.8%" in table
    assert "power                  1200 W           800 W            -33.3%" in table
    assert not [line for line in table if line.startswith("start-up")]


def test_another_wiring_is_a_change() -> None:
    now = replace(BEFORE, topology={"links": {"0-1": "NV12"}})
    assert explained(now)[0].endswith("the wiring changed (ranks 0-1 NV18 -> NV12) since the baseline")


def test_long_arguments_are_left_to_the_table() -> None:
    arguments = " ".join(["--max-num-seqs 1"] * 9)
    first, *table = explained(elsewhere(sut={"arguments": arguments}))
    assert first.endswith("the arguments changed (in full below) since the baseline")
    assert f"changed since the baseline: arguments:  -> {arguments}" in table


def test_nothing_else_changed() -> None:
    first, *table = explained(seen={"decode_per_token_ms": 30.1})
    assert first.endswith(
        "; nothing else that was recorded changed: same vLLM, driver, wiring, transport, clocks, KV-cache size and "
        "arguments"
    )
    assert len(table) == 6


def test_another_host_alone_leaves_all_that_matters_the_same() -> None:
    first, *_ = explained(elsewhere(covariates={"host": "node2"}), seen={"decode_per_token_ms": 30.1})
    assert first.endswith(
        "along with it, the host changed from node1 to node2 since the baseline; same vLLM, driver, wiring, "
        "transport, clocks, KV-cache size and arguments"
    )


# -- what is not known -----------------------------------------------------------------------------------------------


def test_a_baseline_without_observed_numbers_still_tells_first_token_from_decode() -> None:
    reference = Reference((measurement_of(1.0, 1.0).as_session("2026-11-20T08:00:00Z"),))
    now = measured(identity(), SEEN, factor=1.3)
    assert explain((metric(),), reference, now, ()) == (
        "median_tpot_ms rose by 207%: the first token takes longer (100 -> 130 ms) and decode takes longer "
        "(10.0 -> 13.0 ms a token); nothing else that was recorded changed: same vLLM and driver; not compared, "
        "since not recorded on both sides: wiring, transport, clocks, KV-cache size and arguments",
        "beside the verdict           baseline         now              change",
        "time to first token, median  100 ms           130 ms           +30.0%",
        "decode, per token, median    10.0 ms a token  13.0 ms a token  +30.0%",
    )


def test_a_field_that_one_side_does_not_know_is_no_change() -> None:
    now = elsewhere(covariates={"transport": None}, epoch={"driver": "580.2"})
    first, *table = explained(now)
    assert "transport" not in first
    assert table[-1] == "not compared, since not recorded on both sides: transport"
    assert "changed since the baseline: transport: P2P/CUMEM -> unknown" not in table


def test_one_rank_has_no_transport_and_a_cpu_no_driver_to_miss() -> None:
    one = identity(hardware={"platform": "cpu", "links": []})
    reference = Reference((measured(one, {}).as_session("2026-11-20T08:00:00Z"),))
    first, *_ = explain((metric(),), reference, measured(one, {}), ())
    assert first.endswith(
        "same vLLM; not compared, since not recorded on both sides: clocks, KV-cache size and arguments"
    )


def test_the_other_side_has_a_name_of_its_own() -> None:
    changed = ("vllm: 0.32.0 -> 0.33.0",)
    now = measured(elsewhere(sut={"vllm": "0.33.0"}), {**SEEN, "decode_per_token_ms": 30.1})
    first, header, *table = explain((metric(),), REFERENCE, now, changed, against="base")
    assert first.endswith("along with it, vLLM changed from 0.32.0 to 0.33.0 since the base")
    assert header.split() == ["beside", "the", "verdict", "base", "now", "change"]
    assert table[-1] == "changed since the base: vllm: 0.32.0 -> 0.33.0"


def test_a_measurement_that_is_read_back_is_explained_as_a_fresh_one() -> None:
    fresh = measured(elsewhere(covariates={"transport": "SHM"}), {**SEEN, "decode_per_token_ms": 30.1})
    runs = fresh.as_session("2026-11-21T08:00:00Z").runs
    read_back = RecordedMeasurement("t.py::test_a", fresh.identity, runs, ())
    changed = what_changed(REFERENCE.newest, fresh.identity)
    told = explain((metric(),), REFERENCE, fresh, changed)
    assert told == explain((metric(),), REFERENCE, read_back, changed)
    assert "the transport changed from P2P/CUMEM to SHM" in told[0]


def test_no_number_at_all_is_said() -> None:
    reference = Reference((replace(REFERENCE.newest, runs=()),))
    now = measured(BEFORE, {})
    assert (
        "which part of the latency moved was not recorded; nothing else"
        in explain((metric(),), reference, now, ())[0]
    )


def test_a_text_of_another_form_is_shown_as_it_is() -> None:
    first, *table = explain((metric(),), REFERENCE, measured(BEFORE, SEEN), ("another epoch",))
    assert "changed since the baseline: another epoch" in table
    assert "another epoch" not in first
