"""One card for all pools: what a frontend must know to serve the model, without weights, from cards of workers that have them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from dynamo_core.cards import Handover, ModelCard, Role

NEEDS: dict[Role, tuple[tuple[Role, ...], ...]] = {"prefill": (("decode",),), "decode": (("prefill",),)}


def joined(cards: Sequence[ModelCard], role: Role, version: str) -> ModelCard:
    """Text is read and written as the first card says. The rest is the most that any pool can do: each request goes to one that can do what it needs."""
    first = cards[0]
    return msgspec.structs.replace(
        first,
        aliases=tuple(dict.fromkeys(alias for card in cards for alias in card.aliases)),
        role=role,
        needs=NEEDS.get(role, ()),
        surfaces=tuple(dict.fromkeys(surface for card in cards for surface in card.surfaces)),
        context_length=max(card.context_length for card in cards),
        capabilities=tuple(dict.fromkeys([*(capability for card in cards for capability in card.capabilities), "explain"])),
        # How much fits is the pools' affair, and what is cached there nobody tells.
        handover=first.handover if role in NEEDS else Handover(),
        total_blocks=None, max_sequences=None, max_batched_tokens=None, dp_size=1, dp_start=0, kv_events=False, taints=(), runtime={},
        engine=f"global-router {version}",
    )


def stranger(first: ModelCard, card: ModelCard) -> str | None:
    """Why tokens that were made for `first` mean something else to the workers of `card`, or `None`."""
    mine, theirs = (c.tokenizer.digest if c.tokenizer else None for c in (first, card))
    if mine != theirs:
        return "its workers have another tokenizer than those of the pool that the model was first seen in"
    if set(first.eos_token_ids) != set(card.eos_token_ids):
        return "its workers end their answers by other tokens than those of the pool that the model was first seen in"
    return None
