from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_gpulayout.adapters import numa_binding
from pytest_gpulayout.adapters.numa_binding import Binding, bind_server, cpus_under_numactl, plan_binding
from pytest_gpulayout.topology import Device
from tests.support.processes import server_spec

# Two sockets of 14 cores with two threads each; a GPU on the first, a GPU on the second.
FIRST = frozenset({*range(14), *range(28, 42)})
SECOND = frozenset(range(56)) - FIRST
NODES = dict.fromkeys(FIRST, 0) | dict.fromkeys(SECOND, 1)
NEAR_FIRST = Device(0, numa_node=0, cpu_affinity="0-13,28-41")
NEAR_SECOND = Device(4, numa_node=1, cpu_affinity="14-27,42-55")


def numactl(node: int) -> frozenset[int] | None:
    return {0: FIRST, 1: SECOND}.get(node)


def plan(
    *devices: Device,
    allowed: frozenset[int] = FIRST | SECOND,
    nodes: Mapping[int, int] = NODES,
    has_flag: bool = True,
    numactl: Callable[[int], frozenset[int] | None] = numactl,
    arguments: tuple[str, ...] = (),
) -> Binding:
    return plan_binding(
        devices,
        allowed,
        node_of_cpu=nodes,
        has_flag=has_flag,
        cpus_under_numactl=numactl,
        arguments=arguments,
    )


# -- the CPUs of the whole server ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (NEAR_FIRST, "CPUs 0-13,28-41 (NUMA node 0)"),
        (replace(NEAR_FIRST, numa_node=None), "CPUs 0-13,28-41"),
        (replace(NEAR_FIRST, numa_node="0-1"), "CPUs 0-13,28-41 (NUMA nodes 0-1)"),
        (replace(NEAR_FIRST, cpu_affinity="0,2,4"), "CPUs 0,2,4 (NUMA node 0)"),
        (replace(NEAR_FIRST, cpu_affinity="0-3,900"), "CPUs 0-3 (NUMA node 0)"),
        (replace(NEAR_FIRST, cpu_affinity=None), "not bound: the CPUs of GPU 0 are not known"),
        (replace(NEAR_FIRST, cpu_affinity=""), "not bound: the CPUs of GPU 0 are not known"),
        (replace(NEAR_FIRST, cpu_affinity="N/A"), "not bound: the CPUs of GPU 0 are not known"),
        (replace(NEAR_FIRST, cpu_affinity="0-55"), "not bound: all CPUs that may be used (0-55) are near GPU 0"),
        (
            replace(NEAR_FIRST, cpu_affinity="64-71"),
            "not bound: only CPUs 0-55 may be used, GPU 0 is near CPUs 64-71",
        ),
    ],
)
def test_cpus_of_one_gpu(device: Device, words: str) -> None:
    assert plan(device, has_flag=False).words == words


def test_cpus_of_several_gpus_are_those_of_all() -> None:
    other = replace(NEAR_SECOND, cpu_affinity="14-27")
    binding = plan(NEAR_FIRST, other, has_flag=False)
    assert binding == Binding(FIRST | frozenset(range(14, 28)), (), "CPUs 0-41 (NUMA nodes 0, 1)")


def test_gpus_of_which_one_is_not_known() -> None:
    binding = plan(NEAR_FIRST, replace(NEAR_SECOND, cpu_affinity=None), has_flag=False)
    assert binding == Binding(None, (), "not bound: the CPUs of GPU 4 are not known")


def test_nodes_are_not_named_unless_all_are_known() -> None:
    binding = plan(NEAR_FIRST, replace(NEAR_SECOND, cpu_affinity="14", numa_node=None), has_flag=False)
    assert binding.words == "CPUs 0-14,28-41"


@pytest.mark.parametrize(
    ("allowed", "cpus", "words"),
    [
        ({0, 1, 14}, {0, 1}, "CPUs 0-1 (NUMA node 0)"),
        ({0, 1}, None, "not bound: all CPUs that may be used (0-1) are near GPU 0"),
        ({14, 15}, None, "not bound: only CPUs 14-15 may be used, GPU 0 is near CPUs 0-13,28-41"),
    ],
)
def test_affinity_of_the_caller_is_kept(allowed: set[int], cpus: set[int] | None, words: str) -> None:
    binding = plan(NEAR_FIRST, allowed=frozenset(allowed), has_flag=False)
    assert binding == Binding(None if cpus is None else frozenset(cpus), (), words)


