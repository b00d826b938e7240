from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_gpulayout.errors import ServerStartFailed, UnsupportedLayoutError
from pytest_gpulayout.gate import place_layout
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_requirement
from pytest_gpulayout.proofs import (
    NOT_KNOWN_HERE,
    Sight,
    address_of,
    confirm_configuration,
    confirm_layout,
    identity_of_attached,
    remarks_on,
    require_one_server,
    statements_of,
    unknown_topology,
    utc_text,
)
from pytest_gpulayout.server_info import ServerInfo
from pytest_gpulayout.testing import FakeTopologySource
from tests.support.measurements import identity

URL = "http://vllm.default.svc:8000"
TP2 = parse_layout("tp2")
FAR = Sight(url=URL, layout=TP2, platform="cuda", fingerprint="vllm-0.32.0-tp2-abcdef12", version="0.32.0")
HERE = replace(FAR, topology="NVML", rank_pids={0: 11, 1: 12}, sees_devices=True)


def missing(sight: Sight) -> list[str]:
    return [statement.what for statement in statements_of(sight) if not statement.is_proved]


# -- what is listed --------------------------------------------------------------------------------------------------


def test_of_a_server_elsewhere_only_its_layout_is_proved() -> None:
    proved = [str(statement) for statement in statements_of(FAR) if statement.is_proved]

    assert proved == ["its layout (system_fingerprint vllm-0.32.0-tp2-abcdef12)"]
    assert missing(FAR) == [
        "that one server alone answers there",
        "its topology",
        "that it runs on GPUs, on which of them, and who else is there",
        "how its devices fare under load: clocks, heat, other work",
        "the revision and dtype of its model",
        "its arguments",
        "what its log tells: compilations while it is measured, backends of its all-reduce",
        "that a fresh start of it is as fast",
    ]


def test_of_a_server_here_its_processes_and_devices_are_proved_too() -> None:
    texts = [str(statement) for statement in statements_of(HERE) if statement.is_proved]

    assert "that it has 2 ranks and no more (process table: rank 0 is pid 11, rank 1 is pid 12)" in texts
    assert "its topology (NVML)" in texts
    assert set(missing(FAR)) - set(missing(HERE)) == {
        "its topology",
        "that it runs on GPUs, on which of them, and who else is there",
        "how its devices fare under load: clocks, heat, other work",
    }


@pytest.mark.parametrize(
    ("sight", "what"),
    [
        (replace(FAR, layout=parse_layout("tp1")), "that it has 1 rank and no more"),
        (replace(FAR, has_nccl_logs=True), "that the NCCL logs are of this server and of no other"),
        (replace(FAR, layout=parse_layout("tp2@2")), "that it spans 2 nodes"),
        (
            replace(FAR, layout=parse_layout("dp2")),
            "that its engines do not talk, as those of a model without experts",
        ),
        (replace(FAR, platform="cpu"), "that it runs on cores, on which of them, and who else is there"),
    ],
)
def test_what_a_layout_or_a_log_leaves_open_is_listed(sight: Sight, what: str) -> None:
    assert what in missing(sight)
    assert what not in missing(FAR)


def test_a_configuration_that_is_told_settles_how_many_ranks_there_are() -> None:
    tp1 = replace(FAR, layout=parse_layout("tp1"), info=ServerInfo(parse_layout("tp1"), moe=False))

    assert "that it has 1 rank and no more" not in missing(tp1)
    assert str(statements_of(tp1)[0]).endswith("abcdef12, and /server_info)")


def test_the_start_that_its_counters_tell_proves_that_it_is_one() -> None:
    told = replace(FAR, started_s=1_763_700_000.0)

    assert "that one server alone answers there" not in missing(told)
    assert utc_text(1_763_700_000.0) == "2025-11-21T04:40:00Z"
    assert any("/metrics: one process, started 2025-11-21T04:40:00Z" in str(one) for one in statements_of(told))


def test_a_verdict_says_what_it_does_not_rest_on_and_that_unknown_hardware_may_change() -> None:
    open_ones, one_start, hardware = remarks_on(FAR)

    assert open_ones.startswith("not proved of the server, which somebody else runs: that one server alone answers")
    assert "its arguments; what its log tells" in open_ones
    assert "one server start, which is not repeated" in one_start
    assert "whatever answers at vllm.default.svc:8000; record it on its host: gpulayout topo --json" in hardware
    assert len(remarks_on(HERE)) == 2


# -- the layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tp2", "dp2tp2ep", "tp8pp2@2", "tp4dcp2"])
def test_layouts_of_one_server_may_be_attached_to(layout: str) -> None:
    require_one_server(parse_layout(layout))


def test_replicas_are_refused_with_the_layout_of_one() -> None:
    with pytest.raises(UnsupportedLayoutError, match=r"found tp2x4\n.*\n.*one of them, .* --gpu-layout=tp2$"):
        require_one_server(parse_layout("tp2x4"))


def test_a_fingerprint_of_the_layout_confirms_it() -> None:
    assert confirm_layout("vllm-0.32.0-tp2-abcdef12", TP2, URL).version == "0.32.0"
    assert confirm_layout("vllm-0.32.0-tp8-pp2-abcdef12", parse_layout("tp8pp2@2"), URL).pp == 2


@pytest.mark.parametrize("text", ["None", "fp_44709d6fcb", "<html>", ""])
def test_a_server_that_does_not_tell_its_layout_is_no_evidence(text: str) -> None:
    with pytest.raises(ServerStartFailed) as error:
        confirm_layout(text, TP2, URL)

    first, second, third = str(error.value).split("\n")
    assert first.endswith(f"system_fingerprint is {text!r}, vllm-<version>-tp2-<hash> was expected")
    assert second == f"  where: system_fingerprint of POST {URL}/v1/completions"
    assert "without --fingerprint-mode" in third


