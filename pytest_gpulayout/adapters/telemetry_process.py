"""The process that samples the devices, so that sampling takes nothing from the process that measures.

Run as ``python -m pytest_gpulayout.adapters.telemetry_process CONFIG_JSON``. It has an interpreter of its own, hence
no lock in common with the load driver, and the lowest priority. Samples are taken on an absolute timetable and kept
in memory until the end (20 MB an hour for eight GPUs): nobody has to read them while requests are in flight.

Standard input: ``begin`` starts the timetable with a first sample, ``end`` takes the last one and prints all; end of
file ends the process, which is what the kernel makes of any death of the parent. Standard output, one JSON object a
line: ``{"ready": true}``, ``{"began": ns}``, then after ``end`` a line for each sample ``{"ns": ..., "gpus": [{...}],
"cpu": {...}}`` and at last ``{"notes": [...], "others": {...}}``. Times are ``CLOCK_MONOTONIC``, which all processes
of a host share.

Leaves what the numbers mean to :mod:`~pytest_gpulayout.adapters.telemetry_watch`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import ExitStack, suppress
from typing import TypedDict

from pytest_gpulayout.adapters.cpu_telemetry import CpuReader
from pytest_gpulayout.adapters.nvml_library import nvml_library
from pytest_gpulayout.adapters.nvml_telemetry import NvmlReader, WantedGpu
from pytest_gpulayout.errors import TopologyError

_LOWEST_PRIORITY = 19
_LOOK_FOR_PARENT_S = 5.0


class SamplerConfig(TypedDict):
    """What the sampler is told, as one JSON argument. ``parent_pid``: it ends when this is no longer its parent."""

    gpus: list[WantedGpu]
    server_pids: list[int]
    parent_pid: int
    interval_s: float


class Timetable:
    """When samples are due: begin, begin + interval, ...; times that have passed are left out, not caught up.

    :param interval_ns: between two samples.
    """

    def __init__(self, begin_ns: int, interval_ns: int) -> None:
        self._begin_ns = begin_ns
        self._interval_ns = interval_ns

    def next_after(self, now_ns: int) -> int:
        """Return the first time on the table after ``now_ns``."""
        return now_ns + self._interval_ns - (now_ns - self._begin_ns) % self._interval_ns


class Sampler:
    """Takes samples and keeps them.

    :param nvml: ``None`` without GPUs to sample.
    """

    def __init__(self, nvml: NvmlReader | None, cpus: CpuReader) -> None:
        self._nvml = nvml
        self._cpus = cpus
        self._lines: list[str] = []

    def take(self, *, at_an_end: bool) -> int:
        """Take a sample and return its time in ns.

        :param at_an_end: the first or the last one.
        """
        now_ns = time.monotonic_ns()
        gpus = self._nvml.read(at_an_end=at_an_end) if self._nvml else []
        sample = {"ns": now_ns, "gpus": gpus, "cpu": self._cpus.read(at_an_end=at_an_end)}
        self._lines.append(json.dumps(sample))  # a third of the memory of the objects
        return now_ns

    def begin(self) -> int:
        """Take the first sample and return its time in ns."""
        self._cpus.begin()
        return self.take(at_an_end=True)

    def end(self, notes: list[str]) -> str:
        """Take the last sample and return all lines."""
        self.take(at_an_end=True)
        others = self._cpus.busiest_others()
        notes = [*notes, *(self._nvml.notes() if self._nvml else []), *self._cpus.notes()]
        return "\n".join([*self._lines, json.dumps({"notes": notes, "others": others}), ""])


def run(config: SamplerConfig, sampler: Sampler, notes: list[str]) -> None:
    """Follow the commands of standard input until ``end``, or until there is no parent any more."""
    commands = _Commands(config["parent_pid"])
    _say(json.dumps({"ready": True}) + "\n")
    if commands.wait(None) != "begin":
        return
    began_ns = sampler.begin()
    _say(json.dumps({"began": began_ns}) + "\n")
    timetable = Timetable(began_ns, round(config["interval_s"] * 1e9))
    while (command := commands.wait(timetable.next_after(time.monotonic_ns()))) == "":
        sampler.take(at_an_end=False)
    if command == "end":
        _say(sampler.end(notes))


class _Commands:
    """Lines of standard input, waited for until a time."""

    def __init__(self, parent_pid: int) -> None:
        self._parent_pid = parent_pid
        self._input = b""

    def wait(self, until_ns: int | None) -> str | None:
        """Return the next command, ``""`` when it is time, ``None`` when there is no parent any more.

        A worker that was forked off the parent may keep the pipe open, hence the look at who the parent is.
        """
        while b"\n" not in self._input:
            left_s = _LOOK_FOR_PARENT_S if until_ns is None else (until_ns - time.monotonic_ns()) / 1e9
            if os.getppid() != self._parent_pid:
                return None
            if left_s <= 0:
                return ""
            if select.select([0], [], [], min(left_s, _LOOK_FOR_PARENT_S))[0]:
                chunk = os.read(0, 4096)
                if not chunk:
                    return None
                self._input += chunk
        line, _, self._input = self._input.partition(b"\n")
        return line.decode()


def _say(text: str) -> None:
    """Write all of it; a parent that has gone needs no answer."""
    with suppress(BrokenPipeError):
        sys.stdout.write(text)
        sys.stdout.flush()


def main() -> None:
    """Entry point: leave the terminal's Ctrl-C to the parent, sample, and end without a trace."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config: SamplerConfig = json.loads(sys.argv[1])
    notes: list[str] = []
    with ExitStack() as stack:
        reader = None
        if config["gpus"]:
            try:
                nvml = stack.enter_context(nvml_library())
                reader = NvmlReader(nvml, config["gpus"], config["interval_s"])
            except TopologyError as error:
                notes.append("GPUs: not sampled, " + " ".join(str(error).splitlines()[0].split()))
        sampler = Sampler(reader, CpuReader(config["server_pids"], config["parent_pid"]))
        # After what takes long, so that a busy host does not delay the start.
        os.nice(_LOWEST_PRIORITY)
        run(config, sampler, notes)


if __name__ == "__main__":
    main()
