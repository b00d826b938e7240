"""``collective_probe`` and ``collective_gate``: links that are measured before a server starts, and judged apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_gpulayout.cli import main
from pytest_gpulayout.gate import PlacedLayout
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_requirement
from pytest_gpulayout.probing import Probing
from pytest_gpulayout.testing import FakeTopologySource
from tests.support.suite import GATE, Suite

LINKS = """
def test_links(collective_probe, collective_gate):
    collective_gate(collective_probe)
"""
WIRED = """
from dataclasses import replace
from pytest_gpulayout.topology import NvLinks

class Wired:
    def probe(self):
        topology = FakeTopologySource(gpus=2).probe()
        links = (NvLinks(tuple(range(18)), active=True, remote="switch", version="4.0"),)
        return replace(topology, devices=tuple(replace(device, nvlinks=links) for device in topology.devices))

def pytest_gpulayout_topology_source(settings, layout):
    return Wired()
"""


@pytest.fixture
def links(suite: Suite) -> Suite:
    """A suite with a gate on the links of tp2, whose stored sessions leave no doubt: 370 GB/s and 10 us."""
    suite.write(test_it=LINKS)
    suite.run("--gpu-layout=tp2", "--gpu-baseline=new")
    suite.settle()
    return suite


def collectives_of(suite: Suite) -> list[dict[str, Any]]:
    return [record for record in suite.read_results()["records"] if record["kind"] == "collectives"]


def test_probe_is_recorded_without_a_server(suite: Suite) -> None:
    suite.write(test_it=LINKS)

    result = suite.run("--gpu-layout=tp2", "--gpu-baseline=new", "--gpu-results=results.json")

    result.stdout.fnmatch_lines(
        [
            "*1 baseline recorded*",
        ]
    )
    result.stdout.fnmatch_lines(
        [
            "  collectives: recorded, 3 probe starts  [[]test_it.py::test_links[[]tp2[]][]]",
            "    nccl 2.27.7 of torch fake over P2P/CUMEM, hidden size 4096 (the default, since no config.json of "
            "org/tiny is at hand), bfloat16",
            "    not held against a published limit: what NV18 between GPU 0 and GPU 1 carries is not known",
            "    all_reduce_batch1_us *10.0 us *",
            "    all_reduce_prefill_gb_per_s *351 GB/s *",
        ]
    )
    assert suite.events == []
    (file,) = suite.baselines
    assert file.relative_to(suite.pytester.path / "gpu-baselines").parts[:2] == ("hidden-4096", "tp2")
    (record,) = collectives_of(suite)
    assert (record["stored"], record["ok"], record["transports"]) == ("recorded", True, {"P2P/CUMEM": 4})
    assert len(record["runs"]) == 3
    assert [len(group["rounds"]) for group in record["runs"][0]["groups"]] == [7]


def test_the_same_links_pass(links: Suite) -> None:
    result = links.run("--gpu-layout=tp2")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["  collectives: pass, * probe start*"])


def test_layout_whose_ranks_do_not_talk_is_skipped_and_says_so(links: Suite) -> None:
    result = links.run("--gpu-layout=tp1,tp1x2", "-rs")

    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["*tp1: no ranks talk to each other, so there is no link to probe"])
    assert links.events == []


def test_link_that_got_slower_fails_and_says_what_next(links: Suite) -> None:
    links.fakes(probe="gb_per_s=185.0, transport='SHM/direct/direct'")

    result = links.run("--gpu-layout=tp2", "--gpu-results=results.json")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "regression: all_reduce_prefill_gb_per_s fell by 49% and all_reduce_batch64_us rose by 12%: along with "
            "it, the transport changed from P2P/CUMEM to SHM/direct/direct since the baseline",
            "regression: all_reduce_prefill_gb_per_s 180 GB/s, allowed >= 298 GB/s (baseline 351 GB/s - 15%)",
            "  layout tp2 on 2 x NVIDIA H200 (GPU 0, 1), hidden size 4096, bfloat16",
            "  accept it: pytest * --gpu-baseline=update 'test_it.py::test_links[[]tp2[]]'",
        ]
    )
    assert [record["verdict"] for record in collectives_of(links)] == ["regression"]
    assert links.events == []


def test_without_a_baseline_it_fails_and_says_how_to_record_one(suite: Suite) -> None:
    suite.write(test_it=LINKS)

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "a stored baseline was required, and there is none",
            "  expected in */hidden-4096/tp2/*/collectives.json",
            "  record it: run the same command with --gpu-baseline=new",
        ]
    )
    result.stdout.fnmatch_lines(["    all_reduce_batch1_us * 10.0 us *"])


def test_baselines_off_is_not_judged(suite: Suite) -> None:
    suite.write(test_it=LINKS)

    result = suite.run("--gpu-layout=tp2", "--gpu-baseline=off")

    assert result.ret == 0
    result.stdout.fnmatch_lines(["*1 not judged*"])
    assert suite.baselines == []


def test_paired_mode_needs_no_stored_links(suite: Suite) -> None:
    suite.write(test_it=LINKS)

    result = suite.run("--gpu-layout=tp2", "--gpu-base-vllm-args=--enforce-eager")

    assert result.ret == 0
    result.stdout.fnmatch_lines(["*1 not judged*"])


# -- the published limit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["new", "update", "check", "off"])
def test_link_below_its_published_limit_fails_in_every_mode_and_is_never_stored(suite: Suite, mode: str) -> None:
    suite.fakes(probe="gb_per_s=24.0", more=WIRED)
    suite.write(test_it=LINKS)

    result = suite.run("--gpu-layout=tp2", f"--gpu-baseline={mode}", "--gpu-results=results.json")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "an all-reduce was required to come near what the links between its ranks are published to carry",
            "  found: ranks 0,1 reach 23.9 GB/s with messages of 64 MiB, at least 169 GB/s required of NV18 between "
            "GPU 0 and GPU 1 (18 x NVLink 4.0 = 450 GB/s each way)",
            "  layout tp2 on 2 x NVIDIA H200 (GPU 0, 1), hidden size 4096, bfloat16",
            "  look at the transport *; accept it: let the fixture gpu_probe_plan return a plan with a smaller "
            "least_share",
        ]
    )
    assert suite.baselines == []
    (record,) = collectives_of(suite)
    assert (record["ok"], len(record["findings"])) == (False, 1)


def test_limit_can_be_lowered_where_a_machine_cannot_do_better(suite: Suite) -> None:
    suite.fakes(
        probe="gb_per_s=24.0",
        more=WIRED
        + """
