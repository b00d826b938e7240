from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_gpulayout.errors import MeasurementError, ServerExited, ServerStartFailed, TopologyError
from pytest_gpulayout.fingerprint import parse_fingerprint
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.metrics import batch_metrics
from pytest_gpulayout.nccl_log import NcclLog, merge, parse_nccl_log
from pytest_gpulayout.ports import (
    BaselineStore,
    Endpoint,
    GpuProcessSource,
    LoadDriver,
    Platform,
    Server,
    ServerLauncher,
    ServerSpec,
    TopologySource,
)
from pytest_gpulayout.testing import (
    FakeGpuProcess,
    FakeGpuProcesses,
    FakeLoadDriver,
    FakeServer,
    FakeServerLauncher,
    FakeTopologySource,
    InMemoryBaselines,
)
from pytest_gpulayout.topology import Device
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.transport_cpu import judge_cpu
from pytest_gpulayout.transport_nccl import judge_nccl
from pytest_gpulayout.vllm_log import parse_vllm_log
from pytest_gpulayout.workload import Workload

ENDPOINT = Endpoint("http://127.0.0.1:9", "org/tiny")
IN_FLIGHT = 2
LOAD = Workload(name="load", input_tokens=8, output_tokens=11, concurrency=IN_FLIGHT, requests=6, batches=3)


def silent(text: str) -> None:
    pass


def spec(tp: int = 2, platform: Platform = "cuda") -> ServerSpec:
    devices = FakeTopologySource(gpus=tp, platform=platform).probe().devices
    return ServerSpec(Layout(tp=tp), "org/tiny", ("--seed", "1"), platform, devices, "python", 60.0)


def run(driver: FakeLoadDriver) -> RunTrace:
    return driver.run(ENDPOINT, LOAD, seed=7, progress=silent)


def nccl_log(server: FakeServer) -> NcclLog:
    return merge(parse_nccl_log(path.read_text().splitlines(), str(path)) for path in server.nccl_logs())


def test_every_fake_is_what_its_port_asks_for(tmp_path: Path) -> None:
    source: TopologySource = FakeTopologySource()
    launcher: ServerLauncher = FakeServerLauncher(tmp_path)
    server: Server = launcher.launch(spec(), silent)
    driver: LoadDriver = FakeLoadDriver()
    store: BaselineStore = InMemoryBaselines()
    processes: GpuProcessSource = FakeGpuProcesses()

    assert all((source, server, driver, store, processes))


# -- topology ----------------------------------------------------------------------------------------------------


def test_links_by_pair_and_unknown_ones() -> None:
    topology = FakeTopologySource(gpus=3, link="PIX", links={(0, 1): "NV4", (1, 2): None}, name="L40S").probe()

    assert {pair: str(link) for pair, link in topology.links.items()} == {(0, 1): "NV4", (0, 2): "PIX"}
    assert topology.worst() is None
    assert [device.name for device in topology.devices] == ["L40S"] * 3
    assert len({device.uuid for device in topology.devices}) == 3


def test_cpu_has_cores_and_no_links() -> None:
    topology = FakeTopologySource(gpus=2, platform="cpu").probe()

    assert topology.platform == "cpu"
    assert topology.links == {}
    assert [device.cpu_affinity for device in topology.devices] == ["0", "1"]


def test_probe_can_fail() -> None:
    with pytest.raises(TopologyError, match="no driver"):
        FakeTopologySource(error=TopologyError("no driver")).probe()


# -- servers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "verdict"),
    [("P2P/CUMEM", "ok"), ("SHM/direct/direct", "shm"), ("NET/Socket/0", "socket"), (None, "no-evidence")],
)
@pytest.mark.parametrize("tp", [2, 4])
def test_nccl_s_log_is_read_by_the_real_reader(tmp_path: Path, transport: str | None, verdict: str, tp: int) -> None:
    server = FakeServerLauncher(tmp_path, transport=transport).launch(spec(tp), silent)

    log = nccl_log(server)

    assert judge_nccl(log, Layout(tp=tp)).verdict == verdict
    assert log.nranks == (None if transport is None else tp)


def test_one_rank_writes_no_log(tmp_path: Path) -> None:
    assert FakeServerLauncher(tmp_path).launch(spec(1), silent).nccl_logs() == []


@pytest.mark.parametrize(("transport", "verdict"), [("CPU/SHM", "ok"), ("CPU/GLOO", "socket"), (None, "no-evidence")])
def test_cpu_evidence(tmp_path: Path, transport: str | None, verdict: str) -> None:
    server = FakeServerLauncher(tmp_path, transport=transport).launch(spec(2, "cpu"), silent)

    facts = parse_vllm_log(server.log.read_text().splitlines())

    assert judge_cpu(Layout(tp=2), facts, server.mapped_segments()).verdict == verdict
    assert server.nccl_logs() == []


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_proof_names_the_layout(tmp_path: Path, tp: int) -> None:
    server = FakeServerLauncher(tmp_path).launch(spec(tp), silent)

    fingerprint = parse_fingerprint(server.proof.fingerprint)
    assert fingerprint is not None
    assert fingerprint.contradiction(Layout(tp=tp)) is None
    assert sorted(server.proof.rank_pids) == list(range(tp))
    assert server.command[-2:] == ("--seed", "1")


