"""The requests that a workload makes: endless, encoded, and the same for the same seed.

Knows the fields of ``/v1/completions``, ``/v1/chat/completions`` and ``/tokenize`` (vLLM 0.32) and how to hit a
length exactly. Leaves sending to the load driver, which hands in the one call that is needed here, and words and
their lengths to :mod:`~pytest_gpulayout.prompt_words`.

Random prompts of the completions API are token ids, which have their length by construction. A chat has none before
the server's template was applied, so each is composed of words whose lengths are known and then checked with
``/tokenize``: one call for each word of the vocabulary at the start, and about one for each prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import orjson

from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.prompt_words import COMMON_WORDS, MANY_WORDS, OPENING, Vocabulary
from pytest_gpulayout.workload import Workload

Post = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Takes a path and a JSON body and returns the JSON answer; raises ``MeasurementError`` unless it is HTTP 200."""

_PATH = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_FEWEST_TOKEN_IDS = 16
_SEED_MASK = 0x7FFF_FFFF
_NONCE_BITS = 64
_REPEATS = 8
_FEWEST_WORDS = 8
# A tokenizer that joins words now and then needs a second try; one whose tokens never add up is told.
_MOST_TRIES = 16


@dataclass(frozen=True, slots=True)
class RequestSource:
    """Where a load driver gets its requests from.

    :param path: to POST them to. :param prompt_tokens: what the server must count in each prompt; ``None`` where
        only the server knows: for given texts and images.
    """

    path: str
    prompt_tokens: int | None
    _bodies: Iterator[bytes] = field(repr=False)

    def next_body(self) -> bytes:
        """Return the JSON body of the next request; there is always one, and no two have the same prompt."""
        return next(self._bodies)


def request_source(post: Post, model: str, workload: Workload, seed: int) -> RequestSource:
    """Prepare the requests of a workload.

    :param post: asks the server; used here and by :meth:`RequestSource.next_body` for chats of an exact length.
    :param model: the name it is served under. :param seed: of the prompts; another one makes other prompts.
    :raises MeasurementError: no ``/tokenize``, or prompts of this length cannot be made for this model.
    """
    maker = _PromptMaker(post, model, workload, Random(seed))
    constant = {"model": model, "seed": seed & _SEED_MASK, **_answer_fields(workload)}
    is_exact = workload.input_tokens is not None and workload.image is None
    return RequestSource(
        path=_PATH[workload.api],
        prompt_tokens=workload.input_tokens if is_exact else None,
        _bodies=_bodies(maker.prompts(), _formats(workload.response_schemas), constant, maker.salt),
    )


def _bodies(
    prompts: Iterator[dict[str, Any]],
    formats: Iterator[dict[str, Any]],
    constant: Mapping[str, Any],
    salt: Callable[[], dict[str, str]],
) -> Iterator[bytes]:
    for prompt, answer_format in zip(prompts, formats, strict=False):  # neither ends
        yield orjson.dumps({**prompt, **constant, **answer_format, **salt()})


