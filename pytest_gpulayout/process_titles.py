"""Which process of a vLLM server is which rank: by the titles that vLLM gives its processes, and by who started whom.

Titles (vLLM 0.32), all of them behind ``VLLM::``:

- ``Worker_DP0_PP1_PCP0_TP0_DCP0_EP0``: sizes of 1 are left out, ``EP`` is there with expert parallelism only. A
  worker is ``Worker`` until its groups are made (``vllm/v1/executor/multiproc_executor.py``,
  ``setup_proc_title_and_log_prefix``).
- ``EngineCore``, or with data parallelism ``EngineCore_DP0`` (``vllm/v1/engine/core.py``, ``run_engine_core``). An
  engine of a dense model takes itself for the only one afterwards, so its workers do not name ``DP``: they are told
  from those of the others by the engine that started them. Those of a model with experts do name it.
- ``DPCoordinator``, ``APIServer_1``: no ranks.

Leaves the process table to adapters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from pytest_gpulayout.layout import Layout

_WORKER = re.compile(r"VLLM::Worker(?P<places>(?:_[A-Z]+\d{1,9})*)(?![^\s])")
_ENGINE = re.compile(r"VLLM::EngineCore(?:_DP(?P<dp>\d{1,9}))?(?![^\s])")
_PLACE = re.compile(r"_([A-Z]+)(\d+)")
_NOBODY: Mapping[int, int] = MappingProxyType({})


def rank_pids(layout: Layout, titles: Mapping[int, str], parents: Mapping[int, int] = _NOBODY) -> dict[int, int]:
    """Find the process of each rank of one server.

    A worker counts only where its title, and the engine above it, say nothing but what the layout says of one rank:
    a worker without ``DCP`` is no rank of ``tp4dcp2``, one with ``EP`` none of ``tp2``. A server with one rank may
    compute in ``EngineCore`` itself.

    :param titles: process id -> title. :param parents: process id -> process id of who started it.
    :returns: rank -> process id, for the ranks that were found; not for those that two processes claim to be.
    """
    claims: dict[int, list[int]] = {}
    for pid, title in titles.items():
        if match := _WORKER.match(title):
            places = {name: int(number) for name, number in _PLACE.findall(match["places"])}
            rank = _rank(layout, places, _engine_of(pid, titles, parents))
            if rank is not None:
                claims.setdefault(rank, []).append(pid)
    if layout.ranks == 1 and not claims:
        claims.update((0, [pid]) for pid, title in titles.items() if _ENGINE.match(title))
    return {rank: pids[0] for rank, pids in claims.items() if len(pids) == 1}


def has_joined_engines(titles: Iterable[str]) -> bool:
    """Whether the engines of a server with data parallelism work in step, as those of a model with experts do."""
    return any("_DP" in match["places"] for match in map(_WORKER.match, titles) if match)


def api_servers(titles: Iterable[str]) -> int:
    """How many front ends answer requests: those with a title of their own, else the one main process."""
    return sum(title.startswith("VLLM::APIServer") for title in titles) or 1


def _rank(layout: Layout, places: Mapping[str, int], engine: int | None) -> int | None:
    """The rank that a worker is, ``None`` where its title does not settle it or says something else.

    :param engine: number of the engine that it belongs to, where that has one.
    """
    dp = places.get("DP", engine)
    if dp is None and layout.dp > 1:
        return None
    at = {"dp": dp or 0, "pp": places.get("PP", 0), "pcp": places.get("PCP", 0), "tp": places.get("TP", 0)}
    rank = layout.rank_at(**at)
    if rank is None:
        return None
    wanted = layout.places(rank)
    named = {name for name, size in _sizes(layout) if size > 1} | ({"EP"} if layout.ep else set())
    if not named <= set(places) or ("EP" in places) is not layout.ep:
        return None
    is_so = all(wanted.get(name) == number for name, number in places.items())
    return rank if is_so and engine in (None, wanted["DP"]) else None


def _sizes(layout: Layout) -> Iterator[tuple[str, int]]:
    yield from (("PP", layout.pp), ("PCP", layout.pcp), ("TP", layout.tp), ("DCP", layout.dcp))


def _engine_of(pid: int, titles: Mapping[int, str], parents: Mapping[int, int]) -> int | None:
    """Number of the engine above a process, which may have been started through a process in between (forkserver)."""
    seen = {pid}
    while (parent := parents.get(pid)) is not None and parent not in seen:
        match = _ENGINE.match(titles.get(parent, ""))
        if match:
            return None if match["dp"] is None else int(match["dp"])
        seen.add(parent)
        pid = parent
    return None
