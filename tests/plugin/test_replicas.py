"""Layouts with replicas (``xN``) as the plugin sees them: placed, proved part by part, reported, and told apart."""

from __future__ import annotations

from tests.support.suite import GATE, Suite

DIES = """
def test_dies(vllm_server):
    vllm_server.server.parts()[1].die("CUDA out of memory")
def test_after(vllm_server): pass
"""
DIES_UNDER_LOAD = """
def test_measured(vllm_server, measure):
    vllm_server.server.parts()[1].die("CUDA out of memory")
    measure()
def test_after(vllm_server, measure): measure()
"""


def test_replicas_are_placed_on_gpus_of_their_own_and_each_is_proved(suite: Suite) -> None:
    suite.fakes(topology="gpus=4, link='SYS', links={(0, 3): 'NV4', (1, 2): 'NV4'}")
    suite.write(
        test_it="""
        def test_it(vllm_server, transport_report, gpu_topology):
            parts = vllm_server.server.parts()
            placed = {tuple(device.index for device in part.spec.devices) for part in parts}
            assert placed == {(0, 3), (1, 2)}
            assert sorted(vllm_server.pids) == [0, 1, 2, 3]
            assert sorted(transport_report.edges) == [(0, 1), (1, 0), (2, 3), (3, 2)]
            assert transport_report.verdict == "ok"
            assert len(vllm_server.gpu_processes.ranks) == 4
            assert {str(link) for link in gpu_topology.links} == {"NV4"}
        """
    )

    result = suite.run("--gpu-layout=tp2x2", "--gpu-link=nvlink", f"--gpu-results={suite.results}")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "tp2x2: worst link NV4, transport P2P/CUMEM x8, vLLM 0.32.0, ready in 1 s, 2 replicas behind nginx/fake",
            "  processes: each rank on its GPU and no other (process list)",
        ]
    )
    assert suite.events == ["start tp2x2 org/tiny", "stop tp2x2 org/tiny"]
    (server,) = [record for record in suite.read_results()["records"] if record["kind"] == "server"]
    assert server["proxy"] == "nginx/fake"
    assert [sorted(replica["rank_pids"]) for replica in server["replicas"]] == [["0", "1"], ["0", "1"]]
    assert sorted(server["rank_pids"]) == ["0", "1", "2", "3"]


def test_one_server_has_no_replicas_in_the_results(suite: Suite) -> None:
    suite.write(test_it="def test_it(vllm_server): pass")

    result = suite.run("--gpu-layout=tp2", f"--gpu-results={suite.results}")

    result.stdout.no_fnmatch_line("*replicas behind*")
    (server,) = [record for record in suite.read_results()["records"] if record["kind"] == "server"]
    assert (server["proxy"], server["replicas"]) == ("", [])


def test_replicas_need_so_many_gpus(suite: Suite) -> None:
    suite.fakes(topology="gpus=3")
    suite.write(test_it="def test_it(vllm_server): pass")

    result = suite.run("--gpu-layout=tp2x2")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["layout tp2x2 needs 4 GPUs, found 3 (source fake)*"])


def test_evidence_that_is_missing_fails_with_the_replica(suite: Suite) -> None:
    suite.fakes(launcher="transport=None")
    suite.write(test_it="def test_it(transport_report): pass")

    result = suite.run("--gpu-layout=tp2x2")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["  found: no-evidence, no evidence", "  replica 0: *", "  replica 1: *"])


def test_socket_in_the_second_replica_is_told_in_the_ranks_of_the_whole(suite: Suite) -> None:
    suite.write(
        test_it="""
        import pytest

        @pytest.fixture
        def socket(vllm_server):
            for path in vllm_server.server.parts()[1].nccl_logs():
                path.write_text(path.read_text().replace("via P2P/CUMEM", "via NET/Socket/0"))

        def test_it(socket, transport_report): pass
        """
    )

    result = suite.run("--gpu-layout=tp2x2")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["  found: ranks 2 -> 3: transport NET/Socket/0, allowed: all but *"])
    result.stdout.no_fnmatch_line("*found: ranks 0 -> 1*")
    result.stdout.fnmatch_lines(["tp2x2: *transport NET/Socket/0 x4, P2P/CUMEM x4 FAILED*"])


def test_shared_memory_of_each_replica_on_the_cpu_platform(suite: Suite) -> None:
    suite.write(
        test_it="""
        def test_it(transport_report):
            assert sorted(transport_report.edges) == [(0, 1), (1, 0), (2, 3), (3, 2)]
            assert transport_report.transports == {"CPU/SHM": 4}
        """
    )

    suite.run("--gpu-platform=cpu", "--gpu-layout=tp2x2").assert_outcomes(passed=1)


