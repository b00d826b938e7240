"""Streams in every dress the standard allows, damaged, cut anywhere: read as the slow reference reads them.

``GPULAYOUT_FUZZ=100000`` makes that many streams; each is made from its number, so that a failure can be repeated.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from pytest_gpulayout.adapters.sse import CompletionStream, read_completion_stream
from tests.support import sse_reference

COUNT = int(os.environ.get("GPULAYOUT_FUZZ", "500"))
SHARE = 4
"""The numbers are dealt out to as many tests, which can run beside each other."""

Pieces = list[tuple[int, bytes]]

TEXTS = ("", "a", " word", "Grüße", "🙂", '"\\', "\u2028", "\x85", "\x0b\x0c", "data: x", "line\nend", "x" * 300)
ODD_VALUES: tuple[object, ...] = (
    None,
    7,
    -1,
    2**63,
    2**70,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    True,
    "",
    "x",
    "\ud83d",
    [],
    {},
    [[]],
)
ODD_MESSAGES: tuple[bytes, ...] = (
    *(
        b"",
        b" ",
        b"[DONE]",
        b" [DONE] ",
        b"[DONE]x",
        b"{",
        b"{oops",
        b"[1]",
        b"7",
        b"null",
        b"NaN",
        b'"[DONE]"',
        b"{}",
    ),
    *(b'{"choices": []}', b'{"choices": ["x"]}', b'{"choices": [{}, "x"]}', b'{"choices": {"text": "x"}}'),
    *(
        b'{"choices": [{"text": "\\ud83d"}]}',
        b'{"choices": [{"text": "\\ude42"}]}',
        b'{"choices": [{"text": "\xff"}]}',
    ),
    *(b'{"error": {"message": "gone", "code": 500}}', b'{"error": "gone"}', b'{"error": null}', b'{"message": "x"}'),
    *(
        b"[" * 3000,
        b'{"a":' * 600 + b"1" + b"}" * 600,
        b'{"choices": [{"text": "a\tb"}]}',
        b'{"n": 1e999}',
        b"\xef\xbb\xbf{}",
    ),
)
BETWEEN: tuple[bytes, ...] = (
    *(
        b": ping",
        b":",
        b": keep-alive",
        b"id: 7",
        b"retry: 10",
        b"id",
        b"news: x",
        b"Data: x",
        b" data: x",
        b"datax: 1",
    ),
    *(b"event: message", b"event:", "ä: ü".encode(), b"\xff\xfe", b"\x00"),
)
WORDS: tuple[bytes, ...] = (
    *(
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"\r\r",
        b"data: ",
        b"data:",
        b"data",
        b": ",
        b"event: error\n",
        b"\xef\xbb\xbf",
    ),
    *(
        b"\xff",
        b"\xc3",
        b"\xf0\x9f",
        b"\x00",
        b"9" * 25,
        b"-",
        b'"',
        b"\\",
        b"\\ud83d",
        b"{",
        b"}",
        b"[",
        b"]",
        b"NaN",
    ),
)


@dataclass(frozen=True, slots=True)
class Message:
    """What one message of a server says. :param tokens: of the answer so far."""

    payload: dict[str, object]
    tokens: int
    text: str = ""
    is_chunk: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole one. :param continuous: each message tells the tokens so far."""

    messages: list[Message]
    continuous: bool


def healthy_answer(dice: random.Random) -> Answer:
    """An answer as vLLM sends it, with usage in each message or only at the end."""
    is_chat, continuous, tokens, messages = dice.random() < 0.5, dice.random() < 0.5, 0, list[Message]()
    if is_chat:
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}}
        messages.append(Message({"choices": [role], **usage(continuous, 0)}, 0, is_chunk=False))
    for _ in range(dice.randrange(5)):
        text = dice.choice(TEXTS)
        tokens += dice.choice((1, 1, 1, 0, 2, 5))
        kind = dice.choice(("content", "content", "reasoning", "reasoning_content"))
        choice = {"delta": {kind: text}} if is_chat else {"text": text}
        payload = {"choices": [{"index": 0, **choice}], **usage(continuous, tokens)}
        messages.append(Message(payload, tokens, text if kind == "content" or not is_chat else ""))
    last: dict[str, object] = {"choices": [], **usage(True, tokens), "system_fingerprint": "vllm-0.32.0-tp2"}
    if dice.random() < 0.5:
        last["metrics"] = {"queue_time_ms": dice.random(), "time_to_first_token_ms": 1, "generation_time_ms": None}
    return Answer([*messages, Message(last, tokens, is_chunk=False)], continuous)


