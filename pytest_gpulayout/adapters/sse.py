"""Server-sent events, and what OpenAI-compatible servers say in them.

Knows the wire format (WHATWG HTML, section 9.2.6 "Interpreting an event stream") and the messages of
``/v1/completions`` and ``/v1/chat/completions`` (vLLM 0.32, ``vllm/entrypoints/openai/*/serving.py``). Sees only
bytes and the instants they came with; sockets and HTTP belong to others.
"""

from __future__ import annotations

import json
import math
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from pytest_gpulayout.trace import ServerTimings

_LF, _CR = b"\n\r"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DONE = b"[DONE]"
_LARGEST = 2**63 - 1
_SHOWN = 200
_orjson_loads = orjson.loads

SseMessage = tuple[bytes, bytes]
"""One dispatched event: its data lines, joined by LF, and its type, which mostly is empty."""


class SseParser:
    """Turns pieces of a stream, cut anywhere, into messages.

    Lines end with LF, CRLF or CR; a CR at the end of a piece ends its line at once, so that no message waits
    for a byte that may never come.
    """

    __slots__ = ("_after_cr", "_at_start", "_data", "_event", "_tail")

    def __init__(self) -> None:
        self._tail: list[bytes] = []  # of a line without its end; joined once, however many pieces it has
        self._data: list[bytes] = []
        self._event = b""
        self._after_cr = False
        self._at_start = True

    def feed(self, piece: bytes) -> list[SseMessage]:
        """Return the messages that this piece completes."""
        if self._after_cr and piece:
            self._after_cr = False
            piece = piece.removeprefix(b"\n")
        if not piece:
            return []
        if self._tail:
            if b"\n" not in piece and b"\r" not in piece:
                self._tail.append(piece)
                return []
            piece = b"".join((*self._tail, piece))
            self._tail.clear()
        lines = piece.splitlines()  # of bytes: at LF, CRLF and CR, and nowhere else
        if (last := piece[-1]) != _LF:
            if last == _CR:
                self._after_cr = True
            else:
                self._tail.append(lines.pop())
        if self._at_start and lines:
            self._at_start = False
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        messages, data = [], self._data
        for line in lines:
            if line[:6] == b"data: ":  # what servers send nearly always
                data.append(line[6:])
            elif line:
                self._field(line)
            else:
                if data:
                    messages.append((data[0] if len(data) == 1 else b"\n".join(data), self._event))
                    data.clear()
                self._event = b""
        return messages

    def close(self) -> list[SseMessage]:
        """Return what is left once the stream is known to be whole.

        The standard drops a last message without its blank line, because the stream may have been cut. Here
        HTTP has said that it was not, and some servers leave the line out.
        """
        return self.feed(b"\n\n")

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")  # a comment is a line without a name
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionStream:
    """What one streamed answer said, and when.

    :param chunk_ns: (n_chunks,), arrival of the last byte of each message with a non-empty ``choices``, however
        many choices it has; the first message of a choice in the chat API that only names the role is not one.
    :param chunk_tokens: (n_chunks,), from ``continuous_usage_stats``: by how much the count of the message's (first)
        choice grew; ``None`` where the server did not send it for each chunk, or counted backwards.
    :param text: of the first choice of each chunk, in order; neither reasoning nor tool calls.
    :param prompt_tokens: of the last ``usage``. :param completion_tokens: of the last ``usage``.
    :param cached_tokens: prompt tokens found in the prefix cache, of the last ``usage``; ``None`` where the server
        did not say (``vllm serve --enable-prompt-tokens-details``).
    :param server_timings: ``metrics`` beside the last ``usage``; ``None`` where the server did not send any.
    :param finish_reason: the last one, such as ``length`` or ``stop``.
    :param error: what the server (or this reader) has to complain about; nothing after it was read.
    """

    chunk_ns: Sequence[int]
    chunk_tokens: Sequence[int] | None
    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    system_fingerprint: str | None
    error: str | None
    cached_tokens: int | None = None
    server_timings: ServerTimings | None = None
    finish_reason: str | None = None


def read_completion_stream(pieces: Iterable[tuple[int, bytes]], *, whole: bool = True) -> CompletionStream:
    """Read a response body.

    :param pieces: (arrival in ns, bytes), in the order they came; may be cut anywhere.
    :param whole: nothing is missing at the end; otherwise an unfinished last message is left out.
    """
    parser, reader, now_ns = SseParser(), _Reader(), 0
    feed, take = parser.feed, reader.take
    for now_ns, piece in pieces:
        for data, event in feed(piece):
            take(now_ns, data, event)
    for data, event in parser.close() if whole else ():
        take(now_ns, data, event)
    return reader.result()


def error_message(body: bytes) -> str:
    """Find a server's own words in the body of an HTTP error.

    Forms: ``{"error": {"message"}}`` and ``{"error": "text"}`` (vLLM), ``{"message"}`` (older vLLM),
    ``{"detail"}`` (FastAPI); anything else is quoted as it is.
    """
    try:
        payload = _decode(body)
    except ValueError:
        return _shorten(body.decode("utf-8", "replace")) or "(no text)"
    if isinstance(payload, dict):
        for key in ("error", "message", "detail"):
            if payload.get(key):
                return _words_of(payload[key])
    return _quote(payload)


