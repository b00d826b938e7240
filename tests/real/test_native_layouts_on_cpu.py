"""Native factors on real vLLM, as far as its CPU build computes them: data and expert parallelism.

What it cannot compute is tried on the launcher itself, which refuses nothing: the refusals of the gate are true.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_gpulayout.adapters.cpu_host import CpuTopology
from pytest_gpulayout.adapters.vllm_process import VllmLauncher
from pytest_gpulayout.errors import ServerStartFailed
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.ports import ServerSpec
from tests.real.conftest import VLLM_ARGUMENTS, Gate, make_model
from tests.support.processes import processes_marked

pytestmark = [pytest.mark.real_vllm, pytest.mark.xdist_group("real vllm")]

GATES = ("--pyargs", "pytest_gpulayout.gates", "--gpu-results=results.json")


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with four experts in each layer, two of which a token passes."""
    folder = make_model(tmp_path_factory.mktemp("models") / "tiny-qwen3-moe", heads=4)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 64}
    config |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
    config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_two_engines_of_a_dense_model_run_through_the_gate(make_gate: Callable[[], Gate]) -> None:
    gate = make_gate()

    result = gate.run(
        *GATES, "--gpu-layout=dp2", "--gpu-baseline=new", "--gpu-starts=1", TEST_MARKER=gate.folder.name
    )

    assert result.returncode == 0, result.stdout
    (server,) = gate.records("server")
    assert "-dp2-" in server["system_fingerprint"]
    assert server["server_info"] == {"layout": "dp2", "executor": "mp", "all2all": "allgather_reducescatter"}
    assert (server["moe"], server["api_servers"], sorted(server["rank_pids"])) == (False, 1, ["0", "1"])
    (transport,) = gate.records("transport")
    assert (transport["verdict"], transport["summary"], transport["ok"]) == ("ok", "none needed", True)
    (performance,) = gate.records("performance")
    assert performance["stored"] == "recorded", result.stdout
    assert processes_marked(f"TEST_MARKER={gate.folder.name}") == {}


@dataclass(frozen=True)
class Start:
    """What the launcher is asked for. :param cause: a pattern that follows ``cause:``."""

    layout: str
    model: str
    headline: str
    cause: str


@pytest.mark.parametrize(
    "start",
    [
        Start(
            "tp3",
            "tiny_model",
            "vLLM did not start",
            r"Total number of attention heads \(4\) must be divisible by tensor parallel size \(3\)",
        ),
        Start(
            "tp2dcp2",
            "tiny_model",
            "vLLM did not start",
            r"Decode context parallelism for GQA/MQA requires `--tensor-parallel-size` \(2\) to be greater",
        ),
        Start("pcp2", "tiny_model", "vLLM did not start", "Model Runner V1 does not support: prefill"),
        Start("pp2", "tiny_model", "vLLM loaded", r"AssertionError in gpu_model_runner\.py:\d+, sync_and_gather_"),
        Start(
            "dp2ep",
            "tiny_moe",
            "vLLM loaded",
            r"NotImplementedError in base_device_communicator\.py:\d+, all_gatherv",
        ),
    ],
    ids=lambda start: f"{start.layout}-{start.model}",
)
def test_what_vllm_cannot_do_ends_with_its_own_cause(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    monkeypatch.setenv("TEST_MARKER", tmp_path.name)
    model = request.getfixturevalue(start.model)
    layout = parse_layout(start.layout)
    devices = CpuTopology(layout.ranks, "|".join(["0"] * layout.ranks)).probe().devices
    spec = ServerSpec(layout, str(model), tuple(VLLM_ARGUMENTS.split()), "cpu", devices, sys.executable, 300)

    with pytest.raises(ServerStartFailed) as caught:
        VllmLauncher(tmp_path).launch(spec, lambda _: None)

    headline, cause, *_ = str(caught.value).splitlines()
    assert headline.startswith(start.headline)
    assert re.search(f"^  cause: .*{start.cause}", cause), caught.value
    assert processes_marked(f"TEST_MARKER={tmp_path.name}") == {}
