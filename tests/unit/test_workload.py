from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from pytest_gpulayout.answer_schemas import ANSWER_SCHEMAS
from pytest_gpulayout.errors import WorkloadError
from pytest_gpulayout.schemas import load_schema
from pytest_gpulayout.workload import (
    BUILTIN_WORKLOADS,
    ImageSize,
    RampUp,
    Workload,
    as_workload,
    find_workload,
    workload_from_mapping,
)

OWN = {"input_tokens": 100, "output_tokens": 10, "concurrency": 2, "requests": 8}
FULL: dict[str, Any] = {
    "name": "full",
    "output_tokens": 10,
    "requests": 8,
    "input_tokens": 100,
    "concurrency": 2,
    "ramp_up": {"strategy": "exponential", "start_rate": 0.5, "end_rate": 20.0},
    "burstiness": 0.25,
    "batches": 2,
    "warmup_requests": 0,
    "api": "chat",
    "response_schemas": [{"type": "object", "properties": {"a": {"type": "string", "minLength": 3}}}],
    "image": {"width": 64, "height": 48},
    "shares_prefix": True,
    "goodput": {"ttft": 200.0, "e2el": 5000.0},
}
PROMPTED: dict[str, Any] = {
    "name": "prompted",
    "output_tokens": 10,
    "requests": 8,
    "prompts": ["Why?", "How?"],
    "rate": "inf",
    "batches": 4,
    "warmup_requests": 8,
}


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
    document = json.loads(json.dumps(workload.to_document(), allow_nan=False))

    assert workload_from_mapping(document) == workload
    Draft202012Validator(load_schema("workload")).validate(document)


@pytest.mark.parametrize("document", [FULL, PROMPTED])
def test_every_field_is_read_and_written(document: dict[str, Any]) -> None:
    workload = workload_from_mapping(document)

    assert workload.to_document() == document
    assert {entry.name for entry in fields(Workload)} == FULL.keys() | PROMPTED.keys()
    assert load_schema("workload")["properties"].keys() == FULL.keys() | PROMPTED.keys()


def test_fields_have_their_own_types() -> None:
    full, prompted = workload_from_mapping(FULL), workload_from_mapping(PROMPTED)

    assert (full.ramp_up, full.image) == (RampUp("exponential", 0.5, 20.0), ImageSize(64, 48))
    assert (prompted.rate, prompted.prompts) == (math.inf, ("Why?", "How?"))
    assert hash(full) == hash(workload_from_mapping(FULL))


def test_fingerprint_of_the_first_version_stays() -> None:
    assert find_workload("smoke").fingerprint() == "e7cec61de349"


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 2.5},
        {"rate": 2.5, "burstiness": 0.5},
        {"rate": "inf"},
        {"api": "chat"},
        {"api": "chat", "image": {"width": 8, "height": 8}},
        {"response_schemas": [{"type": "object"}]},
        {"shares_prefix": True},
        {"ramp_up": {"strategy": "linear", "start_rate": 1, "end_rate": 2}},
    ],
)
def test_fingerprint_changes_with_every_other_kind_of_load(change: dict[str, Any]) -> None:
    assert workload_from_mapping({**OWN, **change}).fingerprint() != workload_from_mapping(OWN).fingerprint()


def test_fingerprint_does_not_know_limits() -> None:
    limited = workload_from_mapping({**OWN, "goodput": {"ttft": 100}})
    assert limited.fingerprint() == workload_from_mapping(OWN).fingerprint()


def test_published_workloads_are_what_the_articles_sent() -> None:
    structured, at_once, image = (BUILTIN_WORKLOADS[name] for name in list(BUILTIN_WORKLOADS)[1:])

    assert (structured.name, structured.concurrency, structured.input_tokens, structured.output_tokens) == (
        "structured-100",
        100,
        1000,
        500,
    )
    assert structured.response_schemas == ANSWER_SCHEMAS
    assert not structured.expects_exact_output
    assert (at_once.name, at_once.rate, at_once.requests, at_once.input_tokens, at_once.output_tokens) == (
        "random-300",
        math.inf,
        300,
        100,
        600,
    )
    assert (image.name, image.api, image.concurrency, image.image) == (
        "single-image-latency",
        "chat",
        1,
        ImageSize(1024, 768),
    )
    assert at_once.expects_exact_output
    assert image.expects_exact_output


