from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from pytest_gpulayout.baseline import BaselineKey
from pytest_gpulayout.baseline_text import baseline_from_text, baseline_to_text
from pytest_gpulayout.judging import load_baseline
from pytest_gpulayout.siblings import nearest_key, same_but_links
from pytest_gpulayout.testing import InMemoryBaselines
from tests.support.measurements import baseline_of, key

MODEL = key().model
RING = ["NV18", "PHB", "NV18", "NV18", "PHB", "NV18"]  # of tp4: 0-1, 0-2, 0-3, 1-2, 1-3, 2-3


def tp4(*links: str, **hardware: Any) -> BaselineKey:
    return key(layout="tp4", hardware={"count": 4, "links": list(links), **hardware})


@pytest.mark.parametrize(
    ("stored", "now", "told"),
    [
        (key(), key(), []),
        (key(layout="tp4"), key(), ["layout: stored 'tp4', now 'tp2'"]),
        (key(), key(hardware={"power_limit_w": 500}), ["hardware.power_limit_w: stored 700, now 500"]),
        (key(), key(hardware={"power_limit_w": None}), ["hardware.power_limit_w: stored 700, now unknown"]),
        (key(hardware={"power_limit_w": None}), key(), []),
        (key(), key(model={**MODEL, "dtype": "float16"}), ["model.dtype: stored 'bfloat16', now 'float16'"]),
        (key(), key(model={**MODEL, "dtype": ""}), ["model.dtype: stored 'bfloat16', now unknown"]),
        (key(model={**MODEL, "dtype": ""}), key(), []),
        (key(model={**MODEL, "revision": ""}), key(model={**MODEL, "revision": "a1"}), []),
        (
            key(model={**MODEL, "revision": "a1"}),
            key(model={**MODEL, "revision": ""}),
            ["model.revision: stored 'a1', now unknown"],
        ),
        (
            key(),
            key(model={**MODEL, "arguments": "--seed 1"}),
            ["model.arguments: stored '', now '--seed 1'"],
        ),
        (key(), key(hardware={"memory_gib": 140}), []),
        (key(), key(hardware={"memory_gib": 80}), ["hardware.memory_gib: stored 141, now 80"]),
        (key(), key(hardware={"memory_gib": None}), ["hardware.memory_gib: stored 141, now unknown"]),
        (key(hardware={"memory_gib": None}), key(), ["hardware.memory_gib: stored unknown, now 141"]),
        (key(), key(hardware={"links": ["SYS"]}), ["hardware.links: stored 0-1 NV18, now 0-1 SYS"]),
        (key(protocol=1), key(protocol=2), ["protocol: stored 1, now 2"]),
    ],
)
def test_a_difference_names_the_field_and_both_values(stored: BaselineKey, now: BaselineKey, told: list[str]) -> None:
    assert list(now.differences(stored)) == told


def test_other_links_are_named_by_pair() -> None:
    """As many links of each class, but between other ranks: a bridge was moved."""
    moved = ["NV18", "NV18", "PHB", "PHB", "NV18", "NV18"]
    assert sorted(moved) == sorted(RING)
    assert tp4(*moved).differences(tp4(*RING)) == (
        "hardware.links: stored 0-2 PHB, 0-3 NV18, 1-2 NV18, 1-3 PHB, now 0-2 NV18, 0-3 PHB, 1-2 PHB, 1-3 NV18",
    )


def test_many_other_links_are_counted() -> None:
    stored, now = (key(layout="tp8", hardware={"links": [link] * 28}) for link in ("NV18", "SYS"))
    [told] = now.differences(stored)
    assert told.startswith("hardware.links: stored 0-1 NV18, 0-2 NV18, ")
    assert told.endswith("0-6 SYS, and 22 pairs more")


def test_links_of_another_layout_are_compared_where_both_have_them() -> None:
    stored = key(hardware={"count": 4})
    assert tp4(*RING).differences(stored) == ("layout: stored 'tp2', now 'tp4'",)
    assert tp4("SYS", *RING[1:]).differences(stored)[1] == "hardware.links: stored 0-1 NV18, now 0-1 SYS"


@pytest.mark.parametrize(("links", "told"), [([], "now 0-1 none"), (["NV18", "NV18"], "now 0-1 none, link 1 NV18")])
def test_links_that_do_not_fit_their_layout_are_other_ones(links: list[str], told: str) -> None:
    [difference] = key(hardware={"links": links}).differences(key())
    assert told in difference


# -- documents of the first version --------------------------------------------------------------------------------


def first_version(stored: BaselineKey, *, wiring: dict[str, str] | None) -> str:
    """The document as the first version wrote it: no dtype, no power limit, links sorted."""
    document = json.loads(baseline_to_text(baseline_of([1.0, 1.0])))
    document["schema_version"] = 1
    document["key"] = asdict(stored)
    del document["key"]["model"]["dtype"], document["key"]["hardware"]["power_limit_w"]
    document["key"]["model"]["revision"] = "default"
    document["key"]["hardware"]["links"].sort()
    if wiring is not None:
        document["sessions"][-1]["topology"] = {"links": wiring}
    return json.dumps(document)


