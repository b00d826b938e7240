"""The engine of a server with ``--distributed-executor-backend ray``, and its workers, which do nothing but last.

Their placement, names and variables are those of vLLM 0.32: ``initialize_ray_cluster``,
``get_bundles_sorted_by_node`` and ``build_actor_name`` in ``vllm/v1/executor/ray_utils.py``, ``_init_executor`` in
``ray_executor_v2.py``. So is what they log: ``init_distributed_environment`` in ``distributed/parallel_state.py``.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import uuid
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from vllm.behaviour import Behaviour
from vllm.gpu import own_gpu, use_gpus
from vllm.sizes import Sizes

_WORKER_SPECIFIC = {"VLLM_HOST_IP", "VLLM_HOST_PORT", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"}


def _of_one_host() -> Any:
    path = Path(__file__).parents[2] / "fake_vllm" / "vllm" / "processes.py"
    spec = spec_from_file_location("vllm.processes_of_one_host", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_ORIGINAL = _of_one_host()


def __getattr__(name: str) -> Any:
    """All that Ray changes nothing about."""
    return getattr(_ORIGINAL, name)


def start_engines(model: str, sizes: Sizes, behaviour: Behaviour, **of_nodes: int) -> list[Any]:
    """Start the engine; return when its workers are there."""
    assert "--distributed-executor-backend" in sys.argv
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _run_engine(sizes, behaviour, writing)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    if os.read(reading, 1) != b"+":
        raise SystemExit("the engine has ended")
    threading.Thread(target=_end_with, args=(pid,), daemon=True).start()
    return [_ORIGINAL.Engine(0, pid, {})]  # Ray ends its workers when it has gone


def _end_with(engine: int) -> None:
    """The server goes when its engine does."""
    os.waitid(os.P_PID, engine, os.WEXITED | os.WNOWAIT)
    os.kill(os.getpid(), signal.SIGTERM)


def _run_engine(sizes: Sizes, behaviour: Behaviour, writing: int) -> None:
    import ray
    from ray.util import placement_group, placement_group_table
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init()
    group = placement_group([{"GPU": 1.0} for _ in range(sizes.engine_ranks)], strategy="PACK")
    ray.get(group.ready(), timeout=60)
    node_of = placement_group_table(group)["bundles_to_node_id"]
    driver = ray.get_runtime_context().get_node_id()
    order = sorted(node_of, key=lambda bundle: (0 if node_of[bundle] == driver else 1, node_of[bundle]))
    environment = {name: value for name, value in os.environ.items() if name not in _WORKER_SPECIFIC}
    world = {"size": sizes.engine_ranks, "comm": uuid.uuid4().hex[:16], "via": behaviour.nccl}
    instance = uuid.uuid4().hex[:5]
    workers = []
    for rank, bundle in enumerate(order):
        strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
        name = f"vllm_Worker_{instance}" + (f"_TP{rank % sizes.tp}" if sizes.tp > 1 else "")
        options = {"name": name, "num_cpus": 0, "num_gpus": 1, "max_concurrency": 2, "scheduling_strategy": strategy}
        workers.append(ray.remote(RayWorkerProc).options(**options).remote(rank, world))
    ray.get([worker.initialize_worker.remote(environment) for worker in workers])
    running = [worker.run.remote() for worker in workers]
    os.write(writing, b"+")
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    done, _ = ray.wait(running, num_returns=1)  # as RayWorkerMonitor does, every 5 s
    dead = [running.index(answer) for answer in done]
    text = f"RayWorkerProc rank={dead} died unexpectedly, shutting down executor."
    _ORIGINAL.say("EngineCore", "ray_executor_v2.py:526", text, level="ERROR")


class RayWorkerProc:
    """A worker; its rank is known from the start, its variables are not."""

    def __init__(self, rank: int, world: dict[str, Any]) -> None:
        self._rank = rank
        self._world = world

    def initialize_worker(self, driver_env_vars: dict[str, str]) -> None:
        """Take the variables of the engine, where this node has none of that name; compute; write NCCL's log."""
        for name, value in driver_env_vars.items():
            os.environ.setdefault(name, value)
        rank, size = self._rank, self._world["size"]
        where = f"world_size={size} rank={rank} local_rank=0 distributed_init_method=tcp://127.0.0.1:1 backend=nccl"
        _ORIGINAL.say(f"Worker_TP{rank}", "parallel_state.py:1906", where)
        gpu = own_gpu(0)
        assert gpu is not None
        use_gpus([gpu.uuid])
        self._write_nccl_log(gpu.index, int(gpu.bus_id.replace(":", "").replace(".", ""), 16))

    def _write_nccl_log(self, nvml_device: int, bus_id: int) -> None:
        pattern, via = os.environ.get("NCCL_DEBUG_FILE"), self._world["via"]
        if pattern is None or via is None:
            return
        rank, size, comm_id = self._rank, self._world["size"], self._world["comm"]
        host, pid = socket.gethostname(), os.getpid()
        comm = f"comm 0x55d0c0de00{rank:02x} rank {rank}"
        called = f"ncclCommInitRankConfig {comm} nranks {size} cudaDev 0 nvmlDev {nvml_device} busId {bus_id:x}"
        texts = [
            "NCCL version 2.27.5+cuda12.9",
            f"{called} commId 0x{comm_id} - Init START",
            f"{comm} nRanks {size} nNodes {size} localRanks 1 localRank 0 MNNVL 0",
            f"{called} commId 0x{comm_id} - Init COMPLETE",
        ]
        before, after = (rank - 1) % size, (rank + 1) % size
        for channel in range(2):
            for source, target, end in ((before, rank, "receive"), (rank, after, "send")):
                edge = f"{source}[{nvml_device}] -> {target}[{nvml_device}]"
                texts.append(f"Channel {channel:02d}/0 : {edge} [{end}] via {via}")
        head = f"{host}:{pid}:{pid} [0] NCCL INFO"
        path = Path(pattern.replace("%h", host).replace("%p", str(pid)))
        path.write_text("".join(f"{head} {text}\n" for text in texts))

    def run(self) -> None:
        """Last as long as the engine does."""
        threading.Event().wait()
