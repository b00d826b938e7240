from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.native.build import (
    DRIVER_NOT_LOADED,
    FakeGpu,
    FakeMachine,
    FakePair,
    build_fake_nvml,
    fake_nvml_environment,
)
from tests.support.command_line import Run
from tests.support.model_configs import FOLDER, config_of

H200S = """\
{"schema_version": 1, "gpus": [{"index": 0, "name": "NVIDIA H200"}, {"index": 1, "name": "NVIDIA H200"}],
 "links": [{"a": 0, "b": 1, "class": "NV18"}]}
"""
TEXT = "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tPHB\t0-7\t0\nGPU1\tPHB\t X \t0-7\t0\n"


def config(name: str) -> str:
    """Put a model's config into the current folder, and return its name there."""
    shutil.copy(FOLDER / f"{name}.json", "config.json")
    return "config.json"


def folder(name: str, total_size: object = None) -> str:
    """Put a model's folder into the current one, with an index where a size is given."""
    Path("model").mkdir()
    shutil.copy(FOLDER / f"{name}.json", "model/config.json")
    if total_size is not None:
        index = {"metadata": {"total_size": total_size}, "weight_map": {}}
        Path("model/model.safetensors.index.json").write_text(json.dumps(index))
    return "model"


def test_text_of_a_plan(run: Run) -> None:
    asked = "--layout tp1,tp4,tp1x4 --gpu H200:4 --link phb"
    ran = run("plan", "--model", config("qwen3-30b-a3b"), *asked.split())
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].endswith("bfloat16, 48 layers, in config.json")
    assert "4 x H200 (data sheet): 140.40 GiB, 4800 GB/s, 989 bf16, 1979 fp8 TFLOPS dense" in lines
    head = next(index for index, line in enumerate(lines) if line.startswith("layout "))
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == ["tp1", "tp4", "tp1x4"]
    assert any(line.startswith("    48 x all-reduce  ") for line in lines)


def test_json_of_a_plan(run: Run) -> None:
    asked = "--layout tp1 --layout tp2,tp1 --gpu h200:2 --json"
    ran = run("plan", "--model", config("qwen3-30b-a3b"), *asked.split())
    assert (ran.code, ran.err) == (0, "")
    document = ran.document
    assert [layout["layout"] for layout in document["layouts"] if layout["asked"]] == ["tp1", "tp2"]
    assert document["model"]["parameters"] == 30_532_122_624
    assert document["model"]["kv_bytes_per_token"] == 98_304
    assert document["machine"]["count"] == 2
    assert document["demand"] == {"input_tokens": 1000, "output_tokens": 500, "concurrency": 100}


def test_without_layouts_all_that_the_machine_could_have_are_planned(run: Run) -> None:
    ran = run("plan", "--model", config("qwen3-8b"), "--gpu", "L40S:2", "--json")
    assert [layout["layout"] for layout in ran.document["layouts"]] == ["tp1", "tp1x2", "pp2", "tp2"]
    assert not any(layout["asked"] for layout in ran.document["layouts"])


@pytest.mark.parametrize(
    ("total_size", "told"),
    [
        (61_064_245_248, "the index of the files says the same: 61064245248 bytes"),
        (61_064_245_248.0, "the index of the files says the same"),
        (61_000_000_000, "computed are 61064245248 (-64245248 bytes, -0.11%)"),
        (None, None),
    ],
)
def test_the_index_beside_a_config_is_compared(run: Run, total_size: object, told: str | None) -> None:
    ran = run("plan", "--model", folder("qwen3-30b-a3b", total_size), "--gpu", "H200", "--json")
    assert ran.code == 0
    assert (ran.document["model"]["index"] is None) is (told is None)
    assert (told or "") in (ran.document["model"]["index"] or "")


