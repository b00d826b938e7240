"""What it costs the ranks of a layout to add up a message, before a server has its part in it.

With tensor parallelism the ranks add up the outputs of attention and of the MLP in every layer: an all-reduce of
(tokens, hidden size) numbers each (``RowParallelLinear.forward`` of vLLM 0.32, ``model_executor/layers/linear.py``).
A decode step has a token of each sequence, a prefill up to ``--max-num-batched-tokens``. A probe sends such messages
over the same devices, without a server: a link that is slow shows there, and a server that is slow does not.

Knows the messages, what their times mean, and how several starts of a probe become a measurement that is judged like
that of a server. Leaves starting processes to :mod:`~pytest_gpulayout.adapters.collective_probe`, and how fast a link
must be to :mod:`~pytest_gpulayout.link_limits`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from pytest_gpulayout.baseline import BaselineRun, BaselineSession, as_stored, fold_batches, is_measurement
from pytest_gpulayout.errors import WorkloadError
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.measurement import Identity
from pytest_gpulayout.metrics import COLLECTIVES, DECODE_BATCHES
from pytest_gpulayout.stats import NoisePrior, median
from pytest_gpulayout.tolerance import Tolerance
from pytest_gpulayout.verdict import MetricSample
from pytest_gpulayout.workload import PROBE

PREFILL_TOKENS = 8192
"""Tokens of a prefill: what a server takes in one step at most, by default on GPUs of 70 to 160 GiB (vLLM 0.32,
``vllm/engine/arg_utils.py``, ``max_num_batched_tokens``)."""

DEFAULT_HIDDEN_SIZE = 4096
"""Where the model's own cannot be read: that of Llama-3.1-8B, Qwen3-8B and Mistral-7B."""

ELEMENT_BYTES: Mapping[str, int] = MappingProxyType({"bfloat16": 2, "float16": 2, "float32": 4})
"""Of what ranks add up: activations, which stay in the model's own dtype where its weights are quantised."""

DEFAULT_TOLERANCES: Mapping[str, float] = MappingProxyType(dict.fromkeys(COLLECTIVES, 0.15))
"""How much worse each may get: less than any step from one class of link, or transport, to the next makes."""

NOISE_PRIORS: Mapping[str, NoisePrior] = MappingProxyType(
    {
        "cuda": NoisePrior(start_sd=0.02, session_sd=0.02),
        "cpu": NoisePrior(start_sd=0.10, session_sd=0.10),
    }
)
"""Spread that is assumed until stored sessions show their own, by platform; docs/probe.md says why these."""

PREFILL = "prefill"
_PREFILL_METRIC = "all_reduce_prefill_gb_per_s"
_IN_FINGERPRINT = ("hidden_size", "dtype", "decode_iterations", "prefill_iterations")