@pytest.fixture
def gpu_probe_plan(gpu_probe_plan):
    return replace(gpu_probe_plan, least_share=0.04)
""",
    )
    suite.write(test_it=LINKS)

    result = suite.run("--gpu-layout=tp2", "--gpu-baseline=new")

    assert result.ret == 0
    result.stdout.fnmatch_lines(["    ranks 0,1 reach 23.9 GB/s with messages of 64 MiB, at least 1* required *"])
    assert len(suite.baselines) == 1


# -- saved results ---------------------------------------------------------------------------------------------------


def test_saved_results_of_links_are_taken_as_those_of_a_server(
    suite: Suite, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in CI, which stores nothing itself: red, approved by a reviewer, then judged."""
    suite.write(test_it=LINKS)
    suite.run("--gpu-layout=tp2", "--gpu-results=results.json").assert_outcomes(failed=1)
    assert suite.baselines == []

    assert main(["baseline", "approve", "results.json"]) == 0
    (file,) = suite.baselines
    place = str(file.relative_to(suite.pytester.path / "gpu-baselines"))
    suite.settle()

    suite.fakes(probe="gb_per_s=371.0")
    suite.run("--gpu-layout=tp2", "--gpu-results=results.json").assert_outcomes(passed=1)
    assert main(["baseline", "check", "--used", "results.json"]) == 0
    assert main(["compare", str(file), "results.json"]) == 0
    capsys.readouterr()
    assert main(["baseline", "show", place]) == 0
    shown = capsys.readouterr().out
    assert "all_reduce_batch1_us" in shown
    assert "15%" in shown


