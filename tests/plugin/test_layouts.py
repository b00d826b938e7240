"""Native factors through the whole plugin: what runs, what proves it, and what is refused before anything starts.

The second half runs on a machine with four GPUs that is only described (:mod:`tests.plugin.test_gpu_server`): real
processes of the fake vLLM, listed by the fake NVML, and NCCL logs with the communicators that vLLM makes.
"""

from __future__ import annotations

import json

import pytest

from pytest_gpulayout.schemas import validate
from tests.plugin import test_gpu_server as gpu_machine
from tests.plugin.test_gpu_server import NOT_SPEED, RESULTS, Host
from tests.support.suite import GATE, Suite

host = gpu_machine.host
library = gpu_machine.library

PROVED = """
def test_it(vllm_server, transport_report, gpu_layout):
    assert sorted(vllm_server.pids) == list(range(gpu_layout.ranks))
"""


@pytest.mark.parametrize(
    ("layout", "edges"),
    [
        ("pp2", 2),
        ("tp2pp2", 8),
        ("dp2", 0),
        ("dp2tp2", 4),
        ("tp4dcp2", 6),
        ("tp2pcp2", 8),
        ("dp2tp2ep", 10),
    ],
)
def test_layout_is_served_and_proved(suite: Suite, layout: str, edges: int) -> None:
    suite.write(test_it=PROVED)

    result = suite.run(f"--gpu-layout={layout}", "--gpu-results=results.json")

    result.assert_outcomes(passed=1)
    assert suite.events == [f"start {layout} org/tiny", f"stop {layout} org/tiny"]
    document = suite.read_results()
    assert validate(document, "results") == []
    (transport,) = (record for record in document["records"] if record["kind"] == "transport")
    assert (transport["verdict"], len(transport["edges"])) == ("ok", edges)


@pytest.mark.parametrize("layout", ["dp2tp2", "tp2pp2"])
def test_layout_is_measured_and_judged(suite: Suite, layout: str) -> None:
    suite.write(test_it=GATE)

    assert suite.run(f"--gpu-layout={layout}", "--gpu-baseline=new").ret == 0

    (file,) = suite.baselines
    assert file.parts[-3] == layout
    suite.settle()
    suite.run(f"--gpu-layout={layout}").assert_outcomes(passed=1)


def test_worse_links_between_stages_fail(suite: Suite) -> None:
    suite.fakes(topology='gpus=4, link="SYS", links={(0, 1): "NV4", (2, 3): "NV4"}')
    suite.write(test_it=PROVED)

    result = suite.run("--gpu-layout=tp2pp2", "--gpu-link=nvlink")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["  rank 0 - rank 2: SYS (GPU 0 - GPU 2)", "  rank 1 - rank 3: SYS (GPU 1 - GPU 3)"])
    assert suite.events == []
    suite.run("--gpu-layout=dp2tp2", "--gpu-link=nvlink").assert_outcomes(passed=1)  # its engines do not talk


@pytest.mark.parametrize(
    ("layout", "platform", "reason", "instead"),
    [
        (
            "tp2x2@2",
            "cuda",
            "replicas (xN) are started on one host; a server over nodes (@N) is one server",
            "tp2x2",
        ),
        ("pp2", "cpu", "vLLM's CPU build (0.32) cannot compute it (pp: *)", "tp1"),
        ("tp4dcp2", "cpu", "vLLM's CPU build (0.32) cannot compute it (dcp: *)", "tp4"),
    ],
)
def test_layout_that_cannot_be_started(suite: Suite, layout: str, platform: str, reason: str, instead: str) -> None:
    suite.write(test_it="def test_it(vllm_server): pass")

    result = suite.run(f"--gpu-layout={layout}", f"--gpu-platform={platform}")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            f"*a layout that this version can start was required, found {layout}",
            f"*  {reason}",
            f"*  try --gpu-layout={instead}",
        ]
    )
    assert suite.events == []


def model_of(suite: Suite, **config: object) -> str:
    folder = suite.pytester.mkdir("model")
    (folder / "config.json").write_text(json.dumps(config))
    return f"--gpu-model={folder}"


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ("dp2ep", "ep spreads experts over ranks, and the model has none"),
        ("pp4", "4 pipeline stages for a model of 2 layers: each holds one at least"),
    ],
)
def test_layout_that_does_not_fit_the_model_is_refused_before_anything_starts(
    suite: Suite, layout: str, reason: str
) -> None:
    suite.model = None
    suite.write(test_it="def test_it(vllm_server): pass")

    result = suite.run(f"--gpu-layout={layout}", model_of(suite, num_hidden_layers=2))

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [f"*a layout that fits the model was required, found {layout}", f"  {reason}", "  in */model/config.json"]
    )
    assert suite.events == []