def test_what_the_first_version_did_not_know_matches_what_is_known_now() -> None:
    old = baseline_from_text(first_version(key(), wiring=None), "old.json").key
    assert (old.model["dtype"], old.model["revision"], old.hardware["power_limit_w"]) == ("", "", None)
    known = key(model={**MODEL, "revision": "0123abcd"})
    assert known.differences(old) == ()
    assert sorted(old.differences(known)) == [
        "hardware.power_limit_w: stored 700, now unknown",
        "model.dtype: stored 'bfloat16', now unknown",
        "model.revision: stored '0123abcd', now unknown",
    ]


def test_a_baseline_of_the_first_version_is_found_where_it_is() -> None:
    store = InMemoryBaselines({key().path: first_version(key(), wiring=None)})
    baseline = load_baseline(store, key())
    assert baseline is not None
    assert baseline.key.path == key().path


def test_links_of_the_first_version_get_their_order_from_the_wiring() -> None:
    pairs = ["0-1", "0-2", "0-3", "1-2", "1-3", "2-3"]
    wiring = dict(reversed(list(zip(pairs, RING, strict=True))))
    old = baseline_from_text(first_version(tp4(*RING), wiring=wiring), "old.json").key
    assert old.hardware["links"] == RING
    assert tp4(*RING).differences(old) == ()


@pytest.mark.parametrize("wiring", [None, {"0-1": "NV18"}, {"0-1": "SYS"}])
def test_links_whose_wiring_does_not_tell_them_stay_as_they_were(wiring: dict[str, str] | None) -> None:
    old = baseline_from_text(first_version(tp4(*RING), wiring=wiring), "old.json").key
    assert old.hardware["links"] == sorted(RING)


def test_the_ranks_of_a_pair_are_numbers() -> None:
    """As text 0-10 comes before 0-2."""
    layout, count = "tp12", 12
    pairs = [f"{a}-{b}" for a in range(count) for b in range(a + 1, count)]
    links = ["NV18" if number % 3 else "SYS" for number, _ in enumerate(pairs)]
    stored = key(layout=layout, hardware={"count": count, "links": links})
    wiring = dict(sorted(zip(pairs, links, strict=True)))
    assert baseline_from_text(first_version(stored, wiring=wiring), "old.json").key.hardware["links"] == links


# -- the nearest key -----------------------------------------------------------------------------------------------


def store_of(*keys: BaselineKey) -> InMemoryBaselines:
    texts = {item.path: baseline_to_text(replace(baseline_of([1.0]), key=item)) for item in keys}
    assert len(texts) == len(keys)
    return InMemoryBaselines(texts)


def test_nothing_is_near_in_an_empty_store() -> None:
    assert nearest_key(InMemoryBaselines(), key()) is None


def test_the_nearest_key_differs_in_the_fewest_fields() -> None:
    far = key(layout="tp4", hardware={"device": "NVIDIA A100", "count": 4})
    near = key(hardware={"device": "NVIDIA H100"})
    found = nearest_key(store_of(far, near), key())
    assert found == (near.path, ("hardware.device: stored 'NVIDIA H100', now 'NVIDIA H200'",))


def test_of_two_as_near_the_one_on_the_same_hardware_is_the_nearest() -> None:
    elsewhere, another = key(hardware={"device": "A"}), key(model={**MODEL, "name": "A"})
    other_layout = key(layout="dp2")
    assert nearest_key(store_of(elsewhere, another, other_layout), key()) == (
        other_layout.path,
        ("layout: stored 'dp2', now 'tp2'",),
    )
    assert nearest_key(store_of(elsewhere, another), key()) == (
        another.path,
        ("model.name: stored 'A', now 'org/tiny'",),
    )


def test_a_file_that_was_moved_is_named_with_where_it_belongs() -> None:
    store = InMemoryBaselines({"elsewhere.json": baseline_to_text(baseline_of([1.0]))})
    assert nearest_key(store, key()) == (
        "elsewhere.json",
        (f"its place: the key is the same, move it to {key().path}",),
    )


def test_a_baseline_of_less_knowledge_is_no_sibling_of_itself() -> None:
    known_less = key(hardware={"power_limit_w": None})
    assert same_but_links(store_of(known_less), key()) is None
    other = key(hardware={"links": ["SYS"]})
    found = same_but_links(store_of(known_less, other), key())
    assert found is not None
    assert found.key == other


def test_what_was_not_known_of_a_stored_key_is_filled_in_by_what_is_measured_now() -> None:
    known = key()
    hardware = {**known.hardware, "power_limit_w": None, "memory_gib": known.hardware["memory_gib"] - 1}
    stored = replace(known, model={**known.model, "dtype": ""}, hardware=hardware)
    completed = stored.completed_by(known)
    assert (completed.model, completed.hardware["power_limit_w"]) == (known.model, 700)
    assert completed.hardware["memory_gib"] == hardware["memory_gib"], "what is known stays as it is"
    assert not known.differences(completed)
