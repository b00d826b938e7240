from __future__ import annotations

import difflib
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pytest_gpulayout.baseline import (
    NEWEST,
    Baseline,
    BaselineSession,
    LevelStart,
    Reference,
    is_measurement,
    safe_name,
)
from pytest_gpulayout.baseline_text import SCHEMA_VERSION, baseline_from_text, baseline_to_text
from pytest_gpulayout.errors import BaselineCorrupt
from tests.support.measurements import baseline_of, key, plain_session, session_of

TWO = baseline_of([1.0, 1.01], [1.02])
TODAY = "2026-11-21"


def test_documents_round_trip() -> None:
    assert baseline_from_text(baseline_to_text(TWO), "here") == TWO


metric_values = st.lists(st.floats(5e-324, 1e300), min_size=1, max_size=3).map(tuple)
observed_values = st.dictionaries(st.text(), st.floats(0, 1e300) | st.integers(0, 2**63), max_size=3)
told = st.dictionaries(
    st.text(),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
        max_leaves=4,
    ),
    max_size=3,
)
begins = st.none() | st.builds(
    LevelStart,
    st.text(min_size=1),
    st.lists(st.text(), max_size=2).map(tuple),
    st.sampled_from(["", "2026-12-31"]),
)


@st.composite
def any_session(draw: st.DrawFn) -> BaselineSession:
    [run] = plain_session(1.0).runs
    runs = [
        replace(
            run, metrics=draw(st.dictionaries(st.text(), metric_values, min_size=1)), observed=draw(observed_values)
        )
        for _ in range(draw(st.integers(1, 2)))
    ]
    return BaselineSession(draw(st.text()), draw(told), draw(told), draw(told), tuple(runs), {}, draw(begins))


@given(st.lists(any_session(), min_size=1, max_size=3), st.text(st.characters(), min_size=1))
@example([plain_session(0.1 + 0.2, 1e-320, 1e22, 5e-324, 123456789.123456789)], "\udcff")
def test_any_numbers_and_names_round_trip(sessions: list[BaselineSession], name: str) -> None:
    model = {"name": name, "revision": name, "dtype": name, "arguments": name}
    baseline = Baseline(key(model=model), tuple(sessions))
    text = baseline_to_text(baseline)
    read = baseline_from_text(text, "here")
    assert read == baseline
    assert baseline_to_text(read) == text
    assert text.encode()
    assert text.count("\n") == baseline_to_text(Baseline(key(model=model), (plain_session(1.0),))).count("\n") + (
        len(sessions) - 1
    )


def test_the_text_is_stable_with_one_line_per_session() -> None:
    text = baseline_to_text(TWO)
    assert text == baseline_to_text(baseline_from_text(text, "here"))
    lines = text.splitlines()
    assert text.endswith(" ]\n}\n")
    assert sum('"recorded": "2026-11-20T08:00:00Z"' in line for line in lines) == 2
    assert '   "layout": "tp2",' in lines


def test_the_order_of_names_does_not_matter() -> None:
    [session] = baseline_of([1.0]).sessions
    turned = replace(
        session,
        runs=tuple(replace(run, metrics=dict(reversed(list(run.metrics.items())))) for run in session.runs),
        sut=dict(reversed(list(session.sut.items()))),
    )
    assert baseline_to_text(Baseline(key(), (turned,))) == baseline_to_text(Baseline(key(), (session,)))


def test_what_people_wrote_can_be_read_in_a_diff() -> None:
    session = replace(session_of(1.0), begins=LevelStart("größerer Kontext, 更大的上下文 😀"))
    text = baseline_to_text(Baseline(key(), (session,)))
    assert "größerer Kontext, 更大的上下文 😀" in text


@pytest.mark.parametrize("stored", [1, 2, 30])
def test_one_more_session_is_a_diff_of_one_line(stored: int) -> None:
    factors = [[1.0 + number / 1000] for number in range(stored + 1)]
    before, after = (baseline_to_text(baseline_of(*part)).splitlines() for part in (factors[:-1], factors))
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "+-?"]
    assert len(changes) == 1
    assert changes[0].startswith('+  ,{"covariates": ')