def test_engines_of_a_model_with_experts_get_the_pair_with_nvlink(suite: Suite) -> None:
    suite.model = None
    suite.fakes(topology='gpus=4, link="SYS", links={(2, 3): "NV4"}')
    suite.write(test_it="def test_it(gpu_topology): print('placed on', gpu_topology.placement)")

    dense = suite.run("--gpu-layout=dp2", "-s", "--gpu-model=org/dense")
    experts = suite.run("--gpu-layout=dp2", "-s", model_of(suite, num_hidden_layers=2, num_experts=8))

    dense.stdout.fnmatch_lines(["*placed on (0, 1)"])
    experts.stdout.fnmatch_lines(["*placed on (2, 3)"])


WITH_EXPERTS = """
from dataclasses import replace

class FakeServerLauncher(FakeServerLauncher):
    def launch(self, spec, progress):
        server = super().launch(spec, progress)
        server.proof = replace(server.proof, moe=True)
        return server
"""


def test_links_between_engines_that_turn_out_to_talk_are_judged_then(suite: Suite) -> None:
    suite.write(test_it="def test_it(vllm_server): pass")
    suite.fakes(topology='gpus=2, link="SYS"')
    suite.run("--gpu-layout=dp2", "--gpu-link=nvlink").assert_outcomes(passed=1)

    suite.fakes(topology='gpus=2, link="SYS"', more=WITH_EXPERTS)
    result = suite.run("--gpu-layout=dp2", "--gpu-link=nvlink")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["  rank 0 - rank 1: SYS (GPU 0 - GPU 1)", "dp2: worst link SYS FAILED*"])


def test_number_of_front_ends_is_not_the_users(suite: Suite) -> None:
    suite.write(test_it="def test_it(vllm_server): pass")

    result = suite.run("--gpu-layout=dp2", "--gpu-vllm-args=--api-server-count 2")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["*--api-server-count is set by pytest-gpulayout; use nothing: one front end answers"]
    )


# -- on a machine with GPUs that is only described -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "moe", "transport"),
    [
        ("tp2pp2", False, "P2P/CUMEM x16"),
        ("dp2tp2", False, "P2P/CUMEM x8"),
        ("dp4", False, "none needed"),
        ("dp2tp2", True, "P2P/CUMEM x24"),
        ("dp2tp2ep", True, "P2P/CUMEM x24"),
        ("tp4dcp2", False, "P2P/CUMEM x16"),
        ("tp2pcp2dcp4", False, "P2P/CUMEM x24"),
    ],
)
def test_gate_proves_every_rank_and_group(host: Host, layout: str, moe: bool, transport: str) -> None:
    code, text = host.run(f"--gpu-layout={layout}", RESULTS, *NOT_SPEED, moe=moe, server_info={})

    assert code == 0, text
    assert f"transport {transport}, vLLM 0.32.0, ready in " in text
    assert "  processes: each rank on its GPU and no other (process list)\n" in text
    found, server = host.record("processes"), host.record("server")
    assert {rank["uuid"] for rank in found["ranks"]} == set(host.uuids)
    assert {str(rank["rank"]): rank["pid"] for rank in found["ranks"]} == server["rank_pids"]
    assert (server["moe"], server["api_servers"]) == (moe and "dp" in layout, 1)
    assert server["server_info"]["layout"] == layout


def test_two_engines_on_one_gpu_are_found(host: Host) -> None:
    """What a data-parallel server does whose second engine ignores which GPUs are its own."""
    contexts = {"1": host.uuids[:1]}

    code, text = host.run("--gpu-layout=dp2", "--gpu-devices=0,1", RESULTS, *NOT_SPEED, contexts=contexts)

    pid = host.record("server")["rank_pids"]["1"]
    gpus = [f"GPU {index} ({name})" for index, name in enumerate(host.uuids)]
    assert code == pytest.ExitCode.TESTS_FAILED, text
    assert [line for line in text.splitlines() if line.startswith("  found: ")] == [
        f"  found: rank 1 (pid {pid} VLLM::Worker) has no context on {gpus[1]}",
        f"  found: rank 1 (pid {pid} VLLM::Worker) holds a context on {gpus[0]}, 16.0 GiB; its own is {gpus[1]}",
    ]


def test_tp1_on_a_machine_with_more_gpus_holds_no_context_elsewhere(host: Host) -> None:
    code, text = host.run("--gpu-layout=tp1", *NOT_SPEED)
    assert code == 0, text
    assert "  processes: each rank on its GPU and no other (process list)\n" in text

    contexts = {"0": [host.uuids[0], host.uuids[3]]}
    code, text = host.run("--gpu-layout=tp1", "--gpu-devices=0", *NOT_SPEED, contexts=contexts)

    assert code == pytest.ExitCode.TESTS_FAILED, text
    assert f" holds a context on GPU 3 ({host.uuids[3]}), 512 MiB; its own is GPU 0 ({host.uuids[0]})\n" in text


def test_stage_that_is_not_connected_is_not_proved(host: Host) -> None:
    code, text = host.run("--gpu-layout=pp2", *NOT_SPEED, nccl=None)

    assert code == pytest.ExitCode.TESTS_FAILED, text
    assert "  found: no-evidence, no evidence\n" in text
