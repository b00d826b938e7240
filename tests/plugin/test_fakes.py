"""The example in the docstring of :mod:`pytest_gpulayout.testing` works as it stands."""

from __future__ import annotations

import textwrap

from pytest_gpulayout import testing
from tests.support.suite import GATE, Suite


def test_documented_conftest(suite: Suite) -> None:
    assert testing.__doc__
    code = [line for line in testing.__doc__.splitlines() if line.startswith("    ") or not line]
    suite.pytester.makeconftest(textwrap.dedent("\n".join(code)))
    suite.write(test_it=GATE + "def test_transport(transport_report): assert transport_report.verdict == 'ok'")

    suite.run("--gpu-layout=tp8", "--gpu-baseline=new", "--gpu-link=nvlink").assert_outcomes(passed=1)
    suite.settle()
    suite.run("--gpu-layout=tp8", "--gpu-link=nvlink").assert_outcomes(passed=2)
