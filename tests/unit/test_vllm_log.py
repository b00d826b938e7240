from __future__ import annotations

import pytest

from pytest_gpulayout.nccl_log import LogLine
from pytest_gpulayout.vllm_log import LogRecord, NameFact, VllmLogFacts, error_cause, parse_record, parse_vllm_log

API = "(APIServer pid=30) "
ENGINE = "(EngineCore pid=31) "
WORKER = "(Worker_TP1 pid=33) "
CODE = '  File "/venv/vllm/x.py", line 7, in run\n    run()\n    ^^^^^'
TRACEBACK = "Traceback (most recent call last):"


def logged(prefix: str, text: str, level: str = "ERROR") -> list[str]:
    """Lines as vLLM's logger writes them, each of a text of several lines with the prefix."""
    return [f"{prefix}{level} 11-21 03:43:40 [core.py:99] {line}" for line in text.split("\n")]


def raised(exception: str, *, before: str = "") -> str:
    return f"{before}{TRACEBACK}\n{CODE}\n{exception}"


@pytest.mark.parametrize(
    ("line", "record"),
    [
        (
            "(Worker_TP0 pid=3504) INFO 11-21 03:43:40 [parallel_state.py:1906] world_size=2",
            LogRecord("Worker_TP0", 3504, "INFO", "world_size=2", "parallel_state.py"),
        ),
        (
            "(EngineCore pid=1) ERROR 11-21 03:43:40 [core.py:999]     raise RuntimeError(",
            LogRecord("EngineCore", 1, "ERROR", "    raise RuntimeError(", "core.py"),
        ),
        (
            "(EngineCore_DP0 pid=7) (RayWorkerWrapper pid=9, ip=192.0.2.3) WARNING 11-12 11:11:57 [a.py:1] text",
            LogRecord("RayWorkerWrapper", 9, "WARNING", "text", "a.py"),
        ),
        ("INFO 01-15 08:10:11 [pynccl.py:103] text", LogRecord("", None, "INFO", "text", "pynccl.py")),
        (
            "(Worker pid=5) DEBUG 01-15 08:10:11 [distributed/device_communicators/pynccl.py:103] text",
            LogRecord("Worker", 5, "DEBUG", "text", "pynccl.py"),
        ),
        (
            "2025-11-21T03:43:40.1Z stdout F (APIServer pid=5) INFO 11-21 03:43:40 [a.py:1] text\r",
            LogRecord("APIServer", 5, "INFO", "text", "a.py"),
        ),
        (
            "\x1b[1;36m(APIServer pid=5)\x1b[0m INFO 11-21 03:43:40 [a.py:1] text",
            LogRecord("APIServer", 5, "INFO", "text", "a.py"),
        ),
        ("(EngineCore_0 pid=8) Process EngineCore_0:", LogRecord("EngineCore_0", 8, "", "Process EngineCore_0:")),
        ("killed VLLM (Worker pid=9) here", LogRecord("", None, "", "killed VLLM (Worker pid=9) here")),
        ("", LogRecord("", None, "", "")),
    ],
)
def test_record(line: str, record: LogRecord) -> None:
    facts = parse_vllm_log([line])

    assert parse_record(line.replace("\x1b[1;36m", "").replace("\x1b[0m", "")) == record
    assert facts.processes == ({record.pid: record.process} if record.pid else {})


