"""Every argument list that a layout gives is accepted by the parser of the vLLM that is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pytest_gpulayout.layout import parse_layout

pytestmark = [pytest.mark.real_vllm, pytest.mark.xdist_group("real vllm")]

LAYOUTS = [
    "tp1",
    "tp2",
    "tp4pp2",
    "dp2",
    "dp2tp2ep",
    "tp4dcp2",
    "pcp2tp2",
    "tp2x2",
    "dp2tp4pp2pcp2dcp2ep",
    "tp8pp2@2",
]

SCRIPT = """
import json, sys
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:  # older releases
    from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
names = dict(tp="tensor_parallel_size", pp="pipeline_parallel_size", dp="data_parallel_size",
             pcp="prefill_context_parallel_size", dcp="decode_context_parallel_size", ep="enable_expert_parallel",
             nodes="nnodes")
for arguments in json.load(sys.stdin):
    parsed = parser.parse_args(["--model", "m", *arguments])
    print(json.dumps({short: getattr(parsed, name) for short, name in names.items()}))
"""


def test_vllms_own_parser_reads_each_layout_back() -> None:
    layouts = [parse_layout(text) for text in LAYOUTS]
    lists = [layout.engine_arguments(master_addr="127.0.0.1", master_port=29501) for layout in layouts]
    lists.append(parse_layout("tp8pp2@2").engine_arguments(node_rank=1, master_addr="127.0.0.1"))
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(lists),
        env={**os.environ, "VLLM_TARGET_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    read = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(read) == len(lists)
    for layout, parsed in zip(layouts, read, strict=False):
        expected = {name: getattr(layout, name) for name in ("tp", "pp", "dp", "pcp", "dcp", "nodes")}
        assert {name: parsed[name] for name in expected} == expected
        assert bool(parsed["ep"]) == layout.ep
