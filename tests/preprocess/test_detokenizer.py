"""P3: incremental text, joined, is what decoding everything at once gives."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dynamo_core.preprocess.detokenizer import ByteDetokenizer, WindowDetokenizer, detokenizer
from dynamo_core.preprocess.pieces import Definition
from dynamo_core.preprocess.vocabulary import Vocabulary

TEXTS = ["Hello, world", "naïve café — “quoted” 😀👨‍👩‍👧 ", "你好，世界", "  leading and trailing  ", "a\n\n\tb", "<|im_end|>x<Tool Call>y", "\u0000", " "]


class Case:
    """A tokenizer, its reference decoding and its vocabulary."""

    def __init__(self, content: bytes) -> None:
        self.tokenizer = Tokenizer.from_buffer(content)
        self.decoder = msgspec.json.decode(content, type=Definition).decoder
        self.vocabulary = Vocabulary(self.tokenizer, self.decoder)
        self.size = self.tokenizer.get_vocab_size()
        self.byte_tokens = {self.tokenizer.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        self.byte_tokens.pop(None, None)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip)

    def valid(self, ids: list[int]) -> bool:
        """Whether each run of byte tokens is UTF-8: for others the reference gives up good characters too."""
        run = bytearray()
        for token_id in [*ids, None]:
            if token_id in self.byte_tokens:
                run.append(self.byte_tokens[token_id])
            elif token_id not in self.vocabulary.special:
                try:
                    run.decode()
                except UnicodeDecodeError:
                    return False
                run.clear()
        return True


@pytest.fixture(scope="module")
def case(tokenizer_json: bytes) -> Case:
    return Case(tokenizer_json)


def pieces(case: Case, ids: list[int], cuts: list[int], skip: bool = True, **options) -> list[str]:
    stream = detokenizer(case.vocabulary, skip_special_tokens=skip, **options)
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [*(stream.push(ids[start:end]) for start, end in pairwise(bounds)), stream.flush()]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_p3_any_tokens_in_any_chunks_join_to_the_whole_decoded(case: Case, data: st.DataObject) -> None:
    common = st.one_of(st.integers(0, case.size + 2), st.sampled_from(sorted(case.byte_tokens) or [0]), st.integers(0, 270))
    ids = data.draw(st.lists(common, max_size=30))
    cuts = data.draw(st.lists(st.integers(0, 1000), max_size=10))
    skip = data.draw(st.booleans())
    joined = "".join(pieces(case, ids, cuts, skip))
    assert joined == "".join(pieces(case, ids, list(range(len(ids))), skip))
    if case.valid(ids):
        assert joined == case.decode(ids, skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), cuts=st.lists(st.integers(0, 1000), max_size=10), skip=st.booleans())
def test_p3_any_text_comes_back_in_any_chunks_without_a_replacement_character(case: Case, text: str, cuts: list[int], skip: bool) -> None:
    ids = case.ids(text)
    got = pieces(case, ids, cuts, skip)
    assert "".join(got) == case.decode(ids, skip)
    assert sum(part.count("\ufffd") for part in got) == case.decode(ids, skip).count("\ufffd")


@pytest.mark.parametrize("text", TEXTS)
def test_p3_token_by_token_gives_whole_characters_only(case: Case, text: str) -> None:
    got = pieces(case, case.ids(text), list(range(100)))
    assert "".join(got) == case.decode(case.ids(text), True)
    assert not any("\ufffd" in part for part in got)


@pytest.mark.parametrize("text", TEXTS)
def test_p3_text_goes_on_where_the_prompt_ended(case: Case, text: str) -> None:
    whole = case.ids("The prompt: " + text)
    for cut in range(1, len(whole)):
        prompt, ids = whole[:cut], whole[cut:]
        shown = detokenizer(case.vocabulary).push(prompt)
        assert shown + "".join(pieces(case, ids, list(range(50)), prompt_tail=prompt[-8:])) == case.decode(whole, True)


def test_every_token_has_the_bytes_that_decoding_it_alone_gives(case: Case) -> None:
    stripped = case.vocabulary.strips_left
    for token_id in range(case.size):
        text = case.vocabulary.all[token_id].decode("utf-8", case.vocabulary.errors)
        assert text.removeprefix(" " * stripped) == case.decode([token_id], False), case.tokenizer.id_to_token(token_id)


def test_ids_outside_the_vocabulary_are_nothing_and_are_not_remembered(case: Case) -> None:
    before = len(case.vocabulary.all)
    assert [case.vocabulary.all[token_id] for token_id in (-1, case.size + 10**6, 2**40)] == [b"", b"", b""]
    assert len(case.vocabulary.all) == before


def test_common_decoders_are_decoded_by_table(case: Case) -> None:
    assert isinstance(detokenizer(case.vocabulary), ByteDetokenizer)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_p3_decoders_that_look_at_neighbours_are_decoded_by_window(wordpiece_json: bytes, data: st.DataObject) -> None:
    case = Case(wordpiece_json)
    ids = data.draw(st.lists(st.integers(1, case.size - 1), max_size=20))
    assert isinstance(detokenizer(case.vocabulary), WindowDetokenizer)
    assert "".join(pieces(case, ids, data.draw(st.lists(st.integers(0, 100), max_size=5)))) == case.decode(ids, True)
