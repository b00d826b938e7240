"""What is said before, after and beside the tests: header, summary, ``--gpu-results``, JUnit."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from pytest_gpulayout.schemas import validate
from tests.support.suite import GATE, Suite

FOUR_KINDS = (
    """
def test_links(gpu_topology): gpu_topology.assert_links()
def test_transport(transport_report): pass
"""
    + GATE
)


def test_header_names_what_is_tested_on_what(suite: Suite) -> None:
    suite.write(test_it="def test_it(gpu_layout): pass")

    result = suite.run("--gpu-layout=tp2,tp1")

    result.stdout.fnmatch_lines(
        [
            "gpu layout: tp2, tp1 on cuda, 8 x NVIDIA H200, worst link NV18, driver 580.65.06",
            "gpu layout: vLLM *, torch *, NCCL *",
            "gpu layout: baselines in /*/gpu-baselines (check)",
        ],
        consecutive=True,
    )


def test_header_of_the_cpu_platform(suite: Suite) -> None:
    suite.write(test_it="def test_it(gpu_layout): pass")

    result = suite.run("--gpu-layout=tp1", "--gpu-platform=cpu")

    result.stdout.fnmatch_lines(["gpu layout: tp1 on cpu, *, * cores, * NUMA node* (vLLM's CPU build)"])


def test_summary_has_a_block_per_layout(suite: Suite) -> None:
    suite.write(test_it=FOUR_KINDS)

    result = suite.run("--gpu-layout=tp1,tp2", "--gpu-baseline=new")

    lines = result.outlines[result.outlines.index("=" * 34 + " gpu layout " + "=" * 34) :]
    blocks = [line for line in lines if line.startswith("tp")]
    assert blocks == [
        "tp1: worst link none needed, transport none needed, vLLM 0.32.0, ready in 1 s",
        "tp2: worst link NV18, transport P2P/CUMEM x4, vLLM 0.32.0, ready in 1 s",
    ]


def test_no_summary_without_findings(suite: Suite) -> None:
    suite.write(test_it="def test_it(gpu_layout): pass")

    suite.run("--gpu-layout=tp1").stdout.no_fnmatch_line("=*= gpu layout =*=")


@pytest.mark.parametrize(
    "arguments", [(), pytest.param(("-n2",), marks=pytest.mark.end_to_end)], ids=["here", "xdist"]
)
def test_results_follow_their_schema(suite: Suite, arguments: tuple[str, ...]) -> None:
    suite.fakes(driver="noise=0.01")
    suite.write(test_it=FOUR_KINDS)
    suite.run("--gpu-layout=tp1,tp2", "--gpu-baseline=new")

    result = suite.run("--gpu-layout=tp1,tp2", "--gpu-results=results.json", *arguments, subprocess=bool(arguments))

    assert result.ret == 0
    document = suite.read_results()
    assert validate(document, "results") == []
    kinds = sorted((record["kind"], record["layout"]) for record in document["records"])
    assert kinds == [
        ("comparison", "tp1, tp2"),
        *[("performance", "tp1"), ("performance", "tp2"), ("processes", "tp1"), ("processes", "tp2")],
        *[("server", "tp1"), ("server", "tp2")],
        *[("topology", "tp1"), ("topology", "tp2"), ("transport", "tp1"), ("transport", "tp2")],
    ]
    tests = {record["test"] for record in document["records"]}
    assert tests >= {"test_it.py::test_speed[tp1]", "test_it.py::test_speed[tp2]"}
    result.stdout.fnmatch_lines([f"results: {suite.results}"])


def test_results_of_failing_tests(suite: Suite) -> None:
    suite.fakes(topology="gpus=2, link='PHB'", launcher="transport='NET/Socket/0'", driver="fail_requests=1")
    suite.write(test_it=FOUR_KINDS)

    suite.run("--gpu-layout=tp2,tp4", "--gpu-results=results.json").assert_outcomes(failed=5, passed=1)

    document = suite.read_results()
    assert validate(document, "results") == []
    found = {record["kind"]: record.get("ok", record.get("verdict")) for record in document["records"]}
    assert found == {
        "topology": True,
        "server": None,
        "processes": True,
        "transport": False,
        "performance": "invalid",
    }


def test_results_of_a_regression_hold_the_numbers(suite: Suite) -> None:
    suite.write(test_it=GATE)
    suite.run("--gpu-layout=tp1", "--gpu-baseline=new")
    suite.fakes(driver="slow_down=1.4")

    suite.run("--gpu-layout=tp1", "--gpu-results=deep/er.json")

    document = json.loads((suite.pytester.path / "deep" / "er.json").read_text())
    assert validate(document, "results") == []
    (record,) = [record for record in document["records"] if record["kind"] == "performance"]
    changes = {metric["name"]: round(metric["change"], 3) for metric in record["metrics"]}
    assert record["verdict"] == "regression"
    assert changes == {"request_throughput": -0.286, "median_ttft_ms": 0.4, "median_tpot_ms": 0.4}
    assert [run["median_ttft_ms"] for run in record["runs"]] == pytest.approx([28.0] * len(record["runs"]))


def test_results_are_written_when_nothing_was_found(suite: Suite) -> None:
    suite.write(test_it="def test_it(gpu_layout): pass")

    suite.run("--gpu-layout=tp1", "--gpu-results=results.json")

    assert suite.read_results()["records"] == []


def test_junit_failures_are_the_gates_that_failed(suite: Suite) -> None:
    suite.fakes(topology="gpus=2", launcher="transport='NET/Socket/0'", driver="fail_requests=1")
    suite.write(test_it=FOUR_KINDS)

    suite.run("--gpu-layout=tp2,tp4", "--junit-xml=junit.xml")

    (run,) = ElementTree.parse(suite.pytester.path / "junit.xml").getroot().iter("testsuite")
    assert {name: run.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "6",
        "failures": "5",
        "errors": "0",
        "skipped": "0",
    }
    failed = [case.get("name") for case in run.iter("testcase") if case.find("failure") is not None]
    assert failed == [
        *("test_transport[tp2]", "test_speed[tp2]"),
        *("test_links[tp4]", "test_transport[tp4]", "test_speed[tp4]"),
    ]


def test_built_in_gate_needs_no_test_file(suite: Suite) -> None:
    arguments = ("--pyargs", "pytest_gpulayout.gates", "--rootdir=.", "--gpu-layout=tp1,tp2")
    # Given as a package its tests do not lie below the suite's conftest, so the fakes come as a plugin.
    suite.pytester.path.joinpath("conftest.py").rename(suite.pytester.path / "fakes.py")
    suite.pytester.syspathinsert()

    result = suite.run(*arguments, "-p", "fakes", "--gpu-baseline=new")
    assert result.ret == 0
    result.assert_outcomes(passed=6, skipped=1)
    result.stdout.fnmatch_lines(["*6 passed, 1 skipped, 3 baseline recorded*"])
    suite.settle()

    suite.run(*arguments, "-p", "fakes").assert_outcomes(passed=9, skipped=1)