def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "merge.conflictStyle=merge")
    command = ["git", "-C", str(folder), *settings, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def merged(folder: Path, attributes: str) -> str:
    """A file that two branches each appended a session to, after ``git merge``."""
    git(folder, "init", "--quiet", "--initial-branch=main")
    (folder / ".gitattributes").write_text(attributes)
    file = folder / "x.json"
    for branch, more in (("main", []), ("ours", [1.1]), ("theirs", [1.2])):
        git(folder, "checkout", "--quiet", "-b", branch, "main")
        file.write_text(baseline_to_text(baseline_of([1.0], *([more] if more else []))), encoding="utf-8")
        git(folder, "add", ".")
        assert git(folder, "commit", "--quiet", "-m", branch).returncode == 0
    git(folder, "merge", "--quiet", "ours")
    return file.read_text(encoding="utf-8")


@pytest.mark.end_to_end
def test_git_merges_what_two_branches_appended(tmp_path: Path) -> None:
    text = merged(tmp_path, "*.json merge=union\n")
    read = baseline_from_text(text, "x.json")
    assert sorted(session.runs[0].metrics["median_tpot_ms"][0] for session in read.sessions) == [10.0, 11.0, 12.0]


@pytest.mark.end_to_end
def test_a_merge_that_is_not_finished_is_told(tmp_path: Path) -> None:
    text = merged(tmp_path, "")
    line = next(number for number, line in enumerate(text.splitlines(), 1) if line.startswith("<<<<<<<"))
    with pytest.raises(BaselineCorrupt) as caught:
        baseline_from_text(text, "gpu-baselines/x.json")
    assert str(caught.value).splitlines() == [
        "a baseline document was required, found git's conflict markers: the merge is not finished",
        f"  in gpu-baselines/x.json, line {line}",
        "  keep the session lines of both sides and delete the lines that begin with <<<<<<<, |||||||, ======= and "
        ">>>>>>> (each session but the first begins with a comma), then git add it",
    ]
    as_told = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(("<<<", "===", ">>>")))
    assert len(baseline_from_text(as_told, "x").sessions) == 3


def test_samples_leave_out_sessions_that_never_measured_the_metric() -> None:
    baseline = Baseline(key(), (plain_session(1.0, 2.0), plain_session(3.0, metric="p99_itl_ms")))
    [[sample]] = baseline.reference().level_samples("median_tpot_ms")
    assert sample.batches == (1.0, 2.0)
    assert baseline.reference().level_samples("median_ttft_ms") == ()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_number_that_could_not_be_read_back_is_not_written(bad: float) -> None:
    with pytest.raises(BaselineCorrupt):
        baseline_to_text(Baseline(key(), (plain_session(1.0, bad),)))


def test_a_baseline_without_sessions_is_not_written() -> None:
    with pytest.raises(BaselineCorrupt, match=r"\$\.sessions: \[\] should be non-empty"):
        baseline_to_text(Baseline(key()))


def changed(path: str, value: Any) -> str:
    """The document with one field replaced, or removed where ``value`` is ``...``."""
    document = json.loads(baseline_to_text(baseline_of([1.0])))
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("/"))
    place: Any = document
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(document)


