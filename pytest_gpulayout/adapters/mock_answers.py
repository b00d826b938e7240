"""What the built-in mock of an OpenAI-compatible server answers, as bytes, in the form of vLLM 0.32.

Knows requests and answers (``vllm/entrypoints/openai/completion/serving.py``, ``.../chat_completion/serving.py``).
Leaves the instants at which they go out, and the sockets, to :mod:`~pytest_gpulayout.adapters.mock_server`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Any, NamedTuple

import orjson

_COMPLETIONS = "/v1/completions"
_CHAT = "/v1/chat/completions"
_DEFAULT_TOKENS = 16
_MOST_TOKENS = 1_000_000
_VOCABULARY = 50_000
_CREATED = 1_700_000_000
_TEXT = " x"
FINGERPRINT_LENGTH = len("vllm-mock-00000000")
"""Of every fingerprint, so that messages can be encoded before they are known."""


@dataclass(frozen=True, slots=True)
class Request:
    """One whole HTTP request. :param request_id: its ``X-Request-Id``, ``""`` without one."""

    method: str
    path: str
    body: bytes
    request_id: str
    keep_alive: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that takes its time.

    :param head: goes out at once. :param chunks: (n,), one goes out at each instant of the timetable.
    :param tail: goes out right after the last chunk. :param held: tokens before the first of ``chunks``.
    """

    head: bytes
    chunks: Sequence[bytes]
    tail: bytes
    held: int = 0


class _Shape(NamedTuple):
    """All that the chunks of a streamed answer depend on, so that requests of one shape share them."""

    chat: bool
    model: str
    tokens: int
    prompt_tokens: int | None


def answer_to(request: Request, model: str, fingerprint: str) -> Answer | bytes:
    """Decide what a request gets: a whole HTTP answer for now, or one for the timetable.

    :param model: listed by ``/v1/models``; a request may name any.
    :param fingerprint: of this answer, of :data:`FINGERPRINT_LENGTH`.
    """
    route = _ROUTES.get((request.method, request.path.partition("?")[0]))
    if route is None:
        return plain(request, HTTPStatus.NOT_FOUND, b'{"detail":"Not Found"}')
    try:
        return route(request, model, fingerprint)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # a body that is not such a request
        complaint = {"error": {"message": f"{type(error).__name__}: {error}", "type": "BadRequestError", "code": 400}}
        return plain(request, HTTPStatus.BAD_REQUEST, orjson.dumps(complaint))


def plain(request: Request, status: HTTPStatus, body: bytes) -> bytes:
    """Return a whole HTTP answer with a JSON body."""
    head = _head(status, b"application/json", close=not request.keep_alive)
    return b"%sContent-Length: %d\r\n\r\n%s" % (head, len(body), body)


def _head(status: HTTPStatus, kind: bytes, *, close: bool) -> bytes:
    line = b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\n" % (status, status.phrase.encode(), kind)
    return line + b"Connection: close\r\n" if close else line


def _json(request: Request, document: Mapping[str, Any]) -> bytes:
    return plain(request, HTTPStatus.OK, orjson.dumps(document))


def _models(model: str) -> dict[str, Any]:
    entry = {"id": model, "object": "model", "created": _CREATED, "owned_by": "vllm", "root": model}
    return {"object": "list", "data": [{**entry, "max_model_len": _MOST_TOKENS}]}


def _tokenized(document: Mapping[str, Any]) -> dict[str, Any]:
    tokens = _token_ids(document["messages"] if "messages" in document else document["prompt"])
    return {"count": len(tokens), "max_model_len": _MOST_TOKENS, "tokens": tokens, "token_strs": None}


def _count_tokens(prompt: Any) -> int:
    """How many tokens a prompt has; one of token ids, as load clients send a thousand of in no time, is not read."""
    return (
        len(prompt) if prompt and isinstance(prompt, list) and isinstance(prompt[0], int) else len(_token_ids(prompt))
    )


def _token_ids(prompt: Any) -> Sequence[int]:
    """A token for each word, the same for the same word; token ids are what they are."""
    if isinstance(prompt, str):
        return [zlib.crc32(word.encode()) % _VOCABULARY for word in prompt.split()]
    if prompt and isinstance(prompt[0], int):
        return [int(token) for token in prompt]
    texts = (_content_of(item) if isinstance(item, Mapping) else item for item in prompt)
    return [token for text in texts for token in _token_ids(text)]


def _content_of(item: Mapping[str, Any]) -> Any:
    """The text of a chat message, or of one part of its content; an image is one word."""
    return item.get("content") or item.get("text") or str(item.get("type", ""))


