"""Values -> lines of text and JSON documents; prints nothing.

A failure has four parts: what was required, what was found (number, unit, n), where, what to type next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.drift import wiring_document
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.proofs import NOT_KNOWN_HERE, RECORD_TOPOLOGY
from pytest_gpulayout.replicas import shares_text
from pytest_gpulayout.server_window import ttft_split_text
from pytest_gpulayout.tolerance import percent_text
from pytest_gpulayout.topology_faults import describe_faults
from pytest_gpulayout.verdict import AdvisoryChange, MetricVerdict, Status, Verdict
from pytest_gpulayout.vllm_result import vllm_result

if TYPE_CHECKING:
    from pytest_gpulayout.causes_case import Finding
    from pytest_gpulayout.collectives import CollectiveMeasurement
    from pytest_gpulayout.gate import PlacedLayout
    from pytest_gpulayout.link_limits import BandwidthReport
    from pytest_gpulayout.measurement import Measurement
    from pytest_gpulayout.occupancy import OccupancyReport, RankOccupancy
    from pytest_gpulayout.ports import NodeProof, Server, ServerProof, ServerSpec
    from pytest_gpulayout.transport import TransportReport, TransportViolation
    from pytest_gpulayout.validity import Problem

RESULTS_SCHEMA_VERSION = 1

Record = dict[str, Any]
"""One finding of one test as JSON; its ``kind`` is one of those in ``results.schema.json``."""


def plural(number: int, noun: str) -> str:
    """``1 start``, ``2 starts``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a line per row, its cells padded to the widths of their columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


NONE_NEEDED = "none needed"
"""In place of a link, or of transports, where no ranks communicate."""


def devices_text(placed: PlacedLayout) -> str:
    """``2 x NVIDIA H200 (GPU 0, 1)``, or the cores of each rank; of several nodes one after the other."""
    return "; ".join(f"{_of_node(node.node)}{_devices_of_node(node)}" for node in placed.on_nodes)


def _devices_of_node(placed: PlacedLayout) -> str:
    if placed.topology.platform == "cpu":
        ranks = enumerate(placed.devices, placed.first_rank)
        return "; ".join(f"rank {rank} on {device.name}" for rank, device in ranks)
    names = ", ".join(sorted({device.name or "unknown GPU" for device in placed.devices}))
    if placed.topology.source == NOT_KNOWN_HERE:
        return f"{len(placed.devices)} x {names}"
    indices = ", ".join(str(device.index) for device in placed.devices)
    return f"{len(placed.devices)} x {names} (GPU {indices})"


def source_text(placed: PlacedLayout) -> str:
    """Where the topology comes from; a recorded one is called so everywhere."""
    return f"recorded in {placed.topology.source}" if placed.topology.recorded else placed.topology.source


def worst_link_text(placed: PlacedLayout) -> str:
    """The worst link between ranks that communicate."""
    if not placed.links:
        return NONE_NEEDED
    worst = placed.topology.worst(_device_pairs(placed))
    return "unknown" if worst is None else str(worst)


def link_failure(placed: PlacedLayout) -> str:
    """Say which links are worse than required."""
    lines = [f"links of class {placed.requirement} or better are required between GPUs that communicate"]
    noun = "device" if placed.topology.platform == "cpu" else "GPU"
    lines += [
        f"  rank {v.rank_a} - rank {v.rank_b}: {v.found_text} ({noun} {v.device_a} - {noun} {v.device_b})"
        for v in placed.violations
    ]
    lines.append(f"  layout {placed.layout} on {devices_text(placed)}, topology from {source_text(placed)}")
    lines += [f"  {fault}" for fault in describe_faults(placed.topology)]
    lines.append(f"  {_where_links_satisfy(placed)}")
    lines.append("  look at the wiring: gpulayout topo; accept it: --gpu-link=any")
    return "\n".join(lines)