TPOT = "sessions/0/runs/0/metrics/median_tpot_ms"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it is not JSON (Expecting value: line 1 column 1 (char 0))"),
        ("{", "it is not JSON (Expecting property name"),
        ("[" * 100_000, "it is not JSON (maximum recursion depth exceeded"),
        ("null", "$: None is not of type 'object'"),
        ("{}", "$: 'schema_version' is a required property"),
        (changed(TPOT, [float("nan")]), "it is not JSON (NaN is not a number)"),
        (changed(TPOT, [float("inf")]), "it is not JSON (Infinity is not a number)"),
        (changed(TPOT, [-float("inf")]), "it is not JSON (-Infinity is not a number)"),
        (
            changed(TPOT, [7.5]).replace("7.5", "1e999"),
            "median_tpot_ms[0]: inf is greater than the maximum of 1e+300",
        ),
        (changed(TPOT, [10**400]), "is greater than the maximum of 1e+300"),
        (changed(TPOT, [0]), "median_tpot_ms[0]: 0 is less than or equal to the minimum of 0"),
        (changed(TPOT, [-1.0]), "median_tpot_ms[0]: -1.0 is less than or equal to the minimum of 0"),
        (changed(TPOT, ["10"]), "median_tpot_ms[0]: '10' is not of type 'number'"),
        (changed(TPOT, [True]), "median_tpot_ms[0]: True is not of type 'number'"),
        (changed(TPOT, [None]), "median_tpot_ms[0]: None is not of type 'number'"),
        (changed(TPOT, []), "median_tpot_ms: [] should be non-empty"),
        (changed("sessions/0/runs/0/metrics", {}), "$.sessions[0].runs[0].metrics: {} should be non-empty"),
        (changed("sessions/0/runs/0/requests", 0), "requests: 0 is less than the minimum of 1"),
        (changed("sessions/0/runs", []), "$.sessions[0].runs: [] should be non-empty"),
        (changed("sessions", []), "$.sessions: [] should be non-empty"),
        (changed("sessions/0/recorded", ...), "$.sessions[0]: 'recorded' is a required property"),
        (changed("key", ...), "$: 'key' is a required property"),
        (changed("key/layout", ...), "$.key: 'layout' is a required property"),
        (changed("key/hardware/links", ...), "$.key.hardware: 'links' is a required property"),
        (changed("key/hardware/platform", "tpu"), "$.key.hardware.platform: 'tpu' is not one of ['cuda', 'cpu']"),
        (changed("schema_version", 0), "$.schema_version: 2 was expected"),
        (changed("schema_version", True), "$.schema_version: 2 was expected"),
        (changed("schema_version", "2"), "$.schema_version: 2 was expected"),
        (
            changed("sessions/0/begins", {"reason": "", "changes": [], "until": ""}),
            "begins.reason: '' should be non-e",
        ),
        (
            changed("sessions/0/begins", {"reason": "x", "changes": [], "until": "soon"}),
            "$.sessions[0].begins.until: 'soon' does not match",
        ),
        (changed("sessions/0/runs/0/observed", {"start_s": -1}), "start_s: -1 is less than the minimum of 0"),
        (changed("sessions/0/recorded", 1), "$.sessions[0].recorded: 1 is not of type 'string'"),
        (changed("schema_version", ...), "$: 'schema_version' is a required property"),
        (changed("comment", "x"), "$: Additional properties are not allowed ('comment' was unexpected)"),
    ],
)
def test_a_corrupt_document_is_refused_with_its_fault(text: str, told: str) -> None:
    with pytest.raises(BaselineCorrupt) as error:
        baseline_from_text(text, "gpu-baselines/x.json")
    first, *rest = str(error.value).split("\n")
    assert first.startswith("a baseline document was required, and this file is none: ")
    assert told in first
    assert rest == [
        "  in gpu-baselines/x.json",
        "  restore it (git checkout), or remove it and record it again: --gpu-baseline=new",
    ]
    assert error.value.path == "gpu-baselines/x.json"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"schema_version": 2, "schema_version": 2}', "schema_version"),
        (baseline_to_text(baseline_of([1.0])).replace('"requests": ', '"requests": 9, "requests": ', 1), "requests"),
    ],
)
def test_a_name_that_is_there_twice_is_refused(text: str, name: str) -> None:
    """Of two values Python would take the last one, and say nothing."""
    with pytest.raises(BaselineCorrupt, match=f"it is not JSON .the name '{name}' is there twice in one object"):
        baseline_from_text(text, "x")


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 99])
def test_a_document_of_a_newer_version_says_what_to_do(version: int) -> None:
    text = changed("schema_version", version).replace('"sessions"', '"measurements"')
    with pytest.raises(BaselineCorrupt) as caught:
        baseline_from_text(text, "gpu-baselines/x.json")
    assert str(caught.value).splitlines() == [
        f"a baseline of schema version {SCHEMA_VERSION} or older was required, found {version}: it was written by a "
        "newer pytest-gpulayout",
        "  in gpu-baselines/x.json",
        "  upgrade: pip install --upgrade pytest-gpulayout",
    ]


