"""The processes of the collective probe: one for each rank, and one above them.

Run as a script by the Python that serves the model. It needs PyTorch and the standard library, and nothing of this
package, which that Python may not have::

    python collective_worker.py CONFIG_JSON             starts the ranks and waits; exit code 1 when one has failed
    python collective_worker.py CONFIG_JSON RANK PARENT one rank, which ends with its parent

The first writes a JSON object a line to its standard output for each rank that ended, ``{"rank": 1, "exit": 0}``, up
to the first that failed; the others are killed then. In the folder of the configuration a rank leaves ``rank-N.log``,
all that it and its libraries print, and ``rank-N.jsonl``: when the ranks are connected ``{"ready": {"pid": 7,
"torch": "2.9.0", "nccl": "2.27.5"}}``; for a sum that is not right ``{"wrong": {...}}``, and exit code 3; then for
each round the microseconds per all-reduce, ``{"round": 0, "us": {"batch1": 11.9, "prefill": 340.1}}``.

A time is that of a row of all-reduces, divided by their number, as nccl-tests takes it (``src/common.cu``,
``BenchTime``). On GPUs the row is a CUDA graph between two events, as the decode step of vLLM is: how fast Python
hands over kernels does not count. It is captured in the mode ``thread_local``, since another thread of PyTorch asks
for events meanwhile (pytorch#104555). The ranks of a group meet before each row, so none waits in it for another.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from typing import Any, TypedDict

WRONG_SUM = 3
"""Exit code of a rank that got a wrong sum."""

_PR_SET_PDEATHSIG = 1


class MessageConfig(TypedDict):
    """A size of message. ``iterations``: all-reduces of a row."""

    name: str
    elements: int
    iterations: int


class WorkerConfig(TypedDict):
    """A rank, number ``member`` of the ``size`` ranks of its group. ``cpus``: that it may use, empty for all."""

    rank: int
    group: int
    member: int
    size: int
    cpus: list[int]


class ProbeConfig(TypedDict):
    """What all ranks do. ``folder``: for what they leave; ``run_dir``: for files by which they find each other."""

    folder: str
    run_dir: str
    backend: str
    dtype: str
    rounds: int
    timeout_s: float
    messages: list[MessageConfig]
    workers: list[WorkerConfig]


def lead(text: str) -> int:
    """Start a process for each rank and wait for all; return the exit code. :param text: the configuration."""
    config: ProbeConfig = json.loads(text)
    running = {}
    for worker in config["workers"]:
        rank = worker["rank"]
        with open(os.path.join(config["folder"], f"rank-{rank}.log"), "wb") as log:
            command = [sys.executable, __file__, text, str(rank), str(os.getpid())]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        running[process.pid] = (rank, process)
    has_failed = False
    while running:
        pid, status = os.wait()
        if pid not in running:
            continue
        rank, _ = running.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if not has_failed:
            sys.stdout.write(json.dumps({"rank": rank, "exit": code}) + "\n")
            sys.stdout.flush()
        if code and not has_failed:
            has_failed = True
            for other in running:  # one that was left alone would wait for it for minutes
                os.kill(other, signal.SIGKILL)
    return int(has_failed)


def work(config: ProbeConfig, worker: WorkerConfig) -> int:
    """Measure as one rank; return the exit code."""
    if worker["cpus"]:
        os.sched_setaffinity(0, worker["cpus"])
    torch: Any = import_module("torch")
    dist: Any = import_module("torch.distributed")
    if config["backend"] == "nccl":
        torch.cuda.set_device(worker["rank"])
    else:
        torch.set_num_threads(max(1, len(worker["cpus"])))
    dist.init_process_group(
        config["backend"],
        init_method=f"file://{config['run_dir']}/store-{worker['group']}",
        rank=worker["member"],
        world_size=worker["size"],
        timeout=timedelta(seconds=config["timeout_s"]),
    )
    results = os.path.join(config["folder"], f"rank-{worker['rank']}.jsonl")
    with open(results, "w", encoding="utf-8", buffering=1) as file:
        is_right = Rank(torch, dist, config, worker, lambda line: file.write(json.dumps(line) + "\n")).run()
    if is_right:  # else the others may wait for this one, and never meet it there
        dist.destroy_process_group()
    return 0 if is_right else WRONG_SUM


class Rank:
    """One rank at work.

    :param torch: and ``dist``: the modules. :param say: takes a line of results.
    """

    def __init__(
        self,
        torch: Any,
        dist: Any,
        config: ProbeConfig,
        worker: WorkerConfig,
        say: Callable[[dict[str, Any]], object],
    ) -> None:
        self._torch = torch
        self._dist = dist
        self._config = config
        self._worker = worker
        self._say = say
        self._on_gpu = config["backend"] == "nccl"
        self._device = f"cuda:{worker['rank']}" if self._on_gpu else "cpu"
        self._token = self._zeros(1)

    def run(self) -> bool:
        """Check the sums, warm up, and measure all rounds; ``False`` when a sum is wrong."""
        self._meet()
        self._say({"ready": self._versions()})
        rows: dict[str, Callable[[], float]] = {}
        for message in self._config["messages"]:
            tensor = self._zeros(message["elements"])
            if not self._sum_is_right(tensor, message["name"]):
                return False
            tensor.zero_()  # which stays what it is, however often it is added up
            make = self._row_on_gpu if self._on_gpu else self._row_on_cpu
            rows[message["name"]] = make(tensor, message["iterations"])
        self._round(rows)
        for number in range(self._config["rounds"]):
            self._say({"round": number, "us": self._round(rows)})
        rows.clear()  # a communicator may not end before the graphs that hold it
        self._meet()
        return True

    def _zeros(self, elements: int) -> Any:
        return self._torch.zeros(elements, dtype=getattr(self._torch, self._config["dtype"]), device=self._device)

    def _versions(self) -> dict[str, Any]:
        nccl = ".".join(map(str, self._torch.cuda.nccl.version())) if self._on_gpu else ""
        return {"pid": os.getpid(), "torch": str(self._torch.__version__), "nccl": nccl}

    def _meet(self) -> None:
        """Return when all ranks of the group are here and nothing is under way."""
        self._dist.all_reduce(self._token)
        if self._on_gpu:
            self._torch.cuda.synchronize()

    def _round(self, rows: dict[str, Callable[[], float]]) -> dict[str, float]:
        found = {}
        for name, row in rows.items():
            self._meet()
            found[name] = row()
        return found

    def _sum_is_right(self, tensor: Any, name: str) -> bool:
        """Add up ones and twos: a peer whose data arrives as zeros, or not at all, shows."""
        member, size = self._worker["member"], self._worker["size"]
        due = size + size // 2
        tensor.fill_(1 + member % 2)
        self._dist.all_reduce(tensor)
        low, high = float(tensor.min()), float(tensor.max())
        if low == high == due:
            return True
        self._say({"wrong": {"message": name, "due": due, "from": str(low), "to": str(high)}})
        return False

    def _row_on_cpu(self, tensor: Any, iterations: int) -> Callable[[], float]:
        def row() -> float:
            began_ns = time.perf_counter_ns()
            for _ in range(iterations):
                self._dist.all_reduce(tensor)
            return (time.perf_counter_ns() - began_ns) / 1e3 / iterations

        return row

    def _row_on_gpu(self, tensor: Any, iterations: int) -> Callable[[], float]:
        cuda = self._torch.cuda
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(iterations):
                self._dist.all_reduce(tensor)

        def row() -> float:
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) * 1e3 / iterations

        return row


def _end_with(parent: int) -> None:
    """Let the kernel end this process when its parent is gone, whatever way that went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the process that started this one is gone")


def _forget_own_folder() -> None:
    """Python puts a script's folder first on its path, where modules of ours may have the names of others."""
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != own]


def main(arguments: list[str]) -> int:
    """Entry point; returns the exit code."""
    _forget_own_folder()
    if len(arguments) == 1:
        return lead(arguments[0])
    text, rank, parent = arguments
    _end_with(int(parent))
    config: ProbeConfig = json.loads(text)
    return work(config, next(worker for worker in config["workers"] if worker["rank"] == int(rank)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
