from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulayout.gpu_specs import find_gpu
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.link_speeds import LinkSpeed, link_speed
from pytest_gpulayout.links import parse_link_class
from pytest_gpulayout.model_memory import stage_weights
from pytest_gpulayout.model_shape import Experts
from pytest_gpulayout.model_traffic import ALL_TO_ALL, Step, talking_groups
from pytest_gpulayout.step_time import (
    ARITHMETIC_SHARE,
    LAYER_US,
    MEMORY_SHARE,
    Engine,
    step_time,
    touched_share,
)
from tests.support.model_configs import model_of

H200 = find_gpu("H200")
NVLINK = link_speed(parse_link_class("NV18"), H200)
READ_GB_PER_S = 4800 * MEMORY_SHARE


def engine(name: str, layout: str, *, speed: LinkSpeed = NVLINK, **changes: Any) -> Engine:
    model, parsed = model_of(name, **changes), parse_layout(layout)
    speeds = dict.fromkeys(talking_groups(model.shape, parsed, ALL_TO_ALL[0]), speed)
    stages = stage_weights(model.shape, model.stored, parsed)
    return Engine(model.shape, parsed, stages, H200, speeds, model.cache_bits / 8, ALL_TO_ALL[0])


def decode(found: Engine, sequences: int, context: float = 1000) -> Any:
    return step_time(found, Step(sequences, sequences, decode=True), context)


def test_one_sequence_reads_all_weights_and_its_cache() -> None:
    found = decode(engine("llama-3.1-8b", "tp1"), 1)
    size = 2 * (8_030_261_248 - 128_256 * 4096) + 1000 * 131_072
    assert found.reading == pytest.approx(size / (READ_GB_PER_S * 1e3))
    assert (found.arithmetic, found.communication, found.messages) == (0, 0, ())
    assert found.fixed == 32 * LAYER_US
    assert found.total == found.slowest == found.reading + found.fixed


def test_a_prompt_multiplies() -> None:
    found = step_time(engine("llama-3.1-8b", "tp1"), Step(8192, 1, decode=False), 4096)
    matrices = 8_030_261_248 - 2 * 128_256 * 4096 - 65 * 4096
    operations = 2 * (8192 * matrices + 128_256 * 4096) + 8192 * 4 * 32 * 128 * 4096 * 32
    assert found.arithmetic == pytest.approx(operations / (989e6 * ARITHMETIC_SHARE))
    assert found.reading == 0


def test_fp8_multiplies_twice_as_fast() -> None:
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    plain, short = engine("qwen3-8b", "tp1"), engine("qwen3-8b", "tp1", quantization_config=quantized)
    step = Step(8192, 1, decode=False)
    ratio = step_time(plain, step, 0).arithmetic / step_time(short, step, 0).arithmetic
    assert 1.7 < ratio < 2  # the head stays as it is


def test_tensor_parallelism_reads_a_part_and_communicates() -> None:
    alone, four = decode(engine("llama-3.1-8b", "tp1"), 1), decode(engine("llama-3.1-8b", "tp4"), 1)
    assert four.reading == pytest.approx(alone.reading / 4, rel=0.01)
    assert four.communication == sum(message.count * duration.us for message, duration in four.messages)
    assert [message.count for message, _ in four.messages] == [1, 32, 32, 1]
    assert four.communication_share == four.communication / four.total


def test_stages_follow_each_other_and_the_slowest_sets_the_pace() -> None:
    alone, two = decode(engine("llama-3.1-8b", "tp1"), 8), decode(engine("llama-3.1-8b", "pp2"), 8)
    assert two.reading == pytest.approx(alone.reading)
    assert two.fixed == alone.fixed
    assert two.total / 2 < two.slowest < two.total


def test_a_window_ends_the_reading_of_the_cache() -> None:
    windowed = engine("mistral-7b-v0.1", "tp1")
    assert decode(windowed, 1, 4096).reading == decode(windowed, 1, 30_000).reading
    assert decode(windowed, 1, 4095).reading < decode(windowed, 1, 4096).reading


def test_the_latent_of_mla_is_read_whole_by_every_rank() -> None:
    """Each rank of tp reads the cache of all tokens; dcp spreads them."""
    whole, spread = engine("deepseek-v2-lite", "tp8"), engine("deepseek-v2-lite", "tp8dcp8")
    engines = (("w", whole), ("s", spread))
    more = {name: decode(found, 1, 100_000).reading - decode(found, 1, 0).reading for name, found in engines}
    assert more["w"] == pytest.approx(100_000 * 31_104 / (READ_GB_PER_S * 1e3))
    assert more["s"] == pytest.approx(more["w"] / 8)


@pytest.mark.parametrize(("tokens", "share"), [(1, 8 / 128), (2, 1 - (120 / 128) ** 2), (100, 0.9984)])
def test_experts_that_a_batch_touches(tokens: int, share: float) -> None:
    assert touched_share(Experts(128, 8, 768), tokens) == pytest.approx(share, abs=1e-4)


def test_one_sequence_reads_its_experts_alone() -> None:
    found = engine("qwen3-30b-a3b", "tp1")
    more = decode(found, 100, 0).reading - decode(found, 1, 0).reading
    routed = 2 * 48 * 128 * 3 * 2048 * 768
    assert more == pytest.approx(routed * (0.9984 - 8 / 128) / (READ_GB_PER_S * 1e3), rel=1e-3)


def test_engines_that_share_experts_touch_more_of_them() -> None:
    alone, together = engine("qwen3-30b-a3b", "tp1"), engine("qwen3-30b-a3b", "dp4ep")
    attention = alone.stages[0].each_step / (READ_GB_PER_S * 1e3)
    for_one = decode(alone, 4, 0).reading - attention
    assert decode(together, 1, 0).reading - attention == pytest.approx(for_one / 4)


@given(st.integers(1, 500), st.integers(0, 100_000))
def test_more_sequences_and_longer_ones_never_take_less_time(sequences: int, context: int) -> None:
    found = ENGINES["tp4"]
    assert decode(found, sequences + 1, context).total >= decode(found, sequences, context).total
    assert decode(found, sequences, context + 1).total >= decode(found, sequences, context).total


ENGINES = {"tp4": engine("deepseek-v2-lite", "tp4", speed=link_speed(parse_link_class("PHB"), H200))}
