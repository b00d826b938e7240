"""Public is what ``__init__``, ``testing`` and ``hookspecs`` list, and nothing else."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType

import pytest

import pytest_gpulayout
from pytest_gpulayout import hookspecs, testing


@pytest.mark.parametrize("module", [pytest_gpulayout, testing, hookspecs])
def test_list_is_sorted_and_every_name_is_there(module: ModuleType) -> None:
    assert module.__all__ == sorted(module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name)), f"{name} has no docstring"


def test_package_lists_what_it_loads_by_name() -> None:
    assert pytest_gpulayout.__all__ == sorted(pytest_gpulayout._HOMES)
    for name, home in pytest_gpulayout._HOMES.items():
        assert getattr(pytest_gpulayout, name) is getattr(import_module(f"pytest_gpulayout.{home}"), name)


@pytest.mark.parametrize("module", [testing, hookspecs])
def test_list_is_all_that_the_module_defines(module: ModuleType) -> None:
    defined = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value)
    ]

    assert sorted(defined) == module.__all__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pytest_gpulayout' has no attribute 'nothing'"):
        pytest_gpulayout.nothing  # noqa: B018


def test_all_options_and_hooks_have_our_prefix() -> None:
    assert all(name.startswith("pytest_gpulayout_") for name in hookspecs.__all__)
