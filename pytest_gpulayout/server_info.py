"""What vLLM tells of its configuration when it is asked: all factors of the layout, also those no fingerprint names.

Format (vLLM 0.32, ``vllm/entrypoints/serve/dev/server_info/api_router.py``): ``GET /server_info?config_format=json``
answers ``{"vllm_config": {"parallel_config": {...}, ...}, "vllm_env": {...}, "system_env": {...}}``; the names are
those of ``vllm/config/parallel.py``. It is offered with ``VLLM_SERVER_DEV_MODE=1`` alone. Leaves asking to adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pytest_gpulayout.layout import Layout

SERVER_INFO_PATH = "/server_info?config_format=json"

_SIZES = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size",
    "pcp": "prefill_context_parallel_size",
    "dcp": "decode_context_parallel_size",
}
_ALWAYS_TOLD = ("tp", "pp", "dp")


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The configuration as far as it concerns the layout.

    :param layout: without replicas and nodes, which one server does not know.
    :param moe: whether the model has experts, ``None`` where it does not say.
    :param executor: what starts the workers: ``mp``, ``uni``, ``ray``. :param all2all: backend of expert parallelism.
    """

    layout: Layout
    moe: bool | None = None
    executor: str | None = None
    all2all: str | None = None

    def contradiction(self, layout: Layout) -> str | None:
        """Say where this server differs from ``layout``, or ``None`` when it is that layout."""
        wanted = Layout(tp=layout.tp, pp=layout.pp, dp=layout.dp, pcp=layout.pcp, dcp=layout.dcp, ep=layout.ep)
        return None if self.layout == wanted else f"the server says it is {self.layout}, {wanted} was asked for"


def parse_server_info(document: object) -> ServerInfo | None:
    """Read an answer; ``None`` when it is not of vLLM's form.

    A factor that a version does not know is 1 there.
    """
    config = _inner(_inner(document, "vllm_config"), "parallel_config")
    sizes = {short: _count(config.get(name)) for short, name in _SIZES.items()}
    if any(sizes[short] is None for short in _ALWAYS_TOLD):
        return None
    told = {short: size for short, size in sizes.items() if size is not None}
    moe = config.get("is_moe_model")
    return ServerInfo(
        layout=Layout(**told, ep=config.get("enable_expert_parallel") is True),
        moe=moe if isinstance(moe, bool) else None,
        executor=_text(config.get("distributed_executor_backend")),
        all2all=_text(config.get("all2all_backend")),
    )


def _inner(document: object, name: str) -> Mapping[str, Any]:
    inner = document.get(name) if isinstance(document, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