def test_launcher_remembers_and_fails_as_scripted(tmp_path: Path) -> None:
    events: list[str] = []
    launcher = FakeServerLauncher(
        tmp_path,
        failures={2: ServerStartFailed("out of memory")},
        on_event=lambda event, of: events.append(f"{event} {of.layout}"),
    )

    first = launcher.launch(spec(1), silent)
    with pytest.raises(ServerStartFailed, match="out of memory"):
        launcher.launch(spec(2), silent)
    first.stop()
    first.stop()
    launcher.launch(spec(2), silent)

    assert [str(item.layout) for item in launcher.launched] == ["tp1", "tp2", "tp2"]
    assert launcher.servers[0] is first
    assert launcher.stopped == [spec(1)]
    assert events == ["start tp1", "stop tp1", "start tp2"]


def test_server_that_died_says_why(tmp_path: Path) -> None:
    server = FakeServerLauncher(tmp_path).launch(spec(), silent)
    server.check_alive()

    server.die("CUDA out of memory")

    with pytest.raises(ServerExited, match="cause: CUDA out of memory") as caught:
        server.check_alive()
    assert caught.value.exit_code == 1


def test_ranks_are_on_their_gpus_until_the_server_stops(tmp_path: Path) -> None:
    processes = FakeGpuProcesses(gpus=2, others=[FakeGpuProcess(1, 5, leaves_after_s=1)])
    launcher = FakeServerLauncher(tmp_path, processes=processes)

    server = launcher.launch(spec(), silent)

    report = server.gpu_processes()
    assert processes.now_s == 1
    assert report is not None
    assert (report.ok, report.proved_by) == (True, "process list")
    assert [gpu.used_bytes for gpu in processes.snapshot().gpus] == [2**34, 2**34]
    server.stop()
    assert processes.snapshot().processes == ()


def test_process_lists_know_the_gpus_of_any_topology(tmp_path: Path) -> None:
    devices = (Device(4, uuid="GPU-recorded"), Device(5))

    server = FakeServerLauncher(tmp_path).launch(replace(spec(), devices=devices), silent)

    report = server.gpu_processes()
    assert report is not None
    assert [(rank.gpu.index, rank.gpu.uuid[:12]) for rank in report.ranks] == [
        (4, "GPU-recorded"),
        (5, "GPU-00000000"),
    ]


# -- load --------------------------------------------------------------------------------------------------------


def test_metrics_are_exact_without_noise() -> None:
    for batch in batch_metrics(run(FakeLoadDriver(ttft_ms=20, tpot_ms=5))):
        assert batch["median_ttft_ms"] == batch["p99_ttft_ms"] == pytest.approx(20)
        assert batch["median_tpot_ms"] == batch["p99_itl_ms"] == pytest.approx(5)
        assert batch["median_e2el_ms"] == pytest.approx(70)
        assert batch["request_throughput"] == pytest.approx(IN_FLIGHT / 0.070)


def test_load_is_the_workload_s() -> None:
    trace = run(FakeLoadDriver())

    assert [len(batch.requests) for batch in trace.batches] == [6, 6, 6]
    assert [request.index for request in trace.requests] == list(range(18))
    assert {len(request.chunk_ns) for request in trace.requests} == {11}
    assert trace.seed == 7
    in_flight = [
        sum(other.send_ns <= request.send_ns < other.end_ns for other in trace.requests) for request in trace.requests
    ]
    assert max(in_flight) == IN_FLIGHT


def test_slow_down_by_run_keeps_the_last() -> None:
    driver = FakeLoadDriver(ttft_ms=20, slow_down=[1.0, 1.5])

    medians = [batch_metrics(run(driver))[0]["median_ttft_ms"] for _ in range(3)]

    assert medians == pytest.approx([20, 30, 30])
    assert len(driver.runs) == 3


def test_noise_is_the_seed_s() -> None:
    def medians(seed: int) -> list[float]:
        driver = FakeLoadDriver(noise=0.05, seed=seed)
        return [batch["median_ttft_ms"] for _ in range(2) for batch in batch_metrics(run(driver))]

    assert medians(1) == medians(1)
    assert medians(1) != medians(2)
    assert len(set(medians(1))) == 6


def test_failures_of_requests_and_runs() -> None:
    driver = FakeLoadDriver(fail_requests=2, errors={2: MeasurementError("nobody answered")})

    trace = run(driver)
    assert [request.index for request in trace.failed] == [0, 1]
    with pytest.raises(MeasurementError, match="nobody answered"):
        run(driver)


# -- baselines ---------------------------------------------------------------------------------------------------


def test_baselines_are_kept() -> None:
    store = InMemoryBaselines({"b.json": "old"})

    assert store.update("a.json", lambda before: f"one, after {before}") is False
    assert store.update("b.json", lambda before: f"two, after {before}") is True

    assert (store.read("a.json"), store.read("b.json")) == ("one, after None", "two, after old")
    assert store.read("c.json") is None
    assert store.paths() == ["a.json", "b.json"]
    assert store.root == "memory"


def test_baselines_can_be_removed() -> None:
    store = InMemoryBaselines({"b.json": "old"})

    assert store.update("b.json", lambda before: None) is True
    assert store.update("b.json", lambda before: None) is False

    assert store.paths() == []


def test_a_change_of_a_baseline_that_fails_changes_nothing() -> None:
    store = InMemoryBaselines({"b.json": "old"})

    with pytest.raises(ZeroDivisionError):
        store.update("b.json", lambda before: str(1 / 0))

    assert store.texts == {"b.json": "old"}


def test_baselines_lose_nothing_between_threads() -> None:
    store = InMemoryBaselines()
    start = threading.Barrier(8)

    def append(number: int) -> None:
        start.wait()
        for turn in range(50):
            store.update("a.json", lambda before, line=f"{number}.{turn}\n": (before or "") + line)  # type: ignore[misc]

    threads = [threading.Thread(target=append, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len((store.read("a.json") or "").splitlines()) == 400
