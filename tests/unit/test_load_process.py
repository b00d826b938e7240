from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pytest_gpulayout.adapters.load_process import WorkerProcesses
from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.ports import Endpoint
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.workload import Workload
from tests.support.stream_server import Reply, StreamServer

pytestmark = pytest.mark.end_to_end

PATIENCE_S = 20.0
SHARED = Workload(name="shared", input_tokens=20, output_tokens=3, concurrency=5, requests=11, batches=2)


def silent(_line: str) -> None:
    pass


def hang_in_batch(number: int) -> Reply:
    return Reply(stall_after=1) if number >= SHARED.warmup_requests else Reply()


def drive(
    server: StreamServer,
    workload: Workload = SHARED,
    *,
    processes: int | None = 3,
    progress: Callable[[str], None] = silent,
) -> RunTrace:
    endpoint = Endpoint(server.url, "m", server.api_key)
    return OpenAiStreamDriver(processes=processes).run(endpoint, workload, seed=1, progress=progress)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Process ids of all workers that were started."""
    pids: list[int] = []
    connect = WorkerProcesses.connect

    def noting(crew: WorkerProcesses) -> None:
        pids.extend(pid for pid in crew.pids if pid not in pids)
        connect(crew)

    monkeypatch.setattr(WorkerProcesses, "connect", noting)
    return pids


def test_workers_share_a_batch_and_keep_its_order(workers: list[int]) -> None:
    with StreamServer(api_key="sekret") as server:
        run = drive(server)
    assert run.failed == ()
    assert len(workers) == 3
    assert [trace.index for trace in run.requests] == list(range(22))
    assert [trace.worker for trace in run.batches[0].requests] == [i % 3 for i in range(11)]
    assert [len(batch.clients) for batch in run.batches] == [3, 3]
    assert server.most_in_flight <= SHARED.in_flight
    for batch in run.batches:
        assert all(client.events > 0 and client.cpu_ns > 0 for client in batch.clients)
        assert batch.start_ns <= min(trace.send_ns for trace in batch.requests)
        assert batch.end_ns >= max(trace.end_ns for trace in batch.requests)
    assert run.batches[0].end_ns <= run.batches[1].start_ns
    assert not any(psutil.pid_exists(pid) for pid in workers)


def test_requests_do_not_depend_on_the_number_of_workers() -> None:
    def bodies(processes: int) -> list[str]:
        with StreamServer() as server:
            drive(server, processes=processes)
        return sorted(str(body) for body in server.bodies)

    assert bodies(1) == bodies(2)


def test_workers_keep_to_one_timetable() -> None:
    workload = Workload(
        name="open", input_tokens=20, output_tokens=3, rate=200.0, requests=10, batches=1, warmup_requests=1
    )
    with StreamServer() as server:
        run = drive(server, workload, processes=2)
    assert run.failed == ()
    start_ns = run.batches[0].start_ns
    assert [trace.intended_ns for trace in run.requests] == [start_ns + due for due in run.schedule_ns[0]]
    assert all(trace.send_ns >= (trace.intended_ns or 0) for trace in run.requests)


def test_one_worker_stays_in_this_process_and_few_connections_need_no_more(workers: list[int]) -> None:
    with StreamServer() as server:
        run = drive(server, processes=None)
    assert run.failed == ()
    assert workers == []


def test_many_connections_get_more_workers_as_far_as_there_are_cores(
    monkeypatch: pytest.MonkeyPatch, workers: list[int]
) -> None:
    monkeypatch.setattr("pytest_gpulayout.adapters.openai_stream.CONNECTIONS_PER_PROCESS", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(4)))
    with StreamServer() as server:
        run = drive(server, processes=None)
    assert run.failed == ()
    assert len(workers) == 2  # 5 connections would like 3; the server needs half of the 4 cores


def test_each_worker_is_pinned_to_a_cpu_of_its_own_and_says_so() -> None:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    with StreamServer() as server:
        endpoint = Endpoint(server.url, "m")
        shared = OpenAiStreamDriver(processes=2, cpus=cpus).run(endpoint, SHARED, seed=1, progress=silent)
        alone = OpenAiStreamDriver(processes=1, cpus=cpus[:1]).run(endpoint, SHARED, seed=1, progress=silent)
    assert [client.cpus for client in shared.batches[0].clients] == [tuple(cpus[i::2]) or tuple(cpus) for i in (0, 1)]
    assert [client.cpus for client in alone.batches[0].clients] == [tuple(cpus[:1])]
    assert sorted(os.sched_getaffinity(0))[:2] == cpus


def test_cpus_that_are_not_there_leave_the_client_where_it_is() -> None:
    with StreamServer() as server:
        run = OpenAiStreamDriver(cpus=[1_000]).run(Endpoint(server.url, "m"), SHARED, seed=1, progress=silent)
    assert run.batches[0].clients[0].cpus == ()


def test_progress_is_that_of_all_workers() -> None:
    lines: list[str] = []
    with StreamServer(Reply(ttft_s=0.1)) as server:
        drive(server, progress=lines.append)
    assert lines[0].startswith("shared: warm-up, ")
    assert any(
        line.startswith(("shared: batch 1/2: ", "shared: batch 2/2: ")) and "/11 requests" in line for line in lines
    )


def test_a_failing_server_is_told_in_its_own_words(workers: list[int]) -> None:
    def reply(number: int) -> Reply:
        if number < 6:
            return Reply()
        server.stop_listening()
        return Reply(abort_after=1)

    with StreamServer(reply) as server, pytest.raises(MeasurementError) as error:
        drive(server)
    assert "shared: batch 1/2 needs a server that goes on answering" in str(error.value)
    assert "cannot connect again: Connection refused" in str(error.value)
    assert not any(psutil.pid_exists(pid) for pid in workers)


def test_a_wrong_key_is_refused_and_never_shown(workers: list[int]) -> None:
    with StreamServer(api_key="right") as server, pytest.raises(MeasurementError) as error:
        OpenAiStreamDriver(processes=2).run(Endpoint(server.url, "m", "wr0ng"), SHARED, seed=1, progress=silent)
    assert "HTTP 401: Unauthorized" in str(error.value)
    assert "wr0ng" not in str(error.value)


def test_a_worker_that_is_killed_is_named(workers: list[int]) -> None:
    def kill(line: str) -> None:
        if "batch 1/2" in line:
            os.kill(workers[1], signal.SIGKILL)

    with StreamServer(hang_in_batch) as server, pytest.raises(MeasurementError) as error:
        drive(server, progress=kill)
    assert f"worker 1 (process {workers[1]}): it was ended by SIGKILL" in str(error.value)
    assert "out-of-memory killer" in str(error.value)
    assert not any(psutil.pid_exists(pid) for pid in workers)


def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "httptools.py").write_text("raise ImportError('broken installation')")
    monkeypatch.syspath_prepend(tmp_path)
    with StreamServer() as server, pytest.raises(MeasurementError) as error:
        drive(server)
    assert "it ended with status 1; " in str(error.value)
    assert "broken installation" in str(error.value)


def test_an_interrupt_leaves_no_worker(workers: list[int]) -> None:
    def interrupt(line: str) -> None:
        if "batch 1/2" in line:
            raise KeyboardInterrupt

    with StreamServer(hang_in_batch) as server, pytest.raises(KeyboardInterrupt):
        drive(server, progress=interrupt)
    assert len(workers) == 3
    assert not any(psutil.pid_exists(pid) for pid in workers)


PARENT = """
import sys
from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
from pytest_gpulayout.ports import Endpoint
from pytest_gpulayout.workload import Workload
workload = Workload(name="shared", input_tokens=20, output_tokens=3, concurrency=4, requests=8, batches=1)
driver = OpenAiStreamDriver(processes=2)
driver.run(Endpoint(sys.argv[1], "m"), workload, seed=1, progress=lambda line: print(line, flush=True))
"""


def test_workers_go_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    in_batch = threading.Event()

    def reply(number: int) -> Reply:
        if number == 7:
            in_batch.set()
        return Reply(stall_after=1) if number >= 4 else Reply()

    with StreamServer(reply) as server:
        script = tmp_path / "parent.py"
        script.write_text(PARENT)
        parent = psutil.Popen(
            [sys.executable, str(script), server.url],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        try:
            assert in_batch.wait(PATIENCE_S)
            children = parent.children()
            assert len(children) == 2
        finally:
            parent.kill()
            parent.wait()
        _, alive = psutil.wait_procs(children, PATIENCE_S)
    assert alive == []
