from __future__ import annotations

import fcntl
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import termios
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.adapters import keeper as keeper_script
from pytest_gpulayout.adapters.keeper import KeeperConfig, descendants, mapped_segments
from tests.support.processes import FAKE_VLLM, ROOT, processes_marked, segments_of, wait_until

pytestmark = pytest.mark.end_to_end

# Scripts for `python -c`. They say "ready" in the log; the segment's name comes as the only argument.
WAIT = "import signal, sys, os, mmap, time; say = lambda text: print(text, flush=True)\n"
OBEDIENT = WAIT + "say('ready'); signal.pause()"
STUBBORN = WAIT + "signal.signal(signal.SIGTERM, signal.SIG_IGN); say('ready'); time.sleep(600)"
ENDS = WAIT + "say('ready'); sys.exit(7)"
LEAVES_ORPHANS = WAIT + "os.fork() or os.fork() or signal.pause(); say('ready')"
DAEMONISES = WAIT + (
    "if os.fork() == 0:\n"
    "    os.setsid()\n"
    "    if os.fork() == 0:\n"
    "        os.setsid(); os.chdir('/'); signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "        say(f'ready {os.getpid()}'); time.sleep(600)\n"
    "    os._exit(0)\n"
    "signal.pause()"
)
MAPS = WAIT + (
    "file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); os.ftruncate(file, 4096); page = mmap.mmap(file, 4096)\n"
    "say('ready'); signal.pause()"
)


class Keeping:
    """A keeper at work, as the launcher sees it."""

    def __init__(
        self, folder: Path, marker: str, script: str, *arguments: str, term_timeout_s: float, cpus: list[int]
    ) -> None:
        self.log = folder / "log"
        self.run_dir = folder / "run"
        self.lock = folder / "device.lock"
        self.run_dir.mkdir()
        self.lock.touch()
        config: KeeperConfig = {
            "command": [sys.executable, "-I", "-S", "-c", script, *arguments],
            "cpus": cpus,
            "log": str(self.log),
            "run_dir": str(self.run_dir),
            "locks": [str(self.lock)],
            "term_timeout_s": term_timeout_s,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(keeper_script.__file__), json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TEST_MARKER": marker},
        )
        wait_until(lambda: self.log.exists() and "ready" in self.log.read_text(), "the start of the server")

    def tell(self, command: str) -> None:
        """Write a command and return when the keeper has taken it."""
        assert self.process.stdin is not None
        self.process.stdin.write(command)
        self.process.stdin.flush()
        unread = bytearray(4)
        pipe = self.process.stdin.fileno()
        wait_until(
            lambda: fcntl.ioctl(pipe, termios.FIONREAD, unread) == 0 and not any(unread), "the keeper's reading"
        )

    def answers(self, command: str = "") -> dict[str, Any]:
        """Write a command, close the input, and return all that the keeper said."""
        output, _ = self.process.communicate(command, timeout=15)
        merged: dict[str, Any] = {}
        for line in output.splitlines():
            merged |= json.loads(line)
        return merged


Keep = Callable[..., Keeping]


@pytest.fixture
def marker() -> str:
    return f"keeper-{uuid.uuid4().hex}"


@pytest.fixture
def keep(tmp_path: Path, marker: str) -> Iterator[Keep]:
    """Start a keeper over a script. Whatever happened, afterwards nothing is left of it."""
    started: list[Keeping] = []

    def keep(script: str, *arguments: str, term_timeout_s: float = 5.0, cpus: list[int] | None = None) -> Keeping:
        started.append(Keeping(tmp_path, marker, script, *arguments, term_timeout_s=term_timeout_s, cpus=cpus or []))
        return started[-1]

    yield keep
    for keeping in started:
        keeping.answers()
        assert not keeping.run_dir.exists()
        assert not keeping.lock.exists()
    assert processes_marked(marker) == {}


@pytest.fixture
def segment() -> Iterator[Path]:
    path = Path(f"/dev/shm/gpulayout-test-{uuid.uuid4().hex}")
    yield path
    path.unlink(missing_ok=True)


# -- the end of a server ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "stop\n", "note\nstop\n", "note\n"])
def test_end_of_input_or_stop_ends_the_server(keep: Keep, command: str) -> None:
    answers = keep(OBEDIENT).answers(command)
    assert answers["started"] > 0
    assert answers["stopped"] == {"killed": [], "segments": []}
    assert "exited" not in answers


def test_server_that_ends_by_itself(keep: Keep) -> None:
    keeping = keep(ENDS)
    assert keeping.process.wait(10) == 0
    assert keeping.answers()["exited"] == 7