def _where_links_satisfy(placed: PlacedLayout) -> str:
    """Say which devices would do, or that none do."""
    if better := placed.better_placement:
        devices = ",".join(map(str, better))
        return f"these GPUs satisfy it: --gpu-devices={devices}"
    if placed.topology.source == NOT_KNOWN_HERE:
        return f"the topology of a server that runs elsewhere is {NOT_KNOWN_HERE}: {RECORD_TOPOLOGY}"
    usable = len(placed.topology.usable)
    return f"no choice among the {usable} GPUs of this machine was found that satisfies it"


def transport_failure(
    layout: object, report: TransportReport, violations: Sequence[TransportViolation], allowed: object
) -> str:
    """Say which transport is forbidden, or what evidence is missing."""
    lines = [f"transports allowed between ranks: {allowed}; every communicating pair must show one"]
    lines += [f"  found: {violation}" for violation in violations]
    if not violations:
        lines.append(f"  found: {report.verdict}, {report.summary()}")
    lines += [f"  {line}" for finding in report.findings for line in finding_lines(finding)]
    lines.append(f"  layout {layout}")
    lines.append("  allow it: --gpu-transport=LIST; see more: NCCL_DEBUG=INFO, and /dev/shm of the container")
    return "\n".join(lines)


def link_speed_failure(bandwidth: BandwidthReport, where: str) -> str:
    """Say which links are slower than their class must be. :param where: layout, devices and messages in one line."""
    lines = ["an all-reduce was required to come near what the links between its ranks are published to carry"]
    lines += [f"  found: {finding}" for finding in bandwidth.findings]
    lines += [f"  {remark}" for remark in bandwidth.remarks]
    lines.append(f"  {where}")
    lines.append(
        "  look at the transport (-k transport), at NCCL_P2P_DISABLE and NCCL_P2P_LEVEL, at ACS and IOMMU; "
        "accept it: let the fixture gpu_probe_plan return a plan with a smaller least_share"
    )
    return "\n".join(lines)


def processes_failure(spec: ServerSpec, report: OccupancyReport) -> str:
    """Say which process is where it must not be, or of which rank nothing shows that it is where it must be."""
    lines = ["each rank is required on its own GPU, on no other, and with nobody else beside it"]
    lines += [f"  found: {violation}" for violation in report.violations]
    lines += [f"  not proved: {sentence}" for sentence in report.not_proved]
    lines += [f"  {remark}" for remark in report.remarks]
    gpus = ", ".join(str(device.index) for device in spec.devices)
    lines.append(f"  layout {spec.layout} on GPU {gpus}, by the driver's lists ({report.proved_by})")
    lines.append(
        "  look for yourself: nvidia-smi --query-compute-apps=gpu_uuid,pid,used_memory --format=csv; end processes "
        "of others, or choose other GPUs: --gpu-devices=..."
    )
    return "\n".join(lines)


def finding_lines(finding: Finding) -> list[str]:
    """A cause, as much of its evidence as there is, and what to do."""
    place = ":".join(str(part) for part in (finding.file, finding.line) if part)
    evidence = ": ".join(part for part in (place, finding.text) if part)
    return [finding.cause, *([f"  {evidence}"] if evidence else []), f"  {finding.advice}"]


def verdict_lines(verdict: Verdict, where: str, update_command: str) -> list[str]:
    """Say what a performance gate found: what moved and what moved with it, then the metrics, the worst first.

    :param where: layout, devices and model in one line. :param update_command: what accepts the change.
    """
    order = (Status.REGRESSION, Status.INCONCLUSIVE, Status.IMPROVEMENT, Status.PASS)
    lines = [line for status in order for m in verdict.metrics if m.status is status for line in metric_lines(m)]
    moved = Status.IMPROVEMENT if verdict.status is not Status.REGRESSION else verdict.status
    lines = [f"{moved}: {sentence}" for sentence in verdict.cause[:1]] + lines
    if verdict.status in (Status.INVALID, Status.NO_BASELINE, Status.INCONCLUSIVE):
        lines = [f"{verdict.status}: {reason}" for reason in verdict.reasons] + lines
    else:
        undecided = tuple(f"{metric.name}: " for metric in verdict.metrics)  # their lines above say it
        lines += [f"  {reason}" for reason in verdict.reasons if not reason.startswith(undecided)]
    if verdict.drift:
        lines.insert(0, verdict.drift)
    lines += [f"  {row}" for row in cause_rows(verdict.cause, verdict.changed)]
    if verdict.provisional:
        lines.append(f"  provisional: {verdict.provisional}")
    lines += [f"  {part}" for part in (where, verdict.baseline_path) if part]
    if verdict.status is Status.INVALID:
        lines.append("  nothing was judged or stored: mend the cause and run again")
    elif any(metric.status is not Status.PASS for metric in verdict.metrics):
        lines.append(f"  accept it: {update_command}")
    return lines


