"""Damaged logs: a report or a clear error, quickly, and never a better verdict than the lines deserve.

``GPULAYOUT_FUZZ=100000`` mutates that many logs; each is made from its number, so that a failure can be repeated.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from pytest_gpulayout.errors import EvidenceError
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.nccl_log import merge, parse_nccl_log
from pytest_gpulayout.transport import TransportReport
from pytest_gpulayout.transport_nccl import judge_nccl
from tests.support.nccl_writer import (
    DRESSES,
    EVIDENCE,
    FORMS,
    Fault,
    Medium,
    Nvls,
    Scenario,
    WrittenLog,
    cut,
    interleave,
    write_log,
)

COUNT = int(os.environ.get("GPULAYOUT_FUZZ", "500"))
SHARE = 4
"""The numbers are dealt out to as many tests, which can run beside each other."""
LONGEST_S = 5.0  # of CPU time: far above any healthy input, far below a runaway pattern
"""Of this process, whatever else the machine does."""

LAYOUTS = [parse_layout(text) for text in ("tp2", "tp2", "tp3", "pp2", "tp2pp2", "dp2ep", "tp2@2")]
FAULTS = (None, None, Fault.SOCKET_PAIR, Fault.SHM_PAIR, Fault.MISSING_RANK, Fault.SHM_TOO_SMALL, Fault.P2P_DISABLED)
WORDS: tuple[bytes, ...] = (
    *(bytes(40), b"\xff\xfe", b"\xc3", b"\r", b"\n", b"\n\n", b"\x1b[0m", b"\x1b[", b"\x1b]0;title\x07", b"\t", b" "),
    *(b"node:1:2 [0] NCCL INFO ", b"NCCL WARN ", b":1:1 [", b"Channel ", b"Channel 00/0 : ", b"via", b"[send]"),
    *(b"comm 0x", b" nranks ", b" rank ", b"commId 0x", b"NVLS comm ", b"Init COMPLETE", b"Using network "),
    *(
        b"Trees ",
        b" -> 2",
        b'{"log": "',
        b"\\u003e",
        b"&gt;",
        b"9" * 32,
        b"-1",
        b"0x",
        b"NCCL_DEBUG set by environment to ",
    ),
    *("größer".encode(), "\u2028".encode(), "１２３".encode(), b"a\0b\0c\0"),
)
"""What is inserted; no two of them make a channel, so that a log without one stays without."""

Mutation = Callable[[random.Random, list[bytes]], None]


def delete(dice: random.Random, lines: list[bytes]) -> None:
    start = dice.randrange(len(lines))
    del lines[start : start + dice.choice((1, 1, 3, 20))]


def duplicate(dice: random.Random, lines: list[bytes]) -> None:
    start = dice.randrange(len(lines))
    lines[start:start] = lines[start : start + dice.choice((1, 2, 10))] * dice.choice((1, 1, 5))


def swap(dice: random.Random, lines: list[bytes]) -> None:
    a, b = dice.randrange(len(lines)), dice.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]


def cut_short(dice: random.Random, lines: list[bytes]) -> None:
    at = dice.randrange(len(lines))
    lines[at] = lines[at][: dice.randrange(len(lines[at]) + 1)]


def cut_head(dice: random.Random, lines: list[bytes]) -> None:
    at = dice.randrange(len(lines))
    lines[at] = lines[at][dice.randrange(len(lines[at]) + 1) :]


def glue(dice: random.Random, lines: list[bytes]) -> None:
    at = dice.randrange(len(lines))
    lines[at : at + 2] = [dice.choice((b"", b" ")).join(line.rstrip(b"\n") for line in lines[at : at + 2]) + b"\n"]


def tear(dice: random.Random, lines: list[bytes]) -> None:
    """Put one line into the middle of another, as two writers on one stream do."""
    at, other = dice.randrange(len(lines)), dice.randrange(len(lines))
    place = dice.randrange(len(lines[at]) + 1)
    lines[at] = lines[at][:place] + lines[other] + lines[at][place:]


def insert(dice: random.Random, lines: list[bytes]) -> None:
    at = dice.randrange(len(lines))
    place = dice.randrange(len(lines[at]) + 1)
    lines[at] = lines[at][:place] + dice.choice(WORDS) + lines[at][place:]


def flip(dice: random.Random, lines: list[bytes]) -> None:
    at = dice.randrange(len(lines))
    data = bytearray(lines[at])
    for _ in range(dice.choice((1, 3))):
        if data:
            data[dice.randrange(len(data))] = dice.randrange(256)
    lines[at] = bytes(data)


def enlarge(dice: random.Random, lines: list[bytes]) -> None:
    """Make a digit a long number."""
    at = dice.randrange(len(lines))
    digits = [place for place, byte in enumerate(lines[at]) if 0x30 <= byte <= 0x39]
    if digits:
        place = dice.choice(digits)
        lines[at] = lines[at][:place] + b"9" * dice.choice((1, 6, 6, 9, 30, 5000)) + lines[at][place:]


def lengthen(dice: random.Random, lines: list[bytes]) -> None:
    """Repeat a piece of a line until it is long: patterns that go back and forth show here."""
    at = dice.randrange(len(lines))
    start = dice.randrange(len(lines[at]) + 1)
    piece = lines[at][start : start + dice.randrange(1, 40)].replace(b"\n", b"")
    lines[at] = lines[at][:start] + piece * dice.choice((2, 50, 500)) + lines[at][start:]


MUTATIONS: tuple[Mutation, ...] = (
    *(delete, duplicate, swap, cut_short, cut_head, glue, tear, insert, insert, flip, flip, enlarge, lengthen),
)


@cache
def base(number: int) -> WrittenLog:
    """A small log; a few hundred different ones are enough to start from."""
    dice = random.Random(f"base {number}")
    fault = dice.choice(FAULTS)
    return write_log(
        Scenario(
            layout=dice.choice(LAYOUTS),
            form=dice.choice(FORMS),
            medium=dice.choice((Medium.P2P, Medium.P2P_READ, Medium.SHM)),
            between_hosts=dice.choice((Medium.IB, Medium.PLUGIN, Medium.MNNVL)),
            channels=1,
            cumem=dice.random() < 0.8,
            nvls=dice.choice(tuple(Nvls)),
            collnet=dice.random() < 0.2,
            requests=dice.random() < 0.3,
            faults=frozenset() if fault is None else frozenset({fault}),
            seed=number,
        )
    )


def mutate(dice: random.Random, log: WrittenLog) -> bytes:
    dress = dice.choice(DRESSES) if dice.random() < 0.3 else DRESSES[0]
    streams = [[dress.put_on(at, line) for line in lines] for at, lines in enumerate(log.streams())]
    lines = [line.encode() + b"\n" for line in interleave(streams, dice.getrandbits(30))]
    for _ in range(dice.choice((1, 1, 2, 3, 5, 10, 30))):
        if lines:
            dice.choice(MUTATIONS)(dice, lines)
    return b"".join(lines)


def judge(data: bytes, written: WrittenLog, dice: random.Random) -> TransportReport | None:
    """The report, ``None`` for a clear error; anything else is a failure of the test."""
    places = [dice.randrange(10**6) for _ in range(dice.choice((0, 0, 1, 20)))]
    ends = [data.find(b"\n", place % (len(data) + 1)) + 1 for place in places[:1]]  # files end where a line does
    files = [cut(data, places)] if dice.random() < 0.7 else [[half] for half in cut(data, ends)]
    layout = dice.choice((written.scenario.layout, written.scenario.layout, None))
    started = time.process_time()
    try:
        log = merge(parse_nccl_log(chunks, f"fuzz.{at}") for at, chunks in enumerate(files))
        report = judge_nccl(log, layout)
        json.dumps(report.to_document())
    except EvidenceError as error:
        assert len(str(error).splitlines()) > 1  # noqa: PT017 - any other exception fails by itself
        report = None
    assert time.process_time() - started < LONGEST_S
    return report


def numbers(share: int) -> Iterator[tuple[int, random.Random]]:
    for number in range(share, COUNT, SHARE):
        yield number, random.Random(number)


SHARES = pytest.mark.parametrize("share", range(SHARE))


@SHARES
def test_damaged_log_is_reported(share: int) -> None:
    for number, dice in numbers(share):
        log = base(dice.randrange(300))
        data = mutate(dice, log)

        report = judge(data, log, dice)

        assert report is None or report.verdict in ("ok", "shm", "socket", "no-evidence"), (number, data)


@SHARES
def test_damaged_log_without_channel_lines_proves_nothing(share: int) -> None:
    for number, dice in numbers(share):
        log = base(dice.randrange(300)).without(lambda line: line.kind in EVIDENCE)
        data = mutate(dice, log)

        report = judge(data, log, dice)

        assert report is None or report.verdict == "no-evidence", (number, data)


SOCKET = b"\nllm-node-0:90001:90002 [0] NCCL INFO Channel 00/0 : 1[1] -> 0[0] [send] via NET/Socket/0\n"


@SHARES
def test_socket_behind_any_damage_is_seen(share: int) -> None:
    for number, dice in numbers(share):
        log = base(dice.randrange(300))
        data = mutate(dice, log) + SOCKET

        report = judge(data, log, dice)

        assert report is None or report.verdict == "socket", (number, data)
