"""What vLLM's log says about its processes, ranks and collectives, and which line explains a crash.

Knows the log format of vLLM 0.32 (``vllm/logger.py``), the messages cited beside each pattern, and Python's
traceback text. Leaves judging to :mod:`~pytest_gpulayout.transport` and :mod:`~pytest_gpulayout.all_reduce`, and
opening files to the callers::

    (Worker_TP0 pid=3504) INFO 11-21 03:43:40 [parallel_state.py:1906] world_size=2 rank=0 local_rank=0 ...

vLLM without several processes, and lines of the libraries below it, have no ``(NAME pid=N)``; Ray puts a second
one in front, container runtimes a time stamp.

A request can bring text into this log, line breaks included, and vLLM puts its prefix before each line of it. So what
is said about collectives counts only from the source file that says it, and at the beginning of a message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Literal

from pytest_gpulayout.nccl_log import LogLine, numbered_lines

AllReduceBackend = Literal["CUSTOM", "SYMM_MEM", "QUICK_REDUCE", "FLASHINFER", "FLASHINFER_PCIE_IPC"]
"""Those that say why they are off, by the names that ``Using [...] all-reduce backends`` gives them."""

_LONGEST_EVIDENCE = 400
_PROCESS = re.compile(r"\((?P<name>[A-Za-z][\w.\[\]-]*) pid=(?P<pid>\d{1,10})(?:, ip=[^()]*)?\) ?")
_RECORD = re.compile(
    r"\b(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) "
    r"(?:\d{4}-)?\d\d-\d\d \d\d:\d\d:\d\d(?:[.,]\d+)? \[(?:[^\]\s]*/)?(?P<source>[^\]\s/]+):\d+\] ?"
)

# Banner of entrypoints/serve/utils/api_utils.py; v1/engine/core.py; the API server before 0.11.
_VERSION = re.compile(r"█ +version (\d\S*)|LLM engine \(v(\d[^)\s]*)\)|vLLM API server version (\d\S*)")
# distributed/parallel_state.py: init_distributed_environment, initialize_model_parallel.
_RANK = re.compile(
    r"world_size=(?P<world_size>\d{1,9}) rank=(?P<rank>\d{1,9}) local_rank=(?P<local_rank>-?\d{1,9}) "
    r"distributed_init_method=(?P<init_method>\S+) backend=(?P<backend>\S+)"
)
_ASSIGNED = re.compile(
    r"rank (?P<rank>\d{1,9}) in world size (?P<world_size>\d{1,9}) is assigned as (?P<places>\w+ rank .*)"
)
_PLACE = re.compile(r"(\w+) rank (\d{1,9}|N/A)")
# distributed/device_communicators/: the file that logs each of these is in _COLLECTIVES and _BACKEND_OFF.
_NCCL = re.compile(r"vLLM is using nccl==(?P<name>\S+)")
_ALL_REDUCE = re.compile(
    r"Using \[(?P<names>[^\]]*)\] all-reduce backends \(in dispatch order\) for group '(?P<group>[^']*)'"
    r"(?: out of potential backends: \[(?P<potential>[^\]]*)\])?"
)
_QUOTED = re.compile(r"'([^']*)'")
_ALL2ALL = re.compile(r"Using (?P<name>\w+) all2all manager\.")
_CPU_SHM_OFF = re.compile(r"CPU SHM communicator disabled for group (?P<group>[^:\s]+(?::\d+)?)")
_BACKEND_OFF: Mapping[str, tuple[AllReduceBackend, re.Pattern[str]]] = {
    # CustomAllreduce.__init__; older releases: "... because this process group spans across nodes".
    "custom_all_reduce.py": (
        "CUSTOM",
        re.compile(r"Custom (?:allreduce is|collectives are) disabled (?:because|due to) (?P<reason>.*)"),
    ),
    # can_actually_p2p; the P2P test behind VLLM_SKIP_P2P_CHECK=0.
    "all_reduce_utils.py": (
        "CUSTOM",
        re.compile(r"(?P<reason>Two processes do not agree on the P2P access status on \d+ -> \d+)"),
    ),
    # SymmMemCommunicator.__init__, whose one line that says nothing is wrong is "Using override max_size".
    "symm_mem.py": ("SYMM_MEM", re.compile(r"SymmMemCommunicator: (?!Using )(?P<reason>.*)")),
    # QuickAllReduce.__init__, init_quick_all_reduce.
    "quick_all_reduce.py": (
        "QUICK_REDUCE",
        re.compile(r"Custom quick allreduce is disabled(?: because| due to|:) (?P<reason>.*)"),
    ),
    # FlashInferAllReduce.__init__; _create_workspace, at the first all-reduce.
    "flashinfer_all_reduce.py": (
        "FLASHINFER",
        re.compile(
            r"(?:FlashInfer All Reduce is disabled because|Failed to initialize FlashInfer All Reduce workspace:) "
            r"(?P<reason>.*)"
        ),
    ),
    # FlashInferPcieIpcAllReduce.__init__, setup; warmup_flashinfer_pcie_ipc_allreduce.
    "flashinfer_pcie_ipc_all_reduce.py": (
        "FLASHINFER_PCIE_IPC",
        re.compile(r"FlashInfer PCIe IPC all-reduce (?P<reason>(?:was|requires|does not|has no) .*)"),
    ),
}
_HINT = re.compile(r"[.,]? (?:Communicator is not available\. )?To (?:silence|suppress) this warning.*$")
# EngineCore.__init__ in v1/engine/core.py writes VllmConfig.__str__; the first option of its name is the real one
# once what stands in quotes (names of models) is out.
_CONFIG = re.compile(r"Initializing a V1 LLM engine \(.*?\) with config: ")
_QUOTED_TEXT = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_CUSTOM_OPTION = re.compile(r"\bdisable_custom_all_reduce=(True|False)\b")
_DTYPE_OPTION = re.compile(r"(?<![\w-])dtype=(?:torch\.)?(\w+)")
_QUANTIZATION_OPTION = re.compile(r"(?<![\w-])quantization=(?!None\b)(\w+)")
# update_kv_cache_capacity in v1/core/kv_cache_utils.py, one line per engine.
_KV_CACHE = re.compile(r"[\w +]+ KV cache size: (?P<tokens>\d[\d,]{0,20}) tokens")
# utils/ompmultiprocessing.py.
_CPU_BINDING = re.compile(r"local_rank=(?P<local_rank>\d{1,9}), core ids=\[(?P<cores>(?:\d{1,9}(?:, ?)?)*)\]")


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One line, taken apart; ``None`` and ``""`` where it has no such part.

    :param process: innermost ``(NAME pid=N)``. :param level: e.g. ``"ERROR"``.
    :param message: the rest, indentation kept. :param source: the file that logged it, e.g. ``"pynccl.py"``.
    """

    process: str
    pid: int | None
    level: str
    message: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class RankFact:
    """A worker says which rank it is; written by every rank when torch.distributed starts."""

    pid: int | None
    world_size: int
    rank: int
    local_rank: int
    init_method: str
    backend: str
    evidence: LogLine


