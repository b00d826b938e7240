"""``--gpu-model``, ``--gpu-vllm-args``, the marker ``gpu_model``, and the fixtures behind them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.suite import Suite

SERVER = "def test_it(vllm_server): print('command', *vllm_server.server.command)"


def test_missing_model_is_told_in_full_once(suite: Suite) -> None:
    suite.model = None
    suite.write(test_it="def test_a(vllm_server): pass\ndef test_b(vllm_server): pass")

    result = suite.run("--gpu-layout=tp1")

    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(
        [
            "a model to serve is required, found none",
            "  in the command line, the ini file and the markers",
            "  name one: --gpu-model=ID_OR_PATH, or @pytest.mark.gpu_model(...)",
            "a model to serve is required, found none",
            "  (told in full by test_it.py::test_a[[]tp1[]]*",
        ]
    )
    assert suite.events == []


def test_model_folder_without_config(suite: Suite) -> None:
    Path("model").mkdir()
    suite.model = "./model"
    suite.write(test_it=SERVER)

    result = suite.run("--gpu-layout=tp1")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [
            "ERROR: --gpu-model (ini: gpulayout_model): a model folder with a config.json was required, found none",
            "  in /*/model",
        ]
    )


def test_model_folder(suite: Suite) -> None:
    Path("model").mkdir()
    Path("model", "config.json").write_text("{}")
    suite.model = "./model"
    suite.write(test_it=SERVER)

    suite.run("--gpu-layout=tp1").assert_outcomes(passed=1)

    assert suite.events == ["start tp1 model", "stop tp1 model"]


def test_arguments_of_options_and_marker_reach_the_command(suite: Suite) -> None:
    suite.write(
        test_it=f"""
import pytest
@pytest.mark.gpu_model("org/other", max_num_seqs=8, enforce_eager=True, enable_prefix_caching=False,
                       override_config={{"a": 1}}, allowed=["x", "y"], dtype="bfloat16")
{SERVER}
"""
    )

    result = suite.run("--gpu-layout=tp2", "--gpu-vllm-args=--seed 1", "-s")

    result.stdout.fnmatch_lines(
        [
            "*command python --model org/other --tensor-parallel-size 2 --seed 1 --max-num-seqs 8 --enforce-eager "
            '--no-enable-prefix-caching --override-config {"a": 1} --allowed x y --dtype bfloat16'
        ]
    )


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("'org/m', tensor_parallel_size=2", "marker gpu_model: --tensor-parallel-size is set by *; use --gpu-layout"),
        ("'org/m', port=80", "marker gpu_model: --port is set by pytest-gpulayout; use nothing: *"),
        ("'/nowhere/at-all'", "marker gpu_model: a model folder was required, found nothing"),
        ("max_model_len=64", "marker gpu_model: one model is expected, found none"),
        ("'org/a', 'org/b'", "marker gpu_model: one model is expected, found 2"),
    ],
)
def test_wrong_marker(suite: Suite, marker: str, message: str) -> None:
    suite.write(test_it=f"import pytest\n@pytest.mark.gpu_model({marker})\n{SERVER}")

    result = suite.run("--gpu-layout=tp1")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([message])
    result.stdout.no_fnmatch_line("*Traceback*")
    assert suite.events == []


def test_nearest_marker_wins(suite: Suite) -> None:
    suite.write(
        test_it="""
        import pytest
        pytestmark = pytest.mark.gpu_model("org/of-the-module")
        def test_a(vllm_server): assert vllm_server.model == "org/of-the-module"
        @pytest.mark.gpu_model("org/of-the-test")
        def test_b(vllm_server): assert vllm_server.model == "org/of-the-test"
        """
    )

    suite.run("--gpu-layout=tp1").assert_outcomes(passed=2)


def test_fixtures_can_be_overridden(suite: Suite) -> None:
    suite.fakes(
        more="""
from pytest_gpulayout import ModelSpec, Workload

@pytest.fixture
def gpu_model():
    return ModelSpec("org/by-code", ("--seed", "7"))

@pytest.fixture
def gpu_vllm_args(gpu_vllm_args):
    return (*gpu_vllm_args, "--enforce-eager")

@pytest.fixture
def gpu_workload():
    return Workload(name="mine", input_tokens=8, output_tokens=4, concurrency=1, requests=2, batches=2)

@pytest.fixture
def gpu_tolerances():
    from pytest_gpulayout.tolerance import Tolerance
    return {"median_ttft_ms": Tolerance("median_ttft_ms", 0.5)}
"""
    )
    suite.write(
        test_it="""
        def test_it(vllm_server, measure, perf_gate, gpu_tolerances):
            measurement = measure()
            assert measurement.workload.name == "mine"
            assert len(measurement.runs[0].requests) == 4
            perf_gate(measurement)
        """
    )
    suite.run("--gpu-layout=tp1", "--gpu-baseline=new", "--gpu-starts=1").assert_outcomes()

    result = suite.run("--gpu-layout=tp1", "--gpu-vllm-args=--seed 1")

    result.assert_outcomes(passed=1)
    assert suite.events[-1] == "stop tp1 org/by-code --seed 1 --enforce-eager --seed 7"
    result.stdout.fnmatch_lines(["  mine: pass, * server start* [[]test_it.py::test_it[[]tp1[]][]]"])
    result.stdout.re_match_lines([r"\s+median_ttft_ms .* pass", r"\s+request_throughput .* not gated"])


def test_wrong_type_of_workload_marker(suite: Suite) -> None:
    suite.write(
        test_it="""
        import pytest
        @pytest.mark.gpu_workload()
        def test_none(measure): measure()
        @pytest.mark.gpu_workload("smokey")
        def test_unknown(measure): measure()
        @pytest.mark.gpu_workload({"input_tokens": 4})
        def test_incomplete(measure): measure()
        def test_argument(measure): measure("smokey")
        """
    )

    result = suite.run("--gpu-layout=tp1")

    result.assert_outcomes(errors=3, failed=1)
    result.stdout.fnmatch_lines(
        [
            "marker gpu_workload: one workload is expected, found none",
            "a workload must be a built-in one, or one of your own",
            "*use one of: smoke*",
            "a workload must follow its schema",
            "*no key 'output_tokens'; it has no default",
        ]
    )
