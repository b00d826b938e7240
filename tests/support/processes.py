"""Starting the fake vLLM, and watching processes from outside.

As a script (``python -m tests.support.processes LAYOUT LOG_DIR TIMEOUT_S``) it is a pytest that can be killed: it
launches a server, prints its URL, and lives until its standard input closes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.ports import Platform, ServerSpec
from pytest_gpulayout.topology import Device

ROOT = Path(__file__).parents[2]
FAKE_VLLM = Path(__file__).parent / "fake_vllm"


_TRAIN = """
import sys
from vllm.gpu import use_gpus
use_gpus(sys.argv[1:])
print("computing", flush=True)
sys.stdin.read()
"""


def use_fake_vllm(monkeypatch: pytest.MonkeyPatch, **behaviour: object) -> None:
    """Let ``python -m vllm...`` start the fake. :param behaviour: see ``fake_vllm/vllm/behaviour.py``."""
    monkeypatch.setenv("PYTHONPATH", str(FAKE_VLLM))
    monkeypatch.setenv("FAKE_VLLM", json.dumps(behaviour))


@contextmanager
def somebody_computes(
    folder: Path, uuids: list[str], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """``python train.py`` of somebody else, on GPUs of the fake NVML until the block ends."""
    script = folder / "train.py"
    script.write_text(_TRAIN)
    command = [sys.executable, "-S", str(script), *uuids]
    env = {**environment, "PYTHONPATH": str(FAKE_VLLM)}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"computing\n"
        try:
            yield process
        finally:
            process.kill()


def server_spec(
    layout: str = "tp2",
    *,
    platform: Platform = "cpu",
    arguments: tuple[str, ...] = (),
    model: str = "some/model",
    timeout_s: float = 20,
    uuid: str | None = None,
) -> ServerSpec:
    parsed = parse_layout(layout)
    devices = tuple(
        Device(rank, uuid=f"{uuid or 'GPU'}-{rank}", cpu_affinity=str(rank)) for rank in range(parsed.gpus)
    )
    return ServerSpec(parsed, model, arguments, platform, devices, sys.executable, timeout_s)


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.02)


def processes_marked(marker: str) -> dict[int, str]:
    """Process id -> title of all living processes that have ``marker`` in their environment, but not this one."""
    found = {}
    for entry in os.listdir("/proc"):
        try:
            environment = Path(f"/proc/{entry}/environ").read_bytes() if entry.isdigit() else b""
            if marker.encode() in environment and int(entry) != os.getpid():
                found[int(entry)] = command_line(int(entry))
        except OSError:
            continue
    return found


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def end_with_segments(process: subprocess.Popen[bytes], timeout_s: float = 10) -> None:
    """End a server that no launcher of ours has started, with what its ranks met by and shared: vLLM leaves that."""
    family = [psutil.Process(process.pid)] if process.poll() is None else []
    below = [child for parent in family for child in parent.children(recursive=True)]
    paths = {mapped.path for member in (*family, *below) for mapped in member.memory_maps()}
    process.terminate()
    process.wait(timeout_s)
    for child in psutil.wait_procs(below, timeout=timeout_s)[1]:
        child.kill()
    for path in paths:
        if path.startswith("/dev/shm/vllm_dist_"):
            Path(path).unlink(missing_ok=True)
            (Path(tempfile.gettempdir()) / Path(path).name.partition("-")[0]).unlink(missing_ok=True)


def segments_of(identity: str) -> list[str]:
    return sorted(name for name in os.listdir("/dev/shm") if identity in name)


def main() -> None:
    from pytest_gpulayout.adapters.replica_launcher import ReplicaLauncher
    from pytest_gpulayout.adapters.vllm_process import VllmLauncher

    layout, log_dir, timeout_s = sys.argv[1:]
    spec = server_spec(layout, platform="cuda", timeout_s=float(timeout_s), uuid=os.environ["TEST_MARKER"])
    server = ReplicaLauncher(VllmLauncher(Path(log_dir))).launch(spec, lambda _: None)
    sys.stdout.write(f"{server.endpoint.url}\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
