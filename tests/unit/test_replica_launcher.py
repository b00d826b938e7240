"""Replicas of the fake vLLM behind a real nginx: started, proved, killed, and nothing left of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from pytest_gpulayout.adapters import device_lock, replica_launcher, vllm_process
from pytest_gpulayout.adapters.cpu_host import format_cpus
from pytest_gpulayout.adapters.http_session import open_session
from pytest_gpulayout.adapters.nginx_proxy import REPLICA_HEADER
from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
from pytest_gpulayout.adapters.replica_launcher import ReplicaLauncher, ReplicatedServer
from pytest_gpulayout.adapters.server_watch import ServerWatch
from pytest_gpulayout.adapters.vllm_process import Place, VllmLauncher, VllmServer
from pytest_gpulayout.errors import DevicesBusy, ServerExited, ServerStartFailed, ServerStartTimeout
from pytest_gpulayout.observing import Observer
from pytest_gpulayout.occupancy import GpuProcess, GpuUse, Occupancy
from pytest_gpulayout.ports import Platform, ServerSpec
from pytest_gpulayout.replicas import replica_shares
from pytest_gpulayout.topology import Device
from pytest_gpulayout.validity import find_problems
from pytest_gpulayout.workload import Workload
from tests.support.nginx import are_gone, needs_nginx, nginx_processes
from tests.support.processes import (
    FAKE_VLLM,
    ROOT,
    command_line,
    processes_marked,
    segments_of,
    server_spec,
    use_fake_vllm,
    wait_until,
)

pytestmark = pytest.mark.end_to_end

Launch = Callable[..., ReplicatedServer]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of our own, short enough for sockets, where nothing may be left."""
    with tempfile.TemporaryDirectory(prefix="gl-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setattr(device_lock, "LOCK_FOLDER", folder)
        monkeypatch.setenv("TEST_MARKER", Path(folder).name)
        monkeypatch.setattr(vllm_process, "_POLL_S", 0.05)
        monkeypatch.setattr(vllm_process, "TERM_TIMEOUT_S", 3.0)
        yield Path(folder)
        assert os.listdir(folder) == []
        assert processes_marked(f"TEST_MARKER={Path(folder).name}") == {}
        assert nginx_processes(folder) == []


@pytest.fixture
def launch(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """Launch replicas; whatever happens to them, nothing of them is left after the test."""
    servers: list[ReplicatedServer] = []

    def launch(
        layout: str = "tp1x2",
        *,
        platform: Platform = "cpu",
        each: Mapping[int, Mapping[str, object]] | None = None,
        timeout_s: float = 20,
        devices: tuple[Device, ...] = (),
        tell: Callable[[str], None] = lambda _: None,
        **fake: object,
    ) -> ReplicatedServer:
        use_fake_vllm(monkeypatch, **fake)
        if each:
            let_replicas_differ(monkeypatch, {number: {**fake, **own} for number, own in each.items()})
        spec = server_spec(layout, platform=platform, timeout_s=timeout_s, uuid=temporary.name)
        spec = replace(spec, devices=devices or spec.devices)
        server = ReplicaLauncher(VllmLauncher(tmp_path)).launch(spec, tell)
        assert isinstance(server, ReplicatedServer)
        servers.append(server)
        return server

    yield launch
    for server in servers:
        server.stop()


def let_replicas_differ(monkeypatch: pytest.MonkeyPatch, behaviours: Mapping[int, Mapping[str, object]]) -> None:
    """Let the fake of some replicas behave in another way; a server takes its environment when it is made."""
    prepare = vllm_process.prepare_server

    def prepare_server(spec: ServerSpec, place: Place, **more: Any) -> VllmServer:
        number = int(place.folder.name.rpartition("-")[2])
        with pytest.MonkeyPatch.context() as patch:
            if number in behaviours:
                patch.setenv("FAKE_VLLM", json.dumps(behaviours[number]))
            return prepare(spec, place, **more)

    monkeypatch.setattr(replica_launcher, "prepare_server", prepare_server)


def ask(server: ReplicatedServer, count: int, *, tokens: int = 1) -> list[requests.Response]:
    """Send completions to the one address, one after the other."""
    body = {"model": server.endpoint.model, "prompt": "Hello", "max_tokens": tokens}
    with open_session(lambda: server.endpoint) as session:
        return [session.post("/v1/completions", json=body, timeout=10) for _ in range(count)]


def main_pid(replica: VllmServer) -> int:
    return next(pid for pid, title in replica.pids().items() if "api_server" in title)


def fault_of(server: ReplicatedServer) -> str:
    try:
        server.check_alive()
    except ServerExited as error:
        return str(error)
    return ""


# -- replicas that work ----------------------------------------------------------------------------------------------


def test_layouts_without_replicas_are_left_to_the_other_launcher(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_vllm(monkeypatch)
    server = ReplicaLauncher(VllmLauncher(tmp_path)).launch(server_spec("tp1"), lambda _: None)
    server.stop()
    assert isinstance(server, VllmServer)
    assert server.parts() == (server,)


@needs_nginx
def test_ready_means_that_every_part_is_proved_and_reached(launch: Launch, tmp_path: Path) -> None:
    server = launch("tp2x2")
    first, second = server.parts()
    assert [str(part.spec.layout) for part in (first, second)] == ["tp2", "tp2"]
    assert server.proof.rank_pids == {
        **first.proof.rank_pids,
        **{rank + 2: pid for rank, pid in second.proof.rank_pids.items()},
    }
    assert [command_line(pid) for pid in server.proof.rank_pids.values()] == [
        "VLLM::Worker_TP0",
        "VLLM::Worker_TP1",
    ] * 2
    assert server.proof.fingerprint == first.proof.fingerprint == second.proof.fingerprint
    assert server.proof.proxy.startswith("nginx/")
    assert (server.proof.start_s or 0) > (first.proof.start_s or 0) > 0
    logs = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.log"))
    folder = "server-1-tp2x2"
    assert logs == [f"{folder}/proxy.log", f"{folder}/replica-0/server.log", f"{folder}/replica-1/server.log"]


@needs_nginx
def test_one_address_and_one_key_lead_to_all(launch: Launch) -> None:
    server = launch()
    answers = ask(server, 6)
    assert [answer.status_code for answer in answers] == [200] * 6
    addresses = [answer.headers[REPLICA_HEADER] for answer in answers]
    assert sorted(addresses) == sorted([part.endpoint.url.removeprefix("http://") for part in server.parts()] * 3)
    models = f"{server.endpoint.url}/v1/models"
    assert requests.get(models, timeout=5).status_code == 401
    key = server.endpoint.api_key
    assert key is not None
    assert {part.endpoint.api_key for part in server.parts()} == {key}
    visible = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(key.encode() in text for text in visible)
    assert key not in repr(server.endpoint) + server.log.read_text() + " ".join(server.command)


@needs_nginx
def test_each_replica_has_its_own_cores(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|2|3")
    server = launch("tp2x2")
    found = [variable(main_pid(part), "VLLM_CPU_OMP_THREADS_BIND") for part in server.parts()]
    assert found == ["0|1", "2|3"]


@needs_nginx
def test_all_processes_of_a_replica_stay_on_its_cores(launch: Launch) -> None:
    if not {0, 1} <= os.sched_getaffinity(0):
        pytest.skip("needs the cores 0 and 1")
    server = launch()
    found = [{frozenset(os.sched_getaffinity(pid)) for pid in part.pids()} for part in server.parts()]
    assert found == [{frozenset({0})}, {frozenset({1})}]
    assert server.proof.binding == "replica 0: all processes on cores 0; replica 1: all processes on cores 1"


@needs_nginx
def test_replicas_that_share_all_cores_are_not_bound(launch: Launch) -> None:
    everything = format_cpus(sorted(os.sched_getaffinity(0)))
    shared = Device(0, cpu_affinity=everything), Device(1, cpu_affinity=everything)  # as with "nobind"
    server = launch(devices=shared)
    assert {frozenset(os.sched_getaffinity(pid)) for pid in server.pids()} == {frozenset(os.sched_getaffinity(0))}
    assert server.proof.binding == ""


@needs_nginx
def test_each_replica_has_its_own_gpus(launch: Launch, temporary: Path) -> None:
    server = launch("tp2x2", platform="cuda")
    uuids = [f"{temporary.name}-{index}" for index in range(4)]
    found = [variable(main_pid(part), "CUDA_VISIBLE_DEVICES") for part in server.parts()]
    assert found == [",".join(uuids[:2]), ",".join(uuids[2:])]
    assert len(list(temporary.glob("gpulayout-*.lock"))) == 4


def variable(pid: int, name: str) -> str | None:
    return psutil.Process(pid).environ().get(name)


@needs_nginx
def test_evidence_is_of_each_part_in_the_ranks_of_the_whole(launch: Launch) -> None:
    server = launch("tp2x2")
    mapped = server.mapped_segments()
    assert set(mapped) == {0, 1, 2, 3}
    assert mapped[0] == mapped[1] != mapped[2] == mapped[3]
    assert set(server.pids()) == {pid for part in server.parts() for pid in part.pids()}
    assert set(server.surroundings().ranks) == {0, 1, 2, 3}
    assert (server.nccl_logs(), server.nccl_log_obstacle()) == ([], None)
    assert server.gpu_processes() is None


@needs_nginx
def test_first_replica_is_proved_before_the_others_load_side_by_side(launch: Launch, tmp_path: Path) -> None:
    lines: list[str] = []
    begun: list[int] = []

    def tell(line: str) -> None:
        lines.append(line)
        begun.append(len(list(tmp_path.glob("server-1-tp1x3/replica-*"))))

    launch("tp1x3", tell=tell)
    while_first_loads = {count for line, count in zip(lines, begun, strict=True) if ", replica 0: " in line}
    while_others_load = {count for line, count in zip(lines, begun, strict=True) if ", replica 1: " in line}
    assert (while_first_loads, while_others_load) == ({1}, {3})
    assert lines[-1].startswith("tp1x3: nginx/")


@needs_nginx
def test_others_load_one_after_the_other_where_memory_is_short(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([100, 40])  # the first takes 60: loading two more side by side may take 240
    monkeypatch.setattr(replica_launcher, "_free_memory", lambda: next(free))
    lines: list[str] = []
    begun: list[int] = []

    def tell(line: str) -> None:
        lines.append(line)
        begun.append(len(list(tmp_path.glob("server-1-tp1x3/replica-*"))))

    launch("tp1x3", tell=tell)
    assert {count for line, count in zip(lines, begun, strict=True) if ", replica 1: " in line} == {2}


@needs_nginx
def test_load_is_shared_and_both_sides_agree(launch: Launch) -> None:
    server = launch(ttft_ms=20)
    parts = server.parts()
    workload = Workload(
        name="w", input_tokens=8, output_tokens=4, concurrency=4, requests=20, batches=2, shares_prefix=True
    )

    def watch(*what: object) -> ServerWatch:
        urls = tuple(part.endpoint.url for part in parts)
        return ServerWatch(*what, logs=[part.log for part in parts], replicas=urls)  # type: ignore[arg-type]

    run = Observer(OpenAiStreamDriver(), watch_server=watch).run(
        server.endpoint, workload, seed=1, progress=lambda _: None, server=server
    )
    window = run.observations.server
    assert window is not None
    shares = replica_shares(window)
    assert sum(share.requests for share in shares) == 40
    assert all(share.requests >= 14 for share in shares)
    kinds = {problem.kind for problem in find_problems(run, workload)}
    assert not kinds & {"token-counts", "failed-requests", "several-servers", "uneven-shares"}


@dataclass
class Lists:
    """A driver's lists. :param on: process ids by the index of the GPU."""

    spec: ServerSpec
    on: dict[int, list[int]] = field(default_factory=dict)

    def snapshot(self) -> Occupancy:
        uuids = [str(device.uuid) for device in self.spec.devices]
        processes = [GpuProcess(uuids[index], pid, 2**30) for index, pids in self.on.items() for pid in pids]
        return Occupancy(tuple(GpuUse(index, uuid) for index, uuid in enumerate(uuids)), tuple(processes))

    def describe(self, pid: int) -> str:
        return f"program {pid}"


@needs_nginx
def test_context_on_the_gpu_of_another_replica_is_a_stray(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_vllm(monkeypatch)
    spec = server_spec("tp1x2", platform="cuda", uuid=temporary.name)
    lists = Lists(spec)
    server = ReplicaLauncher(VllmLauncher(tmp_path, lists)).launch(spec, lambda _: None)
    try:
        first, second = server.proof.rank_pids.values()
        lists.on = {0: [first], 1: [second]}
        right = server.gpu_processes()
        lists.on = {0: [first], 1: [second, first]}
        wrong = server.gpu_processes()
    finally:
        server.stop()
    assert right is not None
    assert wrong is not None
    assert (right.ok, [found.pid for found in right.ranks]) == (True, [first, second])
    assert [(found.kind, found.rank) for found in wrong.violations] == [("stray", 0)]


# -- replicas that do not start --------------------------------------------------------------------------------------


def test_missing_nginx_is_told_before_anything_is_started(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find() -> None:
        raise ServerStartFailed("nginx is required")

    monkeypatch.setattr(replica_launcher, "find_nginx", find)
    with pytest.raises(ServerStartFailed, match="nginx is required"):
        launch()
    assert list(tmp_path.rglob("server.log")) == []


def test_busy_devices_are_told_before_anything_is_started(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_vllm(monkeypatch)
    monkeypatch.setattr(replica_launcher, "find_nginx", lambda: None)
    spec = server_spec("tp1x2", platform="cuda", uuid=temporary.name)
    now_s = [0.0]
    launcher = VllmLauncher(
        tmp_path,
        Lists(spec, {1: [7]}),
        clock=lambda: now_s[0],
        sleep=lambda seconds: now_s.append(now_s.pop() + seconds),
    )
    with pytest.raises(DevicesBusy, match="idle GPUs were required for layout tp1x2"):
        ReplicaLauncher(launcher).launch(spec, lambda _: None)
    assert list(tmp_path.rglob("server.log")) == []


@needs_nginx
@pytest.mark.parametrize("number", [0, 1])
def test_replica_that_fails_is_named_with_its_cause(launch: Launch, tmp_path: Path, number: int) -> None:
    log = ["Traceback (most recent call last):", '  File "serve.py", line 1, in main', "ValueError: no such model"]
    ending = {"exit_at_start": {"code": 1, "log": log}}
    with pytest.raises(ServerStartFailed) as caught:
        launch(each={number: ending})
    headline, cause, *_ = str(caught.value).splitlines()
    assert headline == (
        f"replica {number} of layout tp1x2 (cores {number}): vLLM did not start layout tp1 (exit code 1)"
    )
    assert cause == "  cause: ValueError: no such model"
    assert caught.value.exit_code == 1
    assert "--model" in caught.value.command
    assert len(list(tmp_path.rglob("server.log"))) == number + 1


@needs_nginx
def test_replica_that_is_too_slow_is_named(launch: Launch) -> None:
    with pytest.raises(ServerStartTimeout, match=r"^replica 1 of layout tp1x2 \(cores 1\): vLLM did not start "):
        launch(each={1: {"hang_at_start": True}}, timeout_s=3)


@needs_nginx
def test_replicas_that_differ_are_no_replicas(launch: Launch) -> None:
    with pytest.raises(ServerStartFailed) as caught:
        launch(each={1: {"fingerprint": "vllm-0.32.0-99999999"}})
    headline, first, second, _ = str(caught.value).splitlines()
    assert headline.startswith("equal servers are required as replicas of layout tp1x2, found different ones ")
    assert (first, second) == ("  replica 0: vllm-0.32.0-abcdef12", "  replica 1: vllm-0.32.0-99999999")


@needs_nginx
def test_ctrl_c_while_replicas_load_leaves_nothing(launch: Launch) -> None:
    def interrupt(line: str) -> None:
        if ", replica 1: " in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(tell=interrupt)


# -- replicas that go away -------------------------------------------------------------------------------------------


@needs_nginx
def test_replica_that_is_killed_costs_no_later_request_and_is_named(launch: Launch) -> None:
    server = launch()
    gone, left = server.parts()
    main = psutil.Process(main_pid(gone))
    main.kill()
    wait_until(lambda: are_gone([main]), "the end of its front end")  # and with it of its connections
    answers = ask(server, 20)
    assert [answer.status_code for answer in answers] == [200] * 20
    last = {answer.headers[REPLICA_HEADER].rpartition(" ")[2] for answer in answers}
    assert last == {left.endpoint.url.removeprefix("http://")}
    wait_until(lambda: fault_of(server), "the news of its end", 5)
    assert fault_of(server).startswith(
        "replica 0 of layout tp1x2 (cores 0): the vLLM server for tp1 went away while it was in use "
        "(ended by SIGKILL)\n  cause: "
    )


@needs_nginx
def test_replica_that_dies_under_load_ends_the_run_within_seconds(launch: Launch) -> None:
    server = launch(ttft_ms=20, itl_ms=5)
    workload = Workload(
        name="w", input_tokens=8, output_tokens=16, concurrency=4, requests=10_000, batches=1, shares_prefix=True
    )
    seen: list[str] = []

    def progress(line: str) -> None:  # as the plugin does it
        server.check_alive()
        seen.append(line)
        if len(seen) == 3:
            os.kill(main_pid(server.parts()[1]), signal.SIGKILL)

    with pytest.raises(ServerExited, match=r"^replica 1 of layout tp1x2 \(cores 1\): "):
        Observer(OpenAiStreamDriver()).run(server.endpoint, workload, seed=1, progress=progress, server=server)
    assert len(seen) < 20  # four a second at most


@needs_nginx
def test_engine_that_dies_is_named(launch: Launch) -> None:
    server = launch(each={1: {"die_after_requests": 1}})
    assert 500 in {answer.status_code for answer in ask(server, 2)}
    wait_until(lambda: fault_of(server), "the news of its end", 10)
    headline, cause, *_ = fault_of(server).splitlines()
    assert headline.startswith("replica 1 of layout tp1x2 (cores 1): ")
    assert cause.startswith("  cause: RuntimeError: Unsupported CPU attention configuration")


@needs_nginx
def test_proxy_that_is_killed_is_told(launch: Launch, temporary: Path) -> None:
    server = launch()
    nginx_processes(str(temporary))[0].kill()
    wait_until(lambda: fault_of(server), "the news of its end", 5)
    assert fault_of(server).startswith("nginx in front of the replicas of layout tp1x2 went away while it was in use")


@needs_nginx
def test_stop_leaves_nothing_and_may_be_called_twice(launch: Launch, temporary: Path) -> None:
    server = launch("tp2x2")
    proxy = nginx_processes(str(temporary))
    identities = [Path(sorted(names)[0]).name.partition("-tp:")[0] for names in server.mapped_segments().values()]
    assert all(segments_of(identity) for identity in identities)
    pids = list(server.pids())
    assert len(pids) == 8
    server.stop()
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    assert are_gone(proxy)
    assert not any(segments_of(identity) for identity in identities)
    assert os.listdir(temporary) == []
    server.stop()


@needs_nginx
def test_replicas_end_side_by_side(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    server = launch(ignore_sigterm=True)
    asked: list[str] = []
    for number, replica in enumerate(server.parts()):
        monkeypatch.setattr(replica, "ask_to_end", noting(asked, f"ask {number}", replica.ask_to_end))
        monkeypatch.setattr(replica, "stop", noting(asked, f"stop {number}", replica.stop))
    server.stop()
    assert asked == ["ask 0", "ask 1", "stop 0", "stop 1"]


def noting(into: list[str], name: str, function: Callable[[], None]) -> Callable[[], None]:
    def note() -> None:
        into.append(name)
        function()

    return note


@needs_nginx
def test_one_replica_that_ends_frees_no_device(launch: Launch, temporary: Path) -> None:
    server = launch()
    os.kill(main_pid(server.parts()[0]), signal.SIGKILL)
    wait_until(lambda: fault_of(server), "the news of its end", 5)
    waiting = threading.Event()
    taken: list[device_lock.DeviceLocks] = []

    def take() -> None:
        taken.append(device_lock.DeviceLocks(["cpu"], "another run", lambda _: waiting.set()))

    thread = threading.Thread(target=take)
    thread.start()
    assert waiting.wait(10)
    assert (temporary / "gpulayout-cpu.lock").exists()
    server.stop()
    thread.join(10)
    taken[0].release()


# -- the death of pytest ---------------------------------------------------------------------------------------------


@needs_nginx
@pytest.mark.parametrize("moment", ["ready", "replica-1"])
def test_killed_pytest_leaves_nothing(tmp_path: Path, moment: str) -> None:
    marker = f"replicas-{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="gl-", dir="/tmp") as temporary:
        environment = os.environ | {"TEST_MARKER": marker, "TMPDIR": temporary, "PYTHONPATH": str(FAKE_VLLM)}
        if moment != "ready":
            environment["FAKE_VLLM"] = json.dumps({"load_s": 3})
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.processes", "tp2x2", str(tmp_path), "60"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert process.stdout is not None
        if moment == "ready":
            assert process.stdout.readline().startswith("http://127.0.0.1:")
        else:
            loading = tmp_path / "server-1-tp2x2" / moment / "server.log"
            wait_until(lambda: loading.exists() and "init engine" in loading.read_text(), "the second replica", 30)
        proxy = nginx_processes(temporary)
        assert len(proxy) == (2 if moment == "ready" else 0)
        assert len(list(Path("/tmp").glob(f"gpulayout-{marker}*.lock"))) == 4
        process.kill()
        process.communicate()
        wait_until(lambda: not processes_marked(marker), "the end of every process", 30)
        wait_until(lambda: are_gone(proxy), "the end of the proxy")
        assert os.listdir(temporary) == []
        assert list(Path("/tmp").glob(f"gpulayout-{marker}*.lock")) == []
