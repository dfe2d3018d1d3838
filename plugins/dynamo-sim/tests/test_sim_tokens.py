"""The token generator and the vocabulary: the same everywhere, and readable."""

import json
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dynamo_core.errors import ConfigError
from dynamo_sim import vocabulary
from dynamo_sim.tokens import absorb, roll, seed_state

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=50)
BUILT_IN = vocabulary.built_in()
TOKENIZER = Tokenizer.from_str(BUILT_IN.tokenizer.decode())


@given(st.integers(0, 2**64 - 1), TOKENS, TOKENS)
def test_absorbing_a_prompt_at_once_is_rolling_over_each_token(state: int, head: list[int], tail: list[int]) -> None:
    rolled = state
    for token in head + tail:
        rolled = roll(rolled, token)
    assert absorb(state, array("I", head + tail)) == rolled
    assert absorb(absorb(state, array("I", head)), array("I", tail)) == rolled


def test_long_prompts_are_absorbed_like_short_ones() -> None:
    tokens = array("I", range(20_000))
    assert absorb(absorb(5, tokens[:7]), tokens[7:]) == absorb(5, tokens)


def test_seeds_give_different_states() -> None:
    assert len({seed_state(0), seed_state(1), seed_state(0, 1, 0), seed_state(0, "1", 0)}) == 4


@given(st.text())
def test_the_built_in_tokenizer_gives_any_text_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_every_answer_token_is_one_word() -> None:
    words = [TOKENIZER.decode([token]) for token in BUILT_IN.answers]
    assert len(words) == len(set(words)) > 500
    assert all(word[0] == " " and word[1:].isalpha() for word in words)
    assert [TOKENIZER.encode(word).ids for word in words] == [[token] for token in BUILT_IN.answers]


def test_the_vocabulary_has_the_size_that_it_says() -> None:
    assert TOKENIZER.get_vocab_size() == BUILT_IN.size
    assert [TOKENIZER.id_to_token(token) for token in BUILT_IN.eos_token_ids] == ["<|im_end|>", "<|endoftext|>"]


def test_it_is_the_same_in_every_process() -> None:
    assert vocabulary.built_in.__wrapped__() == BUILT_IN


def model_directory(path: Path, **settings: object) -> Path:
    (path / "tokenizer.json").write_bytes(BUILT_IN.tokenizer)
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|im_start|>", **settings}))
    return path


def test_a_model_directory_gives_its_own_tokenizer_template_and_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 4000}))
    found = vocabulary.of_model(model_directory(tmp_path, chat_template="{{ messages }}", add_bos_token=True))
    assert found.tokenizer == BUILT_IN.tokenizer
    assert found.eos_token_ids == (BUILT_IN.eos_token_ids[1],)
    assert found.chat_template == "{{ messages }}"
    assert found.template_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"}
    assert (found.size, found.add_bos) == (4000, True)
    assert set(BUILT_IN.answers) <= set(found.answers)


def test_of_several_templates_the_default_is_taken_and_a_file_comes_first(tmp_path: Path) -> None:
    path = model_directory(tmp_path, chat_template=[{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}])
    assert vocabulary.of_model(path).chat_template == "b"
    (path / "chat_template.jinja").write_text("c")
    assert vocabulary.of_model(path).chat_template == "c"


def test_the_generation_config_has_the_last_word_on_the_end(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert vocabulary.of_model(model_directory(tmp_path)).eos_token_ids == (7, 8)


@pytest.mark.parametrize(("content", "message"), [(None, "cannot read"), (b"[]", "not a model"), (b'{"model": {"vocab": {"a": 0}}}', "no words")])
def test_what_is_no_model_is_refused_with_the_place(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        vocabulary.of_model(tmp_path)
    assert str(tmp_path) in str(error.value)
