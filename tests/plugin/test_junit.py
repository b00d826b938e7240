"""JUnit: as many failures as there are red verdicts, no errors for them, and the numbers as properties."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tests.support.suite import GATE, Suite

COUNTS = ("tests", "failures", "errors", "skipped")


def junit(suite: Suite, *arguments: str, subprocess: bool = False) -> ElementTree.Element:
    """Run and return the suite that JUnit's file holds."""
    suite.run("--junit-xml=junit.xml", *arguments, subprocess=subprocess)
    (found,) = ElementTree.parse(suite.pytester.path / "junit.xml").getroot().iter("testsuite")
    return found


def counts(found: ElementTree.Element) -> tuple[int, ...]:
    return tuple(int(found.get(name, "-1")) for name in COUNTS)


def properties(case: ElementTree.Element) -> dict[str, str]:
    return {item.get("name", ""): item.get("value", "") for item in case.iter("property")}


@pytest.fixture
def gate(suite: Suite) -> Suite:
    """Two layouts with settled baselines."""
    suite.write(test_it=GATE)
    suite.run("--gpu-layout=tp1,tp2", "--gpu-baseline=new")
    suite.settle()
    return suite


XDIST = pytest.param(("-n2",), marks=pytest.mark.end_to_end, id="xdist")
BOTH_WAYS = pytest.mark.parametrize("how", [pytest.param((), id="here"), XDIST])

RED = {
    "regression": ("slow_down=1.5", ()),
    "invalid": ("fail_requests=1", ()),
    "no-baseline": ("", ("--gpu-baseline-dir=elsewhere",)),
    "inconclusive": ("", ("--gpu-inconclusive=fail", "--gpu-tolerance=median_ttft_ms=0.05%")),
}


@BOTH_WAYS
@pytest.mark.parametrize("verdict", RED)
def test_failures_are_the_red_verdicts(gate: Suite, verdict: str, how: tuple[str, ...]) -> None:
    driver, arguments = RED[verdict]
    gate.fakes(driver=driver)

    found = junit(gate, "--gpu-layout=tp1,tp2", *arguments, *how, subprocess=bool(how))

    assert counts(found) == (2, 2, 0, 0)
    for case in found.iter("testcase"):
        (failure,) = case.iter("failure")
        assert properties(case)["gpulayout.smoke.verdict"] == verdict
        assert failure.get("message")


def test_a_green_and_a_red_verdict_are_told_apart(gate: Suite) -> None:
    gate.fakes(driver="slow_down=[1.0] + [1.5] * 9")

    found = junit(gate, "--gpu-layout=tp1,tp2")

    assert counts(found) == (2, 1, 0, 0)
    assert [properties(case)["gpulayout.smoke.verdict"] for case in found.iter("testcase")] == ["pass", "regression"]


@BOTH_WAYS
def test_properties_hold_each_gated_metric_in_numbers(gate: Suite, how: tuple[str, ...]) -> None:
    gate.fakes(driver="slow_down=1.5")

    found = junit(gate, "--gpu-layout=tp1", *how, subprocess=bool(how))

    (case,) = found.iter("testcase")
    told = properties(case)
    names = ("request_throughput", "median_ttft_ms", "median_tpot_ms")
    parts = ("verdict", "change", "ci_low", "ci_high")
    assert set(told) == {
        "gpulayout.smoke.verdict",
        *(f"gpulayout.smoke.{name}.{part}" for name in names for part in parts),
    }
    assert told["gpulayout.smoke.median_ttft_ms.verdict"] == "regression"
    change, low, high = (float(told[f"gpulayout.smoke.median_ttft_ms.{part}"]) for part in parts[1:])
    assert change == pytest.approx(0.5, abs=1e-3)
    assert 0 < low < change < high


def test_inconclusive_under_warn_is_no_failure_and_says_so_in_a_property(suite: Suite) -> None:
    suite.write(test_it=GATE)
    suite.run("--gpu-layout=tp1", "--gpu-baseline=new")

    found = junit(suite, "--gpu-layout=tp1")

    assert counts(found) == (1, 0, 0, 0)
    (case,) = found.iter("testcase")
    assert properties(case)["gpulayout.smoke.verdict"] == "inconclusive"
    assert [child.tag for child in case if child.tag in ("failure", "error", "skipped")] == []


OTHER = "{'name': 'other', 'input_tokens': 8, 'output_tokens': 8, 'concurrency': 2, 'requests': 8}"


def test_two_gates_in_one_test_have_properties_each(gate: Suite) -> None:
    gate.write(
        test_it=f"def test_speed(measure, perf_gate):\n    perf_gate(measure())\n    perf_gate(measure({OTHER}))"
    )

    found = junit(gate, "--gpu-layout=tp1")

    assert counts(found) == (1, 1, 0, 0)
    (case,) = found.iter("testcase")
    told = properties(case)
    assert (told["gpulayout.smoke.verdict"], told["gpulayout.other.verdict"]) == ("pass", "no-baseline")


IN_A_FIXTURE = """
import pytest

@pytest.fixture
def verdict(measure, perf_gate):
    return perf_gate(measure())

def test_speed(verdict): pass
"""


@pytest.mark.parametrize("verdict", RED)
def test_a_red_verdict_in_a_fixture_is_a_failure_as_well(gate: Suite, verdict: str) -> None:
    driver, arguments = RED[verdict]
    gate.fakes(driver=driver)
    gate.write(test_it=IN_A_FIXTURE)

    found = junit(gate, "--gpu-layout=tp1,tp2", *arguments)

    assert counts(found) == (2, 2, 0, 0)
    assert [properties(case)["gpulayout.smoke.verdict"] for case in found.iter("testcase")] == [verdict] * 2


def test_tests_without_a_gate_have_no_properties(suite: Suite) -> None:
    suite.write(test_it="def test_plain(): pass\ndef test_layout(gpu_layout): pass")

    assert list(junit(suite, "--gpu-layout=tp1").iter("property")) == []
