"""Damaged listings: each is read as a topology that its schema accepts, or refused in words, and that at once.

The number of listings is ``GPULAYOUT_FUZZ`` (500 by default), the seed ``GPULAYOUT_FUZZ_SEED``; both are printed
with the listing that failed.
"""

from __future__ import annotations

import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.errors import TopologyFormatError
from pytest_gpulayout.schemas import validate
from pytest_gpulayout.topology_document import topology_to_document
from pytest_gpulayout.topology_text import parse_topology_text

COUNT = int(os.environ.get("GPULAYOUT_FUZZ", "500"))
SEED = int(os.environ.get("GPULAYOUT_FUZZ_SEED", "20240229"))
CORPUS = Path(os.environ.get("GPULAYOUT_CORPUS") or Path(__file__).parents[2] / "../shared/corpus") / "topo"
SLOWEST_S = 5.0  # of CPU time: far above any healthy input, far below a runaway pattern

OWN_SEEDS = {
    "tabs": "\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    "GPU0\t X \tNV12\tSYS\tPIX\t0-15,32-47\t0\t\tN/A\nGPU1\tNV12\t X \tPHB\tSYS\t0-15,32-47\t0\t\tN/A\n"
    "GPU2\tSYS\tPHB\t X \tNODE\t16-31\t1\t\tN/A\nNIC0\tPIX\tSYS\tNODE\t X \t\t\t\t\n\nLegend:\n\n  X    = Self\n",
    "spaces": "$ nvidia-smi topo -m\n      GPU0  GPU1  GPU10  CPU Affinity  NUMA Affinity\n"
    "GPU0   X    NV2   NODE   0-3           N/A\nGPU1  NV2    X    SYS    4-7           N/A\n"
    "GPU10 NODE  SYS    X     8-11          0-1\n",
    "ansi": "+ srun nvidia-smi topo -m\n\t\x1b[4mGPU4\tGPU5\tmlx5_0\tmlx5_1\tCPU Affinity\x1b[0m\n"
    "GPU4\t X \tPXB\tPIX\tSYS\t\nGPU5\tPXB\t X \tSYS\tNODE\t1\n",
    "wrapped": "        GPU0    GPU1    GPU2    GPU3    NI\nC0    CPU Affinity    NUMA Affinity\n"
    "GPU0     X      NV4     NV4     NV4     SY\nS     0-31,64-95      0\n"
    "GPU1    NV4      X      NV4     NV4     SY\nS     0-31,64-95      0\n"
    "GPU2    NV4     NV4      X      NV4     PH\nB     32-63           1\n"
    "GPU3    NV4     NV4     NV4      X      PH\nB     32-63           1\n",
    "p2p": "$ nvidia-smi topo -p2p r\n \tGPU0\tGPU1\tGPU2\t\n GPU0\tX\tOK\tCNS\t\n GPU1\tOK\tX\tNS\t\n"
    " GPU2\tCNS\tNS\tX\t\n\nLegend:\n\n  X    = Self\n",
    "markdown": "| CPU Affinity |      | GPU0 | GPU1 |\n|---|---|---|---|\n| 0-7 | GPU0 | X | NV2 |\n"
    "| 8-15 | GPU1 | NV2 | X |\n",
    "rocm-smi": "======= Weight between two GPUs =======\n       GPU0   GPU1\nGPU0   0      15\nGPU1   15     0\n\n"
    "====== Link Type between two GPUs =====\n       GPU0   GPU1\nGPU0   0      XGMI\nGPU1   XGMI   0\n\n"
    "GPU[0]\t\t: (Topology) Numa Node: 0\nGPU[1]\t\t: (Topology) Numa Node: 1\n",
    "amd-smi": "LINK TYPE TABLE:\n             0000:0c:00.0 0000:22:00.0\n0000:0c:00.0 SELF         PCIE\n"
    "0000:22:00.0 PCIE         SELF\nNUMA BW TABLE:\n             0000:0c:00.0 0000:22:00.0\n"
    "0000:0c:00.0 N/A          10-20\n0000:22:00.0 10-20        N/A\n",
    "mig": "GPU 0: NVIDIA A30 (UUID: GPU-00000000-1111-2222-3333-444444444444)\n"
    "  MIG 1g.6gb      Device  0: (UUID: MIG-00000000-1111-2222-3333-444444444444)\n"
    "GPU 1: NVIDIA A30 (UUID: GPU-00000000-1111-2222-3333-444444444445)\n"
    "\tGPU0\tGPU1\nGPU0\t X \tPHB\nGPU1\tPHB\t X \n",
    "affinity": "$ nvidia-smi topo -mp\n  CPU Affinity    NUMA Affinity\nGPU0    48-63   3\nGPU1    0-15 1\n\n",
    "no header": "GPU0\t X \tNV1\tSYS\t0-3\nGPU1\tNV1\t X \tSYS\t0-3\nNIC0\tSYS\tSYS\t X \n",
}

