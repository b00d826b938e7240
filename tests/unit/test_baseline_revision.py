"""Baselines of another revision, read from real git repositories."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pytest_gpulayout.adapters.baseline_revision import read_revision
from pytest_gpulayout.errors import BaselineError
from tests.support.command_line import Run
from tests.support.measurements import key
from tests.support.stored import quiet_baseline, write_baseline

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed: apt-get install git"),
]
PATH = key().path


def git(*arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose first commit has a baseline in a folder of a folder, and whose files are newer."""
    monkeypatch.chdir(tmp_path)
    git("init", "-q", "-b", "main")
    write_baseline(quiet_baseline(2), "ci/gpu-baselines")
    Path("ci/other.json").write_text("{}")
    Path("ci/gpu-baselines/README.md").write_text("read me")
    git("add", ".")
    git("commit", "-q", "-m", "two sessions")
    git("tag", "first")
    write_baseline(quiet_baseline(3), "ci/gpu-baselines")
    return tmp_path


def test_the_files_of_a_revision(repository: Path) -> None:
    before = {file: file.read_bytes() for file in repository.rglob("*") if file.is_file()}
    found = read_revision("first", repository / "ci/gpu-baselines")
    assert list(found) == [PATH]
    assert found[PATH].count('"recorded"') == 2
    assert {file: file.read_bytes() for file in before} == before


def test_a_folder_that_is_gone_or_was_not_there(repository: Path) -> None:
    shutil.rmtree("ci")
    assert list(read_revision("HEAD", repository / "ci/gpu-baselines")) == [PATH]
    assert read_revision("HEAD", repository / "elsewhere") == {}


def test_a_folder_that_is_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    write_baseline(quiet_baseline(2), ".")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    assert list(read_revision("HEAD", tmp_path)) == [PATH]


@pytest.mark.parametrize("revision", ["nothing", "--help", "-q", "HEAD~5", "", "first:ci"])
def test_a_revision_that_is_none(repository: Path, revision: str) -> None:
    with pytest.raises(BaselineError, match="a revision with baselines was required, git says: "):
        read_revision(revision, repository / "ci/gpu-baselines")


def test_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(BaselineError, match=r"git says: .*not a git repository"):
        read_revision("HEAD", tmp_path)


def test_no_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BaselineError, match=r"git says: .*No such file or directory"):
        read_revision("HEAD", repository)


def test_bytes_that_are_no_text(repository: Path) -> None:
    Path("ci/gpu-baselines/bytes.json").write_bytes(b"\xff\xfe")
    git("add", ".")
    git("commit", "-q", "-m", "bytes")
    with pytest.raises(BaselineError, match=r"git says: .*can't decode"):
        read_revision("HEAD", repository / "ci/gpu-baselines")


def test_diff_since(repository: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    ran = run("baseline", "diff", "--since", "main", "--dir", "ci/gpu-baselines", "--exit-code")
    assert (ran.code, ran.err) == (1, "")
    assert ran.out.startswith(f"changed: {PATH}\n  1 session added: 2026-10-03T08:00:00Z\n")
    git("add", ".")
    git("commit", "-q", "-m", "three sessions")
    assert run("baseline", "diff", "--since", "HEAD", "--dir", "ci/gpu-baselines", "--exit-code").code == 0
    ran = run("baseline", "diff", "--since", "nothing", "--dir", "ci/gpu-baselines")
    assert (ran.code, ran.err.startswith("gpulayout: a revision with baselines was required")) == (2, True)


def test_diff_since_a_revision_with_a_file_that_cannot_be_read(
    repository: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    Path("ci/gpu-baselines/corrupt.json").write_text("{")
    git("add", ".")
    git("commit", "-q", "-m", "corrupt")
    ran = run("baseline", "diff", "--since", "HEAD", "--dir", "ci/gpu-baselines")
    assert ran.code == 2
    assert "HEAD:corrupt.json" in ran.err
