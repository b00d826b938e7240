from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from pytest_gpulayout.adapters import device_lock, vllm_process
from pytest_gpulayout.adapters.device_lock import DeviceLocks
from pytest_gpulayout.adapters.nccl_capture import NcclCapture, expand_debug_file
from pytest_gpulayout.adapters.numa_binding import Binding
from pytest_gpulayout.adapters.vllm_process import (
    VllmLauncher,
    VllmServer,
    require_vllm,
    server_environment,
)
from pytest_gpulayout.errors import DevicesBusy, ServerError, ServerExited, ServerStartFailed, ServerStartTimeout
from pytest_gpulayout.occupancy import GpuProcess, GpuUse, Occupancy
from pytest_gpulayout.ports import Endpoint, Platform, ServerSpec
from tests.support.processes import (
    command_line,
    processes_marked,
    segments_of,
    server_spec,
    use_fake_vllm,
    wait_until,
)

pytestmark = pytest.mark.end_to_end

Launch = Callable[..., VllmServer]

ENDPOINT = Endpoint("http://127.0.0.1:1", "m", "the-key")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of our own, short enough for sockets, where nothing may be left."""
    with tempfile.TemporaryDirectory(prefix="gl-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setattr(device_lock, "LOCK_FOLDER", folder)
        yield Path(folder)
        assert os.listdir(folder) == []


@pytest.fixture
def launch(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """Launch a fake server; whatever happens to it, nothing of it is left after the test."""
    servers: list[VllmServer] = []
    marker = f"TEST_MARKER={temporary.name}"
    monkeypatch.setenv("TEST_MARKER", temporary.name)
    monkeypatch.setattr(vllm_process, "_POLL_S", 0.05)
    monkeypatch.setattr(vllm_process, "TERM_TIMEOUT_S", 3.0)
    launcher = VllmLauncher(tmp_path)

    def launch(
        layout: str = "tp2", *, arguments: tuple[str, ...] = (), timeout_s: float = 20, **fake: object
    ) -> VllmServer:
        use_fake_vllm(monkeypatch, **fake)
        spec = server_spec(layout, arguments=arguments, timeout_s=timeout_s)
        servers.append(launcher.launch(spec, lambda _: None))
        return servers[-1]

    yield launch
    for server in servers:
        server.stop()
    assert processes_marked(marker) == {}


def port_of(error: ServerError) -> str:
    return error.command[error.command.index("--port") + 1]


def log_of(tmp_path: Path, layout: str = "tp2") -> Path:
    return tmp_path / f"server-1-{layout}" / "server.log"


# -- a server that works ---------------------------------------------------------------------------------------------


def test_ready_means_that_the_layout_is_proved(launch: Launch) -> None:
    server = launch("tp2")
    assert server.proof.vllm_version == "0.32.0"
    assert server.proof.fingerprint == "vllm-0.32.0-tp2-abcdef12"
    assert {rank: command_line(pid) for rank, pid in server.proof.rank_pids.items()} == {
        0: "VLLM::Worker_TP0",
        1: "VLLM::Worker_TP1",
    }
    assert server.proof.start_s is not None
    assert 0 < server.proof.start_s < 20
    titles = sorted(title for title in server.pids().values() if title.startswith("VLLM::"))
    assert titles == ["VLLM::EngineCore", "VLLM::Worker_TP0", "VLLM::Worker_TP1"]


def test_one_rank_is_the_worker_without_coordinates(launch: Launch) -> None:
    server = launch("tp1")
    assert server.proof.fingerprint == "vllm-0.32.0-abcdef12"
    assert [command_line(pid) for pid in server.proof.rank_pids.values()] == ["VLLM::Worker"]


def test_command_names_the_layout_and_keeps_the_arguments(launch: Launch) -> None:
    server = launch("tp2", arguments=("--max-model-len", "2048"))
    port = server.endpoint.url.rpartition(":")[2]
    assert server.command == [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "some/model"),
        *("--host", "127.0.0.1", "--port", port, "--tensor-parallel-size", "2", "--max-model-len", "2048"),
    ]


def test_server_on_a_gpu_is_bound_to_the_cpus_near_it(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_vllm(monkeypatch)
    spec = server_spec("tp1", platform="cuda")
    cpu, *others = os.sched_getaffinity(0)
    if not others:
        pytest.skip("needs a machine with two CPUs that this process may use")
    spec = replace(spec, devices=(replace(spec.devices[0], cpu_affinity=str(cpu), numa_node=0),))
    server = VllmLauncher(tmp_path).launch(spec, lambda _: None)
    found = {pid: os.sched_getaffinity(pid) for pid in server.pids()}
    server.stop()
    assert len(found) > 1
    assert all(cpus == {cpu} for cpus in found.values())
    assert server.binding == server.proof.binding == f"CPUs {cpu} (NUMA node 0)"
    assert os.sched_getaffinity(0) == {cpu, *others}


def test_server_on_cpus_is_bound_by_its_environment_alone(launch: Launch) -> None:
    server = launch("tp2")
    assert all(os.sched_getaffinity(pid) == os.sched_getaffinity(0) for pid in server.pids())
    assert server.proof.binding == ""


def test_arguments_that_bind_come_before_those_of_the_user(temporary: Path, tmp_path: Path) -> None:
    binding = Binding(None, ("--numa-bind", "--numa-bind-nodes", "0", "1"), "words")
    spec = server_spec("tp2", arguments=("--max-model-len", "2048"))
    server = VllmServer(spec, tmp_path, DeviceLocks([], "test", lambda _: None), binding)
    server.stop()
    assert server.command[-8:] == [
        *("--tensor-parallel-size", "2", "--numa-bind", "--numa-bind-nodes", "0", "1"),
        *("--max-model-len", "2048"),
    ]


def test_each_rank_maps_the_segments_of_all(launch: Launch) -> None:
    mapped = launch("tp2").mapped_segments()
    assert set(mapped) == {0, 1}
    assert mapped[0] == mapped[1]
    assert sorted(name.rpartition("-tp:0-")[2] for name in mapped[0]) == ["[0-1]-cpushm_0", "[0-1]-cpushm_1"]


def test_stop_leaves_nothing_and_may_be_called_twice(launch: Launch, temporary: Path) -> None:
    server = launch("tp2")
    (name, *_) = next(iter(server.mapped_segments().values()))
    identity = Path(name).name.partition("-tp:")[0]
    assert segments_of(identity)
    pids = list(server.pids())
    server.stop()
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    assert segments_of(identity) == []
    assert os.listdir(temporary) == []
    server.stop()


def test_every_server_has_its_own_key_which_nobody_can_see(launch: Launch) -> None:
    first, second = launch("tp1"), None
    first.stop()
    second = launch("tp1")
    key = second.endpoint.api_key
    assert key is not None
    assert len(key) >= 32
    assert key != first.endpoint.api_key
    models = f"{second.endpoint.url}/v1/models"
    assert requests.get(models, timeout=5).status_code == 401
    assert requests.get(models, headers={"Authorization": f"Bearer {key}"}, timeout=5).status_code == 200
    visible = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(key.encode() in text for text in visible)
    assert key not in repr(second.endpoint) + second.log.read_text() + " ".join(second.command)


def test_servers_of_one_launcher_keep_their_logs_apart(launch: Launch, tmp_path: Path) -> None:
    for layout in ("tp1", "tp2"):
        launch(layout).stop()
    logs = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/server.log"))
    assert logs == ["server-1-tp1/server.log", "server-2-tp2/server.log"]


def test_progress_shows_what_the_log_says(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_vllm(monkeypatch, load_s=0.3)
    lines: list[str] = []
    VllmLauncher(tmp_path).launch(server_spec("tp2"), lines.append).stop()
    assert "tp2: vLLM is loading, 0 s, no output yet" in lines
    assert any(line.endswith("init engine (profile, create kv cache, warmup model) took 0.") for line in lines)
    assert lines[-1] == "tp2: first completion"


# -- a server that does not come up ----------------------------------------------------------------------------------


def test_exit_at_start_gives_cause_code_command_and_log(launch: Launch, tmp_path: Path) -> None:
    cause = "api_server.py: error: unrecognized arguments: --no-such-flag"
    lines = [*(f"usage line {number}" for number in range(20)), "", cause]
    with pytest.raises(ServerStartFailed) as caught:
        launch("tp2", exit_at_start={"code": 2, "log": lines})
    error, log = caught.value, log_of(tmp_path)
    assert str(error).splitlines() == [
        "vLLM did not start layout tp2 (exit code 2)",
        "  cause: error: unrecognized arguments: --no-such-flag",
        f"  command: {sys.executable} -m vllm.entrypoints.openai.api_server --model some/model --host 127.0.0.1"
        f" --port {port_of(error)} --tensor-parallel-size 2",
        f"  log: {log}, its last lines:",
        *(f"    usage line {number}" for number in range(13, 20)),
        f"    {cause}",
        f"  read it: less {log}",
    ]
    assert error.exit_code == 2
    assert error.log_tail[-1] == cause


def test_exit_without_a_word_says_so(launch: Launch) -> None:
    with pytest.raises(ServerStartFailed, match="cause: the log does not say"):
        launch("tp2", exit_at_start={"code": 3, "log": []})


def test_traceback_at_start_gives_its_root(launch: Launch) -> None:
    lines = [
        "(Worker_TP1 pid=7) ERROR 11-21 03:56:01 [multiproc_executor.py:1063] WorkerProc failed to start.",
        "(Worker_TP1 pid=7) ERROR 11-21 03:56:01 [multiproc_executor.py:1063] Traceback (most recent call last):",
        "(Worker_TP1 pid=7) ERROR 11-21 03:56:01 [multiproc_executor.py:1063] torch.OutOfMemoryError: no memory left",
        "Traceback (most recent call last):",
        '  File "<frozen runpy>", line 198, in _run_module_as_main',
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    with pytest.raises(ServerStartFailed, match=r"cause: torch\.OutOfMemoryError: no memory left\n"):
        launch("tp2", exit_at_start={"code": 1, "log": lines})


def test_timeout_names_the_option(launch: Launch, tmp_path: Path) -> None:
    with pytest.raises(ServerStartTimeout) as caught:
        launch("tp2", hang_at_start=True, timeout_s=1)
    headline, cause, *_, last = str(caught.value).splitlines()
    assert headline == "vLLM did not start layout tp2 within 1 s (--gpu-start-timeout=SECONDS gives it more)"
    assert cause == "  cause: the log does not say"
    assert last == f"  read it: less {log_of(tmp_path)}"
    assert caught.value.exit_code is None
    assert "EngineCore" in caught.value.log_tail[-1]


def test_death_at_the_first_request_gives_the_workers_exception(launch: Launch) -> None:
    with pytest.raises(ServerStartFailed) as caught:
        launch("tp2", die_at_first_request=True)
    headline, cause, *_ = str(caught.value).splitlines()
    assert headline == "vLLM loaded layout tp2 and then failed at the first request (exit code 0)"
    assert cause == "  cause: RuntimeError: Unsupported CPU attention configuration: head_dim=16 isa=2 kv_cache_idx=0"


def test_refusal_of_the_first_request_gives_the_answer(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_process, "_DYING_S", 0.1)
    with pytest.raises(ServerStartFailed, match=r"cause: HTTP 500 .*request 1 failed"):
        launch("tp1", fail_every_nth_request=1)


def test_another_layout_than_asked_for(launch: Launch) -> None:
    with pytest.raises(ServerStartFailed) as caught:
        launch("tp2", fingerprint="vllm-0.32.0-abcdef12")
    assert str(caught.value).splitlines() == [
        "the server is not the layout that was asked for: the server says it is tp1, tp2 was asked for"
        " (vllm-0.32.0-abcdef12)",
        f"  where: system_fingerprint of POST http://127.0.0.1:{port_of(caught.value)}/v1/completions",
        "  leave it to --gpu-layout: take sizes such as --tensor-parallel-size out of the server's arguments",
    ]


@pytest.mark.parametrize("fingerprint", [None, "fp_44709d6fcb"])
def test_no_fingerprint_of_a_layout(launch: Launch, fingerprint: str | None) -> None:
    with pytest.raises(ServerStartFailed) as caught:
        launch("tp2", fingerprint=fingerprint)
    assert str(caught.value).splitlines() == [
        f"the server does not say which layout it runs: system_fingerprint is {str(fingerprint)!r}, "
        "vllm-<version>-tp2-<hash> was expected",
        f"  where: POST http://127.0.0.1:{port_of(caught.value)}/v1/completions",
        "  vLLM >= 0.26 says it unless its fingerprint mode was changed: remove that argument",
    ]


def test_missing_rank_gives_the_process_table(launch: Launch, tmp_path: Path) -> None:
    with pytest.raises(ServerStartFailed) as caught:
        launch("tp2", missing_worker=1)
    assert str(caught.value).splitlines() == [
        "layout tp2 needs 2 worker processes, found none for rank 1",
        "  process table of the server: VLLM::EngineCore, VLLM::Worker_TP0",
        f"  read its log: less {log_of(tmp_path)}",
        f"  vLLM names its processes with setproctitle: {sys.executable} -m pip install setproctitle",
    ]


@pytest.mark.parametrize("fake", [{"exit_at_start": {}}, {"die_at_first_request": True}, {"missing_worker": 0}])
def test_no_message_holds_the_key(launch: Launch, monkeypatch: pytest.MonkeyPatch, fake: dict[str, object]) -> None:
    monkeypatch.setattr("secrets.token_urlsafe", lambda _: "known-key-of-the-test")
    with pytest.raises(ServerStartFailed) as caught:
        launch("tp2", **fake)
    assert "known-key" not in str(caught.value) + repr(vars(caught.value))


def test_interrupt_while_loading_leaves_nothing(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_vllm(monkeypatch, load_s=60)

    def interrupt(line: str) -> None:
        if "TP1" in line or "init engine" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        VllmLauncher(tmp_path).launch(server_spec("tp2"), interrupt)


def test_server_that_cannot_be_made_frees_its_locks(
    launch: Launch, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_port() -> int:
        raise OSError("no port left")

    monkeypatch.setattr(vllm_process, "free_port", no_port)
    with pytest.raises(OSError, match="no port left"):
        launch("tp1")
    assert os.listdir(temporary) == []


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("engine/arg_utils.py", 'group.add_argument("--numa-bind", **kwargs)', {"--numa-bind"}),
        ("engine/arg_utils.py", 'group.add_argument("--numa-bind-nodes", **kwargs)', set()),
        (
            "entrypoints/launchers/cli_args.py",
            "class A:\n    middleware: list[str] = []\n    enable_per_request_metrics: bool = False\n",
            {"--middleware", "--enable-per-request-metrics"},
        ),
        ("entrypoints/openai/cli_args.py", 'parser.add_argument("--middleware", action="append")', {"--middleware"}),
        ("entrypoints/openai/cli_args.py", "    middleware_by_name: str\n    a_middleware: str\n", set()),
        ("entrypoints/openai/serving.py", "\n    middleware: list[str]\n", set()),
        ("__init__.py", "", set()),
    ],
)
def test_options_are_found_without_importing_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, found: set[str]
) -> None:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('imported')\n")
    (package / file).parent.mkdir(parents=True, exist_ok=True)
    with (package / file).open("a") as source:
        source.write(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert require_vllm(sys.executable) == found


OPTIONS = ("--enable-per-request-metrics", "--middleware")
GUARD = ("--middleware", "gpulayout_dev_guard.KeyGuard")


@pytest.mark.parametrize(
    ("options", "arguments", "added"),
    [
        ((), (), ()),
        (OPTIONS, (), ("--enable-per-request-metrics", *GUARD)),
        (OPTIONS[:1], (), OPTIONS[:1]),
        (OPTIONS, ("--disable-log-stats",), GUARD),
        (OPTIONS, ("--disable_log_stats=true",), GUARD),
        (OPTIONS, ("--config", "vllm.yaml"), GUARD),
        (OPTIONS, ("--no-enable-per-request-metrics",), ("--enable-per-request-metrics", *GUARD)),
    ],
)
def test_what_helps_a_measurement_comes_before_the_arguments_of_the_user(
    temporary: Path, tmp_path: Path, options: tuple[str, ...], arguments: tuple[str, ...], added: tuple[str, ...]
) -> None:
    spec = server_spec("tp1", arguments=arguments)
    server = VllmServer(
        spec, tmp_path, DeviceLocks([], "test", lambda _: None), Binding(None, (), ""), options=options
    )
    server.stop()
    port = server.endpoint.url.rpartition(":")[2]
    assert server.command[server.command.index(port) + 1 :] == ["--tensor-parallel-size", "1", *added, *arguments]


def test_other_front_end_of_vllm_has_no_development_endpoints(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    locks = DeviceLocks([], "test", lambda _: None)
    server = VllmServer(server_spec("tp1"), tmp_path, locks, Binding(None, (), ""), options=OPTIONS)
    server.stop()
    assert "--middleware" not in server.command


def test_the_guard_is_importable_by_the_server_and_nothing_else_of_ours(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_fake_vllm(monkeypatch)
    locks = DeviceLocks([], "test", lambda _: None)
    server = VllmServer(server_spec("tp1"), tmp_path, locks, Binding(None, (), ""), options=OPTIONS)
    folder = next(temporary.glob("gpulayout-*/guard"))
    try:
        assert [path.name for path in folder.iterdir()] == ["gpulayout_dev_guard.py"]
        command = [sys.executable, "-S", "-c", "from gpulayout_dev_guard import KeyGuard; KeyGuard(None)"]
        subprocess.run(command, env={"PYTHONPATH": str(folder), "VLLM_API_KEY": "k"}, check=True, timeout=20)
    finally:
        server.stop()


def test_vllm_is_not_installed(tmp_path: Path) -> None:
    python = script(tmp_path / "python", f'exec {sys.executable} -I -S "$@"')
    with pytest.raises(ServerStartFailed) as caught:
        require_vllm(python)
    assert str(caught.value).splitlines() == [
        "vLLM is required to serve the model, and is not installed",
        f"  in {python}",
        "  with NVIDIA GPUs: pip install 'pytest-gpulayout[vllm]'; without: pip install 'pytest-gpulayout[cpu]', "
        "and --gpu-platform=cpu",
    ]


def test_nothing_is_started_or_locked_without_vllm(launch: Launch, tmp_path: Path) -> None:
    spec = replace(server_spec(), python=script(tmp_path / "python", "exit 1"))
    with pytest.raises(ServerStartFailed, match="is not installed"):
        VllmLauncher(tmp_path / "logs").launch(spec, lambda _: None)
    assert not (tmp_path / "logs").exists()


def test_python_that_is_not_there() -> None:
    with pytest.raises(ServerStartFailed) as caught:
        require_vllm("/no/such/python")
    assert str(caught.value).splitlines() == [
        "a Python that has vLLM is required to serve the model, and it cannot be run: "
        "[Errno 2] No such file or directory: '/no/such/python'",
        "  in /no/such/python",
        "  check that it is there and starts: /no/such/python --version",
    ]


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# -- the GPUs of a server --------------------------------------------------------------------------------------------


class Lists:
    """Process lists of three GPUs. :param on: process ids by GPU; may be changed at any time."""

    def __init__(self, spec: ServerSpec, on: dict[int, list[int]]) -> None:
        first, second = (device.uuid or "" for device in spec.devices)
        self.gpus = (GpuUse(0, first), GpuUse(1, second), GpuUse(2, "GPU-third"))
        self.on = on

    def snapshot(self) -> Occupancy:
        found = [GpuProcess(self.gpus[gpu].uuid, pid, 2**30) for gpu, pids in self.on.items() for pid in pids]
        return Occupancy(self.gpus, tuple(found))

    def describe(self, pid: int) -> str:
        return f"program {pid}"


@pytest.fixture
def on_gpus(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> ServerSpec:
    """A server on two GPUs that no other test locks, started from the fake vLLM."""
    use_fake_vllm(monkeypatch)
    return server_spec("tp2", platform="cuda", uuid=temporary.name)


def test_processes_of_a_server_are_told_from_others(on_gpus: ServerSpec, tmp_path: Path) -> None:
    lists = Lists(on_gpus, {2: [7]})
    server = VllmLauncher(tmp_path, lists).launch(on_gpus, lambda _: None)
    try:
        ranks = server.proof.rank_pids
        front_end = next(pid for pid, title in server.pids().items() if "api_server" in title)
        lists.on = {0: [ranks[0]], 1: [ranks[1]], 2: [7]}
        right = server.gpu_processes()
        lists.on = {0: [ranks[0]], 1: [ranks[1], 8], 2: [7, front_end]}
        wrong = server.gpu_processes()
    finally:
        server.stop()
    assert right is not None
    assert wrong is not None
    assert (right.ok, right.proved_by) == (True, "process list")
    assert list(map(str, wrong.violations)) == [
        f"pid {front_end} {sys.executable} -m vllm.entrypoints.openai.api_server holds a context on "
        "GPU 2 (GPU-third) outside the layout, 1.0 GiB",
        f"pid 8 program 8 is not of the server and computes on GPU 1 ({on_gpus.devices[1].uuid}), 1.0 GiB",
    ]


def test_nothing_starts_beside_others_and_nothing_is_left_locked(on_gpus: ServerSpec, tmp_path: Path) -> None:
    now_s = [0.0]
    launcher = VllmLauncher(
        tmp_path,
        Lists(on_gpus, {1: [7]}),
        wait_s=20,
        clock=lambda: now_s[0],
        sleep=lambda seconds: now_s.append(now_s.pop() + seconds),
    )
    lines: list[str] = []
    with pytest.raises(DevicesBusy, match=rf"GPU 1 \({on_gpus.devices[1].uuid}\): pid 7 program 7, 1.0 GiB"):
        launcher.launch(on_gpus, lines.append)
    assert now_s == [20]
    assert lines[-1] == "tp2: waiting for pid 7 program 7 to leave the GPUs, 20 of 20 s"
    assert not log_of(tmp_path).exists()


def test_cpu_platform_asks_nobody_about_gpus(launch: Launch) -> None:
    assert launch("tp1").gpu_processes() is None


# -- a server that goes away -----------------------------------------------------------------------------------------


def test_engine_that_dies_in_use(launch: Launch, tmp_path: Path) -> None:
    server = launch("tp2", die_after_requests=2)
    server.check_alive()
    assert [complete(server) for _ in range(2)] == [200, 500]
    wait_until(lambda: gone(server), "the end of the server")
    with pytest.raises(ServerExited) as caught:
        server.check_alive()
    headline, cause, *_, last = str(caught.value).splitlines()
    assert headline == "the vLLM server for tp2 went away while it was in use (exit code 0)"
    assert cause.startswith("  cause: RuntimeError: Unsupported CPU attention configuration")
    assert last == f"  read it: less {log_of(tmp_path)}"


def test_server_killed_in_use(launch: Launch) -> None:
    server = launch("tp1")
    main = next(pid for pid, title in server.pids().items() if "api_server" in title)
    os.kill(main, signal.SIGKILL)
    wait_until(lambda: gone(server), "the end of the server")
    with pytest.raises(ServerExited, match=r"went away while it was in use \(ended by SIGKILL\)"):
        server.check_alive()


def test_keeper_killed_in_use_counts_as_the_end(launch: Launch, temporary: Path) -> None:
    server = launch("tp1")
    keeper = next(
        pid for pid, title in processes_marked(f"TEST_MARKER={temporary.name}").items() if "keeper" in title
    )
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: gone(server), "the end of the keeper")
    with pytest.raises(ServerExited, match="ended by SIGKILL"):
        server.check_alive()
    for pid in server.proof.rank_pids.values():  # the fake's workers are as tough as vLLM's
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not processes_marked(f"TEST_MARKER={temporary.name}"), "the end of its processes", 5)


def test_server_that_cannot_be_ended(launch: Launch, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = launch("tp1")
    monkeypatch.setattr(vllm_process, "TERM_TIMEOUT_S", 0.1)
    monkeypatch.setattr(vllm_process, "_KEEPER_GRACE_S", 0.1)
    keeper = next(
        pid for pid, title in processes_marked(f"TEST_MARKER={temporary.name}").items() if "keeper" in title
    )
    os.kill(keeper, signal.SIGSTOP)
    pids = " ".join(map(str, server.pids()))
    try:
        with pytest.raises(ServerError) as caught:
            server.stop()
        assert (temporary / "gpulayout-cpu.lock").exists()
    finally:
        os.kill(keeper, signal.SIGCONT)
    monkeypatch.setattr(vllm_process, "_KEEPER_GRACE_S", 15)
    server.stop()
    assert processes_marked(f"TEST_MARKER={temporary.name}") == {}
    assert str(caught.value).splitlines() == [
        "the server of layout tp1 must be gone 0 s after it was asked to end, and is not",
        f"  its processes: {pids}",
        f"  end them: kill -9 {pids} {keeper}",
    ]


def complete(server: VllmServer) -> int:
    body = {"model": server.endpoint.model, "prompt": "Hello", "max_tokens": 1}
    headers = {"Authorization": f"Bearer {server.endpoint.api_key}"}
    return requests.post(f"{server.endpoint.url}/v1/completions", json=body, headers=headers, timeout=5).status_code


def gone(server: VllmServer) -> bool:
    try:
        server.check_alive()
    except ServerExited:
        return True
    return False


# -- NCCL's log ------------------------------------------------------------------------------------------------------

HOST = socket.gethostname().partition(".")[0]


def nccl_file(path: Path, *, age_s: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x:1:1 [0] NCCL INFO x\n")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_log_of_nccl_is_private_and_holds_this_servers_processes_only(
    on_gpus: ServerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE"):
        monkeypatch.delenv(name, raising=False)
    server = VllmLauncher(tmp_path).launch(on_gpus, lambda _: None)
    folder = log_of(tmp_path).parent / "nccl"
    try:
        worker, *_ = ranks = list(server.proof.rank_pids.values())
        own = sorted(nccl_file(folder / f"nccl.{HOST}.{pid}.log") for pid in ranks)
        nccl_file(folder / f"nccl.{HOST}.{os.getpid()}.log")
        nccl_file(folder / f"nccl.other-host.{worker}.log")
        nccl_file(folder / f"copy-of-nccl.{HOST}.{worker}.log")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert server.nccl_logs() == own
        assert server.nccl_log_obstacle() is None
    finally:
        server.stop()
    assert server.nccl_logs() == own


def test_cpu_platform_has_no_log_of_nccl(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG_FILE", str(nccl_file(tmp_path / "nccl.log")))
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    server = launch("tp2")
    assert (server.nccl_logs(), server.nccl_log_obstacle()) == ([], None)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("nccl.%h.%p.log", "nccl.node7.42.log"),
        ("/logs/%p", "/logs/42"),
        ("100%%%p", "100%42"),
        ("%%p.%p", "%p.42"),
        ("~/%x%", "~/%x%"),
        ("", ""),
    ],
)
def test_name_of_a_debug_file(pattern: str, name: str) -> None:
    assert expand_debug_file(pattern, "node7", 42) == name


@pytest.mark.parametrize("host", ["node7", "node7.example.com", "node%7"])
def test_files_of_the_user_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    written = {"node7": "node7", "node7.example.com": "node7", "node%7": "node-7"}[host]
    own = nccl_file(tmp_path / "logs" / f"{written}-42")
    nccl_file(tmp_path / "logs" / f"{written}-43")
    capture = NcclCapture({"NCCL_DEBUG_FILE": "logs/%h-%p"}, tmp_path, time.time())
    assert capture.files([41, 42]) == [own]
    assert capture.files([]) == []


def test_files_from_before_the_start_and_what_is_no_file_are_left_out(tmp_path: Path) -> None:
    fresh = nccl_file(tmp_path / "1")
    nccl_file(tmp_path / "2", age_s=60)
    os.mkfifo(tmp_path / "3")
    (tmp_path / "4").mkdir()
    capture = NcclCapture({"NCCL_DEBUG_FILE": str(tmp_path / "%p")}, Path("/"), time.time())
    assert capture.files(range(6)) == [fresh]


def test_one_file_of_all_processes_is_read_since_nothing_else_can_be_known(tmp_path: Path) -> None:
    shared = nccl_file(tmp_path / "nccl.log")
    assert NcclCapture({"NCCL_DEBUG_FILE": "nccl.log"}, tmp_path, time.time()).files([1, 2]) == [shared]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, None),
        ({"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "ALL", "NCCL_DEBUG_FILE": "nccl.%p"}, None),
        ({"NCCL_DEBUG": "trace"}, None),
        ({"NCCL_DEBUG": "WARN"}, "NCCL_DEBUG=WARN is set in the environment and hides all channels: unset it"),
        ({"NCCL_DEBUG": "version"}, "NCCL_DEBUG=version is set in the environment and hides all channels: unset it"),
        ({"NCCL_DEBUG": ""}, "NCCL_DEBUG= is set in the environment and hides all channels: unset it"),
        ({"NCCL_DEBUG_SUBSYS": "init,env"}, None),
        ({"NCCL_DEBUG_SUBSYS": "P2P,SHM,NET"}, None),
        ({"NCCL_DEBUG_SUBSYS": "^INIT"}, None),
        ({"NCCL_DEBUG_SUBSYS": "^COLL,TUNING"}, None),
        (
            {"NCCL_DEBUG_SUBSYS": "COLL"},
            "NCCL_DEBUG_SUBSYS=COLL is set in the environment and hides channels over P2P, SHM, NET: unset it",
        ),
        (
            {"NCCL_DEBUG_SUBSYS": "NET,GRAPH"},
            "NCCL_DEBUG_SUBSYS=NET,GRAPH is set in the environment and hides channels over P2P, SHM: unset it",
        ),
        (
            {"NCCL_DEBUG_SUBSYS": "^init,net"},
            "NCCL_DEBUG_SUBSYS=^init,net is set in the environment and hides channels over NET: unset it",
        ),
        (
            {"NCCL_DEBUG_SUBSYS": ""},
            "NCCL_DEBUG_SUBSYS= is set in the environment and hides channels over P2P, SHM, NET: unset it",
        ),
        ({"NCCL_DEBUG_FILE": "/dev/shm/nccl.%p"}, None),
        (
            {"NCCL_DEBUG_FILE": "/dev/stderr"},
            "NCCL_DEBUG_FILE=/dev/stderr is set in the environment, so NCCL writes between other output, which can "
            "look like it, and is not read: unset it",
        ),
        (
            {"NCCL_DEBUG_FILE": ""},
            "NCCL_DEBUG_FILE= is set in the environment, so NCCL writes between other output, which can look like "
            "it, and is not read: unset it",
        ),
        (
            {"NCCL_DEBUG_FILE": "~/%p"},
            "NCCL_DEBUG_FILE=~/%p is set in the environment, and the folder FOLDER/~ is not there: make it, or unset "
            "the variable",
        ),
        (
            {"NCCL_DEBUG_FILE": "%h.log"},
            "NCCL_DEBUG_FILE=%h.log is set in the environment without %p, so processes overwrite each other's lines: "
            "add .%p to the name, or unset it",
        ),
        (
            {"NCCL_DEBUG": "WARN", "NCCL_DEBUG_FILE": "%%p"},
            "NCCL_DEBUG=WARN is set in the environment and hides all channels: unset it; NCCL_DEBUG_FILE=%%p is set "
            "in the environment without %p, so processes overwrite each other's lines: add .%p to the name, or "
            "unset it",
        ),
    ],
)
def test_what_hides_channels(tmp_path: Path, variables: dict[str, str], words: str | None) -> None:
    found = NcclCapture(variables, tmp_path, time.time()).obstacle()
    assert found == (words and words.replace("FOLDER", str(tmp_path)))


def test_defaults_hide_nothing(environment: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / "nccl").mkdir()
    assert NcclCapture(environment("cuda"), tmp_path, time.time()).obstacle() is None


# -- environment -----------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    for name in os.environ:
        if name.startswith(("VLLM_", "NCCL_", "CUDA_", "HF_HUB", "TORCHINDUCTOR")):
            monkeypatch.delenv(name)

    def environment(platform: Platform, model: str = "some/model", guard: Path | None = None) -> dict[str, str]:
        spec = server_spec("tp2", platform=platform, model=model)
        return server_environment(spec, ENDPOINT, tmp_path / "run", tmp_path / "nccl", guard)

    return environment


def test_environment_of_any_server(environment: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    found = environment("cpu")
    wanted = {"VLLM_API_KEY": "the-key", "TMPDIR": str(tmp_path / "run"), "VLLM_NO_USAGE_STATS": "1", "NO_COLOR": "1"}
    assert found | wanted == found
    assert not found["TORCHINDUCTOR_CACHE_DIR"].startswith(found["TMPDIR"])


def test_connections_outlive_pauses_of_the_client(environment: Callable[..., dict[str, str]]) -> None:
    assert environment("cuda")["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == "120"


def test_development_endpoints_are_offered_behind_the_guard_alone(
    environment: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert not {"VLLM_SERVER_DEV_MODE", "PYTHONPATH"} & set(environment("cpu"))
    found = environment("cpu", guard=Path("/guard"))
    assert (found["VLLM_SERVER_DEV_MODE"], found["PYTHONPATH"]) == ("1", "/guard")
    monkeypatch.setenv("PYTHONPATH", "/users:/other")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "0")
    found = environment("cpu", guard=Path("/guard"))
    assert (found["VLLM_SERVER_DEV_MODE"], found["PYTHONPATH"]) == ("0", "/guard:/users:/other")


def test_cpu_environment_binds_ranks_to_their_cores(environment: Callable[..., dict[str, str]]) -> None:
    found = environment("cpu")
    assert found["VLLM_TARGET_DEVICE"] == "cpu"
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
    assert not {"CUDA_VISIBLE_DEVICES", "NCCL_DEBUG"} & set(found)


def test_cuda_environment_names_devices_by_uuid_and_keeps_the_log_private(
    environment: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    found = environment("cuda")
    assert found["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"
    assert found["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert found["NCCL_DEBUG"] == "INFO"
    assert found["NCCL_DEBUG_SUBSYS"] == "INIT,ENV,GRAPH,P2P,SHM,NET,NVLS"
    assert found["NCCL_DEBUG_FILE"] == str(tmp_path / "nccl" / "nccl.%h.%p.log")
    assert not {"VLLM_TARGET_DEVICE", "VLLM_CPU_OMP_THREADS_BIND"} & set(found)


@pytest.mark.parametrize(
    ("platform", "name", "value"),
    [
        ("cuda", "NCCL_DEBUG", "TRACE"),
        ("cuda", "NCCL_DEBUG_SUBSYS", "ALL"),
        ("cuda", "NCCL_DEBUG_FILE", "/elsewhere/%p.log"),
        ("cpu", "VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        ("cpu", "VLLM_CPU_KVCACHE_SPACE", "8"),
        ("cpu", "TORCHINDUCTOR_CACHE_DIR", "/cache"),
        ("cuda", "HF_TOKEN", "secret"),
        ("cuda", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "7"),
    ],
)
def test_environment_keeps_what_the_user_chose(
    environment: Callable[..., dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    platform: Platform,
    name: str,
    value: str,
) -> None:
    monkeypatch.setenv(name, value)
    assert environment(platform)[name] == value


@pytest.mark.parametrize("name", ["TORCHINDUCTOR_CACHE_DIR", "VLLM_CPU_KVCACHE_SPACE", "TMPDIR", "PATH"])
def test_environment_keeps_the_callers_first_variable_first(
    environment: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    names = [name, *(other for other in os.environ if other != name)]
    monkeypatch.setattr(os, "environ", {other: os.environ.get(other, "1") for other in names})
    assert next(iter(environment("cpu"))) == name


def test_a_model_in_a_folder_needs_no_network(environment: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    assert environment("cpu", str(tmp_path))["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in environment("cpu", "some/model")
