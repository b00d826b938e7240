"""Layouts side by side: what is derived, which records belong together, and the published figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from pytest_gpulayout.advice import advise
from pytest_gpulayout.judging import NOISE_PRIORS
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.layout_table import (
    FIGURES,
    LayoutRow,
    LayoutTable,
    compare_layouts,
    figure_text,
    interval,
    starts_text,
    table_document,
    table_lines,
    table_notes,
)
from pytest_gpulayout.measurement import Measurement
from pytest_gpulayout.relative import number_of
from pytest_gpulayout.report import Record, performance_record, results_document
from pytest_gpulayout.schemas import validate
from pytest_gpulayout.stats import Effect
from pytest_gpulayout.telemetry import DeviceTelemetry, Telemetry
from pytest_gpulayout.trace import Observations
from pytest_gpulayout.verdict import Status, Verdict
from pytest_gpulayout.workload import BUILTIN_WORKLOADS
from tests.support.measurements import WORKLOAD, measurement_of, run_of

HOURS_PER_MONTH = 30 * 24


def row(layout: str, *, se: float = 0.01, starts: int = 3, units: int | None = None, **figures: float) -> LayoutRow:
    parsed = parse_layout(layout)
    return LayoutRow(
        layout=parsed,
        units=units or parsed.gpus,
        starts=starts,
        requests=100,
        levels={name: Effect(math.log(value), se, 6) for name, value in figures.items()},
    )


def table_of(*rows: LayoutRow, workload: str = "structured-100", **parts: Any) -> LayoutTable:
    standard = LayoutTable(
        model={"name": "org/model"},
        workload=BUILTIN_WORKLOADS[workload].to_document(),
        platform="cuda",
        rows=rows,
    )
    return replace(standard, **parts)


def value(table: LayoutTable, layout: str, name: str) -> float:
    (found,) = (one for one in table.rows if one.name == layout)
    level = table.figure(found, name)
    assert level is not None
    return number_of(level.size)


# -- the published cases ---------------------------------------------------------------------------------------------

H200 = (
    row("tp1", median_ttft_ms=450, median_tpot_ms=22, request_throughput=12.4),
    row("tp4", median_ttft_ms=1250, median_tpot_ms=68, request_throughput=8.1),
    row("tp1x4", median_ttft_ms=450, median_tpot_ms=22, request_throughput=49.6),
)


def test_published_cost_of_four_h200_over_pcie() -> None:
    """10,000 USD a month for four: 0.476 USD for 1000 requests. The article's own formula gives that as 0.047."""
    table = table_of(*H200, hour_cost_usd=10_000 / HOURS_PER_MONTH / 4)

    assert value(table, "tp4", "usd_per_1000_requests") == pytest.approx(10_000 / (8.1 * 86_400 * 30) * 1000)
    assert value(table, "tp4", "usd_per_1000_requests") == pytest.approx(0.4763, abs=5e-5)


def test_published_cost_of_four_replicas() -> None:
    """10,488 USD a month for four of one GPU: 0.0816 USD, where the article has 0.008; its factor of 6 is right."""
    replicas = table_of(*H200, hour_cost_usd=2_622 / HOURS_PER_MONTH)
    sharded = table_of(*H200, hour_cost_usd=10_000 / HOURS_PER_MONTH / 4)

    assert value(replicas, "tp1x4", "usd_per_1000_requests") == pytest.approx(0.0816, abs=5e-5)
    factor = value(sharded, "tp4", "usd_per_1000_requests") / value(replicas, "tp1x4", "usd_per_1000_requests")
    assert factor == pytest.approx(5.84, abs=0.005)
    at_one_price = value(sharded, "tp4", "usd_per_1000_requests") / value(sharded, "tp1x4", "usd_per_1000_requests")
    assert at_one_price == pytest.approx(49.6 / 8.1)


