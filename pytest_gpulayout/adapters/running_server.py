"""Asks a server that already runs what it is: which models it serves, and its version.

Knows vLLM's ``/v1/models`` and ``/version`` (vLLM 0.32, ``vllm/entrypoints/openai/models/serving.py`` and
``vllm/entrypoints/serve/instrumentator/basic.py``), and that a key comes from the environment and is never shown.
Leaves what follows to those who gate it (:mod:`~pytest_gpulayout.adapters.attached_server`) or compare with it
(:mod:`~pytest_gpulayout.adapters.base_side`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import orjson

from pytest_gpulayout.adapters.server_address import Asker, locate
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.ports import Endpoint

_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Role:
    """What a server is to the run. :param noun: in messages. :param key_variable: environment variable of its key."""

    noun: str
    key_variable: str

    @property
    def key(self) -> str | None:
        """The key, ``None`` where none is set."""
        return os.environ.get(self.key_variable) or None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that can be asked for. :param root: where its weights came from, ``""`` where it does not tell.

    :param parent: of a LoRA adapter the model that it changes, else ``""``.
    """

    name: str
    root: str = ""
    parent: str = ""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers. :param endpoint: without a model. :param version: of its vLLM, where it tells."""

    endpoint: Endpoint
    version: str | None
    models: tuple[ServedModel, ...]


def find_running_server(url: str, role: Role) -> RunningServer:
    """Ask a server what it is.

    :param url: a slash, or ``/v1``, may stand at its end.
    :raises MeasurementError: it does not answer, refuses the key, or serves no model.
    """
    endpoint = Endpoint(url.rstrip("/").removesuffix("/v1"), "", role.key)
    asker = Asker(locate(endpoint, _ANSWER_S), _ANSWER_S)
    try:
        models = read_models(endpoint.url, *asker.ask("GET", "/v1/models"), role)
        version = read_version(*asker.ask("GET", "/version"))
    finally:
        asker.close()
    return RunningServer(endpoint, version, models)


def read_models(url: str, status: int, body: bytes, role: Role) -> tuple[ServedModel, ...]:
    """Read the answer to ``GET /v1/models``.

    :raises MeasurementError: the key was refused, or there is no model in it.
    """
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        found = "it refuses the key" if role.key else "it asks for a key"
        raise MeasurementError(
            f"a {role.noun} that answers was required, found HTTP {status}: {found}\n  at {url}\n"
            f"  put its key into the environment variable {role.key_variable}"
        )
    try:
        models = tuple(_model(entry) for entry in orjson.loads(body)["data"])
    except (ValueError, KeyError, TypeError):
        models = ()
    if status == HTTPStatus.OK and models:
        return models
    raise MeasurementError(
        f"an OpenAI-compatible server was required as {role.noun}, found HTTP {status} and no list of models\n"
        f"  at {url}/v1/models\n  check the URL: curl {url}/v1/models"
    )


def _model(entry: Any) -> ServedModel:
    return ServedModel(str(entry["id"]), str(entry.get("root") or ""), str(entry.get("parent") or ""))


def read_version(status: int, body: bytes) -> str | None:
    """Read the answer to ``GET /version``; ``None`` where it does not tell."""
    if status != HTTPStatus.OK:
        return None
    try:
        version = orjson.loads(body)["version"]
    except (ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, str) else None
