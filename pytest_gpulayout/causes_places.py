"""Where the ranks run: on which hosts, in which containers, with which shared memory and network.

Knows that NCCL takes ranks for one node when host name and boot id agree (NVIDIA/nccl 2.30 ``src/misc/utils.cc``,
``getHostHash``), that it shares memory only in one ``/dev/shm``, and what its log says when that or a network fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pytest_gpulayout.causes_case import Case, Finding, and_more, at
from pytest_gpulayout.causes_settings import settings_of
from pytest_gpulayout.nccl_log import is_shm, is_socket
from pytest_gpulayout.surroundings import RankSurroundings

_SHM_PER_RANK_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class _Told:
    """A line that explains by itself why ranks could not be connected."""

    pattern: str
    cause: str
    advice: str


_TOLD = (
    _Told(
        r"attach\w* to shared memory segment",
        "a rank cannot attach to the shared memory of another: they have separate /dev/shm",
        "give the ranks one /dev/shm: run them in one container, or docker run --ipc=host",
    ),
    _Told(
        r"(?:/dev/shm|shared memory segment|shm_open).*(?:Permission denied|Read-only file system)",
        "NCCL may not create files in /dev/shm",
        "make /dev/shm writable for the server's user: mode 1777, mounted read-write",
    ),
    _Told(
        r"\bIMEX\b.*(?:not|fail)|not working.*\bIMEX\b",
        "the IMEX channel does not work: NVLink between trays cannot be used",
        "start nvidia-imex on every tray and give the container /dev/nvidia-caps-imex-channels",
    ),
    _Told(
        r"[Ee]rror: network \S+ not found",
        "NCCL has no network of the name that NCCL_NET asks for",
        "unset NCCL_NET, or install the plugin that provides it",
    ),
)


def told_by_a_line(case: Case) -> Iterator[Finding]:
    """Causes that a line of NCCL names by itself."""
    for told in _TOLD:
        if line := case.line(told.pattern):
            yield at(told.cause, line, told.advice)


def no_interface(case: Case) -> Iterator[Finding]:
    """No interface to listen on, most often since a variable names one of another machine."""
    line = case.line(r"[Nn]o (?:socket )?interface found")
    if line is None:
        return
    setting = next(settings_of(case, "NCCL_SOCKET_IFNAME"), None)
    if setting is None:
        yield at("NCCL found no network interface", line, "give the container an interface that is up: ip addr")
    else:
        cause = f"NCCL found no network interface: NCCL_SOCKET_IFNAME is {setting.value}"
        yield at(cause, line, "set NCCL_SOCKET_IFNAME to an interface that `ip addr` shows, or unset it")


# What failed for another reason has a cause of its own above.
_SHM_FAILED = (
    r"^(?!.*(?:attach|Permission denied|Read-only))"
    r".*(?:shared memory segment|extend /dev/shm|(?:/dev/shm|posix_fallocate).*No space left on device)"
)


def shm_too_small(case: Case) -> Iterator[Finding]:
    """Said by NCCL, or shown by the size of the mount where something failed in NCCL's shared memory."""
    in_container = not case.surroundings.ranks or any(r.container for r in case.surroundings.ranks.values())
    advice = (
        "give the container more: docker run --shm-size=8g or --ipc=host; Kubernetes: emptyDir with medium Memory"
        if in_container
        else "give it more: mount -o remount,size=8g /dev/shm"
    )
    if line := case.line(_SHM_FAILED):
        yield at("/dev/shm is too small for NCCL", line, advice)
    elif case.line(r"\bshm(?:utils)?\.cc:\d+ -> \d") or case.server_line(r"\bBus error\b|\bSIGBUS\b"):
        for number, rank in sorted(case.surroundings.ranks.items()):
            sharers = sum(other.shm_device == rank.shm_device for other in case.surroundings.ranks.values())
            if rank.shm_bytes is not None and rank.shm_bytes < sharers * _SHM_PER_RANK_BYTES:
                size = f"{rank.shm_bytes / 2**20:.0f} MiB for {sharers} rank{'s' * (sharers > 1)}"
                yield Finding("/dev/shm is too small for NCCL", f"/dev/shm of rank {number}", None, size, advice)
                return


def no_numa_memory(case: Case) -> Iterator[Finding]:
    """Memory of the host that CUDA cannot make in a container without ``SYS_NICE``; shared memory serves then."""
    line = case.line(r"cuMem host allocations do not appear to be working")
    if line is not None and any(use.transport is None or is_shm(use.transport) for use in case.slow):
        cause = "the container has no NUMA memory: NCCL falls back to /dev/shm"
        yield at(cause, line, "docker run --cap-add SYS_NICE, or NCCL_CUMEM_HOST_ENABLE=0 and a large /dev/shm")


def separate_containers(case: Case) -> Iterator[Finding]:
    """Ranks of one machine that do not share what P2P and SHM need; NCCL compares host name and /dev/shm."""
    found = [
        (use, here, differences)
        for use in case.slow
        if (here := case.ranks_here(use)) and (differences := _what_differs(*here))
    ]
    for use, (a, b), differences in found[:1]:
        pairs = and_more((use.src, use.dst) for use, _, _ in found)
        containers = any(kind.endswith("namespace") for kind in differences)
        where = "in separate containers" if containers else "on one machine"
        yield Finding(
            f"ranks {use.src} and {use.dst}{pairs} are {where} with different {_listed(list(differences))}",
            f"/proc/{a.pid} of rank {use.src} and /proc/{b.pid} of rank {use.dst}",
            None,
            "; ".join(f"{kind}: {values}" for kind, values in differences.items()),
            "run all ranks in one container, or docker run --ipc=host --pid=host --uts=host for each",
        )


