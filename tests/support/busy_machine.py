"""A pytest plugin for runs on real vLLM: the load of this machine decides about none of their tests.

What other processes and other virtual machines take from a server start makes it ``invalid``, as it should where the
machine is a user's own. Tests run where others work, too; that such starts are found is tested on numbers.
"""

from __future__ import annotations

import pytest

from pytest_gpulayout import measurement
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.validity import TRANSIENT, Problem, find_problems
from pytest_gpulayout.workload import Workload


def _lasting_problems(run: RunTrace, workload: Workload) -> tuple[Problem, ...]:
    return tuple(problem for problem in find_problems(run, workload) if problem.kind not in TRANSIENT)


def pytest_configure(config: pytest.Config) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(measurement, "find_problems", _lasting_problems)
    config.add_cleanup(patch.undo)