def usage(is_there: bool, tokens: int) -> dict[str, object]:
    return {"usage": {"prompt_tokens": 5, "completion_tokens": tokens}} if is_there else {}


def odd_payload(dice: random.Random, payload: dict[str, object]) -> dict[str, object]:
    """Put a wrong value somewhere into a message."""
    value, place = dice.choice(ODD_VALUES), dice.randrange(6)
    counts = {
        name: dice.choice((value, 3)) for name in ("prompt_tokens", "completion_tokens", "prompt_tokens_details")
    }
    timings = {name: dice.choice((value, 3)) for name in ("queue_time_ms", "time_to_first_token_ms")}
    choice = {dice.choice(("index", "text", "delta", "finish_reason")): value, dice.choice(("text", "index")): 1}
    role = {"index": dice.randrange(2), "delta": {"role": "assistant", "content": dice.choice((value, ""))}}
    return {
        0: {**payload, dice.choice(("choices", "usage", "metrics", "system_fingerprint", "error")): value},
        1: {**payload, "usage": {**counts, "prompt_tokens_details": {"cached_tokens": value}}},
        2: {**payload, "usage": counts, "metrics": timings},
        3: {**payload, "choices": [choice]},
        4: {**payload, "choices": [role]},
        5: {**payload, "choices": [role, dice.choice((choice, role, value))]},
    }[place]


@dataclass(frozen=True, slots=True)
class Dress:
    """How messages become bytes. :param ends: of lines. :param noise: share of lines behind one without meaning."""

    ends: tuple[bytes, ...]
    prefix: bytes
    noise: float
    indent: int | None
    ascii_only: bool

    def put_on(self, dice: random.Random, data: bytes, event: bytes = b"") -> bytes:
        lines = [self.prefix + line for line in data.split(b"\n")]
        if event:
            lines.insert(dice.randrange(len(lines) + 1), b"event: " + event)
        dressed = b""
        for line in [*lines, b""]:
            while line and dice.random() < self.noise:
                dressed += dice.choice(BETWEEN) + dice.choice(self.ends)
            dressed += line + dice.choice(self.ends)
        return dressed

    def encode(self, payload: object) -> bytes:
        text = json.dumps(payload, indent=self.indent, ensure_ascii=self.ascii_only)
        return text.encode("utf-8", "replace")


PLAIN = Dress((b"\n",), b"data: ", 0.0, None, ascii_only=False)


def any_dress(dice: random.Random) -> Dress:
    if dice.random() < 0.3:
        return PLAIN
    return Dress(
        dice.choice(((b"\n",), (b"\r\n",), (b"\r",), (b"\n", b"\r\n"), (b"\r\n", b"\r"))),  # CR, LF would be one end
        dice.choice((b"data: ", b"data:")),
        dice.choice((0.0, 0.1, 0.4)),
        dice.choice((None, None, 1)),
        dice.random() < 0.5,
    )


def head(dice: random.Random) -> bytes:
    return dice.choice((b"", b"", b"\xef\xbb\xbf", b"\n", b": hello\n\n"))


def odd_stream(dice: random.Random) -> bytes:
    """An answer in which messages are odd, foreign, missing or twice there, and bytes may be damaged."""
    dress, stream = any_dress(dice), head(dice)
    for message in healthy_answer(dice).messages:
        data = dress.encode(odd_payload(dice, message.payload) if dice.random() < 0.3 else message.payload)
        if dice.random() < 0.15:
            data = dice.choice(ODD_MESSAGES)
        event = b"error" if dice.random() < 0.03 else b""
        stream += dress.put_on(dice, data, event) * dice.choice((1, 1, 1, 1, 0, 2))
    for _ in range(dice.choice((0, 0, 1, 2, 5))):
        stream = damage(dice, stream)
    return stream