def test_facts_of_a_server_with_two_ranks() -> None:
    lines = [
        f"{API}INFO 11-21 03:43:16 [api_utils.py:347]  ▄▄ ▄█ █     █     █ ▀▄▀ █  version 0.32.0",
        f"{ENGINE}INFO 11-21 03:43:32 [ompmultiprocessing.py:185] \tlocal_rank=0, core ids=[0, 1]",
        f"{ENGINE}INFO 11-21 03:43:32 [ompmultiprocessing.py:185] \tlocal_rank=1, core ids=[2]",
        "(Worker pid=33) INFO 11-21 03:43:40 [parallel_state.py:1906] world_size=2 rank=1 local_rank=1 "
        "distributed_init_method=tcp://127.0.0.1:29611 backend=nccl",
        "(Worker pid=32) INFO 11-21 03:43:40 [parallel_state.py:2350] rank 0 in world size 2 is assigned as "
        "DP rank 0, PP rank 0, PCP rank 0, TP rank 0, ETP rank 0, EP rank N/A, EPLB rank N/A",
        "(Worker pid=32) INFO 11-21 03:43:41 [pynccl.py:148] vLLM is using nccl==2.27.7",
        f"{WORKER}INFO 11-21 03:43:41 [cpu_model_runner.py:68] Starting to load model",
    ]

    facts = parse_vllm_log(lines, "server.log")

    assert facts.vllm_version == "0.32.0"
    assert facts.nccl == NameFact("2.27.7", LogLine("server.log", 6, "vLLM is using nccl==2.27.7"))
    assert facts.processes == {30: "APIServer", 31: "EngineCore", 32: "Worker", 33: "Worker_TP1"}
    assert facts.cpu_cores == {0: (0, 1), 1: (2,)}
    (rank,) = facts.ranks
    assert (rank.pid, rank.rank, rank.local_rank, rank.world_size) == (33, 1, 1, 2)
    assert (rank.init_method, rank.backend) == ("tcp://127.0.0.1:29611", "nccl")
    assert (rank.evidence.file, rank.evidence.line) == ("server.log", 4)
    (assignment,) = facts.assignments
    assert (assignment.rank, assignment.places["TP"], assignment.places["EP"]) == (0, 0, None)


# -- collectives -----------------------------------------------------------------------------------------------------


def said(source: str, message: str, *, level: str = "WARNING", pid: int = 32) -> str:
    return f"(Worker pid={pid}) {level} 11-21 03:43:41 [{source}:7] {message}"


BACKENDS = (
    "Using ['CUSTOM', 'PYNCCL'] all-reduce backends (in dispatch order) for group 'tp:0' "
    "out of potential backends: ['FLASHINFER', 'CUSTOM', 'PYNCCL']."
)


def test_all_reduce_backends_of_each_group() -> None:
    older = "Using [] all-reduce backends (in dispatch order) for group '<unnamed>'"
    lines = [said("cuda_communicator.py", BACKENDS), said("cuda_communicator.py", older, pid=33)]

    tensor_parallel, unnamed = parse_vllm_log([*lines, lines[0].replace("'CUSTOM', ", "")]).all_reduce

    assert (tensor_parallel.group, tensor_parallel.pid) == ("tp:0", 32)
    assert tensor_parallel.backends == ("CUSTOM", "PYNCCL")
    assert tensor_parallel.potential == ("FLASHINFER", "CUSTOM", "PYNCCL")
    assert (tensor_parallel.evidence.line, tensor_parallel.evidence.text) == (1, BACKENDS)
    assert (unnamed.group, unnamed.pid, unnamed.backends, unnamed.potential) == ("<unnamed>", 33, (), ())