def test_a_recorded_topology(run: Run) -> None:
    Path("topo.json").write_text(H200S)
    ran = run("plan", "--model", config("qwen3-8b"), "--layout", "tp2", "--topology", "topo.json", "--json")
    assert (ran.code, ran.document["machine"]["gpu"], ran.document["machine"]["source"]) == (0, "H200", "topo.json")
    assert ran.document["layouts"][0]["links"] == {"tp": "NVLink x18"}


def test_a_listing_names_no_gpus(run: Run) -> None:
    Path("topo.txt").write_text(TEXT)
    arguments = ("plan", "--model", config("qwen3-8b"), "--layout", "tp2", "--topology", "topo.txt")
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "found no names\n  in topo.txt\n  say what they are: --gpu NAME" in ran.err
    ran = run(*arguments, "--gpu", "L40S", "--json")
    assert (ran.code, ran.document["layouts"][0]["links"]) == (0, {"tp": "PCIe 4 PHB, through host memory"})


@pytest.mark.parametrize(
    ("name", "arguments", "code", "told"),
    [
        ("llama-3.1-70b", "--layout tp1 --gpu H100:4", 1, "failed: tp1: does not fit: weights and reserve are "),
        ("llama-3.1-70b", "--layout tp1,tp4 --gpu H100:4", 0, ""),
        ("llama-3.1-70b", "--gpu H100", 1, "failed: tp1: does not fit: "),
        ("falcon-7b", "--layout tp2 --gpu H100:2", 1, "failed: tp2: 71 attention heads cannot be split over tp2\n"),
        ("llama-3.1-70b", "--layout tp1 --gpu H100 --reserve-gib 1 --gpu-memory-utilization 1", 1, "failed: tp1: "),
    ],
)
def test_what_does_not_fit_is_exit_code_1(run: Run, name: str, arguments: str, code: int, told: str) -> None:
    for more in ([], ["--json"]):
        ran = run("plan", "--model", config(name), *arguments.split(), *more)
        assert ran.code == code
        assert ran.err.startswith(told)
        assert bool(ran.err) is bool(told)
        assert ran.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--gpu H200", "the following arguments are required: --model"),
        ("--model missing.json --gpu H200", "a model's config was expected, found none: No such file or directory\n"),
        ("--model config.json --gpu H201", "a GPU whose data sheet is known was required, found 'H201'"),
        ("--model config.json --gpu H200:0", "a whole number above 0 was expected, found '0'"),
        ("--model config.json --gpu H200:9999", "at most 1024 GPUs were expected, found 9999"),
        ("--model config.json --gpu H200 --layout tp0", "layout: the number after 'tp' must be at least 1"),
        ("--model config.json --gpu H200 --layout tp1,", "layout: expected a factor"),
        ("--model config.json --gpu H200:2 --link nv", "link class: expected NV#, PIX"),
        ("--model config.json --gpu L40S:2 --link nvlink", "a GPU with NVLinks was required, L40S has none\n"),
        ("--model config.json --gpu H200 --concurrency 0", "a whole number above 0 was expected, found '0'"),
        ("--model config.json --gpu H200 --network socket:nan", "a number above 0 was expected, found 'nan'"),
        ("--model config.json --gpu H200 --network 25", "socket:GBIT or rdma:GBIT was expected, found '25'"),
        ("--model config.json --gpu H200 --gpu-memory-utilization 92", "a share of at most 1 was expected, found"),
        ("--model config.json --gpu H200 --all2all-backend naive", "one of allgather_reducescatter, deepep_high"),
        ("--model config.json --gpu H200:2 --topology topo.json", "one description of GPUs and links was required"),
        ("--model config.json --topology topo.json --link phb", "one description of GPUs and links was required"),
        ("--model config.json --topology missing.json", "a recorded topology was expected, found none"),
    ],
)
def test_misuse_is_exit_code_2(run: Run, arguments: str, told: str) -> None:
    config("qwen3-8b")
    Path("topo.json").write_text(H200S)
    ran = run("plan", *arguments.split())
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "a JSON document was expected, found: Expecting value"),
        (b"{", "a JSON document was expected, found: "),
        (b"[" * 100_000, "a JSON document was expected, found: "),
        (b"\xff\xfe{", "a model's config was expected, found bytes that are no UTF-8"),
        (b"[]", "a JSON object was expected, found list"),
        (b"{}", '"architectures" with the name of one model class was expected, found None'),
        (json.dumps(config_of("qwen3-8b", architectures=["RwkvForCausalLM"])).encode(), "found RwkvForCausalLM\n"),
        (
            json.dumps(config_of("qwen3-8b", quantization_config={"quant_method": "hqq"})).encode(),
            "quantisation: a known quantisation was required",
        ),
    ],
)
def test_configs_that_cannot_be_read(run: Run, text: bytes, told: str) -> None:
    Path("config.json").write_bytes(text)
    ran = run("plan", "--model", ".", "--gpu", "H200", "--json")
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err
    assert "  in config.json" in ran.err