def test_server_that_is_killed(keep: Keep) -> None:
    keeping = keep("import os; print('ready', flush=True); os.kill(os.getpid(), 9)")
    assert keeping.process.wait(10) == 0
    assert keeping.answers()["exited"] == -signal.SIGKILL


def test_server_that_ignores_sigterm_is_killed(keep: Keep) -> None:
    answers = keep(STUBBORN, term_timeout_s=0.2).answers("stop\n")
    assert answers["stopped"]["killed"] == [answers["started"]]


def test_orphans_of_a_server_that_has_gone_are_ended(keep: Keep) -> None:
    keeping = keep(LEAVES_ORPHANS)
    assert keeping.process.wait(10) == 0
    answers = keeping.answers()
    assert answers["exited"] == 0
    assert answers["stopped"]["killed"] == []


def test_daemon_that_ignores_sigterm_is_killed(keep: Keep) -> None:
    keeping = keep(DAEMONISES, term_timeout_s=0.3)
    daemon = int(keeping.log.read_text().split()[1])
    assert keeping.answers("stop\n")["stopped"]["killed"] == [daemon]


def test_sigterm_ends_the_keeper_and_all(keep: Keep) -> None:
    keeping = keep(OBEDIENT)
    keeping.process.terminate()
    assert keeping.process.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGPIPE])
def test_signals_of_a_terminal_do_not_end_it(keep: Keep, number: signal.Signals) -> None:
    keeping = keep(OBEDIENT)
    keeping.process.send_signal(number)
    keeping.process.send_signal(number)
    assert keeping.answers("stop\n")["stopped"]["killed"] == []
    assert keeping.process.returncode == 0


def test_keeper_that_is_killed_takes_the_server_along(keep: Keep, marker: str, tmp_path: Path) -> None:
    keeping = keep(OBEDIENT)
    keeping.process.kill()
    wait_until(lambda: not processes_marked(marker), "the end of the server")
    keeping.run_dir.rmdir()
    keeping.lock.unlink()


def test_lock_that_only_its_owner_may_remove_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused = []

    def refuse(path: str) -> None:
        refused.append(path)
        raise PermissionError(path)

    lock = tmp_path / "of-another-user.lock"
    lock.touch()
    monkeypatch.setattr(os, "unlink", refuse)
    keeper_script._remove_lock(str(lock))
    assert refused == [str(lock)]


def test_lock_that_somebody_else_holds_is_left_to_its_last_holder(keep: Keep) -> None:
    keeping = keep(OBEDIENT)
    with keeping.lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        keeping.answers("stop\n")
        assert keeping.lock.exists()
    keeper_script._remove_lock(str(keeping.lock))
    assert not keeping.lock.exists()


def test_lock_that_is_new_under_its_old_name_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "device.lock"
    lock.touch()
    take = fcntl.flock

    def replace_and_take(file: int, operation: int) -> None:
        lock.rename(tmp_path / "old")  # its last owner removed it, and the next one made it anew
        lock.touch()
        take(file, operation)

    monkeypatch.setattr(fcntl, "flock", replace_and_take)
    keeper_script._remove_lock(str(lock))
    assert lock.exists()


# -- binding ---------------------------------------------------------------------------------------------------------

SAYS_CPUS = WAIT + "cpus = [os.sched_getaffinity(0)]; say(f'{cpus} ready'); signal.pause()"


def test_server_gets_the_cpus_that_it_is_bound_to(keep: Keep) -> None:
    cpu = max(os.sched_getaffinity(0))
    assert keep(SAYS_CPUS, cpus=[cpu]).log.read_text() == f"[{{{cpu}}}] ready\n"


def test_server_that_is_not_bound_gets_the_cpus_of_the_caller(keep: Keep) -> None:
    assert keep(SAYS_CPUS).log.read_text() == f"[{os.sched_getaffinity(0)}] ready\n"


# -- shared memory ---------------------------------------------------------------------------------------------------


def test_segments_that_the_server_left_are_removed(keep: Keep, segment: Path) -> None:
    keeping = keep(MAPS, str(segment))
    assert keeping.answers("stop\n")["stopped"]["segments"] == [str(segment)]
    assert not segment.exists()


def test_noted_segments_of_a_server_that_was_killed_are_removed(keep: Keep, segment: Path) -> None:
    keeping = keep(MAPS, str(segment))
    keeping.tell("note\n")
    keeping.tell("\n")  # taken only when the first has been done
    assert keeping.process.stdout is not None
    os.kill(json.loads(keeping.process.stdout.readline())["started"], signal.SIGKILL)
    assert keeping.answers()["stopped"]["segments"] == [str(segment)]