def shortest(schema: Any) -> Any:
    """The instance of a schema that takes the fewest characters."""
    if "enum" in schema:
        return min(schema["enum"], key=len)
    if "anyOf" in schema:
        return min((shortest(part) for part in schema["anyOf"]), key=lambda value: len(json.dumps(value)))
    if "pattern" in schema:
        return {
            "^20[0-9]{2}-[01][0-9]-[0-3][0-9]$": "2026-01-31",
            "^ORD-[0-9]{8}$": "ORD-00000001",
            "^[A-Z]{3}-[0-9]{4}$": "ABC-0001",
            "^[0-9a-f]{16}$": "0123456789abcdef",
            "^20[0-9]{2}/[0-9]{5}$": "2026/00001",
        }[schema["pattern"]]
    kind = schema["type"]
    if kind == "object":
        return {key: shortest(value) for key, value in schema["properties"].items()}
    if kind == "array":
        return [shortest(schema["items"])] * schema["minItems"]
    if kind == "string":
        return "x" * schema["minLength"]
    return {"integer": schema.get("minimum"), "number": 0, "boolean": True, "null": None}[kind]


@pytest.mark.parametrize("schema", ANSWER_SCHEMAS, ids=range(len(ANSWER_SCHEMAS)))
def test_no_structured_answer_ends_before_its_limit(schema: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema)
    answer = shortest(schema)

    Draft202012Validator(schema).validate(answer)
    assert len(json.dumps(answer, separators=(",", ":"))) > 4 * 500  # four characters a token is much in JSON


def test_structured_answers_have_shapes_of_their_own() -> None:
    assert len({json.dumps(schema) for schema in ANSWER_SCHEMAS}) == 8
    assert not re.search('"(format|uniqueItems|multipleOf|allOf)"', json.dumps(ANSWER_SCHEMAS))


@pytest.mark.parametrize(
    ("change", "wave"),
    [
        ({}, 2),
        ({"concurrency": None, "rate": math.inf}, 8),
        ({"concurrency": None, "rate": 3.0}, 8),
        ({"concurrency": None, "rate": 3.0, "requests": 500}, 32),
        ({"concurrency": None, "rate": math.inf, "requests": 500}, 500),
        ({"concurrency": 40, "rate": 3.0, "requests": 500}, 40),
        ({"concurrency": None, "ramp_up": RampUp("linear", 1, 2), "requests": 500}, 32),
    ],
)
def test_warm_up_is_one_wave_as_far_as_it_is_known(change: dict[str, Any], wave: int) -> None:
    assert Workload(name="x", **{**OWN, **change}).warmup_requests == wave


@pytest.mark.parametrize(
    ("change", "required", "found"),
    [
        (
            {"concurrency": None},
            "a workload needs concurrency for a closed loop, or rate or ramp_up",
            "none of the three",
        ),
        ({"rate": 0.0}, "rate must be above 0 req/s", "rate = 0.0"),
        ({"rate": -1.0}, "rate must be above 0 req/s", "rate = -1.0"),
        ({"rate": math.nan}, "rate must be above 0 req/s", "rate = nan"),
        ({"rate": 1.0, "burstiness": 0.0}, "burstiness must be above 0", "burstiness = 0.0"),
        ({"burstiness": 0.5}, "burstiness needs arrivals by rate or ramp_up", "burstiness = 0.5 in a closed loop"),
        ({"rate": 1.0, "ramp_up": RampUp("linear", 1, 2)}, "requests arrive by rate or by ramp_up", "rate = 1.0 and"),
        ({"ramp_up": RampUp("linear", 0, 2)}, "both rates of ramp_up must be above 0", "from 0 to 2 req/s"),
        ({"ramp_up": RampUp("linear", 1, math.inf)}, "both rates of ramp_up must be above 0", "from 1 to inf req/s"),
        ({"image": ImageSize(8, 8)}, "an image can only be sent to the chat API", "api = 'completions'"),
        ({"image": ImageSize(8, 0), "api": "chat"}, "image.height must be at least 1", "image.height = 0"),
        ({"input_tokens": None}, "a workload needs exactly one of input_tokens and prompts", "neither"),
        ({"prompts": ("Why?",)}, "a workload needs exactly one of input_tokens and prompts", "both"),
        ({"input_tokens": None, "prompts": ("Why?", "")}, "each of the prompts must be a text", "prompt 2 of 2"),
        (
            {"goodput": {"itl": 5.0}},
            "a limit of goodput is a number of ms above 0, of one of ttft, tpot",
            "itl = 5.0",
        ),
        ({"goodput": {"ttft": 0.0}}, "a limit of goodput is a number of ms above 0", "ttft = 0.0"),
        ({"requests": 1}, "a batch needs at least as many requests as are in flight at a time (2)", "requests = 1"),
        ({"batches": 0}, "batches must be at least 1", "batches = 0"),
        ({"warmup_requests": -2}, "warmup_requests must be at least 0", "warmup_requests = -2"),
    ],
)
def test_fields_that_do_not_fit_together_are_told(change: dict[str, Any], required: str, found: str) -> None:
    with pytest.raises(WorkloadError) as error:
        Workload(name="odd", **{**OWN, **change})

    first, second, third, fourth = str(error.value).splitlines()
    assert first.startswith(required)
    assert second.startswith(f"  found: {found}")
    assert third == "  in workload 'odd'"
    assert fourth.strip()


