"""What a user meets on machines with no GPU, one GPU and eight: the whole plugin on the real NVML adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.native.build import (
    DRIVER_NOT_LOADED,
    FakeGpu,
    FakeMachine,
    FakePair,
    build_fake_nvml,
    fake_nvml_environment,
)

COMMAND = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "pytest_gpulayout.gates"]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def run(library: Path, tmp_path: Path) -> Run:
    """Run the built-in gate on a machine."""

    def run(machine: FakeMachine, *options: str) -> subprocess.CompletedProcess[str]:
        hidden = ("CUDA_VISIBLE_DEVICES", "PYTEST_XDIST_WORKER")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= fake_nvml_environment(library, machine, tmp_path)
        return subprocess.run(
            [*COMMAND, *options],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_no_gpu_ends_before_anything_starts_and_says_what_to_type(run: Run) -> None:
    result = run(FakeMachine(init_error=DRIVER_NOT_LOADED), "--gpu-layout=tp2", "--gpu-model=org/model")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: an NVIDIA GPU was expected, no NVIDIA GPU was found: NVML says" in result.stderr
    assert "--gpu-platform=cpu" in result.stderr
    assert "--gpu-topology=FILE" in result.stderr


def test_too_few_gpus_fail_and_are_never_skipped(run: Run) -> None:
    result = run(FakeMachine(), "--gpu-layout=tp2", "--gpu-model=org/model")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
    assert "layout tp2 needs 2 GPUs, found 1" in result.stdout
    assert "5 failed" in result.stdout
    assert "skipped" not in result.stdout
    assert result.stdout.count("(told in full by") == 4


def test_header_names_devices_link_and_driver(run: Run) -> None:
    pair = FakeMachine(gpus=(FakeGpu(), FakeGpu()), pairs={(0, 1): FakePair(level="SYS", nvlinks=4, p2p={2: 0})})
    result = run(pair, "--gpu-layout=tp2", "--gpu-link=nvlink", "-k", "links")
    assert result.returncode == 0, result.stdout
    assert "gpu layout: tp2 on cuda, 2 x NVIDIA H100 80GB HBM3, worst link NV4, driver 570.86.10" in result.stdout


def test_links_worse_than_required_fail_before_a_server_starts(run: Run) -> None:
    machine = FakeMachine(gpus=(FakeGpu(), FakeGpu()))
    result = run(machine, "--gpu-layout=tp2", "--gpu-link=nvlink", "--gpu-model=org/model")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
    assert "links of class nvlink or better are required between GPUs that communicate" in result.stdout
    assert "SYS" in result.stdout
    assert "5 failed" in result.stdout
