"""P2: cutting and caching change no token, and the event loop goes on."""

from __future__ import annotations

import asyncio
import random
import sys
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from dynamo_core.preprocess import pieces, tokenizer
from dynamo_core.preprocess.pieces import Cutter, Definition
from dynamo_core.preprocess.tokenizer import TextTokenizer

FRAGMENTS = ["<|im_start|>", "<|im_end|>", "\n", "user", " the", "the class", " of", "  ", " ", "'s", "I'll do", "1234", " 99", "é", "e\u0301", "你好", "😀",
             "<|im_", "|>", "<Tool Call>", "<s>", "</s>", "=", " == x", "\t", "a b", "z", ".\n\n", "<é>"]  # fmt: skip
TEXT = st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("".join) | st.text(max_size=60)


def load(content: bytes, **options) -> TextTokenizer:
    return TextTokenizer(content, msgspec.json.decode(content, type=Definition), **options)


def cutter(content: bytes) -> Cutter:
    return Cutter(msgspec.json.decode(content, type=Definition))


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK", 6)


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)


@pytest.fixture(scope="module", params=["reference", "as installed"])
def cached(request: pytest.FixtureRequest, tokenizer_json: bytes) -> TextTokenizer:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setitem(sys.modules, "fastokens", None)
        return load(tokenizer_json, cache_bytes=20_000)


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_p2_pieces_tokenized_apart_give_the_tokens_of_the_whole(cached: TextTokenizer, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "CHUNK", 6)
        assert "".join(cached._cutter.cut(text)) == text
        expected = cached.reference.encode(text, add_special_tokens=False).ids
        assert cached.encode_now(text) == expected
        assert cached.encode_now(text) == expected


def test_a_document_of_many_pages_gives_the_tokens_of_the_reference(tokenizer_json: bytes) -> None:
    cached = load(tokenizer_json)
    dice = random.Random(1)
    words = ["the", "class", "of", "an", "object", "isn't", "42", "naïve", "你好", "\n\n", "==", "def", "f(x):", "return", "{}", "😀", "..."]
    text = "<|im_start|>" + " ".join(dice.choices(words, k=5000)) + "<|im_end|>"
    assert cached.encode_now(text) == cached.reference.encode(text, add_special_tokens=False).ids


async def test_special_tokens_are_put_around_a_text_when_asked_for(tokenizer_json: bytes) -> None:
    loaded = load(tokenizer_json)
    for text in ("", "Hello", "<|im_start|>a<|im_end|>", "long text " * 1000):
        for special in (True, False):
            assert await loaded.encode(text, add_special_tokens=special) == loaded.reference.encode(text, add_special_tokens=special).ids


async def test_truncation_and_padding_of_the_file_do_not_apply(tokenizer_json: bytes) -> None:
    definition = Tokenizer.from_buffer(tokenizer_json)
    definition.enable_truncation(4)
    definition.enable_padding(length=16)
    loaded = load(definition.to_str().encode())
    ids = await loaded.encode("one two three four five six seven eight", add_special_tokens=False)
    assert ids == Tokenizer.from_buffer(tokenizer_json).encode("one two three four five six seven eight", add_special_tokens=False).ids


def test_a_conversation_that_grows_is_tokenized_from_its_newest_message_on(chatml, no_accelerator: None) -> None:
    loaded = load(chatml._tokenizer.reference.to_str().encode())
    seen: list[str] = []
    encode = loaded._encode
    loaded._encode = lambda texts: seen.extend(texts) or encode(texts)
    turn = "<|im_start|>user\nturn {}<|im_end|>\n"
    loaded.encode_now("".join(turn.format(n) for n in range(10)))
    seen.clear()
    loaded.encode_now("".join(turn.format(n) for n in range(11)))
    assert seen == [" 10"]


def test_documents_with_a_common_beginning_share_its_tokens(chatml, short_chunks: None, no_accelerator: None) -> None:
    cut = chatml._tokenizer._cutter.cut
    one, two = list(cut("a long common beginning of two texts, then this")), list(cut("a long common beginning of two texts, then something else"))
    assert one[:5] == two[:5]


def test_the_cache_stays_within_its_bytes_and_keeps_what_was_used_last(chatml) -> None:
    loaded = load(chatml._tokenizer.reference.to_str().encode(), cache_bytes=5_000)
    for n in range(200):
        loaded.encode_now(f"<|im_start|>{n}<|im_start|>always")
        assert loaded._cache._size <= 5_000
    held = loaded._cache._pieces
    assert 0 < len(held) < 100
    assert {"<|im_start|>always", "<|im_start|>199"} <= set(held)
    assert loaded._cache._size == sum(tokenizer._bytes(piece, ids) for piece, ids in held.items())


def test_a_piece_that_would_fill_the_cache_is_not_kept(chatml) -> None:
    loaded = load(chatml._tokenizer.reference.to_str().encode(), cache_bytes=5_000)
    loaded.encode_now("1" * 2000)
    assert not loaded._cache._pieces


def test_common_byte_level_tokenizers_are_cut_at_special_tokens_and_between_words(chatml) -> None:
    cut = cutter(chatml._tokenizer.reference.to_str().encode())
    assert cut.special is not None
    assert cut.words


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("ab é你\u0301\u1161x'1. \n\t\u00a0-"), max_size=60))
def test_p2_words_tokenized_one_by_one_give_the_tokens_of_the_text(cached: TextTokenizer, text: str) -> None:
    for _ in range(2):  # from the tokenizer, then from memory
        assert cached._by_words([text]) == [cached.reference.encode(text, add_special_tokens=False).ids]


