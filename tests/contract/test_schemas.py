"""Every document we write follows its published schema, and the schemas are schemas."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from importlib.resources import files
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from pytest_gpulayout.baseline import Baseline, BaselineKey, BaselineRun, BaselineSession, LevelStart
from pytest_gpulayout.baseline_text import SCHEMA_VERSION, baseline_from_text, baseline_to_text
from pytest_gpulayout.gate import PlacedLayout
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_requirement
from pytest_gpulayout.measurement import Identity, Measurement
from pytest_gpulayout.nccl_log import parse_nccl_log
from pytest_gpulayout.ports import Endpoint
from pytest_gpulayout.report import performance_record, results_document, topology_record, transport_record
from pytest_gpulayout.schemas import load_schema, validate
from pytest_gpulayout.testing import FakeLoadDriver, FakeTopologySource
from pytest_gpulayout.topology_document import topology_from_document, topology_to_document
from pytest_gpulayout.transport_nccl import judge_nccl
from pytest_gpulayout.verdict import Status, Verdict
from pytest_gpulayout.workload import BUILTIN_WORKLOADS, workload_from_mapping

NAMES = sorted(
    entry.name.removesuffix(".schema.json")
    for entry in files("pytest_gpulayout.schemas").iterdir()
    if entry.name.endswith(".schema.json")
)
TP2 = parse_layout("tp2")


def measurement() -> Measurement:
    workload = BUILTIN_WORKLOADS["smoke"]
    key = BaselineKey(
        model={"name": "org/tiny", "revision": "0123abc", "dtype": "bfloat16", "arguments": ""},
        layout="tp2",
        hardware={
            "platform": "cuda",
            "device": "NVIDIA H200",
            "count": 2,
            "memory_gib": 141,
            "power_limit_w": 700,
            "links": ["NV18"],
        },
        workload={"name": workload.name, "fingerprint": workload.fingerprint()},
    )
    identity = Identity(key, {"driver": "580.65.06"}, {"vllm": "0.32.0", "arguments": ""}, {"host": "gpu-a1"})
    driver = FakeLoadDriver(noise=0.02)
    run = driver.run(Endpoint("http://127.0.0.1:9", "org/tiny"), workload, seed=1, progress=lambda text: None)
    return Measurement(identity, workload, (run, run))


def test_schemas_are_found() -> None:
    assert NAMES == ["baseline", "results", "topology", "workload"]


@pytest.mark.parametrize("name", NAMES)
def test_schema_is_valid_and_says_what_it_is(name: str) -> None:
    schema = load_schema(name)

    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert name in schema["$id"]
    assert schema["title"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("document", [[], {}, "text", None, 1])
def test_schema_refuses_what_is_no_document(name: str, document: Any) -> None:
    assert validate(document, name) != []


@pytest.mark.parametrize(
    "source",
    [
        FakeTopologySource(gpus=4, link="PIX", links={(0, 1): "NV4", (2, 3): None}),
        FakeTopologySource(gpus=1),
        FakeTopologySource(gpus=2, platform="cpu"),
    ],
    ids=["links", "one", "cpu"],
)
def test_topology_document(source: FakeTopologySource) -> None:
    topology = source.probe()

    document = json.loads(json.dumps(topology_to_document(topology, (0,))))

    assert validate(document, "topology") == []
    read = topology_from_document(document, "file.json")
    assert (read.devices, read.links, read.recorded) == (topology.devices, topology.links, True)


def test_baseline_document() -> None:
    taken = measurement()

    session = taken.as_session("2026-11-21T04:00:00Z")
    accepted = replace(
        session, begins=LevelStart("a larger context", ("median_tpot_ms 9.8 ms -> 11.9 ms",), "2026-12-31")
    )
    seen = tuple(replace(run, observed={"startup_s": 41.5}) for run in session.runs)

    text = baseline_to_text(Baseline(taken.identity.key, (session, accepted, replace(session, runs=seen))))

    assert validate(json.loads(text), "baseline") == []
    read = baseline_from_text(text, "file.json")
    assert read.key == taken.identity.key
    assert read.sessions[1].begins == accepted.begins
    assert read.sessions[2].runs == seen


def test_schema_of_baselines_is_of_the_version_that_is_written() -> None:
    assert load_schema("baseline")["properties"]["schema_version"] == {"const": SCHEMA_VERSION}


def test_every_field_of_a_baseline_is_in_its_schema() -> None:
    """No other field is allowed anywhere: one that was forgotten here could not be stored."""
    schema = load_schema("baseline")
    places = {name: schema["$defs"][name]["properties"] for name in ("session", "level_start", "run")}

    assert set(schema["properties"]["key"]["properties"]) == {field.name for field in fields(BaselineKey)}
    assert set(places["session"]) == {field.name for field in fields(BaselineSession)}
    assert set(places["level_start"]) == {field.name for field in fields(LevelStart)}
    assert set(places["run"]) == {field.name for field in fields(BaselineRun)}


def test_results_document() -> None:
    placed = PlacedLayout(TP2, FakeTopologySource().probe(), (0, 1), parse_requirement("nvlink"))
    report = judge_nccl(parse_nccl_log([], "nccl.log"), TP2)
    verdict = Verdict(Status.NO_BASELINE, reasons=("nothing stored",), stored="recorded", baseline_path="a.json")
    records = [topology_record(placed), transport_record(TP2, report, ()), performance_record(verdict, measurement())]

    document = results_document(
        [("test_it.py::test_it[tp2]", record) for record in records],
        created="2026-11-21T04:00:00Z",
        platform="cuda",
        version="0.1.0",
    )

    assert validate(json.loads(json.dumps(document)), "results") == []


@pytest.mark.parametrize("name", BUILTIN_WORKLOADS)
def test_workload_document(name: str) -> None:
    document = BUILTIN_WORKLOADS[name].to_document()

    assert validate(document, "workload") == []
    assert workload_from_mapping(document) == BUILTIN_WORKLOADS[name]
