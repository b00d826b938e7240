"""``--gpu-link``, ``--gpu-devices``, ``--gpu-topology`` and machines that are too small."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.suite import Suite

LINKS_AND_SERVER = """
def test_links(gpu_topology):
    gpu_topology.assert_links()

def test_server(vllm_server):
    pass
"""
ONE_BRIDGE = "gpus=4, link='PHB', links={(2, 3): 'NV4'}"


def test_links_that_are_good_enough(suite: Suite) -> None:
    suite.fakes(topology=ONE_BRIDGE)
    suite.write(test_it=LINKS_AND_SERVER)

    result = suite.run("--gpu-layout=tp2", "--gpu-link=nv4")

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["tp2: worst link NV4, vLLM 0.32.0, ready in 1 s"])


def test_link_too_bad_fails_and_starts_no_server(suite: Suite) -> None:
    suite.fakes(topology="gpus=2, link='PHB', name='NVIDIA L40S'")
    suite.write(test_it=LINKS_AND_SERVER)

    result = suite.run("--gpu-layout=tp2", "--gpu-link=pix")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "links of class pix or better are required between GPUs that communicate",
            "  rank 0 - rank 1: PHB (GPU 0 - GPU 1)",
            "  layout tp2 on 2 x NVIDIA L40S (GPU 0, 1), topology from fake",
            "  no choice among the 2 GPUs of this machine was found that satisfies it",
            "  look at the wiring: gpulayout topo; accept it: --gpu-link=any",
        ],
        consecutive=True,
    )
    result.stdout.fnmatch_lines(["  (told in full by test_it.py::test_links*)"])
    result.stdout.fnmatch_lines(["tp2: worst link PHB FAILED"])
    assert suite.events == []


def test_a_bad_choice_of_gpus_is_told_which_would_do(suite: Suite) -> None:
    suite.fakes(topology=ONE_BRIDGE)
    suite.write(test_it=LINKS_AND_SERVER)

    result = suite.run("--gpu-layout=tp2", "--gpu-link=nv4", "--gpu-devices=0,1")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["  these GPUs satisfy it: --gpu-devices=2,3"])


def test_link_of_the_marker_beats_the_option(suite: Suite) -> None:
    suite.fakes(topology="gpus=2, link='PHB'")
    suite.write(
        test_it="""
        import pytest
        @pytest.mark.gpu_layout("tp2", link="nvlink")
        def test_strict(vllm_server): pass
        @pytest.mark.gpu_layout(link="node")
        def test_lax(vllm_server): pass
        """
    )

    result = suite.run("--gpu-layout=tp2", "--gpu-link=pix", "-v")

    result.stdout.fnmatch_lines(["*test_strict* FAILED*", "*test_lax* PASSED*", "links of class nvlink or better*"])


def test_wrong_link_in_a_marker(suite: Suite) -> None:
    suite.write(test_it="import pytest\n@pytest.mark.gpu_layout(link='quick')\ndef test_it(vllm_server): pass")

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["link requirement: expected nvlink, nvN, *, found 'quick'", "*^ column 1"])


def test_unknown_link_is_no_good_link(suite: Suite) -> None:
    suite.fakes(topology="gpus=2, link=None")
    suite.write(test_it=LINKS_AND_SERVER)

    result = suite.run("--gpu-layout=tp2", "--gpu-link=node")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["  rank 0 - rank 1: unknown (GPU 0 - GPU 1)"])


def test_too_few_gpus_fails_and_is_told_in_full_once(suite: Suite) -> None:
    suite.fakes(topology="gpus=1")
    suite.write(test_it=LINKS_AND_SERVER)

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(failed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    headline = "layout tp2 needs 2 GPUs, found 1 (source fake): 0 NVIDIA H200"
    result.stdout.fnmatch_lines(
        [
            headline,
            "  choose a layout that needs at most 1, such as --gpu-layout=tp1, or run on a machine with at least 2 *",
            headline,
            "  (told in full by test_it.py::test_links[[]tp2[]]*)",
        ]
    )
    assert result.stdout.str().count("choose a layout") == 1


def test_machine_without_gpus_is_refused_before_anything_starts(suite: Suite) -> None:
    suite.fakes(topology="error=TopologyError('no NVIDIA driver was found')")
    suite.write(test_it=LINKS_AND_SERVER)

    result = suite.run("--gpu-layout=tp1")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: no NVIDIA driver was found"])
    assert suite.events == []


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("0", "layout tp2 needs exactly 2 GPUs, 1 are given"),
        ("0,0", "2 different GPUs are needed for layout tp2, GPU 0 is given twice"),
        ("0,7", "GPU '7' was asked for, found 0 NVIDIA H200, 1 NVIDIA H200, *"),
    ],
)
def test_devices_that_do_not_fit(suite: Suite, devices: str, message: str) -> None:
    suite.fakes(topology=ONE_BRIDGE)
    suite.write(test_it="def test_it(vllm_server): pass")

    result = suite.run("--gpu-layout=tp2", f"--gpu-devices={devices}")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([message])


@pytest.mark.parametrize("devices", ["3,1", "GPU-00000000-0000-0000-0000-000000000003,1"])
def test_devices_are_used_as_given(suite: Suite, devices: str) -> None:
    suite.fakes(topology=ONE_BRIDGE)
    suite.write(test_it="def test_it(gpu_topology): assert gpu_topology.placement == (3, 1)")

    suite.run("--gpu-layout=tp2", f"--gpu-devices={devices}").assert_outcomes(passed=1)


def test_best_pair_is_chosen(suite: Suite) -> None:
    suite.fakes(topology=ONE_BRIDGE)
    suite.write(test_it="def test_it(gpu_topology): assert gpu_topology.placement == (2, 3)")

    suite.run("--gpu-layout=tp2").assert_outcomes(passed=1)


def test_recorded_topology_is_called_so(suite: Suite) -> None:
    Path("topo.txt").write_text(
        "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tSYS\t0-3\t0\nGPU1\tSYS\t X \t4-7\t1\n"
    )
    suite.write(test_it=LINKS_AND_SERVER)

    result = suite.run("--gpu-layout=tp2", "--gpu-topology=topo.txt", "--gpu-link=node")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "gpu layout: tp2 on cuda, 2 x *, worst link SYS, recorded in topo.txt",
            "  layout tp2 on *, topology from recorded in topo.txt",
            "tp2: worst link SYS (recorded in topo.txt) FAILED",
        ]
    )


def test_recorded_topology_that_is_missing(suite: Suite) -> None:
    suite.write(test_it=LINKS_AND_SERVER)

    result = suite.run("--gpu-layout=tp2", "--gpu-topology=nowhere.txt")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: a recorded topology was expected, found none: No such file or directory"])
