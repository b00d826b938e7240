"""Which worker of pytest-xdist runs a test: all tests of one layout go to one, so that its servers start only once.

Imported when pytest-xdist distributes tests. Its own groups are no way to say this: their names travel inside of
node ids, and pytest 9.2 took away the attribute by which pytest-xdist 3.8 puts them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
from xdist.scheduler import LoadGroupScheduling

from pytest_gpulayout.collection import layout_in_nodeid
from pytest_gpulayout.layout import Layout

if TYPE_CHECKING:
    from xdist.remote import Producer

_REFINED = ("load", "worksteal", "loadgroup")
"""Values of ``--dist`` that leave it to pytest-xdist where a test runs; the others are the user's decision."""


class LayoutScheduling(LoadGroupScheduling):  # type: ignore[misc]  # pytest-xdist says nothing of its types
    """Like ``--dist=loadgroup``, with a group for each layout."""

    def __init__(self, config: pytest.Config, log: Producer, layouts: Sequence[Layout]) -> None:
        super().__init__(config, log)
        self._layouts = layouts

    def _split_scope(self, nodeid: str) -> str:
        layout = layout_in_nodeid(nodeid, self._layouts)
        return super()._split_scope(nodeid) if layout is None else f"gpu layout {layout}"


def make_scheduler(config: pytest.Config, log: Producer, layouts: Sequence[Layout]) -> LayoutScheduling | None:
    """Return the scheduler of this run; ``None`` leaves it to pytest-xdist."""
    return LayoutScheduling(config, log, layouts) if config.getvalue("dist") in _REFINED else None