def test_published_scaling_of_four_h200_over_pcie() -> None:
    table = table_of(*H200)

    assert value(table, "tp4", "scaling_efficiency") == pytest.approx(8.1 / 4 / 12.4)
    assert value(table, "tp4", "scaling_efficiency") == pytest.approx(0.163, abs=5e-4)
    assert value(table, "tp1x4", "scaling_efficiency") == pytest.approx(1)
    assert value(table, "tp4", "request_throughput_per_gpu") == pytest.approx(2.025)


def test_published_latency_of_four_h200_is_hardly_work() -> None:
    """Of 68 ms a token, the 22 ms of one GPU split over four would be 5.5."""
    table = table_of(*H200)

    assert table.work_per_token_ms(table.rows[1]) == pytest.approx((68, 5.5))
    assert table.work_per_token_ms(table.rows[0]) is None
    assert table.work_per_token_ms(table.rows[2]) is None


RTX_4090 = {
    "DeepSeek-R1-Distill-Qwen-7B": ((6.21, 3344.91), (8.55, 4623.98), 0.688),
    "DeepSeek-R1-Distill-Llama-8B": ((4.14, 2285.44), (6.10, 3349.59), 0.737),
}


@pytest.mark.parametrize("model", RTX_4090)
def test_published_one_and_two_rtx_4090(model: str) -> None:
    """409 USD a month for one, 729 for two: twice the GPUs serve more, and each request costs more."""
    (one, one_tokens), (two, two_tokens), efficiency = RTX_4090[model]
    rows = (
        row("tp1", request_throughput=one, output_throughput=one_tokens),
        row("tp2", request_throughput=two, output_throughput=two_tokens),
    )
    of_one = table_of(*rows, workload="random-300", hour_cost_usd=409 / HOURS_PER_MONTH)
    of_two = table_of(*rows, workload="random-300", hour_cost_usd=729 / HOURS_PER_MONTH / 2)

    assert value(of_one, "tp2", "scaling_efficiency") == pytest.approx(efficiency, abs=5e-4)
    per_request = value(of_one, "tp1", "usd_per_1000_requests"), value(of_two, "tp2", "usd_per_1000_requests")
    assert per_request == pytest.approx(
        [price / (rate * 2_592_000) * 1000 for price, rate in ((409, one), (729, two))]
    )
    assert per_request[0] < per_request[1]
    tokens = value(of_two, "tp2", "usd_per_million_output_tokens")
    assert tokens == pytest.approx(729 / (two_tokens * 2_592_000) * 1e6)


def test_published_throughputs_are_consistent() -> None:
    """Requests per second times seconds are the 300 requests, times tokens per request are the tokens per second."""
    for requests, seconds, tokens, total in (
        (6.21, 48.35, 161_719, 3344.91),
        (8.55, 35.08, 162_187, 4623.98),
        (4.14, 72.42, 165_500, 2285.44),
        (6.10, 49.22, 164_855, 3349.59),
    ):
        assert requests * seconds == pytest.approx(300, rel=2e-3)
        assert tokens / seconds == pytest.approx(total, rel=1e-3)


# -- intervals -------------------------------------------------------------------------------------------------------


def test_what_is_derived_keeps_the_interval_of_what_was_measured() -> None:
    table = table_of(row("tp1", request_throughput=10), row("tp2", request_throughput=16), hour_cost_usd=2.0)
    tp1, tp2 = table.rows

    for name in ("request_throughput", "request_throughput_per_gpu", "usd_per_1000_requests"):
        level = table.figure(tp2, name)
        assert level is not None
        assert (level.se, level.df) == (0.01, 6)
    efficiency = table.figure(tp2, "scaling_efficiency")
    assert efficiency is not None
    assert efficiency.se == pytest.approx(0.01 * math.sqrt(2))
    assert table.figure(tp1, "scaling_efficiency") == Effect(0.0, 0.0, 1.0)


def test_interval_is_of_95_percent() -> None:
    low, high = interval(Effect(math.log(10), 0.01, 6))  # t(0.975, 6) = 2.447

    assert (low, high) == pytest.approx((10 * math.exp(-0.02447), 10 * math.exp(0.02447)), rel=1e-4)


