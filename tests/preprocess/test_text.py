"""The preprocessor as the pipeline uses it, and the limits of a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.errors import PromptTooLong, RequestError
from dynamo_core.preprocess import text as text_module
from dynamo_core.preprocess import tokenizer as tokenizer_module
from dynamo_core.preprocess.limits import check_token_ids, fit
from dynamo_core.preprocess.pieces import Definition, most_characters
from dynamo_core.preprocess.text import TextPreprocessor
from dynamo_core.types import Output, TextOptions

CARD = ModelCard(name="small", context_length=100, vocab_size=1000)


async def test_a_conversation_becomes_tokens_and_the_answer_text(chatml: TextPreprocessor) -> None:
    prompt = await chatml.render([{"role": "user", "content": "Was für ein Tag 😀"}])
    ids = await chatml.encode(prompt, add_special_tokens=False)
    assert ids[0] == 1  # <|im_start|>
    assert chatml.decode(ids, skip_special_tokens=False) == prompt
    assembler = chatml.assembler(TextOptions())
    answer = await chatml.encode("Ein schöner 😀.", add_special_tokens=False)
    deltas = [assembler.push(Output([token_id])) for token_id in answer] + [assembler.push(Output([2], finish_reason="stop"))]
    assert "".join(delta.text for delta in deltas if delta) == "Ein schöner 😀."
    assert [token_id for delta in deltas if delta for token_id in delta.token_ids] == [*answer, 2]


async def test_a_template_sent_along_is_used_instead_and_rendered_in_a_thread(chatml: TextPreprocessor, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    class Pool(ThreadPoolExecutor):
        def submit(self, fn, *args):  # pyright: ignore
            return super().submit(lambda: names.append(threading.current_thread().name) or fn(*args))

    with Pool(1, thread_name_prefix="pool") as pool:
        monkeypatch.setattr(text_module, "threads", pool)
        messages = [{"role": "user", "content": "Hi"}]
        assert await chatml.render(messages, template="{{ word }}: {{ messages[0].content }}", arguments={"word": "says"}) == "says: Hi"
        assert len(names) == 1
        await chatml.render(messages)
        assert len(names) == 1
        await chatml.render([{"role": "user", "content": "long " * 10_000}])
        assert len(names) == 2


async def test_a_model_without_a_template_refuses_messages(chatml: TextPreprocessor) -> None:
    bare = TextPreprocessor(ModelCard(name="bare"), chatml._tokenizer.reference.to_str().encode())
    with pytest.raises(RequestError, match="model bare has no chat template"):
        await bare.render([{"role": "user", "content": "Hi"}])


def test_a_card_with_a_broken_template_is_refused_at_once(chatml: TextPreprocessor) -> None:
    with pytest.raises(RequestError, match="cannot be compiled"):
        TextPreprocessor(ModelCard(name="broken", chat_template="{% if %}"), chatml._tokenizer.reference.to_str().encode())


async def test_p2_many_long_prompts_at_once_use_a_bounded_number_of_threads(chatml: TextPreprocessor) -> None:
    texts = [f"{n} " + "a long text " * 1000 for n in range(50)]
    encoded = await asyncio.gather(*(chatml.encode(text, add_special_tokens=False) for text in texts))
    assert [chatml.decode(ids) for ids in encoded] == texts
    assert sum(thread.name.startswith("dynamo-text") for thread in threading.enumerate()) <= tokenizer_module.threads._max_workers


async def test_a_text_that_can_never_fit_is_refused_before_it_is_tokenized(chatml: TextPreprocessor) -> None:
    assert chatml._per_token is not None
    most = chatml._per_token * chatml.card.context_length
    with pytest.raises(PromptTooLong, match=f"{most + 1:,} characters"):
        await chatml.encode("a" * (most + 1), add_special_tokens=False)


def test_no_token_stands_for_more_characters_than_the_bound(chatml: TextPreprocessor, tokenizer_json: bytes) -> None:
    bound = most_characters(msgspec.json.decode(tokenizer_json, type=Definition))
    preprocessor = TextPreprocessor(ModelCard(name="any"), tokenizer_json)
    reference = preprocessor._tokenizer.reference
    longest = max(len(reference.decode([token_id], skip_special_tokens=False)) for token_id in range(reference.get_vocab_size()))
    assert bound is None or longest <= bound
    assert bound is not None or b'"ByteFallback"' in tokenizer_json


@pytest.mark.parametrize(
    ("prompt", "wanted", "default", "allowed"),
    [(10, None, None, 90), (10, None, 16, 16), (95, None, 16, 5), (10, 90, None, 90), (10, 20, 16, 20), (100, 0, None, 0)],
)
def test_what_fits_is_what_was_asked_for_or_the_default_or_the_rest(prompt: int, wanted: int | None, default: int | None, allowed: int) -> None:
    assert fit(msgspec.structs.replace(CARD, default_max_tokens=default), prompt, wanted) == allowed


@pytest.mark.parametrize(
    ("prompt", "wanted", "says"), [(100, None, "100 tokens, but the prompt alone has 100"), (60, 41, "needs 101: 60 in the prompt and 41")]
)
def test_what_does_not_fit_is_refused_with_the_numbers(prompt: int, wanted: int | None, says: str) -> None:
    with pytest.raises(PromptTooLong, match=says):
        fit(CARD, prompt, wanted)


@pytest.mark.parametrize(("ids", "says"), [([1, -1], "-1 is negative"), ([5, 1000], "1000 is not in the vocabulary of small, which has 1000")])
def test_token_ids_outside_the_vocabulary_are_refused(ids: Sequence[int], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        check_token_ids(CARD, ids)
    check_token_ids(CARD, [])
    check_token_ids(CARD, [0, 999])