@dataclass(frozen=True, slots=True)
class AssignmentFact:
    """Place of a rank in each group, e.g. ``{"DP": 0, "TP": 1, "EP": None}``; only local rank 0 writes it."""

    pid: int | None
    rank: int
    world_size: int
    places: Mapping[str, int | None]
    evidence: LogLine


@dataclass(frozen=True, slots=True)
class GroupFact:
    """A line about one communication group, e.g. ``tp:0``."""

    pid: int | None
    group: str
    evidence: LogLine


@dataclass(frozen=True, slots=True)
class NameFact:
    """A version or a class that is in use."""

    name: str
    evidence: LogLine


@dataclass(frozen=True, slots=True)
class AllReduceFact:
    """The all-reduce backends of a group; which of them serves a call depends on the size of the tensor.

    :param group: e.g. ``tp:0``. :param backends: those that are on, in the order they are tried.
    :param potential: those that this vLLM knows, likewise.
    """

    pid: int | None
    group: str
    backends: tuple[str, ...]
    potential: tuple[str, ...]
    evidence: LogLine


@dataclass(frozen=True, slots=True)
class BackendOffFact:
    """An all-reduce backend that is off, and why, in vLLM's words without its hint how to silence them."""

    pid: int | None
    backend: AllReduceBackend
    reason: str
    evidence: LogLine


