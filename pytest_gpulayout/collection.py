"""Which tests need a layout, for which layouts they run, and in what order: each server must start only once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from pytest_gpulayout.errors import GpuLayoutError
from pytest_gpulayout.layout import Layout, parse_layout
from pytest_gpulayout.settings import claim_of_marker

FIXTURE = "gpu_layout"
BETTER_THAN = "gpu_better_than"
"""Name of the marker."""


def parametrize(metafunc: pytest.Metafunc, layouts: Sequence[Layout]) -> None:
    """Parametrise a test that uses the fixture, or is marked for layouts, over the layouts asked for."""
    if FIXTURE not in metafunc.fixturenames:
        if metafunc.definition.get_closest_marker(FIXTURE) is None:
            return
        metafunc.fixturenames.append(FIXTURE)
    metafunc.parametrize(FIXTURE, layouts, ids=str, indirect=True, scope="session")


def layout_of(item: pytest.Item) -> Layout | None:
    """The layout a test is parametrised with, ``None`` for other tests."""
    callspec = getattr(item, "callspec", None)
    layout = callspec.params.get(FIXTURE) if callspec is not None else None
    return layout if isinstance(layout, Layout) else None


def server_group(item: pytest.Item) -> str | None:
    """Name shared by the tests that use one server, as far as collection can tell; ``None`` for other tests."""
    layout = layout_of(item)
    if layout is None:
        return None
    marker = item.get_closest_marker("gpu_model")
    model = [] if marker is None else [*marker.args, *(f"{name}={value!r}" for name, value in marker.kwargs.items())]
    return " ".join(map(str, [layout, *model]))


def deselect_others(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests whose marker names other layouts."""
    deselected = [item for item in items if not _wanted(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in set(deselected)]


def _wanted(item: pytest.Item) -> bool:
    layout, marker = layout_of(item), item.get_closest_marker(FIXTURE)
    if layout is None or marker is None or not marker.args:
        return True
    try:
        return layout in [parse_layout(spec) for spec in marker.args]
    except GpuLayoutError as error:
        raise pytest.UsageError(f"marker gpu_layout of {item.nodeid}: {error}") from error


def sort_by_server(items: list[pytest.Item], layouts: Sequence[Layout]) -> None:
    """Put the tests of one server side by side: by layout as asked for, then by model as first met.

    A layout that others are compared with comes before them. Tests that need no layout keep their places.
    """
    places = [place for place, item in enumerate(items) if layout_of(item) is not None]
    tests = [items[place] for place in places]
    groups = {group: number for number, group in enumerate(dict.fromkeys(map(server_group, tests)))}
    order = {layout: number for number, layout in enumerate(_compared_first(tests, layouts))}
    tests.sort(key=lambda item: (order.get(layout_of(item) or Layout(), len(order)), groups[server_group(item)]))
    for place, item in zip(places, tests, strict=True):
        items[place] = item


def _compared_first(tests: Sequence[pytest.Item], layouts: Sequence[Layout]) -> list[Layout]:
    """The layouts as asked for, but one that another is compared with before it: its numbers must be there.

    Of two that are compared with each other the one that was asked for first comes first.
    """
    needed: dict[Layout, set[Layout]] = {layout: set() for layout in layouts}
    for item in tests:
        if (layout := layout_of(item)) in needed:
            needed[layout] |= set(_compared_with(item)) - {layout}
    waiting = list(layouts)
    ordered: list[Layout] = []
    while waiting:
        ordered.append(next((one for one in waiting if not needed[one].intersection(waiting)), waiting[0]))
        waiting.remove(ordered[-1])
    return ordered


def _compared_with(item: pytest.Item) -> Iterator[Layout]:
    """The other layouts of a test's relative gates, as far as its markers tell them."""
    for marker in item.iter_markers(BETTER_THAN):
        try:
            yield claim_of_marker(marker).other
        except GpuLayoutError as error:
            raise pytest.UsageError(f"{item.nodeid}: {error}") from error


def layout_in_nodeid(nodeid: str, layouts: Sequence[Layout]) -> Layout | None:
    """The layout among a test's parameters, as its node id shows it: ``test_speed[tp2]``, ``test_it[a-tp2]``."""
    parameters = nodeid.rpartition("::")[2].partition("[")[2].partition("]")[0].split("-")
    return next((layout for layout in layouts if str(layout) in parameters), None)