def test_the_words_of_a_new_text_are_remembered_from_older_ones(chatml, no_accelerator: None) -> None:
    loaded = load(chatml._tokenizer.reference.to_str().encode())
    loaded.encode_now("one two three")
    seen: list[str] = []
    encode = loaded._encode
    loaded._encode = lambda texts: seen.extend(texts) or encode(texts)
    loaded.encode_now("a three two four")
    assert seen == ["a", " four"]


def test_remembered_words_are_bounded_in_number_and_in_length(chatml, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "WORDS", 100)
    loaded = load(chatml._tokenizer.reference.to_str().encode())
    for start in range(0, 2000, 50):
        text = " ".join(["x", *map(str, range(start, start + 50)), "y" * 65])
        assert loaded.encode_now(text) == loaded.reference.encode(text, add_special_tokens=False).ids
        text = " ".join(["x", *map(str, range(start, start + 50))])
        assert loaded.encode_now(text) == loaded.reference.encode(text, add_special_tokens=False).ids
        assert len(loaded._words) <= 150
        assert max(map(len, loaded._words)) <= 64


@pytest.mark.parametrize("content", ["one two", "one ", " two", " ", "e. T"])
def test_an_added_token_with_a_space_in_it_is_never_cut(chatml, no_accelerator: None, content: str) -> None:
    definition = Tokenizer.from_str(chatml._tokenizer.reference.to_str())
    definition.add_tokens([AddedToken(content, normalized=False)])
    loaded = load(definition.to_str().encode())
    for text in ("we saw one two three. Then one more", "one two"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "CHUNK", 6)
            assert loaded.encode_now(text) == loaded.reference.encode(text, add_special_tokens=False).ids


def test_a_token_that_takes_the_space_after_it_forbids_cutting_at_spaces(chatml) -> None:
    definition = Tokenizer.from_str(chatml._tokenizer.reference.to_str())
    definition.add_special_tokens([AddedToken("<|odd|>", normalized=False, special=True, rstrip=True)])
    assert not cutter(definition.to_str().encode()).words


@pytest.mark.parametrize("options", [{"lstrip": True}, {"single_word": True}])
def test_a_special_token_that_changes_its_neighbours_is_never_cut_at(chatml, options: dict[str, bool]) -> None:
    definition = Tokenizer.from_str(chatml._tokenizer.reference.to_str())
    definition.add_special_tokens([AddedToken("<|odd|>", normalized=False, special=True, **options)])
    cut = cutter(definition.to_str().encode())
    assert cut.special is None
    assert not cut.words


def test_added_tokens_that_overlap_special_ones_forbid_cutting(chatml) -> None:
    definition = Tokenizer.from_str(chatml._tokenizer.reference.to_str())
    definition.add_tokens([AddedToken("x<|im", normalized=False)])
    assert cutter(definition.to_str().encode()).special is None


def test_an_unknown_word_pattern_forbids_cutting_between_words(chatml) -> None:
    definition = Tokenizer.from_str(chatml._tokenizer.reference.to_str())
    definition.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("e ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert not cutter(definition.to_str().encode()).words


async def test_p2_the_event_loop_goes_on_while_a_long_prompt_is_tokenized(chatml, no_accelerator: None) -> None:
    loaded = load(chatml._tokenizer.reference.to_str().encode())
    dice = random.Random(2)
    text = " ".join(f"{dice.randrange(10**9):x}" for _ in range(30_000))
    task = asyncio.create_task(loaded.encode(text, add_special_tokens=False))
    ticks = 0
    while not task.done():
        await asyncio.sleep(0.001)
        ticks += 1
    assert ticks >= 5  # holding the interpreter lock would leave one or two
    assert len(await task) > 30_000


# ------------------------------------------------------------------ the accelerator


class Fake:
    """Stands for `fastokens`: `encode` decides what is wrong with it."""

    def __init__(self, encode) -> None:
        self.Tokenizer = SimpleNamespace(from_json_str=lambda text: SimpleNamespace(encode_batch=lambda texts: [encode(text) for text in texts]))


def test_an_accelerator_that_gives_other_tokens_is_not_used(chatml, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    content = chatml._tokenizer.reference.to_str().encode()
    right = Tokenizer.from_buffer(content)

    def nearly(text: str) -> SimpleNamespace:
        return SimpleNamespace(ids=right.encode(text.replace("\u00a0", " "), add_special_tokens=False).ids)

    monkeypatch.setitem(sys.modules, "fastokens", Fake(nearly))
    loaded = load(content)
    assert loaded._encode == loaded._encode_reference
    assert [record.message for record in caplog.records] == ["fastokens is not used for this tokenizer"]
    assert loaded.encode_now("a\u00a0b") == right.encode("a\u00a0b", add_special_tokens=False).ids


def test_an_accelerator_that_cannot_read_the_file_is_not_used(chatml, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Fake(None)
    broken.Tokenizer.from_json_str = lambda text: 1 / 0
    monkeypatch.setitem(sys.modules, "fastokens", broken)
    loaded = load(chatml._tokenizer.reference.to_str().encode())
    assert loaded._encode == loaded._encode_reference


def test_a_text_that_the_accelerator_gives_up_on_goes_to_the_reference(chatml, monkeypatch: pytest.MonkeyPatch) -> None:
    content = chatml._tokenizer.reference.to_str().encode()
    right = Tokenizer.from_buffer(content)

    def limited(text: str) -> SimpleNamespace:
        if len(text) > 1000:
            raise RuntimeError("match limit exceeded")
        return SimpleNamespace(ids=right.encode(text, add_special_tokens=False).ids)

    monkeypatch.setitem(sys.modules, "fastokens", Fake(limited))
    loaded = load(content)
    assert loaded._encode != loaded._encode_reference
    assert loaded.encode_now("7" * 1500) == right.encode("7" * 1500, add_special_tokens=False).ids
