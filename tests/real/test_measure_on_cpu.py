"""The load client against a real vLLM server (CPU build): both sides count alike, whatever is sent."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.adapters.cpu_host import CpuTopology
from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
from pytest_gpulayout.adapters.server_watch import ServerWatch
from pytest_gpulayout.adapters.vllm_process import VllmLauncher
from pytest_gpulayout.agreement import agreement
from pytest_gpulayout.cli import main
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.observing import Observer
from pytest_gpulayout.ports import Server, ServerSpec
from pytest_gpulayout.server_window import ttft_split
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.validity import find_problems
from pytest_gpulayout.workload import Workload, workload_from_mapping

pytestmark = pytest.mark.real_vllm

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
ARGUMENTS = ("--load-format", "dummy", "--enforce-eager", "--max-model-len", "2048")
COLOURS = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "template.jinja").write_text(TEMPLATE)
    spec = ServerSpec(
        layout=parse_layout("tp1"),
        model=str(tiny_model),
        arguments=(*ARGUMENTS, "--chat-template", str(folder / "template.jinja")),
        platform="cpu",
        devices=CpuTopology(1, None).probe().devices,
        python=sys.executable,
        start_timeout_s=600.0,
    )
    started = VllmLauncher(folder).launch(spec, lambda _text: None)
    yield started
    started.stop()


def measured(server: Server, **fields: Any) -> tuple[RunTrace, Workload]:
    base = {"name": "w", "input_tokens": 64, "output_tokens": 16, "requests": 16, "batches": 1}
    workload = workload_from_mapping({key: value for key, value in {**base, **fields}.items() if value is not None})
    assert server.log is not None
    logs = [server.log]
    observer = Observer(OpenAiStreamDriver(), watch_server=lambda *what: ServerWatch(*what, logs=logs))
    run = observer.run(server.endpoint, workload, seed=1, progress=lambda _text: None, server=server)
    assert [trace.error for trace in run.failed] == []
    return run, workload


def assert_both_sides_agree(run: RunTrace) -> None:
    window = run.observations.server
    assert window is not None
    assert window.settled
    assert agreement(run, window) == ()
    assert window.generation_tokens == sum(request.output_tokens for request in run.requests) > 0
    assert window.prompt_tokens == sum(request.prompt_tokens for request in run.requests) > 0


@pytest.mark.parametrize("concurrency", [1, 4, 16])
def test_closed_loops(server: Server, concurrency: int) -> None:
    run, _ = measured(server, concurrency=concurrency, requests=32)
    assert_both_sides_agree(run)
    window = run.observations.server
    assert window is not None
    assert window.prefix_reset == "done"
    assert window.prefix_hit_rate == 0
    split = ttft_split(run.requests)
    assert split is not None
    mean_ttft_ms = sum(request.ttft_ns for request in run.requests) / len(run.requests) / 1e6
    assert sum(split.values()) == pytest.approx(mean_ttft_ms)
    assert run.fingerprints == (server.proof.fingerprint,)
    assert all(sum(request.chunk_tokens or ()) == 16 for request in run.requests)  # a busy front end joins tokens


def test_open_arrivals(server: Server) -> None:
    run, _ = measured(server, rate=20.0, burstiness=0.5)
    assert_both_sides_agree(run)
    assert all(request.intended_ns is not None for request in run.requests)
    assert all(request.send_ns >= (request.intended_ns or 0) for request in run.requests)


def test_chat_prompts_have_the_length_that_was_asked_for(server: Server) -> None:
    run, _ = measured(server, api="chat", concurrency=2, input_tokens=150)
    assert_both_sides_agree(run)
    assert {request.prompt_tokens for request in run.requests} == {150}


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_answers_that_follow_a_schema(server: Server, api: str) -> None:
    run, _ = measured(server, api=api, concurrency=2, requests=4, response_schemas=[COLOURS], output_tokens=64)
    assert_both_sides_agree(run)
    for request in run.requests:
        assert 1 <= request.output_tokens <= 64
        if request.output_tokens < 64:
            assert json.loads(request.text)["colour"] in ("red", "blue")
        else:  # a model with random weights may fill its answer with the blanks that the grammar allows
            assert request.text.lstrip().startswith("{") or not request.text.strip()


def test_prompts_that_repeat_are_answered_by_the_prefix_cache_and_that_is_found(server: Server) -> None:
    texts = ["one and the same question, " * 8]
    run, workload = measured(server, prompts=texts, input_tokens=None, shares_prefix=True, concurrency=1)
    window = run.observations.server
    assert window is not None
    assert (window.prefix_hit_rate or 0) > 0.5
    assert [p.kind for p in find_problems(run, workload) if p.kind == "prefix-cache"] == []
    undeclared = replace(workload, shares_prefix=False)
    assert "prefix-cache" in [problem.kind for problem in find_problems(run, undeclared)]


def test_requests_of_somebody_else_in_the_window_are_found(server: Server) -> None:
    class Intruder(ServerWatch):
        def __exit__(self, *exc_info: object) -> None:
            OpenAiStreamDriver().run(server.endpoint, other, seed=2, progress=lambda _text: None)
            super().__exit__(*exc_info)

    other = Workload(name="o", input_tokens=8, output_tokens=4, concurrency=1, requests=1, batches=1)
    workload = replace(other, requests=8)
    observer = Observer(OpenAiStreamDriver(), watch_server=Intruder)
    run = observer.run(server.endpoint, workload, seed=1, progress=lambda _text: None)
    assert "token-counts" in [problem.kind for problem in find_problems(run, workload)]


def test_the_command_measures_and_saves(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KEY", server.endpoint.api_key or "")
    where = ["--url", server.endpoint.url, "--model", server.endpoint.model, "--api-key-env", "KEY"]
    load = ["--concurrency", "2", "--requests", "16", "--input-tokens", "64", "--output-tokens", "16"]
    main(["measure", *where, *load, "--json", "--save", str(tmp_path / "result.json")])
    document = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "result.json").read_text()) == document
    own = document["gpulayout"]
    assert own["client"]["calibration"]["streams"] == 2
    assert own["server"]["generation_tokens"] == document["total_output_tokens"] == 256
    assert own["telemetry"]["devices"][-1]["name"] == "CPU"
    assert "token-counts" not in [problem["kind"] for problem in own["problems"]]