@dataclass(frozen=True, slots=True)
class OptionFact:
    """An option as the engine took it, whatever brought it there."""

    value: bool
    evidence: LogLine


@dataclass(frozen=True, slots=True)
class VllmLogFacts:
    """What a server's log says; a fact that is missing was not logged.

    :param processes: pid to the last name it used, e.g. ``Worker_TP0``, ``EngineCore``, ``APIServer``.
    :param nccl: the version of NCCL that vLLM itself calls.
    :param all_reduce: one per group of more than one rank that rank 0 is in; older releases do not log it.
    :param all_reduce_off: one entry per backend and reason, the first that said so.
    :param custom_all_reduce_disabled: the option ``disable_custom_all_reduce`` of the engine.
    :param dtype: of the weights as the engine took it, with the quantisation where there is one: ``"bfloat16 fp8"``.
    :param all2all: managers of the all-to-all of expert parallelism, by class (on the CPU backend by name).
    :param cpu_shm_off: groups whose shared-memory communicator is off on the CPU backend.
    :param cpu_cores: local rank to the cores its threads are bound to.
    :param kv_cache_tokens: room in the KV cache, of the engine that has least.
    """

    vllm_version: str | None = None
    nccl: NameFact | None = None
    processes: Mapping[int, str] = field(default_factory=dict)
    ranks: tuple[RankFact, ...] = ()
    assignments: tuple[AssignmentFact, ...] = ()
    all_reduce: tuple[AllReduceFact, ...] = ()
    all_reduce_off: tuple[BackendOffFact, ...] = ()
    custom_all_reduce_disabled: OptionFact | None = None
    dtype: str | None = None
    all2all: tuple[NameFact, ...] = ()
    cpu_shm_off: tuple[GroupFact, ...] = ()
    cpu_cores: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    kv_cache_tokens: int | None = None


def parse_vllm_log(lines: Iterable[str | bytes], source: str = "vllm.log") -> VllmLogFacts:
    """Read a server's log, or the logs of its nodes one after the other.

    :param lines: text, one line or several per item; or bytes, cut anywhere.
    :param source: file name for the evidence.
    """
    reader = _Reader()
    for number, line in numbered_lines(lines):
        record = parse_record(line)
        reader.read(record, LogLine(source, number, record.message.strip()[:_LONGEST_EVIDENCE]))
    return reader.result()


def parse_record(line: str) -> LogRecord:
    """Take a line apart; what stands before vLLM's own prefix (Ray, kubectl) is dropped."""
    line = line.rstrip("\r")
    record = _RECORD.search(line)
    head = line[: record.start()] if record else line
    process = None
    end = 0
    for match in _PROCESS.finditer(head):
        # Without a level the prefix must stand at the start, or the message itself is meant.
        if record is None and match.start() != end:
            break
        process, end = match, match.end()
    return LogRecord(
        process=process["name"] if process else "",
        pid=int(process["pid"]) if process else None,
        level=record["level"] if record else "",
        message=line[record.end() :] if record else line[end:],
        source=record["source"] if record else "",
    )


