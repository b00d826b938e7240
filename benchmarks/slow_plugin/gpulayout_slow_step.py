"""A vLLM plugin that makes every engine step slower by ``GPULAYOUT_SLOW_STEP_US`` microseconds.

vLLM loads it in each of its processes through the entry point ``vllm.general_plugins`` (vLLM 0.32,
``vllm/plugins/__init__.py``), which it finds when this folder is in ``PYTHONPATH``. Without the variable it does
nothing.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

_VARIABLE = "GPULAYOUT_SLOW_STEP_US"
_MARK = "_gpulayout_slowed"


def register() -> None:
    """Wrap the engine's step; vLLM may call this more than once in a process."""
    delay_s = float(os.environ.get(_VARIABLE) or 0) / 1e6
    if delay_s <= 0:
        return
    from vllm.v1.engine.core import EngineCore

    for name in ("step", "step_with_batch_queue"):
        step = getattr(EngineCore, name)
        if not hasattr(step, _MARK):
            setattr(EngineCore, name, _slowed(step, delay_s))


def _slowed(step: Callable[..., tuple[Any, bool]], delay_s: float) -> Callable[..., tuple[Any, bool]]:
    """Sleep after each step that computed something: the answer's tokens leave the engine so much later."""

    @functools.wraps(step)
    def slowed(self: object) -> tuple[Any, bool]:
        outputs, model_executed = step(self)
        if model_executed:
            time.sleep(delay_s)
        return outputs, model_executed

    setattr(slowed, _MARK, True)
    return slowed