FIRST_VERSION = """{
 "schema_version": 1,
 "key": {
   "hardware": {
     "count": 2,
     "device": "NVIDIA H200",
     "links": [
       "NV18"
     ],
     "memory_gib": 141,
     "platform": "cuda"
   },
   "layout": "tp2",
   "model": {
     "arguments": "",
     "name": "org/gr\\u00f6\\u00dfe",
     "revision": "default"
   },
   "protocol": 1,
   "workload": {
     "fingerprint": "0123456789ab",
     "name": "small"
   }
 },
 "sessions": [
  {"covariates": {"host": "node1"}, "epoch": {"driver": "570.1"}, "recorded": "2026-11-19T08:00:00Z", "runs": [\
{"metrics": {"median_tpot_ms": [10.0, 10.5], "request_throughput": [4.0, 3.9]}, "requests": 2}], \
"sut": {"vllm": "0.32.0"}, "topology": {}},
  {"covariates": {"host": "node1"}, "epoch": {"driver": "570.1"}, "recorded": "2026-11-20T08:00:00Z", "runs": [\
{"metrics": {"median_tpot_ms": [10.1]}, "requests": 1}], "sut": {"vllm": "0.32.0"}, \
"topology": {"links": {"0-1": "NV18"}}}
 ]
}
"""
"""As the version before wrote it: a comma ends a line, letters are escaped, and nothing is left out."""


def test_a_document_of_the_first_version_is_read_and_written_as_one_of_now() -> None:
    read = baseline_from_text(FIRST_VERSION, "x")
    first, second = read.sessions
    assert read.key.model["name"] == "org/größe"
    assert [run.metrics["median_tpot_ms"] for session in read.sessions for run in session.runs] == [
        (10.0, 10.5),
        (10.1,),
    ]
    assert (first.begins, first.topology, first.runs[0].observed) == (None, {}, {})
    assert second.topology == {"links": {"0-1": "NV18"}}
    assert read.levels() == (read.sessions,)
    text = baseline_to_text(read)
    assert '"schema_version": 2' in text
    assert baseline_from_text(text, "x") == read


def test_sessions_need_no_order_in_time() -> None:
    """The order of the lines counts: a merge may bring an older session to the end."""
    days = ["2026-11-20T08:00:00Z", "2026-11-18T08:00:00Z", "2026-11-19T08:00:00Z"]
    baseline = Baseline(key(), tuple(session_of(1.0, recorded=day) for day in days))
    read = baseline_from_text(baseline_to_text(baseline), "x")
    assert [session.recorded for session in read.reference().sessions] == days
    assert read.reference().newest.recorded == days[-1]


def test_a_document_cut_at_any_byte_is_refused() -> None:
    text = baseline_to_text(baseline_of([1.0]))
    for length in range(len(text) - 1):  # without the last newline it is whole
        with pytest.raises(BaselineCorrupt):
            baseline_from_text(text[:length], "x")


# -- levels, and what a measurement is compared with ----------------------------------------------------------------

OLD, NEW = {"driver": "570.1"}, {"driver": "580.2"}
FOR_GOOD = LevelStart("a larger context")


def waiver(until: str) -> LevelStart:
    return LevelStart("waiting for the fix", ("median_tpot_ms 9.8 ms -> 11.9 ms (+21.4%, worse)",), until)


def history(*parts: tuple[str, dict[str, str], LevelStart | None]) -> Baseline:
    """One session per part: its name, its epoch, and how it begins a level."""
    sessions = (
        BaselineSession(name, epoch, {}, {}, plain_session(1.0).runs, {}, start) for name, epoch, start in parts
    )
    return Baseline(key(), tuple(sessions))


def names(sessions: Sequence[BaselineSession]) -> str:
    return " ".join(session.recorded for session in sessions)


def shown(reference: Reference) -> tuple[str, list[str]]:
    return names(reference.sessions), [names(group) for group in reference.others]


def test_a_level_goes_from_one_accepted_change_to_the_next() -> None:
    baseline = history(
        ("a", OLD, None), ("b", OLD, None), ("c", OLD, FOR_GOOD), ("d", NEW, None), ("e", OLD, waiver("2026-12-31"))
    )
    assert [names(level) for level in baseline.levels()] == ["a b", "c d", "e"]


def test_a_baseline_without_sessions_has_no_level() -> None:
    assert Baseline(key()).levels() == ()


def test_the_first_session_may_begin_its_level_by_itself() -> None:
    """As after the sessions before it were pruned."""
    baseline = history(("a", OLD, FOR_GOOD), ("b", OLD, None))
    assert [names(level) for level in baseline.levels()] == ["a b"]
    assert baseline.reference(OLD, today=TODAY).accepted == FOR_GOOD


