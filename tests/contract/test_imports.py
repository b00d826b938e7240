"""Dependencies point down: errors <- domain <- ports <- gate; adapters, plugin and fakes around them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import pytest_gpulayout

PACKAGE = "pytest_gpulayout"
ROOT = Path(pytest_gpulayout.__file__).parent
PLUGIN_LAYER = {
    *(
        "plugin",
        "session",
        "servers",
        "collection",
        "distribution",
        "options",
        "settings",
        "wiring",
        "evidence",
        "performance",
        "probing",
        "outcomes",
        "live",
        "layout_gates",
        "hookspecs",
    ),
    *("cli", "cli_baseline", "cli_common", "cli_compare", "cli_measure", "cli_nccl", "cli_plan", "cli_topo"),
    *("cli_approve", "cli_baseline_diff", "cli_calibrate", "cli_store", "cli_upkeep"),
    *("__main__", "gates", "gates.test_gate"),
}
OUTSIDE_WORLD = {
    *("pytest", "_pytest", "pluggy", "xdist"),
    *(
        "asyncio",
        "io",
        "os",
        "select",
        "selectors",
        "shutil",
        "signal",
        "socket",
        "subprocess",
        "tempfile",
        "threading",
    ),
    *("fsspec", "httptools", "psutil", "pynvml", "requests", "torch", "vllm"),
}


def names_of_modules() -> list[str]:
    """All modules of the package, without its name; ``""`` is the package itself."""
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        for path in ROOT.rglob("*.py")
    )


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def import_nodes(node: ast.AST, *, in_functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif is_for_type_checkers(child) or (not in_functions and isinstance(child, ast.FunctionDef)):
            continue
        else:
            yield from import_nodes(child, in_functions=in_functions)


@cache
def imports(module: str, *, in_functions: bool = False) -> frozenset[str]:
    """What a module imports; modules of the package start with a dot."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = set()
    for node in import_nodes(ast.parse(file.read_text(encoding="utf-8")), in_functions=in_functions):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            inner = [f"{node.module}.{name}" for name in names if is_module(f"{node.module}.{name}")]
            names = inner or [str(node.module)]
        found |= {name.removeprefix(PACKAGE) if name.startswith(PACKAGE) else name for name in names}
    return frozenset(found)


def is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def ours(module: str) -> set[str]:
    return {name[1:] for name in imports(module) if name.startswith(".")}


MODULES = names_of_modules()
DOMAIN = [
    name
    for name in MODULES
    if name not in PLUGIN_LAYER and name != "testing" and not name.startswith(("adapters", "schemas"))
]


def test_the_graph_is_read() -> None:
    graph: Mapping[str, set[str]] = {module: ours(module) for module in MODULES}

    assert graph["gate"] >= {"layout", "placement", "topology"}
    assert graph["judging"] >= {"baseline", "ports", "verdict"}
    assert graph["errors"] == set()
    assert "requests" in imports("servers", in_functions=True) | imports("adapters.http_session")


def test_no_cycles() -> None:
    try:
        list(TopologicalSorter({module: ours(module) for module in MODULES}).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", DOMAIN)
def test_domain_imports_neither_pytest_nor_what_opens_things_nor_layers_above(module: str) -> None:
    found = imports(module, in_functions=True)

    assert {name.partition(".")[0] for name in found} & OUTSIDE_WORLD == set()
    assert not [name for name in found if name.startswith(".adapters")]
    assert {name[1:] for name in found if name.startswith(".")} & (PLUGIN_LAYER | {"testing"}) == set()


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("adapters")])
def test_adapters_import_no_plugin_layer(module: str) -> None:
    found = imports(module, in_functions=True)

    assert "pytest" not in found
    assert {name[1:] for name in found if name.startswith(".")} & (PLUGIN_LAYER | {"testing"}) == set()


def test_fakes_import_no_adapter() -> None:
    assert not [name for name in imports("testing", in_functions=True) if name.startswith(".adapters")]
    assert "pytest" not in imports("testing", in_functions=True)


@pytest.mark.parametrize("module", ["plugin", "options", "hookspecs", "collection", "servers", "session", ""])
def test_plugin_layer_loads_adapters_when_they_are_used(module: str) -> None:
    assert not [name for name in imports(module) if name.startswith(".adapters")]


@pytest.mark.parametrize("module", ["plugin", "options", "hookspecs"])
def test_what_every_pytest_start_loads_is_light(module: str) -> None:
    assert ours(module) <= {"options", "hookspecs"}
