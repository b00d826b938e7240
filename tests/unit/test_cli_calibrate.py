"""``gpulayout baseline calibrate``: studies stored sessions, or measures them through pytest in a child process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.baseline import Baseline, LevelStart
from pytest_gpulayout.baseline_text import baseline_to_text
from pytest_gpulayout.cli import main
from pytest_gpulayout.report import performance_record, results_document
from pytest_gpulayout.verdict import Status, Verdict
from tests.support.command_line import Ran, Run
from tests.support.measurements import baseline_of, key, measurement_of, session_of

CONFTEST = """
from pathlib import Path
from pytest_gpulayout.testing import *

def pytest_gpulayout_topology_source(settings, layout):
    return FakeTopologySource(platform=settings.platform)

def pytest_gpulayout_server_launcher(settings, log_dir):
    return FakeServerLauncher(log_dir, on_event=note)

def note(event, spec):
    with Path(__file__).with_name("events.txt").open("a") as file:
        file.write(event + "\\n")

def pytest_gpulayout_load_driver(settings):
    return FakeLoadDriver(noise=0.01, seed=Path(__file__).with_name("events.txt").stat().st_size)
"""
GATE = "def test_speed(measure, perf_gate):\n    perf_gate(measure())\n"
FACTORS = [(1 + n / 500, 1.0 - n / 700) for n in range(9)]


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def results(*sessions: tuple[float, ...], status: Status = Status.NO_BASELINE, reasons: tuple[str, ...] = ()) -> str:
    records = [
        (f"t.py::test_{n}", performance_record(Verdict(status, reasons=reasons), measurement_of(*factors)))
        for n, factors in enumerate(sessions)
    ]
    return json.dumps(results_document(records, created="2026-11-21", platform="cuda", version="0.1.0"))


def calibrate(run: Run, *words: str) -> Ran:
    return run("baseline", "calibrate", "--resamples", "40", *words)


# -- sessions that are stored --------------------------------------------------------------------------------------


def test_the_first_line_says_what_the_machine_sees(run: Run) -> None:
    ran = calibrate(run, "--from", write("b.json", baseline_to_text(baseline_of(*FACTORS))))
    first, second, third = ran.out.splitlines()[:3]
    assert (ran.code, ran.err) == (0, "")
    assert first.startswith("with 3 starts per gate and 8 stored sessions this machine sees changes of ")
    assert "; your margins need " in first
    assert second == f"of {key().path}"
    assert third == "from 9 sessions of 2 starts, nothing changed between them"


def test_the_document_is_the_same_with_the_same_seed(run: Run) -> None:
    source = write("b.json", baseline_to_text(baseline_of(*FACTORS)))
    first, again = (calibrate(run, "--from", source, "--json", "--gate-starts", "2").document for _ in range(2))
    (study,) = first["studies"]
    assert first == again
    assert study["path"] == key().path
    assert study["gate_starts"] == 2
    assert study["metrics"]["median_tpot_ms"]["tolerance"] == 0.05
    assert study["same_against_same"]["resamples"] == 40


def test_results_and_baselines_are_pooled_and_equal_sessions_count_once(run: Run) -> None:
    stored = write("b.json", baseline_to_text(baseline_of(*FACTORS[:3])))
    measured = write("r.json", results(*FACTORS[3:6]))
    ran = calibrate(run, "--from", stored, measured, measured, "--json")
    (study,) = ran.document["studies"]
    assert study["starts_of_sessions"] == [2] * 6
    assert ran.err.count("a session of r.json is the same as one before: counted once") == 3


def test_sessions_of_another_level_are_left_out_and_named(run: Run) -> None:
    accepted = replace(session_of(1.5, 1.51), begins=LevelStart("slower kernel"))
    sessions = (session_of(1.0, 1.01), session_of(1.01, 1.0), accepted, session_of(1.52, 1.5))
    ran = calibrate(run, "--from", write("b.json", baseline_to_text(Baseline(key(), sessions))), "--json")
    assert ran.document["studies"][0]["starts_of_sessions"] == [2, 2]
    assert "2 sessions of b.json are of another level or epoch, or older: left out" in ran.err


def test_each_key_is_studied_by_itself(run: Run) -> None:
    one = write("a.json", baseline_to_text(baseline_of(*FACTORS[:2])))
    other = write("b.json", baseline_to_text(baseline_of(*FACTORS[:3], layout="tp4")))
    ran = calibrate(run, "--from", one, other)
    assert [line for line in ran.out.splitlines() if line.startswith("of ")] == [
        f"of {key().path}",
        f"of {key(layout='tp4').path}",
    ]


def test_too_many_false_alarms_fail(run: Run) -> None:
    """A tenth of the sessions is far off; those stored often hold none of them, and are too alike to expect that."""
    factors = [(1.0 + n / 3000, 1.0 - n / 3000) for n in range(72)] + [(1.5 + n / 100, 1.5) for n in range(8)]
    ran = run("baseline", "calibrate", "--resamples", "400", "--from", write("r.json", results(*factors)))
    assert ran.code == 1
    assert "more than the 1% that the gate allows itself" in ran.out


def test_unsound_results_are_refused(run: Run) -> None:
    source = write("r.json", results((1.0,), status=Status.INVALID, reasons=("foreign-process: python train.py",)))
    ran = calibrate(run, "--from", source)
    assert ran.code == 2
    assert "sound measurements were required, found one that is invalid:\n    foreign-process" in ran.err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "a results file was required"),
        ("no JSON", "a results file was required"),
        ('{"sessions": []}', "a baseline document was required"),
        (results(), "at least one measurement was required, found none\n  in f.json"),
    ],
)
def test_what_cannot_be_studied(run: Run, text: str, told: str) -> None:
    ran = calibrate(run, "--from", write("f.json", text))
    assert ran.code == 2
    assert told in ran.err


def test_bytes_and_missing_files(run: Run) -> None:
    Path("f.json").write_bytes(b"\xff")
    assert "found bytes that are no UTF-8" in calibrate(run, "--from", "f.json").err
    assert calibrate(run, "--from", "missing.json").code == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--from f.json --save g.json", "either sessions to study or arguments for pytest were required, found both"),
        ("--from f.json -- --gpu-layout=tp2", "leave out --from to measure"),
        ("--sessions 0", "a whole number above 0 was expected, found '0'"),
        ("--gate-starts 11", "at most 10 starts were expected, found 11"),
        ("--tolerance x=5%", "tolerance: unknown metric 'x'"),
        ("-- --gpu-starts=5 --gpu-layout=tp2", "found: --gpu-starts=5\n"),
        ("-- --gpu-baseline new", "found: --gpu-baseline=new\n"),
        ("-- --gpu-base=.venv/bin/python", "found: --gpu-base=.venv/bin/python\n"),
        ("--save nowhere/f.json -- --gpu-layout=tp2", "a file that can be written was required for the sessions"),
    ],
)
def test_misuse(run: Run, words: str, told: str) -> None:
    ran = calibrate(run, *words.split())
    assert ran.code == 2
    assert told in ran.err


# -- sessions that are measured ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a test and fakes."""
    monkeypatch.chdir(tmp_path)
    write("conftest.py", CONFTEST)
    write("test_speed.py", GATE)
    write("events.txt", "")
    return tmp_path


