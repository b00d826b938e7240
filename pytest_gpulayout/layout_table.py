"""Layouts that one run measured with the same workload, side by side: figures, their intervals, and the table.

Knows which records of a run can stand in one table, and what is derived from them: per GPU, cost, scaling efficiency.
Leaves intervals to :mod:`~pytest_gpulayout.relative`, and which layout to take to :mod:`~pytest_gpulayout.advice`.

Everything is taken from records, as they are in the results: those of pytest-xdist's workers come the same way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpulayout.baseline import BaselineKey, fold_batches, is_measurement
from pytest_gpulayout.judging import PriorOf
from pytest_gpulayout.layout import Layout, parse_layout
from pytest_gpulayout.metrics import METRICS, TAIL_REQUESTS
from pytest_gpulayout.relative import (
    PER_UNIT,
    inverse,
    level_of,
    load_differences,
    number_of,
    ratio_of,
    scaled,
    times_as_good,
    units_of,
)
from pytest_gpulayout.report import NONE_NEEDED, aligned, plural, quantity
from pytest_gpulayout.stats import SETTLED_DF, Effect, NoisePrior
from pytest_gpulayout.telemetry import CPU, DeviceTelemetry, Telemetry
from pytest_gpulayout.verdict import MetricSample

if TYPE_CHECKING:
    from pytest_gpulayout.report import Record

PriorsOf = Callable[[BaselineKey, float], PriorOf]
"""What is assumed of the spread between starts, by key and by the seconds that one of them measured; see
:func:`~pytest_gpulayout.relative.start_priors`."""

OUTSIDE = 0.025
"""Probability beyond either end of an interval of the table: 95 % intervals."""

_SECONDS_PER_HOUR = 3600


class Figure(NamedTuple):
    """A line of the table. :param unit: ``per GPU`` stands for per core on the CPU platform."""

    label: str
    unit: str
    higher_is_better: bool


FIGURES: Mapping[str, Figure] = MappingProxyType(
    {
        "median_ttft_ms": Figure("TTFT, median", "ms", False),
        "p99_ttft_ms": Figure("TTFT, p99", "ms", False),
        "median_tpot_ms": Figure("TPOT, median", "ms", False),
        "p99_tpot_ms": Figure("TPOT, p99", "ms", False),
        "median_e2el_ms": Figure("E2EL, median", "ms", False),
        "request_throughput": Figure("requests", "req/s", True),
        f"request_throughput{PER_UNIT}": Figure("requests per GPU", "req/s", True),
        "output_throughput": Figure("output tokens", "tok/s", True),
        f"output_throughput{PER_UNIT}": Figure("output tokens per GPU", "tok/s", True),
        "scaling_efficiency": Figure("scaling efficiency", "%", True),
        "usd_per_1000_requests": Figure("cost of 1000 requests", "USD", False),
        "usd_per_million_output_tokens": Figure("cost of a million output tokens", "USD", False),
    }
)
"""All figures by name, in the order of the table."""

_OF_MONEY: Mapping[str, tuple[str, float]] = {
    "usd_per_1000_requests": ("request_throughput", 1e3),
    "usd_per_million_output_tokens": ("output_throughput", 1e6),
}
_MEASURED = tuple(name for name in FIGURES if name in METRICS)


@dataclass(frozen=True, slots=True)
class LayoutRow:
    """One layout of a table.

    :param units: GPUs; on the CPU platform cores of the machine (:func:`~pytest_gpulayout.relative.units_of`).
    :param starts: fresh servers that it was measured on. :param requests: in a batch.
    :param levels: logarithms of what was measured, by metric.
    :param worst_link: between ranks that communicate, as it is printed; ``""`` where nobody looked.
    :param transport: what the ranks talk over; ``""`` where nobody looked.
    :param busy_percent: mean over the GPUs, or of the host's CPUs, while it was measured.
    :param arguments: of its server, beside those of the model's marker.
    :param assumed: what its intervals rest on beside its own starts, in words; ``""`` for nothing.
    """

    layout: Layout
    units: int
    starts: int
    requests: int
    levels: Mapping[str, Effect]
    worst_link: str = ""
    transport: str = ""
    busy_percent: float | None = None
    arguments: str = ""
    assumed: str = ""

    @property
    def name(self) -> str:
        """The layout in its canonical form."""
        return str(self.layout)

    @property
    def communicates(self) -> bool:
        """Whether its ranks exchange data: by the layout itself, or, of a model with experts, by the links it has."""
        return bool(self.layout.communicating_pairs()) or self.has_link

    @property
    def has_link(self) -> bool:
        """Whether a link within a host is known that its ranks need."""
        return self.worst_link not in ("", NONE_NEEDED)


@dataclass(frozen=True, slots=True)
class LayoutTable:
    """Layouts that served the same model under the same load.

    :param model: and ``workload``: of the key, and the document.
    :param rows: (n_layouts,), at least two; the smallest first, which the scaling efficiency refers to.
    :param hour_cost_usd: of one unit.
    """

    model: Mapping[str, str]
    workload: Mapping[str, Any]
    platform: str
    rows: tuple[LayoutRow, ...]
    hour_cost_usd: float | None = None

    @property
    def reference(self) -> LayoutRow:
        """The smallest layout."""
        return self.rows[0]

    @property
    def unit(self) -> str:
        """What is paid for: ``GPU`` or ``core``."""
        return "core" if self.platform == "cpu" else "GPU"

    @property
    def is_rate_bound(self) -> bool:
        """Whether the throughput is what arrives, whatever the layout can do."""
        return isinstance(self.workload.get("rate"), int | float) or self.workload.get("ramp_up") is not None

    @property
    def is_closed(self) -> bool:
        """Whether every layout had the same number of requests in flight."""
        return self.workload.get("rate") is None and self.workload.get("ramp_up") is None

    def figure(self, row: LayoutRow, name: str) -> Effect | None:
        """The logarithm of a figure of :data:`FIGURES`; ``None`` where it does not exist."""
        if name in _OF_MONEY:
            metric, count = _OF_MONEY[name]
            rate = row.levels.get(metric)
            if rate is None or self.hour_cost_usd is None:
                return None
            return scaled(inverse(rate), row.units * self.hour_cost_usd / _SECONDS_PER_HOUR * count)
        if name == "scaling_efficiency":
            return self._efficiency(row)
        level = row.levels.get(name.removesuffix(PER_UNIT))
        return scaled(level, 1 / row.units) if level is not None and name.endswith(PER_UNIT) else level

    def _efficiency(self, row: LayoutRow) -> Effect | None:
        """Throughput per unit over that of the smallest layout; where arrivals set it there is none."""
        own, smallest = (self.figure(one, f"request_throughput{PER_UNIT}") for one in (row, self.reference))
        if own is None or smallest is None or self.is_rate_bound:
            return None
        return Effect(0.0, 0.0, 1.0) if row is self.reference else ratio_of(own, smallest)

    def times_as_good(self, own: LayoutRow, other: LayoutRow, name: str) -> Effect | None:
        """The logarithm of how many times as good one layout is as another; ``None`` where one lacks the figure."""
        mine, theirs = self.figure(own, name), self.figure(other, name)
        if mine is None or theirs is None:
            return None
        return times_as_good(mine, theirs, higher_is_better=FIGURES[name].higher_is_better)

    def work_per_token_ms(self, row: LayoutRow) -> tuple[float, float] | None:
        """How long a token takes, and how long it would if the reference's work were split evenly.

        Both at the same number of requests in flight; the rest is communication between the ranks, waiting for each
        other, and work that every rank does. Only layouts that share each token's work among more ranks than the
        reference, and differ in nothing else, can be compared so.

        :returns: (found, split evenly); ``None`` where it cannot be told.
        """
        own, ref = row.layout, self.reference.layout
        same = all(getattr(own, axis) == getattr(ref, axis) for axis in ("pp", "dp", "pcp", "ep", "replicas"))
        found, of_ref = row.levels.get("median_tpot_ms"), self.reference.levels.get("median_tpot_ms")
        if not (self.is_closed and same and own.tp > ref.tp and found is not None and of_ref is not None):
            return None
        return number_of(found.size), number_of(of_ref.size) * self.reference.units / row.units


def interval(level: Effect) -> tuple[float, float]:
    """Both ends of the 95 % interval of a figure."""
    return number_of(level.lower(OUTSIDE)), number_of(level.upper(OUTSIDE))


# -- from records ------------------------------------------------------------------------------------------------


def compare_layouts(
    records: Sequence[tuple[str, Record]], *, priors_of: PriorsOf, hour_cost_usd: float | None = None
) -> tuple[tuple[LayoutTable, ...], tuple[str, ...]]:
    """Put the layouts of a run side by side, those that served the same model under the same load in one table.

    Of several measurements of one layout the one with most server starts counts, of those the first: further ones on
    the same server found it warm, and not every layout has them.

    :param records: (test id, record), in the order in which they were made.
    :returns: the tables, and a sentence for each layout that is in none of them; nothing of a single layout.
    """
    measured = [record for _, record in records if record["kind"] == "performance"]
    if len({record["layout"] for record in measured}) < 2:
        return (), ()
    groups: dict[str, dict[str, Record]] = {}
    for record in filter(_is_sound, measured):
        by_layout = groups.setdefault(_load_of(record), {})
        known = by_layout.get(record["layout"])
        if known is None or len(record["runs"]) > len(known["runs"]):
            by_layout[record["layout"]] = record
    facts = [record for _, record in records]
    tables = tuple(
        _table(tuple(of_load.values()), facts, priors_of, hour_cost_usd)
        for of_load in groups.values()
        if len(of_load) > 1
    )
    return tables, tuple(_left_out(measured, tables))


def _is_sound(record: Record) -> bool:
    return record["verdict"] != "invalid" and bool(record["runs"])


def _load_of(record: Record) -> str:
    """What must be the same for a comparison: the model, and what is sent."""
    key = record["identity"]["key"]
    return json.dumps([key["model"], key["workload"]["fingerprint"]], sort_keys=True)


def _left_out(measured: Sequence[Record], tables: Sequence[LayoutTable]) -> Iterator[str]:
    """Say why a layout that was measured is in no table."""
    shown = {row.name for table in tables for row in table.rows}
    for layout in dict.fromkeys(record["layout"] for record in measured):
        own = [record for record in measured if record["layout"] == layout]
        sound = [record for record in own if _is_sound(record)]
        if layout in shown:
            continue
        if not sound:
            reason = next((reason for record in own for reason in record["reasons"]), "no server start was measured")
            yield f"{layout} is not compared, since its numbers are invalid: {reason}"
            continue
        others = [record for record in measured if record["layout"] != layout and _is_sound(record)]
        differences = min((_differences(sound[-1], other) for other in others), key=len, default=())
        why = f"the nearest differs in {'; '.join(differences)}" if differences else "no other has sound numbers"
        yield f"{layout} is not compared, since no other layout was measured in the same way: {why}"


def _differences(own: Record, other: Record) -> tuple[str, ...]:
    return load_differences(_key(own), _key(other))


def _key(record: Record) -> BaselineKey:
    return BaselineKey(**record["identity"]["key"])


def _table(
    records: Sequence[Record], facts: Sequence[Record], priors_of: PriorsOf, hour_cost_usd: float | None
) -> LayoutTable:
    rows = [_row(record, facts, priors_of) for record in records]
    key = _key(records[0])
    return LayoutTable(
        model=key.model,
        workload=records[0]["workload"],
        platform=key.hardware["platform"],
        rows=tuple(sorted(rows, key=lambda row: (row.layout.gpus, row.layout.nodes, row.name))),
        hour_cost_usd=hour_cost_usd,
    )


def _row(record: Record, facts: Sequence[Record], priors_of: PriorsOf) -> LayoutRow:
    key, runs = _key(record), record["runs"]
    batches = [fold_batches([batch["metrics"] or {} for batch in run["gpulayout"]["batches"]]) for run in runs]
    samples = {name: [MetricSample(run[name]) for run in batches if name in run] for name in _MEASURED}
    known = {
        name: found
        for name, found in samples.items()
        if len(found) == len(runs) and all(is_measurement(sample.batches) for sample in found)
    }
    prior_of = priors_of(key, fmean(run["duration"] for run in runs))
    priors = {name: prior_of(name) for name in known}
    of_layout = [fact for fact in facts if fact["layout"] == key.layout]
    return LayoutRow(
        layout=parse_layout(key.layout),
        units=units_of(key.layout, key.hardware),
        starts=len(runs),
        requests=record["workload"]["requests"],
        levels={name: level_of(found, priors[name]) for name, found in known.items()},
        worst_link=_joined(fact["worst"] for fact in of_layout if fact["kind"] == "topology"),
        transport=_transport_of(record, of_layout),
        busy_percent=_busy_percent(runs),
        arguments=str(record["identity"]["sut"].get("arguments") or ""),
        assumed=_assumed(priors.get("request_throughput"), len(runs)),
    )


def _joined(words: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(words))


def _transport_of(record: Record, of_layout: Sequence[Record]) -> str:
    """What the transport check found, else what was seen beside the measurement."""
    found = [fact for fact in of_layout if fact["kind"] == "transport"]
    if found:
        return _joined(name for fact in found for name in (fact["transports"] or [fact["summary"]]))
    return str(record["identity"]["covariates"].get("transport") or "")


def _assumed(prior: NoisePrior | None, starts: int) -> str:
    if prior is None or starts - 1 >= SETTLED_DF:
        return ""
    return f"{prior.source}, {prior.start_sd:.1%}"


def _busy_percent(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over the server starts and the GPUs; without GPUs of the host's CPUs."""
    documents = [run["gpulayout"].get("telemetry") for run in runs]
    found = [share for document in documents if document for share in _busy_of(document)]
    return fmean(found) if found else None


