"""``--gpu-transport`` and the fixture ``transport_report``: evidence, or a failed test."""

from __future__ import annotations

import pytest

from tests.support.suite import Suite

TRANSPORT = "def test_it(transport_report): print('verdict', transport_report.verdict, transport_report.summary())"


@pytest.mark.parametrize(
    ("transport", "layout", "shown"),
    [
        ("P2P/CUMEM", "tp2", "ok P2P/CUMEM x4"),
        ("P2P/IPC/read", "tp4", "ok P2P/IPC/read x8"),
        ("NET/IB/0/GDRDMA", "tp2", "ok NET/IB/0/GDRDMA x8"),
        ("NET/FastSocket/0", "tp2", "ok NET/FastSocket/0 x8"),
        ("P2P/CUMEM", "tp1", "ok none needed"),
    ],
)
def test_transport_that_is_allowed(suite: Suite, transport: str, layout: str, shown: str) -> None:
    suite.fakes(launcher=f"transport={transport!r}")
    suite.write(test_it=TRANSPORT)

    result = suite.run(f"--gpu-layout={layout}", "-s")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"*verdict {shown}"])
    result.stdout.fnmatch_lines([f"{layout}: worst link *, transport {shown.partition(' ')[2]}, vLLM *"])


def test_shared_memory_is_allowed_where_the_gpus_cannot_reach_each_other(suite: Suite) -> None:
    suite.fakes(topology="link='PHB'", launcher="transport='SHM/direct/direct'")
    suite.write(test_it=TRANSPORT)

    result = suite.run("--gpu-layout=tp2", "-s")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*verdict ok SHM/direct/direct x4"])


def test_shared_memory_in_place_of_p2p_fails(suite: Suite) -> None:
    suite.fakes(topology="link='NV4'", launcher="transport='SHM/direct/direct'")
    suite.write(test_it=TRANSPORT)

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "  found: ranks 0 -> 1: transport SHM/direct/direct, allowed: all but NET/Socket and CPU/GLOO, and "
            "shared memory only where the GPUs cannot reach each other directly, which these can",
            "    a loss: the GPUs are linked by NV4, where NCCL uses P2P unless something forbids it",
        ]
    )


def test_socket_fails_with_rank_pair_file_and_line(suite: Suite) -> None:
    suite.fakes(launcher="transport='NET/Socket/0'")
    suite.write(test_it=TRANSPORT + "\ndef test_again(transport_report): pass")

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "transports allowed between ranks: all but NET/Socket and CPU/GLOO; every communicating pair *",
            "  found: ranks 0 -> 1: transport NET/Socket/0, allowed: all but NET/Socket and CPU/GLOO",
            "  in /*/server-1-tp2/nccl/nccl.fake-host.4194305.log, line 6",
            "  ranks 0 -> 1 use NET/Socket/0, 2 pairs in all",
            "    /*/nccl.fake-host.4194305.log:6: fake-host:4194305:* NCCL INFO Channel 00/0 : 0[[]0] -> 1[[]1] "
            "[[]send] via NET/Socket/0",
            "    on one host: give the processes one /dev/shm *",
            "  layout tp2",
            "  allow it: --gpu-transport=LIST; *",
        ]
    )
    result.stdout.fnmatch_lines(["  (told in full by test_it.py::test_it[[]tp2[]]*)"])
    result.stdout.fnmatch_lines(["tp2: worst link NV18, transport NET/Socket/0 x8 FAILED, vLLM *"])


def test_no_evidence_fails(suite: Suite) -> None:
    suite.fakes(launcher="transport=None")
    suite.write(test_it=TRANSPORT)

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["  found: no-evidence, no evidence", "  no line of NCCL", "*start the server with NCCL_DEBUG=INFO *"]
    )


def test_evidence_of_too_few_ranks_fails(suite: Suite) -> None:
    suite.write(
        test_it="""
        import pytest

        @pytest.fixture
        def half_of_the_logs(vllm_server):
            for log in vllm_server.server.nccl_logs():
                lines = log.read_text().splitlines(keepends=True)
                log.write_text("".join(line for line in lines if "Channel" not in line or "0[0] ->" in line))

        def test_it(half_of_the_logs, transport_report): pass
        """
    )

    result = suite.run("--gpu-layout=tp4")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["  layout tp4 connects ranks 0,1,2,3 (tp), no channels connect all of them"])


def test_list_forbids_what_it_does_not_name(suite: Suite) -> None:
    suite.fakes(launcher="transport='SHM/direct/direct'")
    suite.write(test_it=TRANSPORT)

    result = suite.run("--gpu-layout=tp2", "--gpu-transport=p2p")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "  found: ranks 0 -> 1: transport SHM/direct/direct, allowed: P2P",
            "  if this is wanted, allow it: --gpu-transport=p2p,shm",
        ]
    )
    suite.run("--gpu-layout=tp2", "--gpu-transport=p2p,shm").assert_outcomes(passed=1)


def test_socket_can_be_allowed(suite: Suite) -> None:
    suite.fakes(launcher="transport='NET/Socket/0'")
    suite.write(test_it=TRANSPORT)

    suite.run("--gpu-layout=tp2", "--gpu-transport=socket").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("transport", "outcome", "line"),
    [
        ("P2P/CUMEM", {"passed": 1}, "tp2: worst link *, transport CPU/SHM x2, vLLM *"),
        (
            "CPU/GLOO",
            {"failed": 1},
            "  group tp of ranks 0,1 fell back to gloo over sockets: no common shared memory",
        ),
        (None, {"failed": 1}, "  group tp of ranks 0,1: every rank must map the shared-memory segment *"),
    ],
)
def test_cpu_platform(suite: Suite, transport: str | None, outcome: dict[str, int], line: str) -> None:
    suite.fakes(launcher=f"transport={transport!r}")
    suite.write(test_it=TRANSPORT)

    result = suite.run("--gpu-layout=tp2", "--gpu-platform=cpu")

    result.assert_outcomes(**outcome)
    result.stdout.fnmatch_lines([line])
