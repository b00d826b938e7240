"""What vLLM's log says about serving: the time of each engine step, and compilations that a request had to wait for.

Knows the lines of ``vllm serve --enable-logging-iteration-details`` and of vLLM's JIT monitor (vLLM 0.32,
``vllm/v1/metrics/loggers.py``, ``vllm/utils/jit_monitor.py``), and what Triton prints when it tunes a kernel
(``triton/runtime/autotuner.py``). Leaves the form of a log line to :mod:`~pytest_gpulayout.vllm_log`, and opening the
log to the adapters::

    (APIServer pid=7) INFO 11-21 03:43:40 [loggers.py:194] Engine 000: Iteration(41): 0 context requests, 0 context \
tokens, 4 generation requests, 4 generation tokens, iteration elapsed time: 7.81 ms, GPU KV cache usage: 0.3%

A request can bring text into the log, so a line counts only from the source file that writes it.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from pytest_gpulayout.server_window import StepTimes
from pytest_gpulayout.vllm_log import LogRecord, parse_record

_ITERATION = re.compile(
    r"Engine (?P<engine>\d+): Iteration\((?P<index>\d+)\): "
    r"(?P<context>\d+) context requests, \d+ context tokens, "
    r"(?P<generating>\d+) generation requests, \d+ generation tokens, "
    r"iteration elapsed time: (?P<elapsed_ms>\d+\.\d+) ms(?P<dummy> \(dummy\))?,"
)
_COMPILATION = re.compile(r"(?P<what>\w+ [\w ]+ during inference: .*?)(?:\. This causes a latency spike|$)")
_TUNING = "Triton autotuning for function "
_ACTIVATED = "Kernel JIT monitor activated"
_LONGEST_LINE = 300


@dataclass(frozen=True, slots=True)
class ServingLog:
    """What a part of a server's log tells.

    :param steps: one per engine that logged a step to go by. :param jit: a line per compilation, as it stands there.
    """

    steps: tuple[StepTimes, ...]
    jit: tuple[str, ...]


def read_serving_log(lines: Iterable[str]) -> ServingLog:
    """Read engine steps and compilations from the lines of a window.

    Of the steps those count that decode the most common number of requests and nothing else, and follow upon a step
    that did the same: the first one after a prefill or a pause is timed differently, since vLLM schedules a step
    before the one in front of it is done, and its clock runs over the wait for the result alone.
    """
    engines: dict[str, _Engine] = {}
    jit: list[str] = []
    for line in lines:
        if "Iteration(" in line:
            record = parse_record(line)
            match = _ITERATION.match(record.message) if record.source == "loggers.py" else None
            if match is not None:
                name = str(int(match["engine"]))
                engines.setdefault(name, _Engine(name)).add(match)
        elif "during inference: " in line or _TUNING in line:
            jit.extend(_compilation(parse_record(line)))
    steps = (engine.times() for _, engine in sorted(engines.items(), key=lambda item: int(item[0])))
    return ServingLog(tuple(times for times in steps if times is not None), tuple(jit))


def monitors_compilations(lines: Iterable[str]) -> bool:
    """Say whether the server announced that it would log compilations; without it their absence proves nothing.

    It does not on CPUs and with ``--enforce-eager`` (vLLM 0.32, ``vllm/v1/worker/gpu_worker.py``).
    """
    records = (parse_record(line) for line in lines if _ACTIVATED in line)
    return any(record.source == "jit_monitor.py" for record in records)


def _compilation(record: LogRecord) -> list[str]:
    process = f"{record.process}: " if record.process else ""
    if record.source == "jit_monitor.py" and (match := _COMPILATION.match(record.message)):
        return [f"{process}{match['what']}"[:_LONGEST_LINE]]
    if not record.source and record.message.startswith(_TUNING):  # printed by Triton itself, which has no prefix
        return [f"{process}{record.message.rstrip(', ')}"[:_LONGEST_LINE]]
    return []


@dataclass(slots=True)
class _Engine:
    """Collects the steps of one engine; 12 bytes for each that may count."""

    name: str
    steps: int = 0
    dummies: int = 0
    requests: array[int] = field(default_factory=lambda: array("i"))
    elapsed_ms: array[float] = field(default_factory=lambda: array("d"))
    before: tuple[int, int] = (-1, 0)

    def add(self, match: re.Match[str]) -> None:
        """Take one step. :param match: of its line."""
        index, requests = int(match["index"]), int(match["generating"])
        self.steps += 1
        self.dummies += match["dummy"] is not None
        decodes = requests if match["context"] == "0" and match["dummy"] is None else 0
        if decodes and self.before == (index - 1, decodes):
            self.requests.append(decodes)
            self.elapsed_ms.append(float(match["elapsed_ms"]))
        self.before = (index, decodes)

    def times(self) -> StepTimes | None:
        """Sum up; ``None`` when no step counts."""
        import numpy as np  # imported late: a pytest start without a measurement never needs it

        if not self.requests:
            return None
        often = Counter(self.requests)
        modal = max(often, key=lambda requests: (often[requests], requests))
        chosen = np.asarray(self.elapsed_ms)[np.asarray(self.requests) == modal]
        return StepTimes(
            engine=self.name,
            steps=self.steps,
            decode_steps=len(chosen),
            dummy_steps=self.dummies,
            requests=modal,
            median_ms=float(np.median(chosen)),
            p99_ms=float(np.percentile(chosen, 99)),
        )
