from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.adapters import baseline_lock
from pytest_gpulayout.adapters.baseline_files import MOST_BYTES, BaselineFolder, open_baselines
from pytest_gpulayout.adapters.baseline_lock import LOCK_NAME, STALE_S, WAIT_S, Time
from pytest_gpulayout.adapters.baseline_remote import RemoteBaselines
from pytest_gpulayout.baseline_text import baseline_from_text, baseline_to_text
from pytest_gpulayout.errors import BaselineCorrupt, BaselineError
from pytest_gpulayout.ports import BaselineStore
from tests.support.measurements import baseline_of, session_of

PATH = "model/tp2/h200/smoke.json"
ESCAPES = ["../x.json", "a/../../x.json", "/etc/x.json"]


class WaitingTime:
    """A clock that moves when somebody waits. :param waited: what happens then."""

    def __init__(self, waited: Callable[[], None] = lambda: None) -> None:
        self.now, self.waited = 0.0, waited

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waited()

    def as_time(self) -> Time:
        return Time(lambda: self.now, self.sleep)


@pytest.fixture(params=["folder", "file", "no flock", "memory", "no memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kind of place: ``no flock`` has a lock file, ``no memory`` is a URL of which nothing is known."""
    if request.param == "no flock":
        refuse_flock(monkeypatch, errno.EBADF)
    if request.param == "no memory":
        monkeypatch.setattr(baseline_lock, "SETTLE_S", 0.001)
        monkeypatch.setattr(RemoteBaselines, "_is_here", property(lambda _: False, lambda *_: None), raising=False)
    places = {"file": f"file://{tmp_path}/b", "folder": str(tmp_path / "b"), "no flock": str(tmp_path / "b")}
    return places.get(request.param) or f"memory://{uuid.uuid4().hex}/b"


def refuse_flock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


def put(store: BaselineStore, path: str, text: str | None) -> bool:
    return store.update(path, lambda _: text)


def append(store: BaselineStore, path: str, line: str) -> bool:
    return store.update(path, lambda before: f"{before or ''}{line}\n")


def everything(folder: Path) -> list[str]:
    return sorted(str(found.relative_to(folder)) for found in folder.rglob("*"))


# -- any store -------------------------------------------------------------------------------------------------------


def test_store_keeps_texts_under_paths(place: str) -> None:
    store = open_baselines(place)
    assert store.read(PATH) is None
    assert list(store.paths()) == []
    assert put(store, PATH, "eins ü\n") is False
    put(store, "a/b.json", "{}")
    assert put(store, PATH, "zwei\n") is True
    assert store.read(PATH) == "zwei\n"
    assert list(store.paths()) == ["a/b.json", PATH]


def test_change_takes_what_is_there(place: str) -> None:
    store = open_baselines(place)
    taken: list[str | None] = []

    def change(before: str | None) -> str:
        taken.append(before)
        return f"text {len(taken)}"

    store.update(PATH, change)
    store.update(PATH, change)
    assert taken == [None, "text 1"]


def test_another_store_of_the_place_sees_them(place: str) -> None:
    put(open_baselines(place), PATH, "µs ≤ 5 %\r\n")
    assert open_baselines(place + "/").read(PATH) == "µs ≤ 5 %\r\n"


def test_what_change_raises_leaves_all_as_it_was(place: str) -> None:
    def refuse(before: str | None) -> str:
        raise OSError(f"foreign, after {before}")

    store = open_baselines(place)
    with pytest.raises(OSError, match=r"^foreign, after None$"):
        store.update(PATH, refuse)
    put(store, PATH, "old")
    with pytest.raises(OSError, match=r"^foreign, after old$"):
        store.update(PATH, refuse)
    assert store.read(PATH) == "old"
    assert put(store, PATH, "new") is True  # and the lock is free


def test_removed_files_take_their_empty_folders_along(place: str) -> None:
    store = open_baselines(place)
    put(store, PATH, "x")
    put(store, "model/tp4/h200/smoke.json", "y")
    assert put(store, PATH, None) is True
    assert put(store, PATH, None) is False
    assert store.read(PATH) is None
    assert list(store.paths()) == ["model/tp4/h200/smoke.json"]


@pytest.mark.parametrize("path", ESCAPES)
@pytest.mark.parametrize("use", [lambda store, path: store.read(path), lambda store, path: put(store, path, "x")])
def test_paths_stay_inside(place: str, path: str, use: Callable[[BaselineStore, str], object]) -> None:
    store = open_baselines(place)
    with pytest.raises(BaselineError) as caught:
        use(store, path)
    first, *rest = str(caught.value).splitlines()
    assert first == f"a baseline must lie inside {store.root}, found the path {path!r}"
    assert len(rest) == 2


def test_threads_lose_nothing(place: str) -> None:
    """Each thread has a store of its own, so that nothing but the place keeps them apart."""
    threads = 50 if place.startswith("memory") else 12
    start = threading.Barrier(threads)

    def write(number: int) -> None:
        start.wait()
        append(open_baselines(place), PATH, f"line {number}")

    writers = [threading.Thread(target=write, args=(number,)) for number in range(threads)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    text = open_baselines(place).read(PATH)
    assert text is not None
    assert sorted(text.splitlines()) == sorted(f"line {number}" for number in range(threads))
    assert list(open_baselines(place).paths()) == [PATH]


WHOLE = baseline_to_text(baseline_of([1.0]))


@pytest.mark.parametrize(
    "text",
    [
        "",
        WHOLE[: len(WHOLE) // 2],
        WHOLE.replace('"schema_version": 2', '"schema_version": 3'),
        f"<<<<<<< ours\n{WHOLE}",
    ],
    ids=["empty", "half", "newer", "conflict"],
)
def test_appending_to_what_is_no_baseline_of_ours_leaves_it_alone(place: str, text: str) -> None:
    def append_session(before: str | None) -> str:
        assert before is not None
        stored = baseline_from_text(before, PATH)
        return baseline_to_text(replace(stored, sessions=(*stored.sessions, session_of(1.0))))

    store = open_baselines(place)
    put(store, PATH, text)
    with pytest.raises(BaselineCorrupt):
        store.update(PATH, append_session)
    assert store.read(PATH) == text


# -- folders ---------------------------------------------------------------------------------------------------------


def test_kinds_of_places(tmp_path: Path) -> None:
    assert isinstance(open_baselines("gpu-baselines"), BaselineFolder)
    assert isinstance(open_baselines(f"file://{tmp_path}"), BaselineFolder)
    assert isinstance(open_baselines(f"local://{tmp_path}"), BaselineFolder)
    assert isinstance(open_baselines("memory://b"), RemoteBaselines)


@pytest.mark.parametrize("has_flock", [True, False])
def test_nothing_but_the_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_flock: bool) -> None:
    if not has_flock:
        refuse_flock(monkeypatch, errno.ENOLCK)
    store = BaselineFolder(tmp_path / "b")
    put(store, PATH, "x")
    assert everything(tmp_path) == ["b", "b/model", "b/model/tp2", "b/model/tp2/h200", f"b/{PATH}"]
    put(store, PATH, None)
    assert everything(tmp_path) == ["b"]


def test_a_change_that_stores_nothing_leaves_no_folder(tmp_path: Path) -> None:
    store = BaselineFolder(tmp_path)
    put(store, PATH, None)
    with pytest.raises(ZeroDivisionError):
        store.update(PATH, lambda _: str(1 / 0))
    assert everything(tmp_path) == []


def test_the_same_text_is_not_written_again(tmp_path: Path) -> None:
    store = BaselineFolder(tmp_path)
    put(store, PATH, "same")
    before = (tmp_path / PATH).stat()
    put(store, PATH, "same")
    assert (tmp_path / PATH).stat().st_ino == before.st_ino


def test_links_do_not_lead_outside(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/y.json").write_text("secret")
    (tmp_path / "b/model").symlink_to(tmp_path / "outside")
    (tmp_path / "b/y.json").symlink_to(tmp_path / "outside/y.json")
    for path in ("model/x.json", "y.json"):
        with pytest.raises(BaselineError, match="must lie inside"):
            put(BaselineFolder(tmp_path / "b"), path, "x")
        with pytest.raises(BaselineError, match="must lie inside"):
            BaselineFolder(tmp_path / "b").read(path)
    assert everything(tmp_path / "outside") == ["y.json"]
    assert (tmp_path / "outside/y.json").read_text() == "secret"


def test_links_inside_keep_their_target(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    put(BaselineFolder(tmp_path), "alias/x.json", "x")
    assert (tmp_path / "real/x.json").read_text() == "x"
    assert (tmp_path / "alias").is_symlink()


def test_new_files_have_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        put(BaselineFolder(tmp_path), "x.json", "text")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o640


def test_rights_of_an_existing_file_stay(tmp_path: Path) -> None:
    store = BaselineFolder(tmp_path)
    put(store, "x.json", "old")
    (tmp_path / "x.json").chmod(0o664)
    if os.getuid() == 0:
        os.chown(tmp_path / "x.json", 12345, 23456)
    old = (tmp_path / "x.json").stat()
    put(store, "x.json", "new")
    new = (tmp_path / "x.json").stat()
    assert stat.S_IMODE(new.st_mode) == 0o664
    assert (new.st_uid, new.st_gid) == (old.st_uid, old.st_gid)


def test_a_file_of_somebody_else_may_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    store = BaselineFolder(tmp_path)
    put(store, "x.json", "old")
    monkeypatch.setattr(os, "fchown", refuse)
    put(store, "x.json", "new")
    assert store.read("x.json") == "new"


def test_a_write_protected_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BaselineFolder(tmp_path)
    put(store, "x.json", "old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root, too, is told so here
    with pytest.raises(BaselineError, match=r"could not be stored, and nothing was changed: .*write-protected"):
        put(store, "x.json", "new")
    assert everything(tmp_path) == ["x.json"]
    assert store.read("x.json") == "old"


FAILING = {
    "open": (errno.EROFS, "Read-only file system"),
    "write": (errno.ENOSPC, "No space left on device"),
    "fsync": (errno.EIO, "Input/output error"),
    "replace": (errno.EACCES, "Permission denied"),
}


@pytest.mark.parametrize("step", FAILING)
@pytest.mark.parametrize("before", [None, "old"])
def test_a_write_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, before: str | None
) -> None:
    number, text = FAILING[step]
    real_open = os.open

    def fail(*arguments: Any, **_: object) -> int:
        if step == "open" and not arguments[1] & os.O_CREAT:
            return real_open(*arguments)
        raise OSError(number, text)

    store = BaselineFolder(tmp_path)
    if before is not None:
        put(store, PATH, before)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(BaselineError) as caught:
            put(store, PATH, "new" * 1000)
    first, where, advice = str(caught.value).splitlines()
    assert first.startswith(f"the baseline could not be stored, and nothing was changed: [Errno {number}] {text}")
    assert where == f"  in {tmp_path}/{PATH}"
    assert advice == "  make room or allow writing there, or name another folder: --gpu-baseline-dir=DIR"
    assert store.read(PATH) == before
    assert everything(tmp_path) == ([] if before is None else ["model", "model/tp2", "model/tp2/h200", PATH])
    assert put(store, PATH, "new") is (before is not None)


def test_a_disk_that_takes_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, content: real(file, content[:7]))
    put(BaselineFolder(tmp_path), "x.json", "a text of more than seven letters")
    monkeypatch.undo()
    assert (tmp_path / "x.json").read_text() == "a text of more than seven letters"


def test_folders_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def no_folders(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(file)

    monkeypatch.setattr(os, "fsync", no_folders)
    put(BaselineFolder(tmp_path), PATH, "x")
    assert (tmp_path / PATH).read_text() == "x"


def test_a_disk_that_does_not_confirm_the_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BaselineFolder(tmp_path)
    put(store, "x.json", "old")
    real = os.fsync

    def fail(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        real(file)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(BaselineError, match=r"was replaced, and the disk did not confirm it: \[Errno 5\]"):
        put(store, "x.json", "new")
    assert everything(tmp_path) == ["x.json"]
    assert store.read("x.json") == "new"


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("mine")
    store = BaselineFolder(tmp_path / "b")
    with pytest.raises(BaselineError, match=r"could not be stored, and nothing was changed: .*Not a directory"):
        put(store, "x.json", "text")
    with pytest.raises(BaselineError, match="must be a readable text file"):
        store.read("x.json")
    with pytest.raises(BaselineError, match=r"a readable folder of baselines was required, found: .*Not a directory"):
        store.paths()
    assert (tmp_path / "b").read_text() == "mine"


def no_text(file: Path) -> None:
    file.write_bytes(b"\xff\xfe")


def too_large(file: Path) -> None:
    with file.open("wb") as sparse:
        sparse.truncate(MOST_BYTES + 1)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (no_text, "'utf-8' codec can't decode byte 0xff"),
        (too_large, f"it holds {MOST_BYTES + 1} bytes, more than the {MOST_BYTES} of any baseline"),
        (Path.mkdir, "Is a directory"),
        (os.mkfifo, "it is no regular file"),
    ],
)
def test_what_is_no_readable_text_is_neither_read_nor_replaced(
    tmp_path: Path, make: Callable[[Path], object], told: str
) -> None:
    make(tmp_path / "x.json")
    before = (tmp_path / "x.json").lstat()
    store = BaselineFolder(tmp_path)
    for use in (store.read, lambda path: put(store, path, "new")):
        with pytest.raises(BaselineError) as caught:
            use("x.json")
        first, where, advice = str(caught.value).splitlines()
        assert first.startswith("a baseline must be a readable text file, found: ")
        assert told in first
        assert where == f"  in {tmp_path}/x.json"
        assert advice == "  restore it (git checkout), or remove it and record it again: --gpu-baseline=new"
        assert caught.value.path == f"{tmp_path}/x.json"
    after = (tmp_path / "x.json").lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, before.st_size)


@pytest.mark.parametrize("text", ["x" * (MOST_BYTES + 1), "\udcff"])
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, text: str) -> None:
    store = BaselineFolder(tmp_path)
    put(store, "x.json", "old")
    with pytest.raises(BaselineError, match="could not be stored, and nothing was changed"):
        put(store, "x.json", text)
    assert everything(tmp_path) == ["x.json"]
    assert store.read("x.json") == "old"


def test_paths_are_those_of_baselines(tmp_path: Path) -> None:
    for name in ("a/b.json", "named.json/c.json", ".hidden.json", ".gpulayout-1.tmp", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert BaselineFolder(tmp_path).paths() == ["a/b.json", "named.json/c.json"]


def test_temporary_files_of_dead_writers_are_removed_by_the_next_one(tmp_path: Path) -> None:
    (tmp_path / ".gpulayout-dead.tmp").write_text('{"half": ')
    (tmp_path / ".gitignore").write_text("mine")
    store = BaselineFolder(tmp_path)
    assert store.paths() == []
    put(store, "x.json", "x")
    assert everything(tmp_path) == [".gitignore", "x.json"]


# -- the lock of a folder --------------------------------------------------------------------------------------------


def locked(folder: Path) -> int:
    folder.mkdir(exist_ok=True)
    file = os.open(folder, os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def test_a_writer_waits_for_the_other(tmp_path: Path) -> None:
    other = locked(tmp_path)

    def finish() -> None:
        (tmp_path / "x.json").write_text("first\n")
        os.close(other)
        time.waited = lambda: None

    time = WaitingTime(finish)
    append(BaselineFolder(tmp_path, time.as_time()), "x.json", "second")
    assert (tmp_path / "x.json").read_text() == "first\nsecond\n"
    assert time.now > 0


def test_a_writer_does_not_wait_forever(tmp_path: Path) -> None:
    other = locked(tmp_path)
    time = WaitingTime()
    with pytest.raises(BaselineError) as caught:
        put(BaselineFolder(tmp_path, time.as_time()), "x.json", "x")
    os.close(other)
    assert str(caught.value).splitlines() == [
        "a baseline is changed by one writer at a time, found it its lock (flock) held by another process for 180 s",
        f"  in {tmp_path}",
        "  end that process, or remove the lock if nobody writes; then run the same command again",
    ]
    assert time.now >= WAIT_S
    assert everything(tmp_path) == []


def test_a_folder_that_is_replaced_while_a_writer_waits(tmp_path: Path) -> None:
    """As ``git checkout`` does it: who then locked the old folder would keep nobody out of the new one."""
    folder = tmp_path / "b"
    other = locked(folder)

    def replace() -> None:
        folder.rename(tmp_path / "old")
        folder.mkdir()
        (folder / "x.json").write_text("theirs\n")
        os.close(other)
        time.waited = lambda: None

    time = WaitingTime(replace)
    append(BaselineFolder(folder, time.as_time()), "x.json", "ours")
    assert (folder / "x.json").read_text() == "theirs\nours\n"


def test_a_folder_that_is_removed_while_it_is_changed(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    calls: list[str | None] = []

    def change(before: str | None) -> str:
        if not calls:
            folder.rmdir()
        calls.append(before)
        return "x"

    BaselineFolder(tmp_path).update("b/x.json", change)
    assert (folder / "x.json").read_text() == "x"
    assert calls == [None, None]


def test_a_folder_that_nobody_can_keep(tmp_path: Path) -> None:
    def change(before: str | None) -> str:
        (tmp_path / "b").rmdir()
        return "x"

    with pytest.raises(BaselineError, match="the folder disappears again and again"):
        BaselineFolder(tmp_path).update("b/x.json", change)


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_without_flock_a_file_is_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refuse_flock(monkeypatch, number)
    seen: list[list[str]] = []
    store = BaselineFolder(tmp_path)

    def change(before: str | None) -> str:
        seen.append(everything(tmp_path))
        return "x"

    store.update("x.json", change)
    assert seen == [[LOCK_NAME]]
    assert everything(tmp_path) == ["x.json"]


@pytest.mark.parametrize("filesystem", ["nfs4", "cifs", "fuse.sshfs", "9p", "virtiofs", ""])
def test_on_a_filesystem_of_several_machines_a_file_is_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filesystem: str
) -> None:
    """The kernel would lock the folder, too, but for this machine only."""
    monkeypatch.setattr(baseline_lock, "_filesystem", lambda descriptor: filesystem)
    monkeypatch.setattr(fcntl, "flock", lambda *_: pytest.fail("not asked for here"))
    (tmp_path / LOCK_NAME).write_text("node7 pid 12")
    time = WaitingTime()
    put(BaselineFolder(tmp_path, time.as_time()), "x.json", "x")
    assert time.now >= STALE_S
    assert everything(tmp_path) == ["x.json"]


def test_the_filesystem_is_that_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path, Path("/proc")):
        descriptor = os.open(folder, os.O_RDONLY)
        found = baseline_lock._filesystem(descriptor)
        told = subprocess.run(
            ["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, timeout=20, check=True
        )
        assert found[:3] in told.stdout  # which calls ext4 ext2/ext3, and overlay overlayfs
        os.close(descriptor)
    assert baseline_lock._filesystem(descriptor) == ""  # closed, so unknown


def test_other_errors_of_flock_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_flock(monkeypatch, errno.EIO)
    with pytest.raises(BaselineError, match="could not be stored"):
        put(BaselineFolder(tmp_path), "x.json", "x")


# -- lock objects, in a folder and behind a URL ----------------------------------------------------------------------


class Lockable:
    """A place with lock objects. :param lock: path of the one of PATH."""

    def __init__(self, place: str, lock: str) -> None:
        self.place, self.lock = place, lock
        self.is_folder = "://" not in place

    def store(self, time: WaitingTime) -> BaselineStore:
        if self.is_folder:
            return BaselineFolder(Path(self.place), time.as_time())
        return RemoteBaselines(self.place, time.as_time())

    def put(self, text: str) -> None:
        """Make the lock object hold this."""
        if self.is_folder:
            file = Path(self.place, self.lock)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        else:
            store = RemoteBaselines(self.place)
            store._files.pipe_file(f"{store._folder}/{self.lock}", text.encode())

    def remove(self) -> None:
        if self.is_folder:
            Path(self.place, self.lock).unlink()
        else:
            store = RemoteBaselines(self.place)
            store.remove(f"{store._folder}/{self.lock}")

    def objects(self) -> list[str]:
        if self.is_folder:
            return sorted(str(f.relative_to(self.place)) for f in Path(self.place).rglob("*") if f.is_file())
        store = RemoteBaselines(self.place)
        return sorted(file[len(store._folder) + 1 :] for file in store._files.find(store._folder))


@pytest.fixture(params=["folder", "memory"])
def lockable(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lockable:
    if request.param == "memory":
        return Lockable(f"memory://{uuid.uuid4().hex}", f"{PATH}.lock")
    refuse_flock(monkeypatch, errno.EBADF)
    return Lockable(str(tmp_path), f"{PATH.rpartition('/')[0]}/{LOCK_NAME}")


@pytest.mark.parametrize("holder", ["node7 pid 12 0a1b\n", ""])
def test_the_lock_of_a_dead_writer_is_taken_over(lockable: Lockable, holder: str) -> None:
    lockable.put(holder)
    time = WaitingTime()
    put(lockable.store(time), PATH, "x")
    assert STALE_S <= time.now < STALE_S + 5
    assert lockable.objects() == [PATH]


def test_the_lock_of_writers_who_live_is_not_taken_over(lockable: Lockable) -> None:
    """Each of them holds it for less than a dead one would."""
    lockable.put("writer 0")
    turns = 0

    def next_writer() -> None:
        nonlocal turns
        if time.now > (turns + 1) * STALE_S / 2:
            turns += 1
            lockable.put(f"writer {turns}")
        if turns == 5:
            lockable.remove()
            time.waited = lambda: None

    time = WaitingTime(next_writer)
    put(lockable.store(time), PATH, "x")
    assert turns == 5
    assert time.now > 2 * STALE_S


def test_only_one_may_take_over(lockable: Lockable) -> None:
    """Somebody else has already begun to, and does not end: nobody can know whether the lock is his by now."""
    lockable.put("dead")
    marker = Lockable(lockable.place, f"{lockable.lock}.{hashlib.sha256(b'dead').hexdigest()[:12]}")
    marker.put("another one")
    time = WaitingTime()
    with pytest.raises(BaselineError) as caught:
        put(lockable.store(time), PATH, "x")
    first, where, advice = str(caught.value).splitlines()
    assert first == "a baseline is changed by one writer at a time, found it held by dead for 180 s"
    assert where == f"  in {lockable.store(time).root}/{lockable.lock}"
    assert advice.startswith("  end that process, or remove the lock")
    assert lockable.objects() == sorted([lockable.lock, marker.lock])


def test_a_writer_that_was_held_up_writes_nothing(lockable: Lockable) -> None:
    time = WaitingTime()
    store = lockable.store(time)
    put(store, PATH, "old")

    def slow(before: str | None) -> str:
        time.now += STALE_S  # asleep; by now another writer has taken the lock over
        lockable.put("another writer")
        return "new"

    with pytest.raises(BaselineError, match=r"within 30 s, found 60 s: nothing was written\n  in .*\n  run the same"):
        store.update(PATH, slow)
    assert store.read(PATH) == "old"
    assert lockable.lock in lockable.objects()  # which is not ours to remove
    assert not [name for name in lockable.objects() if name.endswith(".tmp")]


# -- URLs ------------------------------------------------------------------------------------------------------------


def test_unknown_protocol() -> None:
    with pytest.raises(BaselineError) as caught:
        open_baselines("nosuch://bucket/baselines")
    first, where, advice = str(caught.value).splitlines()
    assert first.startswith("a folder or an fsspec URL was required for baselines, found nosuch://bucket/baselines: ")
    assert "nosuch" in first.rpartition(": ")[2]
    assert where == "  in --gpu-baseline-dir"
    assert advice == "  install what the URL needs, e.g. pip install fsspec s3fs"


def test_passwords_are_not_shown() -> None:
    with pytest.raises(BaselineError) as caught:
        open_baselines("nosuch://bob:geheim@host/baselines")
    assert "geheim" not in str(caught.value)
    assert "nosuch://bob:***@host/baselines" in str(caught.value)
    assert open_baselines("memory://bob:geheim@host/b").root == "memory://bob:***@host/b"


def remote(**members: object) -> RemoteBaselines:
    """A place in memory whose filesystem has these methods instead of its own."""
    store = RemoteBaselines(f"memory://{uuid.uuid4().hex}")
    store._files = type("Changed", (type(store._files),), {"cachable": False, **members})(skip_instance_cache=True)
    return store


def test_remote_object_that_is_no_text() -> None:
    store = remote()
    store._files.pipe_file(f"{store._folder}/x.json", b"\xff\xfe")
    for use in (store.read, lambda path: put(store, path, "x")):
        with pytest.raises(BaselineError) as caught:
            use("x.json")
        first, where, advice = str(caught.value).splitlines()
        assert first.startswith("a baseline must be readable text, found: 'utf-8' codec can't decode")
        assert where == f"  in {store.root}/x.json"
        assert (
            advice == "  check the access to it; if it is damaged, remove it and record it again: --gpu-baseline=new"
        )
    assert store._files.cat_file(f"{store._folder}/x.json") == b"\xff\xfe"


class NoCredentials(Exception):
    """As botocore has it: no OSError."""


def test_remote_place_that_refuses() -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NoCredentials("Unable to locate credentials")

    store = remote(pipe_file=refuse)
    with pytest.raises(BaselineError) as caught:
        put(store, "x.json", "text")
    assert str(caught.value).splitlines() == [
        "the baseline could not be stored: Unable to locate credentials",
        f"  in {store.root}/x.json",
        "  check the access to it, or name a place that can be written to: --gpu-baseline-dir=URL",
    ]
    store = remote(find=refuse, cat_file=refuse)
    with pytest.raises(BaselineError, match=r"lists its baselines was required, found: Unable to locate credentials"):
        store.paths()
    with pytest.raises(BaselineError, match="must be readable text, found: Unable to locate credentials"):
        store.read("x.json")


def test_a_place_without_folders_is_empty() -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("no such bucket")

    assert list(remote(find=missing).paths()) == []


def test_somebody_who_writes_past_the_lock_is_noticed() -> None:
    memory = type(RemoteBaselines("memory://x")._files)

    def overwritten(self: Any, path: str, value: bytes, **more: Any) -> None:
        memory.pipe_file(self, path, value, **more)
        if path.endswith(".json"):
            memory.pipe_file(self, path, b"theirs")

    store = remote(pipe_file=overwritten)
    with pytest.raises(BaselineError, match="had to be what is there now") as caught:
        put(store, "x.json", "ours")
    assert f"  in {store.root}/x.json" in str(caught.value)
    assert store.read("x.json") == "theirs"
    assert list(store._files.find(store._folder)) == [f"{store._folder}/x.json"]


class ObjectStore:
    """What makes memory:// an object store. :param refuses: to create an object twice."""

    def __init__(self, *, refuses: bool) -> None:
        memory = type(RemoteBaselines("memory://x")._files)
        self.created: list[str] = []

        def pipe_file(files: Any, path: str, value: bytes, mode: str = "overwrite") -> None:
            if mode == "create":
                self.created.append(path.rpartition(".")[2])
            memory.pipe_file(files, path, value, mode=mode if refuses else "overwrite")

        def makedirs(*_: object, **__: object) -> None:
            raise AssertionError("a store of objects has no folders, and a bucket is not made in passing")

        self.store = remote(pipe_file=pipe_file, makedirs=makedirs, rmdir=makedirs)
        self.store._is_object_store, self.store._is_here = True, False
        self.time = WaitingTime()
        self.store._time = self.time.as_time()


def test_object_store_that_creates_an_object_once() -> None:
    objects = ObjectStore(refuses=True)
    put(objects.store, PATH, "x")
    assert objects.created == ["lock", "lock"]  # the second one, to see whether it is refused
    put(objects.store, PATH, None)
    assert objects.created == ["lock"] * 3
    assert objects.time.now == 0.0
    assert list(objects.store._files.find(objects.store._folder)) == []


def test_object_store_that_overwrites_is_looked_at_twice() -> None:
    objects = ObjectStore(refuses=False)

    def steal() -> None:
        objects.time.waited = lambda: None
        store = objects.store
        store._files.pipe_file(f"{store._folder}/{PATH}.lock", b"another writer, at the same time")

    objects.time.waited = steal
    put(objects.store, PATH, "x")
    assert objects.time.now >= STALE_S  # the other one was given the lock, and never let go of it
    assert objects.store.read(PATH) == "x"


def test_a_creation_that_was_repeated_is_ours() -> None:
    """The first answer was lost, and the client sent the request again."""
    memory = type(RemoteBaselines("memory://x")._files)

    def twice(self: Any, path: str, value: bytes, mode: str = "overwrite") -> None:
        memory.pipe_file(self, path, value, mode=mode)
        if mode == "create":
            raise FileExistsError(path)

    store = remote(pipe_file=twice)
    store._is_object_store = True
    time = WaitingTime()
    store._time = time.as_time()
    put(store, "x.json", "x")
    assert store.read("x.json") == "x"
    assert time.now == 0.0


# -- processes -------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]

WRITERS = """
import fcntl, json, os, sys
from dataclasses import replace
from pathlib import Path
from pytest_gpulayout.adapters.baseline_files import BaselineFolder
from pytest_gpulayout.baseline import Baseline
from pytest_gpulayout.baseline_text import baseline_from_text, baseline_to_text
from tests.support.measurements import key, session_of

folder, path, writers, readers, has_flock = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
store, session = BaselineFolder(Path(folder)), session_of(1.0)
if not has_flock:
    def flock(*_): raise OSError(9, "Bad file descriptor")
    fcntl.flock = flock

def write(number):
    def add(text):
        mine = replace(session, recorded=f"2026-11-20T08:00:{number:02}Z")
        stored = Baseline(key()) if text is None else baseline_from_text(text, path)
        return baseline_to_text(replace(stored, sessions=(*stored.sessions, mine)))
    store.update(path, add)

def read(until):
    os.nice(19)  # writers come first
    seen = 0
    while seen < until:
        text = store.read(path)
        if text is not None:
            sessions = json.loads(text)["sessions"]
            assert len(sessions) >= seen, "sessions went away"
            seen = len(sessions)

begin, go = os.pipe()
children = []
for task, argument in [(write, n) for n in range(writers)] + [(read, writers)] * readers:
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(begin, 1)  # returns when the parent closes the other end: all at once
        task(argument)
        os._exit(0)
    children.append(child)
os.close(go)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


def run_script(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.end_to_end
@pytest.mark.parametrize("has_flock", [1, 0])
def test_fifty_processes_lose_nothing_and_readers_never_see_a_part(tmp_path: Path, has_flock: int) -> None:
    run_script(WRITERS, tmp_path, PATH, 50, 1, has_flock)
    text = BaselineFolder(tmp_path).read(PATH)
    assert text is not None
    recorded = [session.recorded for session in baseline_from_text(text, PATH).sessions]
    assert sorted(recorded) == [f"2026-11-20T08:00:{number:02}Z" for number in range(50)]
    assert everything(tmp_path) == ["model", "model/tp2", "model/tp2/h200", PATH]


KILLED = """
import fcntl, itertools, json, os, shutil, signal, sys
from pathlib import Path
from pytest_gpulayout.adapters.baseline_files import BaselineFolder
from pytest_gpulayout.adapters.baseline_lock import Time

root, path, before, after, has_flock = Path(sys.argv[1]), sys.argv[2], *json.loads(sys.argv[3])
STEPS = {os: ["open", "close", "mkdir", "listdir", "write", "fsync", "fchown", "fchmod", "replace", "unlink",
              "rmdir"],
         fcntl: ["flock"]}
calls = itertools.count()

def dying(function, name, deadly, told):
    def step(*arguments, **named):
        number = next(calls)
        if number == deadly and told == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return function(*arguments, **named)
        finally:
            if number == deadly:
                if name == "write":
                    os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)  # the rest was still in memory
                os.kill(os.getpid(), signal.SIGKILL)
    return step

def refuse(*_):
    raise OSError(9, "Bad file descriptor")

def patch(deadly, told):
    if not has_flock:
        fcntl.flock = refuse
    for module, names in STEPS.items():
        for name in names:
            setattr(module, name, dying(getattr(module, name), name, deadly, told))

def next_writer():
    now = [0.0]
    def sleep(seconds): now[0] += seconds
    if not has_flock:
        fcntl.flock = refuse
    store = BaselineFolder(root, Time(lambda: now[0], sleep))
    store.update(path, lambda text: (text or "") + "next")
    return store.read(path)

for deadly in range(1000):
    ends = set()
    for told in ("before", "after"):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        if before is not None:
            BaselineFolder(root).update(path, lambda _: before)
        if os.fork() == 0:
            patch(deadly, told)
            BaselineFolder(root).update(path, lambda _: after)
            os._exit(0)
        ends.add(os.wait()[1])
        store = BaselineFolder(root)
        found, paths = store.read(path), store.paths()
        real, continued = fcntl.flock, next_writer()
        fcntl.flock = real
        files = sorted(str(f.relative_to(root)) for f in root.rglob("*") if f.is_file())
        print(json.dumps([deadly, told, found, paths, continued, files]))
    if ends == {0}:
        break
"""


@pytest.mark.end_to_end
@pytest.mark.parametrize("has_flock", [True, False], ids=["flock", "lock file"])
@pytest.mark.parametrize(
    ("before", "after"),
    [("old" * 999, "new" * 999), (None, "new" * 999), ("old" * 999, None)],
    ids=["replace", "create", "remove"],
)
def test_a_writer_killed_at_any_step_leaves_the_old_text_or_the_new_one(
    tmp_path: Path, before: str | None, after: str | None, has_flock: bool
) -> None:
    printed = run_script(KILLED, tmp_path / "b", PATH, json.dumps([before, after, has_flock]))
    steps = [json.loads(line) for line in printed.splitlines()]
    assert len(steps) > 20
    found = [step[2] for step in steps]
    assert found[0] == before
    assert found[-1] == after
    changed = found.index(after)
    assert found == [before] * changed + [after] * (len(found) - changed)
    for _, _, text, paths, continued, files in steps:
        assert paths == ([] if text is None else [PATH])
        assert continued == (text or "") + "next"
        assert files == [PATH]
