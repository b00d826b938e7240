from __future__ import annotations

import re
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpulayout.errors import TopologyFormatError
from pytest_gpulayout.topology import Topology
from pytest_gpulayout.topology_text import parse_topology_text
from pytest_gpulayout.topology_text_rows import split_lines
from pytest_gpulayout.topology_text_wrap import unwrapped

NAMES = [*(f"GPU{i}" for i in range(8)), "NIC0", "NIC1"]
AFFINITIES = "CPU Affinity\tNUMA Affinity\tGPU NUMA ID"


def cell(a: int, b: int) -> str:
    classes = ["NV18", "NV18", "NODE", "SYS"] if max(a, b) > 7 else ["NV12", "NV4", "PHB", "NV1"]
    return " X " if a == b else classes[(a * b + a + b) % 4]


def row(a: int) -> str:
    cells = "\t".join([NAMES[a], *(cell(a, b) for b in range(len(NAMES)))])
    return cells + (
        f"\t{16 * a}-{16 * a + 7},{16 * a + 128}-{16 * a + 135}\t{a // 4}\t\tN/A" if a < 8 else "\t\t\t\t"
    )


LISTING = (
    "\n".join(["\t" + "\t".join([*NAMES, AFFINITIES]), *map(row, range(len(NAMES)))]) + "\n\nLegend:\n\n  X = Self\n"
)


def read(text: str) -> Topology:
    return parse_topology_text(text, "topo.txt")


def hard(text: str, width: int) -> str:
    """As a terminal of this width shows it."""
    return re.sub(rf"(.{{{width}}})(?=.)", r"\1\n", text)


def soft(text: str, width: int) -> str:
    """As a mail program breaks it, at blanks."""
    wrap = textwrap.TextWrapper(width, expand_tabs=False, break_long_words=False, break_on_hyphens=False).wrap
    return "".join("\n".join(wrap(line)) + "\n" for line in text.splitlines())


def without_blanks_at_ends(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


@pytest.mark.parametrize("width", [40, 71, 72, 79, 80, 81, 96, 100, 101, 120, 132])
@pytest.mark.parametrize(
    "broken",
    [
        lambda width: hard(LISTING.expandtabs(8), width),
        lambda width: without_blanks_at_ends(hard(LISTING.expandtabs(8), width)),
        lambda width: hard(LISTING, width),
        lambda width: soft(LISTING.expandtabs(8), width),
        lambda width: hard(LISTING.replace("\tGPU0\tGPU1", "\t\x1b[4mGPU0\tGPU1"), width),
        lambda width: "".join(f"> {line}\n" for line in soft(LISTING.expandtabs(8), width).splitlines()),
        lambda width: hard("$ nvidia-smi topo -m\n" + LISTING.expandtabs(8), width) + "$ date\n",
    ],
    ids=["terminal", "blanks cut", "characters", "mail", "codes", "quoted", "prompts"],
)
def test_broken_lines_are_joined(broken: object, width: int) -> None:
    assert callable(broken)
    text = broken(width)
    assert len(max(text.splitlines(), key=len)) < 140
    assert read(text) == read(LISTING)


AMD = "LINK TYPE TABLE:\n" + "\n".join(
    " ".join(
        [
            f"0000:{a}c:00.0" if a else " " * 12,
            *(f"0000:{b}c:00.0" if not a else "SELF  " if a == b else "XGMI  " for b in range(1, 10)),
        ]
    )
    for a in range(10)
)


@pytest.mark.parametrize("width", [60, 79, 80, 100])
@pytest.mark.parametrize("how", [hard, soft])
def test_wide_tables_of_amd(how: object, width: int) -> None:
    assert callable(how)
    weights = AMD.replace("LINK TYPE", "WEIGHT").replace("XGMI", "15").replace("SELF", "0")
    bandwidth = AMD.replace("LINK TYPE", "NUMA BW").replace("XGMI", "50000-100000")
    assert read(how(f"{weights}\n{AMD}\n{bandwidth}\n", width)) == read(AMD)


WHOLE = """\
        GPU0    GPU1    NIC0    CPU Affinity    NUMA Affinity
GPU0     X      NV4     SYS     0-31,64-95      0
GPU1    NV4      X      PHB     32-63,96-127    1
NIC0    SYS     PHB      X
"""


@pytest.mark.parametrize(
    "text",
    [
        WHOLE.replace("CPU Affinity    NUMA", "CPU\nAffinity    NUMA"),
        WHOLE.replace("NUMA Affinity", "\nNUMA Affinity").replace("      0\n", "\n0\n").replace("    1\n", "\n1\n"),
        WHOLE.replace("GPU1    NIC0", "GPU1 \nNIC0")
        .replace("SYS     0-31", "SYS \n0-31")
        .replace("PHB     32", "PHB \n32"),
    ],
    ids=["in a heading", "before the last column", "before a name"],
)
def test_single_breaks(text: str) -> None:
    assert read(text) == read(WHOLE)


@pytest.mark.parametrize(
    "text",
    [
        WHOLE.replace("NV4     SYS", "NV4 \nerror: rank 1 died\nSYS"),
        WHOLE.replace("NV4      X", "NV8\n      X"),
        WHOLE.replace("GPU1    NV4", "GPU1\n"),
        WHOLE.replace("GPU0    GPU1", "GPU0\nis ready\nGPU1"),
    ],
)
def test_what_does_not_fit_is_refused_as_it_stands(text: str) -> None:
    """The message speaks of the lines of the file."""
    with pytest.raises(TopologyFormatError) as error:
        read(text)
    assert 0 <= error.value.line <= len(text.splitlines())
    assert "expected" in str(error.value)


@pytest.mark.parametrize("stray", ["rank 3 is ready", "0 errors", "GPU0 is in use", "[W] X"])
def test_a_stray_line_is_no_part_of_a_row(stray: str) -> None:
    assert read(WHOLE.replace("GPU1    NV4", f"{stray}\nGPU1    NV4")) == read(WHOLE)
    assert read(WHOLE.replace("NIC0    SYS", f"{stray}\nNIC0    SYS")) == read(WHOLE)


def test_ways_to_join() -> None:
    text = "GPU0 GPU1      N\nIC0 CPU Affinity\nGPU0 X NV1     S\nYS 0-7\n"
    joined = {way[0].text for way in unwrapped(split_lines(text))}
    assert joined == {"GPU0 GPU1      NIC0 CPU Affinity", "GPU0 GPU1      N IC0 CPU Affinity"}
    assert unwrapped(split_lines(WHOLE)) == []


@settings(max_examples=80, deadline=None)
@given(width=st.integers(10, 160), how=st.sampled_from([hard, soft]), tabs=st.booleans(), cut=st.booleans())
def test_breaking_never_changes_a_link(width: int, how: object, tabs: bool, cut: bool) -> None:
    assert callable(how)
    text = how(LISTING if tabs else LISTING.expandtabs(8), width)
    try:
        topology = read(without_blanks_at_ends(text) if cut else text)
    except TopologyFormatError:
        return
    assert topology.links == read(LISTING).links
