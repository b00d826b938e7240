"""The compute processes on NVIDIA GPUs, as the driver lists them (NVML through ``pynvml``)."""

from __future__ import annotations

from pytest_gpulayout.adapters.nvml_library import nvml_library


def gpu_processes() -> tuple[tuple[str, int, int | None], ...]:
    """Return the compute processes on all GPUs as (UUID of the GPU, process id, GPU memory in bytes).

    The memory is ``None`` where the driver does not tell. Process ids are those of the host; inside a container
    without the host's process ids they can be foreign.

    :raises TopologyError: there is no driver, or it does not list processes.
    """
    with nvml_library() as nvml:
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = nvml.nvmlDeviceGetUUID(handle)
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                found.append((uuid, process.pid, process.usedGpuMemory))
        return tuple(found)