class _Reader:
    """Collects the facts of one log."""

    def __init__(self) -> None:
        self._versions: list[str] = []
        self._nccl: list[NameFact] = []
        self._processes: dict[int, str] = {}
        self._ranks: list[RankFact] = []
        self._assignments: list[AssignmentFact] = []
        self._all_reduce: dict[str, AllReduceFact] = {}
        self._all_reduce_off: dict[tuple[str, str], BackendOffFact] = {}
        self._options: list[OptionFact] = []
        self._dtypes: list[str] = []
        self._all2all: dict[str, NameFact] = {}
        self._cpu_shm_off: list[GroupFact] = []
        self._cpu_cores: dict[int, tuple[int, ...]] = {}
        self._kv_cache_tokens: list[int] = []

    def read(self, record: LogRecord, where: LogLine) -> None:
        if record.pid is not None:
            self._processes[record.pid] = record.process
        self._read_version(record.message)
        self._read_ranks(record, where)
        self._read_option(record, where)
        if read := _COLLECTIVES.get(record.source):
            read(self, record, where)
        if record.source in _BACKEND_OFF:
            self._read_backend_off(record, where)
        if record.source == "kv_cache_utils.py" and (match := _KV_CACHE.match(record.message)):
            self._kv_cache_tokens.append(int(match["tokens"].replace(",", "")))

    def result(self) -> VllmLogFacts:
        return VllmLogFacts(
            vllm_version=next(iter(self._versions), None),
            nccl=next(iter(self._nccl), None),
            processes=self._processes,
            ranks=tuple(self._ranks),
            assignments=tuple(self._assignments),
            all_reduce=tuple(self._all_reduce.values()),
            all_reduce_off=tuple(self._all_reduce_off.values()),
            custom_all_reduce_disabled=next(iter(self._options), None),
            dtype=next(iter(self._dtypes), None),
            all2all=tuple(self._all2all.values()),
            cpu_shm_off=tuple(self._cpu_shm_off),
            cpu_cores=self._cpu_cores,
            kv_cache_tokens=min(self._kv_cache_tokens, default=None),
        )

    def _read_version(self, message: str) -> None:
        if not self._versions and (match := _VERSION.search(message)):
            self._versions.append(next(group for group in match.groups() if group))

    def _read_ranks(self, record: LogRecord, where: LogLine) -> None:
        if match := _RANK.search(record.message):
            self._ranks.append(
                RankFact(
                    pid=record.pid,
                    world_size=int(match["world_size"]),
                    rank=int(match["rank"]),
                    local_rank=int(match["local_rank"]),
                    init_method=match["init_method"],
                    backend=match["backend"],
                    evidence=where,
                )
            )
        elif match := _ASSIGNED.search(record.message):
            places = {name: None if at == "N/A" else int(at) for name, at in _PLACE.findall(match["places"])}
            rank, world_size = int(match["rank"]), int(match["world_size"])
            self._assignments.append(AssignmentFact(record.pid, rank, world_size, places, where))
        elif match := _CPU_BINDING.search(record.message):
            cores = tuple(int(core) for core in match["cores"].split(",") if core.strip())
            self._cpu_cores[int(match["local_rank"])] = cores

    def _read_option(self, record: LogRecord, where: LogLine) -> None:
        if record.source != "core.py" or not (start := _CONFIG.match(record.message)):
            return
        options = _QUOTED_TEXT.sub("''", record.message[start.end() :])
        if match := _CUSTOM_OPTION.search(options):
            self._options.append(OptionFact(match[1] == "True", replace(where, text=match[0])))
        if dtype := _DTYPE_OPTION.search(options):
            quantization = _QUANTIZATION_OPTION.search(options)
            self._dtypes.append(dtype[1] + (f" {quantization[1]}" if quantization else ""))

    def _read_nccl(self, record: LogRecord, where: LogLine) -> None:
        if match := _NCCL.match(record.message):
            self._nccl.append(NameFact(match["name"], where))

    def _read_cuda(self, record: LogRecord, where: LogLine) -> None:
        if match := _ALL_REDUCE.match(record.message):
            backends = tuple(_QUOTED.findall(match["names"]))
            potential = tuple(_QUOTED.findall(match["potential"] or ""))
            fact = AllReduceFact(record.pid, match["group"], backends, potential, where)
            self._all_reduce.setdefault(fact.group, fact)
        elif match := _ALL2ALL.match(record.message):
            self._all2all.setdefault(match["name"], NameFact(match["name"], where))

    def _read_cpu(self, record: LogRecord, where: LogLine) -> None:
        if match := _CPU_SHM_OFF.match(record.message):
            self._cpu_shm_off.append(GroupFact(record.pid, match["group"], where))
        elif match := _ALL2ALL.match(record.message):
            self._all2all.setdefault(match["name"], NameFact(match["name"], where))

    def _read_backend_off(self, record: LogRecord, where: LogLine) -> None:
        backend, pattern = _BACKEND_OFF[record.source]
        if match := pattern.match(record.message):
            reason = _HINT.sub("", match["reason"]).rstrip(".,")[:_LONGEST_EVIDENCE]
            fact = BackendOffFact(record.pid, backend, reason, where)
            self._all_reduce_off.setdefault((backend, reason), fact)