def cause_rows(cause: Sequence[str], changed: Sequence[str]) -> list[str]:
    """The table behind the sentence, which names each change; without one, the changes alone."""
    return list(cause[1:]) if cause else [f"changed since the baseline: {change}" for change in changed]


def metric_lines(metric: MetricVerdict) -> list[str]:
    """One metric: value, limit and evidence."""
    unit, better = METRICS[metric.name].unit, METRICS[metric.name].better
    factor = 1 + metric.tolerance if better == "lower" else 1 - metric.tolerance
    sign, word = ("<=", "+") if better == "lower" else (">=", "-")
    confirming = f" and {metric.n_confirming} that confirms" if metric.n_confirming else ""
    return [
        f"{metric.status}: {metric.name} {quantity(metric.current, unit)}, "
        f"allowed {sign} {quantity(metric.baseline * factor, unit)} "
        f"(baseline {quantity(metric.baseline, unit)} {word} {percent_text(metric.tolerance)})",
        f"    change {metric.change:+.1%}, interval {metric.ci[0]:+.1%} to {metric.ci[1]:+.1%}, "
        f"n = {plural(metric.n_current, 'start')} against {metric.n_baseline}{confirming}, "
        f"smallest change that could be seen {metric.min_detectable:.1%}",
    ]


def quantity(value: float, unit: str) -> str:
    """Three significant digits, or all before the point, and the unit."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f} {unit}"


# -- records -----------------------------------------------------------------------------------------------------


def server_record(server: Server) -> Record:
    """What a server is, and proved."""
    return {
        "kind": "server",
        "layout": str(server.spec.layout),
        "model": server.spec.model,
        **_start_document(server),
        "vllm_version": server.proof.vllm_version,
        "binding": server.proof.binding,
        "moe": server.proof.moe,
        "api_servers": server.proof.api_servers,
        "server_info": _info_document(server.proof),
        "nodes": [_node_document(node) for node in server.proof.nodes],
        "proxy": server.proof.proxy,
        "replicas": [{"url": part.endpoint.url, **_start_document(part)} for part in _replicas(server)],
        "attached": server.endpoint.url if server.proof.is_attached else None,
        "proved": [str(statement) for statement in server.proof.statements if statement.is_proved],
        "not_proved": list(server.proof.not_proved),
    }


def _start_document(server: Server) -> Record:
    """What is told of one server as of each of several behind a proxy."""
    proof = server.proof
    return {
        "command": list(server.command),
        "system_fingerprint": proof.fingerprint,
        "start_s": None if proof.start_s is None else round(proof.start_s, 1),
        "rank_pids": {str(rank): pid for rank, pid in sorted(proof.rank_pids.items())},
    }


def _replicas(server: Server) -> Sequence[Server]:
    return server.parts() if server.proof.proxy else ()


def _info_document(proof: ServerProof) -> Record | None:
    """What the server tells of its configuration, as far as it concerns the layout."""
    if proof.info is None:
        return None
    return {"layout": str(proof.info.layout), "executor": proof.info.executor, "all2all": proof.info.all2all}


def _node_document(node: NodeProof) -> Record:
    return {**asdict(node), "ranks": list(node.ranks), "command": list(node.command)}


def naming_nodes(record: Record, proof: ServerProof) -> Record:
    """Return a record on a server with the node of each rank; as it is where all are on one host."""
    if not proof.nodes:
        return record
    return {**record, "nodes": {str(rank): node.name for node in proof.nodes for rank in node.ranks}}


def topology_record(placed: PlacedLayout) -> Record:
    """Which devices a layout runs on, and the links between those that communicate."""
    return {
        "kind": "topology",
        "layout": str(placed.layout),
        "source": placed.topology.source,
        "recorded": placed.topology.recorded,
        "node": placed.node,
        "devices": [
            {"rank": rank, "index": d.index, "name": d.name, "uuid": d.uuid, "cpu_affinity": d.cpu_affinity}
            for rank, d in enumerate(placed.devices, placed.first_rank)
        ],
        "wiring": wiring_document(placed),
        "faults": list(describe_faults(placed.topology)),
        "notes": list(placed.topology.notes),
        "links": [
            {"a": a + placed.first_rank, "b": b + placed.first_rank, "class": None if link is None else str(link)}
            for (a, b), link in zip(placed.pairs, placed.links, strict=True)
        ],
        "worst": worst_link_text(placed),
        "required": str(placed.requirement),
        "ok": not placed.violations,
    }


def processes_record(layout: object, report: OccupancyReport) -> Record:
    """On which GPUs the server's processes compute."""
    return {
        "kind": "processes",
        "layout": str(layout),
        "ok": report.ok,
        "proved_by": report.proved_by,
        "ranks": [_rank_document(rank) for rank in report.ranks],
        "violations": [str(violation) for violation in report.violations],
        "not_proved": list(report.not_proved),
        "remarks": list(report.remarks),
        "summary": report.summary(),
    }


