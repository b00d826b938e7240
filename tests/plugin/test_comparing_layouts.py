"""Several layouts in one run: the table at the end, ``perf_gate.better_than`` and the marker, with fakes."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from pytest_gpulayout.schemas import validate
from tests.support.suite import GATE, Suite

# Servers of each layout are slower or faster by a factor, whichever test or gate starts them.
SPEEDS = """
class ByLayout(FakeServerLauncher):
    def launch(self, spec, progress):
        self._slow_down = {{spec.python: {speeds}.get(str(spec.layout), 1.0)}}
        return super().launch(spec, progress)

def pytest_gpulayout_server_launcher(settings, log_dir):
    return ByLayout(log_dir, on_event=note, transport={transport!r})
"""
CLAIM = """
def test_speed(measure, perf_gate):
    measure()
    perf_gate.better_than("tp1", "request_throughput", 1.5)
"""
MARKED = """
import pytest

@pytest.mark.gpu_better_than("tp1", "request_throughput", 1.5)
def test_speed(measure):
    measure()
"""


def speeds(
    suite: Suite, *, driver: str = "", transport: str = "P2P/CUMEM", topology: str = "", **factors: float
) -> None:
    """Let servers of each layout take so many times as long as those of others."""
    suite.fakes(driver=driver, topology=topology, more=SPEEDS.format(speeds=factors, transport=transport))


@pytest.fixture
def gate(suite: Suite) -> Suite:
    suite.write(test_it=GATE)
    return suite


# -- the table -------------------------------------------------------------------------------------------------------


def test_layouts_of_one_run_end_in_a_table_and_an_advice(gate: Suite) -> None:
    speeds(gate, tp4=1.5, transport="SHM/direct", topology="link='PHB'")

    result = gate.run(
        "--gpu-layout=tp1,tp4", "--gpu-baseline=off", "--gpu-hour-cost=3.6", "--gpu-results=results.json"
    )

    result.stdout.fnmatch_lines(
        [
            "layouts compared: smoke on org/tiny, 95% intervals",
            "   *tp1 * tp4*",
            "  server starts * 1 * 1",
            "  GPUs * 1 * 4",
            "  worst link * none needed * PHB",
            "  TTFT, median * 20.0 ms +-* 30.0 ms +-*",
            "  TPOT, median * 5.00 ms +-* 7.50 ms +-*",
            "  requests * req/s +-* req/s +-*",
            "  requests per GPU * req/s +-*",
            "  output tokens * tok/s +-* tok/s +-*",
            "  scaling efficiency * 100% * 17% +-*",
            "  cost of 1000 requests * USD +-*",
            "  cost of a million output tokens * USD +-*",
            "  a p99 of 24 requests in a batch is a guess: 662 are needed",
            "  cost at 3.6 USD per GPU and hour",
            "  advice: take tp1 for latency (1.5 times as good as tp4), throughput (1.5 times as good as tp4) and "
            "cost per request (6 times as good as tp4): the 4 ranks of tp4 exchange data in every step over links of "
            "class PHB (PCIe) by SHM/direct",
            "    tp4: of 7.5 ms per token 1.25 ms is the work of tp1 split over 4 GPUs; the other 83% is *",
            "    this rests on 1 server start of tp1 and tp4, *(the documented prior for starts that measure "
            "less than 10 s, 2.3% and 1.9%)*",
        ]
    )
    document = gate.read_results()
    assert validate(document, "results") == []
    (record,) = (record for record in document["records"] if record["kind"] == "comparison")
    assert record["test"] == ""
    assert record["layout"] == "tp1, tp4"
    assert record["advice"]["winners"] == {name: ["tp1"] for name in ("latency", "throughput", "cost per request")}
    figures = {row["layout"]: row["figures"] for row in record["rows"]}
    assert figures["tp4"]["scaling_efficiency"]["value"] == pytest.approx(1 / 6, rel=1e-6)
    cost = figures["tp4"]["usd_per_1000_requests"]["value"] / figures["tp1"]["usd_per_1000_requests"]["value"]
    assert cost == pytest.approx(6)


def test_replicas_are_compared_as_well(gate: Suite) -> None:
    speeds(gate, tp2=0.9, tp1x2=0.5)

    result = gate.run("--gpu-layout=tp1,tp2,tp1x2", "--gpu-baseline=off")

    result.stdout.fnmatch_lines(["*tp1 * tp1x2 * tp2*", "  scaling efficiency * 100% * 100% +-* 56% +-*"])
    result.stdout.fnmatch_lines(["  advice: take tp1x2 for *throughput (1.8 times as good as tp2)*"])


def test_more_starts_narrow_the_intervals(gate: Suite) -> None:
    speeds(gate, driver="noise=0.01, seed=3")

    one = gate.run("--gpu-layout=tp1,tp2", "--gpu-baseline=off", "--gpu-results=results.json")
    first = gate.read_results()["records"][-1]["rows"][0]["figures"]["median_tpot_ms"]["ci"]
    three = gate.run("--gpu-layout=tp1,tp2", "--gpu-baseline=new", "--gpu-results=results.json")
    then = gate.read_results()["records"][-1]["rows"][0]["figures"]["median_tpot_ms"]["ci"]

    one.stdout.fnmatch_lines(["  server starts * 1 * 1"])
    three.stdout.fnmatch_lines(["  server starts * 3 * 3"])
    assert then[1] / then[0] < first[1] / first[0]


def test_all_layouts_get_the_same_prompts(gate: Suite) -> None:
    gate.run("--gpu-layout=tp1,tp2", "--gpu-baseline=new", "--gpu-results=results.json")

    seeds = [
        [run["gpulayout"]["seed"] for run in record["runs"]]
        for record in gate.read_results()["records"]
        if record["kind"] == "performance"
    ]
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 3


def test_a_server_never_gets_the_same_prompts_twice(suite: Suite) -> None:
    suite.write(
        test_it="""
        def test_it(measure):
            assert measure().runs[0].seed != measure().runs[0].seed
        """
    )

    suite.run("--gpu-layout=tp1,tp2").assert_outcomes(passed=2)


def test_one_layout_alone_has_no_table(gate: Suite) -> None:
    result = gate.run("--gpu-layout=tp1", "--gpu-baseline=off", "--gpu-results=results.json")

    result.stdout.no_fnmatch_line("layouts compared*")
    assert not [record for record in gate.read_results()["records"] if record["kind"] == "comparison"]


def test_what_was_measured_without_a_gate_is_in_the_table(suite: Suite) -> None:
    suite.write(test_it="def test_it(measure): measure()")

    result = suite.run("--gpu-layout=tp1,tp2")

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["layouts compared: smoke on org/tiny, 95% intervals"])


def test_other_loads_are_not_put_side_by_side(suite: Suite) -> None:
    other = "{'input_tokens': 8, 'output_tokens': 4, 'concurrency': 1, 'requests': 8, 'name': 'other'}"
    suite.write(
        test_it=f"""
        import pytest

        @pytest.mark.gpu_layout("tp1")
        def test_one(measure): measure()

        @pytest.mark.gpu_layout("tp2")
        @pytest.mark.gpu_workload({other})
        def test_two(measure): measure()
        """
    )

    result = suite.run("--gpu-layout=tp1,tp2")

    result.stdout.no_fnmatch_line("layouts compared*")
    result.stdout.fnmatch_lines(
        ["tp2 is not compared, since no other layout was measured in the same way: the nearest differs in workload.*"]
    )


def test_the_table_is_made_of_what_workers_found_too(gate: Suite) -> None:
    pytest.importorskip("xdist")

    result = gate.run("--gpu-layout=tp1,tp2", "--gpu-baseline=off", "-n2", subprocess=True)

    result.stdout.fnmatch_lines(["layouts compared: smoke on org/tiny, 95% intervals", "  advice: *"])


# -- relative gates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", [CLAIM, MARKED], ids=["call", "marker"])
def test_a_claim_that_holds_passes_and_the_other_layout_is_not_judged(suite: Suite, test: str) -> None:
    suite.write(test_it=test)
    speeds(suite, tp2=0.4)

    result = suite.run("--gpu-layout=tp1,tp2", "--junitxml=junit.xml", "--gpu-results=results.json")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*1 passed, 1 not judged in *"])
    result.stdout.fnmatch_lines(
        ["  tp2 is 2.5 times as good as tp1 in request_throughput, more than 1.5 times was claimed: pass (*"]
    )
    assert suite.events == [f"{event} {layout} org/tiny" for layout in ("tp1", "tp2") for event in ("start", "stop")]
    properties = {p.get("name"): p.get("value") for p in ElementTree.parse("junit.xml").iter("property")}
    assert properties["gpulayout.smoke.better_than.tp1.request_throughput.verdict"] == "pass"
    assert float(properties["gpulayout.smoke.better_than.tp1.request_throughput.ratio"] or 0) == pytest.approx(2.5)
    document = suite.read_results()
    assert validate(document, "results") == []
    (record,) = (record for record in document["records"] if record["kind"] == "better-than")
    assert record["starts"] == [1, 1]


@pytest.mark.parametrize("test", [CLAIM, MARKED], ids=["call", "marker"])
def test_a_claim_that_does_not_hold_fails_and_says_so(suite: Suite, test: str) -> None:
    suite.write(test_it=test)
    speeds(suite, tp2=1.5)

    result = suite.run("--gpu-layout=tp1,tp2")

    result.assert_outcomes(failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "fail: tp2 is required to be more than 1.5 times as good as tp1 in request_throughput, found 0.667 times",
            "    * req/s against * req/s, interval 0.* to 0.* times, n = 1 start against 1",
            "  layout tp2 on 2 x NVIDIA H200 (GPU 0, 1), model org/tiny, workload smoke",
            "  tp1 was measured by test_it.py::test_speed[[]tp1[]]",
            "  claim less, or see in the table of layouts what holds it back",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


def test_what_is_near_the_claim_is_measured_again_on_fresh_servers_of_both(suite: Suite) -> None:
    suite.write(test_it=CLAIM + "def test_after(vllm_server): vllm_server.server.check_alive()")
    speeds(suite, tp2=0.61)

    result = suite.run("--gpu-layout=tp1,tp2", "--gpu-results=results.json")

    result.assert_outcomes(passed=3)
    starts = [event.split()[1] for event in suite.events if event.startswith("start")]
    assert starts == ["tp1", "tp2", "tp1", "tp2"]
    running = 0
    for event in suite.events:
        running += 1 if event.startswith("start") else -1
        assert 0 <= running <= 1
    assert running == 0
    records = suite.read_results()["records"]
    (record,) = (record for record in records if record["kind"] == "better-than")
    assert record["starts"] == [2, 2]
    (table,) = (record for record in records if record["kind"] == "comparison")
    assert [row["starts"] for row in table["rows"]] == [2, 2]


@pytest.mark.parametrize(("policy", "outcomes"), [("warn", {"passed": 0}), ("fail", {"failed": 1})])
def test_what_stays_open_is_inconclusive(suite: Suite, policy: str, outcomes: dict[str, int]) -> None:
    suite.write(test_it=CLAIM)
    speeds(suite, tp2=1 / 1.5)

    result = suite.run("--gpu-layout=tp1,tp2", f"--gpu-inconclusive={policy}")

    result.assert_outcomes(**outcomes)
    result.stdout.fnmatch_lines(["  tp2 is 1.5 times as good as tp1 in *: inconclusive (*); *starts of each would*"])
    if policy == "warn":
        result.stdout.fnmatch_lines(["*1 inconclusive*"])
    assert suite.starts == 6


def test_no_more_starts_than_are_allowed(suite: Suite) -> None:
    suite.write(test_it=CLAIM)
    speeds(suite, tp2=1 / 1.5)

    suite.run("--gpu-layout=tp1,tp2", "--gpu-starts=1")
    assert suite.starts == 2


def test_the_budget_ends_it(suite: Suite) -> None:
    suite.write(test_it=CLAIM)
    speeds(suite, tp2=1 / 1.5)

    suite.run("--gpu-layout=tp1,tp2", "--gpu-budget=0.001")
    assert suite.starts == 2


def test_per_gpu_twice_as_fast_is_no_better_with_two(suite: Suite) -> None:
    suite.write(
        test_it="""
        def test_speed(measure, perf_gate):
            measure()
            perf_gate.better_than("tp1", "request_throughput_per_gpu", 0.95)
            perf_gate.better_than("tp1", "median_ttft_ms", 1.9)
            perf_gate.better_than("tp1", "output_throughput_per_gpu", 1.1)
        """
    )
    speeds(suite, tp2=0.5)

    result = suite.run("--gpu-layout=tp1,tp2")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["fail: * 1.1 times as good as tp1 in output_throughput_per_gpu, found 1 times"])
    result.stdout.fnmatch_lines(["  tp2 is 1 times as good as tp1 in request_throughput_per_gpu, *: pass (*"])
    result.stdout.fnmatch_lines(["  tp2 is 2 times as good as tp1 in median_ttft_ms, *: pass (*"])


def test_the_verdict_is_given_to_the_test(suite: Suite) -> None:
    suite.write(
        test_it="""
        def test_speed(measure, perf_gate, gpu_layout):
            measure()
            verdict = perf_gate.better_than("tp1", "request_throughput")
            if str(gpu_layout) == "tp1":
                assert verdict is None
            else:
                assert verdict.status == "pass"
                assert abs(verdict.ratio - 2) < 1e-6
                assert verdict.ci[0] > 1
        """
    )
    speeds(suite, tp2=0.5)

    result = suite.run("--gpu-layout=tp1,tp2")
    result.assert_outcomes(passed=1)


def test_what_a_baseline_gate_measured_counts_with_all_its_starts(suite: Suite) -> None:
    suite.write(
        test_it="""
        def test_speed(measure, perf_gate):
            perf_gate(measure())
            perf_gate.better_than("tp1", "request_throughput", 1.5)
        """
    )
    speeds(suite, tp2=0.61)

    result = suite.run(
        "--gpu-layout=tp1,tp2", "--gpu-baseline=new", "--gpu-write-in-ci=yes", "--gpu-results=results.json"
    )

    result.stdout.fnmatch_lines(["*2 baseline recorded in *"])
    (record,) = (record for record in suite.read_results()["records"] if record["kind"] == "better-than")
    assert record["starts"] == [3, 3]
    assert suite.starts == 6


def test_several_markers_are_all_judged(suite: Suite) -> None:
    suite.write(
        test_it="""
        import pytest

        @pytest.mark.gpu_better_than("tp1", "request_throughput", 3)
        @pytest.mark.gpu_better_than("tp1", "median_ttft_ms", factor=4)
        def test_speed(measure): measure()
        """
    )
    speeds(suite, tp2=0.5)

    result = suite.run("--gpu-layout=tp1,tp2")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["fail: * 4 times as good as tp1 in median_ttft_ms, *", "fail: * in request_throughput*"]
    )


# -- order -----------------------------------------------------------------------------------------------------------


def test_a_layout_that_others_are_compared_with_runs_first(suite: Suite) -> None:
    suite.write(test_it=MARKED, test_another="def test_plain(vllm_server): pass")
    speeds(suite, tp2=0.4, tp4=0.4)

    result = suite.run("--gpu-layout=tp4,tp2,tp1", "-v")

    result.assert_outcomes(passed=5)
    starts = [event.split()[1] for event in suite.events if event.startswith("start")]
    assert starts == ["tp1", "tp4", "tp2"]


def test_layouts_that_are_compared_with_each_other_keep_their_order(suite: Suite) -> None:
    suite.write(
        test_it="""
        import pytest

        @pytest.mark.gpu_layout("tp1")
        @pytest.mark.gpu_better_than("tp2", "request_throughput_per_gpu")
        def test_small(measure): measure()

        @pytest.mark.gpu_layout("tp2")
        @pytest.mark.gpu_better_than("tp1", "request_throughput")
        def test_large(measure): measure()
        """
    )
    speeds(suite, tp2=0.7)

    result = suite.run("--gpu-layout=tp2,tp1")

    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(
        [
            "numbers of layout tp1 were required to compare with, and it was not measured before this test",
            "  in this run, --gpu-layout=tp2,tp1",
        ]
    )


# -- what cannot be compared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", [CLAIM, MARKED], ids=["call", "marker"])
def test_a_layout_that_was_not_asked_for_fails_and_says_what_to_add(suite: Suite, test: str) -> None:
    suite.write(test_it=test)

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "numbers of layout tp1 were required to compare with, and it was not measured before this test",
            "  in this run, --gpu-layout=tp2",
            "  add it: --gpu-layout=tp1,tp2",
        ]
    )


def test_a_layout_that_comes_later_fails_the_claim(suite: Suite) -> None:
    suite.write(test_it=CLAIM)

    result = suite.run("--gpu-layout=tp2,tp1")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["  let a test measure tp1 before this one *: name it first, --gpu-layout=tp1,..., or *"]
    )


def test_another_load_is_refused(suite: Suite) -> None:
    other = "{'input_tokens': 8, 'output_tokens': 4, 'concurrency': 1, 'requests': 8, 'name': 'other'}"
    suite.write(
        test_it=f"""
        import pytest

        @pytest.mark.gpu_layout("tp1")
        def test_one(measure): measure()

        @pytest.mark.gpu_layout("tp2")
        @pytest.mark.gpu_workload({other})
        def test_two(measure, perf_gate):
            measure()
            perf_gate.better_than("tp1", "request_throughput", 1.5)
        """
    )

    result = suite.run("--gpu-layout=tp1,tp2")

    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(
        [
            "two layouts can be compared where they served the same model under the same load, and they did not",
            "  workload.fingerprint: tp2 '*' (other), tp1 '*' (smoke)",
            "  measure both in the same way: let one test run for both layouts",
        ]
    )


def test_a_test_that_measures_nothing_can_claim_nothing(suite: Suite) -> None:
    suite.write(
        test_it="""
        import pytest

        @pytest.mark.gpu_better_than("tp1", "request_throughput")
        def test_marked(vllm_server): pass

        def test_called(perf_gate): perf_gate.better_than("tp1", "request_throughput")

        @pytest.mark.gpu_better_than("tp1", "request_throughput")
        def test_without_a_layout(): pass
        """
    )

    result = suite.run("--gpu-layout=tp1,tp2")

    result.assert_outcomes(failed=5)
    result.stdout.fnmatch_lines(
        ["numbers of this layout were required for better_than, found none", "  in test_it.py::*"]
    )


def test_invalid_numbers_are_no_verdict(suite: Suite) -> None:
    suite.write(test_it=CLAIM)
    speeds(suite, driver="fail_requests=2", tp2=0.5)

    result = suite.run("--gpu-layout=tp1,tp2")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["invalid: failed-requests: 2 of 96 requests failed; *"])
    result.stdout.fnmatch_lines(["sound numbers of both layouts were required, those of tp2 are not"])


def test_a_server_that_does_not_start_again_fails_the_test_and_nothing_is_left(suite: Suite) -> None:
    suite.write(test_it=CLAIM + "def test_after(vllm_server): pass")
    speeds(suite, tp2=0.61)
    conftest = Path("conftest.py")
    conftest.write_text(
        conftest.read_text().replace(
            "on_event=note,", "on_event=note, failures={3: ServerStartFailed('CUDA out of memory')},"
        )
    )

    result = suite.run("--gpu-layout=tp1,tp2")

    result.assert_outcomes(failed=1, passed=2)
    result.stdout.fnmatch_lines(["CUDA out of memory"])
    assert suite.events.count("start tp2 org/tiny") == suite.events.count("stop tp2 org/tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "parse_claim() missing 2 required positional arguments: *"),
        ("'tp1', 'throughput', 1.5", "better_than: unknown metric 'throughput', did you mean *"),
        ("'tq1', 'request_throughput', 1.5", "layout: expected a factor *"),
        ("'tp1', 'request_throughput', 0", "better_than: a factor above 0 was expected, found 0"),
    ],
)
def test_a_marker_that_cannot_be_read_is_a_usage_error(suite: Suite, arguments: str, message: str) -> None:
    suite.write(
        test_it=f"""
        import pytest

        @pytest.mark.gpu_better_than({arguments})
        def test_it(measure): measure()
        """
    )

    result = suite.run("--gpu-layout=tp1")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [f"ERROR: test_it.py::test_it[[]tp1[]]: marker gpu_better_than(other, metric, factor): {message}"]
    )
    assert suite.events == []


def test_a_call_that_cannot_be_read_fails_the_test(suite: Suite) -> None:
    suite.write(
        test_it="""
        def test_it(measure, perf_gate):
            measure()
            perf_gate.better_than("tp1", "throughput")
        """
    )

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["better_than: unknown metric 'throughput', did you mean *"])


def test_without_a_layout_marked_tests_are_skipped(suite: Suite) -> None:
    suite.write(test_it=MARKED)

    suite.run("--strict-markers").assert_outcomes(skipped=1)


def test_workers_of_pytest_xdist_know_their_own_layout_only(suite: Suite) -> None:
    pytest.importorskip("xdist")
    suite.write(test_it=CLAIM)
    speeds(suite, tp2=0.4)

    two = suite.run("--gpu-layout=tp1,tp2", "-n2", subprocess=True)
    one = suite.run("--gpu-layout=tp1,tp2", "-n1", subprocess=True)

    two.assert_outcomes(failed=1)
    two.stdout.fnmatch_lines(
        ["  with pytest-xdist the tests of each layout have a worker of their own: run without -n*"]
    )
    one.assert_outcomes(passed=1)


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_a_disturbed_start_of_either_layout_is_replaced(suite: Suite, layout: str) -> None:
    suite.write(test_it=CLAIM)
    speeds(suite, tp2=0.4)
    conftest = Path("conftest.py")
    busy = f"""