@dataclass(frozen=True, slots=True)
class Message:
    """One size of message.

    :param name: ``batch1``, ``batch8``, ``batch64`` or ``prefill``. :param metric: what its time becomes.
    :param elements: numbers in it. :param size_bytes: their bytes.
    :param iterations: all-reduces in a row that make one value.
    """

    name: str
    metric: str
    elements: int
    size_bytes: int
    iterations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePlan:
    """What one start of the probe sends.

    :param hidden_size: numbers per token that the ranks add up.
    :param dtype: of these numbers: ``bfloat16``, ``float16`` or ``float32``.
    :param origin: where the hidden size comes from, in words.
    :param rounds: values of each message per start; one is the mean over its iterations.
    :param decode_iterations: all-reduces in a row, of the messages of a decode step.
    :param prefill_iterations: the same of a prefill's.
    :param timeout_s: how long a start may take, loading PyTorch included.
    :param least_share: of what a link is published to carry, that must be reached: from 0, not to check it, to 1;
        ``None`` for that of its class, see :data:`~pytest_gpulayout.link_limits.LEAST_SHARE`.
    :raises WorkloadError: a size or number that cannot be.
    """

    hidden_size: int = DEFAULT_HIDDEN_SIZE
    dtype: str = "bfloat16"
    origin: str = "the default"
    rounds: int = 7
    decode_iterations: int = 100
    prefill_iterations: int = 4
    timeout_s: float = 180.0
    least_share: float | None = None

    def __post_init__(self) -> None:
        counts = ("hidden_size", "rounds", "decode_iterations", "prefill_iterations")
        found = [f"{name} {getattr(self, name)}" for name in counts if getattr(self, name) < 1]
        found += [] if self.timeout_s > 0 else [f"timeout_s {self.timeout_s:g}"]
        found += [] if self.dtype in ELEMENT_BYTES else [f"dtype {self.dtype!r}"]
        found += [] if 0 <= (self.least_share or 0) <= 1 else [f"least_share {self.least_share}"]
        if found:
            raise WorkloadError(
                "a probe needs whole numbers from 1 on, shares from 0 to 1, and a dtype of "
                f"{', '.join(ELEMENT_BYTES)}\n"
                f"  found: {', '.join(found)}\n  in a ProbePlan\n"
                "  correct it where the fixture gpu_probe_plan is overridden"
            )

    @property
    def name(self) -> str:
        """Of the workload, for keys."""
        return PROBE

    @property
    def iterations(self) -> int:
        """All-reduces of a round, of all messages together."""
        return sum(message.iterations for message in self.messages())

    def messages(self) -> tuple[Message, ...]:
        """Return all sizes, the smallest first."""
        decode = [
            self._message(f"batch{batch}", f"all_reduce_batch{batch}_us", batch, self.decode_iterations)
            for batch in DECODE_BATCHES
        ]
        return (*decode, self._message(PREFILL, _PREFILL_METRIC, PREFILL_TOKENS, self.prefill_iterations))

    def _message(self, name: str, metric: str, tokens: int, iterations: int) -> Message:
        elements = tokens * self.hidden_size
        return Message(name, metric, elements, elements * ELEMENT_BYTES[self.dtype], iterations)

    def fingerprint(self) -> str:
        """Return 12 hex digits that differ for other messages; how often a start repeats them does not count."""
        load = {name: getattr(self, name) for name in _IN_FINGERPRINT}
        load |= {"decode_batches": list(DECODE_BATCHES), "prefill_tokens": PREFILL_TOKENS}
        return hashlib.sha256(json.dumps(load, sort_keys=True).encode()).hexdigest()[:12]

    def model_identity(self) -> dict[str, str]:
        """Return what stands for the model in a key: links serve all models of one hidden size alike."""
        return {"name": f"hidden-{self.hidden_size}", "revision": "", "dtype": self.dtype, "arguments": ""}

    def to_document(self) -> dict[str, Any]:
        """Return the plan as results keep it."""
        return {
            "name": PROBE,
            "hidden_size": self.hidden_size,
            "origin": self.origin,
            "dtype": self.dtype,
            "rounds": self.rounds,
            "messages": [
                {"name": message.name, "bytes": message.size_bytes, "iterations": message.iterations}
                for message in self.messages()
            ],
        }


def plan_of_document(document: Mapping[str, Any]) -> ProbePlan:
    """Return the plan that results keep. :param document: as :meth:`ProbePlan.to_document` gives it."""
    iterations = {message["name"]: message["iterations"] for message in document["messages"]}
    return ProbePlan(
        hidden_size=document["hidden_size"],
        dtype=document["dtype"],
        origin=document["origin"],
        rounds=document["rounds"],
        decode_iterations=iterations["batch1"],
        prefill_iterations=iterations[PREFILL],
    )


