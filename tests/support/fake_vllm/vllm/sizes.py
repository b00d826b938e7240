"""How many processes this server has, arranged how, and what vLLM calls them.

Written down from vLLM 0.32: ranks and groups as in ``vllm/distributed/parallel_state.py``
(``initialize_model_parallel``: ExternalDP x DP x PP x PCP x TP), titles as in
``vllm/v1/executor/multiproc_executor.py`` (``setup_proc_title_and_log_prefix``) and ``vllm/v1/engine/core.py``
(``run_engine_core``), the fingerprint as in
``vllm/entrypoints/serve/utils/fingerprint.py``. Engines of a dense model take themselves for the only one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

_OPTIONS = {
    "tp": "--tensor-parallel-size",
    "pp": "--pipeline-parallel-size",
    "dp": "--data-parallel-size",
    "pcp": "--prefill-context-parallel-size",
    "dcp": "--decode-context-parallel-size",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The factors of one server. :param moe: whether its model has experts, which ``ep`` spreads."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    pcp: int = 1
    dcp: int = 1
    ep: bool = False
    moe: bool = False

    @property
    def engine_ranks(self) -> int:
        """Workers of one engine."""
        return self.tp * self.pp * self.pcp

    @property
    def fingerprint(self) -> str:
        """``-tp2-pp2-dp2-ep``."""
        named = (f"-{name}{getattr(self, name)}" for name in ("tp", "pp", "dp") if getattr(self, name) > 1)
        return "".join(named) + ("-ep" if self.ep else "")

    def engine_title(self, engine: int) -> str:
        """``EngineCore_DP1``."""
        return f"EngineCore_DP{engine}" if self.dp > 1 else "EngineCore"

    def worker_title(self, engine: int, local: int) -> str:
        """``Worker_DP1_PP0_TP1_EP3``; sizes of 1 are left out."""
        pp, pcp, tp = self._place(local)
        at = {"PP": (pp, self.pp), "PCP": (pcp, self.pcp), "TP": (tp, self.tp)}
        at["DCP"] = ((tp * self.pcp + pcp) % self.dcp, self.dcp)
        dp = f"_DP{engine}" if self.moe and self.dp > 1 else ""
        ep = f"_EP{(engine * self.pcp + pcp) * self.tp + tp}" if self.ep else ""
        return f"Worker{dp}" + "".join(f"_{axis}{number}" for axis, (number, size) in at.items() if size > 1) + ep

    def groups(self, engine: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Communicators that workers of an engine are in: kind and ranks, of the whole server where engines are one
        world, else of the engine.
        """
        engines = range(self.dp) if self.moe else (engine,)
        first = engines[0] * self.engine_ranks
        kinds: dict[str, tuple[str, ...]] = {
            "tp": ("dp", "pp", "pcp"),
            "dcp": ("dp", "pp", "part"),
            "pcp": ("dp", "pp", "tp"),
            "pp": ("dp", "pcp", "tp"),
        }
        if self.moe:
            kinds |= {"dp": ("pp", "pcp", "tp"), "ep": ("pp",)}
        for name, fixed in kinds.items():
            found: dict[tuple[int, ...], list[int]] = {}
            for number, (dp, local) in enumerate(product(engines, range(self.engine_ranks))):
                pp, pcp, tp = self._place(local)
                at = {"dp": dp, "pp": pp, "pcp": pcp, "tp": tp, "part": (tp * self.pcp + pcp) // self.dcp}
                found.setdefault(tuple(at[axis] for axis in fixed), []).append(first + number)
            yield from ((name, tuple(ranks)) for ranks in found.values() if len(ranks) > 1)

    def _place(self, local: int) -> tuple[int, int, int]:
        rest, tp = divmod(local, self.tp)
        pp, pcp = divmod(rest, self.pcp)
        return pp, pcp, tp


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare vLLM's options for them (``vllm/engine/arg_utils.py``)."""
    for name, option in _OPTIONS.items():
        parser.add_argument(option, f"-{name}", dest=name, type=int, default=1)
    parser.add_argument("--enable-expert-parallel", "-ep", dest="ep", action="store_true")


def read_sizes(arguments: argparse.Namespace, *, moe: bool) -> Sizes:
    """Read what was given. :param moe: whether the model has experts, also without ``ep``."""
    return Sizes(**{name: getattr(arguments, name) for name in _OPTIONS}, ep=arguments.ep, moe=moe or arguments.ep)