def _rank_document(found: RankOccupancy) -> Record:
    gpu = found.gpu
    process = {"pid": found.pid, "memory_bytes": found.memory_bytes}
    return {"rank": found.rank, "index": gpu.index, "uuid": gpu.uuid, **process}


def transport_record(layout: object, report: TransportReport, violations: Sequence[TransportViolation]) -> Record:
    """What the ranks talk over."""
    return {
        "kind": "transport",
        "layout": str(layout),
        **report.to_document(),
        "summary": report.summary(),
        "violations": [str(violation) for violation in violations],
        "ok": not violations and report.verdict != "no-evidence" and report.gap is None,
    }


def performance_record(
    verdict: Verdict, measurement: Measurement, base: tuple[str, Measurement] | None = None
) -> Record:
    """What was measured, and what was found; ``runs`` are vLLM's own result documents, one per server start.

    :param base: name and measurement of the base in paired mode.
    """
    identity = measurement.identity
    return {
        "kind": "performance",
        "layout": identity.key.layout,
        "workload": measurement.workload.to_document(),
        **_verdict_document(verdict),
        "identity": asdict(identity),
        "runs": [_run_document(measurement, position) for position in range(len(measurement.runs))],
        "base": None if base is None else _base_document(*base),
    }


def collectives_record(
    layout: object, verdict: Verdict, measurement: CollectiveMeasurement, bandwidth: BandwidthReport
) -> Record:
    """What a probe of the links measured, one of ``runs`` per start, and what was found."""
    last = measurement.runs[-1]
    return {
        "kind": "collectives",
        "layout": str(layout),
        "workload": measurement.plan.to_document(),
        "backend": last.backend,
        "transports": dict(last.transports),
        "findings": list(bandwidth.findings),
        "remarks": list(bandwidth.remarks),
        "ok": not bandwidth.findings,
        **_verdict_document(verdict),
        "identity": asdict(measurement.identity),
        "runs": [
            {
                "duration_s": round(run.duration_s, 3),
                "groups": [{"ranks": list(one.ranks), "rounds": list(map(dict, one.rounds))} for one in run.groups],
            }
            for run in measurement.runs
        ],
    }


def _verdict_document(verdict: Verdict) -> Record:
    return {
        "verdict": str(verdict.status),
        "stored": verdict.stored,
        "reasons": list(verdict.reasons),
        "changed": list(verdict.changed),
        "cause": list(verdict.cause),
        "drift": verdict.drift,
        "provisional": verdict.provisional,
        "metrics": [metric_document(metric) for metric in verdict.metrics],
        "advisory": [_advisory_document(row) for row in verdict.advisory],
        "baseline": verdict.baseline_path,
    }


