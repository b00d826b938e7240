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
from itertools import combinations

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

    def communicating_pairs(self) -> tuple[tuple[int, int], ...]:
        """Rank pairs (a, b), a < b, that exchange data in every step, over all replicas.

        Ranks are numbered as vLLM numbers them (``vllm/distributed/parallel_state.py``,
        ``initialize_model_parallel``: the order is ExternalDP x DP x PP x PCP x TP), replica after replica.
        A tp group (with its pcp peers) talks all to all, pipeline stages talk to their neighbours, dp replicas
        of a dense model do not talk; with expert parallelism all tp x dp ranks of a stage do.
        """
        pairs: set[tuple[int, int]] = set()
        for replica in range(self.replicas):
            for a, b in combinations(range(self.ranks), 2):
                if self._ranks_talk(a, b):
                    offset = replica * self.ranks
                    pairs.add((a + offset, b + offset))
        return tuple(sorted(pairs))

    @property
    def gpus_per_node(self) -> int:
        """GPUs that one node must have; all without ``@N``."""
        return self.gpus // self.nodes

    def node_pairs(self, node_rank: int = 0) -> tuple[tuple[int, int], ...]:
        """Those communicating pairs that lie on one node, in its own ranks 0 to ``gpus_per_node - 1``.

        Nodes hold consecutive ranks (``vllm/config/parallel.py``, ``nnodes``).
        """
        first = node_rank * self.gpus_per_node
        local = range(first, first + self.gpus_per_node)
        return tuple((a - first, b - first) for a, b in self.communicating_pairs() if a in local and b in local)

    def communication_groups(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Ranks that share a communicator, by vLLM's name of the kind of group; of one replica.

        The kinds are tp, pp, pcp, and with expert parallelism dp and ep: dense dp replicas do not talk. Groups of one
        rank, and kinds whose groups are those of another one, are left out. Source:
        ``vllm/distributed/parallel_state.py``, ``initialize_model_parallel``.
        """
        kinds: dict[str, tuple[str, ...]] = {
            "tp": ("dp", "pp", "pcp"),
            "pp": ("dp", "pcp", "tp"),
            "pcp": ("dp", "pp", "tp"),
        }
        if self.ep:
            kinds |= {"dp": ("pp", "pcp", "tp"), "ep": ("pp",)}
        found: dict[str, tuple[tuple[int, ...], ...]] = {}
        for name, fixed in kinds.items():
            groups: dict[tuple[int, ...], list[int]] = {}
            for rank in range(self.ranks):
                at = dict(zip(("dp", "pp", "pcp", "tp"), self._coordinates(rank), strict=True))
                groups.setdefault(tuple(at[axis] for axis in fixed), []).append(rank)
            of_kind = tuple(tuple(ranks) for ranks in groups.values() if len(ranks) > 1)
            if of_kind and of_kind not in found.values():
                found[name] = of_kind
        return found

    def _ranks_talk(self, a: int, b: int) -> bool:
        (dp_a, pp_a, pcp_a, tp_a), (dp_b, pp_b, pcp_b, tp_b) = self._coordinates(a), self._coordinates(b)
        if pp_a == pp_b:
            return dp_a == dp_b or self.ep
        return dp_a == dp_b and abs(pp_a - pp_b) == 1 and (pcp_a, tp_a) == (pcp_b, tp_b)

    def _coordinates(self, rank: int) -> tuple[int, int, int, int]:
        rank, tp = divmod(rank, self.tp)
        rank, pcp = divmod(rank, self.pcp)
        dp, pp = divmod(rank, self.pp)
        return dp, pp, pcp, tp

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
        if layout.tp % layout.dcp:
            raise self._error(
                f"dcp{layout.dcp} must divide tp{layout.tp}: decode context parallelism shares the GPUs of tp",
                at=self._text.index("dcp"),
            )
        if layout.gpus % layout.nodes:
            raise self._error(
                f"{layout.gpus} GPUs cannot be spread evenly over {layout.nodes} nodes",
                at=self._text.index("@"),
            )

    def _error(self, reason: str, *, at: int | None = None) -> LayoutSyntaxError:
        return LayoutSyntaxError(self._text, (self._at if at is None else at) + 1, f"layout: {reason}")
