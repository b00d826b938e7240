from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pytest_gpulayout.baseline import (
    Baseline,
    BaselineKey,
    BaselineSession,
    baseline_from_text,
    baseline_to_text,
    is_measurement,
    safe_name,
)
from pytest_gpulayout.errors import BaselineCorrupt
from tests.support.measurements import baseline_of, key, plain_session, session_of

TWO = baseline_of([1.0, 1.01], [1.02])


def test_documents_round_trip() -> None:
    assert baseline_from_text(baseline_to_text(TWO), "here") == TWO


metric_values = st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=3).map(tuple)


@given(st.lists(metric_values, min_size=1, max_size=3), st.text(min_size=1))
def test_any_numbers_and_names_round_trip(sessions: list[tuple[float, ...]], name: str) -> None:
    model = {"name": name, "revision": name, "arguments": name}
    baseline = Baseline(key(model=model), tuple(plain_session(*values) for values in sessions))
    assert baseline_from_text(baseline_to_text(baseline), "here") == baseline


def test_the_text_is_stable_with_one_line_per_session() -> None:
    text = baseline_to_text(TWO)
    assert text == baseline_to_text(baseline_from_text(text, "here"))
    lines = text.splitlines()
    assert text.endswith(" ]\n}\n")
    assert sum('"recorded": "2026-11-20T08:00:00Z"' in line for line in lines) == 2
    assert '   "layout": "tp2",' in lines


def test_one_more_session_is_a_diff_of_one_line() -> None:
    before = baseline_to_text(baseline_of([1.0])).splitlines()
    after = baseline_to_text(baseline_of([1.0], [1.1])).splitlines()
    gone = [line for line in before if line not in after]
    new = [line for line in after if line not in before]
    assert (len(gone), len(new)) == (1, 2)  # the last line of the list gets its comma
    assert gone[0] + "," == new[0]


def test_samples_leave_out_sessions_that_never_measured_the_metric() -> None:
    baseline = Baseline(key(), (plain_session(1.0, 2.0), plain_session(3.0, metric="p99_itl_ms")))
    [[sample]] = baseline.samples("median_tpot_ms")
    assert sample.batches == (1.0, 2.0)
    assert baseline.samples("median_ttft_ms") == ()


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
        ("<<<<<<< HEAD\n", "it is not JSON (Expecting value"),
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
        (changed("schema_version", 2), "$.schema_version: 1 was expected"),
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
        "  restore it (git checkout), or record it again: --gpu-baseline=update",
    ]
    assert error.value.path == "gpu-baselines/x.json"


def test_a_document_cut_at_any_byte_is_refused() -> None:
    text = baseline_to_text(baseline_of([1.0]))
    for length in range(len(text) - 1):  # without the last newline it is whole
        with pytest.raises(BaselineCorrupt):
            baseline_from_text(text[:length], "x")


# -- the key ---------------------------------------------------------------------------------------------------------


def test_path() -> None:
    assert re.fullmatch(r"org-tiny-[0-9a-f]{8}/tp2/2x-NVIDIA-H200-NV18-[0-9a-f]{8}/small\.json", key().path)


def test_the_path_of_a_model_cannot_leave_its_folder() -> None:
    for name in ("../../etc/passwd", "..", "/", "a/../b", "\0"):
        model, *rest = key(model={"name": name, "revision": "", "arguments": ""}).path.split("/")
        assert len(rest) == 3
        assert model not in ("", ".", "..")


@pytest.mark.parametrize(
    ("other", "differences"),
    [
        (key(), ()),
        (key(layout="tp4"), ("layout: stored 'tp4', now 'tp2'",)),
        (key(hardware={"links": ["SYS"]}), ("hardware.links: stored ['SYS'], now ['NV18']",)),
        (key(protocol=2), ("protocol: stored 2, now 1",)),
        (
            key(model={"name": "org/tiny", "revision": "main", "extra": "1"}),
            (
                "model.revision: stored 'main', now 'default'",
                "model.arguments: stored None, now ''",
                "model.extra: stored '1', now None",
            ),
        ),
    ],
)
def test_differences_between_keys_are_named(other: BaselineKey, differences: tuple[str, ...]) -> None:
    assert key().differences(other) == differences


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
