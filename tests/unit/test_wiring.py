"""What a run finds out about the cores of a server, before it chooses those of the client."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.ports import Platform, ServerSpec
from pytest_gpulayout.testing import FakeServer
from pytest_gpulayout.topology import Device
from pytest_gpulayout.wiring import cores_of


def server(folder: Path, platform: Platform, *affinities: str | None) -> FakeServer:
    devices = tuple(Device(index, cpu_affinity=cores) for index, cores in enumerate(affinities))
    spec = ServerSpec(
        layout=parse_layout(f"tp{len(devices)}"),
        model="m",
        arguments=(),
        platform=platform,
        devices=devices,
        python="python",
        start_timeout_s=1.0,
    )
    return FakeServer(spec, folder, transport=None)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """One that stays until its standard input is closed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def test_ranks_of_the_cpu_platform_are_where_they_were_told_to_be(tmp_path: Path) -> None:
    assert cores_of(server(tmp_path, "cpu", "0-3", "8,9")) == {0, 1, 2, 3, 8, 9}


def test_ranks_of_gpus_are_where_the_system_says(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(process.pid, {core})
    bound = server(tmp_path, "cuda", "0-63")
    bound.proof = replace(bound.proof, rank_pids={0: process.pid})
    assert cores_of(bound) == {core}


def test_of_a_rank_that_cannot_be_seen_nothing_is_known(tmp_path: Path) -> None:
    assert cores_of(server(tmp_path, "cuda", "0-3")) == set()
