"""What of a model limits its layouts, read from the config.json that is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.adapters.model_facts import sizes_of
from pytest_gpulayout.gate import ModelSizes


@pytest.mark.parametrize(
    ("config", "layers", "experts"),
    [
        ({"num_hidden_layers": 28}, 28, 0),
        ({"num_hidden_layers": 48, "num_experts": 128}, 48, 128),
        ({"num_hidden_layers": 61, "n_routed_experts": 256}, 61, 256),
        ({"num_hidden_layers": 32, "num_local_experts": 8}, 32, 8),
        ({"n_layers": 40, "ffn_config": {"moe_num_experts": 16}}, None, 16),
        ({"text_config": {"num_hidden_layers": 36, "num_experts": 64}, "vision_config": {"depth": 27}}, 36, 64),
        ({"num_hidden_layers": 54, "moe_num_experts": [64, 64]}, 54, 64),
        ({"num_hidden_layers": 52, "num_experts": None}, 52, 0),
        ({"num_hidden_layers": 52, "block_configs": [{"block_type": "moe"}]}, 52, None),
        ({"num_hidden_layers": 2, "num_experts": "many"}, 2, None),
    ],
)
def test_sizes(tmp_path: Path, config: dict[str, Any], layers: int | None, experts: int | None) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert sizes_of(str(tmp_path), ()) == ModelSizes(layers, experts, str(file))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--hf-overrides", '{"num_hidden_layers": 4}'),
        ("--hf_overrides.num_hidden_layers=4",),
        ("--hf-config-path", "elsewhere"),
        ("--config=server.yaml",),
    ],
)
def test_arguments_that_change_the_config_leave_it_open(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    assert sizes_of(str(tmp_path), arguments) == ModelSizes()


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_config_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert sizes_of(str(tmp_path), ()) == ModelSizes()


def test_model_that_is_not_at_hand(tmp_path: Path) -> None:
    assert sizes_of(str(tmp_path), ()) == sizes_of("nobody/has-this", ()) == ModelSizes()
