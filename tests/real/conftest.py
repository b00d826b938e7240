"""Real vLLM, CPU build: a tiny model, and pytest runs in processes of their own, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MAKE_MODEL = ROOT / "examples" / "model_repo" / "make_model.py"
VLLM_ARGUMENTS = "--load-format dummy --enforce-eager --max-model-len 2048"
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.support.busy_machine")


def shared_memory(pattern: str = "*") -> set[str]:
    """Names of what is in shared memory now."""
    return {path.name for path in Path("/dev/shm").glob(pattern)}


def make_model(folder: Path, *, heads: int) -> Path:
    """Make a model folder without weights."""
    subprocess.run([sys.executable, str(MAKE_MODEL), str(folder), "--heads", str(heads)], check=True, timeout=120)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny-qwen2", heads=4)


@dataclass(frozen=True)
class Gate:
    """Runs pytest with ``--gpu-platform=cpu`` in a folder of its own."""

    folder: Path
    model: Path

    def command(self, *arguments: str) -> list[str]:
        base = ["--gpu-platform=cpu", f"--gpu-model={self.model}", f"--gpu-vllm-args={VLLM_ARGUMENTS}"]
        return [*PYTEST, *base, *arguments]

    def environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        """Without ``CI``, in which nothing is recorded."""
        left_out = ("PYTEST_", "VLLM_", "CI=")
        kept = {name: value for name, value in os.environ.items() if not f"{name}=".startswith(left_out)}
        return {**kept, **extra}

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(environment),
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def records(self, kind: str) -> list[dict[str, Any]]:
        document = json.loads((self.folder / "results.json").read_text())
        return [record for record in document["records"] if record["kind"] == kind]


@pytest.fixture(scope="session")
def make_gate(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[[], Gate]:
    def make(model: Path = tiny_model) -> Gate:
        return Gate(tmp_path_factory.mktemp("gate"), model)

    return make


def one_core_each() -> str:
    """``VLLM_CPU_OMP_THREADS_BIND`` for two ranks, on one host or on two."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    return f"{first}|{second}"
