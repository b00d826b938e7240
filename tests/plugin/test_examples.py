"""The example repository runs as it is, against a process that behaves like vLLM."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import use_fake_vllm

pytestmark = pytest.mark.end_to_end

EXAMPLE = Path(__file__).parents[2] / "examples" / "model_repo"


def test_the_model_repository_records_and_then_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_vllm(monkeypatch, ttft_ms=5, itl_ms=1)
    repository = tmp_path / "model_repo"
    shutil.copytree(EXAMPLE, repository)
    (repository / "model").mkdir()
    (repository / "model" / "config.json").write_text("{}")
    options = [
        "--gpu-layout=tp1,tp2",
        "--gpu-starts=2",
        "--gpu-platform=cpu",
        "--gpu-model=./model",
        "-p",
        "no:cacheprovider",
        "-p",
        "unwatched",
    ]
    for mode, expected in (
        ("new", "7 passed, 1 deselected, 2 baseline recorded"),
        ("check", "9 passed, 1 deselected"),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "pytest", *options, f"--gpu-baseline={mode}"],
            cwd=repository,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stdout
        assert expected in result.stdout
    assert len(list((repository / "gpu-baselines").rglob("chat.json"))) == 2