def _base_document(name: str, base: Measurement) -> Record:
    runs = [_run_document(base, position) for position in range(len(base.runs))]
    return {"name": name, "identity": asdict(base.identity), "runs": runs}


def _run_document(measurement: Measurement, position: int) -> Record:
    name = measurement.identity.key.model["name"]
    document = vllm_result(measurement.runs[position], measurement.workload, model=name)
    document["gpulayout"]["problems"] = problem_documents(measurement.problems_of(position))
    document["gpulayout"]["observed"] = dict(measurement.observed()[position])
    return document


def problem_documents(problems: Iterable[Problem]) -> list[Record]:
    """``[{"kind": "client-bound", "text": "..."}]``."""
    return [{"kind": problem.kind, "text": problem.text} for problem in problems]


def metric_document(metric: MetricVerdict) -> Record:
    """A judged metric with the keys of ``gpulayout compare --json`` and more."""
    return {
        "name": metric.name,
        "unit": METRICS[metric.name].unit,
        "verdict": str(metric.status),
        "baseline": metric.baseline,
        "current": metric.current,
        "change": metric.change,
        "ci": list(metric.ci),
        "tolerance": metric.tolerance,
        "min_detectable": metric.min_detectable,
        "n_current": metric.n_current,
        "n_baseline": metric.n_baseline,
    }


def _advisory_document(row: AdvisoryChange) -> Record:
    return {
        "name": row.name,
        "unit": METRICS[row.name].unit,
        "verdict": None,
        "baseline": row.baseline,
        "current": row.current,
        "change": row.change,
    }


def results_document(records: Iterable[tuple[str, Record]], *, created: str, platform: str, version: str) -> Record:
    """Gather all records of a run. :param records: (test id, record), in the order they were made."""
    return {
        "schema_version": RESULTS_SCHEMA_VERSION,
        "created": created,
        "pytest_gpulayout": version,
        "platform": platform,
        "records": [{"test": test, **record} for test, record in records],
    }


# -- summary -----------------------------------------------------------------------------------------------------


def summary_lines(records: Sequence[tuple[str, Record]]) -> list[str]:
    """The table at the end: a block per layout with links, transport, server, and every metric."""
    layouts = dict.fromkeys(record["layout"] for _, record in records)
    lines: list[str] = []
    for layout in layouts:
        of_layout = [(test, record) for test, record in records if record["layout"] == layout]
        lines += _layout_block(layout, of_layout)
    return lines


def _layout_block(layout: str, records: Sequence[tuple[str, Record]]) -> list[str]:
    last = {record["kind"]: record for _, record in records}
    facts = []
    topologies = {record.get("node", ""): record for _, record in records if record["kind"] == "topology"}
    for node, topology in topologies.items():
        recorded = f" (recorded in {topology['source']})" if topology["recorded"] else ""
        facts.append(f"{_of_node(node)}worst link {topology['worst']}{recorded}{_flag(topology)}")
    if transport := last.get("transport"):
        facts.append(f"transport {transport['summary']}{_flag(transport)}")
    if server := last.get("server"):
        facts.append(f"vLLM {server['vllm_version']}, {_came_from(server)}")
        if nodes := server.get("nodes"):
            facts.append(f"on {len(nodes)} nodes: {', '.join(node['name'] for node in nodes)}")
        if server["replicas"]:
            facts.append(f"{len(server['replicas'])} replicas behind {server['proxy']}")
    lines = [f"{layout}: {', '.join(facts)}".rstrip()]
    for node, topology in topologies.items():
        lines += [f"  {_of_node(node)}{sentence}" for sentence in (*topology["faults"], *topology["notes"])]
    if transport and transport["summary"] != NONE_NEEDED:
        lines += [f"  {finding['cause']}: {finding['advice']}" for finding in transport["findings"]]
    if server:
        lines += [f"  not proved: {sentence}" for sentence in server.get("not_proved", [])]
    if processes := last.get("processes"):
        lines.append(f"  processes: {processes['summary']}{_flag(processes)}")
        lines += [f"    not proved: {sentence}" for sentence in processes["not_proved"]]
        lines += [f"    {remark}" for remark in processes["remarks"]]
    for test, record in records:
        if record["kind"] in ("performance", "collectives"):
            lines += _performance_table(test, record)
        elif record["kind"] == "better-than":
            more = f"; {record['what_it_takes']}" if record["what_it_takes"] else ""
            lines.append(f"  {record['text']}{more}  [{test}]")
    return lines


