"""What GPUs can do, by their data sheets: memory, memory bandwidth, arithmetic, NVLinks.

Figures are of the maker's data sheets: peaks that no program reaches. Arithmetic is dense (sheets often print twice
as much, "with sparsity"), with accumulation in float32. Memory is what ``nvidia-smi`` reports as total, which is less
than the name says where ECC or firmware takes its part (modal-labs/modal-client#2797 for many, pytorch/ao#4002
for B200). A topology that knows a device's memory counts more than this table.

Sources, by series: NVIDIA's data sheets of T4, V100, A10, A10G, A30, A40, A100, L4, L40, L40S, H100, H200, Blackwell
(B200: 7.7 TB/s, as ai-dynamo/aiconfigurator#1246 corrected it), RTX A6000, RTX 6000 Ada, RTX PRO 6000 Blackwell; the
architecture papers of GA102, AD102 and RTX Blackwell for GeForce; of H800, H20 and A800 what sellers published.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pytest_gpulayout.errors import UnknownGpuError


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One model of GPU.

    :param name: short, as ``--gpu`` takes it. :param memory_mib: total, as the driver reports it.
    :param memory_gb_per_s: read bandwidth. :param bf16_tflops: dense. :param fp8_tflops: dense, ``None`` without fp8.
    :param capability: CUDA's compute capability. :param pcie: generation of its 16 lanes.
    :param nvlinks: of one GPU, 0 for none. :param switched: whether they end at an NVSwitch in the usual machine.
    :param peer_access: whether its driver allows peer access over PCIe; GeForce's does not.
    :param driver_names: what NVML calls it.
    """

    name: str
    memory_mib: int
    memory_gb_per_s: float
    bf16_tflops: float
    fp8_tflops: float | None
    capability: str
    pcie: int
    nvlinks: int = 0
    switched: bool = False
    peer_access: bool = True
    driver_names: tuple[str, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """Total memory."""
        return self.memory_mib * 2**20


GPUS = (
    GpuSpec("T4", 15_360, 320, 65, None, "7.5", 3, driver_names=("Tesla T4",)),
    GpuSpec("V100-SXM2-32GB", 32_768, 900, 125, None, "7.0", 3, 6, driver_names=("Tesla V100-SXM2-32GB",)),
    GpuSpec("A10", 23_028, 600, 125, None, "8.6", 4, driver_names=("NVIDIA A10",)),
    GpuSpec("A10G", 23_028, 600, 70, None, "8.6", 4, driver_names=("NVIDIA A10G",)),
    GpuSpec("A30", 24_576, 933, 165, None, "8.0", 4, 4, driver_names=("NVIDIA A30",)),
    GpuSpec("A40", 46_068, 696, 149.7, None, "8.6", 4, 4, driver_names=("NVIDIA A40",)),
    GpuSpec("A100-SXM-40GB", 40_960, 1555, 312, None, "8.0", 4, 12, True, driver_names=("NVIDIA A100-SXM4-40GB",)),
    GpuSpec("A100-SXM", 81_920, 2039, 312, None, "8.0", 4, 12, True, driver_names=("NVIDIA A100-SXM4-80GB",)),
    GpuSpec("A100-PCIe-40GB", 40_960, 1555, 312, None, "8.0", 4, 12, driver_names=("NVIDIA A100-PCIE-40GB",)),
    GpuSpec("A100-PCIe", 81_920, 1935, 312, None, "8.0", 4, 12, driver_names=("NVIDIA A100 80GB PCIe",)),
    GpuSpec("A800-SXM", 81_920, 2039, 312, None, "8.0", 4, 8, True, driver_names=("NVIDIA A800-SXM4-80GB",)),
    GpuSpec("L4", 23_034, 300, 121, 242, "8.9", 4, driver_names=("NVIDIA L4",)),
    GpuSpec("L40", 46_068, 864, 181, 362, "8.9", 4, driver_names=("NVIDIA L40",)),
    GpuSpec("L40S", 46_068, 864, 362, 733, "8.9", 4, driver_names=("NVIDIA L40S",)),
    GpuSpec("H100", 81_559, 3350, 989, 1979, "9.0", 5, 18, True, driver_names=("NVIDIA H100 80GB HBM3",)),
    GpuSpec("H100-PCIe", 81_559, 2000, 756, 1513, "9.0", 5, 12, driver_names=("NVIDIA H100 PCIe",)),
    GpuSpec("H100-NVL", 95_830, 3900, 835, 1671, "9.0", 5, 12, driver_names=("NVIDIA H100 NVL",)),
    GpuSpec("H800", 81_559, 3350, 989, 1979, "9.0", 5, 8, True, driver_names=("NVIDIA H800",)),
    GpuSpec("H20", 97_871, 4000, 148, 296, "9.0", 5, 18, True, driver_names=("NVIDIA H20",)),
    GpuSpec("H200", 143_771, 4800, 989, 1979, "9.0", 5, 18, True, driver_names=("NVIDIA H200",)),
    GpuSpec("H200-NVL", 143_771, 4800, 835, 1671, "9.0", 5, 18, driver_names=("NVIDIA H200 NVL",)),
    GpuSpec("B200", 182_630, 7700, 2250, 4500, "10.0", 5, 18, True, driver_names=("NVIDIA B200",)),
    GpuSpec("B300", 275_040, 7750, 2250, 4500, "10.3", 5, 18, True, driver_names=("NVIDIA B300 SXM6 AC",)),
    GpuSpec("RTX-A6000", 49_140, 768, 154.8, None, "8.6", 4, 4, driver_names=("NVIDIA RTX A6000",)),
    GpuSpec("RTX-6000-Ada", 49_140, 960, 364.2, 728.5, "8.9", 4, driver_names=("NVIDIA RTX 6000 Ada Generation",)),
    GpuSpec(
        *("RTX-PRO-6000", 97_887, 1792, 503.8, 1007.6, "12.0", 5),
        driver_names=(
            "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
            "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
            "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        ),
    ),
    GpuSpec(
        *("RTX-3090", 24_576, 936, 71, None, "8.6", 4, 4),
        peer_access=False,
        driver_names=("NVIDIA GeForce RTX 3090",),
    ),
    GpuSpec(
        *("RTX-4090", 24_564, 1008, 165.2, 330.3, "8.9", 4),
        peer_access=False,
        driver_names=("NVIDIA GeForce RTX 4090",),
    ),
    GpuSpec(
        *("RTX-5090", 32_607, 1792, 209.5, 419, "12.0", 5),
        peer_access=False,
        driver_names=("NVIDIA GeForce RTX 5090",),
    ),
)
"""The usual cards of data centres and workstations, older ones first."""


def find_gpu(text: str) -> GpuSpec:
    """Return the GPU of this name, short or as the driver has it; case, blanks and dashes do not matter.

    :raises UnknownGpuError: it is not in the table.
    """
    wanted = _plain(text)
    for spec in GPUS:
        if wanted in {_plain(name) for name in (spec.name, *spec.driver_names)}:
            return spec
    raise UnknownGpuError(
        f"a GPU whose data sheet is known was required, found {text!r}\n"
        f"  known are: {', '.join(spec.name for spec in GPUS)}\n"
        "  take the nearest one: --gpu NAME:COUNT"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.casefold().removeprefix("nvidia "))