def probe_groups(layout: Layout, *, moe: bool = False) -> tuple[tuple[int, ...], ...]:
    """Return the groups of ranks that a probe lets add up messages, all at the same time, over all replicas.

    They are the tensor-parallel groups; in a layout without them those of the first other kind, whose ranks talk over
    the same links. Empty where no ranks talk to each other.

    :param moe: whether the model has experts, so that dp ranks talk, too.
    """
    kinds = layout.communication_groups(moe=moe)
    groups = kinds.get("tp") or next(iter(kinds.values()), ())
    return tuple(
        tuple(rank + replica * layout.ranks for rank in group)
        for replica in range(layout.replicas)
        for group in groups
    )


def no_probe_needed(layout: Layout) -> str:
    """Say why a layout has nothing to probe."""
    return f"{layout}: no ranks talk to each other, so there is no link to probe"


def wire_bytes(size_bytes: int, ranks: int) -> float:
    """Return the bytes that each rank must send at least: ``S * 2 (n - 1) / n``.

    Source: NVIDIA/nccl-tests, ``doc/PERFORMANCE.md``, "AllReduce".
    """
    return size_bytes * 2 * (ranks - 1) / ranks


def bus_bandwidth_gb_per_s(size_bytes: int, time_us: float, ranks: int) -> float:
    """Return the bus bandwidth of an all-reduce: ``busbw = S / t * 2 (n - 1) / n``, in 1e9 bytes per second.

    It does not depend on the number of ranks, so it can be held against what a link carries in one direction. With
    NVLink SHARP, where the switch adds up, it may lie above that. Source: NVIDIA/nccl-tests, ``doc/PERFORMANCE.md``.

    :param time_us: of one all-reduce; without any, the bandwidth is 0, which is no measurement.
    """
    return wire_bytes(size_bytes, ranks) / time_us / 1e3 if time_us > 0 else 0.0


@dataclass(frozen=True, slots=True)
class GroupTimes:
    """One group of ranks in one start.

    :param rounds: (n_rounds,) microseconds per all-reduce by the name of the message, of the slowest rank.
    """

    ranks: tuple[int, ...]
    rounds: tuple[Mapping[str, float], ...]


@dataclass(frozen=True, slots=True)
class ProbeRun:
    """What one start of the probe measured.

    :param groups: (n_groups,); they have the same number of ranks and of rounds.
    :param duration_s: from its start to its end.
    :param backend: of ``torch.distributed``, with its version where it tells one.
    :param transports: channels by transport, as the log of NCCL names them; on CPUs ordered pairs of ranks.
    """

    groups: tuple[GroupTimes, ...]
    duration_s: float
    backend: str
    transports: Mapping[str, int] = field(default_factory=dict)

    def rounds(self, plan: ProbePlan) -> list[dict[str, float]]:
        """Return (n_rounds,) of metrics by name, of the slowest group."""
        return [self._round(plan, number) for number in range(min(len(group.rounds) for group in self.groups))]

    def _round(self, plan: ProbePlan, number: int) -> dict[str, float]:
        found = {}
        for message in plan.messages():
            time_us = max(group.rounds[number][message.name] for group in self.groups)
            ranks = len(self.groups[0].ranks)
            is_rate = COLLECTIVES[message.metric].higher_is_better
            found[message.metric] = bus_bandwidth_gb_per_s(message.size_bytes, time_us, ranks) if is_rate else time_us
        return found


