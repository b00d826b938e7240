from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from pytest_gpulayout.errors import WorkloadError
from pytest_gpulayout.workload import BUILTIN_WORKLOADS, Workload, find_workload, workload_from_mapping

OWN = {"input_tokens": 100, "output_tokens": 10, "concurrency": 2, "requests": 8}


def test_smoke_is_what_the_documentation_says() -> None:
    assert find_workload("smoke") == Workload(
        name="smoke", input_tokens=64, output_tokens=32, concurrency=4, requests=24, batches=4, warmup_requests=4
    )


def test_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(WorkloadError) as error:
        find_workload("smok")
    assert "found: 'smok'" in str(error.value)
    assert f"use one of: {', '.join(BUILTIN_WORKLOADS)};" in str(error.value)


def test_defaults_are_four_batches_and_one_wave_of_warm_up() -> None:
    workload = workload_from_mapping(OWN)
    assert (workload.batches, workload.warmup_requests) == (4, 2)
    assert workload_from_mapping({**OWN, "warmup_requests": 0}).warmup_requests == 0


@pytest.mark.parametrize("workload", [*BUILTIN_WORKLOADS.values(), workload_from_mapping(OWN)])
def test_documents_round_trip(workload: Workload) -> None:
    assert workload_from_mapping(workload.to_document()) == workload


def test_a_workload_without_a_name_is_named_for_its_load() -> None:
    workload = workload_from_mapping(OWN)
    assert workload.name == f"custom-{workload.fingerprint()}"


@pytest.mark.parametrize("field", ["input_tokens", "output_tokens", "concurrency", "requests", "warmup_requests"])
def test_fingerprint_changes_with_the_load(field: str) -> None:
    smoke = find_workload("smoke")
    changes: dict[str, Any] = {field: getattr(smoke, field) + 1}
    assert replace(smoke, **changes).fingerprint() != smoke.fingerprint()


def test_fingerprint_does_not_know_the_name_and_the_number_of_batches() -> None:
    smoke = find_workload("smoke")
    assert replace(smoke, name="other", batches=9).fingerprint() == smoke.fingerprint()
    assert re.fullmatch("[0-9a-f]{12}", smoke.fingerprint())


NAME_RULE = "text of 1 to 64 letters, digits, dots, dashes and underscores, the first a letter or digit"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"concurrency": 0}, "concurrency = 0; allowed: a whole number, at least 1"),
        ({"requests": -3}, "requests = -3; allowed: a whole number, at least 1"),
        ({"warmup_requests": -1}, "warmup_requests = -1; allowed: a whole number, at least 0"),
        ({"input_tokens": "64"}, "input_tokens = '64'; allowed: a whole number, at least 1"),
        ({"output_tokens": 1.5}, "output_tokens = 1.5; allowed: a whole number, at least 1"),
        ({"batches": True}, "batches = True; allowed: a whole number, at least 1"),
        ({"batches": None}, "batches = None; allowed: a whole number, at least 1"),
        ({"name": ""}, f"name = ''; allowed: {NAME_RULE}"),
        ({"name": "../x"}, f"name = '../x'; allowed: {NAME_RULE}"),
        ({"name": "x\n"}, f"name = 'x\\n'; allowed: {NAME_RULE}"),
        ({"name": 7}, f"name = 7; allowed: {NAME_RULE}"),
        (
            {"output_len": 7},
            "unknown key 'output_len'; allowed: name, input_tokens, output_tokens, concurrency, requests, "
            "batches, warmup_requests",
        ),
    ],
)
def test_wrong_keys_are_named_with_what_is_allowed(change: dict[str, object], found: str) -> None:
    with pytest.raises(WorkloadError) as error:
        workload_from_mapping({**OWN, **change})
    assert f"found: {found}\n" in str(error.value)


def test_missing_keys_and_several_complaints_are_all_told() -> None:
    with pytest.raises(WorkloadError) as error:
        workload_from_mapping({"concurrency": 0, "requests": 8})
    for complaint in ("concurrency = 0;", "no key 'input_tokens'", "no key 'output_tokens'"):
        assert complaint in str(error.value)
    assert "in workload 'custom'" in str(error.value)


def test_a_whole_number_may_be_written_as_a_float() -> None:
    assert repr(workload_from_mapping({**OWN, "requests": 8.0}).requests) == "8"


def test_a_concurrency_that_is_never_reached_is_refused() -> None:
    with pytest.raises(WorkloadError) as error:
        workload_from_mapping({**OWN, "concurrency": 9})
    assert "raise requests to 9, or lower concurrency to 8" in str(error.value)
