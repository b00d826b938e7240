"""The reader of streams once more, slow and obviously right, to compare the fast one with.

The wire format follows WHATWG HTML, 9.2.6, step by step over decoded text; what the standard does at the end of a
stream (drop an unfinished message) is replaced by the rule of :func:`read`. A message has arrived with the first
piece after which the standard would have dispatched it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from pytest_gpulayout.adapters.sse import CompletionStream
from pytest_gpulayout.trace import ServerTimings

Message = tuple[str, str]
"""Data and event type."""


def messages_of(stream: bytes) -> list[Message]:
    """All messages that a standard reader would have dispatched by now."""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    found: list[Message] = []
    data, event = "", ""
    for line in re.split("\r\n|\n|\r", text)[:-1]:  # behind the last line end stands an unfinished line
        if line == "":
            if data != "":
                found.append((data[:-1], event))
            data, event = "", ""
            continue
        if line.startswith(":"):
            continue
        name, colon, value = line.partition(":")
        if colon and value.startswith(" "):
            value = value[1:]
        if name == "data":
            data += value + "\n"
        elif name == "event":
            event = value
    return found


def read(pieces: Sequence[tuple[int, bytes]], *, whole: bool) -> CompletionStream:
    """What :func:`~pytest_gpulayout.adapters.sse.read_completion_stream` has to find.

    :param whole: the last message counts even where its line or its blank line was not ended.
    """
    seen, arrivals = b"", list[int]()
    for now_ns, piece in pieces:
        seen += piece
        arrivals += [now_ns] * (len(messages_of(seen)) - len(arrivals))
    messages = messages_of(seen)
    if whole:
        messages = messages_of(seen + b"\n\n")
        arrivals += [pieces[-1][0]] * (len(messages) - len(arrivals)) if pieces else []
    return _meaning([(now_ns, *message) for now_ns, message in zip(arrivals, messages, strict=True)])


def _meaning(messages: list[tuple[int, str, str]]) -> CompletionStream:
    payloads: list[tuple[int, dict[str, Any]]] = []
    error = None
    for now_ns, data, event in messages:
        if data.strip(" \t\n\r\v\f") == "[DONE]":
            continue
        payload, error = _judge(data, event)
        if payload is not None:
            payloads.append((now_ns, payload))
        if error is not None:
            break
    usages = [payload for _, payload in payloads if isinstance(payload.get("usage"), dict)]
    usage = usages[-1]["usage"] if usages else {}
    details = usage.get("prompt_tokens_details")
    named = [name for _, payload in payloads if isinstance(name := payload.get("system_fingerprint"), str) and name]
    chunks = _chunks(payloads)
    reasons = [reason for _, first, _ in chunks if isinstance(reason := first.get("finish_reason"), str)]
    return CompletionStream(
        chunk_ns=tuple(now_ns for now_ns, _, _ in chunks),
        chunk_tokens=_tokens(chunks),
        text=_without_surrogates("".join(_text(first) for _, first, _ in chunks)),
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        cached_tokens=_count(details, "cached_tokens"),
        system_fingerprint=_without_surrogates(named[0]) if named else None,
        server_timings=_timings(usages[-1].get("metrics") if usages else None),
        finish_reason=_without_surrogates(reasons[-1]) if reasons else None,
        error=error,
    )


def _judge(data: str, event: str) -> tuple[Any, str | None]:
    try:
        payload = json.loads(data)
    except (ValueError, RecursionError):
        payload = None
    if not isinstance(payload, dict):
        return None, f"a message of the stream is not a JSON object: {_short(data)!r}"
    if payload.get("error") or event == "error":
        words = payload.get("error") or payload
        if isinstance(words, dict) and isinstance(words.get("message"), str):
            words = words["message"]
        shown = _without_surrogates(words) if isinstance(words, str) else _short(json.dumps(words))
        return None, f"error in the stream: {shown}"
    choices = payload.get("choices")
    if choices and not (isinstance(choices, list) and isinstance(choices[0], dict)):
        words = f"choices of a message is not a list of objects: {_short(json.dumps(choices))}"
        return {**payload, "choices": None}, words  # what else the message said still counts
    return payload, None


def _chunks(payloads: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any], Any]]:
    """Arrival, first choice and usage of each message that counts."""
    chunks, opened = [], set[int]()
    for now_ns, payload in payloads:
        choices = payload.get("choices")
        if not choices:
            continue
        if all(_names_role_only(choice) for choice in choices):
            indices = {_count(choice, "index") or 0 for choice in choices}
            if indices - opened:
                opened |= indices
                continue
        chunks.append((now_ns, choices[0], payload.get("usage")))
    return chunks


def _names_role_only(choice: Any) -> bool:
    if not isinstance(choice, dict) or not isinstance(choice.get("delta"), dict) or choice.get("finish_reason"):
        return False
    return "role" in choice["delta"] and not any(value for name, value in choice["delta"].items() if name != "role")


def _tokens(chunks: list[tuple[int, dict[str, Any], Any]]) -> tuple[int, ...] | None:
    tokens, totals = [], dict[int, int]()
    for _, first, usage in chunks:
        index, total = _count(first, "index") or 0, _count(usage, "completion_tokens")
        if total is None or total < totals.get(index, 0):
            return None
        tokens.append(total - totals.get(index, 0))
        totals[index] = total
    return tuple(tokens) or None


def _text(choice: dict[str, Any]) -> str:
    text = choice["delta"].get("content") if isinstance(choice.get("delta"), dict) else choice.get("text")
    return text if isinstance(text, str) else ""


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and 0 <= value < 2**63 else None


def _timings(metrics: Any) -> ServerTimings | None:
    if not isinstance(metrics, dict):
        return None
    values: list[float | None] = []
    for name in ("queue_time_ms", "time_to_first_token_ms", "generation_time_ms"):
        value: Any = metrics.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        values.append(float(value) if is_number and -(2**63) < value < 2**63 else None)  # NaN is in no range
    if values == [None, None, None]:
        return None
    return ServerTimings(queue_ms=values[0], prefill_ms=values[1], generation_ms=values[2])


def _without_surrogates(text: str) -> str:
    def joined(pair: re.Match[str]) -> str:
        high, low = map(ord, pair[0])
        return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))

    text = re.sub("[\ud800-\udbff][\udc00-\udfff]", joined, text)
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:200] + " ..."