def _busy_of(document: Mapping[str, Any]) -> Iterator[float]:
    devices = [DeviceTelemetry(name=one["name"], series=one["series"]) for one in document["devices"]]
    telemetry = Telemetry(
        source=document["source"], interval_s=document["interval_s"], sample_ns=document["sample_ns"]
    )
    gpus = [device for device in devices if device.name != CPU]
    series = "utilization_percent" if gpus else "busy_percent"
    for device in gpus or devices:
        if (share := telemetry.mean(device, series)) is not None:
            yield share


# -- text and document -------------------------------------------------------------------------------------------


def table_lines(table: LayoutTable) -> list[str]:
    """The table: a line for each figure, a column for each layout, and what a reader must know of them."""
    title = f"layouts compared: {table.workload['name']} on {table.model['name']}, 95% intervals"
    rows = [["", *(row.name for row in table.rows)], *_facts(table)]
    for name, figure in FIGURES.items():
        levels = [table.figure(row, name) for row in table.rows]
        if any(level is not None for level in levels):
            label = figure.label.replace("per GPU", f"per {table.unit}")
            rows.append([label, *(figure_text(figure.unit, level) for level in levels)])
    notes = [f"  {note}" for note in table_notes(table)]
    return [title, *(f"  {line}" for line in aligned(rows)), *notes]