@dataclass(frozen=True, slots=True)
class CollectiveMeasurement:
    """The probe of one layout on its devices; what :class:`~pytest_gpulayout.measurement.Measurement` is to a server.

    :param runs: (n_starts,), one per start of the probe, oldest first.
    :param replaced: always empty: no start of a probe takes the place of another.
    """

    identity: Identity
    plan: ProbePlan
    runs: tuple[ProbeRun, ...]
    replaced: tuple[str, ...] = ()

    @property
    def start_noun(self) -> str:
        """What one start is called."""
        return "probe start"

    def with_run(self, run: ProbeRun) -> CollectiveMeasurement:
        """Return this measurement with one more start."""
        return replace(self, runs=(*self.runs, run))

    def without_last(self) -> CollectiveMeasurement:
        """Return this measurement without its last start."""
        return replace(self, runs=self.runs[:-1])

    def samples(self, metric: str) -> tuple[MetricSample, ...]:
        """Return (n_starts,) samples of one metric; empty for one that a probe does not have."""
        if metric not in COLLECTIVES:
            return ()
        return tuple(MetricSample(tuple(one[metric] for one in run.rounds(self.plan))) for run in self.runs)

    def observed(self) -> tuple[Mapping[str, float], ...]:
        """Return (n_starts,) of what else was seen: nothing."""
        return tuple({} for _ in self.runs)

    def batch_sizes(self) -> tuple[float, ...]:
        """Return (n_starts,) numbers of all-reduces in a round."""
        return tuple(float(self.plan.iterations) for _ in self.runs)

    def is_last_disturbed(self) -> bool:
        """Whether a fresh start should take the place of the last one: nothing that a probe tells says so."""
        return False

    def problems(self) -> tuple[str, ...]:
        """Say why these numbers must be neither judged nor stored; empty when they are sound."""
        if not self.runs:
            return ("no start of the probe was measured",)
        return tuple(f"{text} (probe start {number})" for number, text in self._unsound())

    def _unsound(self) -> Iterator[tuple[int, str]]:
        for number, run in enumerate(self.runs, 1):
            rounds = run.rounds(self.plan)
            for name in COLLECTIVES:
                values = [one[name] for one in rounds]
                if not is_measurement(values):
                    told = ", ".join(f"{value:g}" for value in values) or "no round"
                    yield number, f"unfit-metrics: {name} must be a number above zero, found {told}"

    def shortfalls(self) -> tuple[str, ...]:
        """Say where less was measured than was asked for."""
        rounds = [(number, len(run.rounds(self.plan))) for number, run in enumerate(self.runs, 1)]
        return tuple(
            f"too-few-samples: {self.plan.rounds} rounds were asked for, found {found} (probe start {number}); "
            "let the probe measure all of them"
            for number, found in rounds
            if found != self.plan.rounds
        )

    def as_session(self, recorded: str) -> BaselineSession:
        """Return what a baseline stores of this. :param recorded: UTC, ISO 8601."""
        runs = []
        for run in self.runs:
            rounds = run.rounds(self.plan)
            metrics = {name: tuple(map(as_stored, values)) for name, values in fold_batches(rounds).items()}
            runs.append(BaselineRun(len(rounds) * self.plan.iterations, metrics))
        identity = self.identity
        return BaselineSession(
            recorded, identity.epoch, identity.sut, identity.covariates, tuple(runs), identity.topology
        )

    def bandwidth_gb_per_s(self, group: int) -> float:
        """Return the bus bandwidth of one group at the prefill's message, the median over all rounds and starts.

        :param group: position among the groups.
        """
        message = next(message for message in self.plan.messages() if message.name == PREFILL)
        times = [one[PREFILL] for run in self.runs for one in run.groups[group].rounds]
        return bus_bandwidth_gb_per_s(message.size_bytes, median(times), len(self.runs[0].groups[group].ranks))


def serving_tolerances(tolerances: Mapping[str, Tolerance]) -> dict[str, Tolerance]:
    """Return those that are of metrics of a server."""
    return {name: tolerance for name, tolerance in tolerances.items() if name not in COLLECTIVES}


def probe_tolerances(tolerances: Mapping[str, Tolerance]) -> dict[str, Tolerance]:
    """Return those of the probe's metrics, all of which are gated. :param tolerances: as a user named them."""
    defaults = {name: Tolerance(name, fraction) for name, fraction in DEFAULT_TOLERANCES.items()}
    return {name: tolerances.get(name, default) for name, default in defaults.items()}


def transports_text(runs: Sequence[ProbeRun]) -> str:
    """``P2P/CUMEM``: all transports that were seen, without their number; ``""`` where none was."""
    return ", ".join(sorted({name for run in runs for name in run.transports}))
