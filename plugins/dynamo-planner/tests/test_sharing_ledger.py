"""One budget over several planners: who gets what, and when."""

from __future__ import annotations

import random

import attrs
import pytest

from dynamo_core.config import Secret
from dynamo_planner.sharing.ledger import Ledger, Member

TOKEN = Secret("0123456789abcdef")
LEASE, PATIENCE = 10.0, 30.0


def ledger(gpus: int, **members: Member) -> Ledger:
    """As one that has learned for a lease who has what."""
    return Ledger(gpus, members or {"a": Member(TOKEN), "b": Member(TOKEN)}, LEASE, PATIENCE, started=-LEASE)


def test_what_fits_is_granted_and_what_does_not_is_parked() -> None:
    book = ledger(8)
    assert book.ask("a", 5, 0, 0).granted == 5
    answer = book.ask("b", 4, 0, 0)
    assert (answer.granted, answer.parked, answer.free) == (0, 4, 3)
    assert "4 GPUs do not fit: 0 are held and 3 could be had now" in answer.why


def test_a_parked_intent_is_granted_when_room_appears() -> None:
    book = ledger(8)
    book.ask("a", 5, 5, 0)
    book.ask("b", 4, 0, 0)
    book.ask("a", 4, 4, 1)
    assert book.ask("b", 4, 0, 2).granted == 4
    assert book.ask("b", 4, 4, 3).parked is None


def test_what_drains_is_held_until_it_is_gone() -> None:
    book = ledger(8)
    book.ask("a", 8, 8, 0)
    book.ask("b", 4, 0, 0)
    assert book.ask("a", 2, 8, 1).granted == 2
    assert book.ask("b", 4, 0, 2).granted == 0, "GPUs were granted that others still use"
    book.ask("a", 2, 4, 3)
    assert book.ask("b", 4, 0, 4).granted == 4


def test_a_smaller_wish_is_answered_at_once_and_a_larger_one_leaves_what_was_granted() -> None:
    book = ledger(8)
    book.ask("a", 6, 0, 0)
    book.ask("b", 2, 2, 0)
    answer = book.ask("a", 7, 6, 1)
    assert (answer.granted, answer.parked) == (6, 7)
    answer = book.ask("a", 3, 6, 2)
    assert (answer.granted, answer.parked) == (3, None)


def test_a_planner_that_dies_loses_its_grant_with_its_lease() -> None:
    book = ledger(8)
    book.ask("a", 8, 8, 0)
    book.ask("b", 4, 0, LEASE - 1)
    assert book.holdings()["b"] == (0, 0, 4)
    assert book.ask("b", 4, 0, LEASE).granted == 4
    assert set(book.holdings()) == {"b"}


def test_the_higher_priority_goes_first_however_long_the_other_has_waited() -> None:
    book = ledger(8, a=Member(TOKEN), b=Member(TOKEN), c=Member(TOKEN, priority=1))
    book.ask("a", 8, 8, 0)
    book.ask("b", 4, 0, 0)
    book.ask("c", 6, 0, 5)
    book.ask("a", 2, 2, 6)
    assert book.holdings() == {"a": (2, 2, 0), "b": (0, 0, 4), "c": (6, 0, 0)}


def test_of_equals_the_one_with_least_for_its_share_goes_first() -> None:
    book = ledger(12, a=Member(TOKEN, share=3.0), b=Member(TOKEN), c=Member(TOKEN))
    book.ask("c", 7, 7, 0)
    book.ask("a", 3, 3, 0)
    book.ask("b", 2, 2, 0)
    book.ask("b", 4, 2, 1)
    book.ask("a", 5, 3, 2)
    book.ask("c", 5, 5, 3)
    assert book.holdings()["a"] == (5, 3, 0)
    assert book.holdings()["b"] == (2, 2, 4)


def test_a_large_intent_lets_small_ones_overtake_it_for_its_patience_and_no_longer() -> None:
    book = ledger(10, a=Member(TOKEN), b=Member(TOKEN, priority=1), c=Member(TOKEN))
    book.ask("a", 8, 8, 0)
    book.ask("b", 6, 0, 0)
    assert book.ask("c", 1, 0, 1).granted == 1
    for now in range(2, int(PATIENCE) + 2, 5):
        book.ask("a", 8, 8, now), book.ask("b", 6, 0, now), book.ask("c", 1, 1, now)
    assert book.ask("c", 2, 1, PATIENCE + 2).granted == 1, "a small wish took the room that a large one waits for"


def test_minimums_are_kept_for_those_who_are_not_there() -> None:
    book = ledger(8, a=Member(TOKEN), b=Member(TOKEN, minimum=3))
    assert book.ask("a", 6, 0, 0).granted == 0
    assert book.ask("a", 5, 0, 1).granted == 5
    assert book.ask("b", 3, 0, 2).granted == 3