@pytest.mark.parametrize(
    ("epoch", "compared", "others"),
    [
        (OLD, "a c", ["b d"]),
        (NEW, "b d", ["a c"]),
        ({"driver": "590.3"}, "b d", ["a c"]),  # of none: the newest one
        ({}, "b d", ["a c"]),
        (None, "b d", ["a c"]),
    ],
)
def test_within_a_level_each_epoch_has_a_mean_of_its_own(
    epoch: dict[str, str] | None, compared: str, others: list[str]
) -> None:
    baseline = history(("a", OLD, None), ("b", NEW, None), ("c", OLD, None), ("d", NEW, None))
    reference = baseline.reference(epoch, today=TODAY)
    assert shown(reference) == (compared, others)
    assert (reference.accepted, reference.is_expired) == (None, False)
    assert reference.newest.recorded == compared[-1]


def test_the_newest_epoch_is_that_of_the_last_session() -> None:
    baseline = history(("a", OLD, None), ("b", NEW, None), ("c", OLD, None))
    assert shown(baseline.reference({"driver": "590.3"})) == ("a c", ["b"])


def test_an_epoch_is_looked_for_in_the_newest_level_only() -> None:
    """The mean of an older level is what was left behind, whatever the driver was then."""
    baseline = history(("a", OLD, None), ("b", OLD, None), ("c", NEW, FOR_GOOD))
    reference = baseline.reference(OLD, today=TODAY)
    assert shown(reference) == ("c", ["a b"])
    assert reference.accepted == FOR_GOOD


def test_sessions_of_other_levels_tell_of_the_spread_only() -> None:
    baseline = history(
        ("a", OLD, None),
        ("b", NEW, None),
        ("c", OLD, FOR_GOOD),
        ("d", NEW, None),
        ("e", NEW, FOR_GOOD),
        ("f", OLD, None),
    )
    assert shown(baseline.reference(NEW, today=TODAY)) == ("e", ["a", "b", "c", "d", "f"])


@pytest.mark.parametrize(
    ("until", "compared", "is_expired"),
    [
        ("", "c d", False),
        ("2026-11-22", "c d", False),
        (TODAY, "c d", False),  # the last day counts
        ("2026-11-20", "a b", True),
        ("2025-12-31", "a b", True),
    ],
)
def test_a_waiver_counts_until_its_last_day(until: str, compared: str, is_expired: bool) -> None:
    baseline = history(("a", OLD, None), ("b", OLD, None), ("c", OLD, waiver(until)), ("d", OLD, None))
    reference = baseline.reference(OLD, today=TODAY)
    assert shown(reference) == (compared, ["c d"] if is_expired else ["a b"])
    assert reference.is_expired is is_expired
    assert reference.accepted == waiver(until)


def test_without_a_day_no_waiver_is_over() -> None:
    baseline = history(("a", OLD, None), ("b", OLD, waiver("2020-01-01")))
    assert shown(baseline.reference(OLD)) == ("b", ["a"])


def test_a_waiver_that_is_over_with_nothing_before_it_stays() -> None:
    """What it was compared with was pruned; there is nothing else to judge by."""
    baseline = history(("a", OLD, waiver("2026-01-01")), ("b", OLD, None))
    reference = baseline.reference(OLD, today=TODAY)
    assert shown(reference) == ("a b", [])
    assert reference.is_expired is False


def test_a_waiver_that_is_over_is_nothing_once_another_change_was_accepted() -> None:
    baseline = history(("a", OLD, None), ("b", OLD, waiver("2026-01-01")), ("c", OLD, FOR_GOOD))
    reference = baseline.reference(OLD, today=TODAY)
    assert shown(reference) == ("c", ["a", "b"])
    assert reference.is_expired is False


def test_after_a_waiver_the_epochs_of_the_level_before_are_looked_at() -> None:
    baseline = history(("a", OLD, None), ("b", NEW, None), ("c", OLD, waiver("2026-01-01")))
    assert shown(baseline.reference(OLD, today=TODAY)) == ("a", ["b", "c"])
    assert shown(baseline.reference(NEW, today=TODAY)) == ("b", ["a", "c"])
    assert shown(baseline.reference({"driver": "590.3"}, today=TODAY)) == ("b", ["a", "c"])


@pytest.mark.parametrize(
    ("until", "over"), [("", False), ("2026-11-20", True), (TODAY, False), ("2026-11-22", False)]
)
def test_is_over(until: str, over: bool) -> None:
    assert LevelStart("x", (), until).is_over(TODAY) is over