FRAGMENTS = [
    *("GPU0", "GPU1", "GPU12", "GPU007", "GPU99999999999999999999", "GPU" + "9" * 5000, "NIC0", "mlx5_0", "column 1"),
    *(
        "X",
        "NV1",
        "NV0",
        "NV" + "1" * 5000,
        "PIX",
        "SYS",
        "SOC",
        "XGMI",
        "OK",
        "CNS",
        "SELF",
        "0",
        "N/A",
        "???",
        "...",
    ),
    *(
        "CPU Affinity",
        "NUMA Affinity",
        "GPU NUMA ID",
        "0-7",
        "9" * 5000,
        "1,2,3",
        "-",
        "|",
        "||",
        "| --- |",
        ">",
        "> > ",
    ),
    *("\x00", "\x07", "\x1b", "\x1b[", "\x1b[4m", "\x1b]0;", "\x9b0m", "[0m", "\x0b", "\x0c", "\r", "\x85", "\u2028"),
    *("\u200b", "\ufeff", "\xa0", "\u0660", "\u00b2", "\uff10", "é", "𝟘", "\ud800", "\t", "\t\t", "  ", "\n", "\n\n"),
    *(
        "0000:0c:00.0",
        "0000:0C:00.0",
        "LINK TYPE TABLE:",
        "DMA TABLE:",
        "=== Hops between two GPUs ===",
        "Legend:",
        "```",
    ),
    *("nvidia-smi topo -m", "topo -mp", "topo -p2p w", "GPU[0] : (Topology) Numa Node: 3", "[", "{", "gpu,"),
]


def seeds() -> dict[str, str]:
    recorded = {path.parent.name: path.read_text(encoding="utf-8") for path in sorted(CORPUS.glob("*/topo.txt"))}
    return OWN_SEEDS | recorded


def with_parts(split: Callable[[str], list[str]], text: str, rng: random.Random) -> str:
    """Delete, repeat, exchange, replace or overwrite parts of the text; the parts are whatever ``split`` makes."""
    parts = split(text) or [""]
    i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
    match rng.randrange(5):
        case 0:
            del parts[i : i + rng.randrange(1, 3)]
        case 1:
            parts.insert(j, parts[i])
        case 2:
            parts[i], parts[j] = parts[j], parts[i]
        case 3:
            parts[i] = parts[j]
        case _:
            parts[i] = rng.choice(FRAGMENTS)
    return "".join(parts)


def of_lines(text: str, rng: random.Random) -> str:
    return with_parts(lambda text: text.splitlines(keepends=True), text, rng)


def of_words(text: str, rng: random.Random) -> str:
    return with_parts(lambda text: re.findall(r"\s+|\S+", text), text, rng)


def of_characters(text: str, rng: random.Random) -> str:
    return with_parts(list, text, rng)