def test_segments_that_somebody_else_has_mapped_are_kept(keep: Keep, segment: Path) -> None:
    keeping = keep(MAPS, str(segment))
    with segment.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert keeping.answers("stop\n")["stopped"]["segments"] == []
    assert segment.exists()


def test_files_that_were_there_before_are_kept(keep: Keep, segment: Path) -> None:
    segment.write_bytes(b"weights of a model")
    assert keep(MAPS, str(segment)).answers("stop\n")["stopped"]["segments"] == []
    assert segment.exists()


def test_files_in_folders_are_no_segments(keep: Keep, segment: Path) -> None:
    segment.mkdir()
    file = segment / "downloaded.safetensors"
    assert keep(MAPS, str(file)).answers("stop\n")["stopped"]["segments"] == []
    file.unlink()
    segment.rmdir()


def test_segments_named_after_a_file_of_the_server_are_removed(keep: Keep) -> None:
    keeping = keep(OBEDIENT)
    identity = f"vllm_dist_{uuid.uuid4().hex}"
    (keeping.run_dir / identity).touch()
    segment = Path(f"/dev/shm/{identity}-tp:0-[0-1]-cpushm_0")
    segment.touch()
    assert keeping.answers("stop\n")["stopped"]["segments"] == [str(segment)]


def test_mapped_segments_of_a_process_that_is_gone() -> None:
    assert mapped_segments([2**22 + 1]) == set()


def test_descendants_are_listed_parents_first() -> None:
    script = f"{WAIT}os.fork() or os.fork(); say('ready'); signal.pause()"
    command = [sys.executable, "-I", "-S", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        found = descendants(process.pid)
        assert [_parent(pid) for pid in found] == [process.pid, *found[:1]]
        for pid in (*found, process.pid):
            os.kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# -- the death of pytest ---------------------------------------------------------------------------------------------


@pytest.fixture
def launched(tmp_path: Path, marker: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Launch a server from another process, which may be killed; afterwards nothing of it is left anywhere."""
    with tempfile.TemporaryDirectory(prefix="gl-", dir="/tmp") as temporary:
        started: list[subprocess.Popen[str]] = []

        def launched(layout: str, timeout_s: float = 60, **behaviour: object) -> subprocess.Popen[str]:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.support.processes", layout, str(tmp_path), str(timeout_s)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                    env=os.environ
                    | {"TEST_MARKER": marker, "TMPDIR": temporary, "FAKE_VLLM": json.dumps(behaviour)}
                    | {"PYTHONPATH": str(FAKE_VLLM)},
                )
            )
            return started[-1]

        yield launched
        for process in started:
            process.communicate()
        wait_until(lambda: not processes_marked(marker), "the end of every process")
        assert os.listdir(temporary) == []
        assert list(Path("/tmp").glob(f"gpulayout-{marker}*.lock")) == []


def _segment_identity(log: Path) -> str:
    return "vllm_dist_" + log.read_text().rpartition("vllm_dist_")[2].partition(" ")[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_pytest_leaves_nothing(
    launched: Callable[..., subprocess.Popen[str]], tmp_path: Path, marker: str, number: signal.Signals
) -> None:
    process = launched("tp2")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    identity = _segment_identity(tmp_path / "server-1-tp2" / "server.log")
    assert len(segments_of(identity)) == 2
    assert len(list(Path("/tmp").glob(f"gpulayout-{marker}*.lock"))) == 2
    process.send_signal(number)
    wait_until(lambda: not processes_marked(marker), "the end of every process")
    assert segments_of(identity) == []


def test_pytest_killed_while_the_server_loads_leaves_nothing(
    launched: Callable[..., subprocess.Popen[str]], tmp_path: Path, marker: str
) -> None:
    process = launched("tp2", load_s=300)
    wait_until(lambda: "VLLM::Worker_TP1" in processes_marked(marker).values(), "the start of the workers")
    log = tmp_path / "server-1-tp2" / "server.log"
    wait_until(lambda: "init engine" in log.read_text(), "the end of the engine's start")
    process.kill()
    wait_until(lambda: not processes_marked(marker), "the end of every process")
    assert segments_of(_segment_identity(log)) == []


@pytest.mark.parametrize("moment", ["keeper.py", "vllm.entrypoints", "VLLM::EngineCore"])
def test_pytest_killed_at_any_moment_of_a_start_leaves_nothing(
    launched: Callable[..., subprocess.Popen[str]], marker: str, moment: str
) -> None:
    process = launched("tp2", load_s=300)
    wait_until(lambda: any(moment in title for title in processes_marked(marker).values()), moment)
    process.kill()
    wait_until(lambda: not processes_marked(marker), "the end of every process")
