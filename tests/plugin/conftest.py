from __future__ import annotations

from pathlib import Path

# pytester forgets what a run inside it imported: loading it here saves seconds, numpy refuses a second time, and
# fsspec keeps its memory:// files.
import fsspec.implementations.memory  # noqa: F401
import jsonschema  # noqa: F401
import numpy  # noqa: F401
import pytest
import scipy.special  # noqa: F401

import pytest_gpulayout.adapters.baseline_files
import pytest_gpulayout.adapters.host
import pytest_gpulayout.adapters.recorded_topology
import pytest_gpulayout.session
import pytest_gpulayout.testing  # noqa: F401
from tests.support.suite import Suite


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each of these runs pytest inside pytest; together they take as long as all unit tests."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.end_to_end)


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # the runs inside are nobody's workers
    return Suite(pytester)
