"""Server-sent events, and what OpenAI-compatible servers say in them.

Knows the wire format (WHATWG HTML, section 9.2.6 "Interpreting an event stream") and the messages of
``/v1/completions`` and ``/v1/chat/completions`` (vLLM 0.32, ``vllm/entrypoints/openai/*/serving.py``). Sees only
bytes and the instants they came with; sockets and HTTP belong to others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHOWN = 200


class SseMessage(NamedTuple):
    """One dispatched event. :param data: its data lines, joined. :param event: its type, mostly empty."""

    data: str
    event: str = ""


class SseParser:
    """Turns pieces of a stream, cut anywhere, into messages.

    Lines end with LF, CRLF or CR; a CR at the end of a piece ends its line at once, so that no message waits
    for a byte that may never come.
    """

    def __init__(self) -> None:
        self._tail = b""
        self._data: list[bytes] = []
        self._event = b""
        self._after_cr = False
        self._at_start = True

    def feed(self, piece: bytes) -> list[SseMessage]:
        """Return the messages that this piece completes."""
        if not piece:
            return []
        if self._after_cr and piece.startswith(b"\n"):
            piece = piece[1:]
        self._after_cr = piece.endswith(b"\r")
        *lines, self._tail = _LINE_END.split(self._tail + piece)
        return [message for line in lines if (message := self._line(line)) is not None]

    def close(self) -> list[SseMessage]:
        """Return what is left once the stream is known to be whole.

        The standard drops a last message without its blank line, because the stream may have been cut. Here
        HTTP has said that it was not, and some servers leave the line out.
        """
        tail, self._tail = self._tail, b""
        messages = [self._line(tail)] if tail else []
        return [message for message in [*messages, self._line(b"")] if message is not None]

    def _line(self, line: bytes) -> SseMessage | None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")  # a comment is a line without a name
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value
        return None

    def _dispatch(self) -> SseMessage | None:
        data, self._data = self._data, []
        event, self._event = self._event, b""
        if not data:
            return None
        return SseMessage(b"\n".join(data).decode("utf-8", "replace"), event.decode("utf-8", "replace"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionStream:
    """What one streamed answer said, and when.

    :param chunk_ns: (n_chunks,), arrival of the last byte of each message with a non-empty ``choices``; the
        message of the chat API that only names the role is not one.
    :param chunk_tokens: (n_chunks,), from ``continuous_usage_stats``; ``None`` where the server did not send it.
    :param prompt_tokens: of the last ``usage``. :param completion_tokens: of the last ``usage``.
    :param error: what the server (or this reader) has to complain about.
    """

    chunk_ns: tuple[int, ...]
    chunk_tokens: tuple[int, ...] | None
    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    system_fingerprint: str | None
    error: str | None


def read_completion_stream(pieces: Iterable[tuple[int, bytes]], *, whole: bool = True) -> CompletionStream:
    """Read a response body.

    :param pieces: (arrival in ns, bytes), in the order they came; may be cut anywhere.
    :param whole: nothing is missing at the end; otherwise an unfinished last message is left out.
    """
    parser, reader, now_ns = SseParser(), _Reader(), 0
    for now_ns, piece in pieces:
        for message in parser.feed(piece):
            reader.take(now_ns, message)
    for message in parser.close() if whole else ():
        reader.take(now_ns, message)
    return reader.result()


def error_message(body: bytes) -> str:
    """Find a server's own words in the body of an HTTP error.

    Forms: ``{"error": {"message"}}`` and ``{"error": "text"}`` (vLLM), ``{"message"}`` (older vLLM),
    ``{"detail"}`` (FastAPI); anything else is quoted as it is.
    """
    try:
        payload = json.loads(body)
    except ValueError:
        return _shorten(body.decode("utf-8", "replace")) or "(no text)"
    if isinstance(payload, dict):
        for key in ("error", "message", "detail"):
            if payload.get(key):
                return _words_of(payload[key])
    return _shorten(json.dumps(payload))


def _words_of(error: Any) -> str:
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return error if isinstance(error, str) else _shorten(json.dumps(error))


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."


class _Reader:
    """Collects the messages of one answer; stops listening at the first error."""

    def __init__(self) -> None:
        self._chunk_ns: list[int] = []
        self._totals: list[int | None] = []
        self._texts: list[str] = []
        self._usage: dict[str, Any] = {}
        self._fingerprint: str | None = None
        self._error: str | None = None

    def take(self, now_ns: int, message: SseMessage) -> None:
        if self._error is not None or message.data == "[DONE]":
            return
        try:
            payload = json.loads(message.data)
        except ValueError:
            payload = None
        if not isinstance(payload, dict):
            self._error = f"a message of the stream is not a JSON object: {_shorten(message.data)!r}"
        elif payload.get("error") or message.event == "error":
            self._error = f"error in the stream: {_words_of(payload.get('error') or payload)}"
        else:
            self._take_chunk(now_ns, payload)

    def _take_chunk(self, now_ns: int, payload: dict[str, Any]) -> None:
        fingerprint = payload.get("system_fingerprint")
        if isinstance(fingerprint, str):
            self._fingerprint = self._fingerprint or fingerprint
        usage = payload.get("usage")
        if isinstance(usage, dict):
            self._usage = usage
        choices = payload.get("choices")
        if not choices:
            return
        if not isinstance(choices, list) or not isinstance(choices[0], dict):
            self._error = f"choices of a message is not a list of objects: {_shorten(json.dumps(choices))}"
        elif not _only_names_role(choices[0]):
            self._chunk_ns.append(now_ns)
            self._totals.append(_count(usage, "completion_tokens"))
            self._texts.append(_text_of(choices[0]))

    def result(self) -> CompletionStream:
        return CompletionStream(
            chunk_ns=tuple(self._chunk_ns),
            chunk_tokens=self._chunk_tokens(),
            text="".join(self._texts),
            prompt_tokens=_count(self._usage, "prompt_tokens"),
            completion_tokens=_count(self._usage, "completion_tokens"),
            system_fingerprint=self._fingerprint,
            error=self._error,
        )

    def _chunk_tokens(self) -> tuple[int, ...] | None:
        totals = [total for total in self._totals if total is not None]
        if not totals or len(totals) < len(self._totals):
            return None
        return tuple(total - before for before, total in zip([0, *totals], totals, strict=False))


def _only_names_role(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    if not isinstance(delta, dict) or "role" not in delta or choice.get("finish_reason"):
        return False
    return not any(value for name, value in delta.items() if name != "role")


def _text_of(choice: dict[str, Any]) -> str:
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    return text if isinstance(text, str) else ""


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) else None
