"""The command ``gpulayout``: each part of the plugin on its own, without pytest.

Each subcommand returns an :class:`Outcome`; :func:`main` alone prints and turns errors into exit codes. Imports that
cost time happen in the subcommand that needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_gpulayout.errors import GpuLayoutError

if TYPE_CHECKING:
    from pytest_gpulayout.baseline import Baseline
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.links import LinkRequirement
    from pytest_gpulayout.nccl_log import Communicator
    from pytest_gpulayout.ports import BaselineStore, Endpoint
    from pytest_gpulayout.topology import Topology
    from pytest_gpulayout.trace import RunTrace
    from pytest_gpulayout.transport import TransportReport
    from pytest_gpulayout.verdict import Verdict
    from pytest_gpulayout.workload import Workload

T = TypeVar("T")

FINE, FAILED, MISUSE, UNDECIDED = 0, 1, 2, 3
_INTERRUPTED = 130
_MOST_COMMUNICATORS, _MOST_PAIRS = 16, 128
_MOST_FAILURES = 10

_EXIT_CODES = "exit codes: 0 fine, 1 the check failed, 2 misuse or unreadable input"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a subcommand found.

    :param document: for ``--json``. :param lines: for people. :param complaints: for standard error, in both cases.
    """

    code: int
    document: Any
    lines: Sequence[str]
    complaints: Sequence[str] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. :param argv: arguments without the program's name."""
    arguments = _parser().parse_args(argv)
    try:
        outcome: Outcome = arguments.run(arguments)
    except GpuLayoutError as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"a file could not be read or written: {error}")
    except KeyboardInterrupt:
        return _INTERRUPTED
    text = json.dumps(outcome.document, indent=1) if arguments.json else "\n".join(outcome.lines)
    _write(text)
    for complaint in outcome.complaints:
        print(complaint, file=sys.stderr)
    return outcome.code


def _complain(message: str) -> int:
    print(f"gpulayout: {message}", file=sys.stderr)
    return MISUSE


def _write(text: str) -> None:
    """Print; a reader that has gone (``| head``) is no error, and the exit code stays that of the check."""
    try:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -- arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpulayout",
        description="Look at GPU links, NCCL logs, a server's speed and stored baselines, as the pytest plugin does.",
        epilog=_EXIT_CODES,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for declare in (_declare_topo, _declare_nccl, _declare_measure, _declare_compare, _declare_baseline):
        declare(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[..., Outcome], text: str, *examples: str) -> Any:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["examples:", *(f"  {example}" for example in examples), "", _EXIT_CODES]),
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)
    return parser