@pytest.fixture
def gate(run: Run, folder: Path) -> Run:
    """The command in that folder."""
    return run


@pytest.mark.end_to_end
def test_measures_as_many_sessions_of_as_many_starts_and_leaves_only_what_was_asked_for(
    gate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "1")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    before = {path.name for path in tmp_path.iterdir()}
    words = ["--sessions", "2", "--starts", "3", "--save", "s.json", "--", "--gpu-layout=tp2", "--gpu-model=m"]
    ran = calibrate(gate, "--json", *words, "test_speed.py")

    assert ran.code == 0, ran.err
    (study,) = ran.document["studies"]
    assert study["starts_of_sessions"] == [3, 3]
    assert Path("events.txt").read_text().split().count("start") == 6
    assert "gpulayout: session 2 of 2: pytest " in ran.err
    assert {path.name for path in tmp_path.iterdir()} - before - {"__pycache__"} == {"s.json"}
    assert list(temporary.iterdir()) == []
    again = calibrate(gate, "--from", "s.json", "--json").document
    assert again["studies"] == ran.document["studies"]


@pytest.mark.end_to_end
def test_the_built_in_speed_gate_runs_alone_without_a_test_file(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--sessions", "1", "--starts", "1", "--", "-p", "conftest", "--gpu-layout=tp2", "--gpu-model", "m"]
    code = main(["baseline", "calibrate", *words])
    printed = capfd.readouterr()
    assert code == 0, printed.err
    assert Path("events.txt").read_text().split().count("start") == 1
    assert "collected 1 item" in printed.err
    assert "from 1 session of 1 start" in printed.out


@pytest.mark.end_to_end
def test_a_session_that_fails_ends_it_with_pytest_s_own_message(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write("test_speed.py", "def test_speed():\n    assert 1 == 2, 'out of tune'\n")
    assert main(["baseline", "calibrate", "--save", "s.json", "--", "--gpu-layout=tp2", "test_speed.py"]) == 2
    errors = capfd.readouterr().err
    assert "session 1 was required to measure\n  found: pytest ended with exit code 1" in errors
    assert "out of tune" in errors
    assert not Path("s.json").exists()


@pytest.mark.end_to_end
def test_sessions_before_one_that_fails_are_kept(gate: Run) -> None:
    test = GATE + "    from pathlib import Path\n    assert Path('events.txt').read_text().count('start') < 2\n"
    write("test_speed.py", test)
    words = ["--starts", "1", "--save", "s.json", "--", "--gpu-layout=tp2", "--gpu-model=m", "test_speed.py"]
    ran = calibrate(gate, *words)
    assert ran.code == 2
    assert "session 2 was required to measure" in ran.err
    assert calibrate(gate, "--from", "s.json", "--json").document["studies"][0]["starts_of_sessions"] == [1]


@pytest.mark.end_to_end
def test_a_test_that_measures_nothing_is_no_calibration(gate: Run) -> None:
    write("test_speed.py", "def test_speed():\n    pass\n")
    ran = calibrate(gate, "--sessions", "1", "--", "--gpu-layout=tp2", "test_speed.py")
    assert ran.code == 2
    assert "at least one measurement was required, found none\n  in the results of pytest" in ran.err


@pytest.mark.end_to_end
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_child_in_order(tmp_path: Path, number: int) -> None:
    """The child notes that it was interrupted once, and tidied up; the command waits for it."""
    (tmp_path / "conftest.py").write_text(
        "import pathlib, pytest\n"
        "@pytest.fixture\n"
        "def server():\n"
        "    pathlib.Path('up').touch()\n"
        "    yield\n"
        "    pathlib.Path('down').touch()\n"
    )
    (tmp_path / "test_it.py").write_text("import signal\ndef test_it(server):\n    signal.sigtimedwait([], 60)\n")
    words = [sys.executable, "-m", "pytest_gpulayout", "baseline", "calibrate", "--", "test_it.py"]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, env=_environment(tmp_path)) as command:
        deadline = time.monotonic() + 60
        while not (tmp_path / "up").exists() and time.monotonic() < deadline:
            assert command.poll() is None, command.communicate()
            time.sleep(0.05)
        command.send_signal(number)
        _, errors = command.communicate(timeout=30)
    assert command.returncode == 130
    assert (tmp_path / "down").exists(), errors.decode()
    assert not list((tmp_path / "tmp").iterdir())


def _environment(folder: Path) -> dict[str, Any]:
    (folder / "tmp").mkdir()
    return {**os.environ, "TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(Path(__file__).parents[2])}