def _what_differs(a: RankSurroundings, b: RankSurroundings) -> dict[str, str]:
    """What two ranks do not share though they must, with both values."""
    facts: list[tuple[str, object, object]] = [
        (f"{kind} namespace", a.namespaces.get(kind), b.namespaces.get(kind)) for kind in ("ipc", "pid", "uts")
    ]
    facts.append(("/dev/shm", _device(a), _device(b)))
    facts.append(("NCCL_HOSTID", (a.environment or {}).get("NCCL_HOSTID"), (b.environment or {}).get("NCCL_HOSTID")))
    return {kind: f"{one} and {other}" for kind, one, other in facts if one and other and one != other}


def _device(rank: RankSurroundings) -> str | None:
    return None if rank.shm_device is None else f"device {rank.shm_device}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def different_hosts(case: Case) -> Iterator[Finding]:
    """Not where the layout spans nodes; of ranks that both run here the rule above knows more."""
    if case.layout is not None and case.layout.nodes > 1:
        return
    apart = [(use, use.first) for use in case.between_hosts if case.crosses_hosts(use) and use.first is not None]
    for use, where in apart[:1]:
        a, b = case.hosts(use)
        pairs = and_more((use.src, use.dst) for use, _ in apart)
        yield at(
            f"ranks {use.src} and {use.dst}{pairs} have different host names: {a} and {b}",
            where,
            "containers of one host: run all ranks in one, or docker run --uts=host --ipc=host; "
            "real hosts: keep tensor parallelism inside each, or give both an RDMA network",
        )


def one_host_as_several(case: Case) -> Iterator[Finding]:
    """More nodes than host names, in communicators of which every rank is known; a layout says that by itself."""
    if case.layout is not None or not any(use.transport and is_socket(use.transport) for use in case.slow):
        return
    for comm in case.log.communicators:
        nodes = max((member.n_nodes or 0 for member in comm.members), default=0)
        hosts = sorted({member.host for member in comm.members if member.host is not None})
        if len(comm.ranks) == comm.nranks and 0 < len(hosts) < nodes:
            yield Finding(
                f"NCCL takes {_listed(hosts)} for {nodes} nodes",
                ", ".join(case.log.sources[:3]) or None,
                None,
                f"nNodes {nodes}, host names of ranks 0 to {comm.nranks - 1}: {', '.join(hosts)}",
                "unset NCCL_HOSTID, and run the ranks in one container, or docker run --uts=host --ipc=host for each",
            )
            return


# -- between hosts ---------------------------------------------------------------------------------------------------


def no_rdma(case: Case) -> Iterator[Finding]:
    """Ranks of different hosts without an RDMA device that NCCL can use."""
    if not case.between_hosts:
        return
    devices = case.surroundings.rdma_devices
    line = case.line(r"NET/IB ?: No device found")
    hca = next(settings_of(case, "NCCL_IB_HCA"), None)
    if devices and hca is not None and not any(_hca_takes(hca.value, device) for device in devices):
        yield at(
            f"NCCL_IB_HCA={hca.value} matches none of the RDMA devices {', '.join(devices)}", hca.where, hca.advice
        )
    elif devices and (rank := _rank_without_verbs(case)) is not None:
        cause = f"the container has no RDMA device, the machine has {', '.join(devices)}"
        advice = "docker run --device=/dev/infiniband --ulimit memlock=-1; Kubernetes: request the RDMA resource"
        yield Finding(cause, f"/dev/infiniband of rank {rank}", None, "no uverbs device", advice)
    elif line is not None:
        yield at("NCCL found no RDMA device", line, _RDMA_ADVICE)
    elif devices == ():
        yield Finding("the machine has no RDMA device", "/sys/class/infiniband", None, "empty", _RDMA_ADVICE)


_RDMA_ADVICE = (
    "make InfiniBand or RoCE visible: ibv_devices must list it inside the container (--device=/dev/infiniband); "
    "on a cloud with a network of its own install its NCCL plugin"
)


def _rank_without_verbs(case: Case) -> int | None:
    ranks = sorted(case.surroundings.ranks.items())
    return next((n for n, rank in ranks if rank.verbs is not None and not _uverbs(rank.verbs)), None)


def _uverbs(names: Iterable[str]) -> bool:
    return any(name.startswith("uverbs") for name in names)


def _hca_takes(value: str, device: str) -> bool:
    """Whether NCCL uses a device: a list of prefixes with ports; ``^`` excludes, ``=`` wants whole names."""
    excludes = value.startswith("^")
    rest = value.removeprefix("^")
    whole = rest.startswith("=")
    names = [name.split(":")[0] for name in rest.removeprefix("=").split(",")]
    named = any(device == name if whole else device.startswith(name) for name in names if name)
    return named is not excludes


def no_plugin(case: Case) -> Iterator[Finding]:
    """A healthy log says so, too, so it explains a socket between hosts and nothing else."""
    line = case.line(r"NET/Plugin ?: (?:Could not find|No plugin found)") if case.between_hosts else None
    if line is not None:
        yield at(
            "NCCL loaded no network plugin",
            line,
            "needed on EFA (aws-ofi-nccl), Google Cloud and Slingshot: put its libnccl-net.so on LD_LIBRARY_PATH; "
            "InfiniBand and RoCE need none",
        )
