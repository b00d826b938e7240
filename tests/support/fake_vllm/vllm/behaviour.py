"""What this server shall do: ``FAKE_VLLM={"ttft_ms": 20, "die_after_requests": 3}``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """One start of a server. All processes are there from the beginning, also while it loads.

    :param load_s: time until it listens. :param hang_at_start: never listens.
    :param exit_at_start: ``{"code": 1, "log": [lines]}``: writes these lines and ends.
    :param die_at_first_request: the engine fails in the first completion, and the server with it.
    :param die_after_requests: the same, after so many completions that were answered.
    :param fail_every_nth_request: HTTP 500 to each n-th completion.
    :param fingerprint: instead of the one of its layout; ``None`` leaves it out. :param missing_worker: its rank.
    :param ignore_sigterm: in every process. :param no_shared_memory: the ranks fall back to gloo, and say so.
    :param ttft_ms: before the first token. :param itl_ms: before each further one.
    :param contexts: UUIDs of the GPUs that a rank computes on, by its number, where it is not its own alone.
    :param nccl: the transport in NCCL's log; ``None`` for no log.
    :param moe: the model has experts, also without expert parallelism: its data-parallel engines are one world.
    :param dead_engine: the data-parallel engine that answers HTTP 500.
    :param server_info: what ``/server_info`` says in place of its sizes; ``None`` as without development mode.
    """

    load_s: float = 0.0
    hang_at_start: bool = False
    exit_at_start: Mapping[str, object] | None = None
    die_at_first_request: bool = False
    die_after_requests: int | None = None
    fail_every_nth_request: int | None = None
    fingerprint: str | None = "vllm-0.32.0"
    missing_worker: int | None = None
    ignore_sigterm: bool = False
    no_shared_memory: bool = False
    ttft_ms: float = 2.0
    itl_ms: float = 1.0
    contexts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    nccl: str | None = "P2P/CUMEM"
    moe: bool = False
    dead_engine: int | None = None
    server_info: Mapping[str, object] | None = None

    def fails(self, completion: int) -> bool:
        """Whether the engine dies in this completion; the first is number 1."""
        last = 0 if self.die_at_first_request else self.die_after_requests
        return last is not None and completion > last

    def refuses(self, completion: int) -> bool:
        """Whether this completion gets HTTP 500, and no more happens."""
        return bool(self.fail_every_nth_request) and completion % (self.fail_every_nth_request or 1) == 0


def read_behaviour(layout: str, node_rank: int = 0) -> Behaviour:
    """Read ``FAKE_VLLM``; a misspelt switch is an error.

    :param layout: as the fingerprint names it, ``-tp2-dp2``.
    :param node_rank: of this host, whose own switches stand in ``{"nodes": {"1": {...}}}``.
    """
    told = {"fingerprint": f"vllm-0.32.0{layout}-abcdef12"} | json.loads(os.environ.get("FAKE_VLLM") or "{}")
    told |= told.pop("nodes", {}).get(str(node_rank), {})
    if unknown := set(told) - {known.name for known in fields(Behaviour)}:
        raise SystemExit(f"FAKE_VLLM: unknown switches {sorted(unknown)}")
    return Behaviour(**told)