def test_results_of_a_link_that_is_too_slow_are_refused(suite: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    suite.fakes(probe="gb_per_s=24.0", more=WIRED)
    suite.write(test_it=LINKS)
    suite.run("--gpu-layout=tp2", "--gpu-results=results.json")

    assert main(["baseline", "approve", "results.json"]) == 1

    assert "refused: ranks 0,1 reach 23.9 GB/s with messages of 64 MiB" in capsys.readouterr().out
    assert suite.baselines == []


# -- beside servers --------------------------------------------------------------------------------------------------


def test_probe_has_the_devices_for_itself_and_the_server_comes_back(suite: Suite) -> None:
    suite.write(
        test_it="""
        def test_it(vllm_server, collective_probe):
            assert len(collective_probe.runs) == 1
            assert vllm_server.url
        """
    )

    suite.run("--gpu-layout=tp2").assert_outcomes(passed=1)

    assert suite.events == ["start tp2 org/tiny", "stop tp2 org/tiny"] * 2


def test_probe_is_made_once_for_all_tests_of_a_layout(suite: Suite) -> None:
    suite.fakes(probe="errors={2: MeasurementError('a second start')}")
    suite.write(
        test_it="""
        def test_a(collective_probe): pass
        def test_b(collective_probe): assert collective_probe.samples("all_reduce_batch1_us")
        """
    )

    suite.run("--gpu-layout=tp2").assert_outcomes(passed=2)


def test_probe_that_failed_is_told_once_and_not_tried_again(suite: Suite) -> None:
    suite.fakes(probe="errors={1: MeasurementError('rank 1 failed first\\n  in /a/folder')}")
    suite.write(test_it="def test_a(collective_probe): pass\ndef test_b(collective_probe): pass")

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(errors=2)
    told = ["rank 1 failed first", "  in /a/folder", "rank 1 failed first", "  (told in full by *)"]
    result.stdout.fnmatch_lines(told)


def test_links_worse_than_required_are_not_probed(suite: Suite) -> None:
    suite.fakes(topology="link='PIX'")
    suite.write(test_it=LINKS)

    result = suite.run("--gpu-layout=tp2", "--gpu-link=nvlink", "--gpu-baseline=off")

    result.stdout.fnmatch_lines(["links of class nvlink or better are required between GPUs that communicate"])
    result.stdout.no_fnmatch_line("*probe start*")


@pytest.mark.parametrize(
    ("probe", "told"),
    [
        ("", "; the link itself is as fast as its baseline"),
        (
            "gb_per_s=185.0",
            "; the link itself is slower, without a server: all_reduce_prefill_gb_per_s fell by 49% and "
            "all_reduce_batch64_us rose by 12%",
        ),
    ],
    ids=["slow server", "slow link"],
)
def test_regression_of_a_server_says_whether_the_link_was_slow(suite: Suite, probe: str, told: str) -> None:
    suite.write(test_it=LINKS + GATE)
    suite.run("--gpu-layout=tp2", "--gpu-baseline=new")
    suite.settle()
    suite.fakes(driver="tpot_ms=15.0", probe=probe)

    result = suite.run("--gpu-layout=tp2")

    (sentence,) = [line for line in result.outlines if line.startswith("regression: median_tpot_ms rose by 200%")]
    assert sentence.endswith(told)


def test_probe_that_no_gate_has_judged_is_compared_with_what_is_stored(suite: Suite) -> None:
    suite.write(test_it=LINKS + GATE)
    suite.run("--gpu-layout=tp2", "--gpu-baseline=new")
    suite.settle()
    suite.fakes(driver="tpot_ms=15.0", probe="gb_per_s=90.0")
    suite.write(
        test_it="""
        def test_speed(collective_probe, measure, perf_gate):
            perf_gate(measure())
        """
    )

    result = suite.run("--gpu-layout=tp2")

    (sentence,) = [line for line in result.outlines if line.startswith("regression: median_tpot_ms rose by 200%")]
    assert "; the link itself is slower, without a server: all_reduce_prefill_gb_per_s fell by " in sentence


def test_regression_without_a_probe_says_nothing_of_links(suite: Suite) -> None:
    suite.write(test_it=GATE)
    suite.run("--gpu-layout=tp2", "--gpu-baseline=new")
    suite.settle()
    suite.fakes(driver="tpot_ms=15.0")

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(failed=1)
    result.stdout.no_fnmatch_line("*the link itself*")


def test_tolerance_of_links_gates_no_server(suite: Suite) -> None:
    named = "--gpu-tolerance=" + ",".join(f"all_reduce_batch{batch}_us=100%" for batch in (1, 8, 64))
    suite.write(test_it=LINKS + GATE)
    suite.run("--gpu-layout=tp2", "--gpu-baseline=new", named)
    suite.settle()
    suite.fakes(probe="latency_us=13.0")

    suite.run("--gpu-layout=tp2", named).assert_outcomes(passed=2)
    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(passed=1, failed=1)
    found = "regression: all_reduce_batch1_us 13.0 us, allowed <= 11.5 us (baseline 10.0 us + 15%)"
    result.stdout.fnmatch_lines([found])


def test_size_of_the_messages_is_that_of_the_model(suite: Suite) -> None:
    folder = suite.pytester.mkdir("model")
    (folder / "config.json").write_text('{"text_config": {"hidden_size": 2048}, "torch_dtype": "float16"}')
    suite.model = str(folder)
    suite.write(
        test_it="""
        def test_it(collective_probe):
            assert (collective_probe.plan.hidden_size, collective_probe.plan.dtype) == (2048, "float16")
            assert collective_probe.plan.origin.startswith("the config.json of ")
        """
    )

    suite.run("--gpu-layout=tp2").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("layout", "attach", "why"),
    [
        ("tp2", object(), "tp2: somebody else's server computes on the devices, so their links cannot be probed"),
        ("tp4@2", None, "tp4@2: links are probed on one host, and not yet between nodes"),
        ("tp2", None, ""),
    ],
)
def test_why_links_cannot_be_probed(layout: str, attach: object, why: str) -> None:
    settings: Any = SimpleNamespace(attach=attach)
    nobody: Any = None
    placed = PlacedLayout(parse_layout(layout), FakeTopologySource().probe(), (0, 1), parse_requirement("any"))
    assert Probing(settings, nobody, nobody, nobody).why_not(placed) == why
