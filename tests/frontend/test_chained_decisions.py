"""A decision is told together with those that followed from it in other processes."""

from __future__ import annotations

from typing import Any


async def test_what_was_decided_further_on_is_part_of_the_answer(site) -> None:
    site.catalog.records["d1"] = {"id": "d1", "text": "the router of frontends"}
    asked: list[str] = []

    async def further(decision_id: str) -> list[dict[str, Any]]:
        asked.append(decision_id)
        return [{"id": "p1", "text": "the pools"}, {"id": "d9", "text": "the router of the pool"}]

    site.catalog.further = further
    answer = (await site.client.get("/debug/decisions/d1")).json()
    assert asked == ["d1"]
    assert [one["id"] for one in (answer, *answer["further"])] == ["d1", "p1", "d9"]
    assert answer["text"] == "the router of frontends\n\nthe pools\n\nthe router of the pool"
    assert (await site.client.get("/debug/decisions/d2")).status_code == 404


async def test_a_decision_that_nothing_followed_is_told_alone(site) -> None:
    site.catalog.records["d1"] = {"id": "d1", "text": "the router of frontends"}

    async def further(decision_id: str) -> list[dict[str, Any]]:
        return []

    site.catalog.further = further
    assert (await site.client.get("/debug/decisions/d1")).json() == {"id": "d1", "text": "the router of frontends"}