OFF = [
    (
        "custom_all_reduce.py",
        "Custom allreduce is disabled because it's not supported on more than two PCIe-only GPUs. To silence this "
        "warning, specify disable_custom_all_reduce=True explicitly.",
        ("CUSTOM", "it's not supported on more than two PCIe-only GPUs"),
    ),
    (
        "custom_all_reduce.py",
        "Custom allreduce is disabled due to an unsupported world size: 3. Supported world sizes: [2, 4, 6, 8, 16]. "
        "To silence this warning, specify disable_custom_all_reduce=True explicitly.",
        ("CUSTOM", "an unsupported world size: 3. Supported world sizes: [2, 4, 6, 8, 16]"),
    ),
    (
        "custom_all_reduce.py",
        "Custom collectives are disabled because this multi-node group does not support MNNVL multicast.",
        ("CUSTOM", "this multi-node group does not support MNNVL multicast"),
    ),
    (
        "custom_all_reduce.py",
        "Custom allreduce is disabled because of missing custom allreduce library",
        ("CUSTOM", "of missing custom allreduce library"),
    ),
    (
        "all_reduce_utils.py",
        "Two processes do not agree on the P2P access status on 0 -> 1, treat as disabled.",
        ("CUSTOM", "Two processes do not agree on the P2P access status on 0 -> 1"),
    ),
    (
        "symm_mem.py",
        "SymmMemCommunicator: Device capability 8.0 not supported, communicator is not available.",
        ("SYMM_MEM", "Device capability 8.0 not supported, communicator is not available"),
    ),
    (
        "symm_mem.py",
        "SymmMemCommunicator: symmetric memory initialization failed: CUDA driver error: 999 Communicator is not "
        "available. To suppress this warning set VLLM_ALLREDUCE_USE_SYMM_MEM=0",
        ("SYMM_MEM", "symmetric memory initialization failed: CUDA driver error: 999"),
    ),
    ("symm_mem.py", "SymmMemCommunicator: Using override max_size: 64 bytes", None),
    (
        "quick_all_reduce.py",
        "Custom quick allreduce is disabled because this process group spans across nodes.",
        ("QUICK_REDUCE", "this process group spans across nodes"),
    ),
    ("quick_all_reduce.py", "Custom quick allreduce: min size override = 2 MB", None),
    (
        "flashinfer_all_reduce.py",
        "FlashInfer All Reduce is disabled because it is not supported for world_size=3.",
        ("FLASHINFER", "it is not supported for world_size=3"),
    ),
    (
        "flashinfer_all_reduce.py",
        "Failed to initialize FlashInfer All Reduce workspace: multicast refused. This is expected on GPUs without "
        "NVSwitch (e.g., NVLink bridge-only or PCIe topologies).",
        (
            "FLASHINFER",
            "multicast refused. This is expected on GPUs without NVSwitch (e.g., NVLink bridge-only or PCIe "
            "topologies)",
        ),
    ),
    (
        "flashinfer_pcie_ipc_all_reduce.py",
        "FlashInfer PCIe IPC all-reduce requires the CUDA platform.",
        ("FLASHINFER_PCIE_IPC", "requires the CUDA platform"),
    ),
    ("flashinfer_pcie_ipc_all_reduce.py", "Initialized FlashInfer PCIe IPC all-reduce for TP2, dtype=x.", None),
]


@pytest.mark.parametrize(("source", "message", "fact"), OFF)
def test_backend_that_is_off_and_why(source: str, message: str, fact: tuple[str, str] | None) -> None:
    # Every rank says it.
    facts = parse_vllm_log([said(source, message), said(source, message, pid=33)], "server.log")

    assert [(off.backend, off.reason) for off in facts.all_reduce_off] == ([fact] if fact else [])
    assert [(off.pid, off.evidence) for off in facts.all_reduce_off] == (
        [(32, LogLine("server.log", 1, message))] if fact else []
    )


@pytest.mark.parametrize("name", ["AgRsAll2AllManager", "DeepEPHTAll2AllManager"])
def test_all_to_all_manager(name: str) -> None:
    (fact,) = parse_vllm_log([said("cuda_communicator.py", f"Using {name} all2all manager.", level="INFO")]).all2all
    assert (fact.name, fact.evidence.line) == (name, 1)


def test_all_to_all_manager_of_the_cpu_backend() -> None:
    line = said("cpu_communicator.py", "Using allgather_reducescatter all2all manager.", level="INFO")
    assert [fact.name for fact in parse_vllm_log([line, line]).all2all] == ["allgather_reducescatter"]


@pytest.mark.parametrize(
    ("config", "value"),
    [
        ("model='m', dcp_comm_backend=ag_rs, disable_custom_all_reduce=True, quantization=None", True),
        ("model='m', disable_custom_all_reduce=False, served_model_name=disable_custom_all_reduce=True", False),
        ("model='disable_custom_all_reduce=True, ', disable_custom_all_reduce=False, seed=0", False),
        ('model="it\'s, disable_custom_all_reduce=True", disable_custom_all_reduce=False, seed=0', False),
        ("model='m', dtype=torch.bfloat16", None),
    ],
)
def test_option_that_the_engine_took(config: str, value: bool | None) -> None:
    start = "Initializing a V1 LLM engine (v0.32.0) with config: "
    option = parse_vllm_log([said("core.py", start + config, level="INFO")]).custom_all_reduce_disabled
    assert (option and option.value) is value
    assert option is None or option.evidence.text == f"disable_custom_all_reduce={value}"


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (
            "model='m', dtype=torch.bfloat16, max_seq_len=2048, quantization=None, quantization_config=None",
            "bfloat16",
        ),
        ("model='m', dtype=torch.float16, quantization=awq_marlin, kv_cache_dtype=fp8", "float16 awq_marlin"),
        ("model='dtype=torch.float32, ', dtype=torch.float16, quantization=None", "float16"),
        ("model='m', dtype=torch.bfloat16, served_model_name=quantization_fp8", "bfloat16"),
        ("model='m', kv_cache_dtype=auto", None),
    ],
)
def test_dtype_that_the_engine_took(config: str, dtype: str | None) -> None:
    start = "Initializing a V1 LLM engine (v0.32.0) with config: "
    assert parse_vllm_log([said("core.py", start + config, level="INFO")]).dtype == dtype
    assert parse_vllm_log([said("serving_chat.py", start + config, level="INFO")]).dtype is None