def _facts(table: LayoutTable) -> Iterator[list[str]]:
    yield ["server starts", *(str(row.starts) for row in table.rows)]
    yield [f"{table.unit}s", *(str(row.units) for row in table.rows)]
    yield ["worst link", *(row.worst_link or "not seen" for row in table.rows)]
    yield ["transport", *(_transport_cell(row) for row in table.rows)]
    if any(row.busy_percent is not None for row in table.rows):
        busy = "CPUs busy, mean" if table.platform == "cpu" else "GPUs busy, mean"
        yield [busy, *("-" if row.busy_percent is None else f"{row.busy_percent:.0f}%" for row in table.rows)]


def _transport_cell(row: LayoutRow) -> str:
    return row.transport or ("not seen" if row.communicates else NONE_NEEDED)


def figure_text(unit: str, level: Effect | None) -> str:
    """``20.0 ms +-3%``: a figure and how far its interval reaches, by its longer side."""
    if level is None:
        return "-"
    value = f"{number_of(level.size):.0%}" if unit == "%" else quantity(number_of(level.size), unit)
    reach = interval(level)[1] / number_of(level.size) - 1
    return f"{value} +-{short_percent(reach)}" if level.se else value


def short_percent(fraction: float) -> str:
    """``0.4%``, ``12%``: one digit behind the point below 1 %."""
    return f"{fraction:.1%}" if fraction < 0.01 else f"{fraction:.0%}"


