"""P4: a stop string ends the text at its first match, for any chunking."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.preprocess.stops import StopScanner

STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)
TEXT = st.text("abcd", max_size=40)


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def run(chunks: list[str], stops: list[str], include: bool = False) -> tuple[list[str], str | None]:
    scanner = StopScanner(stops, include=include)
    shown: list[str] = []
    for chunk in chunks:
        text, stop = scanner.push(chunk)
        shown.append(text)
        if stop is not None:
            return shown, stop
    return [*shown, scanner.flush()], None


def cut(text: str, at: list[int]) -> list[str]:
    bounds = [0, *sorted(n % (len(text) + 1) for n in at), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


@settings(max_examples=500)
@given(text=TEXT, stops=STOPS, at=st.lists(st.integers(0, 100), max_size=12), include=st.booleans())
def test_p4_any_chunking_gives_what_the_whole_text_gives(text: str, stops: list[str], at: list[int], include: bool) -> None:
    shown, stop = run(cut(text, at), stops, include)
    assert ("".join(shown), stop) == naive(text, stops, include)


@settings(max_examples=300)
@given(text=TEXT, stops=STOPS)
def test_p4_only_what_may_yet_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for n, char in enumerate(text, 1):
        more, stop = scanner.push(char)
        shown += more
        if stop is not None:
            return
        held = text[len(shown) : n]
        assert held == max((text[n - k : n] for s in stops for k in range(len(s)) if text[:n].endswith(s[:k])), key=len)


@pytest.mark.parametrize(
    ("text", "stops", "shown", "stop"),
    [
        ("one two three", ["two"], "one ", "two"),
        ("abcd", ["abcd", "bc"], "a", "bc"),
        ("xabc", ["bc", "abc"], "x", "abc"),
        ("aXaXb", ["XaXc"], "aXaXb", None),
        ("aaab", ["aab"], "a", "aab"),
        ("日本語END", ["END"], "日本語", "END"),
        ("plain", ["", "z"], "plain", None),
    ],
)
def test_p4_the_stop_string_that_is_complete_first_counts_and_the_longest_of_those(text: str, stops: list[str], shown: str, stop: str | None) -> None:
    for chunks in ([text], list(text)):
        got, found = run(chunks, stops)
        assert ("".join(got), found) == (shown, stop)