# -- vLLM's own option -----------------------------------------------------------------------------------------------


def test_workers_are_bound_to_the_nodes_of_their_gpus_in_rank_order() -> None:
    binding = plan(NEAR_SECOND, NEAR_FIRST)
    assert binding.cpus is None
    assert binding.arguments == ("--numa-bind", "--numa-bind-nodes", "1", "0")
    assert binding.words == (
        "not bound: all CPUs that may be used (0-55) are near GPU 4, 0; workers: --numa-bind-nodes 1 0"
    )


def test_server_and_workers_are_bound() -> None:
    binding = plan(NEAR_FIRST, replace(NEAR_FIRST, index=1))
    assert binding.cpus == FIRST
    assert binding.arguments == ("--numa-bind", "--numa-bind-nodes", "0", "0")
    assert binding.words == "CPUs 0-13,28-41 (NUMA node 0); workers: --numa-bind-nodes 0 0"


def test_workers_are_bound_also_where_only_the_node_is_known() -> None:
    binding = plan(replace(NEAR_SECOND, cpu_affinity=""))
    assert binding.arguments == ("--numa-bind", "--numa-bind-nodes", "1")
    assert binding.words == "not bound: the CPUs of GPU 4 are not known; workers: --numa-bind-nodes 1"


def test_cpus_of_a_gpu_may_be_fewer_than_those_of_its_node() -> None:
    binding = plan(replace(NEAR_FIRST, cpu_affinity="0-6"))
    assert binding.cpus == frozenset(range(7))
    assert binding.arguments == ("--numa-bind", "--numa-bind-nodes", "0")


@pytest.mark.parametrize(
    ("device", "nodes", "has_flag"),
    [
        pytest.param(NEAR_FIRST, NODES, False, id="older vLLM"),
        pytest.param(NEAR_FIRST, dict.fromkeys(FIRST | SECOND, 0), True, id="one node"),
        pytest.param(NEAR_FIRST, {}, True, id="machine without NUMA information"),
        pytest.param(replace(NEAR_FIRST, numa_node=None), NODES, True, id="node not known"),
        pytest.param(replace(NEAR_FIRST, numa_node="0-1"), NODES, True, id="several nodes"),
        pytest.param(replace(NEAR_FIRST, numa_node=2), NODES, True, id="node without CPUs"),
    ],
)
def test_numactl_is_not_even_tried(device: Device, nodes: Mapping[int, int], has_flag: bool) -> None:
    def refuse(node: int) -> None:
        raise AssertionError(node)

    binding = plan(NEAR_FIRST, device, nodes=nodes, has_flag=has_flag, numactl=refuse)
    assert (binding.cpus, binding.arguments) == (FIRST, ())
    assert "workers" not in binding.words


def test_numactl_that_fails_is_not_left_to_vllm() -> None:
    binding = plan(NEAR_FIRST, replace(NEAR_SECOND, cpu_affinity="14"), numactl=lambda node: None if node else FIRST)
    assert (binding.cpus, binding.arguments) == (FIRST | {14}, ())
    assert binding.words == (
        "CPUs 0-14,28-41 (NUMA nodes 0, 1); workers: no --numa-bind, since "
        "'numactl --cpunodebind=1 --membind=1 true' fails "
        "(install numactl; a container needs --cap-add SYS_NICE, too)"
    )


def test_numactl_that_undoes_the_callers_affinity_is_not_left_to_vllm() -> None:
    binding = plan(NEAR_FIRST, allowed=frozenset({0, 1, 14}))
    assert (binding.cpus, binding.arguments) == (frozenset({0, 1}), ())
    assert binding.words == (
        "CPUs 0-1 (NUMA node 0); workers: no --numa-bind, since numactl would give them CPUs 2-13,28-41, "
        "which may not be used"
    )


