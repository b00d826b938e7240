from __future__ import annotations

from typing import Any

import pytest

from pytest_gpulayout.layout import Layout, parse_layout
from pytest_gpulayout.server_info import ServerInfo, parse_server_info

# Fields of ParallelConfig (vllm/config/parallel.py, 0.32) as show_server_info dumps them
# (vllm/entrypoints/serve/dev/server_info/api_router.py), those that say nothing of the layout left out.
TP4_DCP2 = {
    "pipeline_parallel_size": 1,
    "tensor_parallel_size": 4,
    "prefill_context_parallel_size": 1,
    "data_parallel_size": 1,
    "data_parallel_size_local": 1,
    "data_parallel_rank": 0,
    "is_moe_model": False,
    "enable_expert_parallel": False,
    "all2all_backend": "allgather_reducescatter",
    "disable_custom_all_reduce": False,
    "distributed_executor_backend": "mp",
    "nnodes": 1,
    "world_size": 4,
    "decode_context_parallel_size": 2,
}


def document(**changed: Any) -> dict[str, Any]:
    return {
        "vllm_config": {"model_config": {"model": "m"}, "parallel_config": {**TP4_DCP2, **changed}},
        "vllm_env": {"VLLM_SERVER_DEV_MODE": True},
        "system_env": {},
    }


def test_reads_all_factors() -> None:
    info = parse_server_info(document())
    assert info == ServerInfo(Layout(tp=4, dcp=2), moe=False, executor="mp", all2all="allgather_reducescatter")
    more = document(
        tensor_parallel_size=2,
        pipeline_parallel_size=3,
        data_parallel_size=4,
        prefill_context_parallel_size=5,
        enable_expert_parallel=True,
        is_moe_model=True,
    )
    info = parse_server_info(more)
    assert info is not None
    assert (str(info.layout), info.moe) == ("dp4tp2pp3pcp5dcp2ep", True)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        "text",
        {},
        {"vllm_config": "ParallelConfig(...)"},  # config_format=text
        {"vllm_config": {"parallel_config": {"tensor_parallel_size": 2}}},
        document(tensor_parallel_size="2"),
        document(data_parallel_size=True),
        document(pipeline_parallel_size=0),
    ],
)
def test_other_answers_say_nothing(answer: object) -> None:
    assert parse_server_info(answer) is None


def test_version_that_does_not_know_a_factor() -> None:
    config = {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "data_parallel_size": 1}
    info = parse_server_info({"vllm_config": {"parallel_config": config}})
    assert info == ServerInfo(Layout(tp=2))
    assert info.contradiction(parse_layout("tp2pcp2")) == "the server says it is tp2, tp2pcp2 was asked for"


@pytest.mark.parametrize(
    ("wanted", "contradiction"),
    [
        ("tp4dcp2", None),
        ("tp4dcp2x2@2", None),
        ("tp4", "the server says it is tp4dcp2, tp4 was asked for"),
        ("tp4dcp4", "the server says it is tp4dcp2, tp4dcp4 was asked for"),
        ("tp4dcp2ep", "the server says it is tp4dcp2, tp4dcp2ep was asked for"),
        ("tp2pcp2dcp2", "the server says it is tp4dcp2, tp2pcp2dcp2 was asked for"),
    ],
)
def test_contradiction(wanted: str, contradiction: str | None) -> None:
    info = parse_server_info(document())
    assert info is not None
    assert info.contradiction(parse_layout(wanted)) == contradiction
