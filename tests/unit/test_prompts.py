"""Requests of a workload, against tokenizers that count in different ways."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from PIL import Image

from pytest_gpulayout.adapters.images import png_data_url
from pytest_gpulayout.adapters.prompts import RequestSource, request_source
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.prompt_words import COMMON_WORDS, OPENING, Vocabulary
from pytest_gpulayout.workload import ImageSize, Workload, find_workload, workload_from_mapping

Count = Callable[[str], list[int]]
TEMPLATE = "<|system|>You help.<|user|>{}<|assistant|>"
BASE: dict[str, Any] = {"name": "it", "output_tokens": 7, "concurrency": 2, "requests": 4}


def by_bytes(text: str) -> list[int]:
    return list(text.encode())


def by_words(text: str) -> list[int]:
    """A token for each word with the blank before it, and one for each special one, as most tokenizers do."""
    return [sum(part.encode()) for part in re.findall(r"<\|\w+\|>| ?[\w']+|\S", text)]


def by_words_joining_some(text: str) -> list[int]:
    """Words that are one token when they follow each other, so that prices alone do not add up."""
    return by_words(re.sub(r" the time| water people| second day", " joined", text))


class FakeTokenizer:
    """Answers ``/tokenize`` as vLLM does. :param count: of a text. :param most: ``max_model_len``."""

    def __init__(self, count: Count = by_words, most: int = 8192) -> None:
        self.count = count
        self.most = most
        self.requests: list[dict[str, Any]] = []

    def __call__(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert path == "/tokenize"
        assert body["model"] == "org/tiny"
        self.requests.append(body)
        if "messages" in body:
            assert body["add_generation_prompt"] is True
            tokens = self.chat(body["messages"])
        else:
            assert body["add_special_tokens"] is False
            tokens = self.count(body["prompt"])
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self.most}

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        [message] = messages
        return self.count(TEMPLATE.format(message["content"]))


def workload(**changes: Any) -> Workload:
    needs_length = not {"input_tokens", "prompts"} & changes.keys()
    return workload_from_mapping({**BASE, **({"input_tokens": 60} if needs_length else {}), **changes})


def source(load: Workload, tokenizer: FakeTokenizer | None = None, seed: int = 1) -> RequestSource:
    return request_source(tokenizer or FakeTokenizer(), "org/tiny", load, seed)


def bodies(requests: RequestSource, count: int) -> list[dict[str, Any]]:
    return [json.loads(requests.next_body()) for _ in range(count)]


def error_of(act: Callable[[], object]) -> list[str]:
    with pytest.raises(MeasurementError) as error:
        act()
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    return lines


# -- completions -------------------------------------------------------------------------------------------------


def test_completion_is_token_ids_of_the_exact_length_and_demands_the_exact_answer() -> None:
    requests = source(workload(), seed=2**40 + 5)
    [body] = bodies(requests, 1)

    assert (requests.path, requests.prompt_tokens) == ("/v1/completions", 60)
    assert len(body.pop("prompt")) == 60
    assert re.fullmatch("[0-9a-f]{16}", body.pop("cache_salt"))
    assert body == {
        "model": "org/tiny",
        "max_tokens": 7,
        "min_tokens": 7,
        "ignore_eos": True,
        "temperature": 0,
        "repetition_penalty": 1.0,
        "seed": 5,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


def test_token_ids_are_those_that_the_tokenizer_made_of_words() -> None:
    tokenizer = FakeTokenizer()
    found = bodies(source(workload(), tokenizer), 20)

    [request] = tokenizer.requests
    assert {token for body in found for token in body["prompt"]} <= set(by_words(request["prompt"]))


@pytest.mark.parametrize(
    "load",
    [
        workload(),
        workload(api="chat"),
        workload(api="chat", image={"width": 64, "height": 48}),
        workload(prompts=["Why?", "How?"]),
        workload(prompts=["Why?", "How?"], api="chat"),
    ],
    ids=["completions", "chat", "image", "given", "given chat"],
)
def test_same_seed_same_requests_and_never_the_same_prompt_twice(load: Workload) -> None:
    first, again, other = (bodies(source(load, seed=seed), 50) for seed in (3, 3, 4))

    assert first == again
    prompts = [json.dumps(body.get("prompt") or body["messages"]) for body in first + other]
    assert len(set(prompts)) == 100
    assert len({body["cache_salt"] for body in first + other}) == 100


def test_prompts_that_may_share_a_prefix_get_no_salt() -> None:
    assert "cache_salt" not in bodies(source(workload(shares_prefix=True)), 1)[0]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_too_little_room_is_told_before_anything_is_sent(api: str) -> None:
    tokenizer = FakeTokenizer(most=66)

    required, found, where, advice = error_of(lambda: source(workload(api=api), tokenizer))

    assert required == "workload it needs room for 67 tokens, prompt and answer"
    assert (found, where) == ("  found: max_model_len = 66", "  for model org/tiny")
    assert "--max-model-len" in advice
    assert source(workload(api=api), FakeTokenizer(most=67)).prompt_tokens == 60


def test_tokenizer_with_hardly_any_ids_is_told() -> None:
    lines = error_of(lambda: source(workload(), FakeTokenizer(lambda text: [len(word) for word in text.split()])))

    assert re.match("  found: [0-9]+ different token ids, fewer than 16, in many words", lines[1])


@pytest.mark.parametrize("answer", [{}, {"tokens": 5}, {"tokens": ["a"]}])
def test_answer_without_tokens_is_told(answer: dict[str, Any]) -> None:
    lines = error_of(lambda: request_source(lambda path, body: answer, "org/tiny", workload(), 1))

    assert lines[1] == f"  found: an answer without a list of tokens: {answer}"


# -- chat --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [by_bytes, by_words, by_words_joining_some])
@pytest.mark.parametrize("length", [120, 501])
def test_chat_has_its_exact_length_with_the_template(count: Count, length: int) -> None:
    tokenizer = FakeTokenizer(count)
    requests = source(workload(api="chat", input_tokens=length), tokenizer)

    assert (requests.path, requests.prompt_tokens) == ("/v1/chat/completions", length)
    for body in bodies(requests, 30):
        assert len(tokenizer.chat(body["messages"])) == length


@pytest.mark.parametrize("count", [by_bytes, by_words])
def test_chat_costs_one_call_for_each_prompt_and_one_for_each_word(count: Count) -> None:
    tokenizer = FakeTokenizer(count)

    bodies(source(workload(api="chat", input_tokens=400), tokenizer), 100)

    assert len(tokenizer.requests) <= 100 + len(COMMON_WORDS) + 2


def test_template_that_is_too_long_is_told() -> None:
    requests = source(workload(api="chat", input_tokens=5))

    required, found, _, advice = error_of(requests.next_body)

    assert required == "workload it needs chats of exactly 5 tokens"
    alone = len(by_words(TEMPLATE.format(OPENING)))
    assert found == f"  found: the chat template and one word alone are {alone} tokens"
    assert f"raise input_tokens well above {alone}" in advice


def test_length_that_no_sum_of_words_hits_is_told() -> None:
    pairs = FakeTokenizer(lambda text: by_words(text) * 2)

    lines = error_of(source(workload(api="chat", input_tokens=61), pairs).next_body)

    assert lines[0] == "workload it needs chats of exactly 61 tokens"


def test_lengths_that_never_come_out_are_told_with_what_came() -> None:
    class Drifting(FakeTokenizer):
        """One token more for the same text each time it is asked."""

        asked = 0

        def chat(self, messages: list[dict[str, Any]]) -> list[int]:
            self.asked += 1
            return super().chat(messages) + [0] * self.asked

    required, found, _, advice = error_of(source(workload(api="chat"), Drifting()).next_body)

    assert required == "workload it needs chats of exactly 60 tokens"
    assert found == f"  found: texts of {', '.join(['61'] * 16)} tokens, chat template included"
    assert "completions API" in advice


def test_words_whose_tokens_do_not_add_up_are_not_used() -> None:
    def odd_in_rows(text: str) -> list[int]:
        return by_words(text) + [0] * ("time time" in text)

    tokenizer = FakeTokenizer(odd_in_rows)
    contents = [body["messages"][0]["content"] for body in bodies(source(workload(api="chat"), tokenizer), 40)]

    assert not any("time" in content.split() for content in contents)


def test_tokenizer_with_hardly_any_word_that_adds_up_is_told() -> None:
    def odd(text: str) -> list[int]:
        return [*by_words(text), *([0] * (len(text) > 30))]

    lines = error_of(lambda: source(workload(api="chat"), FakeTokenizer(odd)))

    assert re.search("[0-7] of 40 words whose tokens add up", lines[1])


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 50])
def test_vocabulary_composes_what_can_be_bought(tokens: int) -> None:
    costs = {"aa": 3, "bb": 5}
    text = Vocabulary(costs).compose(tokens, Random(1))

    if tokens in (1, 2, 7):
        assert text is None
    else:
        assert text is not None
        assert text.split()[0] == OPENING
        assert sum(costs[word] for word in text.split()[1:]) == tokens


def test_vocabulary_composes_nothing_of_less_than_nothing() -> None:
    assert Vocabulary({"aa": 1}).compose(-1, Random(1)) is None


# -- given texts, structured answers, images ---------------------------------------------------------------------


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_given_texts_are_sent_in_turns_under_a_line_of_their_own(api: str) -> None:
    tokenizer = FakeTokenizer()
    requests = source(workload(prompts=["Why?", "How?"], api=api), tokenizer)
    texts = [body.get("prompt") or body["messages"][0]["content"] for body in bodies(requests, 5)]

    assert requests.prompt_tokens is None
    assert tokenizer.requests == []
    assert [text.split("\n")[1] for text in texts] == ["Why?", "How?", "Why?", "How?", "Why?"]
    assert all(re.fullmatch(r"\[[0-9a-f]{16}\]", text.split("\n")[0]) for text in texts)


def test_given_texts_that_may_share_a_prefix_stay_as_they_are() -> None:
    requests = source(workload(prompts=["Why?", "How?"], shares_prefix=True))

    assert [body["prompt"] for body in bodies(requests, 3)] == ["Why?", "How?", "Why?"]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_schemas_go_along_in_turns_and_the_grammar_ends_the_answer(api: str) -> None:
    schemas = [{"type": "object"}, {"type": "array"}]
    found = bodies(source(workload(response_schemas=schemas, api=api)), 3)

    formats = [body["response_format"] for body in found]
    assert [answer["json_schema"]["schema"] for answer in formats] == [*schemas, schemas[0]]
    assert [answer["json_schema"]["name"] for answer in formats] == ["schema_0", "schema_1", "schema_0"]
    assert all(answer["type"] == "json_schema" and answer["json_schema"]["strict"] for answer in formats)
    for body in found:
        assert body["max_tokens"] == 7
        assert not {"min_tokens", "ignore_eos"} & body.keys()


def test_built_in_structured_workload_uses_all_its_schemas() -> None:
    load = find_workload("structured-100")
    found = bodies(source(load), 8)

    assert [body["response_format"]["json_schema"]["schema"] for body in found] == list(load.response_schemas)
    assert {len(body["prompt"]) for body in found} == {1000}


def test_image_goes_along_with_a_text_that_is_exact_without_it() -> None:
    tokenizer = FakeTokenizer()
    requests = source(workload(api="chat", image={"width": 50, "height": 33}), tokenizer)
    [text, image] = bodies(requests, 1)[0]["messages"][0]["content"]

    assert requests.prompt_tokens is None
    assert len(tokenizer.chat([{"role": "user", "content": text["text"]}])) == 60
    assert (text["type"], image["type"]) == ("text", "image_url")
    picture = Image.open(
        io.BytesIO(base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,")))
    )
    assert (picture.size, picture.mode, picture.format) == ((50, 33), "RGB", "PNG")


def test_images_are_small_to_send_and_each_its_own() -> None:
    random = Random(5)
    urls = [png_data_url(ImageSize(1024, 768), random) for _ in range(4)]

    assert len(set(urls)) == 4
    assert max(map(len, urls)) < 64_000
    assert png_data_url(ImageSize(1024, 768), Random(5)) == urls[0]
    assert png_data_url(ImageSize(1, 1), Random(5)).startswith("data:image/png;base64,")
