"""Ray's tables."""

from __future__ import annotations

from typing import Any

from ray import STATE, _free


def available_resources_per_node() -> dict[str, dict[str, float]]:
    """Node id -> what is free; Ray leaves out what is not."""
    return {node: {"GPU": float(len(gpus))} if gpus else {} for node, gpus in _free.items()}


def actors() -> dict[str, dict[str, Any]]:
    """All actors of the cluster, by id."""
    return {str(number): actor for number, actor in enumerate(STATE.get("actors", []))}


def jobs() -> list[dict[str, Any]]:
    """All jobs of the cluster."""
    found: list[dict[str, Any]] = STATE.get("jobs", [])
    return found
