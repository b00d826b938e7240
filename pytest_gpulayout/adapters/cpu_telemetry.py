"""What the CPUs of this host do at one moment: time spent, who spent it, load, frequency, quota and pressure.

Knows the kernel's accounts of CPU time. Leaves shares of a window to
:mod:`~pytest_gpulayout.adapters.telemetry_watch`.

Sources: proc(5) (``/proc/stat``, ``/proc/PID/stat`` through psutil, ``/proc/loadavg``); Linux
``Documentation/accounting/psi.rst``, ``Documentation/admin-guide/cgroup-v2.rst`` and
``Documentation/scheduler/sched-bwc.rst`` (version 1 counts nanoseconds, version 2 microseconds).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from pytest_gpulayout.adapters.nvml_processes import NvmlProcesses

Reading = dict[str, float]
"""Quantity -> value; what is not known is left out."""

_TREE_EVERY = 10  # readings: looking for new children reads /proc of every process
_FREQUENCY_EVERY = 4  # readings: asking each core for its clock may wake it up
_NAMED_OTHERS = 3
_NAMED_FROM_PERCENT = 1.0


class CpuReader:
    """Reads the CPUs again and again.

    :param server_pids: the server's processes, or those at the top of its tree; without one it is not known whose
        work is foreign.
    :param own_pid: the process at the top of the client's tree.
    """

    def __init__(
        self,
        server_pids: Sequence[int],
        own_pid: int,
        *,
        proc: Path = Path("/proc"),
        cgroups: Path = Path("/sys/fs/cgroup"),
    ) -> None:
        self._proc = proc
        self._roots = (*server_pids, own_pid) if server_pids else ()
        self._quotas = quota_files(server_pids[0] if server_pids else own_pid, proc, cgroups)
        self._members: dict[int, psutil.Process] = {}
        self._first_times: dict[int, float] = {}
        self._first_total = 0.0
        self._readings = 0
        self._notes: list[str] = []
        if not server_pids:
            self._notes.append("CPU time of other processes: not known, since the server's processes are not known")

    def read(self, *, at_an_end: bool) -> Reading:
        """Return the accounts as they are now; times are seconds of CPU since boot.

        :param at_an_end: of the window: everything is read, whatever it costs.
        """
        reading = _times()
        reading["load_1min"] = os.getloadavg()[0]
        if at_an_end or self._readings % _FREQUENCY_EVERY == 0:
            frequency = psutil.cpu_freq()
            reading |= {} if frequency is None or not frequency.current else {"frequency_mhz": frequency.current}
        if self._roots:
            if at_an_end or self._readings % _TREE_EVERY == 0:
                self._members |= _trees(self._roots)
            reading["own_s"] = self._own_time()
        reading |= self._pressure() | self._throttling()
        self._readings += 1
        return reading

    def begin(self) -> None:
        """Remember what each process outside of our trees had used, to name the busy ones at the end."""
        if self._roots:
            self._members |= _trees(self._roots)
            self._first_times = {process.pid: _time_of(process) for process in self._strangers()}
            self._first_total = _times().get("all_s", 0.0)

    def busiest_others(self) -> dict[str, float]:
        """Return the busiest processes since :meth:`begin` outside of our trees, busiest first.

        :returns: description (program and user) -> percent of all CPUs.
        """
        total = _times().get("all_s", 0.0) - self._first_total
        if not self._roots or total <= 0:
            return {}
        # One that began later had used nothing then.
        used = {
            process.pid: _time_of(process) - self._first_times.get(process.pid, 0.0) for process in self._strangers()
        }
        busiest = sorted(used, key=lambda pid: used[pid], reverse=True)[:_NAMED_OTHERS]
        describe = NvmlProcesses().describe
        shares = {f"{describe(pid) or 'a process'}, pid {pid}": 100 * used[pid] / total for pid in busiest}
        return {name: round(percent, 1) for name, percent in shares.items() if percent >= _NAMED_FROM_PERCENT}

    def notes(self) -> list[str]:
        """Return what could not be read, and why."""
        return list(self._notes)

    def _own_time(self) -> float:
        """CPU time of our trees; that of children who ended is their parents'."""
        total = 0.0
        for pid, process in list(self._members.items()):
            try:
                times = process.cpu_times()
            except psutil.Error:
                del self._members[pid]
                continue
            total += times.user + times.system + times.children_user + times.children_system
        return total

    def _strangers(self) -> Iterable[psutil.Process]:
        return (process for process in psutil.process_iter() if process.pid not in self._members)

    def _pressure(self) -> Reading:
        """Time in which some task waited for a CPU; ``some avg10=0.00 ... total=MICROSECONDS``."""
        try:
            first = (self._proc / "pressure" / "cpu").read_text(encoding="ascii").splitlines()[0]
            return {"pressure_us": int(first.rpartition("total=")[2])}
        except (OSError, ValueError, IndexError):
            return {}  # a kernel without PSI

    def _throttling(self) -> Reading:
        """What the quotas of the server's cgroup and of those above it cost, all together."""
        found: Reading = {}
        for path in self._quotas:
            try:
                lines = path.read_text(encoding="ascii").splitlines()
            except OSError:
                continue
            account = dict(line.split() for line in lines if len(line.split()) == 2)
            if "nr_throttled" not in account:
                continue
            stopped_us = int(account.get("throttled_usec", 0)) + int(account.get("throttled_time", 0)) / 1e3
            found["throttled_us"] = found.get("throttled_us", 0) + stopped_us
            found["throttled_periods"] = found.get("throttled_periods", 0) + int(account["nr_throttled"])
        return found


def _times() -> Reading:
    """``/proc/stat``: all time, that of programs (no interrupts), busy time, and what other machines stole.

    Guests' time is contained in user time. Interrupts belong to nobody's process.
    """
    times = psutil.cpu_times()
    programs = times.user + times.nice + times.system
    busy = programs + times.irq + times.softirq
    total = busy + times.idle + times.iowait + times.steal
    return {"all_s": total, "busy_s": busy, "programs_s": programs, "steal_s": times.steal} if total > 0 else {}


def _trees(roots: Iterable[int]) -> dict[int, psutil.Process]:
    """These processes and all below them, by id."""
    found: dict[int, psutil.Process] = {}
    for root in sorted(set(roots)):
        if root in found:
            continue
        try:
            top = psutil.Process(root)
            found |= {process.pid: process for process in (top, *top.children(recursive=True))}
        except psutil.Error:
            continue
    return found


def _time_of(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def quota_files(pid: int, proc: Path, cgroups: Path) -> list[Path]:
    """``cpu.stat`` of a process's cgroup and of those above it: a limit may stand at each level, as of a pod.

    Lines are ``0::/path`` in version 2, ``4:cpu,cpuacct:/path`` in version 1. In a container the paths may be those
    of the host, which are not seen here, while the container's own group is mounted at the top.
    """
    try:
        lines = (proc / str(pid) / "cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounts = [cgroups, cgroups / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [cgroups / controllers, cgroups / "cpu"]
        else:
            continue
        group = Path(path.lstrip("/"))
        candidates = (mount / level / "cpu.stat" for mount in mounts for level in (group, *group.parents))
        found += [file for file in candidates if file.is_file()]
    return list({file.resolve(): file for file in found})