def _of_node(name: str) -> str:
    """``"node a: "``, nothing on one host."""
    return f"node {name}: " if name else ""


def _came_from(server: Record) -> str:
    """How long it took to start, or where it already ran."""
    return f"attached at {server['attached']}" if server.get("attached") else f"ready in {server['start_s']:.0f} s"


def _flag(record: Record) -> str:
    return "" if record["ok"] else " FAILED"


def _performance_table(test: str, record: Record) -> list[str]:
    title = f"  {record['workload']['name']}: {record['stored'] or record['verdict']}, "
    noun = "probe start" if record["kind"] == "collectives" else "server start"
    title += plural(len(record["runs"]), noun)
    if base := record.get("base"):
        title += f" against {len(base['runs'])} of base {base['name']}"
    title += f"  [{test}]"
    rows = [("metric", "value", "baseline", "change", "verdict")]
    rows += [_row(metric, record["stored"]) for metric in [*record["metrics"], *record["advisory"]]]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    cause = record.get("cause", [])
    first = [*([record["drift"]] if record.get("drift") else []), *cause[:1], *_seen(record)]
    lines = [title, *(f"    {line}" for line in first)]
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [row[column].rjust(widths[column]) for column in (1, 2, 3)]
        lines.append("    " + "  ".join([*cells, row[4]]).rstrip())
    if record["metrics"]:
        lines += [f"    {row}" for row in cause_rows(cause, record["changed"])]
    lines += [f"    {reason}" for reason in record["reasons"]]
    return lines


def _seen(record: Record) -> list[str]:
    """What stands between the verdict and its numbers."""
    if record["kind"] == "collectives":
        return [_links_text(record), *record["findings"], *record["remarks"]]
    return _seen_in_last(record["runs"])


def _links_text(record: Record) -> str:
    """``nccl 2.27.5 of torch 2.9.0 over P2P/CUMEM, hidden size 4096 (the config.json of org/model), bfloat16``."""
    plan = record["workload"]
    over = f" over {', '.join(sorted(record['transports']))}" if record["transports"] else ""
    return f"{record['backend']}{over}, hidden size {plan['hidden_size']} ({plan['origin']}), {plan['dtype']}"


def _seen_in_last(runs: Sequence[Record]) -> list[str]:
    """A line each on how the devices fared and where TTFT went, where somebody looked."""
    own = runs[-1]["gpulayout"] if runs else {}
    telemetry, server = own.get("telemetry"), own.get("server")
    lines = [telemetry["summary"]] if telemetry else []
    if server and server.get("replica_shares"):
        lines.append(shares_text([share["requests"] for share in server["replica_shares"]]))
    if server and server["mean_ttft_split_ms"]:
        lines.append(ttft_split_text(server["mean_ttft_split_ms"]))
    return lines


def _row(metric: Mapping[str, Any], stored: str) -> tuple[str, str, str, str, str]:
    baseline = "-" if metric["baseline"] is None else quantity(metric["baseline"], metric["unit"])
    change = "-" if metric["change"] is None else f"{metric['change']:+.1%}"
    verdict = metric["verdict"] or stored or "not gated"
    return metric["name"], quantity(metric["current"], metric["unit"]), baseline, change, verdict


def _device_pairs(placed: PlacedLayout) -> tuple[tuple[int, int], ...]:
    return tuple((placed.placement[a], placed.placement[b]) for a, b in placed.pairs)