def damage(dice: random.Random, stream: bytes) -> bytes:
    a, b = sorted((dice.randrange(len(stream) + 1), dice.randrange(len(stream) + 1)))
    b = min(b, a + dice.choice((1, 3, 30)))
    middle = dice.choice((b"", stream[a:b] * 2, dice.choice(WORDS), bytes([dice.randrange(256)])))
    return stream[:a] + middle + stream[b:] if dice.random() < 0.9 else stream[:b]


def cut(dice: random.Random, stream: bytes) -> Pieces:
    """Pieces that arrive at 10, 20, 30 ... ns, some of them empty; cuts like line ends and the middle of letters."""
    tender = [at for at, byte in enumerate(stream) if byte in b"\r\n" or byte > 0x7F]
    cuts = [dice.randrange(len(stream) + 1) for _ in range(dice.choice((0, 1, 2, 6)))]
    if tender:
        cuts += [dice.choice(tender) + dice.randrange(2) for _ in range(dice.choice((0, 1, 3)))]
    ends = [0, *sorted(cuts), len(stream)]
    return [(10 * number, stream[a:b]) for number, (a, b) in enumerate(pairwise(ends), start=1)]


def comparable(stream: CompletionStream, *, exact: bool) -> CompletionStream:
    """Sequences as tuples. :param exact: numbers in quotations look the same, whichever reader decoded them."""
    tokens = stream.chunk_tokens
    return replace(
        stream,
        chunk_ns=tuple(stream.chunk_ns),
        chunk_tokens=None if tokens is None else tuple(tokens),
        error=stream.error if exact or stream.error is None else stream.error.partition(":")[0],
    )


def numbers(share: int) -> Iterator[tuple[int, random.Random]]:
    for number in range(share, COUNT, SHARE):
        yield number, random.Random(number)


SHARES = pytest.mark.parametrize("share", range(SHARE))


@SHARES
def test_any_stream_reads_as_the_reference_reads_it(share: int) -> None:
    for number, dice in numbers(share):
        stream = odd_stream(dice)
        pieces, whole = cut(dice, stream), dice.random() < 0.7
        exact = not re.search(rb"\d{19}", stream)  # orjson decodes larger integers as floats

        found = comparable(read_completion_stream(pieces, whole=whole), exact=exact)

        assert found == comparable(sse_reference.read(pieces, whole=whole), exact=exact), (number, pieces)
        found.text.encode()


def arrival(pieces: Pieces, length: int) -> int:
    """When the first so many bytes of a stream had come."""
    for now_ns, piece in pieces:
        length -= len(piece)
        if length <= 0:
            return now_ns
    raise AssertionError("the stream is shorter")


@SHARES
def test_a_healthy_answer_is_understood_in_any_dress(share: int) -> None:
    for number, dice in numbers(share):
        answer, dress, stream, ends = healthy_answer(dice), any_dress(dice), head(dice), list[int]()
        for message in answer.messages:
            stream += dress.put_on(dice, dress.encode(message.payload))
            if message.is_chunk:
                ends.append(len(stream) - stream.endswith(b"\r\n"))  # CR has ended the line, LF brings nothing new
        pieces = cut(dice, stream + dress.put_on(dice, b"[DONE]"))
        totals = [0, *(message.tokens for message in answer.messages if message.is_chunk)]
        steps = tuple(after - before for before, after in pairwise(totals))

        found = read_completion_stream(pieces)

        assert found.error is None, (number, pieces)
        assert found.text == "".join(message.text for message in answer.messages), (number, pieces)
        assert tuple(found.chunk_ns) == tuple(arrival(pieces, end) for end in ends), (number, pieces)
        assert tuple(found.chunk_tokens or ()) == (steps if answer.continuous else ()), (number, pieces)
        assert (found.prompt_tokens, found.completion_tokens) == (5, totals[-1]), (number, pieces)
