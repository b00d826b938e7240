"""What a reviewer is told of a change to stored baselines."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pytest_gpulayout.baseline import Baseline, LevelStart
from pytest_gpulayout.baseline_diff import BaselineDiff, diff_baselines, diff_document, diff_lines, diff_markdown
from tests.support.measurements import baseline_of, key
from tests.support.stored import dated, day, stored

PATH = key().path
TODAY = "2026-11-21"
START = LevelStart("vLLM 0.33 | checks", ("median_tpot_ms 10.0 ms -> 12.0 ms (+20.0%, worse)",), until="2026-12-31")
OLD = stored(dated(1, 1.0), dated(2, 1.02))


def only(old: Baseline | None, new: Baseline | None, today: str = TODAY) -> BaselineDiff:
    [diff] = diff_baselines({} if old is None else {PATH: old}, {} if new is None else {PATH: new}, today=today)
    return diff


def test_what_is_equal_is_left_out() -> None:
    assert diff_baselines({PATH: OLD}, {PATH: replace(OLD)}, today=TODAY) == ()


def test_new_and_removed_in_order_of_paths() -> None:
    diffs = diff_baselines({"b.json": OLD}, {"a.json": OLD}, today=TODAY)
    assert [(diff.path, diff.happened) for diff in diffs] == [("a.json", "new"), ("b.json", "removed")]
    assert diffs[0].added == (day(1), day(2))
    assert diffs[1].removed == (day(1), day(2))


def test_a_session_more_and_the_means() -> None:
    diff = only(OLD, stored(*OLD.sessions, dated(3, 1.1)))
    assert (diff.happened, diff.added, diff.removed, diff.begun) == ("changed", (day(3),), (), ())
    [tpot] = [shift for shift in diff.metrics if shift.name == "median_tpot_ms"]
    assert tpot.old == pytest.approx(10 * math.sqrt(1.02))
    assert tpot.new == pytest.approx(10 * (1.02 * 1.1) ** (1 / 3))
    assert tpot.change == pytest.approx((1.02 * 1.1) ** (1 / 3) / math.sqrt(1.02) - 1)


def test_a_level_and_the_software_of_it() -> None:
    session = dated(3, 1.2, begins=START, epoch={"driver": "580.2"}, sut={"vllm": "0.33.0"})
    diff = only(OLD, stored(*OLD.sessions, session))
    assert diff.begun == (START,)
    assert diff.changed == ("driver: 570.1 -> 580.2", "vllm: 0.32.0 -> 0.33.0")
    lines = list(diff_lines(diff))
    assert lines[:6] == [
        f"changed: {PATH}",
        f"  1 session added: {day(3)}",
        "  level begun, a waiver until 2026-12-31: vLLM 0.33 | checks",
        "    median_tpot_ms 10.0 ms -> 12.0 ms (+20.0%, worse)",
        "  changed: driver: 570.1 -> 580.2",
        "  changed: vllm: 0.32.0 -> 0.33.0",
    ]
    [tpot] = [line.split() for line in lines if line.startswith("  median_tpot_ms")]
    assert tpot == ["median_tpot_ms", "10.1", "ms", "12.0", "ms", "+18.8%", "worse"]
    [rate] = [line.split() for line in lines if line.startswith("  request_throughput")]
    assert rate[-1] == "worse"


def test_a_waiver_that_is_over_moves_no_mean() -> None:
    diff = only(OLD, stored(*OLD.sessions, dated(3, 1.2, begins=START)), today="2027-01-01")
    assert {shift.change for shift in diff.metrics} == {0.0}


def test_history_that_was_rewritten_is_named() -> None:
    diff = only(OLD, stored(dated(1, 1.0), dated(2, 0.5)))
    assert (diff.added, diff.removed, diff.edited) == ((), (), (day(2),))
    assert f"  1 session edited: {day(2)}" in diff_lines(diff)


def test_another_key_in_the_same_file() -> None:
    diff = only(OLD, replace(OLD, key=key(layout="tp4")))
    assert diff.key == ("layout: stored 'tp2', now 'tp4'",)


def test_a_metric_that_came_or_went() -> None:
    without = replace(
        OLD,
        sessions=tuple(
            replace(session, runs=tuple(replace(run, metrics={"median_tpot_ms": (10.0,)}) for run in session.runs))
            for session in OLD.sessions
        ),
    )
    shifts = {shift.name: shift for shift in only(without, OLD).metrics}
    assert shifts["median_ttft_ms"].old is None
    assert shifts["median_ttft_ms"].change is None
    rows = [line.split() for line in diff_lines(only(without, OLD)) if line.startswith("  median_ttft_ms")]
    assert rows == [["median_ttft_ms", "-", "101", "ms", "-"]]


def test_the_document_has_all_of_it() -> None:
    diff = only(None, baseline_of([1.0]))
    document = diff_document(diff)
    assert set(document) == {"path", "happened", "sessions", "levels", "key", "changed", "metrics"}
    assert document["sessions"] == {"added": ["2026-11-20T08:00:00Z"], "removed": [], "edited": []}


def test_markdown_is_a_table_and_takes_no_markup_of_others() -> None:
    diff = only(OLD, stored(*OLD.sessions, dated(3, 1.2, begins=START)))
    text = "\n".join(diff_markdown([diff]))
    assert f"**changed** `{PATH}`" in text
    assert "| metric | old mean | new mean | change |\n|---|---:|---:|---:|" in text
    assert "vLLM 0.33 \\| checks" in text
    assert "| median\\_tpot" not in text
    assert list(diff_markdown([])) == ["No stored baseline changed."]
