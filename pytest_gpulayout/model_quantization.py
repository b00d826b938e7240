"""How many bytes a weight takes: the ``quantization_config`` of a model, and what it leaves as it was.

Knows fp8, AWQ, GPTQ, MXFP4, compressed-tensors and ModelOpt as their configs describe them, with scales and zero
points. Embeddings, norms, biases and routers are never quantised by any of them, the head only where it is asked for.
A method that is not known, or an option of one that changes sizes in a way that is not known, is refused.

Sources: ``vllm/model_executor/layers/quantization/*.py`` (0.32: ``create_weights`` of each method) and the formats'
own documents (compressed-tensors ``config_groups``; OCP Microscaling 1.0: 32 elements share an 8-bit scale).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from pytest_gpulayout.errors import ModelConfigError

_KNOWN = ("awq", "compressed-tensors", "fp8", "gptq", "modelopt", "modelopt_fp4", "mxfp4")


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How the weights of a matrix are stored.

    :param name: such as ``"fp8, a scale for 128 x 128"``. :param bits: of one weight.
    :param scale_bytes: of one scale. :param scale_rows: outputs that share one, 0 for all.
    :param scale_columns: inputs that share one, 0 for all. :param zero_bits: of a zero point beside each scale.
    :param compute: what its matrix products run in.
    :param must_divide: whether vLLM refuses shards that cut through a scale's block.
    """

    name: str
    bits: int
    scale_bytes: int = 0
    scale_rows: int = 0
    scale_columns: int = 0
    zero_bits: int = 0
    compute: Literal["bf16", "fp8"] = "bf16"
    must_divide: bool = True

    def bytes_of(self, rows: int, columns: int) -> int:
        """Return the bytes of a matrix. :param rows: its outputs. :param columns: its inputs."""
        scales = -(-rows // (self.scale_rows or rows)) * -(-columns // (self.scale_columns or columns))
        weights = -(-rows * columns * self.bits // 8)
        return weights + scales * self.scale_bytes + scales * self.zero_bits // 8


@dataclass(frozen=True, slots=True)
class Quantization:
    """Which matrices are stored how.

    :param method: as the config names it. :param formats: target and format, the first that fits counts; the target
        is ``"Linear"`` for every matrix, ``"experts"`` for those of experts, else the name of modules.
    :param ignored: names of modules that are left as they were. :param head: whether the head is quantised too.
    :param kv_bits: of a cached element, where the model was made for a quantised cache.
    """

    method: str
    formats: tuple[tuple[str, WeightFormat], ...]
    ignored: tuple[str, ...] = ()
    head: bool = False
    kv_bits: int | None = None

    def format_of(self, module: str, *, is_expert: bool = False) -> WeightFormat | None:
        """Return how a matrix is stored, ``None`` where it is left as it was.

        :param module: name in the checkpoint, such as ``"model.layers.0.self_attn.q_proj"``.
        """
        if any(_matches(pattern, module) for pattern in self.ignored):
            return None
        for target, weights in self.formats:
            if target == "Linear" or (target == "experts" and is_expert) or _matches(target, module):
                return weights
        return None

    def __str__(self) -> str:
        names = list(dict.fromkeys(weights.name for _, weights in self.formats))
        return f"{self.method} ({'; '.join(names)})"


def read_quantization(config: Mapping[str, Any], source: str) -> Quantization | None:
    """Return what a model's config says about quantisation, ``None`` where nothing is quantised.

    :param config: the parsed ``config.json``. :param source: its name, for messages.
    :raises ModelConfigError: the method, or what it is set to, is not known.
    """
    inner = config.get("text_config")
    said = config.get("quantization_config") or config.get("compression_config")
    if said is None and isinstance(inner, Mapping):
        said = inner.get("quantization_config")
    if said is None:
        return None
    if not isinstance(said, Mapping):
        raise _error(f'"quantization_config" as an object was expected, found {said!r}', source)
    method = str(said.get("quant_method", "")).lower().replace("_tensors", "-tensors")
    readers = {
        "awq": _awq,
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
        "gptq": _gptq,
        "modelopt": _modelopt,
        "modelopt_fp4": _modelopt,
        "mxfp4": _mxfp4,
    }
    if method not in readers:
        raise _error(f"a known quantisation was required ({', '.join(_KNOWN)}), found {method or said!r}", source)
    return readers[method](said, source)


# -- methods ---------------------------------------------------------------------------------------------------------


def _fp8(said: Mapping[str, Any], source: str) -> Quantization:
    """Blocks with a float32 scale each (DeepSeek, Qwen), else one scale for a matrix."""
    block = said.get("weight_block_size")
    weights = _FP8_TENSOR
    if block is not None:
        rows, columns = _pair(block, "weight_block_size", source)
        weights = WeightFormat(f"fp8, a scale for {rows} x {columns}", 8, 4, rows, columns, compute="fp8")
    return Quantization("fp8", (("Linear", weights),), _ignored(said, source))


_FP8_TENSOR = WeightFormat("fp8, a scale for a matrix", 8, 4, compute="fp8", must_divide=False)


def _awq(said: Mapping[str, Any], source: str) -> Quantization:
    """Packed whole numbers, a float16 scale and a packed zero point for each group of inputs and each output."""
    bits = _number(said, "bits", source, also="w_bit")
    group = _number(said, "group_size", source, also="q_group_size")
    weights = WeightFormat(f"{bits} bit, groups of {group}", bits, 2, 1, group, bits)
    return Quantization("awq", (("Linear", weights),), _ignored(said, source))


def _gptq(said: Mapping[str, Any], source: str) -> Quantization:
    """As AWQ; a group of -1 is a whole column."""
    if said.get("dynamic"):
        raise _error('one format for all layers was expected, found "dynamic" ones for some', source)
    bits, group = _number(said, "bits", source), _number(said, "group_size", source, least=-1)
    text = f"groups of {group}" if group > 0 else "a group for each output"
    weights = WeightFormat(f"{bits} bit, {text}", bits, 2, 1, max(group, 0), bits)
    return Quantization("gptq", (("Linear", weights),), _ignored(said, source), head=bool(said.get("lm_head")))


def _mxfp4(said: Mapping[str, Any], source: str) -> Quantization:
    """Only experts are stored so; shards are padded, so any will do (``mxfp4.py``)."""
    weights = WeightFormat("mxfp4, a scale for 32", 4, 1, 1, 32, must_divide=False)
    return Quantization("mxfp4", (("experts", weights),), _ignored(said, source))


def _modelopt(said: Mapping[str, Any], source: str) -> Quantization:
    inner = said.get("quantization")
    said = {**said, **inner} if isinstance(inner, Mapping) else said
    algorithm = str(said.get("quant_algo", "")).upper()
    formats = {"FP8": _FP8_TENSOR, "NVFP4": WeightFormat("nvfp4, a scale for 16", 4, 1, 1, 16)}
    if algorithm not in formats:
        raise _error(f'"quant_algo" FP8 or NVFP4 was expected, found {algorithm!r}', source)
    return Quantization("modelopt", (("Linear", formats[algorithm]),), _ignored(said, source), kv_bits=_kv_bits(said))


def _compressed_tensors(said: Mapping[str, Any], source: str) -> Quantization:
    groups = said.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _error(f'"config_groups" was expected, found {groups!r}', source)
    formats = []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise _error(f'a group with "weights" was expected, found {group!r}', source)
        formats += [(target, _group_format(weights, group, source)) for target in _names(group, "targets", source)]
    ignored = _ignored(said, source)
    head = any(target != "Linear" and _matches(target, "lm_head") for target, _ in formats)
    head = head or (any(target == "Linear" for target, _ in formats) and "lm_head" not in ignored)
    return Quantization("compressed-tensors", tuple(formats), ignored, head=head, kv_bits=_kv_bits(said))


def _group_format(weights: Mapping[str, Any], group: Mapping[str, Any], source: str) -> WeightFormat:
    """The format of a group; vLLM keeps scales of 8 bits as float32, of packed 4 bits in the model's dtype."""
    bits, kind, strategy = _number(weights, "num_bits", source), weights.get("type"), weights.get("strategy")
    name = f"{'fp' if kind == 'float' else 'int'}{bits}"
    whole = group.get("input_activations") is not None and bits == 8
    compute: Literal["bf16", "fp8"] = "fp8" if whole and kind == "float" else "bf16"
    scale = 1 if (kind, bits) == ("float", 4) else 4 if bits == 8 else 2
    zero = 0 if weights.get("symmetric", True) else bits
    if strategy == "tensor":
        return WeightFormat(f"{name}, a scale for a matrix", bits, scale, compute=compute, must_divide=False)
    if strategy == "channel":
        return WeightFormat(f"{name}, a scale for an output", bits, scale, 1, 0, zero, compute, must_divide=False)
    if strategy in ("group", "tensor_group"):
        size = _number(weights, "group_size", source)
        return WeightFormat(f"{name}, groups of {size}", bits, scale, 1, size, zero, compute)
    if strategy == "block":
        rows, columns = _pair(weights.get("block_structure"), "block_structure", source)
        return WeightFormat(f"{name}, a scale for {rows} x {columns}", bits, scale, rows, columns, zero, compute)
    raise _error(f'"strategy" tensor, channel, group or block was expected, found {strategy!r}', source)


def _kv_bits(said: Mapping[str, Any]) -> int | None:
    """Bits of the cache, as vLLM resolves ``--kv-cache-dtype auto`` (``vllm/utils/torch_utils.py``)."""
    scheme = said.get("kv_cache_scheme")
    if isinstance(scheme, Mapping) and scheme.get("type") == "float" and scheme.get("num_bits") == 8:
        return 8
    return 8 if str(said.get("kv_cache_quant_algo", "")).upper() == "FP8" else None


# -- names -----------------------------------------------------------------------------------------------------------


def _ignored(said: Mapping[str, Any], source: str) -> tuple[str, ...]:
    keys = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
    return tuple(name for key in keys for name in _names(said, key, source))


def _names(said: Mapping[str, Any], key: str, source: str) -> tuple[str, ...]:
    """Names of modules, or patterns of them; empty where there are none."""
    found = said.get(key) or ()
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        raise _error(f'"{key}" as a list of names was expected, found {found!r}', source)
    for name in found:
        try:
            re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except re.error as error:
            raise _error(f'expressions in "{key}" were expected, found {name!r}: {error}', source) from error
    return tuple(found)


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern of a config means a module: ``re:`` expressions, ``*``, or some whole parts of its name."""
    module = module.replace("language_model.", "")
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    pattern = pattern.replace("language_model.", "")
    if "*" in pattern:
        return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")
    return f".{pattern}." in f".{module}."


# -- values ----------------------------------------------------------------------------------------------------------


def _number(said: Mapping[str, Any], key: str, source: str, *, also: str = "", least: int = 1) -> int:
    value = said.get(key, said.get(also))
    if isinstance(value, bool) or not isinstance(value, int) or value < least or value == 0:
        raise _error(f'"{key}" as a whole number was expected, found {value!r}', source)
    return value


def _pair(value: object, key: str, source: str) -> tuple[int, int]:
    if isinstance(value, Sequence) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value):
        return int(value[0]), int(value[1])
    raise _error(f'"{key}" as two whole numbers was expected, found {value!r}', source)


def _error(reason: str, source: str) -> ModelConfigError:
    return ModelConfigError(
        f"quantisation: {reason}\n  in {source}\n  what it takes is not known here; the log of a server says it: "
        "Model loading took ... GiB"
    )