def _answer_fields(workload: Workload) -> dict[str, Any]:
    """What each answer must be like; explicit where a model's ``generation_config.json`` could interfere.

    A grammar ends an answer by allowing nothing but the end of the text. ``min_tokens`` would forbid just that,
    and ``ignore_eos`` would let the model go on without the grammar (vLLM 0.32, ``vllm/v1/structured_output``).
    """
    fields: dict[str, Any] = {
        "max_tokens": workload.output_tokens,
        "temperature": 0,
        "repetition_penalty": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if workload.expects_exact_output:
        fields |= {"min_tokens": workload.output_tokens, "ignore_eos": True}
    return fields


def _formats(schemas: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield ``response_format`` of each request in turns; both APIs of vLLM know it."""
    if not schemas:
        return itertools.repeat({})
    return itertools.cycle(
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": f"schema_{number}", "schema": schema, "strict": True},
            }
        }
        for number, schema in enumerate(schemas)
    )


class _PromptMaker:
    """Makes the part of a request that differs from request to request."""

    def __init__(self, post: Post, model: str, workload: Workload, random: Random) -> None:
        self._tokenizer = _Tokenizer(post, model, workload)
        self._workload = workload
        self._random = random

    def salt(self) -> dict[str, str]:
        """Keep a prompt out of the prefix cache where even the first words of a chat template would be a hit."""
        return {} if self._workload.shares_prefix else {"cache_salt": self._nonce()}

    def prompts(self) -> Iterator[dict[str, Any]]:
        """Return endless prompts of the workload's kind, each as the field of the request it belongs in.

        :raises MeasurementError: none can be made.
        """
        if self._workload.api == "chat":
            texts = self._given_texts() if self._workload.prompts else self._chat_texts()
            return ({"messages": _messages(self._content(text))} for text in texts)
        if self._workload.prompts:
            return ({"prompt": text} for text in self._given_texts())
        known = self._tokenizer.ordinary_ids()
        count = self._workload.input_tokens or 0
        return ({"prompt": self._random.choices(known, k=count)} for _ in itertools.count())

    def _nonce(self) -> str:
        return f"{self._random.getrandbits(_NONCE_BITS):016x}"

    def _given_texts(self) -> Iterator[str]:
        """The user's texts in turns, each under a line of its own so that no two begin alike."""
        texts = itertools.cycle(self._workload.prompts)
        return texts if self._workload.shares_prefix else (f"[{self._nonce()}]\n{text}" for text in texts)

    def _chat_texts(self) -> Iterator[str]:
        chat = _ExactChat(self._tokenizer, self._workload, self._random)
        return (chat.next_text() for _ in itertools.count())

    def _content(self, text: str) -> str | list[dict[str, Any]]:
        if self._workload.image is None:
            return text
        from pytest_gpulayout.adapters.images import png_data_url  # loads Pillow

        image = {"url": png_data_url(self._workload.image, self._random)}
        return [{"type": "text", "text": text}, {"type": "image_url", "image_url": image}]


class _ExactChat:
    """Texts that make a chat of the wanted length, template included.

    The sum of the words' prices nearly always is right at the first try; each text is checked all the same, and what
    was wrong is learnt for the next.
    """

    def __init__(self, tokenizer: _Tokenizer, workload: Workload, random: Random) -> None:
        self._tokenizer = tokenizer
        self._workload = workload
        self._random = random
        self._wanted = workload.input_tokens or 0
        self._alone = self._template = tokenizer.chat_length(OPENING)
        self._vocabulary = Vocabulary(tokenizer.word_costs(COMMON_WORDS))

    def next_text(self) -> str:
        """Return a text of its own.

        :raises MeasurementError: the length cannot be hit.
        """
        lengths: list[int] = []
        for _ in range(_MOST_TRIES):
            text = self._vocabulary.compose(self._wanted - self._template, self._random)
            if text is None:
                break
            lengths.append(self._tokenizer.chat_length(text))
            if lengths[-1] == self._wanted:
                return text
            self._template += lengths[-1] - self._wanted
        raise self._fault(lengths)

    def _fault(self, lengths: Sequence[int]) -> MeasurementError:
        found = f"the chat template and one word alone are {self._alone} tokens"
        advice = f"raise input_tokens well above {self._alone}, or use the completions API"
        if lengths:
            found = f"texts of {', '.join(map(str, lengths))} tokens, chat template included"
            advice = "use the completions API, whose prompts are token ids, or give prompts of your own"
        return self._tokenizer.fault(
            f"workload {self._workload.name} needs chats of exactly {self._wanted} tokens", found, advice
        )


class _Tokenizer:
    """The server's own, over ``POST /tokenize`` (vLLM 0.32, ``vllm/entrypoints/serve/tokenize/protocol.py``)."""

    def __init__(self, post: Post, model: str, workload: Workload) -> None:
        self._post = post
        self._model = model
        self._workload = workload

    def ordinary_ids(self) -> tuple[int, ...]:
        """Return ids that are ordinary text in this model, each once, in order."""
        ids = tuple(dict.fromkeys(self._tokenize({"prompt": MANY_WORDS, "add_special_tokens": False})))
        if len(ids) < _FEWEST_TOKEN_IDS:
            raise self._useless(f"{len(ids)} different token ids, fewer than {_FEWEST_TOKEN_IDS}, in many words")
        return ids

    def word_costs(self, words: Sequence[str]) -> dict[str, int]:
        """Return the tokens of each word with the blank before it; words whose tokens do not add up are left out."""
        alone = self._text_length(OPENING)
        totals = {word: self._text_length(OPENING + _REPEATS * f" {word}") - alone for word in words}
        costs = {word: total // _REPEATS for word, total in totals.items() if total > 0 and total % _REPEATS == 0}
        if len(costs) < _FEWEST_WORDS:
            raise self._useless(f"{len(costs)} of {len(words)} words whose tokens add up")
        return costs

    def chat_length(self, text: str) -> int:
        """Return the tokens of a chat with this one message, as the template makes it."""
        return len(self._tokenize({"messages": _messages(text), "add_generation_prompt": True}))

    def _text_length(self, text: str) -> int:
        return len(self._tokenize({"prompt": text, "add_special_tokens": False}))

    def _tokenize(self, request: dict[str, Any]) -> list[int]:
        answer = self._post("/tokenize", {"model": self._model, **request})
        self._check_room(answer.get("max_model_len"))
        tokens = answer.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise self._useless(f"an answer without a list of tokens: {str(answer)[:200]}")
        return tokens

    def _check_room(self, most: object) -> None:
        needed = (self._workload.input_tokens or 0) + self._workload.output_tokens
        if isinstance(most, int) and needed > most:
            raise self.fault(
                f"workload {self._workload.name} needs room for {needed} tokens, prompt and answer",
                f"max_model_len = {most}",
                "raise --max-model-len of the server, or lower input_tokens or output_tokens of the workload",
            )

    def _useless(self, found: str) -> MeasurementError:
        return self.fault(
            "the server's POST /tokenize is needed to make prompts of an exact length",
            found,
            "use a vLLM server, and the name it serves the model under (curl URL/v1/models)",
        )

    def fault(self, required: str, found: str, advice: str) -> MeasurementError:
        """Return an error in its four parts."""
        return MeasurementError(f"{required}\n  found: {found}\n  for model {self._model}\n  {advice}")


def _messages(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]