# PyNcclCommunicator.__init__; CudaCommunicator.__init__, _log_all_reduce_backend_selection; CpuCommunicator.__init__.
_COLLECTIVES: Mapping[str, Callable[[_Reader, LogRecord, LogLine], None]] = {
    "pynccl.py": _Reader._read_nccl,
    "cuda_communicator.py": _Reader._read_cuda,
    "cpu_communicator.py": _Reader._read_cpu,
}


class _Rank(IntEnum):
    """How near to the root a candidate is; the lowest wins, the first of equals."""

    WORKER = 0
    FATAL_LINE = 1
    ENGINE_CORE = 2
    FRONT_END = 3
    CONSEQUENCE = 4


_TRACEBACK = "Traceback (most recent call last):"
_GROUP_MARKS = re.compile(r"^\s*[|+][-+| ]*")
_FRAME = re.compile(r'File "(?:[^"]*/)?(?P<file>[^"/]+)", line (?P<line>\d{1,9}), in (?P<function>\S+)')
_EXCEPTION = re.compile(
    r"(?!(?:DEBUG|INFO|WARNING|ERROR|CRITICAL):)(?:[A-Za-z_]\w*\.)*[A-Z_]\w*(?:\([\w.]+\))?(?:: .*)?$"
)
_CHAINED = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
# A lookup that failed, or the network below a download: what was raised because of it says more.
_SAYS_LITTLE = re.compile(
    r"(?:KeyError|IndexError|AttributeError|StopIteration|ImportError|ModuleNotFoundError|LookupError"
    r"|socket\.|urllib3\.|requests\.|httpx\.|httpcore\.|ssl\.|ConnectionRefusedError|ConnectionError"
    r"|huggingface_hub\.errors\.LocalEntryNotFoundError)"
)
# Says that another process failed, and nothing more; a negative exit code is more.
_WRAPPER = re.compile(
    r"^(?!.*: -\d+\}).*(?:See root cause above|See stack trace|EngineDeadError|Executor failed\.)"
    r"|^(?:Exception: )?WorkerProc initialization failed|^KeyboardInterrupt|^SystemExit"
)
_CONSEQUENCE = re.compile(
    r"Worker failed with error|initialization failed|Connection closed by peer|Connection reset by peer"
    r"|Broken pipe|cancelled|CancelledError|NCCL error"
)
_PYDANTIC = re.compile(r"(?:[\w.]+\.)?ValidationError: \d+ validation errors? for ")
_PYDANTIC_TAIL = re.compile(r"\s*\[type=.*$")
_FATAL = re.compile(
    r"^(?:\S+\.py|vllm[\w -]*): (?P<error>error: .+)"
    r"|^(?:\S*python[\d.]*: )?No module named \S+$"
    r"|^Killed$|\bOut of memory: Killed process\b|\boom-kill\b|\bOOMKilled\b"
    r"|^(?:Fatal Python error: )?(?:Segmentation fault|Bus error|Illegal instruction|Aborted)\b"
    r"|^terminate called after throwing an instance of "
    r"|died unexpectedly \(exit code: -\d+\)"
    r"|No space left on device|[Aa]ddress already in use"
    r"|Error while creating shared memory segment|no socket interface found"
)