def _typed(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Make a parser of ours an argparse type: its message is shown as it is."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except (GpuLayoutError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _layout(text: str) -> Layout:
    from pytest_gpulayout.layout import parse_layout

    return parse_layout(text)


def _requirement(text: str) -> LinkRequirement:
    from pytest_gpulayout.links import parse_requirement

    return parse_requirement(text)


def _count(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise ValueError(f"a whole number above 0 was expected, found {text!r}")
    return number


# -- topo ------------------------------------------------------------------------------------------------------------


def _declare_topo(commands: Any) -> None:
    parser = _command(
        commands,
        "topo",
        _topo,
        "show the links between GPUs, the worst of them, and the best placement of a layout",
        "gpulayout topo",
        "gpulayout topo --json > topology.json",
        "nvidia-smi topo -m | gpulayout topo --from - --layout tp2 --require nvlink",
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FILE",
        help="a recorded topology (JSON, or the text of nvidia-smi topo -m), - for standard input; default: NVML",
    )
    parser.add_argument("--layout", type=_typed(_layout), metavar="SPEC", help="find the best GPUs for this layout")
    parser.add_argument(
        "--require",
        type=_typed(_requirement),
        metavar="REQ",
        help="fail when a link (of the layout, or any) is worse: nvlink, nv4, pix, pxb, phb, node, any",
    )


def _topo(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.topology_document import topology_to_document

    topology, layout, requirement = _topology(arguments.source), arguments.layout, arguments.require
    placement, failures = _placement(topology, layout, requirement)
    if requirement is not None and not failures:
        failures = _check(topology, layout, placement, requirement)
    pairs = layout.node_pairs() if placement is not None else ()
    document = topology_to_document(topology, placement, pairs)
    lines = _topology_lines(topology, layout, placement)
    known = placement is not None and (not pairs or document["placement"]["worst"] is not None)
    if unsettled := _unsettled(topology, proved=requirement is not None and not failures and known):
        return Outcome(MISUSE, document, lines, unsettled)
    return Outcome(FAILED if failures else FINE, document, lines, failures)


def _topology(source: str | None) -> Topology:
    from pytest_gpulayout.errors import TopologyError

    if source is not None:
        from pytest_gpulayout.adapters.recorded_topology import RecordedTopology

        return RecordedTopology("/dev/stdin" if source == "-" else source).probe()
    from pytest_gpulayout.adapters.nvml import NvmlTopology

    try:
        return NvmlTopology().probe()
    except TopologyError as error:
        raise TopologyError(f"{error}\n  or look at a recorded topology: gpulayout topo --from FILE") from error


def _placement(
    topology: Topology, layout: Layout | None, requirement: LinkRequirement | None
) -> tuple[tuple[int, ...] | None, list[str]]:
    """The best placement; a layout that does not fit is a check that failed, for the listing itself is fine."""
    from pytest_gpulayout.errors import TopologyError
    from pytest_gpulayout.placement import choose_placement

    if layout is None:
        return None, []
    try:
        return choose_placement(topology, layout, requirement=requirement), []
    except TopologyError as error:
        return None, [f"failed: {error}"]


def _check(
    topology: Topology, layout: Layout | None, placement: tuple[int, ...] | None, requirement: LinkRequirement
) -> list[str]:
    """What is not as required: of the layout, or of the whole machine where none is given; and what would pass."""
    from pytest_gpulayout.topology import check_links

    if layout is None or placement is None:
        failures, size = _node_failures(topology, requirement), len(topology.devices)
    else:
        failures = [str(v) for v in check_links(topology, placement, layout.node_pairs(), requirement)]
        size = layout.gpus_per_node
    if not failures:
        return []
    more = len(failures) - _MOST_FAILURES
    return [
        *(f"failed: {failure}" for failure in failures[:_MOST_FAILURES]),
        *([f"  and {more} more"] if more > 0 else []),
        f"  {'recorded in' if topology.recorded else 'from'} {topology.source}",
        f"  {_what_would_pass(topology, requirement, size)}",
    ]


def _node_failures(topology: Topology, requirement: LinkRequirement) -> list[str]:
    """GPUs that cannot be used, too few of them for a link, and links that are not good enough."""
    from pytest_gpulayout.topology import check_links, why_unusable

    usable = [device.index for device in topology.usable]
    failures = [f"GPU {d.index} cannot be used: {why_unusable(d)}" for d in topology.devices if not d.is_usable]
    if len(usable) < 2 and requirement.least is not None:
        found = ("one GPU" if usable else "no GPU") + " that can be used" * bool(failures or not usable)
        failures.append(f"a link to check was required, found {found}")
    violations = check_links(topology, usable, combinations(range(len(usable)), 2), requirement)
    return failures + [f"GPUs {v.device_a} and {v.device_b}: {str(v).partition('): ')[2]}" for v in violations]


def _what_would_pass(topology: Topology, requirement: LinkRequirement, fewer_than: int) -> str:
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.placement import satisfying_placement

    sizes = [2**i for i in range(1, fewer_than.bit_length()) if 2**i < fewer_than]
    for size in reversed(sizes):
        if placement := satisfying_placement(topology, Layout(tp=size), requirement):
            return f"--layout tp{size} --require {requirement} would pass, on GPUs {', '.join(map(str, placement))}"
    if requirement.least is None:
        return "with --layout SPEC only the GPUs of the layout are checked"
    return f"no {'smaller ' * bool(sizes)}layout with links satisfies {requirement}; --require any accepts every link"


def _unsettled(topology: Topology, *, proved: bool) -> list[str]:
    """What to say where links are open. A recording must show them; of a driver that answers, it is one of its facts.

    :param proved: links that are known are enough for what was asked.
    """
    from pytest_gpulayout.topology_faults import name_pairs

    sound = sorted(device.index for device in topology.devices if device.fault is None)
    unknown = [pair for pair in combinations(sound, 2) if topology.link(*pair) is None]
    settled = (proved or not topology.recorded) if topology.links else bool(topology.p2p)
    if not unknown or settled:
        return []
    required, found = "links", f"{len(topology.devices)} GPUs"
    if topology.links:
        required, found = "every link", name_pairs(unknown, topology.pairs)
    return [
        f"gpulayout: a listing that shows {required} was required, found none between {found}",
        f"  in {topology.source}",
        "  record it again: nvidia-smi topo -m > topo.txt, or gpulayout topo --json > topo.json",
    ]


def _topology_lines(topology: Topology, layout: Layout | None, placement: tuple[int, ...] | None) -> list[str]:
    from pytest_gpulayout.topology_table import colour_links, placement_line, topology_lines

    lines = list(topology_lines(topology))
    if layout is not None:
        not_possible = f"best placement of {layout}: not possible on this machine"
        lines.append(not_possible if placement is None else placement_line(topology, layout, placement))
    return [colour_links(line) for line in lines] if _in_colour() else lines


def _in_colour() -> bool:
    """Decide as pytest does: ``NO_COLOR``, then ``FORCE_COLOR``, then whether a terminal shows it."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and os.environ.get("TERM") != "dumb")


# -- nccl ------------------------------------------------------------------------------------------------------------


def _declare_nccl(commands: Any) -> None:
    parser = _command(
        commands,
        "nccl",
        _nccl,
        "say what the NCCL logs of one server prove about its transports",
        "gpulayout nccl /tmp/nccl.*.log",
        "kubectl logs server-0 | gpulayout nccl - --layout tp4 --json",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="logs of all its processes; - is standard input")
    parser.add_argument(
        "--layout", type=_typed(_layout), metavar="SPEC", help="what runs: then every group of it must be connected"
    )


def _nccl(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.nccl_log import merge, parse_nccl_log
    from pytest_gpulayout.transport_nccl import judge_nccl

    log = merge(parse_nccl_log(_chunks(name), name) for name in arguments.files)
    report = judge_nccl(log, arguments.layout)
    code = FAILED if report.verdict in ("socket", "no-evidence") else FINE
    communicators = [item for item in log.communicators if item.edges]
    document = {**report.to_document(), "communicators": [_communicator_document(item) for item in communicators]}
    return Outcome(code, document, list(_transport_lines(report, communicators)))


def _communicator_document(communicator: Communicator) -> dict[str, Any]:
    """Ranks are the communicator's own; ``key`` is null where channels could not be attributed to one."""
    return {
        "key": communicator.key,
        "nranks": communicator.nranks,
        "hosts": sorted({process[0] for process in communicator.processes}),
        "edges": [
            {"src": src, "dst": dst, "transports": list(counts), "channels": sum(counts.values())}
            for (src, dst), counts in sorted(communicator.edges.items())
        ],
    }


def _chunks(name: str) -> Iterator[bytes]:
    from pytest_gpulayout.evidence import chunks

    if name == "-":
        yield from chunks(sys.stdin.buffer)
        return
    with open(name, "rb") as file:
        yield from chunks(file)


def _transport_lines(report: TransportReport, communicators: Sequence[Communicator]) -> Iterator[str]:
    from pytest_gpulayout.report import aligned, finding_lines

    yield f"verdict: {report.verdict}"
    yield f"transports: {report.summary()}"
    for communicator in communicators[:_MOST_COMMUNICATORS]:
        if len(communicators) > 1:
            yield f"communicator {communicator.key or 'not named'}, {communicator.nranks or 'some'} ranks"
        rows = [
            (f"{src} -> {dst}", transport, str(channels))
            for (src, dst), counts in sorted(communicator.edges.items())
            for transport, channels in counts.items()
        ]
        yield from aligned([("ranks", "transport", "channels"), *rows[:_MOST_PAIRS]])
        if len(rows) > _MOST_PAIRS:
            yield f"... and {len(rows) - _MOST_PAIRS} more pairs: --json has all"
    if len(communicators) > _MOST_COMMUNICATORS:
        yield f"... and {len(communicators) - _MOST_COMMUNICATORS} more communicators: --json has all"
    yield f"network chosen: {report.network or 'not said'}"
    yield f"NCCL: {report.nccl_version or 'not said'}"
    for finding in report.findings:
        cause, *rest = finding_lines(finding)
        yield from (f"finding: {cause}", *rest)


# -- measure ---------------------------------------------------------------------------------------------------------


def _declare_measure(commands: Any) -> None:
    parser = _command(
        commands,
        "measure",
        _measure,
        "send a load to a running server and say how fast it answers",
        "gpulayout measure --url http://127.0.0.1:8000 --model Qwen/Qwen3-8B \\",
        "    --concurrency 8 --requests 64 --input-tokens 512 --output-tokens 128 --save result.json",
        "gpulayout measure ... --api-key-env VLLM_API_KEY",
    )
    parser.add_argument("--url", required=True, help="of the server, without /v1")
    parser.add_argument("--model", required=True, metavar="M", help="name that the server serves the model under")
    parser.add_argument(
        "--concurrency", type=_typed(_count), default=1, metavar="N", help="requests in flight (default: 1)"
    )
    parser.add_argument("--requests", type=_typed(_count), required=True, metavar="N", help="requests of one batch")
    parser.add_argument("--input-tokens", type=_typed(_count), required=True, metavar="N", help="of each prompt")
    parser.add_argument("--output-tokens", type=_typed(_count), required=True, metavar="N", help="of each answer")
    parser.add_argument("--batches", type=_typed(_count), default=1, metavar="N", help="batches (default: 1)")
    parser.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable that holds the key; keys are not taken as text"
    )
    parser.add_argument(
        "--save", metavar="FILE", help="write the result, with the keys of vllm bench serve --save-result"
    )


def _measure(arguments: argparse.Namespace) -> Outcome:
    import secrets

    from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
    from pytest_gpulayout.metrics import batch_metrics, vllm_result
    from pytest_gpulayout.ports import Endpoint
    from pytest_gpulayout.workload import workload_from_mapping

    names = ("input_tokens", "output_tokens", "concurrency", "requests", "batches")
    workload = workload_from_mapping({name: getattr(arguments, name) for name in names})
    url = arguments.url.rstrip("/").removesuffix("/v1")
    endpoint = Endpoint(url, arguments.model, _api_key(arguments.api_key_env))
    if arguments.save is not None:
        _check_writable(arguments.save)
    run = OpenAiStreamDriver().run(endpoint, workload, seed=secrets.randbits(48), progress=_progress())
    document = vllm_result(run, workload, model=arguments.model)
    if arguments.save is not None:
        with open(arguments.save, "w", encoding="utf-8") as file:
            file.write(json.dumps(document) + "\n")
    lines = _measure_lines(run, workload, endpoint, batch_metrics(run))
    return Outcome(FAILED if run.failed else FINE, document, list(lines))


def _check_writable(path: str) -> None:
    """Tell before the load, and not after it, that the result cannot be kept."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise GpuLayoutError(
            f"a file that can be written was required for the result, found {path}\n"
            f"  in --save\n  name a file in a folder that exists and can be written to"
        )


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise GpuLayoutError(
            f"an API key was required in the environment variable {variable}, found none\n"
            f"  in --api-key-env={variable}\n  set it: export {variable}=..., or leave the option out"
        )
    return key


def _progress() -> Callable[[str], None]:
    """Rewrite one line of a terminal; say nothing where standard error is none."""
    if not sys.stderr.isatty():
        return lambda _text: None
    return lambda text: print(f"\r\x1b[K{text}\r", end="", file=sys.stderr, flush=True)


def _measure_lines(
    run: RunTrace, workload: Workload, endpoint: Endpoint, batches: Sequence[dict[str, float]]
) -> Iterator[str]:
    from pytest_gpulayout.metrics import METRICS
    from pytest_gpulayout.report import aligned, plural, quantity
    from pytest_gpulayout.stats import median

    yield f"{endpoint.model} at {endpoint.url}"
    yield (
        f"{plural(len(run.requests), 'request')}, {workload.concurrency} at a time, "
        f"{workload.input_tokens} tokens in, {workload.output_tokens} out"
    )
    rows: list[Sequence[str]] = [("metric", "median of batches", "lowest", "highest")]
    for name, metric in METRICS.items():
        if values := [batch[name] for batch in batches if name in batch]:
            rows.append((name, *(quantity(f(values), metric.unit) for f in (median, min, max))))
    yield from aligned(rows)
    if run.failed:
        yield f"{len(run.failed)} of {len(run.requests)} requests failed; the first: {run.failed[0].error}"


# -- compare ---------------------------------------------------------------------------------------------------------


def _declare_compare(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        _compare,
        "judge measurements of --gpu-results against a baseline; exit code 3 is inconclusive",
        "gpulayout compare gpu-baselines/Qwen3-8B/tp2/2x-NVIDIA-H200-NV18-d03fc2a1/smoke.json results.json",
        "gpulayout compare BASELINE.json MEASUREMENT.json --tolerance median_ttft_ms=10% --json",
    )
    parser.add_argument("baseline", metavar="BASELINE.json", help="a baseline document")
    parser.add_argument("measurement", metavar="MEASUREMENT.json", help="results with a measurement of the same key")
    parser.add_argument(
        "--tolerance", type=_typed(_tolerances), default="", metavar="METRIC=5%,...", help="as --gpu-tolerance"
    )


def _tolerances(text: str) -> object:
    from pytest_gpulayout.tolerance import parse_tolerances

    return parse_tolerances(text)


def _compare(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.report import metric_document, verdict_lines
    from pytest_gpulayout.verdict import Status

    verdict = _judge_files(arguments)
    document = {
        "verdict": str(verdict.status),
        "metrics": [metric_document(metric) for metric in verdict.metrics],
        "reasons": list(verdict.reasons),
        "changed": list(verdict.changed),
        "provisional": verdict.provisional,
    }
    code = FINE if verdict.status.passed else UNDECIDED if verdict.status is Status.INCONCLUSIVE else FAILED
    lines = verdict_lines(verdict, arguments.measurement, "record it again with pytest --gpu-baseline=update")
    notes = [f"  {reason}" for reason in verdict.reasons if f"{verdict.status}: {reason}" not in lines]
    return Outcome(code, document, [f"verdict: {verdict.status}", *lines, *notes])


def _judge_files(arguments: argparse.Namespace) -> Verdict:
    """A side that is missing, or is not the document it should be, is a verdict here and not an error."""
    from pytest_gpulayout.baseline import baseline_from_text
    from pytest_gpulayout.errors import BaselineError, MeasurementError
    from pytest_gpulayout.gate import judge_recorded
    from pytest_gpulayout.results import measurements_from_text
    from pytest_gpulayout.verdict import Status, Verdict

    place = arguments.baseline
    baseline_text, results_text = _text(place), _text(arguments.measurement)
    if baseline_text is None:
        reason = f"a stored baseline was required, and there is none in {place}"
        return Verdict(Status.NO_BASELINE, reasons=(reason,), baseline_path=place)
    if results_text is None:
        reason = f"results with a measurement were required, and there are none in {arguments.measurement}"
        return Verdict(Status.INVALID, reasons=(reason,), baseline_path=place)
    try:
        baseline = baseline_from_text(baseline_text, place)
        measurements = measurements_from_text(results_text, arguments.measurement)
    except (BaselineError, MeasurementError) as error:
        return Verdict(Status.INVALID, reasons=(str(error),), baseline_path=place)
    return judge_recorded(measurements, baseline, arguments.tolerance, place=place)


def _text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise GpuLayoutError(
            f"a JSON document was required, found bytes that are no UTF-8: {error.reason}\n  in {path}\n"
            "  name a baseline, or results of --gpu-results"
        ) from error


# -- baseline --------------------------------------------------------------------------------------------------------


def _declare_baseline(commands: Any) -> None:
    parser = commands.add_parser("baseline", help="look after stored baselines")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = _command(
        verbs,
        "list",
        _baseline_list,
        "list the stored baselines",
        "gpulayout baseline list --dir s3://bucket/baselines",
    )
    show = _command(
        verbs,
        "show",
        _baseline_show,
        "show one stored baseline: its key, its sessions and the spread between starts",
        "gpulayout baseline show Qwen3-8B/tp2/2x-NVIDIA-H200-NV18-d03fc2a1/smoke.json",
    )
    show.add_argument("path", metavar="PATH", help="as gpulayout baseline list prints it")
    for verb in (listing, show):
        verb.add_argument(
            "--dir",
            default="gpu-baselines",
            metavar="DIR_OR_URL",
            help="where they are (default: gpu-baselines in the current folder)",
        )


def _baseline_list(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.adapters.baseline_files import open_baselines
    from pytest_gpulayout.errors import BaselineError
    from pytest_gpulayout.report import aligned

    store = open_baselines(arguments.dir)
    entries, faults = [], []
    for path in store.paths():
        try:
            baseline = _read_baseline(store, path)
        except BaselineError as error:
            faults.append(str(error))
            continue
        entries.append(
            {
                "path": path,
                "sessions": len(baseline.sessions),
                "starts": sum(len(session.runs) for session in baseline.sessions),
                "recorded": baseline.sessions[-1].recorded,
            }
        )
    lines = list(aligned([("sessions", "starts", "last recorded", "path"), *map(_entry_row, entries)]))
    if not entries and not faults:
        lines = [f"no baseline in {store.root}; record one: pytest --gpu-layout=SPEC --gpu-baseline=new"]
    return Outcome(MISUSE if faults else FINE, {"root": store.root, "baselines": entries}, lines, faults)


def _entry_row(entry: dict[str, Any]) -> tuple[str, ...]:
    return str(entry["sessions"]), str(entry["starts"]), entry["recorded"], entry["path"]


def _read_baseline(store: BaselineStore, path: str) -> Baseline:
    from pytest_gpulayout.baseline import baseline_from_text
    from pytest_gpulayout.errors import BaselineNotFound

    text = store.read(path)
    place = f"{store.root.rstrip('/')}/{path}"
    if text is None:
        raise BaselineNotFound(
            f"a stored baseline was required, and there is none\n  expected in {place}\n"
            f"  see what there is: gpulayout baseline list --dir {store.root}",
            path=place,
        )
    return baseline_from_text(text, place)


def _baseline_show(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.adapters.baseline_files import open_baselines
    from pytest_gpulayout.baseline import baseline_to_text

    baseline = _read_baseline(open_baselines(arguments.dir), arguments.path)
    return Outcome(FINE, json.loads(baseline_to_text(baseline)), list(_baseline_lines(baseline)))


def _baseline_lines(baseline: Baseline) -> Iterator[str]:
    from pytest_gpulayout.report import aligned

    key = baseline.key
    for title, part in (("model", key.model), ("hardware", key.hardware), ("workload", key.workload)):
        yield f"{title}: " + ", ".join(
            f"{name} {value}" for name, value in part.items() if value not in (None, "", [])
        )
    yield f"layout: {key.layout}, protocol {key.protocol}"
    for session in baseline.sessions:
        facts = {**session.epoch, **session.sut, **session.covariates}
        yield f"session {session.recorded}: {len(session.runs)} starts of {session.runs[0].requests} requests"
        yield "  " + ", ".join(f"{name} {value}" for name, value in facts.items() if value not in (None, ""))
    yield from aligned([("metric", "median of starts", "lowest", "highest", "starts"), *_metric_rows(baseline)])


def _metric_rows(baseline: Baseline) -> Iterator[tuple[str, ...]]:
    from pytest_gpulayout.metrics import METRICS
    from pytest_gpulayout.report import quantity
    from pytest_gpulayout.stats import median

    names = dict.fromkeys(name for session in baseline.sessions for run in session.runs for name in run.metrics)
    for name in names:
        unit = METRICS[name].unit if name in METRICS else ""
        values = [sample.value for session in baseline.samples(name) for sample in session]
        yield name, *(quantity(f(values), unit) for f in (median, min, max)), str(len(values))