def test_another_layout_is_named_with_what_to_ask_for() -> None:
    with pytest.raises(ServerStartFailed, match=r"it is tp4, tp2 was asked for .*\n.*\n  ask .* --gpu-layout=tp4; "):
        confirm_layout("vllm-0.32.0-tp4-abcdef12", TP2, URL)
    with pytest.raises(ServerStartFailed, match="with --fingerprint-mode=hash it tells no sizes"):
        confirm_layout("vllm-0.32.0-abcdef12", TP2, URL)


def test_what_no_fingerprint_tells_the_configuration_must() -> None:
    dcp = parse_layout("tp4dcp2")

    confirm_configuration(ServerInfo(dcp), dcp, URL)
    confirm_configuration(None, TP2, URL)
    with pytest.raises(ServerStartFailed, match=r"neither pcp nor dcp.*\n.*server_info.*\n.*VLLM_SERVER_DEV_MODE=1"):
        confirm_configuration(None, dcp, URL)
    with pytest.raises(ServerStartFailed, match="the server says it is tp2, tp1 was asked for"):
        confirm_configuration(ServerInfo(TP2), parse_layout("tp1"), URL)


# -- the hardware ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "address"),
    [
        (URL, "vllm.default.svc:8000"),
        ("https://gateway/qwen/", "gateway/qwen"),
        ("http://me:secret@[::1]:80", "[::1]:80"),
    ],
)
def test_addresses_tell_servers_apart_and_hold_no_secret(url: str, address: str) -> None:
    assert address_of(url) == address


def test_unknown_devices_are_as_many_as_the_layout_needs_and_have_no_links() -> None:
    topology = unknown_topology(parse_layout("tp8pp2@2"), "cuda", URL)

    assert [device.name for device in topology.devices] == ["unknown GPU at vllm.default.svc:8000"] * 8
    assert (topology.links, topology.source, topology.recorded) == ({}, NOT_KNOWN_HERE, False)


def test_unknown_hardware_never_matches_what_was_looked_at_nor_another_address() -> None:
    here = identity()
    there = [
        identity_of_attached(
            replace(here, key=replace(here.key, hardware={**here.key.hardware, "device": placed.devices[0].name})),
            replace(FAR, url=url),
            placed.topology,
        )
        for url in (URL, "http://other:8000")
        for placed in [place_layout(unknown_topology(TP2, "cuda", url), TP2, ("0", "1"), parse_requirement("any"))]
    ]

    assert any(text.startswith("hardware.device: ") for text in there[0].key.differences(here.key))
    assert any(text.startswith("hardware.device: ") for text in there[0].key.differences(there[1].key))
    assert there[0].key.differences(there[0].key) == ()
    assert there[0].key.path != there[1].key.path


def test_facts_of_this_host_and_this_python_are_not_taken_for_those_of_a_server_elsewhere() -> None:
    mine = replace(
        identity(),
        epoch={"driver": "570.1", "kernel": "6.8", "nccl": "2.27", "cuda": "13.0"},
        sut={"vllm": "0.32.0", "torch": "2.13.0", "arguments": ""},
        covariates={"host": "ci-1", "boot": "ab", "commit": "c0ffee"},
    )
    topology = FakeTopologySource(gpus=2).probe()

    found = identity_of_attached(mine, replace(FAR, started_s=1_763_700_000.0, topology="x.json"), topology)

    assert found.sut == {"vllm": "0.32.0"}
    assert found.epoch == {"driver": "580.65.06", "cuda": "13.0", "nccl": None, "kernel": None}
    assert found.covariates == {
        "commit": "c0ffee",
        "server": "vllm.default.svc:8000",
        "server started": "2025-11-21T04:40:00Z",
    }
    assert (found.key.model["revision"], found.key.model["dtype"]) == ("", "")


def test_of_a_server_here_the_host_is_its_own() -> None:
    epoch = {"driver": "570.1", "kernel": "6.8", "nccl": "2.27"}
    mine = replace(identity(), epoch=epoch, covariates={"host": "ci-1"})

    found = identity_of_attached(mine, HERE, FakeTopologySource(gpus=2).probe())

    assert found.epoch == {"driver": "570.1", "kernel": "6.8", "nccl": None}
    assert found.covariates == {"host": "ci-1", "server": "vllm.default.svc:8000"}


def test_on_the_cpu_platform_the_cpu_of_this_host_is_not_the_server_s() -> None:
    hardware = {"platform": "cpu", "device": "AMD EPYC", "count": 64, "memory_gib": None, "power_limit_w": None}
    mine = identity(hardware=hardware)

    found = identity_of_attached(mine, replace(FAR, platform="cpu"), unknown_topology(TP2, "cpu", URL))

    assert (found.key.hardware["device"], found.key.hardware["count"]) == ("unknown CPU at vllm.default.svc:8000", 2)


def test_a_model_in_a_folder_of_another_host_is_named_without_its_path() -> None:
    mine = identity()
    for name, told in (("/models/qwen/", "qwen"), ("org/tiny", "org/tiny"), ("/", "/")):
        model = {**mine.key.model, "name": name}
        asked = replace(mine, key=replace(mine.key, model=model))
        found = identity_of_attached(asked, FAR, FakeTopologySource().probe())
        assert found.key.model["name"] == told