def table_notes(table: LayoutTable) -> list[str]:
    """What a reader must know of the numbers."""
    notes = []
    if table.is_rate_bound:
        notes.append(
            "the arrivals set the throughput here, not the layouts: for scaling and cost measure a workload with "
            "concurrency, or rate = inf"
        )
    fewest = min(row.requests for row in table.rows)
    if fewest < TAIL_REQUESTS[99]:
        notes.append(f"a p99 of {plural(fewest, 'request')} in a batch is a guess: {TAIL_REQUESTS[99]} are needed")
    if len({row.arguments for row in table.rows}) > 1:
        told = "; ".join(f"{row.name} {row.arguments or 'none'}" for row in table.rows)
        notes.append(f"the servers' arguments differ: {told}")
    if table.hour_cost_usd is not None:
        notes.append(f"cost at {table.hour_cost_usd:g} USD per {table.unit} and hour")
    return notes


def starts_text(table: LayoutTable) -> str:
    """``1 server start of tp1 and tp2, 3 of tp4``."""
    by_count: dict[int, list[str]] = {}
    for row in table.rows:
        by_count.setdefault(row.starts, []).append(row.name)
    return ", ".join(
        f"{plural(count, 'server start') if number == 0 else count} of {' and '.join(names)}"
        for number, (count, names) in enumerate(by_count.items())
    )


