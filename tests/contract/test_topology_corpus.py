from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.errors import TopologyFormatError
from pytest_gpulayout.topology import Topology
from pytest_gpulayout.topology_text import parse_topology_text

CORPUS = Path(os.environ.get("GPULAYOUT_CORPUS") or Path(__file__).parents[2] / "../shared/corpus") / "topo"
CASES = sorted(path.parent.name for path in CORPUS.glob("*/topo.txt"))
ANSI = re.compile(r"\x1b\[[0-9;]*m")

needs_corpus = pytest.mark.skipif(
    not CASES, reason="no corpus of recorded listings here: set GPULAYOUT_CORPUS to its folder"
)


def read(case: str) -> tuple[str, dict[str, Any]]:
    text = (CORPUS / case / "topo.txt").read_text(encoding="utf-8")
    expected: dict[str, Any] = json.loads((CORPUS / case / "meta.json").read_text())["expected"]
    return text, expected


def links_of(topology: Topology) -> dict[str, str]:
    return {f"{a}-{b}": str(link) for (a, b), link in topology.links.items()}


@needs_corpus
@pytest.mark.parametrize("case", CASES)
def test_reads_listing(case: str) -> None:
    text, expected = read(case)
    if "error" in expected:
        with pytest.raises(TopologyFormatError, match="expected"):
            parse_topology_text(text, case)
        return
    topology = parse_topology_text(text, case)
    assert len(topology.devices) == expected["gpus"]
    assert topology.recorded
    assert topology.platform == ("rocm" if expected.get("vendor") == "amd" else "cuda")
    if expected.get("kind") == "p2p":
        assert {f"{p.a}-{p.b}": p.status for p in topology.p2p} == expected["status"]
        # Two listings came without their command, which alone names the capability.
        letters = {p.capability for p in topology.p2p}
        assert letters == {expected["capability"] if "topo -p2p" in text else None}
        return
    assert links_of(topology) == expected["links"]
    check_columns(topology, expected)


def check_columns(topology: Topology, expected: dict[str, Any]) -> None:
    if "worst" in expected:
        worst = topology.worst()
        assert (None if worst is None else str(worst)) == expected["worst"]
    if "all_nvlink" in expected:
        assert topology.all_nvlink == expected["all_nvlink"]
    if "all_xgmi" in expected:
        assert expected["all_xgmi"] == (set(links_of(topology).values()) == {"XGMI"})
    if "numa" in expected:
        numa = {str(device.index): device.numa_node for device in topology.devices}
        assert numa == (expected["numa"] or dict.fromkeys(numa))
    if "cpu_affinity" in expected:
        affinity = {str(device.index): device.cpu_affinity for device in topology.devices}
        assert affinity == expected["cpu_affinity"]
    if "gpu_numa_id" in expected:
        assert {str(device.index): device.gpu_numa_id for device in topology.devices} == expected["gpu_numa_id"]


@needs_corpus
@pytest.mark.parametrize("case", CASES)
def test_reads_the_same_inside_another_log(case: str) -> None:
    text, expected = read(case)
    if "error" in expected:
        pytest.skip("a listing that is refused")
    plain = parse_topology_text(text, case)
    windows = text.replace("\n", "\r\n")
    assert parse_topology_text(f"starting rank 0 on GPU0\r\n{windows}\r\nGPU0 is ready\r\n", case) == plain


@needs_corpus
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [80, 100, 132])
@pytest.mark.parametrize("cut", [False, True], ids=["blanks kept", "blanks cut"])
def test_reads_the_same_in_a_narrow_terminal(case: str, width: int, cut: bool) -> None:
    text, expected = read(case)
    if "error" in expected or text.startswith("|"):
        pytest.skip("a listing that is refused, or in Markdown, which no terminal shows")
    parts = [
        line[at : at + width]
        for line in ANSI.sub("", text).expandtabs(8).splitlines()
        for at in range(0, max(len(line), 1), width)
    ]
    wrapped = "\n".join(part.rstrip() if cut else part for part in parts)
    assert parse_topology_text(wrapped, case) == parse_topology_text(text, case)