def test_single_ranks_need_no_transport(suite: Suite) -> None:
    suite.write(test_it="def test_it(transport_report): assert transport_report.verdict == 'ok'")

    result = suite.run("--gpu-layout=tp1x2")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["tp1x2: worst link none needed, transport none needed, vLLM *"])


def test_context_of_one_replica_on_the_gpu_of_another_fails(suite: Suite) -> None:
    suite.fakes(launcher="processes=FakeGpuProcesses(contexts={1: (1, 0)})")
    suite.write(test_it="def test_it(vllm_server): pass")

    result = suite.run("--gpu-layout=tp1x2")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["  found: rank 1 (*) holds a context on GPU 0 (*), *; its own is GPU 1 (*)"])


def test_replica_that_dies_is_named_and_all_are_replaced(suite: Suite) -> None:
    suite.write(test_it=DIES)

    result = suite.run("--gpu-layout=tp1x2")

    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        [
            "replica 1 of layout tp1x2: the vLLM server for tp1 went away while it was in use",
            "  cause: CUDA out of memory",
        ]
    )
    assert suite.events == ["start tp1x2 org/tiny", "stop tp1x2 org/tiny"] * 2


def test_replica_that_dies_under_load_is_named_though_no_request_failed(suite: Suite) -> None:
    suite.write(test_it=DIES_UNDER_LOAD)

    result = suite.run("--gpu-layout=tp1x2")

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["replica 1 of layout tp1x2: the vLLM server for tp1 went away while it was in use"])
    assert suite.starts == 2


def test_numbers_belong_to_the_layout_with_its_replicas(suite: Suite) -> None:
    suite.write(test_it=GATE)

    suite.run("--gpu-layout=tp1x2", "--gpu-baseline=new")
    result = suite.run("--gpu-layout=tp1")

    result.assert_outcomes(failed=1)  # no baseline: that of tp1x2 is another key
    (stored,) = suite.baselines
    assert "tp1x2" in stored.parts
    assert '"count": 2' in stored.read_text()


SHARES = """
from pytest_gpulayout.server_window import EngineDelta, ServerWindow
from pytest_gpulayout.trace import Observations

URLS = ("http://127.0.0.1:4001", "http://127.0.0.1:4002")

def counted(url, requests):
    tokens = {"prompt_tokens": requests * 64, "generation_tokens": requests * 32}
    return EngineDelta(replica=url, engine="0", finished={"length": requests}, **tokens)

def shared(*requests):
    engines = tuple(counted(url, number) for url, number in zip(URLS, requests))
    return Observations(server=ServerWindow(engines=engines, replicas=URLS))
"""


def test_even_shares_are_told_in_a_line(suite: Suite) -> None:
    suite.fakes(driver="observations=shared(50, 46)", more=SHARES)
    suite.write(test_it=GATE)

    result = suite.run("--gpu-layout=tp1x2", "--gpu-baseline=new", f"--gpu-results={suite.results}")

    assert result.ret == 0
    result.stdout.fnmatch_lines(["    replicas finished 50 + 46 of 96 requests (52%, 48%)"])
    (record,) = [record for record in suite.read_results()["records"] if record["kind"] == "performance"]
    shares = record["runs"][0]["gpulayout"]["server"]["replica_shares"]
    assert [(share["replica"], share["requests"]) for share in shares] == [(0, 50), (1, 46)]


def test_uneven_shares_are_neither_judged_nor_stored(suite: Suite) -> None:
    suite.fakes(driver="observations=shared(90, 6)", more=SHARES)
    suite.write(test_it=GATE)

    result = suite.run("--gpu-layout=tp1x2", "--gpu-baseline=new")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "invalid: uneven-shares: replica 0 (http://127.0.0.1:4001) finished 90 of 96 requests (94%), where 48 *",
            "invalid: uneven-shares: replica 1 (http://127.0.0.1:4002) finished 6 of 96 requests (6%), where 48 *",
        ]
    )
    assert suite.baselines == []


def test_shares_that_nobody_could_read_are_no_even_ones(suite: Suite) -> None:
    unread = "Observations(server=ServerWindow(replicas=URLS, notes=('GET /metrics: refused',)))"
    suite.fakes(driver=f"observations={unread}", more=SHARES)
    suite.write(test_it=GATE)

    result = suite.run("--gpu-layout=tp1x2", "--gpu-baseline=new")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["invalid: uneven-shares: how many requests each of the 2 replicas answered is not *"]
    )
