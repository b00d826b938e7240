"""``--gpu-baseline`` and its folder: recording, checking, and files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_gpulayout.baseline_text import baseline_from_text
from pytest_gpulayout.schemas import validate
from tests.support.suite import GATE, Suite


@pytest.fixture
def gate(suite: Suite) -> Suite:
    suite.write(test_it=GATE)
    return suite


def test_check_without_a_baseline_fails_and_says_what_to_type(gate: Suite) -> None:
    result = gate.run("--gpu-layout=tp2")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "a stored baseline was required, and there is none",
            "  expected in /*/gpu-baselines/org-tiny-*/tp2/2x-NVIDIA-H200-NV18-*/smoke.json",
            "  record it: run the same command with --gpu-baseline=new",
        ],
        consecutive=True,
    )
    assert gate.baselines == []


def test_check_names_the_nearest_baseline_and_what_differs(gate: Suite) -> None:
    gate.run("--gpu-layout=tp1,tp2", "--gpu-baseline=new")
    gate.fakes(topology="link='SYS'")

    result = gate.run("--gpu-layout=tp2")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "  nearest is org-tiny-*/tp2/2x-NVIDIA-H200-NV18-*/smoke.json, which differs in",
            "    hardware.links: stored 0-1 NV18, now 0-1 SYS",
        ],
        consecutive=True,
    )


def test_drift_of_the_wiring_is_told_before_any_number(gate: Suite) -> None:
    gate.run("--gpu-layout=tp2", "--gpu-baseline=new")
    gate.fakes(topology="gpus=2, numa_nodes=(0, 1)")
    same_key = gate.run("--gpu-layout=tp2")
    same_key.stdout.fnmatch_lines(
        ["  smoke: *", "    wiring differs from the baseline's: rank 1 NUMA node 0 -> 1", "    metric *"],
        consecutive=True,
    )

    gate.fakes(topology="link='NV10'")
    other_links = gate.run("--gpu-layout=tp2")
    other_links.assert_outcomes(failed=1)
    other_links.stdout.fnmatch_lines(
        ["wiring differs from the baseline's: ranks 0-1 NV18 -> NV10", "a stored baseline was required, *"],
        consecutive=True,
    )
    other_links = gate.run("--gpu-layout=tp2", "--gpu-baseline=new")
    other_links.stdout.fnmatch_lines(["    wiring differs from the baseline's: ranks 0-1 NV18 -> NV10"])


def test_new_records_with_its_own_letter_and_count(gate: Suite) -> None:
    result = gate.run("--gpu-layout=tp2", "--gpu-baseline=new")

    assert result.ret == 0
    result.stdout.fnmatch_lines(["  smoke: recorded, 3 server starts  *", "*1 baseline recorded in *"])
    assert "b" in {line.split(" ")[0] for line in result.outlines}
    (file,) = gate.baselines
    assert validate(json.loads(file.read_text()), "baseline") == []
    assert gate.starts == 3


def test_verbose_word_of_a_recording(gate: Suite) -> None:
    gate.run("--gpu-layout=tp1", "--gpu-baseline=new", "-v").stdout.fnmatch_lines(["*test_speed* BASELINE RECORDED*"])


def test_new_judges_what_is_stored(gate: Suite) -> None:
    gate.run("--gpu-layout=tp1", "--gpu-baseline=new")
    gate.settle()
    (file,) = gate.baselines
    before = file.read_text()

    gate.run("--gpu-layout=tp1", "--gpu-baseline=new").assert_outcomes(passed=1)

    assert file.read_text() == before


def test_check_passes_on_the_same_numbers(gate: Suite) -> None:
    gate.run("--gpu-layout=tp1,tp2", "--gpu-baseline=new")
    gate.settle()

    result = gate.run("--gpu-layout=tp1,tp2")

    assert result.ret == 0
    result.assert_outcomes(passed=2)
    result.stdout.re_match_lines(
        [
            r"tp1: worst link none needed, .*",
            r"  smoke: pass, \d server starts?  \[test_it.py::test_speed\[tp1\]\]",
            r"    metric +value +baseline +change  verdict",
            r"    median_ttft_ms +20\.0 ms +20\.0 ms +[+-]0\.0%  pass",
            r"    median_itl_ms .* not gated",
        ]
    )


def test_update_of_the_same_numbers_is_one_more_session(gate: Suite) -> None:
    gate.run("--gpu-layout=tp1", "--gpu-baseline=new")
    gate.settle(sessions=8)
    (file,) = gate.baselines
    before = file.read_text()

    result = gate.run("--gpu-layout=tp1", "--gpu-baseline=update")

    result.stdout.fnmatch_lines(
        [
            "  smoke: updated, 3 server starts*",
            "    median_ttft_ms  *20.0 ms  *20.0 ms *%  pass",
            "    nothing got clearly better or worse: one more session beside those stored",
            "*1 baseline recorded*",
        ]
    )
    text = file.read_text()
    added = set(text.splitlines()) - set(before.splitlines())
    assert len(added) == 1
    assert baseline_from_text(text, "").sessions[:-1] == baseline_from_text(before, "").sessions
    gate.run("--gpu-layout=tp1").assert_outcomes(passed=1)


def test_update_of_other_numbers_begins_a_level_and_says_what_got_better_and_worse(gate: Suite) -> None:
    gate.run("--gpu-layout=tp1", "--gpu-baseline=new")
    gate.settle()
    gate.fakes(driver="ttft_ms=40, tpot_ms=2.5")

    result = gate.run("--gpu-layout=tp1", "--gpu-baseline=update")

    result.stdout.fnmatch_lines(
        [
            "  smoke: updated, 3 server starts*",
            "    a new level begins here: request_throughput * (+*%, better)",
            "    a new level begins here: median_ttft_ms 20.0 ms -> 40.0 ms (+100.0%, worse)",
            "    a new level begins here: median_tpot_ms 5.00 ms -> 2.50 ms (-50.0%, better)",
            "*1 baseline recorded*",
        ]
    )
    (file,) = gate.baselines
    old, new = baseline_from_text(file.read_text(), "").levels()
    assert (len(old), len(new)) == (9, 1)
    gate.run("--gpu-layout=tp1").assert_outcomes(passed=1)
    gate.fakes()
    gate.run("--gpu-layout=tp1").assert_outcomes(failed=1)


def test_off_judges_nothing_and_says_so(gate: Suite) -> None:
    result = gate.run("--gpu-layout=tp1", "--gpu-baseline=off")

    assert result.ret == 0
    result.assert_outcomes()
    result.stdout.fnmatch_lines(["*not judged: --gpu-baseline=off", "*1 not judged in *"])
    assert gate.baselines == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:100], "a baseline document was required, and this file is none: *not JSON *"),
        (lambda text: "", "a baseline document was required, and this file is none: *not JSON *"),
        (lambda text: text.replace('"sessions"', '"sesions"'), "a baseline document was required, *'sessions'*"),
        (lambda text: "{}", "a baseline document was required, and this file is none: *is a required property*"),
    ],
    ids=["truncated", "empty", "misspelt", "other"],
)
@pytest.mark.parametrize("mode", ["check", "new", "update"])
def test_file_that_is_no_baseline_fails(gate: Suite, damage: object, message: str, mode: str) -> None:
    assert callable(damage)
    gate.run("--gpu-layout=tp1", "--gpu-baseline=new")
    (file,) = gate.baselines
    file.write_text(damage(file.read_text()))
    damaged = file.read_text()

    result = gate.run("--gpu-layout=tp1", f"--gpu-baseline={mode}")

    result.assert_outcomes(failed=1)
    assert (file.read_text(), gate.starts) == (damaged, 3 + 1)
    result.stdout.fnmatch_lines(
        [
            message,
            f"  in {file}",
            "  restore it (git checkout), or remove it and record it again: --gpu-baseline=new",
        ]
    )


def test_file_of_another_key_fails(gate: Suite) -> None:
    gate.run("--gpu-layout=tp1,tp2", "--gpu-baseline=new")
    tp1, tp2 = gate.baselines
    tp2.write_text(tp1.read_text())

    result = gate.run("--gpu-layout=tp2")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "a baseline of this model, layout, hardware and workload was required, the stored one is of another:",
            "  layout: stored 'tp1', now 'tp2'",
            f"  in {tp2}",
        ]
    )


def test_models_of_one_name_and_other_arguments_do_not_share_a_key(gate: Suite) -> None:
    gate.run("--gpu-layout=tp1", "--gpu-baseline=new")
    gate.write(test_it="import pytest\npytestmark = pytest.mark.gpu_model('org/tiny', dtype='float32')" + GATE)

    result = gate.run("--gpu-layout=tp1")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["  nearest is *", "    model.arguments: stored '', now '--dtype float32'"])


@pytest.mark.parametrize("folder", ["numbers", "deep/er/numbers"])
def test_folder_is_relative_to_the_rootdir(gate: Suite, folder: str) -> None:
    gate.run("--gpu-layout=tp1", "--gpu-baseline=new", f"--gpu-baseline-dir={folder}")

    assert len(list(Path(folder).rglob("*.json"))) == 1
    assert gate.baselines == []


def test_url_keeps_baselines_elsewhere(gate: Suite) -> None:
    place = "--gpu-baseline-dir=memory://test-url-keeps-baselines"
    gate.run("--gpu-layout=tp1", "--gpu-baseline=new", place)

    result = gate.run("--gpu-layout=tp1", place, "--gpu-baseline=check")

    result.stdout.fnmatch_lines(["  smoke: inconclusive, *", "    median_ttft_ms * 20.0 ms *"])
    result.stdout.fnmatch_lines(["gpu layout: baselines in memory://test-url-keeps-baselines (check)"])
    assert gate.baselines == []


def test_url_nobody_can_open(gate: Suite) -> None:
    result = gate.run("--gpu-layout=tp1", "--gpu-baseline-dir=nowhere://bucket")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["a folder or an fsspec URL was required for baselines, found nowhere://bucket*"])


# -- in CI -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ci(gate: Suite, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """A gate without a baseline, in a CI."""
    monkeypatch.setenv("CI", "true")
    return gate


def test_update_is_refused_in_ci_before_anything_starts(ci: Suite) -> None:
    result = ci.run("--gpu-layout=tp1", "--gpu-baseline=update")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [
            "ERROR: --gpu-baseline (ini: gpulayout_baseline): update writes baselines, and in CI nothing is written",
            "  found the environment variable CI",
            "  update them elsewhere and commit the files, or add --gpu-write-in-ci=yes",
        ]
    )
    assert (ci.starts, ci.baselines) == (0, [])


def test_new_fails_in_ci_where_nothing_is_stored(ci: Suite) -> None:
    result = ci.run("--gpu-layout=tp1", "--gpu-baseline=new")

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "gpu layout: baselines in /*/gpu-baselines (new, nothing is written in CI)",
            "a stored baseline was required, and there is none",
            "  record it: run the same command with --gpu-baseline=new, and not in CI, where nothing is written (or "
            "add --gpu-write-in-ci=yes); commit the file",
        ]
    )
    assert (ci.starts, ci.baselines) == (1, [])


def test_new_judges_in_ci_what_is_stored(gate: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    gate.run("--gpu-layout=tp1", "--gpu-baseline=new")
    gate.settle()
    monkeypatch.setenv("CI", "1")

    gate.run("--gpu-layout=tp1", "--gpu-baseline=new").assert_outcomes(passed=1)


@pytest.mark.parametrize("origin", ["option", "ini"])
@pytest.mark.parametrize("mode", ["new", "update"])
def test_baselines_are_written_in_ci_when_that_is_asked_for(ci: Suite, mode: str, origin: str) -> None:
    if origin == "ini":
        ci.ini("gpulayout_write_in_ci = yes")
    allowed = ["--gpu-write-in-ci=yes"] if origin == "option" else []

    result = ci.run("--gpu-layout=tp1", f"--gpu-baseline={mode}", *allowed)

    assert result.ret == 0
    result.stdout.fnmatch_lines([f"gpu layout: baselines in /*/gpu-baselines ({mode})", "*1 baseline recorded*"])
    assert len(ci.baselines) == 1


@pytest.mark.parametrize("value", ["", "0", "false", "False", "no"])
def test_what_is_no_ci(gate: Suite, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CI", value)

    gate.run("--gpu-layout=tp1", "--gpu-baseline=update").stdout.fnmatch_lines(["*1 baseline recorded*"])
