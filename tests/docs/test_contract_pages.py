"""A guarantee has one number in three places: the page, the contract's docstring and the names of the tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "contracts").glob("*.md"))
OF_PLUGINS = sorted([*(ROOT / "plugins").glob("*/src/*"), *(ROOT / "plugins" / "routers").glob("*/src/*")])
"""A plugin that has a kind of its own has its contract and its kit beside it."""
CONTRACTS = "\n".join(path.read_text() for path in [*sorted((ROOT / "dynamo_core").glob("*/contract.py")), *(p for d in OF_PLUGINS for p in d.glob("contract.py"))])
KITS = "\n".join(path.read_text() for path in [*sorted((ROOT / "dynamo_core" / "contracts").glob("*.py")), *(p for d in OF_PLUGINS for p in d.glob("kit.py"))])
OWN_TESTS = "\n".join(path.read_text() for path in sorted((ROOT / "tests").glob("*/test_*.py")))
"""A guarantee that the core gives to plugins, rather than they to it, is tested here and not by a kit."""


def numbers(pattern: str, text: str) -> set[str]:
    return {f"{letter.upper()}{number}" for letter, number in re.findall(pattern, text, re.MULTILINE)}


def of(letter: str, found: set[str]) -> set[str]:
    return {number for number in found if number[0] == letter}


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_a_page_its_contract_and_its_kit_number_the_same_guarantees(page):
    on_page = numbers(r"^(?:[-*] )?\*\*([A-Z])(\d+)\.", page.read_text())
    letters = {number[0] for number in on_page}
    assert len(letters) == 1, f"{page.name} numbers guarantees of {sorted(letters) or 'nobody'}; one letter belongs to one page"
    letter = letters.pop()
    assert on_page == of(letter, numbers(r"^ {4}([A-Z])(\d+)  \S", CONTRACTS)), "the page and the contract's docstring differ"
    assert on_page == of(letter, numbers(r"def test_([a-z])(\d+)_", KITS + OWN_TESTS)), "the page and the names of the tests differ"


def test_no_two_pages_number_with_the_same_letter():
    letters = [match[1] for page in PAGES if (match := re.search(r"^(?:[-*] )?\*\*([A-Z])\d+\.", page.read_text(), re.MULTILINE))]
    assert len(letters) == len({*letters})


def test_every_kit_has_a_page():
    pages = "\n".join(page.read_text() for page in PAGES)
    assert {number[0] for number in numbers(r"def test_([a-z])(\d+)_", KITS)} == {number[0] for number in numbers(r"^(?:[-*] )?\*\*([A-Z])(\d+)\.", pages)}
