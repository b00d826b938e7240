"""A suite of tests as a value: its conftest installs the public fakes, and it is run by pytest inside pytest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.baseline import BaselineSession
from pytest_gpulayout.baseline_text import baseline_from_text, baseline_to_text

CONFTEST = """
import os
from pathlib import Path
import pytest
from pytest_gpulayout.errors import *
from pytest_gpulayout.testing import *

def note(event, spec):
    words = [event, str(spec.layout), spec.model, *spec.arguments]
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        words.append("@" + worker)
    with Path(__file__).with_name("events.txt").open("a") as file:
        file.write(" ".join(words) + "\\n")

def pytest_gpulayout_topology_source(settings, layout):
    if settings.topology_file is None:
        return FakeTopologySource(platform=settings.platform, {topology})

def pytest_gpulayout_server_launcher(settings, log_dir):
    return FakeServerLauncher(log_dir, on_event=note, {launcher})

def pytest_gpulayout_collective_probe(settings, log_dir):
    return FakeCollectiveProbe({probe})

def pytest_gpulayout_load_driver(settings):
    return FakeLoadDriver({driver})
"""

GATE = """
def test_speed(measure, perf_gate):
    perf_gate(measure())
"""


@dataclass
class Suite:
    """A folder with tests and fakes.

    :param model: given as ``--gpu-model`` unless ``None``.
    """

    pytester: pytest.Pytester
    model: str | None = "org/tiny"
    results: Path = field(init=False)

    def __post_init__(self) -> None:
        self.results = self.pytester.path / "results.json"
        self.fakes()

    def fakes(
        self, *, topology: str = "", launcher: str = "", driver: str = "", probe: str = "", more: str = ""
    ) -> None:
        """Describe the fakes by their arguments. :param more: code to put behind them."""
        text = CONFTEST.format(topology=topology, launcher=launcher, driver=driver, probe=probe)
        self.pytester.makeconftest(text + more)

    def write(self, **files: str) -> None:
        """Write test files: ``suite.write(test_a="def test(): ...")``."""
        self.pytester.makepyfile(**files)

    def ini(self, *lines: str) -> None:
        """Write the ini file."""
        self.pytester.makeini("[pytest]\n" + "\n".join(lines))

    def run(self, *arguments: str, subprocess: bool = False) -> pytest.RunResult:
        """Run pytest in the folder; in this process unless it is said otherwise."""
        model = [] if self.model is None else [f"--gpu-model={self.model}"]
        quick = ["-p", "no:hypothesispytest"]  # pytest inside pytest would load it anew each time
        run = self.pytester.runpytest_subprocess if subprocess else self.pytester.runpytest_inprocess
        return run(*quick, *model, *arguments)

    @property
    def events(self) -> list[str]:
        """``start tp2 org/tiny``, ``stop tp2 org/tiny``, in order."""
        file = self.pytester.path / "events.txt"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def starts(self) -> int:
        """How many servers were started."""
        return sum(event.startswith("start") for event in self.events)

    @property
    def baselines(self) -> list[Path]:
        """The stored files."""
        return sorted((self.pytester.path / "gpu-baselines").rglob("*.json"))

    def settle(self, sessions: int = 9, *, spread: float = 0.002) -> None:
        """Let each stored baseline have so many sessions like its first: what they show of the noise is settled.

        :param spread: by how much sessions, and starts, differ.
        """
        for file in self.baselines:
            baseline = baseline_from_text(file.read_text(), str(file))
            first = baseline.sessions[0]
            more = tuple(_like(first, spread * offset, spread) for offset in _offsets(sessions))
            file.write_text(baseline_to_text(replace(baseline, sessions=more)))

    def read_results(self) -> dict[str, Any]:
        """What ``--gpu-results=results.json`` wrote."""
        document: dict[str, Any] = json.loads(self.results.read_text())
        return document


def _offsets(count: int) -> Iterator[float]:
    """0, 1, -1, 1/2, -1/2, 0, 1, ...: their mean is about 0."""
    for number in range(count):
        yield (0.0, 1.0, -1.0, 0.5, -0.5)[number % 5]


def _like(session: BaselineSession, offset: float, spread: float) -> BaselineSession:
    """A session that differs by an offset, and its starts by a spread around it."""
    runs = []
    for run, own in zip(session.runs, _offsets(len(session.runs)), strict=True):
        factor = 1 + offset + spread * own
        metrics = {name: tuple(value * factor for value in values) for name, values in run.metrics.items()}
        runs.append(replace(run, metrics=metrics))
    return replace(session, runs=tuple(runs))
