"""Fail a test run when an LLM server's GPU layout, transport or speed has regressed.

The public names below are loaded when they are used: the plugin is imported at every pytest start, and must cost
nothing there. Everything else may change without notice, apart from :mod:`pytest_gpulayout.testing` and
:mod:`pytest_gpulayout.hookspecs`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpulayout.errors import GpuLayoutError
    from pytest_gpulayout.gate import PlacedLayout
    from pytest_gpulayout.layout import Layout, parse_layout
    from pytest_gpulayout.measurement import Measurement
    from pytest_gpulayout.servers import ModelSpec, ServerView
    from pytest_gpulayout.transport import TransportReport
    from pytest_gpulayout.verdict import Status, Verdict
    from pytest_gpulayout.workload import Workload

__all__ = [
    "GpuLayoutError",
    "Layout",
    "Measurement",
    "ModelSpec",
    "PlacedLayout",
    "ServerView",
    "Status",
    "TransportReport",
    "Verdict",
    "Workload",
    "parse_layout",
]

_HOMES = {
    "GpuLayoutError": "errors",
    "Layout": "layout",
    "Measurement": "measurement",
    "ModelSpec": "servers",
    "PlacedLayout": "gate",
    "ServerView": "servers",
    "Status": "verdict",
    "TransportReport": "transport",
    "Verdict": "verdict",
    "Workload": "workload",
    "parse_layout": "layout",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
