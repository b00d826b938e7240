"""Faults of a real vLLM: each ends with one message that names the cause, and with nothing left running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.real.conftest import Gate, make_model
from tests.support.processes import wait_until

pytestmark = [pytest.mark.real_vllm, pytest.mark.xdist_group("real vllm")]

BUILT_IN = ("--pyargs", "pytest_gpulayout.gates", "--gpu-layout=tp1", "--gpu-baseline=off")
MARKER = "GPULAYOUT_TEST_RUN"
SHARED_MEMORY = Path("/dev/shm")


def left_running(marker: str) -> list[psutil.Process]:
    """Processes that inherited the marker of a run, whatever they call themselves."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == marker and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def titles_below(pid: int) -> str:
    """What the processes that a process has started, and those that they have, call themselves."""
    titles = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            titles += child.cmdline()
    return " ".join(titles)


def wait_until_none_is_left(marker: str, timeout_s: float = 60) -> list[psutil.Process]:
    deadline = time.monotonic() + timeout_s
    while (left := left_running(marker)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def test_head_size_that_kills_the_engine_at_the_first_request(make_gate: Callable[..., Gate], tmp_path: Path) -> None:
    gate = make_gate(make_model(tmp_path / "head-16", heads=16))
    result = gate.run(*BUILT_IN, **{MARKER: "head16"})
    assert result.returncode == 1, result.stdout
    assert "vLLM loaded layout tp1 and then failed at the first request" in result.stdout
    assert "cause: RuntimeError: Unsupported CPU attention" in result.stdout or "head" in result.stdout
    assert not left_running("head16")


def test_engine_that_dies_at_start(make_gate: Callable[..., Gate]) -> None:
    result = make_gate().run(
        *BUILT_IN, "--gpu-vllm-args=--load-format dummy --max-model-len 100000", **{MARKER: "start"}
    )
    assert result.returncode == 1, result.stdout
    assert "vLLM did not start layout tp1 (exit code 1)" in result.stdout
    assert "max_model_len (100000)" in result.stdout
    assert result.stdout.count("its last lines") == 1, "the long message is told once"
    assert not left_running("start")


def test_argument_that_vllm_does_not_know(make_gate: Callable[..., Gate]) -> None:
    result = make_gate().run(*BUILT_IN, "--gpu-vllm-args=--no-such-argument")
    assert result.returncode == 1, result.stdout
    assert "unrecognized arguments: --no-such-argument" in result.stdout


def test_layout_that_does_not_divide_the_heads(make_gate: Callable[..., Gate]) -> None:
    result = make_gate().run("--pyargs", "pytest_gpulayout.gates", "--gpu-layout=tp3", "-k", "layout")
    assert result.returncode == 1, result.stdout
    assert "3 ranks need at least 3 cores" in result.stdout or "divisible" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_end_of_pytest_while_the_server_loads(make_gate: Callable[..., Gate], number: signal.Signals) -> None:
    marker = f"load-{number.name}"
    segments = set(SHARED_MEMORY.iterdir())
    process = make_gate().start(*BUILT_IN, "-s", **{MARKER: marker})
    output = read_until(process, "vLLM is loading")
    wait_until(lambda: "EngineCore" in titles_below(process.pid), "an engine's process", timeout_s=60)
    assert len(left_running(marker)) > 2
    os.kill(process.pid, number)
    output += process.communicate(timeout=60)[0]
    if number is signal.SIGINT:
        assert process.returncode == 2, output
        assert "interrupted while the server of layout tp1 was loading; it was stopped" in output
    left = wait_until_none_is_left(marker)
    assert not left, [" ".join(process.cmdline()) for process in left]
    assert set(SHARED_MEMORY.iterdir()) <= segments


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}")
