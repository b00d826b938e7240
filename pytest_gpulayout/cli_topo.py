"""``gpulayout topo``: links between GPUs, the worst of them, the best placement."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import combinations
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.cli_common import (
    FAILED,
    FINE,
    MISUSE,
    Outcome,
    as_layout,
    as_requirement,
    command,
    read_topology,
    typed,
)

if TYPE_CHECKING:
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.links import LinkRequirement
    from pytest_gpulayout.topology import Topology

_MOST_FAILURES = 10


def declare_topo(commands: Any) -> None:
    """Declare the subcommand."""
    parser = command(
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
    parser.add_argument("--layout", type=typed(as_layout), metavar="SPEC", help="find the best GPUs for this layout")
    parser.add_argument(
        "--require",
        type=typed(as_requirement),
        metavar="REQ",
        help="fail when a link (of the layout, or any) is worse: nvlink, nv4, pix, pxb, phb, node, any",
    )


def _topo(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.topology_document import topology_to_document

    topology = read_topology(arguments.source, "look at a recorded topology: gpulayout topo --from FILE")
    layout, requirement = arguments.layout, arguments.require
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