@pytest.mark.parametrize("message", [BACKENDS, *(message for _, message, fact in OFF if fact)])
@pytest.mark.parametrize(
    "line",
    [
        "{message}",
        "(APIServer pid=30) INFO 11-21 03:45:00 [logger.py:40] {message}",
        "(APIServer pid=30) INFO 11-21 03:45:00 [logger.py:40] (Worker pid=32) INFO 11-21 03:45:00 "
        "[cuda_communicator.py:7] {message}",
        "(Worker pid=32) INFO 11-21 03:45:00 [cuda_communicator.py:7] prompt: '{message}'",
        "INFO:     127.0.0.1:5 - GET /[custom_all_reduce.py:7] {message}",
    ],
)
def test_text_of_a_request_is_no_fact(line: str, message: str) -> None:
    facts = parse_vllm_log([line.format(message=message)])
    assert (facts.all_reduce, facts.all_reduce_off, facts.cpu_shm_off) == ((), (), ())


def test_group_whose_shared_memory_is_off() -> None:
    facts = parse_vllm_log(
        [
            "(Worker pid=9) INFO 11-21 04:07:12 [cpu_communicator.py:47] CPU SHM communicator disabled for group "
            "tp:0: ranks do not share the same SHM group name, falling back to torch.distributed."
        ]
    )

    (fact,) = facts.cpu_shm_off
    assert (fact.pid, fact.group, fact.evidence.line) == (9, "tp:0", 1)


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("INFO 11-21 03:43:31 [core.py:133] Initializing a V1 LLM engine (v0.32.1rc1) with config: x", "0.32.1rc1"),
        ("INFO 01-15 08:10:11 [api_server.py:9] vLLM API server version 0.10.2", "0.10.2"),
        ("INFO 01-15 08:10:11 [other.py:9] transformers version 4.57.0", None),
    ],
)
def test_version(line: str, version: str | None) -> None:
    assert parse_vllm_log([line]).vllm_version == version


def test_nothing_to_read_is_a_value() -> None:
    assert parse_vllm_log([]) == VllmLogFacts()
    assert error_cause([]) is None
    assert (
        error_cause([f"{API}INFO 11-21 03:44:57 [launcher.py:254] [shutdown] API server: shutdown triggered"]) is None
    )


