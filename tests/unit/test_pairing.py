"""The paired gate as a use case: order, looks, budget, and everything that is no verdict; nothing is started."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import pytest

from pytest_gpulayout.baseline import Baseline
from pytest_gpulayout.baseline_text import baseline_to_text
from pytest_gpulayout.errors import MeasurementError, ServerError, ServerExited
from pytest_gpulayout.measurement import Identity
from pytest_gpulayout.pairing import (
    BaseSide,
    PairedResult,
    PairingInputs,
    Start,
    block_order,
    differences_of_sides,
    judge_in_pairs,
)
from pytest_gpulayout.testing import InMemoryBaselines
from pytest_gpulayout.tolerance import Tolerance
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.validity import Problem
from pytest_gpulayout.verdict import Status
from tests.support.measurements import identity, measurement_of, run_of, session_of

TOLERANCES = {"median_tpot_ms": Tolerance("median_tpot_ms", 0.05)}
HOT, WRONG = Problem("throttled", "the GPU was hot"), Problem("token-counts", "7 too many")
WOBBLE = (1.001, 0.999, 1.002, 0.998, 1.0, 1.001, 0.999, 1.0)


@dataclass
class Bench:
    """Two sides with scripted starts, and a clock that moves ten seconds per start.

    :param candidate: and ``base``: factor on all times of each start, in the order they are made.
    :param problems: and ``errors``: of a side's start, counted from 1.
    """

    candidate: Sequence[float] = WOBBLE
    base: Sequence[float] = WOBBLE[::-1]
    blocks: int = 8
    budget_s: float | None = None
    restarts: bool = True
    stored: Baseline | None = None
    tolerances: Mapping[str, Tolerance] = field(default_factory=lambda: dict(TOLERANCES))
    change_base: Callable[[RunTrace, int], RunTrace] = lambda run, _: run
    problems: Mapping[tuple[str, int], tuple[Problem, ...]] = field(default_factory=dict)
    errors: Mapping[tuple[str, int], Exception] = field(default_factory=dict)
    events: list[tuple[str, int]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    now_s: float = 10.0

    def start(self, side: str, factors: Sequence[float], first: int) -> Callable[[int], Start]:
        numbers = count(first)

        def start(seed: int) -> Start:
            number = next(numbers)
            self.events.append((side, seed))
            self.now_s += 10
            if error := self.errors.get((side, number)):
                raise error
            run = replace(run_of(factors[number - 1], factors[number - 1]), seed=seed)
            return self.change_base(run, number) if side == "base" else run, self.problems.get((side, number), ()), {}

        return start

    def judge(self) -> PairedResult:
        first = self.problems.get(("candidate", 1), ())
        measurement = replace(measurement_of(self.candidate[0]), disturbances={0: first})
        key = measurement.identity.key
        texts = {} if self.stored is None else {key.path: baseline_to_text(self.stored)}
        self.store = InMemoryBaselines(texts)
        seeds = count(100)
        return judge_in_pairs(
            measurement,
            PairingInputs(
                base=BaseSide("old", self.start("base", self.base, 1), of_base, restarts=self.restarts),
                start_candidate=self.start("candidate", self.candidate, 2),
                tolerances=self.tolerances,
                blocks=self.blocks,
                budget_s=self.budget_s,
                store=self.store,
                new_seed=lambda: next(seeds),
                now_utc=lambda: "2026-11-21T08:00:00Z",
                elapsed_s=lambda: self.now_s,
                say=self.lines.append,
            ),
        )


def of_base(candidate: Identity) -> Identity:
    return replace(candidate, sut={**candidate.sut, "vllm": "0.31.0"})


# -- verdicts --------------------------------------------------------------------------------------------------------


def test_equal_sides_pass_after_three_blocks_and_nothing_is_written() -> None:
    bench = Bench()

    result = bench.judge()

    assert result.verdict.status is Status.PASS
    assert result.base is not None
    assert (len(result.candidate.runs), len(result.base.runs)) == (3, 3)
    assert bench.store.texts == {}
    assert result.verdict.baseline_path == "base old"
    assert result.verdict.stored == ""
    assert result.verdict.changed == ("vllm: 0.31.0 -> 0.32.0",)
    assert result.base.identity.sut["vllm"] == "0.31.0"


@pytest.mark.parametrize(
    ("factor", "status"), [(1.5, Status.REGRESSION), (0.5, Status.IMPROVEMENT), (1.01, Status.PASS)]
)
def test_verdicts_follow_the_candidate(factor: float, status: Status) -> None:
    result = Bench(candidate=[factor * value for value in WOBBLE]).judge()

    assert result.verdict.status is status
    [metric] = result.verdict.metrics
    assert metric.change == pytest.approx(factor - 1, abs=0.01)
    worse = 3 if factor > 1 else 0
    assert f"signs: median_tpot_ms worse in {worse} of 3 blocks" in result.verdict.reasons


def test_what_is_not_clear_takes_all_blocks_and_says_what_it_takes() -> None:
    wild = [1.0, 1.3, 0.8, 1.2, 0.9, 1.3, 0.7, 1.2]
    bench = Bench(candidate=wild)

    result = bench.judge()

    assert result.verdict.status is Status.INCONCLUSIVE
    assert len(result.candidate.runs) == 8
    assert result.verdict.reasons[0].startswith("median_tpot_ms: changed by ")
    assert "cannot be ruled out with 8 blocks: even 24 blocks would hide changes below " in result.verdict.reasons[0]
    assert len(bench.lines) == 8
    assert bench.lines[0] == "tp2: block 1 of at most 8, base old: median_tpot_ms +0.0%"
    assert bench.lines[3].startswith("tp2: block 4 of at most 8, base old: median_tpot_ms +")
    assert "%]" in bench.lines[3]


def test_both_sides_their_versions_and_the_order_are_named() -> None:
    [_, sides, signs] = ("", *Bench().judge().verdict.reasons)

    assert sides.startswith(
        "candidate (vLLM 0.32.0) against base old (vLLM 0.31.0): 3 blocks, fresh servers of both "
    )
    assert "in the order CB BC " in sides
    assert sides.endswith("the spread between starts is that of these blocks alone")
    assert signs.startswith("signs: ")


def test_a_metric_with_a_cause_gets_its_sentence() -> None:
    verdict = Bench(candidate=[1.5 * value for value in WOBBLE]).judge().verdict

    assert verdict.cause[0].startswith("median_tpot_ms rose by 50%")


def test_a_base_that_cannot_be_restarted_counts_once_and_that_is_said() -> None:
    result = Bench(restarts=False).judge()

    [metric] = result.verdict.metrics
    assert metric.n_baseline == 1
    assert any(reason.startswith("the base was one server throughout") for reason in result.verdict.reasons)


# -- blocks ----------------------------------------------------------------------------------------------------------


def test_order_is_balanced_in_every_two_blocks_and_repeats_with_its_seed() -> None:
    for seed in range(50):
        order = block_order(8, seed)
        assert order == block_order(8, seed)
        assert order[:2] == (True, False)
        assert all(sum(order[n : n + 2]) == 1 for n in range(0, 8, 2))
    assert len({block_order(8, seed) for seed in range(50)}) == 8
    assert block_order(3, 1)[:2] == (True, False)
    assert len(block_order(3, 1)) == 3


def test_the_second_block_begins_with_the_base_and_each_block_has_a_seed_of_its_own() -> None:
    bench = Bench()

    bench.judge()

    assert bench.events[:3] == [("base", 1), ("base", 100), ("candidate", 100)]
    assert {seed for side, seed in bench.events if side == "base"} == {1, 100, 101}


def test_the_budget_ends_it_between_blocks() -> None:
    wild = [1.0, 1.3, 0.8, 1.2, 0.9, 1.3, 0.7, 1.2]
    result = Bench(candidate=wild, budget_s=85).judge()

    assert len(result.candidate.runs) == 4
    assert result.verdict.status is Status.INCONCLUSIVE
    assert "the budget of 85 s ended after 4 blocks of at most 8: allow more (--gpu-budget)" in result.verdict.reasons


def test_a_budget_for_one_block_gives_no_verdict_and_says_how_many_it_needs() -> None:
    result = Bench(budget_s=1).judge()

    assert result.verdict.status is Status.INCONCLUSIVE
    assert result.verdict.metrics == ()
    assert result.verdict.reasons[0].startswith(
        "the budget of 1 s ended after 1 block of at most 8; a verdict needs 3"
    )


# -- the stored spread -----------------------------------------------------------------------------------------------


def stored(*factors: float) -> Baseline:
    session = session_of(*factors)
    return Baseline(identity().key, (session, session))


def test_a_stored_spread_is_pooled_and_named() -> None:
    wide = [1.0, 1.03, 0.97, 1.03, 0.97, 1.02, 0.98, 1.0]
    alone = Bench(candidate=wide).judge().verdict.metrics[0]
    with_stored = Bench(candidate=wide, stored=stored(1.0, 1.02, 0.98)).judge()

    assert with_stored.verdict.metrics[0].n_current < alone.n_current
    assert "is that of these blocks and of memory/" in " ".join(with_stored.verdict.reasons)


def test_a_stored_mean_is_never_compared_with() -> None:
    result = Bench(stored=stored(9.0, 9.1, 8.9)).judge()

    assert result.verdict.status is Status.PASS
    assert result.verdict.metrics[0].baseline == pytest.approx(10.0, rel=0.01)


def test_a_stored_file_that_cannot_be_used_is_told_and_not_needed() -> None:
    result = Bench(stored=replace(stored(1.0, 1.01), key=identity(layout="tp4").key)).judge()

    assert result.verdict.status is Status.PASS
    assert any("these blocks alone; what is stored cannot be used: " in reason for reason in result.verdict.reasons)


# -- no verdict ------------------------------------------------------------------------------------------------------


def test_numbers_that_are_not_sound_are_invalid_and_it_is_said_whose() -> None:
    bench = Bench(problems={("base", 1): (WRONG,)})

    result = bench.judge()

    assert result.verdict.status is Status.INVALID
    assert result.verdict.reasons == ("base old: token-counts: 7 too many (server start 1)",)
    assert result.base is not None
    assert len(bench.events) == 1


@pytest.mark.parametrize(
    ("disturbed", "told"),
    [
        ([("candidate", 1)], ["of the candidate "]),
        ([("base", 1)], ["of the base old "]),
        ([("base", 2), ("candidate", 3)], ["of the candidate ", "of the base old "]),
        ([("base", 1), ("base", 2)], ["of the base old ", "of the base old "]),
    ],
)
def test_fresh_starts_take_the_place_of_disturbed_ones(disturbed: list[tuple[str, int]], told: list[str]) -> None:
    bench = Bench(problems=dict.fromkeys(disturbed, (HOT,)))

    result = bench.judge()

    assert result.verdict.status is Status.PASS
    assert result.base is not None
    assert len(result.candidate.runs) == len(result.base.runs) == 3
    assert [r for r in result.verdict.reasons if "measured anew" in r] == [
        f"a server start {whose}was disturbed, and measured anew (throttled: the GPU was hot)" for whose in told
    ]
    assert sum("is measured anew (throttled: " in line for line in bench.lines) == len(disturbed)
    blocks = [{run.seed for run in pair} for pair in zip(result.candidate.runs, result.base.runs, strict=True)]
    assert [len(seeds) for seeds in blocks] == [1, 1, 1]  # both sides of a block still got the same load


@pytest.mark.parametrize(
    "disturbed", [[("base", n) for n in (1, 2, 3)], [("base", 1), ("candidate", 2), ("candidate", 3)]]
)
def test_both_sides_together_replace_two_starts(disturbed: list[tuple[str, int]]) -> None:
    result = Bench(problems=dict.fromkeys(disturbed, (HOT,))).judge()

    assert result.verdict.status is Status.INVALID
    assert "throttled: the GPU was hot (server start " in result.verdict.reasons[0]
    assert sum("measured anew" in reason for reason in result.verdict.reasons) == 2


def test_no_start_is_replaced_after_the_budget() -> None:
    bench = Bench(problems={("base", 1): (HOT,)}, budget_s=30)

    assert bench.judge().verdict.status is Status.INVALID
    assert len(bench.events) == 1


def test_the_candidate_is_checked_before_a_base_is_started() -> None:
    bench = Bench(tolerances={})

    result = bench.judge()

    assert result.verdict.status is Status.INVALID
    assert result.verdict.reasons[0].startswith("candidate: ")
    assert (bench.events, result.base) == ([], None)


@pytest.mark.parametrize(("name", "kind"), [("prompt_tokens", "prompt"), ("output_tokens", "output")])
def test_other_token_counts_are_invalid(name: str, kind: str) -> None:
    def one_more(run: RunTrace, number: int) -> RunTrace:
        if number < 2:
            return run
        batches = tuple(
            replace(batch, requests=tuple(replace(r, **{name: getattr(r, name) + 1}) for r in batch.requests))
            for batch in run.batches
        )
        return replace(run, batches=batches)

    result = Bench(change_base=one_more).judge()

    assert result.verdict.status is Status.INVALID
    [reason] = result.verdict.reasons
    assert reason.startswith(f"token-counts: the same number of {kind} tokens is required of both sides")
    assert "(block 2)" in reason


@pytest.mark.parametrize("side", ["candidate", "base"])
@pytest.mark.parametrize("error", [ServerExited("EngineDeadError"), MeasurementError("no answer")])
def test_a_server_that_fails_is_named_with_its_block(side: str, error: Exception) -> None:
    kind = ServerError if isinstance(error, ServerError) else MeasurementError
    whose = "base old" if side == "base" else "candidate"

    with pytest.raises(
        kind, match=f"^the {whose} of paired mode could not be measured in block 2\n{error}"
    ) as raised:
        Bench(errors={(side, 2): error}).judge()

    assert raised.value.__cause__ is error


def test_what_the_base_does_not_tell_is_no_difference() -> None:
    mine = replace(identity(), sut={"vllm": "2", "torch": "2.13"}, epoch={"driver": "1"}, covariates={"host": "a"})
    theirs = replace(
        mine, sut={"vllm": "1", "torch": None, "arguments": "--x"}, epoch={"driver": None}, covariates={}
    )

    assert differences_of_sides(theirs, mine) == ("vllm: 1 -> 2", "arguments: --x -> unknown")


def test_sides_that_do_not_differ_are_called_so() -> None:
    bench = Bench()
    measurement = measurement_of(1.0)
    inputs = PairingInputs(
        BaseSide("same", bench.start("base", bench.base, 1), lambda candidate: candidate),
        bench.start("candidate", bench.candidate, 2),
        *(TOLERANCES, 3, None, None, iter(range(9)).__next__, lambda: "2026-11-21T08:00:00Z", lambda: 1.0),
        bench.lines.append,
    )

    verdict = judge_in_pairs(measurement, inputs).verdict

    assert verdict.changed == ()
    assert "nothing that is recorded of both sides differs: this compares them with themselves" in verdict.reasons