def _generated(request: Request, model: str, fingerprint: str) -> Answer:
    document = orjson.loads(request.body)
    chat = request.path.startswith(_CHAT)
    prompt = _count_tokens(document["messages" if chat else "prompt"])
    most = document.get("max_completion_tokens") or document.get("max_tokens") or _DEFAULT_TOKENS
    tokens = min(int(most), _MOST_TOKENS)
    name = str(document.get("model") or model)
    if tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {tokens}")
    if not document.get("stream"):
        whole = _json(request, _whole(_Shape(chat, name, tokens, prompt), fingerprint))
        return Answer(b"", (whole,), b"", held=tokens - 1)
    options = document.get("stream_options") or {}
    with_usage = bool(options.get("include_usage"))
    continuous = with_usage and bool(options.get("continuous_usage_stats"))
    shape = _Shape(chat, name, tokens, prompt if continuous else None)
    head = _STREAM_HEAD if request.keep_alive else _CLOSING_STREAM_HEAD
    if not with_usage:
        return Answer(head, _chunks(shape), _END_OF_STREAM)
    before, after = _usage_message(shape, prompt)
    return Answer(head, _chunks(shape), before + fingerprint.encode() + after + _END_OF_STREAM)


@lru_cache(maxsize=64)
def _chunks(shape: _Shape) -> tuple[bytes, ...]:
    """Encode a message for each token, before the clock runs.

    All answers of a shape carry the same ``id``: what differs between requests is in the usage message.
    """
    messages = [
        _message({**_opening(shape), "choices": [_choice(shape, i)], **_usage(shape, i)}) for i in _range(shape)
    ]
    if shape.chat:
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        messages[0] = _message({**_opening(shape), "choices": [role], **_usage(shape, 0)}) + messages[0]
    return tuple(messages)


def _range(shape: _Shape) -> range:
    return range(1, shape.tokens + 1)


def _opening(shape: _Shape) -> dict[str, Any]:
    identity, kind = ("chatcmpl-mock", "chat.completion.chunk") if shape.chat else ("cmpl-mock", "text_completion")
    return {"id": identity, "object": kind, "created": _CREATED, "model": shape.model}


def _choice(shape: _Shape, number: int) -> dict[str, Any]:
    content = {"delta": {"content": _TEXT}} if shape.chat else {"text": _TEXT}
    reason = "length" if number == shape.tokens else None
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason, "stop_reason": None}


def _usage(shape: _Shape, tokens: int) -> dict[str, Any]:
    return {} if shape.prompt_tokens is None else {"usage": _counts(shape.prompt_tokens, tokens)}


def _counts(prompt: int, tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens}


@lru_cache(maxsize=64)
def _usage_message(shape: _Shape, prompt: int) -> tuple[bytes, bytes]:
    """The message with ``usage``, encoded but for the fingerprint between the two parts."""
    usage = _counts(prompt, shape.tokens)
    blank = "0" * FINGERPRINT_LENGTH
    whole = _message({**_opening(shape), "choices": [], "usage": usage, "system_fingerprint": blank})
    before, _, after = whole.rpartition(blank.encode())
    return before, after


def _whole(shape: _Shape, fingerprint: str) -> dict[str, Any]:
    text = _TEXT * shape.tokens
    content = {"message": {"role": "assistant", "content": text}} if shape.chat else {"text": text}
    choice = {"index": 0, **content, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    kind = {"object": "chat.completion"} if shape.chat else {}
    usage = _counts(shape.prompt_tokens or 0, shape.tokens)
    return {**_opening(shape), **kind, "choices": [choice], "usage": usage, "system_fingerprint": fingerprint}


def _message(document: Mapping[str, Any]) -> bytes:
    return _framed(b"data: %s\n\n" % orjson.dumps(document))


def _framed(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


def _stream_head(*, close: bool) -> bytes:
    head = _head(HTTPStatus.OK, b"text/event-stream; charset=utf-8", close=close)
    return head + b"Transfer-Encoding: chunked\r\n\r\n"


def _answer_health(request: Request, _model: str, _fingerprint: str) -> bytes:
    return plain(request, HTTPStatus.OK, b"")


def _answer_models(request: Request, model: str, _fingerprint: str) -> bytes:
    return _json(request, _models(model))


def _answer_tokenize(request: Request, _model: str, _fingerprint: str) -> bytes:
    return _json(request, _tokenized(orjson.loads(request.body)))


_STREAM_HEAD, _CLOSING_STREAM_HEAD = _stream_head(close=False), _stream_head(close=True)
_END_OF_STREAM = _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"
_ROUTES: Mapping[tuple[str, str], Callable[[Request, str, str], Answer | bytes]] = {
    ("GET", "/health"): _answer_health,
    ("GET", "/v1/models"): _answer_models,
    ("POST", "/tokenize"): _answer_tokenize,
    ("POST", _COMPLETIONS): _generated,
    ("POST", _CHAT): _generated,
}
