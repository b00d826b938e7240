from __future__ import annotations

import json
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, combinations, pairwise
from pathlib import Path
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
from pytest_gpulayout.trace import ServerTimings
from tests.support import sse_reference

RECORDED = sorted(Path(__file__).parents[1].joinpath("data", "sse").glob("*.sse"))
FINGERPRINT = "vllm-0.32.0-tp2-4f1c9a07"
TIMINGS = ServerTimings(queue_ms=3.125, prefill_ms=41.25, generation_ms=60.5)


def parse(*pieces: bytes) -> list[SseMessage]:
    parser = SseParser()
    return [message for piece in pieces for message in parser.feed(piece)] + parser.close()


def texts(messages: list[SseMessage]) -> list[str]:
    return [data.decode("utf-8", "replace") for data, _ in messages]


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
        pytest.param(
            "data: a\u2028b\x85c\x0bd\x0c\n\n".encode(), ["a\u2028b\x85c\x0bd\x0c"], id="line ends of others"
        ),
        pytest.param(
            b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", ["b"], id="only one byte order mark is skipped"
        ),
        pytest.param(b"data: a\n\n\xef\xbb\xbfdata: b\n\n", ["a"], id="byte order mark elsewhere"),
        pytest.param(b"data: \xff\n\n", ["\ufffd"], id="not UTF-8"),
        pytest.param(b"", [], id="nothing"),
    ],
)
def test_messages_of_a_stream_cut_nowhere_and_after_every_byte(stream: bytes, expected: list[str]) -> None:
    assert texts(parse(stream)) == expected
    assert texts(parse(*(bytes([byte]) for byte in stream))) == expected


def test_event_type_belongs_to_one_message() -> None:
    assert parse(b"event: error\ndata: a\n\ndata: b\n\n") == [(b"a", b"error"), (b"b", b"")]
    assert parse(b"event: error\n\ndata: b\n\n") == [(b"b", b"")]


def test_a_message_is_complete_with_the_first_byte_that_ends_it() -> None:
    parser = SseParser()
    assert parser.feed(b"data: a\r") == []
    assert parser.feed(b"\n\r") == [(b"a", b"")]
    assert parser.feed(b"\n") == []
    assert parser.feed(b"") == []
    assert parser.close() == []


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


def comparable(stream: CompletionStream) -> CompletionStream:
    """The same with tuples, which are equal to tuples."""
    tokens = stream.chunk_tokens
    return replace(stream, chunk_ns=tuple(stream.chunk_ns), chunk_tokens=None if tokens is None else tuple(tokens))


def read(*pieces: bytes, whole: bool = True) -> CompletionStream:
    """Read pieces that arrive at 1, 2, 3 ... ns."""
    return comparable(read_completion_stream(enumerate(pieces, start=1), whole=whole))


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


def test_a_role_that_comes_with_every_message_hides_only_the_first() -> None:
    role = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    other = event({"choices": [{"index": 1, "delta": {"role": "assistant", "content": ""}}]})
    last = event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": "stop"}]})
    assert read(role, other, role, last).chunk_ns == (3, 4)
    assert read(last).chunk_ns == (1,)


def test_tokens_of_each_chunk_come_from_continuous_usage() -> None:
    one, three = (text_chunk("x", usage={"completion_tokens": n}) for n in (1, 3))
    assert read(one, three).chunk_tokens == (1, 2)
    assert read(one, text_chunk("x")).chunk_tokens is None
    assert read(three).chunk_tokens == (3,)
    assert read(three, one).chunk_tokens is None
    assert read(one, text_chunk("x", usage={"completion_tokens": 2**63})).chunk_tokens is None


def test_tokens_of_a_count_that_is_said_too_late_are_not_guessed() -> None:
    assert read(text_chunk("x"), text_chunk("x", usage={"completion_tokens": 2})).chunk_tokens is None


def test_instants_and_tokens_are_compact() -> None:
    stream = read_completion_stream([(2**62, text_chunk("x", usage={"completion_tokens": 1}))])
    assert isinstance(stream.chunk_ns, array)
    assert isinstance(stream.chunk_tokens, array)
    assert (list(stream.chunk_ns), list(stream.chunk_tokens)) == ([2**62], [1])


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (event({"error": {"message": "out of memory", "code": 500}}), "error in the stream: out of memory"),
        (event({"error": "Unauthorized"}), "error in the stream: Unauthorized"),
        (b'event: error\ndata: {"message": "gone"}\n\n', "error in the stream: gone"),
        (b"data: {oops\n\n", "a message of the stream is not a JSON object: '{oops'"),
        (b"data: [1]\n\n", "a message of the stream is not a JSON object: '[1]'"),
        (event({"choices": ["x"]}), 'choices of a message is not a list of objects: ["x"]'),
        (b"data: \n\n", "a message of the stream is not a JSON object: ''"),
        (b"data: [DONE]x\n\n", "a message of the stream is not a JSON object: '[DONE]x'"),
        (b"data: " + b"[" * 3000 + b"\n\n", "a message of the stream is not a JSON object: '" + "[" * 200 + " ...'"),
        (event({"error": "\ud83d!"}), "error in the stream: \ufffd!"),
        (event({"choices": {"text": "x"}}), 'choices of a message is not a list of objects: {"text": "x"}'),
    ],
)
def test_errors_of_a_stream_keep_what_came_before(stream: bytes, error: str) -> None:
    result = read(text_chunk("a"), stream, text_chunk("b"), DONE)
    assert result.error == error
    assert result.chunk_ns == (1,)


