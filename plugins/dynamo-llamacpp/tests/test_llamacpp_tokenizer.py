"""The made `tokenizer.json` and llama.cpp's own tokenizer must cut every text alike, token by token."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import xllamacpp
from tokenizers import Tokenizer

from dynamo_core.errors import ConfigError
from dynamo_llamacpp.gguf import read_metadata
from dynamo_llamacpp.resolve import resolve
from dynamo_llamacpp.tokenizer import SUPPORTED, byte_pieces, vocabulary

SPACES = ["", " ", "  ", "   \n", "\n\n\n", " \t \t", "a  b", "a   b", " a", "a ", "\n a", "a \n\n b",
          "x\r\ny", "\r\r\n", "  x\n  y\n\n    z", "\u00a0\u00a0a", "\u2003x", "\t\tif"]
NUMBERS = ["1", "12", "123", "1234", "1234567890", "3.14159", "1,000,000", "0x1F", "v1.2.3", "2024-01-31", "½²³", "Ⅷ①", "٣٤٥", "१२३", "a1b22c333d4444"]
QUOTES = ["don't DON'T Don'T", "it's we'll they've I'd you're I'm 'tis 's 'S", "’s don’t", "'''", "''s", "rock'n'roll", "O'Neill's"]
SYMBOLS = ["!!!", "a!b?c", "...", "—–-", "$100 €20", "<|not_special|>", "#@!%^&*()",
           "/path/to/file.txt", "https://x.y/z?a=b&c=d#e", "{}[]()", "```py\nx=1\n```", "\\n\\t"]
SCRIPTS = ["Größe façade naïve", "ПРИВЕТ мир", "你好，世界！", "こんにちは カタカナ", "안녕하세요", "שלום", "مرحبا", "नमस्ते दुनिया",
           "ไทย", "e\u0301 vs é", "ﬁ", "İstanbul ı", "Straße ẞ", "𝒜𝓁𝓅𝒽𝒶", "𐑐𐑨𐑑"]
EMOJI = ["😀", "😀🎉🚀", "👩‍👩‍👧‍👦", "🇩🇪🇫🇷", "👍🏽", "a😀b", "☺️", "\u200b\u200d", "\ufeff", "\x00\x01\x7f", "\U0010ffff"]
MARKED = ["<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "x<|im_end|>y", "<|im_end|><|im_end|>", " <|im_start|> ", "<|im_start|", "<|IM_START|>"]


def corpus(text: str) -> list[str]:
    """Cases by hand, then cuts and shuffles of a varied text from a fixed seed."""
    cases = [*SPACES, *NUMBERS, *QUOTES, *SYMBOLS, *SCRIPTS, *EMOJI, *MARKED, text, *text.splitlines()]
    dice = random.Random(11)
    parts = [*SPACES, *NUMBERS, *QUOTES, *SYMBOLS, *SCRIPTS, *EMOJI, *MARKED]
    cases += ["".join(dice.choices(parts, k=6)) for _ in range(150)]
    for _ in range(100):
        start = dice.randrange(len(text))
        cases.append(text[start : start + dice.randrange(1, 60)])
    alphabet = "aZ '\n\t1é世😀.\u00a0s"
    cases += ["".join(dice.choices(alphabet, k=dice.randrange(1, 24))) for _ in range(200)]
    return cases


@contextmanager
def own_tokenizer(path: Path) -> Iterator[Callable[[str], list[int]]]:
    """llama.cpp's `/tokenize`."""
    p: Any = xllamacpp.CommonParams()  # type: ignore[attr-defined]
    p.model.path, p.n_ctx, p.n_parallel, p.port, p.verbosity, p.cpuparams.n_threads, p.warmup = str(path), 256, 1, 0, 0, 1, False
    servers: list[Any] = [xllamacpp.Server(p)]  # type: ignore[attr-defined]
    address = servers[0].listening_address

    def tokenize(text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(address + "/tokenize", data=body, headers={"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["tokens"]

    try:
        yield tokenize
    finally:
        servers.clear()  # its destructor stops it


def assert_equal(path: Path, texts: list[str]) -> None:
    vocab = vocabulary(read_metadata(path))
    made = Tokenizer.from_str(vocab.tokenizer_json.decode())
    pieces = byte_pieces(vocab)
    with own_tokenizer(path) as tokenize:
        for text in texts:
            ours = made.encode(text).ids
            assert ours == tokenize(text), repr(text)
            plain = [token for token in ours if token not in vocab.special]
            assert b"".join(pieces[token] for token in plain).decode() == made.decode(plain)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2"])
def test_text_is_cut_as_llama_cpp_cuts_it(pre: str, make_tiny: Callable[..., Path], varied_text: str, tmp_path: Path) -> None:
    assert_equal(make_tiny(tmp_path / "tiny.gguf", pre=pre), corpus(varied_text))


@pytest.mark.slow
@pytest.mark.parametrize("pre", SUPPORTED)
def test_every_supported_pre_tokenizer_is_known_to_llama_cpp_and_cuts_alike(pre: str, make_tiny: Callable[..., Path], varied_text: str, tmp_path: Path) -> None:
    assert_equal(make_tiny(tmp_path / "tiny.gguf", pre=pre), corpus(varied_text))


@pytest.mark.slow
def test_smollm2_is_cut_as_llama_cpp_cuts_it(varied_text: str) -> None:
    sources = [Path(json.__file__).read_text(), Path(random.__file__).read_text()]
    assert_equal(resolve("smollm2", Path.home() / ".cache" / "dynamo"), [*corpus(varied_text), *sources])


def test_the_begin_token_comes_first_when_the_file_says_so(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "tiny.gguf", pre="llama-bpe", add_bos=True)
    assert_equal(path, ["Hello", "", "a b"])
    assert vocabulary(read_metadata(path)).add_bos


def test_every_token_that_ends_an_answer_is_known(tiny: Path) -> None:
    vocab = vocabulary(read_metadata(tiny))
    assert vocab.eos == 2
    assert vocab.ends == (2, 0)  # llama.cpp takes <|endoftext|> for an end by its text


@pytest.mark.parametrize(("key", "value", "named"), [("tokenizer.ggml.model", "llama", "byte-level BPE"), ("tokenizer.ggml.pre", "bloom", "smollm")])
def test_a_strange_tokenizer_is_refused_with_what_is_supported(make_tiny: Callable[..., Path], tmp_path: Path, key: str, value: str, named: str) -> None:
    path = make_tiny(tmp_path / "tiny.gguf", **{key: value})
    with pytest.raises(ConfigError, match=named):
        vocabulary(read_metadata(path))