@pytest.mark.parametrize("size", ["many", True, -1, 0, float("nan")])
def test_an_index_that_cannot_be_read(run: Run, size: Any) -> None:
    ran = run("plan", "--model", folder("qwen3-8b", size), "--gpu", "H200")
    assert (ran.code, ran.out) == (2, "")
    assert "a number of bytes was expected as total_size, found " in ran.err


@pytest.mark.parametrize("text", ["{}", "[]", '{"metadata": {}}', '{"metadata": null}'])
def test_an_index_that_says_nothing(run: Run, text: str) -> None:
    name = folder("qwen3-8b")
    Path(name, "model.safetensors.index.json").write_text(text)
    ran = run("plan", "--model", name, "--gpu", "H200", "--json")
    assert (ran.code, ran.document["model"]["index"]) == (0, None)


def test_options_reach_the_plan(run: Run) -> None:
    server = "--kv-cache-dtype fp8 --max-num-seqs 8 --max-num-batched-tokens 512 --gpu H100"
    demand = "--input-tokens 100 --output-tokens 20 --concurrency 50 --json"
    ran = run("plan", "--model", config("qwen3-8b"), *server.split(), *demand.split())
    document = ran.document
    assert document["model"]["kv_bytes_per_token"] == 147_456 // 2
    assert (document["machine"]["max_num_seqs"], document["machine"]["max_num_batched_tokens"]) == (8, 512)
    assert document["layouts"][0]["estimate"]["batch"] == 8
    assert document["layouts"][0]["kv_bytes_per_request"] == 120 * 147_456 // 2


@pytest.mark.parametrize(
    ("machine", "code", "told"),
    [
        (FakeMachine(gpus=[FakeGpu()] * 2, default_pair=FakePair(nvlinks=4)), 0, ""),
        (FakeMachine(gpus=[FakeGpu(name="NVIDIA Q100")]), 2, "found 'NVIDIA Q100'\n  known are: T4,"),
        (FakeMachine(init_error=DRIVER_NOT_LOADED), 2, "  or say what to plan for: --gpu NAME:COUNT, or --top"),
    ],
)
def test_without_gpus_by_name_nvml_is_asked(tmp_path: Path, machine: FakeMachine, code: int, told: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environ |= fake_nvml_environment(build_fake_nvml(tmp_path), machine, tmp_path)
    command = [sys.executable, "-m", "pytest_gpulayout", "plan", "--model", str(FOLDER / "qwen3-8b.json"), "--json"]
    done = subprocess.run([*command, "--layout", "tp2"], capture_output=True, text=True, timeout=60, env=environ)
    assert (done.returncode, told in done.stderr) == (code, True)
    if code == 0:
        document = json.loads(done.stdout)
        assert (document["machine"]["source"], document["machine"]["memory_bytes"]) == ("NVML", 85_520_809_984)
        assert document["layouts"][0]["links"] == {"tp": "NVLink x4"}