def test_an_error_that_is_nested_deeply_is_an_error_nevertheless() -> None:
    error = read(b'data: {"error":' + b'{"a":' * 1000 + b"1" + b"}" * 1001 + b"\n\n").error
    # How deep the standard library can write depends on the version of Python.
    assert error in (
        "error in the stream: (nested too deeply to be shown)",
        "error in the stream: " + '{"a": ' * 33 + '{" ...',
    )


NO_COUNTS: tuple[object, ...] = (None, True, -1, 2.0, "2", [2], 2**63, 2**64, 10**400)
NO_TIMES: tuple[object, ...] = (None, True, "1", [], float("nan"), float("inf"), 10**400)
NO_METRICS: tuple[object, ...] = (None, 7, [], {})
NO_INDICES: tuple[object, ...] = (None, "0", [0], {}, 10**400)
NO_DELTAS: tuple[object, ...] = (None, 7, [], {}, {"content": 7}, {"role": None})


@pytest.mark.parametrize(
    "payload",
    [
        *({}, {"choices": None}, {"choices": [], "usage": 7}, {"choices": [{"text": 7}], "system_fingerprint": 7}),
        *({"usage": {"completion_tokens": value}} for value in NO_COUNTS),
        *({"usage": {}, "metrics": value} for value in NO_METRICS),
        *({"usage": {}, "metrics": {"queue_time_ms": value}} for value in NO_TIMES),
        *({"choices": [{"text": "", "index": value}]} for value in NO_INDICES),
        *({"choices": [{"delta": value, "finish_reason": 7}]} for value in NO_DELTAS),
    ],
)
def test_odd_fields_are_no_reason_to_crash(payload: dict[str, object]) -> None:
    result = read(event(payload))
    assert (result.error, result.completion_tokens, result.system_fingerprint) == (None, None, None)
    assert (result.text, result.server_timings, result.finish_reason) == ("", None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (rb"\ud83d\ude42", "🙂"),
        (rb"\ud83d", "\ufffd"),
        (rb"\ude42\ud83d", "\ufffd\ufffd"),
        (b"\xff", "\ufffd"),
        ("Grüße".encode(), "Grüße"),
    ],
)
def test_text_can_be_written_to_a_file_whatever_was_sent(text: bytes, expected: str) -> None:
    assert read(b'data: {"choices": [{"text": "' + text + b'"}]}\n\n').text == expected


def test_a_letter_in_two_chunks_becomes_whole() -> None:
    first, second = (b'data: {"choices": [{"text": "' + half + b'"}]}\n\n' for half in (rb"\ud83d", rb"\ude42"))
    assert read(first, second).text == "🙂"


def test_numbers_that_are_no_json_are_read_as_servers_mean_them() -> None:
    chunk = b'data: {"choices": [{"text": "a", "logprobs": {"token_logprobs": [NaN, -Infinity]}}]}\n\n'
    assert (read(chunk).text, read(chunk).error) == ("a", None)


@pytest.mark.parametrize(
    "done", [b"data: [DONE]\n\n", b"data:[DONE]\r\n\r\n", b"data:  [DONE] \n\n", b"data: [DONE]"]
)
def test_the_end_is_known_in_any_spelling(done: bytes) -> None:
    assert read(text_chunk("a"), done) == read(text_chunk("a"))


def test_the_first_fingerprint_and_the_last_numbers_count() -> None:
    def told(name: str, number: int) -> bytes:
        return event(
            {"usage": {"prompt_tokens": number}, "metrics": {"queue_time_ms": number}, "system_fingerprint": name}
        )

    stream = read(told("", 1), told("a", 2), told("b", 3), event({"usage": 4, "metrics": {}}))
    assert (stream.system_fingerprint, stream.prompt_tokens) == ("a", 3)
    assert stream.server_timings == ServerTimings(queue_ms=3.0)


def test_metrics_that_say_only_some_timings() -> None:
    metrics = {"queue_time_ms": 3, "time_to_first_token_ms": None, "speculative_decoding": {"num_spec_tokens": 2}}
    last = event({"choices": [], "usage": {}, "metrics": metrics})
    assert read(last).server_timings == ServerTimings(queue_ms=3.0)
    del metrics["queue_time_ms"]
    assert read(event({"choices": [], "usage": {}, "metrics": metrics})).server_timings is None


def recorded(name: str) -> CompletionStream:
    """A recorded answer whose lines arrive at 1, 2, 3 ... ns."""
    lines = Path(RECORDED[0].parent, f"{name}.sse").read_bytes().splitlines(keepends=True)
    return read(*lines)


