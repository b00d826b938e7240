"""From an exchange that has ended to the trace of a request: what was said, and whether that is what was asked for.

Knows the rules by which a request has failed. Leaves the messages of the stream to
:mod:`~pytest_gpulayout.adapters.sse`.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

from pytest_gpulayout.adapters.http_exchange import Exchange
from pytest_gpulayout.adapters.sse import CompletionStream, read_completion_stream
from pytest_gpulayout.trace import RequestTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What the server must count.

    :param output_tokens: in each answer. :param exact_output: or up to so many, and at least one.
    :param prompt_tokens: in each prompt; ``None`` where only the server knows.
    """

    output_tokens: int
    exact_output: bool
    prompt_tokens: int | None


def trace_of(exchange: Exchange, expected: Expectation, *, batch: int, worker: int) -> RequestTrace:
    """Read an answer.

    :param exchange: one that has ended. :param worker: number of the process that sent it.
    """
    is_stream = exchange.status == HTTPStatus.OK
    stream = read_completion_stream(exchange.pieces() if is_stream else (), whole=exchange.error is None)
    # A server that fails in the middle of an answer says why and then hangs up: both belong to the story.
    error = "; ".join(text for text in (stream.error, exchange.http_error()) if text) or None
    prompt_tokens = stream.prompt_tokens
    return RequestTrace(
        index=exchange.index,
        batch=batch,
        prompt_tokens=(expected.prompt_tokens or 0) if prompt_tokens is None else prompt_tokens,
        output_tokens=stream.completion_tokens or 0,
        send_ns=exchange.send_ns,
        sent_ns=exchange.sent_ns,
        intended_ns=exchange.intended_ns,
        queued_ns=exchange.queued_ns,
        connect_ns=exchange.connect_ns,
        first_byte_ns=exchange.first_byte_ns,
        chunk_ns=stream.chunk_ns,
        end_ns=exchange.end_ns,
        chunk_tokens=stream.chunk_tokens,
        error=error or _complaint(stream, expected),
        system_fingerprint=stream.system_fingerprint,
        text=stream.text,
        worker=worker,
        request_id=exchange.request_id,
        server=stream.server_timings,
    )


def _complaint(stream: CompletionStream, expected: Expectation) -> str | None:
    """Why an answer that is whole is none, or not the one that was asked for."""
    asked, counted = expected.output_tokens, stream.completion_tokens
    fewest, sent = asked if expected.exact_output else 1, expected.prompt_tokens
    if counted is None or not fewest <= counted <= asked:
        told = "no usage at all" if counted is None else f"{counted}"
        limit = f"{asked}" if expected.exact_output else f"1 to {asked}"
        return f"{limit} completion tokens were asked for, the server counted {told}"
    if not stream.chunk_ns:
        return "the answer has no chunk with choices"
    if None not in (sent, stream.prompt_tokens) and sent != stream.prompt_tokens:
        return f"{sent} prompt tokens were sent, the server counted {stream.prompt_tokens}"
    return None
