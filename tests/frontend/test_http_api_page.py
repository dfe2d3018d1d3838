"""The reference page against the types that decode requests."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import pytest

from dynamo_core.frontend.fields import Annotation, ChatBody, CompletionBody, EmbeddingBody, Extension, StreamOptions
from dynamo_core.frontend.openapi import specification

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "http-api.md").read_text()


@pytest.mark.parametrize("cls", [ChatBody, CompletionBody, EmbeddingBody, Extension, StreamOptions])
def test_every_field_is_on_the_page(cls):
    assert [f.encode_name for f in msgspec.structs.fields(cls) if f"`{f.encode_name}`" not in PAGE] == []


def test_every_annotation_is_on_the_page():
    assert [name for name in get_args(Annotation) if f"`{name}`" not in PAGE] == []


def test_every_route_is_on_the_page():
    assert [path for path in specification()["paths"] if path not in PAGE] == []