def error_cause(lines: Iterable[str | bytes]) -> str | None:
    """The one line of a crashed server's log that explains the crash best.

    That is the exception at the root of the innermost process: a worker's before the engine's before the API
    server's, the first of a chain unless it says little by itself (a ``KeyError`` that was handled), and none
    that only says that another process failed. A line such as ``error: unrecognized arguments: --foo``,
    ``Killed`` or ``No space left on device`` stands for processes that end without a traceback.

    :param lines: text, one line or several per item; or bytes, cut anywhere.
    :returns: the line without vLLM's prefix, or ``None`` when nothing looks like a cause.
    """
    search = _CauseSearch()
    for _, line in numbered_lines(lines):
        search.read(parse_record(line))
    return search.result()


@dataclass(slots=True)
class _Traceback:
    """Reading state of one process: tracebacks of several processes interleave. :param frame: the last one read."""

    rank: _Rank
    inside: bool = False
    chained: bool = False
    validation: bool = False
    cause: str | None = None
    frame: str = ""


class _CauseSearch:
    def __init__(self) -> None:
        self._open: dict[tuple[str, int | None], _Traceback] = {}
        self._best: dict[_Rank, str] = {}

    def read(self, record: LogRecord) -> None:
        if record.level in ("DEBUG", "INFO", "WARNING"):
            return
        key = (record.process, record.pid)
        state = self._open.get(key)
        if state is None or not self._read_traceback(state, record.message):
            text = _GROUP_MARKS.sub("", record.message).strip()
            if text.endswith(_TRACEBACK):
                self._begin(key, state)
            elif match := _FATAL.search(text):
                self._offer(_Rank.FATAL_LINE, match["error"] or text)

    def result(self) -> str | None:
        for state in self._open.values():
            self._close(state)
        return next((self._best[rank] for rank in _Rank if rank in self._best), None)

    def _begin(self, key: tuple[str, int | None], state: _Traceback | None) -> None:
        if state is not None and state.chained:
            state.inside, state.chained = True, False
            return
        if state is not None:
            self._close(state)
        self._open[key] = _Traceback(_rank_of(key[0]), inside=True)

    def _read_traceback(self, state: _Traceback, message: str) -> bool:
        """Take in one line of an open traceback; ``False`` when the line is something else."""
        message = _GROUP_MARKS.sub("", message)
        text = message.strip()
        if text in _CHAINED:
            state.chained = True
        elif state.validation:
            self._read_validation(state, message)
        elif not state.inside or text.endswith(_TRACEBACK):
            return False
        elif match := _FRAME.match(text):
            state.frame = f"{match['file']}:{match['line']}, {match['function']}"
        elif text and not message[:1].isspace():
            return self._read_exception(state, text)
        return True

    def _read_exception(self, state: _Traceback, text: str) -> bool:
        if not _EXCEPTION.match(text):
            return False
        if ":" not in text and state.frame:  # an exception without a word: where it was raised says more
            text = f"{text} in {state.frame}"
        state.inside = False
        state.validation = _PYDANTIC.match(text) is not None
        if state.cause is None or _SAYS_LITTLE.match(state.cause):
            state.cause = text[:_LONGEST_EVIDENCE]
        return True

    def _read_validation(self, state: _Traceback, message: str) -> None:
        """Pydantic puts what is wrong below the exception: a field's name at the margin, the reason indented."""
        text = _PYDANTIC_TAIL.sub("", message.strip())
        if not text or state.cause is None or text.startswith("For further information"):
            state.validation = False
        elif state.cause.endswith(text) or _PYDANTIC.match(state.cause):
            state.cause = f"ValidationError: {text}"
            state.validation = not message[:1].isspace()
        else:
            state.cause = f"{state.cause}: {text}"
            state.validation = False

    def _close(self, state: _Traceback) -> None:
        if state.cause is not None and not _WRAPPER.search(state.cause):
            consequence = _CONSEQUENCE.search(state.cause)
            self._offer(_Rank.CONSEQUENCE if consequence else state.rank, state.cause)

    def _offer(self, rank: _Rank, text: str) -> None:
        self._best.setdefault(rank, text[:_LONGEST_EVIDENCE])


def _rank_of(process: str) -> _Rank:
    if "Worker" in process:
        return _Rank.WORKER
    return _Rank.ENGINE_CORE if "EngineCore" in process else _Rank.FRONT_END
