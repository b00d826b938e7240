"""Lets the ranks of a layout add up messages with ``torch.distributed``: NCCL on GPUs, gloo on CPUs.

Starts a process for each rank on the layout's devices (:mod:`~pytest_gpulayout.adapters.collective_worker`) below a
keeper, with the locks that servers take, waits for them, and reads what they left. The ranks find each other through
a file in a temporary folder; gloo connects them over loopback, and NCCL as it does in a server, with the same log.
Whatever way it ends, no process, lock or temporary file remains. Leaves what the times mean to
:mod:`~pytest_gpulayout.collectives`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pytest_gpulayout.adapters import collective_worker
from pytest_gpulayout.adapters.cpu_host import parse_cpus
from pytest_gpulayout.adapters.device_lock import DeviceLocks, lock_names
from pytest_gpulayout.adapters.kept_process import KeptProcess
from pytest_gpulayout.adapters.nccl_capture import NCCL_SUBSYSTEMS, NcclCapture
from pytest_gpulayout.collectives import GroupTimes, Message, ProbeRun
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.nccl_log import NcclLog, merge, parse_nccl_log
from pytest_gpulayout.occupancy import await_idle_devices
from pytest_gpulayout.ports import GpuProcessSource, ProbeSpec, Progress
from pytest_gpulayout.transport import TransportFamily

_TERM_TIMEOUT_S = 5.0
_GRACE_S = 15.0
_POLL_S = 0.1
_TAIL_LINES = 6
_LONGEST_LINE = 200
_CHUNK_BYTES = 1 << 17


class TorchProbe:
    """Runs probes on this machine.

    :param log_dir: an existing folder; every start gets its own folder there for what its ranks leave.
    :param processes: lists who computes on the GPUs; without it nothing is known of that.
    :param wait_s: how long to wait for others to leave the devices. :param clock: in seconds, monotonic.
    """

    def __init__(
        self,
        log_dir: Path,
        processes: GpuProcessSource | None = None,
        *,
        wait_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._log_dir = log_dir
        self._processes = processes
        self._wait_s = wait_s
        self._clock = clock
        self._sleep = sleep
        self._started = 0

    def run(self, spec: ProbeSpec, progress: Progress) -> ProbeRun:
        """Measure one start; see :class:`pytest_gpulayout.ports.CollectiveProbe`."""
        self._started += 1
        folder = self._log_dir / f"probe-{self._started}-{spec.layout}"
        folder.mkdir(parents=True)
        with ExitStack() as undo:
            owner = f"pytest, probe of layout {spec.layout}"
            locks = DeviceLocks(lock_names(spec.platform, spec.devices), owner, progress)
            undo.callback(locks.release)
            self._await_idle(spec, progress)
            ranks = _Ranks(spec, folder, locks)
            undo.callback(ranks.stop)
            began_s = self._clock()
            self._wait(ranks, spec, began_s, progress)
            return ranks.result(self._clock() - began_s)

    def _wait(self, ranks: _Ranks, spec: ProbeSpec, began_s: float, progress: Progress) -> None:
        while (code := ranks.exit_code()) is None:
            if self._clock() - began_s > spec.plan.timeout_s:
                raise ranks.too_slow()
            progress(f"{spec.layout}: probing the links, {ranks.state(spec.groups[0][0])}")
            self._sleep(_POLL_S)
        if code != 0:
            raise ranks.failed()

    def _await_idle(self, spec: ProbeSpec, progress: Progress) -> None:
        """Wait until nobody else computes on the GPUs; the locks keep out only those who take them, too."""
        if self._processes is None or spec.platform == "cpu":
            return
        await_idle_devices(
            self._processes,
            spec.layout,
            spec.devices,
            wait_s=self._wait_s,
            clock=self._clock,
            sleep=self._sleep,
            progress=progress,
        )


class _Ranks:
    """The processes of one start, and what they leave in its folder."""

    def __init__(self, spec: ProbeSpec, folder: Path, locks: DeviceLocks) -> None:
        self._spec = spec
        self._folder = folder
        self._log = folder / "ranks.log"
        self._run_dir = Path(tempfile.mkdtemp(prefix="gpulayout-"))
        nccl_dir = folder / "nccl"
        nccl_dir.mkdir(mode=0o700)
        environment = probe_environment(spec, self._run_dir, nccl_dir)
        self._nccl = NcclCapture(environment if spec.platform == "cuda" else {}, Path.cwd(), time.time())
        config = json.dumps(worker_config(spec, folder, self._run_dir))
        self._kept = KeptProcess(
            [spec.python, str(collective_worker.__file__), config],
            environment,
            log=self._log,
            run_dir=self._run_dir,
            locks=locks,
            term_timeout_s=_TERM_TIMEOUT_S,
        )

    def exit_code(self) -> int | None:
        """Of the process above the ranks, ``None`` while it runs."""
        return self._kept.exit_code

    def stop(self) -> None:
        """End all ranks and remove their temporary files.

        :raises MeasurementError: one of them cannot be ended.
        """
        try:
            self._kept.end(_TERM_TIMEOUT_S + _GRACE_S)
        except subprocess.TimeoutExpired as error:
            pids = " ".join(str(process.pid) for process in self._kept.processes())
            raise MeasurementError(
                f"the ranks of a probe must be gone {_TERM_TIMEOUT_S + _GRACE_S:.0f} s after they were asked to end, "
                f"and are not\n  layout {self._spec.layout}, processes {pids}\n"
                f"  end them: kill -9 {pids} {self._kept.keeper_pid}"
            ) from error
        shutil.rmtree(self._run_dir, ignore_errors=True)  # the keeper did, unless it was killed

    # -- what they left --------------------------------------------------------------------------------------------

    def result(self, duration_s: float) -> ProbeRun:
        """Return what was measured.

        :raises MeasurementError: a rank has measured less than it was asked to.
        """
        groups = tuple(self._group(ranks) for ranks in self._spec.groups)
        ready = [self._told(rank, "ready")[0] for ranks in self._spec.groups for rank in ranks]
        name = f"nccl {ready[0]['nccl']}" if ready[0]["nccl"] else "gloo"
        backend = f"{name} of torch {ready[0]['torch']}"
        return ProbeRun(groups, duration_s, backend, self._transports([one["pid"] for one in ready]))

    def _transports(self, pids: Sequence[int]) -> dict[str, int]:
        if self._spec.platform == "cpu":
            return {TransportFamily.CPU_GLOO.value: sum(len(ranks) * (len(ranks) - 1) for ranks in self._spec.groups)}
        return dict(merge(map(_read_nccl_log, self._nccl.files(pids))).transports)

    def _group(self, ranks: Sequence[int]) -> GroupTimes:
        told = [self._told(rank, "us") for rank in ranks]
        if any(len(rounds) != self._spec.plan.rounds for rounds in told):
            raise self._error("and left fewer rounds than they were asked for")
        rounds = (
            {message.name: max(float(rank[number][message.name]) for rank in told) for message in self._messages}
            for number in range(self._spec.plan.rounds)
        )
        return GroupTimes(tuple(ranks), tuple(rounds))

    @property
    def _messages(self) -> Sequence[Message]:
        return self._spec.plan.messages()

    def _told(self, rank: int, key: str) -> list[Any]:
        """The values of a key in the lines that a rank wrote; a line that is cut off is left out."""
        return [line[key] for line in _json_lines(self._folder / f"rank-{rank}.jsonl") if key in line]

    def state(self, rank: int) -> str:
        """How far a rank has come, in words."""
        if rounds := len(self._told(rank, "us")):
            return f"after round {rounds} of {self._spec.plan.rounds}"
        return "warming up" if self._told(rank, "ready") else "loading PyTorch and connecting"

    # -- messages --------------------------------------------------------------------------------------------------

    def failed(self) -> MeasurementError:
        """Say which rank failed first, and how."""
        for ranks in self._spec.groups:
            for rank in ranks:
                if wrong := self._told(rank, "wrong"):
                    return self._wrong_sum(ranks, rank, wrong[0])
        ended = [line for line in _json_lines(self._log) if line.get("exit")]
        if not ended:
            return self._error("and the process above them went away", more=_tail(self._log))
        return self._error(f"and rank {ended[0]['rank']} failed first, {_exit_text(ended[0]['exit'])}")

    def too_slow(self) -> MeasurementError:
        """Say how far each rank has come."""
        seconds = self._spec.plan.timeout_s
        advice = f"give it more time: let the fixture gpu_probe_plan return a plan with timeout_s above {seconds:g}"
        return self._error(f"and were not done within {seconds:g} s", advice=advice)

    def _wrong_sum(self, ranks: Sequence[int], rank: int, wrong: Mapping[str, Any]) -> MeasurementError:
        members = ",".join(map(str, ranks))
        return MeasurementError(
            f"the sum of an all-reduce over ranks {members} must be right, and it is not: in the message "
            f"{wrong['message']} rank {rank} got {wrong['from']} to {wrong['to']}, {wrong['due']} was due\n"
            f"  layout {self._spec.layout}, in {self._folder}\n"
            "  data between devices is lost or changed: look for IOMMU and ACS (GPU Direct: NCCL's manual, "
            "Troubleshooting); NCCL_P2P_DISABLE=1 shows whether direct access between the GPUs is to blame"
        )

    def _error(self, what: str, *, advice: str = "", more: Sequence[str] = ()) -> MeasurementError:
        """One message: what was required and found, the last lines of each rank, where, and what to do."""
        spec = self._spec
        backend = _backend(spec)
        lines = [f"the ranks of layout {spec.layout} were to add up messages over {backend}, {what}"]
        for rank in sorted(rank for ranks in spec.groups for rank in ranks):
            tail = _tail(self._folder / f"rank-{rank}.log")
            lines.append(f"  rank {rank}, {self.state(rank)}{'; its last lines:' if tail else ', and said nothing'}")
            lines += [f"    {line}" for line in tail]
        lines += [f"    {line}" for line in more]
        if any("No module named 'torch'" in line for line in lines):
            advice = f"install PyTorch for {spec.python}, such as with vLLM: pip install 'pytest-gpulayout[vllm]'"
        lines += [f"  in {self._folder}", f"  {advice or f'read all of it: less {self._folder}/rank-*.log'}"]
        return MeasurementError("\n".join(lines))


def worker_config(spec: ProbeSpec, folder: Path, run_dir: Path) -> collective_worker.ProbeConfig:
    """Return what the ranks are told. :param folder: for what they leave. :param run_dir: goes with them."""
    workers: list[collective_worker.WorkerConfig] = []
    for group, ranks in enumerate(spec.groups):
        for member, rank in enumerate(ranks):
            cpus = parse_cpus(spec.devices[rank].cpu_affinity or "") if spec.platform == "cpu" else []
            workers.append({"rank": rank, "group": group, "member": member, "size": len(ranks), "cpus": cpus})
    return {
        "folder": str(folder),
        "run_dir": str(run_dir),
        "backend": _backend(spec),
        "dtype": spec.plan.dtype,
        "rounds": spec.plan.rounds,
        "timeout_s": spec.plan.timeout_s,
        "messages": [
            {"name": message.name, "elements": message.elements, "iterations": message.iterations}
            for message in spec.plan.messages()
        ],
        "workers": workers,
    }


def probe_environment(spec: ProbeSpec, run_dir: Path, nccl_dir: Path) -> dict[str, str]:
    """Return the environment of the ranks: that of a server as far as it concerns their connections.

    Whatever the caller has set for NCCL or gloo stays as it is.
    """
    environment = dict(os.environ) | {"TMPDIR": str(run_dir)}
    if spec.platform == "cpu":
        defaults = {"GLOO_SOCKET_IFNAME": "lo"}  # it would listen at the address of the host's name
    else:
        environment |= {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": ",".join(device.uuid or str(device.index) for device in spec.devices),
        }
        defaults = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": NCCL_SUBSYSTEMS}
        defaults |= {"NCCL_DEBUG_FILE": str(nccl_dir / "nccl.%h.%p.log")}
    return environment | {name: value for name, value in defaults.items() if name not in environment}


def _backend(spec: ProbeSpec) -> str:
    return "gloo" if spec.platform == "cpu" else "nccl"


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines; what is no object, such as a line that is cut off, is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _tail(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line.strip()[:_LONGEST_LINE] for line in lines if line.strip()][-_TAIL_LINES:]


def _exit_text(code: int) -> str:
    return f"with exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"


def _read_nccl_log(path: Path) -> NcclLog:
    with path.open("rb") as file:
        return parse_nccl_log(iter(lambda: file.read(_CHUNK_BYTES), b""), str(path))
