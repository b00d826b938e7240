"""The gate on a real NVIDIA GPU with a real vLLM: run with --run-gpu on such a machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_gpulayout.adapters.nvml import NvmlTopology

pytestmark = pytest.mark.gpu

MAKE_MODEL = Path(__file__).parents[2] / "examples" / "model_repo" / "make_model.py"


def test_nvml_lists_the_gpus_of_this_machine() -> None:
    topology = NvmlTopology().probe()
    assert topology.devices
    assert topology.driver_version
    assert all(device.uuid and device.uuid.startswith("GPU-") and device.memory_bytes for device in topology.devices)


def test_the_whole_gate_at_tp1_records_and_then_judges(tmp_path: Path) -> None:
    model = tmp_path / "tiny-qwen2"
    subprocess.run([sys.executable, str(MAKE_MODEL), str(model)], check=True, timeout=120)
    command = [
        *(sys.executable, "-m", "pytest", "--pyargs", "pytest_gpulayout.gates", "-p", "no:cacheprovider"),
        *("--gpu-layout=tp1", f"--gpu-model={model}", "--gpu-starts=2", "--gpu-results=results.json"),
        "--gpu-vllm-args=--load-format dummy --max-model-len 2048 --gpu-memory-utilization 0.3",
    ]
    for mode, expected in (("new", {"no-baseline"}), ("check", {"pass", "improvement", "inconclusive"})):
        run = subprocess.run(
            [*command, f"--gpu-baseline={mode}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        assert run.returncode == 0, run.stdout
        records = json.loads((tmp_path / "results.json").read_text())["records"]
        assert {record["verdict"] for record in records if record["kind"] == "performance"} <= expected, run.stdout
