"""NVIDIA's driver library (NVML) through ``pynvml``: opened for a moment, its errors turned into ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pytest_gpulayout.errors import TopologyError


@contextmanager
def nvml_library() -> Iterator[Any]:
    """Give the ``pynvml`` module, initialised; what NVML raises inside becomes our error with NVML's words."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise no_gpu(f"NVML says {str(error)!r}") from error
    try:
        yield pynvml
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError) as error:
        raise TopologyError(
            f"the list of NVIDIA GPUs was expected, found that NVML says {str(error)!r}\n"
            "  in the NVIDIA driver of this machine\n"
            "  look at 'nvidia-smi' and 'dmesg | grep -i NVRM'; a lost GPU needs a reset of the machine"
        ) from error
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def no_gpu(reason: str) -> TopologyError:
    """Return the error that says that there is no GPU, and what to type instead."""
    return TopologyError(
        f"an NVIDIA GPU was expected, no NVIDIA GPU was found: {reason}\n"
        "  on this machine, through libnvidia-ml.so.1\n"
        "  type --gpu-platform=cpu to run vLLM's CPU build, or --gpu-topology=FILE to check a recorded topology; "
        "in a container, start it with --gpus=all"
    )


def optional(call: Callable[..., Any], *arguments: object) -> Any:
    """Return what NVML answers, ``None`` where this driver or this GPU has no answer."""
    import pynvml

    unanswered = (
        pynvml.NVMLError_FunctionNotFound,
        pynvml.NVMLError_NotSupported,
        pynvml.NVMLError_InvalidArgument,
        pynvml.NVMLError_NoPermission,
        pynvml.NVMLError_Unknown,
    )
    try:
        return call(*arguments)
    except unanswered:
        return None