def test_the_newest_sessions_of_each_group_count() -> None:
    many = [(f"o{number}", OLD, None) for number in range(NEWEST + 3)]
    before = [(f"n{number}", NEW, None) for number in range(NEWEST + 1)]
    reference = history(*before, *many).reference(OLD)
    assert names(reference.sessions).split() == [f"o{number}" for number in range(3, NEWEST + 3)]
    assert [names(group).split() for group in reference.others] == [[f"n{number}" for number in range(1, NEWEST + 1)]]


def test_sessions_that_are_equal_in_all_are_still_two() -> None:
    baseline = history(("a", OLD, None), ("a", OLD, None))
    assert shown(baseline.reference(OLD)) == ("a a", [])


def test_other_groups_that_never_measured_a_metric_are_left_out() -> None:
    others = (
        replace(plain_session(1.0, metric="p99_itl_ms"), epoch=OLD),
        replace(plain_session(2.0), epoch=NEW),
        replace(plain_session(3.0), epoch={"driver": "590.3"}),
    )
    reference = Baseline(key(), others).reference({"driver": "590.3"})
    [[[sample]]] = reference.other_samples("median_tpot_ms")
    assert sample.batches == (2.0,)
    [[own]] = reference.level_samples("median_tpot_ms")
    assert own.batches == (3.0,)


# -- the key ---------------------------------------------------------------------------------------------------------


def test_path() -> None:
    assert re.fullmatch(r"org-tiny-[0-9a-f]{8}/tp2/2x-NVIDIA-H200-NV18-[0-9a-f]{8}/small\.json", key().path)


def test_arguments_of_a_marker_have_a_path_of_their_own() -> None:
    long, short = (key(model=dict(key().model, arguments=f"--max-model-len {n}")).path for n in (8192, 512))
    assert len({key().path, long, short}) == 3
    assert all(path.endswith("/small.json") for path in (long, short))


def test_the_path_of_a_model_cannot_leave_its_folder() -> None:
    for name in ("../../etc/passwd", "..", "/", "a/../b", "\0"):
        model, *rest = key(model={"name": name, "revision": "", "dtype": "", "arguments": ""}).path.split("/")
        assert len(rest) == 3
        assert model not in ("", ".", "..")


def test_keys_survive_json() -> None:
    read = baseline_from_text(baseline_to_text(TWO), "x")
    assert read.key == TWO.key
    assert isinstance(read.sessions[0], BaselineSession)
    assert read.sessions[1] == session_of(1.02)


PORTABLE = re.compile(r"[A-Za-z0-9_+@](?:[A-Za-z0-9._+@-]*[A-Za-z0-9_+@])?")


@given(st.text(alphabet=st.characters(), max_size=200))
@example("")
@example(".")
@example("..")
@example("../..")
@example("a" * 1000)
@example("a" * 79 + "." + "b")
@example("モデル/七")
@example("\udcff")
@example("-rf")
@example("name\n")
def test_safe_names_are_portable(text: str) -> None:
    name = safe_name(text)
    assert PORTABLE.fullmatch(name)
    assert len(name) <= 89
    assert name == text or re.search("-[0-9a-f]{8}$", name)


@given(st.lists(st.text(max_size=20), unique=True, max_size=30))
@example(["a/b", "a:b", "a b", "a-b", "a--b", "a-b-", ".a-b", "a//b"])
@example(["", ".", "..", "-", "/", "//", "モ", "デ"])
@example(["x" * 80 + "1", "x" * 80 + "2", "x" * 80])
def test_safe_names_do_not_collide(texts: list[str]) -> None:
    assert len({safe_name(text) for text in texts}) == len(texts)


@pytest.mark.parametrize("text", ["tp2", "Qwen3-8B", "smoke", "custom-0123456789ab", "a_b+c@1.0"])
def test_names_that_are_safe_stay_as_they_are(text: str) -> None:
    assert safe_name(text) == text


@pytest.mark.parametrize(
    ("values", "fit"),
    [
        ([1.0, 2], True),
        ([], False),
        ([1.0, 0.0], False),
        ([-1.0], False),
        ([float("nan")], False),
        ([float("inf")], False),
    ],
)
def test_is_measurement(values: list[float], fit: bool) -> None:
    assert is_measurement(values) is fit