def test_own_workloads_are_found_beside_the_built_in_ones() -> None:
    own = {"mine": workload_from_mapping({**OWN, "name": "mine"})}

    assert find_workload("mine", own) is as_workload("mine", own) is own["mine"]
    assert find_workload("smoke", own).name == "smoke"
    with pytest.raises(WorkloadError, match=r"use one of: smoke, .*, mine; or describe your own"):
        find_workload("other", own)


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


PREFIX_RULE = "true where prompts may be answered from the prefix cache, else false"
RAMP_RULE = "allowed: strategy ('linear' or 'exponential'), start_rate and end_rate in requests per second, above 0"
EXTRA_LIMIT = "Additional properties are not allowed ('itl' was unexpected)"
GOODPUT_RULE = "limits in ms, above 0, of one or more of ttft, tpot and e2el"
SCHEMAS_RULE = "a list of JSON Schemas that the answers follow in turns"
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
            "unknown key 'output_len'; allowed: name, input_tokens, output_tokens, requests, concurrency, rate, "
            "burstiness, ramp_up, batches, warmup_requests, api, prompts, response_schemas, image, shares_prefix, "
            "goodput",
        ),
        ({"rate": 0}, "rate = 0; allowed: requests per second, above 0, or 'inf' for all at once"),
        ({"rate": "fast"}, "rate = 'fast'; allowed: requests per second, above 0, or 'inf' for all at once"),
        ({"api": "responses"}, "api = 'responses'; allowed: 'completions' or 'chat'"),
        ({"shares_prefix": 1}, f"shares_prefix = 1; allowed: {PREFIX_RULE}"),
        ({"ramp_up": {"strategy": "linear", "start_rate": 0, "end_rate": 2}}, f"ramp_up.start_rate = 0; {RAMP_RULE}"),
        (
            {"ramp_up": {"strategy": "linear", "start_rate": 1}},
            f"ramp_up: 'end_rate' is a required property; {RAMP_RULE}",
        ),
        ({"rate": 1, "ramp_up": FULL["ramp_up"]}, "only one of rate and ramp_up can be given"),
        ({"burstiness": 2}, "burstiness needs rate or ramp_up"),
        ({"prompts": ["Why?"]}, "exactly one of input_tokens and prompts is needed"),
        ({"image": {"width": 8, "height": 8}}, "image needs api = 'chat'"),
        ({"goodput": {"itl": 3}}, f"goodput: {EXTRA_LIMIT}; allowed: {GOODPUT_RULE}"),
        ({"response_schemas": [{"type": "text"}]}, f"response_schemas[0].type = 'text'; allowed: {SCHEMAS_RULE}"),
        ({"response_schemas": ["{}"]}, f"response_schemas[0] = '{{}}'; allowed: {SCHEMAS_RULE}"),
    ],
)
def test_wrong_keys_are_named_with_what_is_allowed(change: dict[str, object], found: str) -> None:
    with pytest.raises(WorkloadError) as error:
        workload_from_mapping({**OWN, **change})
    assert f"found: {found}\n" in str(error.value)


def test_missing_keys_and_several_complaints_are_all_told() -> None:
    with pytest.raises(WorkloadError) as error:
        workload_from_mapping({"concurrency": 0, "requests": 8})
    for complaint in ("concurrency = 0;", "exactly one of input_tokens and prompts", "no key 'output_tokens'"):
        assert complaint in str(error.value)
    assert "in workload 'custom'" in str(error.value)


def test_a_whole_number_may_be_written_as_a_float() -> None:
    assert repr(workload_from_mapping({**OWN, "requests": 8.0}).requests) == "8"


def test_a_concurrency_that_is_never_reached_is_refused() -> None:
    with pytest.raises(WorkloadError) as error:
        workload_from_mapping({**OWN, "concurrency": 9})
    assert "raise requests to 9, or lower concurrency to 8" in str(error.value)