def test_who_holds_more_than_his_share_goes_down_for_an_intent_that_has_waited_long_enough() -> None:
    book = ledger(8)
    book.ask("a", 8, 8, 0)
    for now in range(0, int(PATIENCE), 5):
        book.ask("b", 4, 0, now)
        assert book.ask("a", 8, 8, now).limit is None
    book.ask("b", 4, 0, PATIENCE)
    answer = book.ask("a", 8, 8, PATIENCE)
    assert answer.limit == 4
    assert "others have a better claim, so go down to 4" in answer.why
    book.ask("a", 4, 4, PATIENCE + 1)
    assert book.ask("b", 4, 0, PATIENCE + 2).granted == 4
    assert book.ask("a", 8, 4, PATIENCE + 3).limit is None, "both have their share now"


def test_nobody_goes_down_for_a_wish_beyond_its_share() -> None:
    book = ledger(8)
    for now in range(0, int(PATIENCE) + 10, 5):
        book.ask("a", 5, 5, now)
        book.ask("b", 7, 0, now)
    assert book.ask("a", 5, 5, PATIENCE + 10).limit is None


def test_shares_are_minimums_then_priorities_then_shares() -> None:
    book = ledger(12, a=Member(TOKEN, share=2.0), b=Member(TOKEN), c=Member(TOKEN, minimum=2), d=Member(TOKEN, priority=5))
    for name, wanted in (("a", 12), ("b", 12), ("c", 12), ("d", 3)):
        book.ask(name, wanted, 0, 0)
    shares = book.shares()
    assert sum(shares.values()) == 12
    assert shares == {"a": 5, "b": 2, "c": 2, "d": 3}


def test_a_new_ledger_learns_for_a_lease_who_has_what_before_it_grants() -> None:
    book = Ledger(8, {"a": Member(TOKEN), "b": Member(TOKEN)}, LEASE, PATIENCE, started=0.0)
    assert book.ask("b", 8, 0, 1).parked == 8
    assert book.ask("a", 6, 6, 2).granted == 6, "it has them from the ledger before"
    assert book.ask("b", 8, 0, LEASE).granted == 0
    assert book.ask("b", 2, 0, LEASE + 1).granted == 2


def test_a_planner_that_returns_with_what_it_uses_is_counted_though_its_grant_went_to_others() -> None:
    book = ledger(8)
    book.ask("b", 6, 6, 0)
    answer = book.ask("a", 4, 4, 1)
    assert (answer.granted, answer.parked, answer.free) == (0, 4, 0)
    assert book.ask("b", 7, 6, 2).parked == 7


@pytest.mark.parametrize("seed", range(30))
def test_whatever_planners_ask_the_budget_is_never_exceeded_by_a_grant(seed: int) -> None:
    """Planners that use no more than they were granted, and drain what they give back."""
    dice = random.Random(seed)
    gpus = dice.randrange(4, 20)
    names = "abcd"
    book = ledger(gpus, **{name: Member(TOKEN, priority=dice.randrange(2), share=dice.choice((1.0, 2.0)), minimum=dice.randrange(2)) for name in names})
    granted, in_use = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    last = dict.fromkeys(names, 0.0)
    now = 0.0
    for _ in range(400):
        now += dice.random() * 2
        name = dice.choice(names)
        if now - last[name] >= LEASE:
            in_use[name] = 0  # it died, and its workers with it
        last[name] = now
        in_use[name] = dice.randint(min(granted[name], in_use[name]), max(granted[name], in_use[name])) if in_use[name] else dice.randint(0, granted[name])
        in_use = {each: count if now - last[each] < LEASE else 0 for each, count in in_use.items()}
        answer = book.ask(name, dice.randrange(gpus + 1), in_use[name], now)
        granted[name] = answer.granted
        granted = {each: count if each in book.holdings() else 0 for each, count in granted.items()}
        assert sum(max(had, used) for had, used, _ in book.holdings().values()) <= gpus
        assert answer.free >= 0


@pytest.mark.parametrize("seed", range(10))
def test_every_intent_within_its_share_is_granted_in_the_end(seed: int) -> None:
    dice = random.Random(seed)
    names = "abc"
    book = ledger(9, **{name: Member(TOKEN) for name in names})
    has = {"a": 9, "b": 0, "c": 0}
    now = 0.0
    book.ask("a", 9, 9, now)
    while now < 10 * PATIENCE and has != dict.fromkeys(names, 3):
        now += 1.0
        for name in dice.sample(names, 3):
            wanted = 9 if name == "a" else 3
            answer = book.ask(name, wanted if answer_limit(book, name) is None else 3, has[name], now)
            has[name] = min(answer.granted, answer.limit if answer.limit is not None else answer.granted)
            if answer.limit is not None:
                book.ask(name, answer.limit, has[name], now)
    assert has == dict.fromkeys(names, 3)


def answer_limit(book: Ledger, name: str) -> int | None:
    """A planner that was told to go down does not ask for more at once."""
    account = book._accounts.get(name)
    return 3 if account is not None and name == "a" and account.granted <= 3 else None


def test_members_are_checked() -> None:
    with pytest.raises(ValueError):
        Member(TOKEN, share=0.0)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Member(TOKEN).priority = 1  # type: ignore[misc]
