"""Workloads in files: TOML, JSON, pyproject.toml, and prompts beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pytest_gpulayout.adapters.workload_files import load_workload, project_workloads
from pytest_gpulayout.errors import WorkloadError
from pytest_gpulayout.workload import find_workload

LOAD = "input_tokens = 64\noutput_tokens = 32\nrequests = 8\n"
ONE = LOAD + "rate = inf\n"
PROMPTED = "output_tokens = 8\nrequests = 4\nconcurrency = 2\nprompts_file = {!r}\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def complaint(text: str, folder: Path) -> str:
    with pytest.raises(WorkloadError) as error:
        load_workload(text, folder=folder)
    return str(error.value)


def test_names_are_built_in_or_of_the_project(tmp_path: Path) -> None:
    assert load_workload("smoke", folder=tmp_path) is find_workload("smoke")

    write(tmp_path / "pyproject.toml", f"[tool.pytest-gpulayout.workloads.mine]\n{ONE}")
    mine = load_workload("mine", folder=tmp_path / "nowhere", project=tmp_path)

    assert (mine.name, mine.rate, mine.requests) == ("mine", math.inf, 8)
    assert project_workloads(tmp_path) == {"mine": mine}
    assert ", mine; or describe your own" in complaint("other", tmp_path)


@pytest.mark.parametrize("text", ["", "[tool.ruff]\nline-length = 90\n", "[tool.pytest-gpulayout]\n"])
def test_project_without_workloads_has_none(tmp_path: Path, text: str) -> None:
    assert project_workloads(tmp_path) == {}
    write(tmp_path / "pyproject.toml", text)
    assert project_workloads(tmp_path) == {}


def test_file_of_one_workload_is_named_for_the_file(tmp_path: Path) -> None:
    write(tmp_path / "sub/burst.toml", ONE)
    write(tmp_path / "named.json", json.dumps({**find_workload("random-300").to_document(), "name": "other"}))

    assert load_workload("sub/burst.toml", folder=tmp_path).name == "burst"
    assert load_workload(str(tmp_path / "sub/burst.toml"), folder=Path("/")).name == "burst"
    other = load_workload("named.json", folder=tmp_path)
    assert (other.name, other.fingerprint()) == ("other", find_workload("random-300").fingerprint())


def test_file_of_several_workloads_needs_a_name(tmp_path: Path) -> None:
    write(tmp_path / "all.toml", f"[one]\n{ONE}\n[two]\n{ONE}")
    write(tmp_path / "single.toml", f"[one]\n{ONE}")

    assert load_workload("all.toml#two", folder=tmp_path).name == "two"
    assert load_workload("single.toml", folder=tmp_path).name == "one"
    assert "use one of: all.toml#one, all.toml#two" in complaint("all.toml", tmp_path)
    assert "found: #three\n" in complaint("all.toml#three", tmp_path)


def test_pyproject_can_be_named_like_any_file(tmp_path: Path) -> None:
    write(tmp_path / "pyproject.toml", f"[project]\nname = 'x'\n[tool.pytest-gpulayout.workloads.mine]\n{ONE}")

    assert load_workload("pyproject.toml#mine", folder=tmp_path).name == "mine"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (LOAD, "one of concurrency, rate and ramp_up is needed"),
        (ONE + "speed = 3\n", "unknown key 'speed'; allowed: name, "),
        ("output_tokens = \n", "(at line 1, column 17)"),
        ("[a]\nb = 1\n", "in workload 'a'"),
        ("[a]\nname = 'b'\n" + ONE, "name = 'b' in the table 'a'"),
        ("[smoke]\n" + ONE, "'smoke', which is built in"),
        ("", "found: no name, and no workloads"),
    ],
)
def test_wrong_file_is_told_with_its_path(tmp_path: Path, text: str, found: str) -> None:
    write(tmp_path / "own.toml", text)

    message = complaint("own.toml", tmp_path)

    assert found in message
    assert str(tmp_path / "own.toml") in message


@pytest.mark.parametrize(
    ("text", "found"),
    [("[1, 2]", "a list"), ("{", "Expecting property name"), ('{"a": 1', "Expecting ',' delimiter")],
)
def test_wrong_json_is_told(tmp_path: Path, text: str, found: str) -> None:
    write(tmp_path / "own.json", text)

    assert f"found: {found}" in complaint("own.json", tmp_path)


def test_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    assert "found: No such file or directory" in complaint("missing.toml", tmp_path)
    (tmp_path / "folder.toml").mkdir()
    assert "found: Is a directory" in complaint("folder.toml", tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    assert "codec can't decode" in complaint("latin.toml", tmp_path)


def test_name_of_a_single_workload_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "own.toml", ONE)
    assert "found: one without a name, #x was asked for" in complaint("own.toml#x", tmp_path)


def test_tables_of_the_project_must_be_tables(tmp_path: Path) -> None:
    write(tmp_path / "pyproject.toml", "[tool.pytest-gpulayout]\nworkloads = 3\n")
    assert "found: workloads = 3" in complaint("smoke", tmp_path)
    write(tmp_path / "pyproject.toml", "[tool.pytest-gpulayout.workloads]\nmine = 3\n")
    assert "found: mine = 3" in complaint("smoke", tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("texts/a.txt", "Why not?\n\n  How?\r\n"),
        ("texts/a.jsonl", '{"prompt": "Why not?", "id": 7}\n\n{"prompt": "  How?"}\n'),
        ("texts/b.jsonl", '\ufeff{"prompt": "Why not?"}\n{"prompt": "  How?"}'),
    ],
)
def test_prompts_lie_beside_the_file(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path / "sub/own.toml", PROMPTED.format(name))
    write(tmp_path / "sub" / name, text)

    assert load_workload("sub/own.toml", folder=tmp_path).prompts == ("Why not?", "  How?")


def test_line_separators_inside_a_prompt_of_jsonl_are_part_of_it(tmp_path: Path) -> None:
    write(tmp_path / "own.toml", PROMPTED.format("a.jsonl"))
    write(tmp_path / "a.jsonl", '{"prompt": "Why\u2028not?"}\n')

    assert load_workload("own.toml", folder=tmp_path).prompts == ("Why\u2028not?",)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.txt", "\n \n", "no line that is not blank"),
        ("a.jsonl", '{"prompt": "x"}\nWhy?\n', "JSONDecodeError"),
        ("a.jsonl", '{"text": "x"}\n', "KeyError: 'prompt'"),
        ("a.jsonl", '["x"]\n', "TypeError"),
        ("a.jsonl", '{"prompt": 3}\n', "prompt = 3"),
        ("a.jsonl", '{"prompt": ""}\n', "prompt = ''"),
        ("missing.txt", None, "No such file or directory"),
    ],
)
def test_wrong_prompts_are_told(tmp_path: Path, name: str, text: str | None, found: str) -> None:
    write(tmp_path / "own.toml", PROMPTED.format(name))
    if text is not None:
        write(tmp_path / name, text)

    message = complaint("own.toml", tmp_path)

    assert f"found: {found}" in message
    assert str(tmp_path / name) in message


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "sub/../../secret.txt", "link.txt", ""])
def test_prompts_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "secret.txt", "secret\n")
    write(tmp_path / "inside/own.toml", PROMPTED.format(name))
    (tmp_path / "inside/link.txt").symlink_to(tmp_path / "secret.txt")

    message = complaint("inside/own.toml", tmp_path)

    assert f"found: prompts_file = {name!r}" in message


def test_prompts_and_a_file_of_prompts_are_one_too_many(tmp_path: Path) -> None:
    write(tmp_path / "own.toml", PROMPTED.format("a.txt") + "prompts = ['x']\n")
    write(tmp_path / "a.txt", "y\n")

    assert "found: both prompts and prompts_file" in complaint("own.toml", tmp_path)
