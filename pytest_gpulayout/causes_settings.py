"""Settings of NCCL that were left over from another machine, wherever they were made.

Knows which variables keep NCCL from a transport, with which values (NVIDIA/nccl 2.30 ``src/graph/paths.cc``,
``ncclGetLevel``; ``src/misc/param.cc``), and in which sources they show. A value that changes nothing for the ranks
in question is no cause.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pytest_gpulayout.causes_case import Case, Finding, at
from pytest_gpulayout.links import LinkClass
from pytest_gpulayout.nccl_log import LogLine, is_socket

# Path types of NCCL from near to far, src/graph/topo.cc; NCCL_P2P_LEVEL also takes the numbers of NCCL 2.4.
_LEVELS = ("LOC", "NVL", "NVB", "C2C", "PIX", "PXB", "P2C", "PXN", "PHB", "SYS")
_OLD_LEVELS = ("LOC", "PIX", "PXB", "PHB", "SYS")
_DEFAULT_LEVEL = _LEVELS.index("PXB")
_LEVEL_OF_LINK = {"NV": "NVL", "XGMI": "NVL", "PIX": "PIX", "PXB": "PXB", "PHB": "PHB"}
_MOST_DIGITS = 20
_NUMBER = re.compile(r"\s*[+-]?(0[xX][0-9a-fA-F]+|\d+)")


def _number(value: str) -> int | None:
    """The number at the start, as ``strtoll`` reads it; ``None`` for a word, which NCCL ignores."""
    match = _NUMBER.match(value)
    if match is None:
        return None
    digits = match[1][:_MOST_DIGITS]  # more saturate there, and Python refuses thousands
    return int(digits, 16 if digits[:2] in ("0x", "0X") else 10)


def _is_on(value: str) -> bool:
    return bool(_number(value))


def _p2p_disabled(case: Case, value: str) -> bool:
    return _is_on(value) and bool(case.local)


def _p2p_level_too_low(case: Case, value: str) -> bool:
    """Whether a pair is refused that the default would connect; ``LOC`` refuses every pair."""
    number = _number(value)
    word = value if number is None else _OLD_LEVELS[min(number, len(_OLD_LEVELS) - 1)]
    if word not in _LEVELS or not case.local:
        return False
    level = _LEVELS.index(word)
    if level >= _DEFAULT_LEVEL or level == 0:
        return level == 0
    links = [case.link(use) for use in case.local]
    return any(link is None or level < _level_of(link) <= _DEFAULT_LEVEL for link in links)


def _level_of(link: LinkClass) -> int:
    """The lowest level that lets NCCL use a link; it has no NODE."""
    return _LEVELS.index(_LEVEL_OF_LINK.get(link.name, "SYS"))


def _shm_disabled(case: Case, value: str) -> bool:
    return _is_on(value) and any(use.transport is not None and is_socket(use.transport) for use in case.local)


def _ib_disabled(case: Case, value: str) -> bool:
    return _is_on(value) and bool(case.between_hosts)


def _net_is_socket(case: Case, value: str) -> bool:
    return value == "Socket" and bool(case.between_hosts)


def _plugin_is_none(case: Case, value: str) -> bool:
    return value == "none" and bool(case.between_hosts)


_Harm = Callable[[Case, str], bool]
_ON_ONE_HOST: tuple[tuple[str, _Harm], ...] = (
    ("NCCL_P2P_DISABLE", _p2p_disabled),
    ("NCCL_P2P_LEVEL", _p2p_level_too_low),
    ("NCCL_SHM_DISABLE", _shm_disabled),
)
_BETWEEN_HOSTS: tuple[tuple[str, _Harm], ...] = (
    ("NCCL_IB_DISABLE", _ib_disabled),
    ("NCCL_NET", _net_is_socket),
    ("NCCL_NET_PLUGIN", _plugin_is_none),
)


@dataclass(frozen=True, slots=True)
class Setting:
    """A variable as one source shows it. :param by: ``environment``, or the file that sets it."""

    name: str
    value: str
    by: str
    where: LogLine
    advice: str

    def __str__(self) -> str:
        return f"{self.name} set by {self.by} to {self.value}"


def left_over_on_one_host(case: Case) -> Iterator[Finding]:
    """Settings that keep ranks of one host from P2P or shared memory."""
    yield from _left_over(case, _ON_ONE_HOST)


def left_over_between_hosts(case: Case) -> Iterator[Finding]:
    """Settings that keep ranks of different hosts from a network card."""
    yield from _left_over(case, _BETWEEN_HOSTS)


def _left_over(case: Case, settings: Sequence[tuple[str, _Harm]]) -> Iterator[Finding]:
    for name, does_harm in settings:
        setting = next((found for found in settings_of(case, name) if does_harm(case, found.value)), None)
        if setting is not None:
            yield at(str(setting), setting.where, setting.advice)


def settings_of(case: Case, name: str) -> Iterator[Setting]:
    """What the log, the environments and the files of NCCL say about a variable; the log shows what NCCL believed."""
    files = [line for _, rank in sorted(case.surroundings.ranks.items()) for line in rank.configuration]
    in_files = [line for line in files if line.text.partition("=")[0] == name]
    if name in case.log.environment:
        value, where = case.log.environment[name]
        yield Setting(name, value, "environment", where, _where_to_unset(case, name, in_files))
    for number, rank in sorted(case.surroundings.ranks.items()):
        if rank.environment is not None and name in rank.environment:
            value = rank.environment[name]
            where = LogLine(f"/proc/{rank.pid}/environ of rank {number}", 0, f"{name}={value}")
            yield Setting(name, value, "environment", where, f"unset {name}")
    for line in in_files:
        path = line.file.split(" ")[0]
        yield Setting(name, line.text.partition("=")[2], path, line, f"take {name} out of {path}")


def _where_to_unset(case: Case, name: str, in_files: Sequence[LogLine]) -> str:
    """NCCL says "set by environment" of what its files set, too."""
    environments = [rank.environment for rank in case.surroundings.ranks.values()]
    if not environments or any(known is None or name in known for known in environments):
        return f"unset {name}"
    if in_files:
        return f"take {name} out of {in_files[0].file.split(' ')[0]}: the environment of the ranks has it not"
    return f"the ranks were started without {name}: look for it in /etc/nccl.conf, ~/.nccl.conf and in the program"
