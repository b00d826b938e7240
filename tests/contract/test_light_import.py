"""Without ``--gpu-layout`` the plugin costs a pytest start almost nothing."""

from __future__ import annotations

import pytest

HEAVY = (
    *("numpy", "scipy", "torch", "vllm", "pynvml"),
    *("requests", "httptools", "jsonschema", "psutil", "fsspec"),
)
TEST = f"""
import sys

def test_nothing_heavy_is_loaded():
    assert "pytest_gpulayout.plugin" in sys.modules
    assert [name for name in {HEAVY!r} if name in sys.modules] == []

def test_that_would_need_a_layout(vllm_server):
    pass
"""


def test_plain_run_loads_nothing_heavy(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TEST)

    # xdist loads psutil where it is there, and hypothesis what it likes.
    result = pytester.runpytest_subprocess("-p", "no:xdist", "-p", "no:hypothesispytest")

    result.assert_outcomes(passed=1, skipped=1)


def test_package_is_loaded_by_name(pytester: pytest.Pytester) -> None:
    code = "import pytest_gpulayout, sys; print([m for m in sys.modules if m.startswith('pytest_gpulayout.')])"

    assert pytester.runpython_c(code).outlines == ["[]"]