HEADS = "Value error, Total number of attention heads (4) must be divisible by tensor parallel size (3)."


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        pytest.param(raised("RuntimeError: no such kernel"), "RuntimeError: no such kernel", id="runtime error"),
        pytest.param(
            raised("OSError: [Errno 98] Address already in use"),
            "OSError: [Errno 98] Address already in use",
            id="port taken",
        ),
        pytest.param(
            raised("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            id="dotted name",
        ),
        pytest.param(f"{TRACEBACK}\nAssertionError", "AssertionError", id="without a text"),
        pytest.param(
            f'{TRACEBACK}\n  File "/x/vllm/v1/worker/a.py", line 7, in run\n    f()\n'
            '  File "/x/vllm/distributed/base.py", line 296, in all_gatherv\n    raise NotImplementedError\n'
            "NotImplementedError",
            "NotImplementedError in base.py:296, all_gatherv",
            id="without a text, raised somewhere",
        ),
        pytest.param(
            raised(
                "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
                f"  {HEADS} [type=value_error, input_value=ArgsKwargs((), ...), input_type=ArgsKwargs]\n"
                "    For further information visit https://errors.pydantic.dev/2.14/v/value_error"
            ),
            f"ValidationError: {HEADS}",
            id="pydantic, whole model",
        ),
        pytest.param(
            raised(
                "pydantic_core._pydantic_core.ValidationError: 2 validation errors for ModelConfig\n"
                "max_model_len\n"
                "  Input should be greater than 0 [type=greater_than, input_value=0, input_type=int]\n"
                "dtype\n"
                "  Input should be a string [type=string_type, input_value=0, input_type=int]"
            ),
            "ValidationError: max_model_len: Input should be greater than 0",
            id="pydantic, field",
        ),
        pytest.param(
            raised("KeyError: 'x'")
            + "\n\nDuring handling of the above exception, another exception occurred:\n\n"
            + raised("ValueError: unknown quantization x"),
            "ValueError: unknown quantization x",
            id="a lookup that was handled",
        ),
        pytest.param(
            raised("torch.OutOfMemoryError: CUDA out of memory.")
            + "\n\nThe above exception was the direct cause of the following exception:\n\n"
            + raised("RuntimeError: warming up the sampler failed"),
            "torch.OutOfMemoryError: CUDA out of memory.",
            id="the root of a chain",
        ),
        pytest.param(
            raised("RuntimeError: first") + "\n" + raised("RuntimeError: second"),
            "RuntimeError: first",
            id="the first of several",
        ),
        pytest.param(
            f"  + Exception Group {TRACEBACK}\n  |   File \"x.py\", line 1, in f\n  |     f()\n  | ValueError: inner",
            "ValueError: inner",
            id="exception group",
        ),
        pytest.param(
            f"{TRACEBACK}\n{CODE}\nINFO:     Shutting down\nValueError: no", "ValueError: no", id="uvicorn in between"
        ),
        pytest.param(
            "usage: api_server.py [-h]\napi_server.py: error: unrecognized arguments: --foo",
            "error: unrecognized arguments: --foo",
            id="argparse",
        ),
        pytest.param("python3: No module named vllm", "python3: No module named vllm", id="no vllm"),
        pytest.param("Killed", "Killed", id="killed by a shell"),
        pytest.param(
            "a:1:2 [0] NCCL WARN Call to posix_fallocate failed : No space left on device\n"
            + raised("torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled system error"),
            "a:1:2 [0] NCCL WARN Call to posix_fallocate failed : No space left on device",
            id="NCCL's own warning explains NCCL's error",
        ),
    ],
)  # fmt: skip
def test_cause_in_one_process(text: str, cause: str) -> None:
    assert error_cause(text.split("\n")) == cause


def test_cause_in_a_worker_goes_before_what_followed_from_it() -> None:
    lines = [
        *logged(API, raised("RuntimeError: a request was refused")),
        *logged(WORKER, "WorkerProc failed to start.\n" + raised("RuntimeError: Cannot find any model weights")),
        *logged(
            ENGINE, raised("Exception: WorkerProc initialization failed due to an exception in a background process.")
        ),
        *raised("RuntimeError: Engine core initialization failed. See root cause above.").split("\n"),
    ]

    assert error_cause(lines) == "RuntimeError: Cannot find any model weights"


def test_cause_in_the_engine_goes_before_the_api_server() -> None:
    dead = "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above)"
    lines = [*logged(API, raised("ValueError: later")), *logged(ENGINE, raised("ValueError: KV cache is too small"))]

    assert error_cause([*lines, *logged(API, raised(dead))]) == "ValueError: KV cache is too small"
    assert error_cause(logged(API, raised(dead))) is None


def test_tracebacks_of_several_workers_may_interleave() -> None:
    one = logged("(Worker_TP0 pid=40) ", raised("RuntimeError: Connection closed by peer [192.0.2.1]:4000"))
    two = logged("(Worker_TP1 pid=41) ", raised("ValueError: the cause"))
    lines = [line for pair in zip(one, two, strict=True) for line in pair]

    assert error_cause(lines) == "ValueError: the cause"
    assert error_cause(one) == "RuntimeError: Connection closed by peer [192.0.2.1]:4000"


def test_signal_goes_before_the_engine_that_noticed() -> None:
    died = "Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor."
    lines = [*logged(ENGINE, died), *logged(ENGINE, raised("RuntimeError: Executor failed."))]

    assert error_cause(lines) == died


def test_warnings_are_no_cause() -> None:
    assert error_cause(logged(WORKER, raised("ImportError: no flashinfer"), level="WARNING")) is None
