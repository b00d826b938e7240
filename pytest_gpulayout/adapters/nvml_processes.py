"""The compute processes on NVIDIA GPUs, as the driver lists them (NVML through ``pynvml``).

Sources: NVML API reference, "Device Queries" (``nvmlDeviceGetComputeRunningProcesses``,
``nvmlDeviceGetMPSComputeRunningProcesses``). Processes that only draw, such as a display server, stand in another
list and are not read: they hold no compute context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from pytest_gpulayout.adapters.nvml_library import nvml_library, optional
from pytest_gpulayout.occupancy import GpuProcess, GpuUse, Occupancy

_MPS_SERVER = "nvidia-cuda-mps"  # its context serves its clients, which are listed themselves
_SCRIPTS = (".py", ".sh")


class NvmlProcesses:
    """Who computes on the GPUs of this machine, whatever ``CUDA_VISIBLE_DEVICES`` hides from CUDA."""

    def snapshot(self) -> Occupancy:
        """Return all GPUs and the processes that compute on them; a GPU that is lost is left out.

        Process ids are those of this container where the driver knows them, else those of the host.

        :raises TopologyError: there is no driver, or it fails.
        """
        gpus: list[GpuUse] = []
        processes: list[GpuProcess] = []
        with nvml_library() as nvml:
            for index in range(nvml.nvmlDeviceGetCount()):
                try:
                    gpu, found = _read_gpu(nvml, index)
                except nvml.NVMLError_GpuIsLost:
                    continue
                gpus.append(gpu)
                processes += found
        return Occupancy(tuple(gpus), tuple(processes))

    def describe(self, pid: int) -> str:
        """Return a process's program and user, such as ``python train.py (user bob)``; ``""`` if it is not seen.

        Of its arguments only the name of a script or module is shown: others may be secret.
        """
        try:
            process = psutil.Process(pid)
            return f"{_program(process)} (user {process.username()})"
        except psutil.Error:
            return ""


def _read_gpu(nvml: Any, index: int) -> tuple[GpuUse, list[GpuProcess]]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    uuid = nvml.nvmlDeviceGetUUID(handle)
    memory = optional(nvml.nvmlDeviceGetMemoryInfo, handle)
    # Without the version pynvml turns "this driver has no such function" into an error of its own.
    listed = _list(nvml, nvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)
    clients = _list(nvml, nvml.nvmlDeviceGetMPSComputeRunningProcesses_v3, handle)
    gpu = GpuUse(index, uuid, None if memory is None else int(memory.used), listed=listed is not None)
    found = {**(listed or {}), **(clients or {})}
    return gpu, [GpuProcess(uuid, pid, used) for pid, used in found.items() if not _is_mps_server(pid)]


def _list(nvml: Any, call: Callable[[Any], Any], handle: Any) -> Mapping[int, int | None] | None:
    """Memory in bytes by process id; ``None`` where there is no such list: WSL2, some virtual GPUs, old drivers."""
    try:
        return {process.pid: process.usedGpuMemory for process in call(handle)}
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return None


def _is_mps_server(pid: int) -> bool:
    try:
        return psutil.Process(pid).name().startswith(_MPS_SERVER)
    except psutil.Error:
        return False


def _program(process: psutil.Process) -> str:
    """``python train.py`` of ``/usr/bin/python -u /home/bob/train.py --token=...``."""
    words = process.cmdline()
    if not words:
        return process.name()
    program = words[0].strip() if words[0].startswith("VLLM::") else Path(words[0].split(" ")[0]).name
    modules = [after for word, after in pairwise(words) if word == "-m"]
    scripts = [Path(word).name for word in words[1:] if word.endswith(_SCRIPTS)]
    return " ".join([program, *[*modules, *scripts][:1]])
