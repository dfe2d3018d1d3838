"""Outputs to deltas: P3 and P4 together, and what counts where a choice ends."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.preprocess.assembler import TextAssembler
from dynamo_core.preprocess.contract import Assembler, Preprocessor
from dynamo_core.preprocess.text import TextPreprocessor
from dynamo_core.types import Delta, Output, TextOptions, TokenLogprob

EOS = 2
TEXTS = ["Hello, world. This is a module and a class.", "naïve 😀 — 你好", "aabaabaab the end", "\n\n  x == 1\n"]


def ids_of(preprocessor: TextPreprocessor, text: str) -> list[int]:
    return preprocessor._tokenizer.encode_now(text)


def outputs(ids: list[int], cuts: list[int], **last) -> list[Output]:
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    found = [Output(ids[start:end]) for start, end in pairwise(bounds)]
    for name, value in last.items():
        setattr(found[-1], name, value)
    return found


def drive(assembler: TextAssembler, found: list[Output], merge: bool = False) -> Delta:
    """Everything said, as one delta; `merge` uses `into`."""
    whole = Delta()
    for output in found:
        delta = assembler.push(output, whole if merge else None)
        if merge:
            assert delta is whole
        elif delta is not None:
            assert delta.text or delta.finish_reason
            whole.text += delta.text
            whole.token_ids += delta.token_ids
            if delta.logprobs is not None:
                whole.logprobs = (whole.logprobs or []) + delta.logprobs
            assert whole.finish_reason is None
            whole.finish_reason, whole.stop_reason = delta.finish_reason, delta.stop_reason
        if assembler.stopped:
            break
    return whole


def test_it_implements_the_contract(chatml: TextPreprocessor) -> None:
    assert isinstance(chatml, Preprocessor)
    assert isinstance(chatml.assembler(TextOptions()), Assembler)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_p4_any_chunking_gives_the_same_text_tokens_and_reason(chatml: TextPreprocessor, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(TEXTS) | st.text("ab \n😀", max_size=30))
    stops = tuple(data.draw(st.lists(st.sampled_from(["aab", "baa", " a ", "module", "😀", "\n", "end", "zzz", "ba"]), max_size=3)))
    options = TextOptions(stop=stops, include_stop=data.draw(st.booleans()), logprobs=data.draw(st.booleans()))
    ids = [*ids_of(chatml, text), EOS]
    found = outputs(ids, data.draw(st.lists(st.integers(0, 100), max_size=10)), finish_reason="stop")
    for output in found:
        output.logprobs = [TokenLogprob(token_id, -1.0) for token_id in output.token_ids] if options.logprobs else None
    got = drive(chatml.assembler(options), found, merge=data.draw(st.booleans()))

    # the model: token by token over the whole text
    shown = ids if options.include_stop else ids[:-1]
    expected, used, reason = chatml.decode(shown), len(ids), None
    for count in range(1, len(ids)):
        so_far = chatml.decode(ids[:count])
        ends = [(so_far.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in so_far]
        if ends:
            end, length, reason = min(ends)
            expected, used = so_far[: end if options.include_stop else end + length], count
            break
    assert (got.text, got.token_ids, got.finish_reason, got.stop_reason) == (expected, ids[:used], "stop", reason)
    assert [entry.token_id for entry in got.logprobs or []] == (ids[:used] if options.logprobs else [])


def test_the_token_that_ends_a_choice_counts_but_is_not_text(chatml: TextPreprocessor) -> None:
    word = ids_of(chatml, "module")
    options = TextOptions(skip_special_tokens=False)
    ended = Output([*word, EOS], finish_reason="stop")
    assert chatml.assembler(options).push(ended) == Delta(0, "module", [*word, EOS], "stop")
    by_token = Output(word * 2, finish_reason="stop", stop_reason=word[-1])
    assert chatml.assembler(options).push(by_token) == Delta(0, chatml.decode((word * 2)[:-1]), word * 2, "stop", word[-1])
    included = TextOptions(skip_special_tokens=False, include_stop=True)
    assert chatml.assembler(included).push(ended) == Delta(0, "module<|im_end|>", [*word, EOS], "stop")


def test_an_engine_that_leaves_the_end_token_out_loses_no_text(chatml: TextPreprocessor) -> None:
    word = ids_of(chatml, "module")
    assert chatml.assembler(TextOptions()).push(Output(word, finish_reason="stop")) == Delta(0, "module", word, "stop")


def test_an_end_token_in_the_middle_is_a_token_like_any_other(chatml: TextPreprocessor) -> None:
    word = ids_of(chatml, "module")
    ended = Output([*word, EOS], finish_reason="length")
    assert chatml.assembler(TextOptions(skip_special_tokens=False)).push(ended) == Delta(0, "module<|im_end|>", [*word, EOS], "length")


@pytest.mark.parametrize("reason", ["length", "abort", "error"])
def test_held_text_comes_out_at_the_end(chatml: TextPreprocessor, reason: str) -> None:
    assembler = chatml.assembler(TextOptions(stop=("the end of it",)))
    ids = ids_of(chatml, "This is the end of")
    first = assembler.push(Output(ids))
    assert first is not None
    assert first.text == "This is "
    assert first.token_ids == ids
    last = assembler.push(Output([], finish_reason=reason))
    assert last == Delta(0, "the end of", [], reason)
    assert not assembler.stopped


def test_a_broken_character_at_the_end_is_one_replacement_character(chatml: TextPreprocessor) -> None:
    ids = ids_of(chatml, "😀")[:-1]
    assembler = chatml.assembler(TextOptions())
    assert assembler.push(Output(ids)) is None
    assert assembler.push(Output([], finish_reason="length")) == Delta(0, "\ufffd", ids, "length")


def test_nothing_is_said_after_the_end(chatml: TextPreprocessor) -> None:
    ids = ids_of(chatml, "one module two")
    assembler = chatml.assembler(TextOptions(stop=("module",)))
    assert assembler.push(Output(ids)).text == "one "
    assert assembler.stopped
    assert assembler.push(Output(ids)) is None
    assert assembler.push(Output([], finish_reason="stop")) is None


def test_outputs_are_not_written_to(chatml: TextPreprocessor) -> None:
    output = Output(ids_of(chatml, "module"))
    before = output.token_ids[:]
    assembler = chatml.assembler(TextOptions())
    delta = assembler.push(output)
    assembler.push(output, delta)
    assert output.token_ids == before
    assert delta.token_ids == before * 2


def test_an_output_that_only_brings_news_makes_no_delta(chatml: TextPreprocessor) -> None:
    assert chatml.assembler(TextOptions()).push(Output([], cached_tokens=3)) is None


def test_logprobs_carry_text_and_bytes_of_each_token_and_its_alternatives(chatml: TextPreprocessor) -> None:
    ids = ids_of(chatml, "😀")
    part = "😀".encode()
    entries = [TokenLogprob(token_id, -0.5, [(token_id, -0.5), (EOS, -2.0)]) for token_id in ids]
    delta = chatml.assembler(TextOptions(logprobs=True), index=3).push(Output(ids, index=3, logprobs=entries))
    assert delta.index == 3
    assert b"".join(bytes(entry.bytes) for entry in delta.logprobs) == part
    first = delta.logprobs[0]
    assert (first.token, first.token_id, first.logprob) == (bytes(first.bytes).decode("utf-8", "replace"), ids[0], -0.5)
    assert [(top.token, top.token_id, top.logprob) for top in first.top] == [(first.token, ids[0], -0.5), ("<|im_end|>", EOS, -2.0)]
    assert chatml.logprob(ids[0], -0.5, [(ids[0], -0.5), (EOS, -2.0)]) == first


def test_logprobs_that_nobody_asked_for_are_left_out(chatml: TextPreprocessor) -> None:
    ids = ids_of(chatml, "module")
    delta = chatml.assembler(TextOptions()).push(Output(ids, logprobs=[TokenLogprob(token_id, -1.0) for token_id in ids]))
    assert delta.logprobs is None