@pytest.mark.parametrize(
    ("unit", "level", "text"),
    [
        ("ms", Effect(math.log(20), 0.01, 6), "20.0 ms +-2%"),
        ("ms", Effect(math.log(20), 0.001, 6), "20.0 ms +-0.2%"),
        ("%", Effect(math.log(0.69), 0.01, 6), "69% +-2%"),
        ("%", Effect(0.0, 0.0, 1.0), "100%"),
        ("USD", None, "-"),
    ],
)
def test_a_figure_is_shown_with_its_reach(unit: str, level: Effect | None, text: str) -> None:
    assert figure_text(unit, level) == text


def test_no_price_no_cost() -> None:
    table = table_of(*H200)

    assert table.figure(table.rows[0], "usd_per_1000_requests") is None
    assert not [line for line in table_lines(table) if "cost" in line]


def test_where_arrivals_set_the_throughput_nothing_is_said_of_scaling() -> None:
    document = {**BUILTIN_WORKLOADS["smoke"].to_document(), "rate": 2.5}
    table = replace(table_of(*H200), workload=document)

    assert table.is_rate_bound
    assert table.figure(table.rows[1], "scaling_efficiency") is None
    assert table.work_per_token_ms(table.rows[1]) is None
    assert table_notes(table)[0].startswith("the arrivals set the throughput here, not the layouts")
    assert not table_of(*H200, workload="random-300").is_rate_bound


# -- from records ----------------------------------------------------------------------------------------------------


def measured(layout: str, *factors: float, **parts: Any) -> Measurement:
    gpus = parse_layout(layout).gpus
    return measurement_of(*factors, layout=layout, hardware={"count": gpus, "links": []}, **parts)


def performance(measurement: Measurement, *, status: Status = Status.PASS, reasons: Sequence[str] = ()) -> Record:
    return performance_record(Verdict(status, tuple(reasons)), measurement)


def compared(*records: Record, price: float | None = None) -> tuple[tuple[LayoutTable, ...], tuple[str, ...]]:
    tests = [(f"t.py::test[{record['layout']}]", json.loads(json.dumps(record))) for record in records]
    return compare_layouts(tests, priors_of=lambda key, seconds: lambda _: NOISE_PRIORS["cuda"], hour_cost_usd=price)


def test_layouts_of_one_load_stand_in_one_table_the_smallest_first() -> None:
    records = [
        performance(measured(layout, factor)) for layout, factor in (("tp4", 0.5), ("tp1", 1.0), ("tp1x2", 0.5))
    ]

    (table,), left_out = compared(*records)

    assert left_out == ()
    assert [one.name for one in table.rows] == ["tp1", "tp1x2", "tp4"]
    assert [one.units for one in table.rows] == [1, 2, 4]
    assert value(table, "tp1", "median_ttft_ms") == pytest.approx(100)
    assert value(table, "tp1x2", "request_throughput") == pytest.approx(2)
    assert value(table, "tp1x2", "scaling_efficiency") == pytest.approx(1)
    assert value(table, "tp4", "scaling_efficiency") == pytest.approx(0.5)
    assert table.rows[0].assumed == "the documented prior, 1.5%"


def test_the_order_of_the_records_does_not_matter() -> None:
    records = [
        performance(measured("tp1", 1.0)),
        performance(measured("tp2", 0.5)),
        performance(measured("dp2", 0.6)),
    ]

    assert compared(*records) == compared(*reversed(records))


def test_a_single_layout_is_nothing_to_compare() -> None:
    assert compared(performance(measured("tp1", 1.0)), performance(measured("tp1", 1.1))) == ((), ())
    assert compared() == ((), ())


def test_of_several_measurements_the_one_with_most_starts_counts_then_the_first() -> None:
    records = [
        performance(measured("tp1", 1.0)),
        performance(measured("tp1", 2.0, 2.0)),
        performance(measured("tp1", 4.0, 4.0)),
        performance(measured("tp1", 8.0)),
        performance(measured("tp2", 1.0)),
    ]

    (table,), _ = compared(*records)

    assert value(table, "tp1", "median_ttft_ms") == pytest.approx(200)
    assert table.rows[0].starts == 2


