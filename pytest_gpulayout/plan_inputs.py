"""What a plan is made from: a model, a machine, what is asked of the server, and what it is started with.

Knows the defaults of vLLM's server (``engine/arg_utils.py``, ``get_batch_defaults``), and machines by data sheet.
Leaves what follows from all of it to :mod:`~pytest_gpulayout.planning`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from pytest_gpulayout.errors import PlanError
from pytest_gpulayout.gpu_specs import GpuSpec, find_gpu
from pytest_gpulayout.link_speeds import DEFAULT_NETWORK, Network
from pytest_gpulayout.links import LinkClass
from pytest_gpulayout.model_memory import DEFAULT_UTILIZATION, StoredTensor, stored_tensors
from pytest_gpulayout.model_quantization import Quantization
from pytest_gpulayout.model_shape import DTYPE_BYTES, ModelShape
from pytest_gpulayout.model_traffic import ALL_TO_ALL
from pytest_gpulayout.topology import Device, Topology

DATA_SHEET = "data sheet"
"""What the topology of a machine that nobody looked at names as its source."""


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model, with all its tensors as they are stored.

    :param dtype: of activations, and of weights that are not quantised. :param cache_bits: of a cached element.
    """

    shape: ModelShape
    quantization: Quantization | None
    dtype: str
    cache_bits: int
    stored: tuple[StoredTensor, ...]


def planned_model(
    shape: ModelShape, quantization: Quantization | None, *, dtype: str = "auto", cache_dtype: str = "auto"
) -> PlannedModel:
    """Return a model as vLLM would load it: ``auto`` makes bfloat16 of float32 weights, and keeps the others.

    :param dtype: as ``--dtype``. :param cache_dtype: ``auto`` or one that begins with ``fp8``.
    """
    kept = shape.dtype if DTYPE_BYTES[shape.dtype] == 2 else "bfloat16"
    chosen = kept if dtype == "auto" else dtype
    made_for = quantization.kv_bits if quantization is not None else None
    bits = 8 if cache_dtype.startswith("fp8") else made_for or 8 * DTYPE_BYTES[chosen]
    return PlannedModel(shape, quantization, chosen, bits, stored_tensors(shape, quantization, chosen))


@dataclass(frozen=True, slots=True)
class Machine:
    """Some GPUs of one kind. :param network: what each of them has to GPUs of other nodes."""

    topology: Topology
    spec: GpuSpec
    network: Network = DEFAULT_NETWORK

    @property
    def memory_bytes(self) -> int:
        """Of the GPU that has the least; by the data sheet where the topology does not say."""
        return min(device.memory_bytes or self.spec.memory_bytes for device in self.topology.usable)


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of the server. :param concurrency: requests at once. All requests are alike."""

    input_tokens: int = 1000
    output_tokens: int = 500
    concurrency: int = 100

    @property
    def tokens(self) -> int:
        """Of one request, at its end."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the server is started with.

    :param utilization: ``--gpu-memory-utilization``. :param step_tokens: ``--max-num-batched-tokens``, ``None`` for
        vLLM's default. :param sequences: ``--max-num-seqs``. :param reserve_bytes: for activations, graphs and
        libraries, ``None`` for an estimate. :param to_experts: ``--all2all-backend``.
    """

    utilization: float = DEFAULT_UTILIZATION
    step_tokens: int | None = None
    sequences: int | None = None
    reserve_bytes: int | None = None
    to_experts: str = ALL_TO_ALL[0]

    def limits(self, machine: Machine) -> tuple[int, int]:
        """Return tokens of a step and sequences, with the defaults of vLLM's server (``engine/arg_utils.py``)."""
        large = machine.memory_bytes >= 70 * 2**30 and "A100" not in machine.spec.name
        tokens = (16_384 if machine.memory_bytes >= 160 * 2**30 else 8192) if large else 2048
        return self.step_tokens or tokens, self.sequences or (1024 if large else 256)


def uniform_topology(spec: GpuSpec, count: int, link: LinkClass | None) -> Topology:
    """Return a machine of equal GPUs that are linked alike.

    :param link: ``None`` for the usual one: NVLink over NVSwitch where the GPU is made for it, else PCIe (``PHB``).
    """
    usual = LinkClass("NV", spec.nvlinks) if spec.switched else LinkClass("PHB")
    devices = tuple(Device(index, name=spec.name, memory_bytes=spec.memory_bytes) for index in range(count))
    links = dict.fromkeys(combinations(range(count), 2), link or usual)
    return Topology(devices, links, source=DATA_SHEET, recorded=True)


def machine_of(topology: Topology, gpu: GpuSpec | None, network: Network) -> Machine:
    """Return a machine with the data sheet of its GPUs.

    :param gpu: what they are, where their names do not tell.
    :raises PlanError: no GPU, or GPUs of several kinds. :raises UnknownGpuError: of a kind that is not in the table.
    """
    names = {device.name for device in topology.usable}
    if not names:
        raise PlanError(
            f"at least one GPU that can be used was required, found none\n  in {topology.source}\n"
            "  name GPUs by their data sheet: --gpu NAME:COUNT"
        )
    if gpu is not None:
        return Machine(topology, gpu, network)
    if len(names) > 1 or None in names:
        found = "no names" if None in names else ", ".join(sorted(map(str, names)))
        raise PlanError(
            f"GPUs of one kind, by name, were required, found {found}\n  in {topology.source}\n"
            "  say what they are: --gpu NAME"
        )
    return Machine(topology, find_gpu(str(names.pop())), network)
