"""How many engine processes, arranged how: the grammar of ``tp2``, ``dp2tp2ep``, ``tp8pp2@2``.

Knows the text form, the number of GPUs, which ranks exist and which of them talk to each other, and the
``vllm serve`` arguments. Leaves choosing GPUs to :mod:`~pytest_gpulayout.topology` and starting to the launcher.

Grammar (no blanks)::

    layout   = part { [sep] part } [ "x" N ] [ "@" N ]
    part     = ( "tp" | "pp" | "dp" | "pcp" | "dcp" ) N | "ep"
    sep      = "-" | "_"
    N        = digit from 1 to 9, then at most 4 digits; so N >= 1 and no leading zero

Factors stand in any order, each at most once. The canonical form has the order dp, tp, pp, pcp, dcp, ep,
leaves out factors of 1, and is ``tp1`` when nothing else remains.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import combinations, pairwise

from pytest_gpulayout.errors import LayoutSyntaxError

_CANONICAL_ORDER = ("dp", "tp", "pp", "pcp", "dcp")
_WORDS = ("pcp", "dcp", "tp", "pp", "dp")
_LETTERS = re.compile(r"[A-Za-z]+")
_DIGITS = re.compile(r"[0-9]+")
_MOST_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Layout:
    """Arrangement of a server's processes; the field names are vLLM's factors.

    :param tp: tensor parallel size. :param pp: pipeline parallel size. :param dp: data parallel size.
    :param pcp: prefill context parallel size. :param dcp: decode context parallel size; shares the GPUs of tp.
    :param ep: experts are spread over tp x dp. :param replicas: independent servers behind a proxy.
    :param nodes: hosts.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    pcp: int = 1
    dcp: int = 1
    ep: bool = False
    replicas: int = 1
    nodes: int = 1

    @property
    def ranks(self) -> int:
        """Number of worker processes, and of devices, of one replica."""
        return self.tp * self.pp * self.dp * self.pcp

    @property
    def gpus(self) -> int:
        """GPUs needed on all nodes together: tp * pp * dp * pcp * x (dcp adds none)."""
        return self.ranks * self.replicas

    def __str__(self) -> str:
        factors = [f"{name}{getattr(self, name)}" for name in _CANONICAL_ORDER if getattr(self, name) > 1]
        text = "".join(factors) or "tp1"
        text += "ep" if self.ep else ""
        text += f"x{self.replicas}" if self.replicas > 1 else ""
        return text + (f"@{self.nodes}" if self.nodes > 1 else "")

    def communicating_pairs(self, *, moe: bool = False) -> tuple[tuple[int, int], ...]:
        """Rank pairs (a, b), a < b, that exchange data in every step, over all replicas.

        Those who share a communicator, see :meth:`communication_groups`; of the stages of a pipeline only neighbours.

        :param moe: whether the model has experts; then dp ranks talk without ``ep``, too.
        """
        pairs: set[tuple[int, int]] = set()
        for name, groups in self.communication_groups(moe=moe).items():
            for ranks in groups:
                pairs.update(pairwise(ranks) if name == "pp" else combinations(ranks, 2))
        firsts = range(0, self.gpus, self.ranks)
        return tuple(sorted((a + first, b + first) for first in firsts for a, b in pairs))

    @property
    def gpus_per_node(self) -> int:
        """GPUs that one node must have; all without ``@N``."""
        return self.gpus // self.nodes

    def node_pairs(self, node_rank: int = 0, *, moe: bool = False) -> tuple[tuple[int, int], ...]:
        """Those communicating pairs that lie on one node, in its own ranks 0 to ``gpus_per_node - 1``.

        Nodes hold consecutive ranks (``vllm/config/parallel.py``, ``nnodes``). :param moe: as for all pairs.
        """
        first = node_rank * self.gpus_per_node
        local = range(first, first + self.gpus_per_node)
        pairs = self.communicating_pairs(moe=moe)
        return tuple((a - first, b - first) for a, b in pairs if a in local and b in local)

    def communication_groups(self, *, moe: bool = False) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Ranks that share a communicator, by vLLM's name of the kind of group; of one replica.

        Ranks are numbered as vLLM numbers them: ExternalDP x DP x PP x PCP x TP. A dcp group is a part of a tp group,
        or with pcp of the whole block of tp and pcp. Engines of a dense model (dp) are worlds of their own; those of
        a model with experts gather and scatter tokens over their dp groups, and with ``ep`` over all ranks of a
        stage. Groups of one rank, and kinds whose groups are those of another one, are left out. Sources (vLLM
        0.32): ``vllm/distributed/parallel_state.py``, ``initialize_model_parallel``;
        ``vllm/distributed/device_communicators/all2all.py``, ``AgRsAll2AllManager._get_comm_group``.

        :param moe: whether the model has experts; ``ep`` says so, too.
        """
        kinds: dict[str, tuple[str, ...]] = {
            "tp": ("dp", "pp", "pcp"),
            "dcp": ("dp", "pp", "part"),
            "pp": ("dp", "pcp", "tp"),
            "pcp": ("dp", "pp", "tp"),
        }
        if moe or self.ep:
            kinds["dp"] = ("pp", "pcp", "tp")
        if self.ep:
            kinds["ep"] = ("pp",)
        found: dict[str, tuple[tuple[int, ...], ...]] = {}
        for name, fixed in kinds.items():
            groups: dict[tuple[int, ...], list[int]] = {}
            for rank in range(self.ranks):
                at = self._axes(rank)
                groups.setdefault(tuple(at[axis] for axis in fixed), []).append(rank)
            of_kind = tuple(tuple(ranks) for ranks in groups.values() if len(ranks) > 1)
            if of_kind and of_kind not in found.values():
                found[name] = of_kind
        return found

    def rank_at(self, *, dp: int = 0, pp: int = 0, pcp: int = 0, tp: int = 0) -> int | None:
        """Rank of one replica at these coordinates, ``None`` where the layout has none there."""
        sizes = ((dp, self.dp), (pp, self.pp), (pcp, self.pcp), (tp, self.tp))
        if any(not 0 <= place < size for place, size in sizes):
            return None
        return ((dp * self.pp + pp) * self.pcp + pcp) * self.tp + tp

    def places(self, rank: int) -> dict[str, int]:
        """Number of a rank in its group of each kind, by the words of process titles: DP, PP, PCP, TP, DCP, EP.

        Source: ``vllm/distributed/parallel_state.py``, ``initialize_model_parallel`` (0.32).
        """
        at = self._axes(rank)
        return {
            **{axis.upper(): at[axis] for axis in ("dp", "pp", "pcp", "tp")},
            "DCP": (at["tp"] * self.pcp + at["pcp"]) % self.dcp,
            "EP": (at["dp"] * self.pcp + at["pcp"]) * self.tp + at["tp"],
        }

    def _axes(self, rank: int) -> dict[str, int]:
        """Coordinates of a rank, and the part of its block of tp and pcp that decode context parallelism cuts out."""
        rest, tp = divmod(rank, self.tp)
        rest, pcp = divmod(rest, self.pcp)
        dp, pp = divmod(rest, self.pp)
        return {"dp": dp, "pp": pp, "pcp": pcp, "tp": tp, "part": (tp * self.pcp + pcp) // self.dcp}

    def engine_arguments(
        self, *, node_rank: int = 0, master_addr: str | None = None, master_port: int | None = None
    ) -> list[str]:
        """Arguments of ``vllm serve`` for one replica on one node.

        Every factor above 1 is passed, and tensor parallelism always, so that the command shows the layout.
        Replicas are separate servers and need no argument. Names as in ``vllm/engine/arg_utils.py`` (0.32).

        :param node_rank: this host's number, 0 is the head; only used with more than one node.
        :param master_addr: address of the head node; needed with more than one node.
        :param master_port: port of the head node; vLLM's default where ``None``.
        :raises ValueError: more than one node and no ``master_addr``, or a ``node_rank`` outside the layout.
        """
        arguments = ["--tensor-parallel-size", str(self.tp)]
        for option, size in (
            ("--pipeline-parallel-size", self.pp),
            ("--data-parallel-size", self.dp),
            ("--prefill-context-parallel-size", self.pcp),
            ("--decode-context-parallel-size", self.dcp),
        ):
            if size > 1:
                arguments += [option, str(size)]
        if self.ep:
            arguments.append("--enable-expert-parallel")
        if self.nodes > 1:
            arguments += self._node_arguments(node_rank, master_addr, master_port)
        return arguments

    def _node_arguments(self, node_rank: int, master_addr: str | None, master_port: int | None) -> list[str]:
        if master_addr is None:
            raise ValueError(f"layout {self} spans {self.nodes} nodes: master_addr is required")
        if not 0 <= node_rank < self.nodes:
            raise ValueError(f"layout {self} has nodes 0 to {self.nodes - 1}, not {node_rank}")
        arguments = ["--nnodes", str(self.nodes), "--node-rank", str(node_rank), "--master-addr", master_addr]
        if master_port is not None:
            arguments += ["--master-port", str(master_port)]
        return arguments + (["--headless"] if node_rank > 0 else [])


def parse_layout(text: str) -> Layout:
    """Read a layout such as ``tp2`` or ``dp2-tp2-ep``.

    :raises LayoutSyntaxError: with the column of the first character that does not fit.
    """
    return _Parser(text).parse()


class _Parser:
    """One pass over the text; each method reads one production of the grammar above."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._values: dict[str, int] = {}

    def parse(self) -> Layout:
        self._parts()
        replicas = self._suffix("x")
        nodes = self._suffix("@")
        if self._at < len(self._text):
            raise self._error(f"expected the end of the layout, found {self._text[self._at]!r}")
        values = dict(self._values)
        ep = bool(values.pop("ep", 0))
        layout = Layout(**values, ep=ep, replicas=replicas, nodes=nodes)
        self._check_sizes(layout)
        return layout

    def _parts(self) -> None:
        self._part()
        while self._at < len(self._text) and self._text[self._at] not in "x@":
            if self._text[self._at] in "-_":
                self._at += 1
            self._part()
        if set(self._values) == {"ep"}:
            raise self._error("expected a factor beside ep, such as tp2 or dp2", at=0)

    def _part(self) -> None:
        start = self._at
        match = _LETTERS.match(self._text, start)
        letters = match.group() if match else ""
        if letters.startswith("ep"):
            self._at += 2
            self._store("ep", 1, start)
            return
        word = next((word for word in _WORDS if letters == word), None)
        if word is None:
            found = repr(self._text[start:]) if start < len(self._text) else "nothing"
            raise self._error(f"expected a factor (tpN, ppN, dpN, pcpN, dcpN) or ep, found {found}", at=start)
        self._at += len(word)
        self._store(word, self._number(word), start)

    def _store(self, word: str, value: int, start: int) -> None:
        if word in self._values:
            raise self._error(f"{word} stands twice", at=start)
        self._values[word] = value

    def _suffix(self, sign: str) -> int:
        if not self._text.startswith(sign, self._at):
            return 1
        self._at += 1
        return self._number(sign)

    def _number(self, after: str) -> int:
        match = _DIGITS.match(self._text, self._at)
        if match is None:
            raise self._error(f"expected a number after {after!r}")
        if match.group().startswith("0"):
            rule = "must be at least 1" if not match.group().strip("0") else "has a leading zero"
            raise self._error(f"the number after {after!r} {rule}: {match.group()}")
        if len(match.group()) > _MOST_DIGITS:
            raise self._error(f"the number after {after!r} must have at most {_MOST_DIGITS} digits")
        self._at = match.end()
        return int(match.group())

    def _check_sizes(self, layout: Layout) -> None:
        if layout.tp * layout.pcp % layout.dcp:
            block, owner = (
                (f"tp{layout.tp}", "tp") if layout.pcp == 1 else (f"tp{layout.tp} * pcp{layout.pcp}", "both")
            )
            raise self._error(
                f"dcp{layout.dcp} must divide {block}: decode context parallelism shares the GPUs of {owner}",
                at=self._text.index("dcp"),
            )
        if layout.gpus % layout.nodes:
            raise self._error(
                f"{layout.gpus} GPUs cannot be spread evenly over {layout.nodes} nodes",
                at=self._text.index("@"),
            )

    def _error(self, reason: str, *, at: int | None = None) -> LayoutSyntaxError:
        return LayoutSyntaxError(self._text, (self._at if at is None else at) + 1, f"layout: {reason}")