def test_recorded_completions() -> None:
    expected = CompletionStream(
        chunk_ns=(4, 6, 8),
        chunk_tokens=None,
        text=" Grüße, 🙂",
        prompt_tokens=5,
        completion_tokens=3,
        cached_tokens=4,
        system_fingerprint=FINGERPRINT,
        server_timings=TIMINGS,
        finish_reason="length",
        error=None,
    )
    assert recorded("completion") == expected
    continuous = replace(expected, text="a b c d e", completion_tokens=6, cached_tokens=None, server_timings=None)
    assert recorded("completion_continuous_usage") == replace(continuous, chunk_ns=(2, 4, 8), chunk_tokens=(3, 1, 2))
    two = replace(continuous, text="axby", chunk_ns=(2, 4, 6, 8), chunk_tokens=(1, 2, 2, 1))
    assert recorded("completion_two_choices") == two


def test_recorded_failure() -> None:
    stream = recorded("completion_error")
    assert (stream.error, stream.text) == ("error in the stream: Internal server error", "ab")
    assert (stream.chunk_ns, stream.completion_tokens, stream.finish_reason) == ((2, 4), None, None)


def test_recorded_chats() -> None:
    expected = CompletionStream(
        chunk_ns=(4, 6, 8),
        chunk_tokens=None,
        text="Hello!",
        prompt_tokens=9,
        completion_tokens=3,
        system_fingerprint=FINGERPRINT,
        server_timings=TIMINGS,
        finish_reason="stop",
        error=None,
    )
    assert recorded("chat") == expected
    continuous = replace(expected, text="Hi.", server_timings=None, finish_reason="length", chunk_tokens=(2, 1))
    assert recorded("chat_continuous_usage") == replace(continuous, chunk_ns=(4, 6))
    tool = recorded("chat_reasoning_and_tool")
    assert (tool.text, tool.chunk_ns, tool.finish_reason) == ("ok", (4, 6, 8, 10, 12), "tool_calls")
    assert (tool.system_fingerprint, tool.prompt_tokens) == (FINGERPRINT, None)


def expected_of(stream: bytes, *, whole: bool) -> CompletionStream:
    """What the reference reads when byte n arrives at n ns, from 1."""
    return sse_reference.read([(at, bytes([byte])) for at, byte in enumerate(stream, start=1)], whole=whole)


def assert_cut_reads_like(stream: bytes, expected: CompletionStream, cuts: Sequence[int], *, whole: bool) -> None:
    """Compare with one reading byte by byte, each byte of which now arrives with its piece."""
    pieces = [stream[a:b] for a, b in pairwise([0, *cuts, len(stream)])]
    ends = list(accumulate(map(len, pieces)))
    arrivals = tuple(bisect_left(ends, at) + 1 for at in expected.chunk_ns)
    assert read(*pieces, whole=whole) == replace(expected, chunk_ns=arrivals), cuts


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_streams_cut_at_any_place(path: Path, line_end: bytes) -> None:
    stream = path.read_bytes().replace(b"\n", line_end)
    expected = expected_of(stream, whole=True)
    assert expected.chunk_ns
    for cut in range(len(stream) + 1):
        assert_cut_reads_like(stream, expected, [cut], whole=True)
    assert_cut_reads_like(stream, expected, range(1, len(stream)), whole=True)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_streams_that_end_at_any_place(path: Path) -> None:
    stream = path.read_bytes()
    for end in range(0, len(stream), 7):
        for whole in (True, False):
            pieces = [(1, stream[: end // 2]), (2, stream[end // 2 : end])]
            assert comparable(read_completion_stream(pieces, whole=whole)) == sse_reference.read(pieces, whole=whole)


SHORT = (
    '\ufeff: hi\r\nevent: x\r\ndata: {\r\ndata:"choices": [{"text": "é🙂"}]}\r\n\r\n'
    'data:{"choices":[{"text":"b"}]}\r\rdata: [DONE]\n\n',
    'data: {"choices":[{"text":"a"}]}\n\ndata: {"choices":[{"text":"ü"}]}\n\n: x\n\ndata: {"choices":[{}]}',
    'data: {"choices":[{"text":"a"}]}\n\nevent: error\ndata: {"message":"gone"}\n\ndata: [DONE]\n\n',
)


@pytest.mark.parametrize("text", SHORT, ids=["all forms", "plain", "error"])
@pytest.mark.parametrize("whole", [True, False])
def test_short_streams_cut_at_any_two_places(text: str, whole: bool) -> None:
    stream = text.encode()
    expected = expected_of(stream, whole=whole)
    for cuts in combinations(range(len(stream)), 2):
        assert_cut_reads_like(stream, expected, cuts, whole=whole)


def test_a_message_in_very_many_pieces_is_put_together_once() -> None:
    text = "x" * 300_000
    stream = text_chunk(text)
    assert read(*(stream[at : at + 3] for at in range(0, len(stream), 3))).text == text


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
