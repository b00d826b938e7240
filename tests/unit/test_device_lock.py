from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_gpulayout.adapters import device_lock
from pytest_gpulayout.adapters.device_lock import DeviceLocks
from tests.support.processes import wait_until

pytestmark = pytest.mark.end_to_end

OWNER = """
import sys
from pytest_gpulayout.adapters import device_lock
device_lock.LOCK_FOLDER = sys.argv[1]
say = lambda text: print(text, flush=True)
locks = device_lock.DeviceLocks(sys.argv[3:], sys.argv[2], say)
say("locked")
sys.stdin.read()
locks.release()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(device_lock, "LOCK_FOLDER", str(tmp_path))
    return tmp_path


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Start another process that takes locks; it frees them when its standard input closes."""
    started: list[subprocess.Popen[str]] = []

    def start(owner: str, *names: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OWNER, str(folder), owner, *names]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.communicate(timeout=10)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def take(*names: str) -> DeviceLocks:
    return DeviceLocks(names, "the test", lambda line: pytest.fail(f"had to wait: {line}"))


def test_lock_says_whose_it_is_and_goes_with_its_owner(folder: Path) -> None:
    locks = take("GPU-1a2b")
    (path,) = folder.iterdir()
    assert path.name == "gpulayout-GPU-1a2b.lock"
    assert path.read_text() == f"the test (pid {os.getpid()})"
    assert locks.paths == [str(path)]
    assert len(locks.files) == 1
    locks.release()
    assert list(folder.iterdir()) == []
    assert not locks.paths
    locks.release()


def test_locks_are_taken_once_each_in_one_order() -> None:
    locks = take("GPU-b", "GPU-a", "GPU-b")
    assert [Path(path).stem for path in locks.paths] == ["gpulayout-GPU-a", "gpulayout-GPU-b"]
    locks.release()


def test_names_are_safe_as_file_names(folder: Path) -> None:
    locks = take("../x y/z")
    assert [path.name for path in folder.iterdir()] == ["gpulayout-.._x_y_z.lock"]
    locks.release()


@pytest.mark.parametrize("number", [0, signal.SIGTERM, signal.SIGKILL])
def test_the_second_waits_and_is_told_for_whom(start: Start, number: int) -> None:
    first = start("pytest, layout tp2", "cpu")
    assert said(first) == "locked"
    second = start("pytest, layout tp1", "cpu")
    waiting = f"waiting for cpu, held by pytest, layout tp2 (pid {first.pid})"
    assert [said(second), said(second)] == [waiting, waiting]
    first.send_signal(number)
    first.communicate(timeout=10)
    lines = iter(lambda: said(second), "locked")
    assert set(lines) <= {waiting}
    assert second.poll() is None


def test_a_holder_of_one_waits_for_the_other_in_order(start: Start) -> None:
    holder = start("first", "GPU-b")
    assert said(holder) == "locked"
    waiting = start("second", "GPU-b", "GPU-a")
    assert said(waiting).startswith("waiting for GPU-b, held by first")
    third = start("third", "GPU-a")
    assert said(third) == f"waiting for GPU-a, held by second (pid {waiting.pid})"
    holder.communicate(timeout=10)
    assert list(iter(lambda: said(waiting), "locked")) == [] or waiting.poll() is None
    waiting.communicate(timeout=10)
    assert "locked" in iter(lambda: said(third), "")


def test_other_devices_are_free(start: Start) -> None:
    assert said(start("first", "GPU-a")) == "locked"
    assert said(start("second", "GPU-b")) == "locked"


def test_file_of_a_dead_owner_is_free(folder: Path) -> None:
    path = folder / "gpulayout-cpu.lock"
    path.write_text("pytest, layout tp2, with a rather long text (pid 99999999)")
    locks = take("cpu")
    assert path.read_text() == f"the test (pid {os.getpid()})"
    locks.release()
    assert not path.exists()


def test_child_that_inherited_the_file_holds_the_lock(start: Start) -> None:
    locks = take("cpu")
    child = subprocess.Popen(["sleep", "600"], pass_fds=locks.files)
    for file in locks.files:
        os.close(file)
    second = start("second", "cpu")
    assert said(second) == f"waiting for cpu, held by the test (pid {os.getpid()})"
    child.kill()
    child.wait()
    assert "locked" in iter(lambda: said(second), "")


def test_release_does_not_remove_the_lock_of_the_next_owner(folder: Path) -> None:
    locks = take("cpu")
    (path,) = folder.iterdir()
    path.unlink()  # as the keeper does
    successor = take("cpu")
    locks.release()
    assert path.exists()
    successor.release()


def test_locks_taken_before_an_interrupt_are_freed(start: Start, folder: Path) -> None:
    assert said(start("first", "GPU-b")) == "locked"

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DeviceLocks(["GPU-a", "GPU-b"], "the test", interrupt)
    assert [path.name for path in folder.iterdir()] == ["gpulayout-GPU-b.lock"]


def test_file_of_another_user_stays_and_locks_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(path)

    locks = take("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        locks.release()
    assert [path.name for path in folder.iterdir()] == ["gpulayout-cpu.lock"]
    take("cpu").release()


def test_everybody_may_take_a_lock_that_somebody_made(folder: Path) -> None:
    locks = take("cpu")
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o666
    locks.release()


def test_without_a_common_folder_the_temporary_one_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_lock, "LOCK_FOLDER", "/no/such/folder")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    locks = take("cpu")
    assert locks.paths == [str(tmp_path / "gpulayout-cpu.lock")]
    locks.release()


def test_many_owners_hold_one_lock_one_after_the_other(folder: Path) -> None:
    script = OWNER.replace("sys.stdin.read()", "\n".join(["path = sys.argv[1] + '/inside'", *_INSIDE]))
    command = [sys.executable, "-c", script, str(folder), "one of many", "cpu"]
    owners = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(4)]
    wait_until(lambda: all(owner.poll() is not None for owner in owners), "the end of all owners")
    assert [owner.returncode for owner in owners] == [0] * 4
    assert list(folder.iterdir()) == []


_INSIDE = [
    "import os, time",
    "os.close(os.open(path, os.O_CREAT | os.O_EXCL))",  # fails when somebody else is inside
    "time.sleep(0.05)",
    "os.unlink(path)",
]