def test_numactl_that_a_cpuset_holds_back_is_left_to_vllm() -> None:
    held = frozenset({0, 1})
    assert plan(NEAR_FIRST, allowed=held | {14}, numactl=lambda _: held).arguments == (
        "--numa-bind",
        "--numa-bind-nodes",
        "0",
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--numa-bind",), "--numa-bind"),
        (("--max-model-len", "2048", "--numa-bind-nodes", "1"), "--numa-bind-nodes"),
        (("--numa-bind-cpus=0-3",), "--numa-bind-cpus"),
        (("--numa_bind",), "--numa_bind"),
        (("--no-numa-bind",), "--no-numa-bind"),
    ],
)
def test_binding_of_the_user_is_left_alone(arguments: tuple[str, ...], named: str) -> None:
    assert plan(NEAR_FIRST, arguments=arguments) == Binding(None, (), f"left to the server's argument {named}")


@pytest.mark.parametrize("argument", ["--model-impl", "--numa-policy", "numa-bind"])
def test_other_arguments_say_nothing_about_binding(argument: str) -> None:
    assert plan(NEAR_FIRST, arguments=(argument,)).cpus == FIRST


# -- this machine ----------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine of two nodes where numactl works."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(NODES))
    monkeypatch.setattr(numa_binding, "numa_nodes", lambda: NODES)
    monkeypatch.setattr(numa_binding, "cpus_under_numactl", numactl)
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    return monkeypatch


def test_server_on_gpus_is_bound(machine: pytest.MonkeyPatch) -> None:
    spec = replace(server_spec("tp1", platform="cuda"), devices=(NEAR_SECOND,))
    assert bind_server(spec, has_flag=True) == Binding(
        SECOND,
        ("--numa-bind", "--numa-bind-nodes", "1"),
        "CPUs 14-27,42-55 (NUMA node 1); workers: --numa-bind-nodes 1",
    )
    assert bind_server(spec, has_flag=False) == Binding(SECOND, (), "CPUs 14-27,42-55 (NUMA node 1)")


@pytest.mark.parametrize(("method", "bound"), [("spawn", True), ("fork", False)])
def test_workers_that_are_forked_cannot_be_bound(machine: pytest.MonkeyPatch, method: str, bound: bool) -> None:
    machine.setenv("VLLM_WORKER_MULTIPROC_METHOD", method)
    spec = replace(server_spec("tp1", platform="cuda"), devices=(NEAR_FIRST,))
    assert bool(bind_server(spec, has_flag=True).arguments) is bound


@pytest.mark.parametrize(("layout", "nodes"), [("dp2tp2", "0 0 1 1"), ("tp2pcp2", "0 0 1 1"), ("dp2pcp2", None)])
def test_ranks_that_vllm_would_look_up_wrongly_are_not_bound_by_it(
    machine: pytest.MonkeyPatch, layout: str, nodes: str | None
) -> None:
    """``_get_gpu_index`` of vllm/utils/numa_utils.py (0.32) counts tp * pp ranks per engine, without pcp."""
    spec = replace(server_spec(layout, platform="cuda"), devices=(NEAR_FIRST, NEAR_FIRST, NEAR_SECOND, NEAR_SECOND))
    arguments = () if nodes is None else ("--numa-bind", "--numa-bind-nodes", *nodes.split())
    assert bind_server(spec, has_flag=True).arguments == arguments


def test_server_on_cpus_has_a_binding_of_its_own(machine: pytest.MonkeyPatch) -> None:
    spec = replace(server_spec("tp1", platform="cpu"), devices=(NEAR_FIRST,))
    assert bind_server(spec, has_flag=True) == Binding(None, (), "")


# -- numactl ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "cpus"),
    [
        ('test "$1 $2" = "--cpunodebind=1 --membind=1" && echo "Cpus_allowed_list:	14-15,42"', {14, 15, 42}),
        ('shift 2; exec "$@"', os.sched_getaffinity(0)),
        ("echo 'Cpus_allowed_list:	14-15'; exit 1", None),
        ("echo 'set_mempolicy: Operation not permitted' >&2; exit 1", None),
        ("exit 0", None),
    ],
)
def test_cpus_under_numactl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, cpus: set[int] | None
) -> None:
    program = tmp_path / "numactl"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert cpus_under_numactl(1) == (None if cpus is None else frozenset(cpus))


def test_numactl_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "numactl"
    program.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(numa_binding, "_NUMACTL_TIMEOUT_S", 0.1)
    assert cpus_under_numactl(0) is None


def test_numactl_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpus_under_numactl(0) is None
