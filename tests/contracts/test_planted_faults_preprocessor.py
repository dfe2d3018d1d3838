"""The preprocessor kit rejects implementations that break a guarantee: each fault is planted into the built-in one, which otherwise passes."""

from __future__ import annotations

import asyncio
import inspect
import json
from functools import cache
from itertools import product

import jinja2
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dynamo_core.cards import ModelCard
from dynamo_core.contracts.preprocessor import PreprocessorContract
from dynamo_core.preprocess.assembler import TextAssembler
from dynamo_core.preprocess.detokenizer import ByteDetokenizer
from dynamo_core.preprocess.stops import StopScanner
from dynamo_core.preprocess.template import ChatTemplate, compile_template
from dynamo_core.preprocess.text import TextPreprocessor
from dynamo_core.types import Delta


class Kit(PreprocessorContract):
    long_text = 400_000


@cache
def content() -> bytes:
    """Byte-level BPE without merges: every token is one byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: n for n, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


def cases(test):
    """The keyword arguments that pytest would call a parametrized test with, one dict for each call."""
    axes = []
    for mark in getattr(test, "pytestmark", []):
        name, values = mark.args
        axes.append([{name: value} for value in values])
    return [{key: value for part in chosen for key, value in part.items()} for chosen in product(*axes)]


async def rejections(number):
    """Which tests of this guarantee (of all: the empty string) fail."""
    compile_template.cache_clear()
    preprocessor = TextPreprocessor(ModelCard(name="faulty", context_length=10**7), content())
    failed = []
    for name, test in inspect.getmembers(Kit(), inspect.iscoroutinefunction):
        if name.startswith(f"test_{number}"):
            for arguments in cases(test):
                try:
                    await asyncio.wait_for(test(preprocessor=preprocessor, **arguments), 60)
                except (Exception, pytest.fail.Exception):
                    failed.append(name)
                    break
    return failed


FAULTS = []


def breaks(number):
    def note(plant):
        FAULTS.append(pytest.param(number, plant, id=f"{number}: {plant.__name__.replace('_', ' ')}"))
        return plant

    return note


def templates_run_in(patch, environment):
    environment.globals["raise_exception"] = lambda text: 1 / 0
    patch.setattr(ChatTemplate, "__init__", lambda self, source: setattr(self, "_template", environment.from_string(source)))

    def render(self, messages, *, tools=None, add_generation_prompt=True, continue_final_message=False, variables=None):
        from dynamo_core.errors import RequestError

        try:
            return self._template.render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **(variables or {}))
        except Exception as error:
            raise RequestError(str(error)) from error

    patch.setattr(ChatTemplate, "render", render)


@breaks("p1_a_template_sees")
def json_is_escaped_for_html(patch):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    templates_run_in(patch, environment)


@breaks("p1_a_template_sees")
def blocks_leave_their_line_breaks(patch):
    environment = jinja2.Environment()
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    templates_run_in(patch, environment)


@breaks("p1_the_last_message")
def continuing_a_message_is_forgotten(patch):
    original = ChatTemplate.render
    patch.setattr(ChatTemplate, "render", lambda self, messages, **options: original(self, messages, **options | {"continue_final_message": False}))


@breaks("p1_a_template_error")
def template_errors_come_out_as_they_are(patch):
    patch.setattr(ChatTemplate, "render", lambda self, messages, **options: self._template.render(messages=messages))


@breaks("p1_a_template_cannot")
def messages_can_be_written_to(patch):
    from jinja2.sandbox import SandboxedEnvironment

    from dynamo_core.preprocess.sandbox import _Sandbox

    patch.setattr(_Sandbox, "is_safe_attribute", SandboxedEnvironment.is_safe_attribute)


@breaks("p2_the_event_loop")
def tokenizing_holds_the_interpreter_lock(patch):
    async def encode(self, text, *, add_special_tokens):
        return await asyncio.to_thread(lambda: self._tokenizer.reference.encode(text).ids)

    patch.setattr(TextPreprocessor, "encode", encode)
    patch.setattr(Kit, "longest_stall", 0.02)  # however fast this machine is


@breaks("p2_tokens_do_not")
def the_cache_knows_texts_by_their_beginning(patch):
    seen = {}

    async def encode(self, text, *, add_special_tokens):
        return seen.setdefault(text[:10], self._tokenizer.encode_now(text))

    patch.setattr(TextPreprocessor, "encode", encode)


@breaks("p3_no_character")
def tokens_are_decoded_one_by_one(patch):
    patch.setattr(ByteDetokenizer, "push", lambda self, ids: "".join(self._bytes[token_id].decode("utf-8", "replace") for token_id in ids))


@breaks("p3_text_in_any")
def incomplete_characters_are_dropped_at_the_end_of_a_chunk(patch):
    patch.setattr(ByteDetokenizer, "push", lambda self, ids: b"".join(self._bytes[token_id] for token_id in ids).decode("utf-8", "ignore"))


@breaks("p3_text_joins_on")
def the_prompt_is_forgotten(patch):
    original = ByteDetokenizer.__init__
    patch.setattr(ByteDetokenizer, "__init__", lambda self, vocabulary, **options: original(self, vocabulary, **options | {"prompt_tail": ()}))


@breaks("p3_logprobs")
def bytes_are_those_of_the_shown_text(patch):
    original = TextPreprocessor.logprob

    def logprob(self, token_id, value, top=()):
        found = original(self, token_id, value, top)
        found.bytes = list(found.token.encode())
        return found

    patch.setattr(TextPreprocessor, "logprob", logprob)


@breaks("p3_text_in_any")
def tokens_without_text_are_not_counted(patch):
    original = TextAssembler.push

    def push(self, output, into=None):
        delta = original(self, output, into)
        if delta is None:
            self._ids = []
        return delta

    patch.setattr(TextAssembler, "push", push)


@breaks("p3_text_in_any")
def merging_makes_a_new_delta(patch):
    original = TextAssembler.push
    patch.setattr(TextAssembler, "push", lambda self, output, into=None: original(self, output) or (Delta() if into else None))


@breaks("p4_the_text_ends")
def stop_strings_are_looked_for_in_each_chunk_alone(patch):
    def push(self, text):
        stop = next((stop for stop in self._stops if stop in text), None)
        return (text, None) if stop is None else (text[: text.find(stop)], stop)

    patch.setattr(StopScanner, "push", push)


@breaks("p4_the_text_ends")
def the_first_stop_string_of_the_list_wins(patch):
    def push(self, text):
        text = self._held + text
        stop = next((stop for stop in sorted(self._stops) if stop in text), None)
        self._held = text[-30:] if stop is None else ""
        return (text[:-30], None) if stop is None else (text[: text.find(stop)], stop)

    patch.setattr(StopScanner, "push", push)


@breaks("p4_the_text_ends")
def text_that_was_held_back_is_lost_at_the_end(patch):
    patch.setattr(StopScanner, "flush", lambda self: "")


@breaks("p4_the_text_ends")
def the_stop_string_is_always_left_out(patch):
    original = StopScanner.__init__
    patch.setattr(StopScanner, "__init__", lambda self, stops, include=False: original(self, stops))


@breaks("p4_the_text_ends")
def all_tokens_of_the_last_chunk_count(patch):
    original = TextAssembler._push

    def push(self, output, into):
        delta = original(self, output, into)
        if self.stopped and delta is not None:
            delta.token_ids = delta.token_ids + [0] * (len(output.token_ids) - 1)
        return delta

    patch.setattr(TextAssembler, "_push", push)


@breaks("p4_the_text_ends")
def nobody_is_told_to_stop(patch):
    original = TextAssembler._push

    def push(self, output, into):
        delta = original(self, output, into)
        self.stopped = False
        return delta

    patch.setattr(TextAssembler, "_push", push)


@breaks("p4_nothing_follows")
def text_goes_on_after_a_stop_string(patch):
    original = TextAssembler.push

    def push(self, output, into=None):
        self._done = False
        return original(self, output, into)

    patch.setattr(TextAssembler, "push", push)


async def test_the_kit_accepts_the_built_in_preprocessor_without_a_fault():
    assert await rejections("") == []


@pytest.mark.parametrize(("number", "plant"), FAULTS)
async def test_the_kit_rejects(number, plant, monkeypatch):
    plant(monkeypatch)
    try:
        assert await rejections(number)
    finally:
        compile_template.cache_clear()
