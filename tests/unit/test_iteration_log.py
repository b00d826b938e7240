from __future__ import annotations

import pytest

from pytest_gpulayout.iteration_log import ServingLog, monitors_compilations, read_serving_log
from pytest_gpulayout.server_window import StepTimes

PREFIX = "(APIServer pid=3504) INFO 11-21 03:43:40 [loggers.py:194]"
JIT = "(Worker_TP1 pid=9) WARNING 11-21 03:43:41 [jit_monitor.py:131]"
SPIKE = "This causes a latency spike; consider extending warmup to cover this shape/config."


def iteration(
    index: int,
    elapsed_ms: float,
    generating: int = 4,
    *,
    engine: int = 0,
    context: int = 0,
    dummy: bool = False,
    encoder: str = "",
) -> str:
    """As ``LoggingStatLogger._log_iteration_details`` formats it."""
    return (
        "%s %sIteration(%d): %d context requests, %d context tokens, "  # noqa: UP031 (vLLM's own format)
        "%d generation requests, %d generation tokens, "
        "iteration elapsed time: %.2f ms%s, "
        "%s KV cache usage: %.1f%%%s"
    ) % (
        *(PREFIX, f"Engine {engine:03d}: ", index, context, 64 * context, generating, generating),
        *(elapsed_ms, " (dummy)" if dummy else "", "GPU", 0.3, encoder),
    )


def steps(*lines: str) -> tuple[StepTimes, ...]:
    return read_serving_log(lines).steps


def test_steps_that_decode_the_most_common_number_of_requests() -> None:
    assert steps(
        iteration(1, 90.0, 0, context=4),
        iteration(2, 99.0),  # the first after a prefill
        *(iteration(index, 8.0) for index in (3, 4)),
        iteration(5, 9.5),
        iteration(6, 5.0, 3),
        *(iteration(index, 4.0, 3) for index in (7, 8)),
    ) == (StepTimes(engine="0", steps=8, decode_steps=3, dummy_steps=0, requests=4, median_ms=8.0, p99_ms=9.47),)


def test_a_prefill_on_the_side_is_no_decode() -> None:
    lines = [iteration(1, 8), iteration(2, 50, 4, context=1), iteration(3, 20), iteration(4, 8.25)]
    (found,) = steps(*lines)
    assert (found.steps, found.decode_steps, found.median_ms) == (4, 1, 8.25)


def test_a_step_that_is_missing_before_is_a_pause() -> None:
    (found,) = steps(iteration(1, 8), iteration(2, 8), iteration(7, 900), iteration(8, 8))
    assert (found.decode_steps, found.p99_ms) == (2, 8)


def test_more_requests_win_a_tie() -> None:
    (found,) = steps(iteration(1, 8), iteration(2, 8), iteration(3, 3, 1), iteration(4, 3, 1))
    assert (found.requests, found.decode_steps) == (4, 1)


def test_engines_are_kept_apart_and_dummies_counted() -> None:
    lines = []
    for index in range(12):
        lines.append(iteration(index, 8, engine=2))
        lines.append(iteration(index, 6, 0, engine=10, dummy=True) if index < 5 else iteration(index, 7, engine=10))
    first, second = steps(*lines)
    assert (first.engine, first.steps, first.decode_steps, first.dummy_steps) == ("2", 12, 11, 0)
    assert (second.engine, second.steps, second.decode_steps, second.dummy_steps) == ("10", 12, 6, 5)
    assert (first.median_ms, second.median_ms) == (8, 7)


def test_steps_with_images_are_read() -> None:
    encoder = ", encoder inputs: 1, encoder output embeddings: 576"
    (found,) = steps(iteration(1, 8, encoder=encoder), iteration(2, 8))
    assert found.steps == 2


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [iteration(1, 8)],
        [iteration(1, 8, 0, context=1), iteration(2, 8, 0, context=1)],
        [iteration(index, 8, 0, dummy=True) for index in range(4)],
        [iteration(index, 8).replace("loggers.py", "logger.py") for index in range(4)],
        [f"(APIServer pid=1) INFO 11-21 03:43:40 [logger.py:39] prompt: {iteration(i, 8)}" for i in range(4)],
        ["(APIServer pid=1) INFO 11-21 03:43:40 [loggers.py:300] Engine 000: Avg prompt throughput: 1.0 tokens/s"],
    ],
)
def test_without_a_step_to_go_by_there_are_no_times(lines: list[str]) -> None:
    assert read_serving_log(lines) == ServingLog((), ())


# -- compilations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            f"{JIT} Triton kernel JIT compilation during inference: _fwd_kernel. {SPIKE}",
            "Worker_TP1: Triton kernel JIT compilation during inference: _fwd_kernel",
        ),
        (
            f"{JIT} CuTeDSL JIT compilation during inference: flash.attn.Forward. {SPIKE}",
            "Worker_TP1: CuTeDSL JIT compilation during inference: flash.attn.Forward",
        ),
        (
            f"{JIT} TileLang JIT compilation during inference: gemm (cache_key=(1, 2); runtime_shapes={{}}). {SPIKE}",
            "Worker_TP1: TileLang JIT compilation during inference: gemm (cache_key=(1, 2); runtime_shapes={})",
        ),
        (
            f"WARNING 11-21 03:43:41 [jit_monitor.py:131] Triton kernel JIT compilation during inference: k. {SPIKE}",
            "Triton kernel JIT compilation during inference: k",
        ),
        (
            "(Worker_TP0 pid=8) Triton autotuning for function matmul_kernel,",
            "Worker_TP0: Triton autotuning for function matmul_kernel",
        ),
    ],
)
def test_compilations(line: str, found: str) -> None:
    assert read_serving_log(["x", line, "y"]).jit == (found,)


@pytest.mark.parametrize(
    "line",
    [
        f"{JIT} Kernel JIT monitor activated; monitored JIT compilations during inference will use mode=warn.",
        f"{JIT.replace('jit_monitor', 'logger')} Triton kernel JIT compilation during inference: k. {SPIKE}",
        "(APIServer pid=1) INFO 11-21 03:43:40 [logger.py:39] Triton autotuning for function k,",
        "(APIServer pid=1) INFO 11-21 03:43:40 [logger.py:39] prompt: 'kernel JIT compilation during inference: k'",
    ],
)
def test_lines_that_tell_of_no_compilation(line: str) -> None:
    assert read_serving_log([line]).jit == ()


def test_a_long_line_is_cut() -> None:
    (found,) = read_serving_log([f"{JIT} Triton JIT compilation during inference: {'k' * 5000}. {SPIKE}"]).jit
    assert len(found) == 300


def test_whether_compilations_are_logged_at_all() -> None:
    activated = "Kernel JIT monitor activated; monitored JIT compilations during inference will use mode=warn."
    assert monitors_compilations(["x", f"{JIT} {activated}"])
    assert not monitors_compilations(["x", f"{PREFIX} {activated}"])
    assert not monitors_compilations([])
