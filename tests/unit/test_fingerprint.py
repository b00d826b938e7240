from __future__ import annotations

import pytest

from pytest_gpulayout.fingerprint import Fingerprint, parse_fingerprint
from pytest_gpulayout.layout import parse_layout


@pytest.mark.parametrize(
    ("text", "version", "layout", "config_hash"),
    [
        ("vllm-0.32.0-0a1b2c3d", "0.32.0", "tp1", "0a1b2c3d"),
        ("vllm-0.32.0-tp2-0a1b2c3d", "0.32.0", "tp2", "0a1b2c3d"),
        ("vllm-0.32.0-tp16-0a1b2c3d", "0.32.0", "tp16", "0a1b2c3d"),
        ("vllm-0.32.0-pp2-0a1b2c3d", "0.32.0", "pp2", "0a1b2c3d"),
        ("vllm-0.32.0-tp2-pp2-dp4-ep-0a1b2c3d", "0.32.0", "dp4tp2pp2ep", "0a1b2c3d"),
        ("vllm-0.32.0-ep-0a1b2c3d", "0.32.0", "tp1ep", "0a1b2c3d"),
        ("vllm-0.33.0rc1.dev5+g1a2b3c4d5.cpu-tp2-0a1b2c3d", "0.33.0rc1.dev5+g1a2b3c4d5.cpu", "tp2", "0a1b2c3d"),
        ("vllm-0.32.0-local-1-tp2-0a1b2c3d", "0.32.0-local-1", "tp2", "0a1b2c3d"),
        ("vllm-0.32.0-tp2-nohash", "0.32.0", "tp2", "nohash"),
    ],
)
def test_reads_vllm_s_form(text: str, version: str, layout: str, config_hash: str) -> None:
    wanted = parse_layout(layout)
    fingerprint = Fingerprint(version, wanted.tp, wanted.pp, wanted.dp, ep=wanted.ep, config_hash=config_hash)
    assert parse_fingerprint(text) == fingerprint
    assert fingerprint.contradiction(wanted) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fp_44709d6fcb",
        "vllm",
        "vllm-0.32.0",
        "vllm-0.32.0-tp2",
        "vllm-0.32.0-tp2-0A1B2C3D",
        "vllm-0.32.0-tp2-0a1b2c3d\n",
        " vllm-0.32.0-tp2-0a1b2c3d",
        "sglang-0.5.0-tp2-0a1b2c3d",
    ],
)
def test_other_servers_say_nothing(text: str) -> None:
    assert parse_fingerprint(text) is None


@pytest.mark.parametrize(
    ("told", "wanted", "contradiction"),
    [
        ("-tp2", "tp2", None),
        ("-tp2", "tp2x2@2", None),
        ("-tp4", "tp4dcp2pcp2", None),
        ("", "tp2", "the server says it is tp1, tp2 was asked for"),
        ("-tp2", "tp1", "the server says it is tp2, tp1 was asked for"),
        ("-tp2-pp2", "tp4", "the server says it is tp2pp2, tp4 was asked for"),
        ("-tp2-dp2", "dp2tp2ep", "the server says it is dp2tp2, dp2tp2ep was asked for"),
    ],
)
def test_contradiction(told: str, wanted: str, contradiction: str | None) -> None:
    fingerprint = parse_fingerprint(f"vllm-0.32.0{told}-0a1b2c3d")
    assert fingerprint is not None
    assert fingerprint.contradiction(parse_layout(wanted)) == contradiction
