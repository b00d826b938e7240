"""``gpulayout baseline``: exit codes, what people read and what ``--json`` prints, verb by verb."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_gpulayout.baseline import Baseline, LevelStart
from pytest_gpulayout.baseline_text import baseline_from_text, baseline_to_text
from pytest_gpulayout.errors import BaselineError
from pytest_gpulayout.testing import InMemoryBaselines
from tests.support.command_line import Ran, Run
from tests.support.measurements import baseline_of, key, run_of
from tests.support.stored import (
    dated,
    measured,
    quiet_baseline,
    quiet_session,
    stored,
    write_baseline,
    write_results,
)

PATH = key().path
TODAY = "--today=2026-11-21"
WAIVER = LevelStart("a bug", ("median_tpot_ms 10.0 ms -> 12.0 ms (+20.0%, worse)",), until="2026-11-20")
VERBS = ("list", "show", "diff", "check", "approve", "prune", "calibrate")


@pytest.fixture(autouse=True)
def _not_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)


def read(path: str = PATH) -> Baseline:
    return baseline_from_text((Path("gpu-baselines") / path).read_text(), path)


def everything() -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in Path().rglob("*.json")}


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_and_exit_codes(run: Run, verb: str) -> None:
    ran = run("baseline", verb, "--help")
    assert ran.code == 0
    assert f"examples:\n  gpulayout baseline {verb}" in ran.out
    assert "exit codes: 0 fine, 1 the check failed, 2 misuse or unreadable input" in ran.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("show", "the following arguments are required: PATH"),
        ("check --max-age 0", "a whole number above 0 was expected, found '0'"),
        ("check --today tomorrow", "a date such as 2026-12-31 was expected, found 'tomorrow'"),
        ("check --tolerance x=5%", "tolerance: unknown metric 'x'"),
        ("approve", "the following arguments are required: RESULTS.json"),
        ("prune --keep -1", "a whole number above 0 was expected, found '-1'"),
        ("diff", "either OLD, or --since REV and nothing else, was required"),
        ("diff a --since main", "either OLD, or --since REV and nothing else, was required"),
        ("diff a", "a folder, a URL or a file with baselines was required, found none\n  in a\n"),
        ("diff --since main --dir s3://bucket", "a folder in a git repository was required for --since, found a URL"),
    ],
)
def test_misuse_is_exit_code_2(run: Run, arguments: str, told: str) -> None:
    ran = run("baseline", *arguments.split())
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err


# -- list and show ---------------------------------------------------------------------------------------------------


def test_list(run: Run) -> None:
    write_baseline(stored(*quiet_baseline(9).sessions, quiet_session(10, factor=1.2, begins=WAIVER)))
    ran = run("baseline", "list", TODAY)
    assert (ran.code, ran.err) == (0, "")
    assert [line.split(None, 4) for line in ran.out.splitlines()] == [
        ["levels", "sessions", "starts", "newest", "state" + 32 * " " + "path"],
        ["2", "10", "30", "2026-10-10T08:00:00Z", f"settled, waiver ended on 2026-11-20  {PATH}"],
    ]
    document = run("baseline", "list", TODAY, "--json").document
    assert document == {
        "root": "gpu-baselines",
        "baselines": [
            {
                "path": PATH,
                "levels": 2,
                "sessions": 10,
                "starts": 30,
                "newest": "2026-10-10T08:00:00Z",
                "state": "settled, waiver ended on 2026-11-20",
                "settled": True,
                "waiver_until": "2026-11-20",
            }
        ],
    }


def test_list_of_nothing(run: Run) -> None:
    ran = run("baseline", "list", "--dir", "elsewhere")
    assert (ran.code, ran.out) == (
        0,
        "no baseline in elsewhere; record one: pytest --gpu-layout=SPEC --gpu-baseline=new\n",
    )


def test_list_tells_of_what_it_cannot_read(run: Run) -> None:
    write_baseline(quiet_baseline(2))
    Path("gpu-baselines/corrupt.json").write_text("{")
    ran = run("baseline", "list")
    assert ran.code == 2
    assert PATH in ran.out
    assert "in gpu-baselines/corrupt.json" in ran.err


def test_show(run: Run) -> None:
    sessions = (
        *quiet_baseline(9).sessions,
        quiet_session(10, factor=1.2, begins=replace(WAIVER, until="2026-12-31")),
    )
    write_baseline(stored(*sessions))
    ran = run("baseline", "show", PATH, TODAY)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith("model: ")
    assert "name org/tiny" in lines[0]
    assert "state: provisional, waiver until 2026-12-31" in lines
    assert "level 1: the first" in lines
    place = lines.index("level 2, a waiver until 2026-12-31: a bug")
    assert lines[place + 1 : place + 3] == [
        "  median_tpot_ms 10.0 ms -> 12.0 ms (+20.0%, worse)",
        "  session 2026-10-10T08:00:00Z: 3 starts of 2 requests",
    ]
    [row] = [line.split() for line in lines if line.startswith("median_tpot_ms")]
    assert row[:3] == ["median_tpot_ms", "12.0", "ms"]
    assert row[5] == "5%"


def test_show_names_the_software_where_it_changed(run: Run) -> None:
    one, two, three = quiet_baseline(3).sessions
    write_baseline(stored(one, two, replace(three, sut={"vllm": "0.33.0"})))
    lines = run("baseline", "show", PATH, TODAY).out.splitlines()
    place = lines.index("level 1: the first")
    assert lines[place + 1 : place + 6] == [
        "  session 2026-10-01T08:00:00Z: 3 starts of 2 requests",
        "    driver 570.1, vllm 0.32.0, host node1",
        "  session 2026-10-02T08:00:00Z: 3 starts of 2 requests",
        "  session 2026-10-03T08:00:00Z: 3 starts of 2 requests",
        "    vllm: 0.32.0 -> 0.33.0",
    ]


def test_show_as_json(run: Run) -> None:
    write_baseline(quiet_baseline(10))
    document = run("baseline", "show", PATH, TODAY, "--starts", "5", "--json").document
    assert set(document) == {
        *("path", "key", "state", "settled", "waiver_until", "levels", "gate_starts", "metrics"),
    }
    assert document["key"]["layout"] == "tp2"
    [level] = document["levels"]
    assert (level["reason"], level["until"], len(level["sessions"])) == (None, None, 10)
    tpot = next(metric for metric in document["metrics"] if metric["name"] == "median_tpot_ms")
    assert tpot["mean"] == pytest.approx(10, rel=0.01)
    assert 0 < tpot["start_sd"] < 0.01
    assert 0 < tpot["min_detectable"] <= 0.05 == tpot["tolerance"]
    assert (tpot["takes"], tpot["settled"], tpot["modes"]) == (None, True, [])


def test_show_tells_of_two_groups_of_starts(run: Run) -> None:
    write_baseline(stored(*(dated(n, 1.0 + n / 1e4, 1.15 + n / 1e4, 1.001 + n / 1e4) for n in range(1, 9))))
    ran = run("baseline", "show", PATH)
    assert "bimodal: median_tpot_ms: 67% and 33% of its 24 starts are 14.9% apart" in ran.out.splitlines()


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("nothing.json", "expected in gpu-baselines/nothing.json\n  see what there is: gpulayout baseline list"),
        ("../outside.json", "a baseline must lie inside gpu-baselines, found the path '../outside.json'"),
        ("corrupt.json", "this file is none: it is not JSON"),
    ],
)
def test_show_says_what_is_wrong(run: Run, path: str, told: str) -> None:
    write_baseline(quiet_baseline(2))
    Path("gpu-baselines/corrupt.json").write_text("{")
    Path("outside.json").write_text(baseline_to_text(quiet_baseline(2)))
    ran = run("baseline", "show", path)
    assert (ran.code, ran.out, told in ran.err) == (2, "", True)


# -- diff ------------------------------------------------------------------------------------------------------------


def two_states() -> None:
    write_baseline(baseline_of([1.0], [1.01]), "old")
    write_baseline(baseline_of([1.0], layout="tp4"), "old")
    write_baseline(baseline_of([1.0], [1.01], [1.02]))
    write_baseline(baseline_of([1.0], layout="tp4"))


@pytest.mark.parametrize(("more", "code"), [((), 0), (("--exit-code",), 1)])
def test_diff_of_folders(run: Run, more: tuple[str, ...], code: int) -> None:
    two_states()
    ran = run("baseline", "diff", "old", *more)
    assert (ran.code, ran.err) == (code, "")
    assert ran.out.startswith(f"changed: {PATH}\n  1 session added: 2026-11-20T08:00:00Z\n")
    assert "tp4" not in ran.out
    [change] = run("baseline", "diff", "old", "gpu-baselines", "--json").document["baselines"]
    assert (change["path"], change["happened"]) == (PATH, "changed")
    same = run("baseline", "diff", "gpu-baselines", *more)
    assert (same.code, same.out) == (0, "no stored baseline changed\n")


def test_diff_of_files(run: Run) -> None:
    two_states()
    files = [f"{folder}/{PATH}" for folder in ("old", "gpu-baselines")]
    both = run("baseline", "diff", *files, "--json").document
    assert run("baseline", "diff", files[0], "--json").document == both
    assert [change["happened"] for change in both["baselines"]] == ["changed"]


def test_diff_as_markdown(run: Run) -> None:
    two_states()
    ran = run("baseline", "diff", "old", "--markdown")
    assert ran.out.startswith(f"**changed** `{PATH}`\n\n- 1 session added")
    assert "|---|---:|---:|---:|" in ran.out


def test_diff_with_a_side_that_cannot_be_read(run: Run) -> None:
    two_states()
    Path("old/corrupt.json").write_text("{")
    ran = run("baseline", "diff", "old")
    assert (ran.code, "in old/corrupt.json" in ran.err) == (2, True)


# -- check -----------------------------------------------------------------------------------------------------------


def test_check_of_a_sound_store(run: Run) -> None:
    write_baseline(quiet_baseline(10))
    ran = run("baseline", "check", TODAY)
    assert (ran.code, ran.out, ran.err) == (0, "1 baseline: no fault, 0 notes\n", "")


def test_check_of_nothing_fails(run: Run) -> None:
    ran = run("baseline", "check", "--dir", "elsewhere")
    assert (ran.code, "found none in elsewhere; name another place" in ran.out) == (1, True)


@pytest.mark.parametrize(("more", "code"), [((), 0), (("--strict",), 1)])
def test_notes_fail_only_when_asked(run: Run, more: tuple[str, ...], code: int) -> None:
    write_baseline(quiet_baseline(3))
    ran = run("baseline", "check", TODAY, *more)
    assert ran.code == code
    assert ran.out.startswith(f"note: provisional: {PATH}\n  verdicts are provisional: 3 sessions")


def test_check_names_each_fault_and_what_to_type(run: Run) -> None:
    write_baseline(quiet_baseline(10), path="elsewhere.json")
    Path("gpu-baselines/corrupt.json").write_text("{")
    ran = run("baseline", "check", "--today=2027-06-01", "--json")
    assert ran.code == 1
    findings = {(rot["kind"], rot["path"]) for rot in ran.document["findings"]}
    assert findings == {("unreadable", "corrupt.json"), ("foreign", "elsewhere.json"), ("stale", "elsewhere.json")}
    assert all(rot["text"] and rot["advice"] for rot in ran.document["findings"])
    assert ran.document["baselines"] == 2
    assert run("baseline", "check", "--today=2027-06-01").out.endswith("2 baselines: 3 faults, 0 notes\n")


@pytest.mark.parametrize(("layout", "code"), [("tp2", 0), ("tp4", 1)])
def test_check_of_what_is_used(run: Run, layout: str, code: int) -> None:
    write_baseline(quiet_baseline(10))
    results = write_results("r.json", measured(layout=layout))
    ran = run("baseline", "check", TODAY, "--used", results)
    assert (ran.code, f"unused: {PATH}" in ran.out) == (code, bool(code))


def test_check_with_results_that_cannot_be_read(run: Run) -> None:
    write_baseline(quiet_baseline(10))
    Path("r.json").write_bytes(b"\xff")
    ran = run("baseline", "check", "--used", "r.json")
    assert (ran.code, "found bytes that are no UTF-8" in ran.err) == (2, True)


@pytest.mark.parametrize("verb", ["check --used", "prune --unused"])
def test_results_without_a_measurement_make_nothing_unused(run: Run, verb: str) -> None:
    write_baseline(quiet_baseline(10))
    before = everything()
    ran = run("baseline", *verb.split(), write_results("r.json"))
    assert (ran.code, "results with measurements were required, found none\n  in r.json" in ran.err) == (2, True)
    assert {name: text for name, text in everything().items() if name != "r.json"} == before


# -- approve ---------------------------------------------------------------------------------------------------------


def approve(run: Run, *arguments: str) -> Ran:
    return run("baseline", "approve", *arguments, TODAY)


def test_approve_a_new_baseline(run: Run) -> None:
    ran = approve(run, write_results("r.json", measured()))
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        PATH,
        "  new: session of 2026-11-21T08:00:00Z, 3 starts  [r.json]",
        "stored in gpu-baselines",
    ]
    assert read().sessions == (measured().as_session("2026-11-21T08:00:00Z"),)


def test_approve_what_is_equal(run: Run) -> None:
    write_baseline(quiet_baseline(10))
    document = approve(run, write_results("r.json", measured()), "--json").document
    assert document["written"] is True
    [session] = document["sessions"]
    assert (session["category"], session["starts"], session["refusals"]) == ("equal", 3, [])
    assert len(read().levels()) == 1
    assert len(read().sessions) == 11


def test_approve_refuses_what_is_worse_and_writes_nothing_at_all(run: Run) -> None:
    write_baseline(quiet_baseline(10))
    before = everything()
    good = write_results("good.json", measured(layout="tp4"))
    worse = write_results("worse.json", measured(1.3))
    ran = approve(run, good, worse)
    assert ran.code == 1
    assert "    refused: it makes the baseline worse\n" in ran.out
    assert ran.out.splitlines()[-1].startswith("refused: nothing was written; take what is worse with --allow-worse")
    assert {name: text for name, text in everything().items() if name in before} == before
    assert not Path("gpu-baselines", key(layout="tp4").path).exists()


def test_approve_what_is_worse_keeps_the_reason_and_the_last_day(run: Run) -> None:
    write_baseline(quiet_baseline(10))
    results = write_results("r.json", measured(1.3))
    ran = approve(run, results, "--allow-worse", "--reason", " it checks more ", "--until", "2026-12-31")
    assert ran.code == 0
    begins = read().sessions[-1].begins
    assert begins is not None
    assert (begins.reason, begins.until) == ("it checks more", "2026-12-31")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--allow-worse",), "a reason was required for what gets worse, found none"),
        (("--allow-worse", "--reason", "  "), "a reason was required for what gets worse, found none"),
        (("--until", "2026-12-31"), "found --until without --allow-worse"),
        (("--allow-worse", "--reason", "x", "--until", "2026-11-20"), "still to come was required, found 2026-11-20"),
        (("--only", "other.json"), "measurements of other.json were required, found those of"),
    ],
)
def test_approve_options_that_do_not_go_together(run: Run, options: tuple[str, ...], told: str) -> None:
    ran = approve(run, write_results("r.json", measured()), *options)
    assert (ran.code, told in ran.err) == (2, True)
    assert not Path("gpu-baselines").exists()


def test_approve_of_results_without_a_measurement(run: Run) -> None:
    ran = approve(run, write_results("r.json"))
    assert (ran.code, "measurements of any baseline were required" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("unsound", "told"),
    [("failed", "failed-requests: "), ("recorded", "the topology was read from topo.txt and not probed")],
)
def test_approve_refuses_what_is_unsound_with_every_leave(run: Run, unsound: str, told: str) -> None:
    broken = replace(run_of(1.0, error="HTTP 500").batches[0], index=1)
    runs = (replace(run_of(1.0), batches=(run_of(1.0).batches[0], broken)),)
    measurement = replace(measured(), runs=runs) if unsound == "failed" else measured()
    results = write_results("r.json", measurement, recorded_topology=unsound == "recorded")
    ran = approve(run, results, "--allow-worse", "--reason", "x")
    assert ran.code == 1
    assert "  unsound: session of " in ran.out
    assert f"    refused: {told}" in ran.out
    assert not Path("gpu-baselines").exists()


def test_approve_twice_is_refused(run: Run) -> None:
    results = write_results("r.json", measured())
    assert approve(run, results).code == 0
    before = everything()
    again = approve(run, results)
    assert (again.code, "the same numbers are stored already" in again.out) == (1, True)
    assert everything() == before
    twice = approve(run, results, results, "--dir", "other")
    assert twice.code == 0  # the same file named twice counts once


def test_approve_dry_run_writes_nothing(run: Run) -> None:
    ran = approve(run, write_results("r.json", measured()), "--dry-run")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "nothing was written to gpu-baselines: --dry-run")
    assert not Path("gpu-baselines").exists()


def test_approve_only_what_is_named(run: Run) -> None:
    results = write_results("r.json", measured(), measured(1.3, layout="tp4"))
    assert approve(run, results, "--only", PATH).code == 0
    assert set(everything()) == {f"gpu-baselines/{PATH}", "r.json"}


def test_approve_says_what_it_leaves_out(run: Run) -> None:
    ran = approve(run, write_results("r.json", measured(), measured(1.001)))
    assert "left out: t.py::test_1 of r.json, which measured the same once more later" in ran.out.splitlines()


@pytest.mark.parametrize(("value", "is_ci"), [("true", True), ("1", True), ("false", False), ("", False)])
def test_approve_writes_nothing_in_ci(run: Run, monkeypatch: pytest.MonkeyPatch, value: str, is_ci: bool) -> None:
    monkeypatch.setenv("CI", value)
    results = write_results("r.json", measured())
    assert approve(run, results, "--dry-run").code == 0
    ran = approve(run, results)
    assert ran.code == (2 if is_ci else 0)
    if is_ci:
        assert "a place outside CI was required to write baselines" in ran.err
        assert not Path("gpu-baselines").exists()
        assert approve(run, results, "--write-in-ci").code == 0


def test_approve_a_store_that_cannot_be_read(run: Run) -> None:
    write_baseline(quiet_baseline(2))
    (Path("gpu-baselines") / PATH).write_text("{")
    ran = approve(run, write_results("r.json", measured()))
    assert (ran.code, "this file is none: it is not JSON" in ran.err) == (2, True)
    assert (Path("gpu-baselines") / PATH).read_text() == "{"


class StoreThatFillsUp(InMemoryBaselines):
    """Takes one document, and then no more."""

    def update(self, path: str, change: Callable[[str | None], str | None]) -> bool:
        if self.texts:
            raise BaselineError(
                "the baseline could not be stored: no space left\n  in memory\n  free some", path=path
            )
        return super().update(path, change)


def test_approve_says_what_was_stored_before_a_write_failed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StoreThatFillsUp()
    monkeypatch.setattr("pytest_gpulayout.adapters.baseline_files.open_baselines", lambda place: store)
    ran = approve(run, write_results("r.json", measured(), measured(layout="tp4")))
    [first] = store.texts
    assert ran.code == 2
    assert ran.err == (
        "gpulayout: the baseline could not be stored: no space left\n  in memory\n  free some\n"
        f"  stored before that: {first}\n"
    )


# -- prune -----------------------------------------------------------------------------------------------------------


def test_prune_removes_and_says_so(run: Run) -> None:
    write_baseline(quiet_baseline(25))
    before = everything()
    dry = run("baseline", "prune", TODAY, "--dry-run")
    told = f"5 sessions older than the newest of their level and epoch: 2026-10-01 to 2026-10-05 of {PATH}"
    assert (dry.code, dry.out) == (0, f"would be removed: {told}\n")
    assert everything() == before
    ran = run("baseline", "prune", TODAY)
    assert (ran.code, ran.out) == (0, f"removed: {told}\n")
    assert len(read().sessions) == 20
    assert run("baseline", "prune", TODAY).out == "nothing to remove\n"


def test_prune_of_nothing_leaves_the_file_as_it_is(run: Run) -> None:
    write_baseline(quiet_baseline(3))
    before = everything()
    assert run("baseline", "prune", TODAY).code == 0
    assert everything() == before


def test_prune_what_nobody_uses(run: Run) -> None:
    write_baseline(quiet_baseline(3))
    write_baseline(quiet_baseline(3, layout="tp4"))
    results = write_results("r.json", measured())
    ran = run("baseline", "prune", TODAY, "--unused", results, "--json")
    tp4 = key(layout="tp4").path
    assert ran.document["removed"] == [{"path": tp4, "what": ["all, since it is unused,"]}]
    assert [name for name in everything() if name.startswith("gpu-")] == [f"gpu-baselines/{PATH}"]


def test_prune_a_waiver_that_is_over(run: Run) -> None:
    write_baseline(stored(*quiet_baseline(9).sessions, quiet_session(10, factor=1.2, begins=WAIVER)))
    assert run("baseline", "prune", TODAY).out == "nothing to remove\n"
    ran = run("baseline", "prune", TODAY, "--expired")
    assert ran.out.startswith("removed: 1 session of a waiver that ended on 2026-11-20 (a bug): 2026-10-10 of ")
    assert read() == quiet_baseline(9)


def test_prune_writes_nothing_in_ci(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_baseline(quiet_baseline(25))
    before = everything()
    monkeypatch.setenv("CI", "true")
    assert run("baseline", "prune", TODAY, "--dry-run").code == 0
    assert run("baseline", "prune", TODAY).code == 2
    assert everything() == before
    assert run("baseline", "prune", TODAY, "--write-in-ci").code == 0


def test_prune_leaves_what_it_cannot_read(run: Run) -> None:
    write_baseline(quiet_baseline(25))
    Path("gpu-baselines/corrupt.json").write_text("{")
    ran = run("baseline", "prune", TODAY)
    assert (ran.code, "corrupt.json" in ran.err) == (2, True)
    assert Path("gpu-baselines/corrupt.json").read_text() == "{"
    assert len(read().sessions) == 20


def test_a_url_is_a_place_too(run: Run) -> None:
    results = write_results("r.json", measured())
    url = f"memory://{os.urandom(4).hex()}"
    assert approve(run, results, "--dir", url).code == 0
    [entry] = json.loads(run("baseline", "list", "--dir", url, "--json").out)["baselines"]
    assert (entry["path"], entry["sessions"], entry["state"]) == (PATH, 1, "provisional")
    assert run("baseline", "check", "--dir", url, TODAY).code == 0