def test_invalid_numbers_are_left_out_and_named() -> None:
    broken = performance(measured("tp2", 1.0), status=Status.INVALID, reasons=["throttled: too hot (server start 1)"])

    tables, left_out = compared(performance(measured("tp1", 1.0)), broken)

    assert tables == ()
    assert left_out == (
        "tp1 is not compared, since no other layout was measured in the same way: no other has sound numbers",
        "tp2 is not compared, since its numbers are invalid: throttled: too hot (server start 1)",
    )


def test_another_load_is_not_compared_and_says_what_differs() -> None:
    other = performance(measured("tp4", 1.0, workload={"name": "long", "fingerprint": "0123456789ab"}))

    (table,), left_out = compared(performance(measured("tp1", 1.0)), performance(measured("tp2", 1.0)), other)

    assert [one.name for one in table.rows] == ["tp1", "tp2"]
    assert left_out == (
        "tp4 is not compared, since no other layout was measured in the same way: the nearest differs in "
        f"workload.fingerprint: tp4 '0123456789ab' (long), tp1 '{WORKLOAD.fingerprint()}' (small)",
    )


def test_two_loads_make_two_tables() -> None:
    load = {"workload": {"name": "long", "fingerprint": "0123456789ab"}}
    records = [performance(measured(layout, 1.0, **parts)) for layout in ("tp1", "tp2") for parts in ({}, load)]

    tables, left_out = compared(*records)

    assert len(tables) == 2
    assert left_out == ()


def fact(kind: str, layout: str, **parts: Any) -> Record:
    return {"kind": kind, "layout": layout, **parts}


def test_links_and_transports_come_from_their_own_records() -> None:
    records = [
        fact("topology", "tp1", worst="none needed"),
        fact("transport", "tp1", transports={}, summary="none needed"),
        performance(measured("tp1", 1.0)),
        fact("topology", "tp2", worst="PHB"),
        fact("transport", "tp2", transports={"SHM/direct": 4}, summary="SHM/direct x4"),
        performance(measured("tp2", 1.0)),
    ]

    (table,), _ = compared(*records)

    assert [(one.worst_link, one.transport) for one in table.rows] == [
        ("none needed", "none needed"),
        ("PHB", "SHM/direct"),
    ]


def test_without_a_transport_check_what_was_seen_beside_the_measurement_counts() -> None:
    taken = measured("tp2", 1.0)
    covariates = {**taken.identity.covariates, "transport": "P2P/CUMEM"}
    seen = replace(taken, identity=replace(taken.identity, covariates=covariates))

    (table,), _ = compared(performance(measured("tp1", 1.0)), performance(seen))

    assert [one.transport for one in table.rows] == ["", "P2P/CUMEM"]
    (line,) = (line for line in table_lines(table) if "transport" in line)
    assert line.split() == ["transport", "none", "needed", "P2P/CUMEM"]


def busy(*devices: DeviceTelemetry) -> Measurement:
    telemetry = Telemetry(source="NVML", interval_s=1.0, sample_ns=(0, 1, 2, 4), devices=devices)
    seen = replace(run_of(1.0, 1.0), observations=Observations(telemetry=telemetry))
    return measured("tp2").with_run(seen)


def test_gpus_are_as_busy_as_they_were_on_average() -> None:
    """Each value counts for the time since the sample before, and the first is of the moment before."""
    gpus = [
        DeviceTelemetry(name="GPU 0", series={"utilization_percent": (0, 40, 40, 40)}),
        DeviceTelemetry(name="GPU 1", series={"utilization_percent": (0, 80, 80, None)}),
        DeviceTelemetry(name="CPU", series={"busy_percent": (None, 5, 5, 5)}),
    ]

    (table,), _ = compared(performance(measured("tp1", 1.0)), performance(busy(*gpus)))

    assert [one.busy_percent for one in table.rows] == [None, 60]
    assert [line.split() for line in table_lines(table) if "busy" in line] == [["GPUs", "busy,", "mean", "-", "60%"]]


