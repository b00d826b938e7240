from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulayout.adapters.sse import (
    CompletionStream,
    SseMessage,
    SseParser,
    error_message,
    read_completion_stream,
)


def parse(*pieces: bytes) -> list[SseMessage]:
    parser = SseParser()
    return [message for piece in pieces for message in parser.feed(piece)] + parser.close()


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        pytest.param(b"data: a\n\ndata: b\n\n", ["a", "b"], id="LF"),
        pytest.param(b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"], id="CRLF"),
        pytest.param(b"data: a\r\rdata: b\r\r", ["a", "b"], id="CR"),
        pytest.param(b"data: a\r\n\ndata: b\n\r\n", ["a", "b"], id="mixed line ends"),
        pytest.param(b"data: a\ndata: b\n\n", ["a\nb"], id="two data lines"),
        pytest.param(b": ping\n\ndata: a\n: in between\n\n", ["a"], id="comments"),
        pytest.param(b"data:a\n\ndata:  a\n\n", ["a", " a"], id="one blank after the colon belongs to the format"),
        pytest.param(b"data\n\n", [""], id="a field without a colon"),
        pytest.param(b"id: 7\nretry: 10\nnews: x\n\n", [], id="no data, no message"),
        pytest.param(b"\n\n\ndata: a\n\n\n\n", ["a"], id="empty lines"),
        pytest.param(b"\xef\xbb\xbfdata: a\n\n", ["a"], id="byte order mark"),
        pytest.param(b"data: a\n\ndata: b", ["a", "b"], id="the last blank line is missing"),
        pytest.param("data: Grüße 🙂\n\n".encode(), ["Grüße 🙂"], id="UTF-8"),
        pytest.param(b"data: \xff\n\n", ["\ufffd"], id="not UTF-8"),
        pytest.param(b"", [], id="nothing"),
    ],
)
def test_messages_of_a_stream_cut_nowhere_and_after_every_byte(stream: bytes, expected: list[str]) -> None:
    assert [message.data for message in parse(stream)] == expected
    assert [message.data for message in parse(*(bytes([byte]) for byte in stream))] == expected


def test_event_type_belongs_to_one_message() -> None:
    assert parse(b"event: error\ndata: a\n\ndata: b\n\n") == [SseMessage("a", "error"), SseMessage("b", "")]


def test_a_message_is_complete_with_the_first_byte_that_ends_it() -> None:
    parser = SseParser()
    assert parser.feed(b"data: a\r") == []
    assert parser.feed(b"\n\r") == [SseMessage("a")]
    assert parser.feed(b"\n") == []


LINES = st.lists(
    st.sampled_from(["data: a", "data: é🙂", "data:", ": ping", "event: error", "", "id: 1", "x"]), max_size=12
)


@given(lines=LINES, ends=st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=12, max_size=12), data=st.data())
def test_where_the_stream_is_cut_makes_no_difference(lines: list[str], ends: list[str], data: Any) -> None:
    stream = "".join(line + end for line, end in zip(lines, ends, strict=False)).encode()
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    pieces = [stream[a:b] for a, b in pairwise([0, *sorted(cuts), len(stream)])]
    assert parse(*pieces) == parse(stream)


def event(payload: object) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def text_chunk(text: str, **more: object) -> bytes:
    return event({"choices": [{"index": 0, "text": text}], **more})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}, "system_fingerprint": "vllm-1"})
DONE = b"data: [DONE]\n\n"


def read(*pieces: bytes, whole: bool = True) -> CompletionStream:
    """Read pieces that arrive at 1, 2, 3 ... ns."""
    return read_completion_stream(enumerate(pieces, start=1), whole=whole)


def test_an_answer_as_vllm_sends_it() -> None:
    assert read(text_chunk("a"), b": ping\n\n", text_chunk("b"), USAGE, DONE) == CompletionStream(
        chunk_ns=(1, 3),
        chunk_tokens=None,
        text="ab",
        prompt_tokens=5,
        completion_tokens=2,
        system_fingerprint="vllm-1",
        error=None,
    )


def test_a_chunk_arrives_with_its_last_byte() -> None:
    chunk = text_chunk("a")
    assert read(chunk[:10], chunk[10:-1], chunk[-1:] + chunk + chunk[:-1], chunk[-1:]).chunk_ns == (3, 3, 4)


def test_an_empty_text_is_a_chunk_and_the_role_of_the_chat_api_is_not() -> None:
    role = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    content = event({"choices": [{"delta": {"content": "hi"}}]})
    thought = event({"choices": [{"delta": {"role": "assistant", "reasoning": "hm"}}]})
    assert read(role, content, thought).chunk_ns == (2, 3)
    assert read(role, content).text == "hi"
    assert read(text_chunk("")).chunk_ns == (1,)


def test_tokens_of_each_chunk_come_from_continuous_usage() -> None:
    one, three = (text_chunk("x", usage={"completion_tokens": n}) for n in (1, 3))
    assert read(one, three).chunk_tokens == (1, 2)
    assert read(one, text_chunk("x")).chunk_tokens is None


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (event({"error": {"message": "out of memory", "code": 500}}), "error in the stream: out of memory"),
        (event({"error": "Unauthorized"}), "error in the stream: Unauthorized"),
        (b'event: error\ndata: {"message": "gone"}\n\n', "error in the stream: gone"),
        (b"data: {oops\n\n", "a message of the stream is not a JSON object: '{oops'"),
        (b"data: [1]\n\n", "a message of the stream is not a JSON object: '[1]'"),
        (event({"choices": ["x"]}), 'choices of a message is not a list of objects: ["x"]'),
        (event({"choices": {"text": "x"}}), 'choices of a message is not a list of objects: {"text": "x"}'),
    ],
)
def test_errors_of_a_stream_keep_what_came_before(stream: bytes, error: str) -> None:
    result = read(text_chunk("a"), stream, text_chunk("b"), DONE)
    assert result.error == error
    assert result.chunk_ns == (1,)


@pytest.mark.parametrize(
    "payload",
    [{}, {"choices": None}, {"choices": [], "usage": 7}, {"choices": [{"text": 7}], "system_fingerprint": 7}],
)
def test_odd_fields_are_no_reason_to_crash(payload: dict[str, object]) -> None:
    result = read(event(payload))
    assert (result.error, result.completion_tokens, result.system_fingerprint) == (None, None, None)


def test_an_unfinished_message_counts_only_in_a_whole_answer() -> None:
    half = text_chunk("a") + text_chunk("b")[:15]
    assert read(half, whole=False).error is None
    assert "not a JSON object" in str(read(half).error)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too long", "code": 400}}', "too long"),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b'{"object": "error", "message": "no such model"}', "no such model"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"detail": [{"loc": ["body"]}]}', '[{"loc": ["body"]}]'),
        (b'{"a": 1}', '{"a": 1}'),
        (b"<html>\n 502  Bad Gateway</html>", "<html> 502 Bad Gateway</html>"),
        (b"x" * 300, "x" * 200 + " ..."),
        (b"", "(no text)"),
    ],
)
def test_words_of_an_http_error(body: bytes, message: str) -> None:
    assert error_message(body) == message
