"""The fake of vLLM 0.32 of ``tests/support/fake_vllm``, but its workers are started by a real Ray.

With this folder's parent on ``PYTHONPATH``, here and on all nodes of the cluster. Only :mod:`.processes` differs.
"""

from pathlib import Path

__version__ = "0.32.0"
__path__.append(str(Path(__file__).parents[2] / "fake_vllm" / "vllm"))