def test_without_gpus_the_cpus_count() -> None:
    cpu = DeviceTelemetry(name="CPU", series={"busy_percent": (None, 50, 50, 50)})

    (table,), _ = compared(performance(measured("tp1", 1.0)), performance(busy(cpu)))

    assert table.rows[1].busy_percent == 50


def test_on_the_cpu_platform_all_layouts_have_the_machine() -> None:
    hardware = {
        "platform": "cpu",
        "device": "EPYC",
        "count": 2,
        "memory_gib": None,
        "power_limit_w": None,
        "links": [],
    }
    records = [
        performance(measurement_of(factor, layout=layout, hardware=hardware))
        for layout, factor in (("tp1", 1.0), ("tp2", 2.0))
    ]

    (table,), _ = compared(*records, price=0.05)

    assert [one.units for one in table.rows] == [2, 2]
    assert value(table, "tp2", "scaling_efficiency") == pytest.approx(0.5)
    assert value(table, "tp1", "usd_per_1000_requests") == pytest.approx(2 * 0.05 / 3600 * 1000)
    lines = table_lines(table)
    assert [line for line in lines if line.startswith("  requests per core ")]
    assert lines[-1] == "  cost at 0.05 USD per core and hour"


# -- text and document -----------------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_figure_and_a_column_for_each_layout() -> None:
    (table,), _ = compared(performance(measured("tp1", 1.0)), performance(measured("tp2", 0.5)), price=3.6)

    lines = table_lines(table)

    assert lines[0] == "layouts compared: small on org/tiny, 95% intervals"
    assert lines[1].split() == ["tp1", "tp2"]
    labels = [line[2:].split("  ")[0] for line in lines[2:-2]]
    assert labels == [
        "server starts",
        "GPUs",
        "worst link",
        "transport",
        *(FIGURES[name].label for name in FIGURES),
    ]
    assert lines[-2] == "  a p99 of 1 request in a batch is a guess: 662 are needed"
    assert lines[-1] == "  cost at 3.6 USD per GPU and hour"


def test_other_arguments_are_named() -> None:
    rows = (replace(H200[0], arguments="--max-model-len 60000"), replace(H200[1], arguments="--max-model-len 8192"))

    assert "the servers' arguments differ: tp1 --max-model-len 60000; tp4 --max-model-len 8192" in table_notes(
        table_of(*rows)
    )
    assert not [note for note in table_notes(table_of(*H200)) if "arguments" in note]


def test_starts_are_told_by_their_number() -> None:
    rows = [row("tp1", starts=1), row("tp2", starts=1), row("tp4", starts=3)]

    assert starts_text(table_of(*rows)) == "1 server start of tp1 and tp2, 3 of tp4"


def test_the_document_follows_the_schema() -> None:
    (table,), _ = compared(performance(measured("tp1", 1.0, 1.1)), performance(measured("tp2", 0.5)), price=2.0)
    record = {**table_document(table), "advice": advise(table).to_document()}

    document = results_document([("", record)], created="2026-11-21T04:00:00Z", platform="cuda", version="0.1.0")

    assert validate(json.loads(json.dumps(document)), "results") == []
    assert record["reference"] == "tp1"
    figures = record["rows"][1]["figures"]
    assert set(figures) == set(FIGURES)
    assert figures["request_throughput_per_gpu"]["value"] == pytest.approx(1)
    assert figures["request_throughput_per_gpu"]["unit"] == "req/s per GPU"
    low, high = figures["median_ttft_ms"]["ci"]
    assert low < figures["median_ttft_ms"]["value"] < high
    del record["advice"]
    broken = results_document([("", record)], created="2026-11-21T04:00:00Z", platform="cuda", version="0.1.0")
    assert validate(json.loads(json.dumps(broken)), "results") == ["$.records[0]: 'advice' is a required property"]
