from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_gpulayout.adapters.baseline_files import BaselineFolder, RemoteBaselines, open_baselines
from pytest_gpulayout.errors import BaselineError
from pytest_gpulayout.ports import BaselineStore

PATH = "model/tp2/h200/smoke.json"
ESCAPES = ["../x.json", "a/../../x.json", "/etc/x.json"]

WRITE = """
import os, signal, sys
from pathlib import Path
from pytest_gpulayout.adapters.baseline_files import BaselineFolder
if sys.argv[2] == "killed":
    os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)  # all is written, and nothing renamed
BaselineFolder(Path(sys.argv[1])).write(sys.argv[3], sys.argv[4] * 200_000)
"""


@pytest.fixture(params=["folder", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    places = {
        "folder": str(tmp_path / "b"),
        "file": f"file://{tmp_path}/b",
        "memory": f"memory://{uuid.uuid4().hex}/b",
    }
    return places[request.param]


def writer(folder: Path, how: str, text: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITE, str(folder), how, PATH, text])


# -- any store -------------------------------------------------------------------------------------------------------


def test_store_keeps_texts_under_paths(place: str) -> None:
    store = open_baselines(place)
    assert store.read(PATH) is None
    assert list(store.paths()) == []
    store.write(PATH, "eins ü\n")
    store.write("a/b.json", "{}")
    store.write(PATH, "zwei\n")
    assert store.read(PATH) == "zwei\n"
    assert list(store.paths()) == ["a/b.json", PATH]


def test_another_store_of_the_place_sees_them(place: str) -> None:
    open_baselines(place).write(PATH, "ü")
    assert open_baselines(place + "/").read(PATH) == "ü"


@pytest.mark.parametrize("path", ESCAPES)
@pytest.mark.parametrize("use", [lambda store, path: store.read(path), lambda store, path: store.write(path, "x")])
def test_paths_stay_inside(place: str, path: str, use: Callable[[BaselineStore, str], object]) -> None:
    store = open_baselines(place)
    with pytest.raises(BaselineError) as caught:
        use(store, path)
    assert str(caught.value) == f"a baseline must lie inside {store.root}, found the path {path!r}"


def test_texts_are_utf8_whatever_the_locale_is(place: str) -> None:
    store = open_baselines(place)
    store.write(PATH, "µs ≤ 5 %")
    assert store.read(PATH) == "µs ≤ 5 %"


# -- folders ---------------------------------------------------------------------------------------------------------


def test_kinds_of_places(tmp_path: Path) -> None:
    assert isinstance(open_baselines("gpu-baselines"), BaselineFolder)
    assert isinstance(open_baselines(f"file://{tmp_path}"), BaselineFolder)
    assert isinstance(open_baselines("memory://b"), RemoteBaselines)


def test_links_do_not_lead_outside(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "b" / "model").symlink_to(tmp_path / "outside")
    with pytest.raises(BaselineError, match="must lie inside"):
        BaselineFolder(tmp_path / "b").write("model/x.json", "x")


def test_writer_killed_in_the_middle_leaves_the_old_text(tmp_path: Path) -> None:
    store = BaselineFolder(tmp_path)
    store.write(PATH, "old")
    assert writer(tmp_path, "killed", "new").wait(20) == -9
    assert store.read(PATH) == "old"
    assert store.paths() == [PATH]


def test_writers_at_the_same_time_leave_one_whole_text(tmp_path: Path) -> None:
    writers = [writer(tmp_path, "whole", letter) for letter in "abcd"]
    store, seen = BaselineFolder(tmp_path), set()
    while any(process.poll() is None for process in writers):
        seen.add(store.read(PATH))
    seen.add(store.read(PATH))
    assert [process.returncode for process in writers] == [0] * 4
    assert {text for text in seen if text is not None} <= {letter * 200_000 for letter in "abcd"}
    assert os.listdir(tmp_path / "model/tp2/h200") == ["smoke.json"]


def test_failed_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(BaselineError) as caught:
        BaselineFolder(tmp_path).write("a/x.json", "text")
    assert str(caught.value).splitlines() == [
        "the baseline could not be stored: [Errno 28] No space left on device",
        f"  in {tmp_path}/a/x.json",
        "  name a folder that can be written to: --gpu-baseline-dir=DIR",
    ]
    assert os.listdir(tmp_path / "a") == []


def test_others_may_read_what_was_stored(tmp_path: Path) -> None:
    BaselineFolder(tmp_path).write("x.json", "text")
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o644


def test_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("")
    store = BaselineFolder(tmp_path / "b")
    with pytest.raises(BaselineError, match="could not be stored"):
        store.write("x.json", "text")
    with pytest.raises(BaselineError, match="must be a readable text file"):
        store.read("x.json")


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BaselineError) as caught:
        BaselineFolder(tmp_path).read("x.json")
    first, where, advice = str(caught.value).splitlines()
    assert first.startswith("a baseline must be a readable text file, found: 'utf-8' codec can't decode")
    assert where == f"  in {tmp_path}/x.json"
    assert advice == "  restore it (git checkout), or record it again: --gpu-baseline=update"
    assert caught.value.path == f"{tmp_path}/x.json"


# -- URLs ------------------------------------------------------------------------------------------------------------


def test_unknown_protocol() -> None:
    with pytest.raises(BaselineError) as caught:
        open_baselines("nosuch://bucket/baselines")
    first, where, advice = str(caught.value).splitlines()
    assert first.startswith("a folder or an fsspec URL was required for baselines, found nosuch://bucket/baselines: ")
    assert "nosuch" in first.rpartition(": ")[2]
    assert where == "  in --gpu-baseline-dir"
    assert advice == "  install what the URL needs, e.g. pip install fsspec s3fs"


def test_remote_object_that_is_no_text() -> None:
    store = RemoteBaselines(f"memory://{uuid.uuid4().hex}")
    store._files.pipe_file(f"{store._folder}/x.json", b"\xff\xfe")
    with pytest.raises(BaselineError) as caught:
        store.read("x.json")
    first, where, advice = str(caught.value).splitlines()
    assert first.startswith("a baseline must be readable text, found: 'utf-8' codec can't decode")
    assert where == f"  in {store.root}/x.json"
    assert advice == "  check the access to it, or record it again: --gpu-baseline=update"


def test_remote_place_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Forbidden")

    store = RemoteBaselines(f"memory://{uuid.uuid4().hex}")
    monkeypatch.setattr(type(store._files), "pipe_file", refuse)
    with pytest.raises(
        BaselineError, match=r"could not be stored: Forbidden\n  in memory://.*/x\.json\n  name a place"
    ):
        store.write("x.json", "text")