def table_document(table: LayoutTable) -> Record:
    """The table as the results keep it; the advice is added to it."""
    return {
        "kind": "comparison",
        "layout": ", ".join(row.name for row in table.rows),
        "model": dict(table.model),
        "workload": dict(table.workload),
        "unit": table.unit,
        "hour_cost_usd": table.hour_cost_usd,
        "reference": table.reference.name,
        "rows": [_row_document(table, row) for row in table.rows],
        "notes": table_notes(table),
    }


def _row_document(table: LayoutTable, row: LayoutRow) -> Record:
    figures = {name: table.figure(row, name) for name in FIGURES}
    return {
        "layout": row.name,
        "units": row.units,
        "starts": row.starts,
        "worst_link": row.worst_link,
        "transport": row.transport,
        "busy_percent": row.busy_percent,
        "arguments": row.arguments,
        "assumed": row.assumed,
        "figures": {
            name: {"value": number_of(level.size), "ci": list(interval(level)), "unit": _unit_of(table, name)}
            for name, level in figures.items()
            if level is not None and math.isfinite(level.size)
        },
    }


def _unit_of(table: LayoutTable, name: str) -> str:
    unit = FIGURES[name].unit
    if name.endswith(PER_UNIT):
        return f"{unit} per {table.unit}"
    return "" if unit == "%" else unit
