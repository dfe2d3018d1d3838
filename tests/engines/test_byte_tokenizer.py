"""The byte tokenizer is a real `tokenizer.json`: it loads, splits text into bytes, and gives the text back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dynamo_core.engines import byte_tokenizer

TOKENIZER = Tokenizer.from_str(byte_tokenizer.tokenizer_json().decode())


@given(st.text())
def test_each_byte_of_a_text_is_one_token_with_its_own_value(text: str) -> None:
    text = text.replace("<|", "")
    assert TOKENIZER.encode(text).ids == list(text.encode())


@given(st.text())
def test_decoding_gives_the_text_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(("text", "token"), [("<|endoftext|>", 256), ("<|im_start|>", 257), ("<|im_end|>", 258)])
def test_special_tokens_are_one_token_and_disappear_from_text(text: str, token: int) -> None:
    assert TOKENIZER.encode(f"a{text}b").ids == [ord("a"), token, ord("b")]
    assert TOKENIZER.decode([ord("a"), token, ord("b")]) == "ab"
    assert TOKENIZER.get_vocab_size() == byte_tokenizer.VOCAB_SIZE
