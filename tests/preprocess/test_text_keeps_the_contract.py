"""The built-in preprocessor under the kit that third parties use."""

from __future__ import annotations

import sys

import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.contracts.preprocessor import PreprocessorContract
from dynamo_core.preprocess.text import TextPreprocessor


@pytest.fixture(scope="session")
def loaded(tokenizer_json: bytes) -> TextPreprocessor:
    return TextPreprocessor(ModelCard(name="small", context_length=10**6), tokenizer_json)


class TestText(PreprocessorContract):
    long_text = 100_000

    @pytest.fixture
    def preprocessor(self, loaded: TextPreprocessor) -> TextPreprocessor:
        return loaded


class TestTextWithoutAccelerator(PreprocessorContract):
    long_text = 400_000

    @pytest.fixture
    def preprocessor(self, chatml: TextPreprocessor, monkeypatch: pytest.MonkeyPatch) -> TextPreprocessor:
        monkeypatch.setitem(sys.modules, "fastokens", None)
        return TextPreprocessor(ModelCard(name="small", context_length=10**6), chatml._tokenizer.reference.to_str().encode())
