"""What names a model exactly (config.json, commit in the cache of a hub, dtype of its weights), and what limits it.

Knows the cache of ``huggingface_hub`` through that library alone, where it is installed, and those arguments of
``vllm serve`` that choose weights (vLLM 0.32, ``vllm/engine/arg_utils.py``). Never goes to the network.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_gpulayout.gate import ModelSizes

_CONFIG = "config.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OTHER_CONFIG = ("--hf-overrides", "--hf-config-path", "--config")
_ALIASES = {"half": "float16", "float": "float32"}  # vllm/config/model.py, ModelDType
_KEPT_BY_AUTO = ("bfloat16", "float16")
_HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model")  # nearly all; GPT-2 and its like; MPT
_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
_UNSETTLED = "block_configs"  # experts differ from layer to layer there


def revision_of(model: str, arguments: Sequence[str]) -> str:
    """Return what tells one state of a model's files from another.

    :param model: name at a hub, or folder.
    :param arguments: of the server; ``--revision`` and ``--download-dir`` count.
    :returns: of a folder ``config.json`` and a hash of it; of a hub the commit of the snapshot in the local cache,
        else the revision that was asked for; ``""`` where nothing tells.
    """
    config = Path(model) / _CONFIG
    if config.is_file():
        return f"{_CONFIG} {hashlib.sha256(config.read_bytes()).hexdigest()[:12]}"
    asked = argument_of(arguments, "--revision") or ""
    cached = _cached_config(model, arguments)
    commit = "" if cached is None else cached.parent.name
    return commit if _COMMIT.fullmatch(commit) else asked


def dtype_of(model: str, arguments: Sequence[str], *, said_by_server: str | None = None) -> str:
    """Return the dtype of the weights and their quantisation, such as ``bfloat16`` or ``bfloat16 fp8``.

    :param said_by_server: what its log tells, which settles it; what arguments and config.json tell is second best.
    :returns: ``""`` where they leave it to the server: of float32 weights vLLM's ``auto`` makes something shorter.
    """
    if said_by_server:
        return said_by_server
    config = _read_config(model, arguments)
    dtype = argument_of(arguments, "--dtype") or "auto"
    if dtype == "auto":
        stored = _of_text_model(config, "dtype") or _of_text_model(config, "torch_dtype")
        dtype = stored if stored in _KEPT_BY_AUTO else ""
    if not dtype:
        return ""
    quantized = config.get("quantization_config")
    own = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
    method = argument_of(arguments, "--quantization", "-q") or own
    return " ".join(filter(None, [_ALIASES.get(dtype, dtype), str(method or "")]))


def sizes_of(model: str, arguments: Sequence[str]) -> ModelSizes:
    """Return what of a model limits its layouts, as far as its config.json is at hand and counts.

    Experts have the names by which vLLM knows them (0.32, ``vllm/transformers_utils/model_arch_config_convertor.py``,
    ``get_num_experts``), layers are those of the language model in one that sees and hears, too.

    :param arguments: of the server; those that change the config leave nothing to be told.
    """
    if any(name.replace("_", "-").startswith(_OTHER_CONFIG) for name in arguments):
        return ModelSizes()
    path = _config_path(model, arguments)
    config = _read(path)
    if path is None or not config:
        return ModelSizes()
    layers = config.get("num_hidden_layers") or _text_model(config).get("num_hidden_layers")
    return ModelSizes(layers if isinstance(layers, int) else None, _experts_in(config), str(path))


def hidden_size_of(model: str, arguments: Sequence[str]) -> int | None:
    """Return how many numbers stand for a token between the layers, ``None`` where no config.json at hand tells.

    Of a model that sees and hears, too, that is the size in its language model.

    :param arguments: of the server; ``--revision`` and ``--download-dir`` count.
    """
    config = _read_config(model, arguments)
    sizes = (part.get(name) for part in (_text_model(config), config) for name in _HIDDEN_SIZE)
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def argument_of(arguments: Sequence[str], *names: str) -> str | None:
    """Return the value of ``--name VALUE`` or ``--name=VALUE``, of several the last; ``None`` where there is none."""
    found = None
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") in names:
            found = value if equals else next(iter(arguments[position + 1 :]), None)
    return found


def _read_config(model: str, arguments: Sequence[str]) -> Mapping[str, Any]:
    return _read(_config_path(model, arguments))


def _read(path: Path | None) -> Mapping[str, Any]:
    try:
        document = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the server refuses such a model itself
        return {}
    return document if isinstance(document, dict) else {}


def _config_path(model: str, arguments: Sequence[str]) -> Path | None:
    path = Path(model) / _CONFIG
    return path if path.is_file() else _cached_config(model, arguments)


def _experts_in(config: Mapping[str, Any]) -> int | None:
    """How many experts the config names, in whichever part: 0 where no part does, ``None`` where it is open."""
    if _UNSETTLED in config:
        return None
    found = next((config[name] for name in _EXPERTS if config.get(name)), 0)
    number = next(iter(found), 0) if isinstance(found, list) else found
    inner = [_experts_in(part) for part in config.values() if isinstance(part, Mapping)]
    counts = [number if isinstance(number, int) else None, *inner]
    return None if None in counts else max(count for count in counts if count is not None)


def _of_text_model(config: Mapping[str, Any], name: str) -> str:
    """A value of the config, or of the part that is the language model in one that sees and hears, too."""
    found = config.get(name) or _text_model(config).get(name)
    return found if isinstance(found, str) else ""


def _text_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that is the language model in one that sees and hears, too; nothing in others."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else {}


def _cached_config(model: str, arguments: Sequence[str]) -> Path | None:
    """``.../snapshots/COMMIT/config.json`` of a hub's model, ``None`` where it is not in the local cache."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:  # it comes with vLLM, which may be in another environment
        return None
    folder, revision = argument_of(arguments, "--download-dir"), argument_of(arguments, "--revision")
    try:
        found = try_to_load_from_cache(model, _CONFIG, cache_dir=folder, revision=revision)
    except (ValueError, OSError):  # no name of a hub's model, or a cache that cannot be read
        return None
    return Path(found) if isinstance(found, str) else None