def _decode(data: bytes) -> Any:
    """Decode JSON as tolerantly as the standard library, and mostly as fast as orjson.

    Servers that use the standard library write ``NaN`` and unpaired surrogates, which are no JSON to orjson.

    :raises ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass  # out of this block, so that the other reader's complaint stands alone
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _words_of(error: Any) -> str:
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        error = error["message"]
    return _printable(error) if isinstance(error, str) else _quote(error)


def _quote(value: Any) -> str:
    try:
        return _shorten(json.dumps(value))
    except RecursionError:  # the reader goes deeper than the writer
        return "(nested too deeply to be shown)"


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."


def _printable(text: str) -> str:
    """Join surrogates that belong together, which may come in two chunks, and replace single ones."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class _Reader:
    """Collects the messages of one answer; stops listening at the first error."""

    __slots__ = (
        *("_chunk_ns", "_chunk_tokens", "_error", "_fingerprint", "_finish_reason", "_last"),
        *("_roles", "_texts", "_totals"),
    )

    def __init__(self) -> None:
        self._chunk_ns = array("q")
        self._chunk_tokens: array[int] | None = array("q")
        self._totals: dict[int, int] = {}  # choice -> tokens so far
        self._roles: set[int] = set()  # choices that a message did nothing but name
        self._texts: list[str] = []
        self._last: dict[str, Any] = {}  # message with usage
        self._fingerprint: str | None = None
        self._finish_reason: str | None = None
        self._error: str | None = None

    def take(self, now_ns: int, data: bytes, event: bytes) -> None:
        """Note what one message says; runs once per token of a measurement, hence the few calls."""
        if self._error is not None:
            return
        try:
            payload = _orjson_loads(data)
        except orjson.JSONDecodeError:
            if data.strip() == _DONE:
                return
            payload = _object_or_none(data)
        if type(payload) is not dict or event == b"error" or payload.get("error"):
            self._error = _complaint_of(payload, data)
            return
        if type(usage := payload.get("usage")) is dict:
            self._last = payload
        if type(fingerprint := payload.get("system_fingerprint")) is str:
            self._fingerprint = self._fingerprint or fingerprint or None
        if not (choices := payload.get("choices")):
            return
        if type(choices) is not list or type(choices[0]) is not dict:
            self._error = f"choices of a message is not a list of objects: {_quote(choices)}"
            return
        choice = choices[0]
        if type(delta := choice.get("delta")) is not dict:
            text = choice.get("text")
        elif "role" in delta and self._only_names_role(choices):
            return
        else:
            text = delta.get("content")
        if type(text) is str:
            self._texts.append(text)
        if type(reason := choice.get("finish_reason")) is str:
            self._finish_reason = reason
        self._chunk_ns.append(now_ns)
        if self._chunk_tokens is not None:
            self._count_tokens(_index_of(choice) if choice.get("index") else 0, _count(usage, "completion_tokens"))

    def _count_tokens(self, index: int, total: int | None) -> None:
        # vLLM counts each choice of a request by itself (completion/serving.py, previous_num_tokens).
        before = self._totals.get(index, 0)
        if self._chunk_tokens is None or total is None or total < before:
            self._chunk_tokens = None
        else:
            self._totals[index] = total
            self._chunk_tokens.append(total - before)

    def _only_names_role(self, choices: list[Any]) -> bool:
        """Whether this message only opens its choices; some servers name the role in every message."""
        if not all(map(_names_role_only, choices)):
            return False
        known = len(self._roles)
        self._roles.update(map(_index_of, choices))
        return len(self._roles) > known

    def result(self) -> CompletionStream:
        usage = self._last.get("usage", {})
        return CompletionStream(
            chunk_ns=self._chunk_ns,
            chunk_tokens=self._chunk_tokens or None,
            text=_printable("".join(self._texts)),
            prompt_tokens=_count(usage, "prompt_tokens"),
            completion_tokens=_count(usage, "completion_tokens"),
            cached_tokens=_count(usage.get("prompt_tokens_details"), "cached_tokens"),
            system_fingerprint=_word(self._fingerprint),
            server_timings=_timings_of(self._last.get("metrics")),
            finish_reason=_word(self._finish_reason),
            error=self._error,
        )


def _object_or_none(data: bytes) -> Any:
    try:
        return _decode(data)
    except ValueError:
        return None


def _complaint_of(payload: Any, data: bytes) -> str:
    if isinstance(payload, dict):
        return f"error in the stream: {_words_of(payload.get('error') or payload)}"
    words = _shorten(data.decode("utf-8", "replace"))
    return f"a message of the stream is not a JSON object: {words!r}"


def _word(text: str | None) -> str | None:
    """Keep one copy of a word that each of many answers repeats."""
    return None if text is None else sys.intern(_printable(text))


def _names_role_only(choice: Any) -> bool:
    delta = choice.get("delta") if isinstance(choice, dict) else None
    if not isinstance(delta, dict) or "role" not in delta or choice.get("finish_reason"):
        return False
    return not any(value for name, value in delta.items() if name != "role")


def _index_of(choice: Any) -> int:
    return _count(choice, "index") or 0


def _count(counts: Any, name: str) -> int | None:
    value = counts.get(name) if type(counts) is dict else None
    return value if type(value) is int and 0 <= value <= _LARGEST else None


def _timings_of(metrics: Any) -> ServerTimings | None:
    """Rename vLLM's timings, of which the one called time to first token leaves the queue out."""
    if not isinstance(metrics, dict):
        return None
    queue_ms, prefill_ms, generation_ms = (
        _milliseconds(metrics.get(name)) for name in ("queue_time_ms", "time_to_first_token_ms", "generation_time_ms")
    )
    if queue_ms is None and prefill_ms is None and generation_ms is None:
        return None
    return ServerTimings(queue_ms=queue_ms, prefill_ms=prefill_ms, generation_ms=generation_ms)


def _milliseconds(value: Any) -> float | None:
    if type(value) not in (int, float) or abs(value) > _LARGEST or not math.isfinite(value):
        return None
    return float(value)
