from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.options import OPTIONS, gpu_options
from pytest_gpulayout.settings import (
    RESERVED_ARGUMENTS,
    check_model,
    is_ci,
    marker_arguments,
    parse_vllm_arguments,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize(
    "model", ["Qwen/Qwen3-8B", "gpt2", "org/model.with.dots", "x" * 300, pytest.param("org/" + "x" * 300, id="long")]
)
def test_hub_ids_are_left_to_vllm(folder: Path, model: str) -> None:
    assert check_model(model) == model


@pytest.mark.parametrize(
    ("model", "path"),
    [("full", "full"), ("./full", "full"), ("full/", "full"), ("~/full", "{}/full"), ("{}/full", "{}/full")],
)
def test_folders_are_checked(folder: Path, model: str, path: str) -> None:
    assert check_model(model.format(folder)) == path.format(folder)


@pytest.mark.parametrize(
    ("model", "found", "place"),
    [
        ("./missing", "a model folder was required, found nothing", "{}/missing"),
        ("/missing/model", "a model folder was required, found nothing", "/missing/model"),
        ("org/model/extra", "a model folder was required, found nothing", "{}/org/model/extra"),
        ("~nobody-here/model", "a model folder was required, found nothing", "{}/~nobody-here/model"),
        ("file", "a model folder was required, found a file", "{}/file"),
        ("empty", "a model folder with a config.json was required, found none", "{}/empty"),
    ],
)
def test_wrong_folders_are_told_with_their_place(folder: Path, model: str, found: str, place: str) -> None:
    with pytest.raises(ValueError, match=r"^a model folder") as error:
        check_model(model)
    first, second, third = str(error.value).split("\n")
    assert first == found
    assert second.split(maxsplit=1)[1] == place.format(folder)
    assert third.startswith("  name ")


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", ()),
        ("--enforce-eager", ("--enforce-eager",)),
        ("--max-model-len 2048 --dtype=half", ("--max-model-len", "2048", "--dtype=half")),
        ("--hf-overrides '{\"a\": 1}'", ("--hf-overrides", '{"a": 1}')),
        ("--max-num-seqs 8 --model-impl auto", ("--max-num-seqs", "8", "--model-impl", "auto")),
        ("--data-parallel-size-local 1", ("--data-parallel-size-local", "1")),
    ],
)
def test_arguments_are_split_as_a_shell_would(text: str, arguments: tuple[str, ...]) -> None:
    assert parse_vllm_arguments(text) == arguments


@pytest.mark.parametrize("name", RESERVED_ARGUMENTS)
def test_arguments_that_the_plugin_sets_are_refused(name: str) -> None:
    for text in (f"{name} 2", f"--enforce-eager {name}=2"):
        with pytest.raises(ValueError, match=f"^{name} is set by pytest-gpulayout; use ") as error:
            parse_vllm_arguments(text)
        assert str(error.value).endswith(f"; use {RESERVED_ARGUMENTS[name]}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("--tensor_parallel_size 4", "--tensor-parallel-size is set by pytest-gpulayout; use --gpu-layout"),
        ("--tensor-par 4", "--tensor-par is set by pytest-gpulayout; use --gpu-layout"),
        ("--api_key=x", "--api-key is set by pytest-gpulayout; use nothing: a random key is made for each server"),
        ("--dtype 'half", "No closing quotation"),
    ],
)
def test_other_spellings_are_refused_as_well(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        parse_vllm_arguments(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ()),
        ({"max_num_seqs": 8}, ("--max-num-seqs", "8")),
        ({"enforce_eager": True}, ("--enforce-eager",)),
        ({"enable_prefix_caching": False}, ("--no-enable-prefix-caching",)),
        ({"dtype": "half", "swap_space": 0.5}, ("--dtype", "half", "--swap-space", "0.5")),
        ({"lora_modules": ["a=x y", "b=z"]}, ("--lora-modules", "a=x y", "b=z")),
        ({"hf_overrides": {"a": [1, None]}}, ("--hf-overrides", '{"a": [1, null]}')),
        ({"chat_template": 'it\'s {{ "x" }}'}, ("--chat-template", 'it\'s {{ "x" }}')),
    ],
)
def test_keywords_of_a_marker_become_arguments(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    assert marker_arguments(arguments) == words


@pytest.mark.parametrize("name", ["tensor_parallel_size", "port", "api_key"])
def test_a_marker_cannot_set_what_the_plugin_sets(name: str) -> None:
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} is set by pytest-gpulayout"):
        marker_arguments({name: 2})


def test_options_and_ini_keys_go_together() -> None:
    for option in OPTIONS:
        assert option.flag == f"--gpu-{option.name}"
        assert option.ini == option.dest == f"gpulayout_{option.name.replace('-', '_')}"
        assert option.help[0].islower()
        assert not option.choices or option.ini_default in option.choices


def test_our_options_of_a_command_line_as_one_word_each() -> None:
    arguments = ["-x", "--gpu-layout", "tp2", "tests", "--gpu-vllm-args=--seed 7", "-k", "--gpu"]
    assert gpu_options(arguments) == ["--gpu-layout=tp2", "--gpu-vllm-args=--seed 7"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        *[({"CI": value}, True) for value in ("true", "1", "yes", "True", "woodpecker")],
        *[({"CI": value}, False) for value in ("", " ", "0", "false", "FALSE", "no")],
        ({}, False),
        ({"GITHUB_ACTIONS": "true"}, False),
    ],
)
def test_ci_is_known_by_one_variable(environment: dict[str, str], expected: bool) -> None:
    assert is_ci(environment) is expected
