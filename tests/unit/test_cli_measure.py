"""``gpulayout measure`` on a scripted server: real sockets, no vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.cli_measure import stderr_progress
from pytest_gpulayout.metrics import METRICS
from tests.support.command_line import Run
from tests.support.stream_server import Reply, StreamServer

pytestmark = pytest.mark.end_to_end

SIZES = ["--input-tokens", "20", "--output-tokens", "3"]
LOAD = ["--model", "m", "--no-calibration", *SIZES, "--requests", "8", "--concurrency", "2", "--batches", "2"]
NOWHERE = "http://127.0.0.1:1"
SLOW = Reply(ttft_s=0.005, itl_s=0.002)


def test_the_document_has_vllm_s_keys_and_is_saved(run: Run) -> None:
    with StreamServer(SLOW) as server:
        ran = run("measure", "--url", server.url + "/v1/", *LOAD, "--save", "result.json", "--json")
    assert (ran.code, ran.err) == (0, "")
    document = ran.document
    assert json.loads(Path("result.json").read_text()) == document
    assert (document["completed"], document["failed"], document["max_concurrency"]) == (16, 0, 2)
    assert document["gpulayout"]["workload"]["name"].startswith("custom-")
    assert document["gpulayout"]["problems"] == []
    assert document["median_ttft_ms"] > 0


def test_text_has_the_load_every_metric_and_the_client(run: Run) -> None:
    with StreamServer(SLOW) as server:
        ran = run("measure", "--url", server.url, *LOAD)
    lines = ran.out.splitlines()
    assert ran.code == 0
    assert lines[:2] == [f"m at {server.url}", "16 requests, 2 at a time, 20 tokens in, 3 out"]
    assert lines[2].split() == ["metric", "median", "of", "batches", "lowest", "highest"]
    shown = [line.split()[0] for line in lines[3:] if line.split()[0] in METRICS]
    assert {"median_ttft_ms", "median_tpot_ms", "request_throughput"} <= set(shown)
    assert any(line.startswith("client: ") and "us CPU per event" in line for line in lines)


def test_open_arrivals_keep_their_timetable_in_the_result(run: Run) -> None:
    load = ["--model", "m", "--no-calibration", *SIZES, "--requests", "8", "--rate", "400", "--seed", "7"]
    with StreamServer(SLOW) as server:
        ran = run("measure", "--url", server.url, *load, "--burstiness", "0.5", "--json")
    document = ran.document
    assert (document["request_rate"], document["burstiness"], document["max_concurrency"]) == (400, 0.5, None)
    (offsets,) = document["gpulayout"]["schedule_ns"]
    assert len(offsets) == 8
    assert offsets[0] == 0
    assert offsets == sorted(offsets)


def test_options_override_a_named_workload_which_then_loses_its_name(run: Run) -> None:
    Path("mine.json").write_text(json.dumps({"name": "mine", **_sizes(requests=8, concurrency=2, batches=1)}))
    base = ["measure", "--model", "m", "--no-calibration", "--workload", "mine.json", "--json"]
    with StreamServer(SLOW) as server:
        named = run(*base, "--url", server.url).document
        changed = run(*base, "--url", server.url, "--concurrency", "4").document
    assert (named["gpulayout"]["workload"]["name"], named["max_concurrency"]) == ("mine", 2)
    assert (changed["max_concurrency"], changed["completed"]) == (4, 8)
    assert changed["gpulayout"]["workload"]["name"].startswith("custom-")


def _sizes(**more: int) -> dict[str, Any]:
    return {"input_tokens": 20, "output_tokens": 3, **more}


def test_a_sweep_finds_the_knee(run: Run) -> None:
    with StreamServer(SLOW) as server:
        load = [*LOAD[:3], *SIZES, "--requests", "8", "--sweep", "--sweep-to", "2"]
        text = run("measure", "--url", server.url, *load)
        document = run("measure", "--url", server.url, *load, "--json").document
    assert "knee: " in text.out
    assert [point["load"] for point in document["points"]] == [1, 2]
    assert document["points"][1]["max_concurrency"] == 2
    assert document["knee"]["load"] in (1, 2)


def test_a_stored_result_is_printed(run: Run) -> None:
    with StreamServer(SLOW) as server:
        run("measure", "--url", server.url, *LOAD, "--save", "result.json")
    ran = run("measure", "--from", "result.json")
    assert ran.code == 0
    assert "ttft" in ran.out
    Path("other.json").write_text("{}")
    assert run("measure", "--from", "other.json").code == 2


def test_help_says_what_each_metric_means_here_and_elsewhere(run: Run) -> None:
    ran = run("measure", "--help")
    assert ran.code == 0
    assert "  median_ttft_ms           ms, lower is better: TTFT, median over a batch: time from the first" in ran.out
    assert "    GuideLLM: (last - first token) / (tokens - 1): our TPOT" in ran.out


def test_the_key_comes_from_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sekret")
    with StreamServer(SLOW, api_key="sekret") as server:
        assert run("measure", "--url", server.url, *LOAD, "--api-key-env", "MY_KEY").code == 0
        refused = run("measure", "--url", server.url, *LOAD)
    assert refused.code == 2
    assert "sekret" not in refused.err
    monkeypatch.delenv("MY_KEY")
    missing = run("measure", "--url", server.url, *LOAD, "--api-key-env", "MY_KEY")
    assert missing.code == 2
    assert "required in the environment variable MY_KEY, found none\n  in --api-key-env=MY_KEY\n" in missing.err


def test_failed_requests_make_it_invalid(run: Run) -> None:
    with StreamServer(lambda number: Reply(error_after=1) if number == 5 else SLOW) as server:
        ran = run("measure", "--url", server.url, *LOAD)
    assert ran.code == 1
    assert "invalid: failed-requests: 1 of 16 requests failed" in ran.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--url", NOWHERE], "a server that takes connections is needed"),
        (["--url", NOWHERE, "--concurrency", "9"], "found: requests = 8"),
        (["--url", NOWHERE, "--save", "no/such/folder.json"], "found no/such/folder.json\n  in --save"),
        (["--url", NOWHERE, "--save", "."], "found .\n  in --save"),
        ([], "a server and its model are required, found no --url"),
        (["--url", NOWHERE, "--workload", "nonsense"], "found: 'nonsense'"),
        (["--url", NOWHERE, "--requests", "0"], "a whole number above 0 was expected, found '0'"),
        (["--url", NOWHERE, "--rate", "0"], "a number above 0 (or inf) was expected, found '0'"),
        (["--url", NOWHERE, "--ramp-up", "steep:1:2"], "linear:R1:R2 or exponential:R1:R2 was expected"),
        (["--url", NOWHERE, "--goodput", "speed:20"], "speed"),
        (["--from", "missing.json"], "missing.json"),
    ],
)
def test_wrong_use_is_exit_code_2(run: Run, arguments: list[str], told: str) -> None:
    ran = run("measure", *LOAD, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err


def test_a_load_must_be_described(run: Run) -> None:
    ran = run("measure", "--url", NOWHERE, "--model", "m")
    assert ran.code == 2
    for key in ("requests", "output_tokens"):
        assert key in ran.err


def test_ctrl_c_ends_it_and_saves_nothing(tmp_path: Path) -> None:
    with StreamServer(Reply(stall_after=1)) as server:
        command = [sys.executable, "-m", "pytest_gpulayout", "measure", "--url", server.url, *LOAD]
        with subprocess.Popen(
            [*command, "--warmup-requests", "2", "--save", "r.json"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
        ) as process:
            while not server.bodies:
                os.sched_yield()
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
    assert not list(tmp_path.iterdir())


def test_progress_without_a_terminal_is_a_line_every_30_s(capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    tell = stderr_progress(lambda: now)
    for now in range(100, 165):
        tell(f"at {now}")
    assert capsys.readouterr().err.splitlines() == ["at 130", "at 160"]