def insert(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(FRAGMENTS) * rng.choice((1, 1, 1, 2, 50)) + text[at:]


def truncate(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] if rng.random() < 0.7 else text[at:]


def glue(text: str, rng: random.Random) -> str:
    """Join two lines, or all cells of a kind."""
    if rng.random() < 0.5:
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        return "\n".join(lines[:at]) + "\n".join(lines[at:])
    return text.replace(*rng.choice([("\t", ""), ("\t", " "), ("  ", " "), ("\n", "\n\n"), ("\n", "\r")]))


def change_a_cell(text: str, rng: random.Random) -> str:
    cells = list(re.finditer(r"NV\d+|PIX|PXB|PHB|NODE|SYS|XGMI|PCIE|OK|CNS|\bX\b|\bSELF\b", text))
    if not cells:
        return text
    cell = rng.choice(cells)
    return text[: cell.start()] + rng.choice(FRAGMENTS) + text[cell.end() :]


def wrap(text: str, rng: random.Random) -> str:
    width = rng.randrange(8, 130)
    return re.sub(rf"(.{{{width}}})(?=.)", r"\1\n", text.expandtabs(8) if rng.random() < 0.7 else text)


MUTATIONS = [of_lines, of_words, of_words, of_characters, insert, truncate, glue, change_a_cell, wrap]


def mutated(texts: list[str], rng: random.Random) -> str:
    text = rng.choice(texts)
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        text = rng.choice(MUTATIONS)(text, rng)
    return text


def problems_of(text: str, *, with_schema: bool) -> str | None:
    """What is wrong with how the text is read; ``None`` when all is well."""
    before = time.process_time()
    try:
        document = topology_to_document(parse_topology_text(text, "topo.txt"))
        found = validate(document, "topology") if with_schema else obvious_faults(document)
    except TopologyFormatError as error:
        found = faults_of_message(error, text)
    taken = time.process_time() - before
    if taken > SLOWEST_S:
        found = [*found, f"{taken:.1f} s"]
    return "; ".join(found) or None


def obvious_faults(document: dict[str, Any]) -> list[str]:
    indices = [gpu["index"] for gpu in document["gpus"]]
    return ["an index twice"] * (len(set(indices)) < len(indices)) + ["no GPU"] * (not indices)


def faults_of_message(error: TopologyFormatError, text: str) -> list[str]:
    """The message has its four parts and names a place that is there; only a file as a whole has none."""
    message = str(error)
    faults = [part for part in ("expected", "found", "\n  in topo.txt", "\n  record it again") if part not in message]
    if (
        error.line == 0
        and "found none" not in message
        and "found only AMD's" not in message
        and "no table" not in message
    ):
        faults.append("no line")
    lines = re.split(r"\r*\n|\r", text)
    if error.line > len(lines) or error.column > len(lines[error.line - 1]) + 1:
        faults.append(f"no such place: line {error.line}, column {error.column}")
    return [f"{fault!r} in {message!r}" for fault in faults]


def test_the_seeds_are_listings() -> None:
    for name, text in seeds().items():
        assert problems_of(text, with_schema=True) is None, name
        assert parse_topology_text(text, name).devices, name


@contextmanager
def telling(number: int, text: str) -> Iterator[None]:
    """Any failure inside says how to repeat it, an exception that may not leave the parser too."""
    failed = True
    try:
        yield
        failed = False
    finally:
        if failed:
            sys.stderr.write(f"GPULAYOUT_FUZZ_SEED={SEED}, listing {number}:\n{text!r}\n")


def test_damaged_listings() -> None:
    texts = list(seeds().values())
    rng = random.Random(SEED)
    for number in range(COUNT):
        text = mutated(texts, rng)
        with telling(number, text):
            assert problems_of(text, with_schema=number % 50 == 0) is None


@pytest.mark.parametrize(
    "text",
    [
        "GPU0 " * 40_000,
        "GPU0 GPU1\n" + "GPU0 X " * 40_000,
        "a" * 300_000,
        "| NV" + "1" * 300_000 + "` x | GPU0 |",
        "CPU " * 60_000,
        "CPU" + " " * 300_000 + "Affinity",
        "GPU 0: " * 40_000 + "(UUID: ",
        "| " * 100_000,
        "> " * 100_000 + "GPU0",
        "\x1b]" * 100_000,
        "topo -p2p " * 30_000,
        "NODE" * 80_000 + "!",
        "GPU0 GPU1\nGPU0 X " + "NV1" * 80_000 + "\n",
        "GPU0 " + "0,1-2," * 40_000,
        "\n" * 100_000 + "GPU0 X\n",
        "GPU0 GPU1\n" + "noise\n" * 20_000,
        "GPU0 GPU1 mlx\n" + "mlx5_0 SYS\n" * 10_000,
        "0000:0c:00.0 " * 20_000,
        " " * 300_000 + "GPU0",
        "MIG 1g.5gb     Device  0: " * 10_000,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_no_text_is_slow(text: str) -> None:
    assert problems_of(text, with_schema=False) is None
