"""Where an actor shall run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class NodeAffinitySchedulingStrategy:
    """On this node and, unless ``soft``, on no other."""

    node_id: str
    soft: bool
