"""Options and ini keys as such: texts, ini values, wrong values."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pytest_gpulayout.options import OPTIONS
from tests.support.running_vllm import RunningVllm
from tests.support.suite import Suite

ONE_TEST = "def test_it(gpu_session): print('settings', gpu_session.settings)"

INI_VALUES = {
    "layout": ("tp2", "layouts=(Layout(tp=2,*"),
    "model": ("org/other", "model='org/other'*"),
    "vllm-args": ("--max-model-len 'a b'", "vllm_args=('--max-model-len', 'a b')*"),
    "platform": ("cpu", "platform='cpu'*"),
    "link": ("nv4", "link=LinkRequirement(text='nv4'*"),
    "devices": ("1, 0", "devices=('1', '0')*"),
    "topology": ("topology.txt", "topology_file=PosixPath('/*/topology.txt')*"),
    "nodes": ("a, b", "nodes=NodeChoice(names=('a', 'b')*"),
    "node-command": ("docker exec {node}", "nodes=NodeChoice(*command=('docker', 'exec', '{node}')*"),
    "node-python": ("/opt/python", "nodes=NodeChoice(*python='/opt/python'*"),
    "master-addr": ("192.0.2.1", "nodes=NodeChoice(*master_addr='192.0.2.1'*"),
    "transport": ("p2p", "*families=frozenset({<TransportFamily.P2P: 'P2P'>})*"),
    "workload": ("smoke", "workload=Workload(name='smoke'*"),
    "baseline": ("off", "baseline_mode='off'*"),
    "baseline-dir": ("memory://numbers", "baseline_dir='memory://numbers'*"),
    "write-in-ci": ("yes", "may_write=True*"),
    "tolerance": ("p99_itl_ms=20%", "*Tolerance(metric='p99_itl_ms', fraction=0.2)*"),
    "base": (sys.executable, f"base=BaseChoice(name='{sys.executable}', python='{sys.executable}'*"),
    "base-vllm-args": ("--seed 'a b'", "base=BaseChoice(name=*vllm_args=('--seed', 'a b')*"),
    "starts": ("5", "starts=5*"),
    "server-url": ("URL", "attach=AttachChoice(url='http://127.0.0.1:*', nccl_logs='')*"),
    "nccl-log": ("logs/nccl.*", "attach=AttachChoice(url='http://*', nccl_logs='/*/logs/nccl.[*]')*"),
    "budget": ("12.5", "budget_s=12.5*"),
    "inconclusive": ("fail", "inconclusive='fail'*"),
    "hour-cost": ("2.5", "hour_cost_usd=2.5*"),
    "results": ("out/results.json", "results_file=PosixPath('/*/out/results.json')*"),
    "start-timeout": ("30", "start_timeout_s=30.0*"),
    "wait": ("600", "wait_s=600.0)*"),
}


def test_every_option_has_a_row_here() -> None:
    assert list(INI_VALUES) == [option.name for option in OPTIONS]


@pytest.mark.parametrize("name", INI_VALUES)
def test_ini_key_is_the_option_s_default(suite: Suite, name: str) -> None:
    value, shown = INI_VALUES[name]
    suite.model = None
    suite.write(test_it=ONE_TEST)
    Path("topology.txt").write_text("\tGPU0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \t0-3\t0\n")
    layout = [] if name == "layout" else ["gpulayout_layout = tp1"]
    with RunningVllm() as vllm:
        server = [f"gpulayout_server_url = {vllm.url}"] if name == "nccl-log" else []
        suite.ini(*layout, *server, f"gpulayout_{name.replace('-', '_')} = {value.replace('URL', vllm.url)}")

        result = suite.run("-s", "--strict-config", "--strict-markers")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"*settings Settings(*{shown}"])


def test_option_beats_ini_key(suite: Suite) -> None:
    suite.write(test_it="def test_it(gpu_layout): pass")
    suite.ini("gpulayout_layout = tp4")

    suite.run("--gpu-layout=tp2", "-v").stdout.fnmatch_lines(["*test_it[[]tp2[]] PASSED*"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("link", "nvx", "link requirement: expected a number of NVLinks after 'nv', such as nv4"),
        ("link", "fast", "link requirement: expected nvlink, nvN, pix, pxb, phb, node or any, found 'fast'"),
        ("transport", "p2p,carrier", "transport: expected one of *, found 'carrier'"),
        ("tolerance", "median_tpot=5%", "tolerance: unknown metric 'median_tpot', did you mean median_tpot_ms*"),
        ("tolerance", "median_tpot_ms=0", "tolerance: median_tpot_ms needs above 0 %*"),
        ("tolerance", "median_tpot_ms", "tolerance: expected METRIC=5% or METRIC=0.05, found 'median_tpot_ms'"),
        ("workload", "smokey", "a workload must be a built-in one, or one of your own"),
        ("starts", "0", "a whole number above 0 was expected, found '0'"),
        ("starts", "2.5", "a whole number above 0 was expected, found '2.5'"),
        ("budget", "-1", "a number above 0 was expected, found '-1'"),
        ("budget", "inf", "a number above 0 was expected, found 'inf'"),
        ("start-timeout", "soon", "a number above 0 was expected, found 'soon'"),
        ("hour-cost", "0", "a number above 0 was expected, found '0'"),
        ("hour-cost", "1,50", "a number above 0 was expected, found '1,50'"),
        ("wait", "-1", "a number not below 0 was expected, found '-1'"),
        ("wait", "long", "a number not below 0 was expected, found 'long'"),
        ("vllm-args", "--port 80", "--port is set by pytest-gpulayout; use nothing: a free port is chosen"),
        ("vllm-args", "--max-model-len '2", "No closing quotation"),
        ("model", "/nowhere/at-all", "a model folder was required, found nothing"),
        ("layout", "tp2;tp4", "layout: expected a factor (tpN, ppN, dpN, pcpN, dcpN) or ep, found ';tp4'"),
    ],
)
@pytest.mark.parametrize("origin", ["option", "ini"])
def test_wrong_value_names_option_and_ini_key(
    suite: Suite, option: str, value: str, message: str, origin: str
) -> None:
    suite.model = None
    suite.write(test_it=ONE_TEST)
    key = "gpulayout_" + option.replace("-", "_")
    layout = [] if option == "layout" else ["--gpu-layout=tp1"]
    if origin == "ini":
        suite.ini(f"{key} = {value}")
        result = suite.run(*layout)
    else:
        result = suite.run(*layout, f"--gpu-{option}={value}")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --gpu-{option} (ini: {key}): {message}"])


@pytest.mark.parametrize("name", ["platform", "baseline", "write-in-ci", "inconclusive"])
def test_choices_hold_on_the_command_line_and_in_the_ini_file(suite: Suite, name: str) -> None:
    suite.write(test_it=ONE_TEST)

    result = suite.run("--gpu-layout=tp1", f"--gpu-{name}=rocm")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*argument --gpu-{name}: invalid choice: 'rocm'*"])

    key = f"gpulayout_{name.replace('-', '_')}"
    suite.ini(f"{key} = rocm")
    result = suite.run("--gpu-layout=tp1")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --gpu-{name} (ini: {key}): one of * was expected, found 'rocm'"])


OWN_WORKLOAD = """
[tool.pytest-gpulayout.workloads.mine]
output_tokens = 8
requests = 6
rate = inf
prompts_file = "texts/mine.txt"
"""


def own_workload(suite: Suite, text: str = OWN_WORKLOAD) -> None:
    suite.write(test_it=ONE_TEST)
    Path("pyproject.toml").write_text(text)
    Path("texts").mkdir()
    Path("texts/mine.txt").write_text("Why?\nHow?\n")


def test_workload_of_pyproject_is_found_by_name(suite: Suite) -> None:
    own_workload(suite)

    result = suite.run("--gpu-layout=tp1", "--gpu-workload=mine", "-s")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["*settings Settings(*workload=Workload(name='mine', output_tokens=8,*'Why?', 'How?'*"]
    )


def test_unknown_workload_lists_those_of_pyproject_too(suite: Suite) -> None:
    own_workload(suite)

    result = suite.run("--gpu-layout=tp1", "--gpu-workload=yours")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["  use one of: smoke, *, single-image-latency, mine; or describe your own: *"])


def test_a_workload_of_pyproject_that_is_wrong_is_never_passed_over(suite: Suite) -> None:
    own_workload(suite, OWN_WORKLOAD.replace("requests = 6", "request = 6"))

    result = suite.run("--gpu-layout=tp1")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: --gpu-workload (ini: gpulayout_workload): *", "*unknown key 'request'*", "*pyproject.toml)"]
    )


def test_markers_and_measure_know_the_workloads_of_pyproject(suite: Suite) -> None:
    own_workload(suite)
    suite.write(
        test_it="""
        import pytest

        @pytest.mark.gpu_workload("mine")
        def test_marker(measure):
            assert measure().workload.name == "mine"

        def test_fixture(measure):
            assert measure("mine").workload.name == "mine"
        """
    )

    suite.run("--gpu-layout=tp1").assert_outcomes(passed=2)


def test_workload_file_lies_beside_where_it_is_named(suite: Suite) -> None:
    suite.write(test_it=ONE_TEST)
    description = '{"input_tokens": 5, "output_tokens": 3, "concurrency": 1, "requests": 2}'
    Path("below").mkdir()
    Path("below/typed.json").write_text(description)
    Path("ini.json").write_text(description)
    suite.ini("gpulayout_workload = ini.json")

    typed = suite.run("--gpu-layout=tp1", "--gpu-workload=below/typed.json", "-s")
    by_ini = suite.run("--gpu-layout=tp1", "-s")

    typed.stdout.fnmatch_lines(["*settings Settings(*workload=Workload(name='typed'*"])
    by_ini.stdout.fnmatch_lines(["*settings Settings(*workload=Workload(name='ini'*"])


def test_reserved_argument_in_any_spelling(suite: Suite) -> None:
    suite.write(test_it=ONE_TEST)

    for argument in ("-tp 2", "--tensor-parallel-size=2", "--tensor_parallel_size 2"):
        result = suite.run("--gpu-layout=tp1", f"--gpu-vllm-args={argument}")

        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["*is set by pytest-gpulayout; use --gpu-layout"])


def test_help_lists_all_options_in_one_group(suite: Suite) -> None:
    text = " ".join(suite.run("--help").stdout.str().split())

    group = text[text.index("gpu layout:") :]
    for option in OPTIONS:
        assert f"{option.flag}=" in group
        assert f"{option.ini} (string): default of {option.flag}" in group


def test_markers_are_registered_with_their_signature(suite: Suite) -> None:
    suite.run("--markers").stdout.fnmatch_lines(
        [
            "@pytest.mark.gpu_layout(*specs, link=None): *",
            "@pytest.mark.gpu_model(id, **vllm_args): *",
            "@pytest.mark.gpu_workload(name_or_dict): *",
        ]
    )


def test_fixtures_say_what_they_give(suite: Suite) -> None:
    result = suite.run("--fixtures")

    for name in ("gpu_layout", "gpu_topology", "vllm_server", "transport_report", "measure", "perf_gate"):
        result.stdout.re_match_lines(
            [rf"{name}( \[session scope\])? -- .*plugin\.py:\d+", r"    (?!no docstring).+"], consecutive=True
        )


def test_strict_markers_and_config(suite: Suite) -> None:
    suite.ini("addopts = --strict-markers --strict-config", "gpulayout_link = nvlink")
    suite.write(
        test_it="""
        import pytest
        @pytest.mark.gpu_layout("tp2", link="pix")
        @pytest.mark.gpu_model("org/other", max_model_len=64)
        @pytest.mark.gpu_workload("smoke")
        def test_it(gpu_layout): pass
        """
    )

    suite.run("--gpu-layout=tp2").assert_outcomes(passed=1)


def test_misspelt_ini_key_is_found_by_strict_config(suite: Suite) -> None:
    suite.ini("addopts = --strict-config", "gpulayout_baselines = here")
    suite.write(test_it="def test_it(): pass")

    result = suite.run()

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: Unknown config option: gpulayout_baselines"])
