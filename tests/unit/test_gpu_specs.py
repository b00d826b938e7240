from __future__ import annotations

import pytest

from pytest_gpulayout.errors import UnknownGpuError
from pytest_gpulayout.gpu_specs import GPUS, GpuSpec, find_gpu


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("H200", "H200"),
        ("h200", "H200"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200-NVL"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("rtx 4090", "RTX-4090"),
        ("rtx_6000_ada", "RTX-6000-Ada"),
        ("Tesla T4", "T4"),
    ],
)
def test_a_gpu_is_found_by_its_name(text: str, name: str) -> None:
    assert find_gpu(text).name == name


def test_an_unknown_gpu_is_no_guess() -> None:
    with pytest.raises(UnknownGpuError) as caught:
        find_gpu("NVIDIA H2000")
    told = "a GPU whose data sheet is known was required, found 'NVIDIA H2000'\n  known are: T4,"
    assert str(caught.value).startswith(told)


def test_names_are_unique() -> None:
    names = [name.casefold() for spec in GPUS for name in (spec.name, *spec.driver_names)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("spec", GPUS, ids=lambda spec: spec.name)
def test_figures_make_sense(spec: GpuSpec) -> None:
    assert 15 * 2**30 <= spec.memory_bytes <= 300 * 2**30
    assert 300 <= spec.memory_gb_per_s <= 8000
    # fp8 doubles 16 bits on every card that has it, and only cards from Ada and Hopper on have it.
    assert (spec.fp8_tflops is not None) == (float(spec.capability) >= 8.9)
    assert spec.fp8_tflops is None or spec.fp8_tflops / spec.bf16_tflops == pytest.approx(2, rel=0.02)
    # A step that reads all memory once takes 15 to 120 ms: more or less is a slip of the pen.
    assert 0.015 < spec.memory_bytes / (spec.memory_gb_per_s * 1e9) < 0.12
    assert spec.nvlinks or not spec.switched
    assert spec.peer_access == ("GeForce" not in spec.driver_names[0])