from pytest_gpulayout.telemetry import CPU, DeviceTelemetry, Telemetry
from pytest_gpulayout.trace import Observations

BUSY = Observations(telemetry=Telemetry(source="/proc", interval_s=1.0, sample_ns=(0, 10**9), devices=(
    DeviceTelemetry(name=CPU, series={{"others_busy_percent": (None, 90.0)}}),)))

class Neighbour(FakeLoadDriver):
    def run(self, endpoint, workload, **options):
        self._observations = BUSY if len(self.runs) == {0 if layout == "tp1" else 1} else Observations()
        return super().run(endpoint, workload, **options)

def pytest_gpulayout_load_driver(settings):
    return Neighbour()
"""
    conftest.write_text(conftest.read_text() + busy)

    result = suite.run("--gpu-layout=tp1,tp2")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"{layout}: server start 1 was disturbed, and is measured anew (foreign-process: *"])
    starts = [event.split()[1] for event in suite.events if event.startswith("start")]
    assert starts == sorted(["tp1", "tp2", layout])


def test_the_second_load_is_compared_with_the_second(suite: Suite) -> None:
    """A server that has served before is compared with one that has, too. The driver's first run is slow."""
    suite.write(
        test_it="""
        def test_speed(measure, perf_gate, gpu_layout):
            for other_ms in (40.0, 10.0):
                measure()
                if str(gpu_layout) == "tp2":
                    verdict = perf_gate.better_than("tp1", "median_ttft_ms", 0.9)
                    assert abs(verdict.values[0] - 20) < 1e-6
                    assert abs(verdict.values[1] - other_ms) < 1e-6
        """
    )
    suite.fakes(driver="slow_down=[2.0, 0.5, 1.0]")

    result = suite.run("--gpu-layout=tp1,tp2", "--gpu-starts=1")

    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["fail: tp2 is required to be more than 0.9 times as good as tp1 *, found 0.5 times"])
