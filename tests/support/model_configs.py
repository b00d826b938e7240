"""Configs of well-known models, as tests use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pytest_gpulayout.model_config import read_shape
from pytest_gpulayout.model_quantization import read_quantization
from pytest_gpulayout.model_shape import ModelShape
from pytest_gpulayout.plan_inputs import PlannedModel, planned_model

FOLDER = Path(__file__).parent.parent / "data" / "model_configs"


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """The config of a model; a change to ``None`` is written as null, as many configs do."""
    document: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return {**document, **changes}


def shape_of(name: str, **changes: Any) -> ModelShape:
    """The shape of a model."""
    return read_shape(config_of(name, **changes), f"{name}.json")


def model_of(name: str, *, dtype: str = "auto", cache_dtype: str = "auto", **changes: Any) -> PlannedModel:
    """A model with its tensors, as a plan takes it."""
    config = config_of(name, **changes)
    shape, quantization = read_shape(config, name), read_quantization(config, name)
    return planned_model(shape, quantization, dtype=dtype, cache_dtype=cache_dtype)
