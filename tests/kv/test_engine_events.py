"""What engines publish of their caches, read from the bytes that they send."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.engines import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from dynamo_core.kv import Chains, Hasher, engine_events
from dynamo_core.kv.engine_events import EngineEvents

encode = msgspec.msgpack.encode


def stored(*hashes: int, parent: int | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "BlockStored", "block_hashes": list(hashes), "parent_block_hash": parent, "token_ids": list(range(4 * len(hashes))), "block_size": 4,
            "lora_id": None, "medium": "GPU", "lora_name": None, "group_idx": 0, "kv_cache_spec_kind": "full_attention", **more}  # fmt: skip


def removed(*hashes: int, medium: str = "GPU", group: int = 0) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": medium, "group_idx": group}


def read(*events: Any, reader: EngineEvents | None = None) -> list[KvEvent]:
    return (reader or EngineEvents()).read(encode((1.0, events, 0)))


def salts(events: Sequence[KvEvent]) -> list[str | None]:
    return [event.cache_salt for event in events if isinstance(event, BlocksStored)]


def test_a_stored_block_has_all_that_the_contract_asks_for() -> None:
    (event,) = read(stored(7, 8, parent=6, lora_name="sql"))
    assert event == BlocksStored(array("Q", [7, 8]), 6, array("Q", range(8)), "device", "sql", block_size=4)


def test_a_salt_is_known_for_every_block_below_the_first() -> None:
    assert salts(read(stored(1, 2, extra_keys=[["tenant"], None]), stored(3, parent=2), stored(9))) == ["tenant", "tenant", None]


def test_a_salt_with_a_name_of_its_own_is_taken_from_there() -> None:
    assert salts(read(stored(1, cache_salt="tenant"), stored(2))) == ["tenant", None]


def test_a_salt_is_forgotten_with_the_block_that_had_it() -> None:
    reader = EngineEvents()
    read(stored(1, extra_keys=[["tenant"]]), removed(1), reader=reader)
    assert salts(read(stored(1), stored(2, parent=1), reader=reader)) == [None, None]


def test_an_adapter_is_named_and_is_not_taken_for_a_salt() -> None:
    one, two = read(stored(1, lora_name="sql", extra_keys=[["sql"]]), stored(2, lora_name="sql", extra_keys=[["sql", "tenant"]]))
    assert isinstance(one, BlocksStored)
    assert isinstance(two, BlocksStored)
    assert (one.adapter, one.cache_salt, two.adapter, two.cache_salt) == ("sql", None, "sql", "tenant")


def test_media_are_known_by_how_their_names_begin() -> None:
    event = stored(1, 2, extra_keys=[["media:cat", "tenant"], [["media:dog", 3]]])
    (with_media,) = read(event, reader=EngineEvents("media:"))
    assert isinstance(with_media, BlocksStored)
    assert (with_media.media, with_media.cache_salt) == ([["cat"], ["dog"]], "tenant")
    (without,) = read(stored(1))
    assert isinstance(without, BlocksStored)
    assert not without.media


def test_blocks_of_sliding_windows_say_nothing_about_prefixes_and_are_left_out() -> None:
    events = read(stored(1), stored(7, group_idx=1, kv_cache_spec_kind="sliding_window"), removed(7, group=1), removed(1, medium="CPU"),
                  {"type": "AllBlocksCleared"}, {"type": "SomethingNew", "with": [1]})  # fmt: skip
    assert events[1:] == [BlocksRemoved(array("Q", [1]), "host"), BlocksCleared()]
    assert isinstance(events[0], BlocksStored)


def test_blocks_of_another_size_become_a_named_problem_and_not_silence() -> None:
    chains = Chains(Hasher(b"secret", 16))
    assert not chains.apply(read(stored(1)))
    assert chains.problem() == "the engine reports blocks of 4 tokens, and its card says 16"


@pytest.mark.parametrize(("medium", "tier"), [("GPU", "device"), (None, "device"), ("CPU", "host"), ("CPU_PINNED", "host"), ("DISK", "disk"), ("STORAGE", "disk"), ("NETWORK", "external")])
def test_every_medium_has_a_tier(medium: str | None, tier: str) -> None:
    (event,) = read(stored(1, medium=medium))
    assert isinstance(event, BlocksStored)
    assert event.tier == tier


def test_events_in_arrays_say_the_same() -> None:
    as_map = read(stored(1, 2, parent=9, lora_name="sql", extra_keys=[["sql", "a"], None]), removed(1), {"type": "AllBlocksCleared"})
    as_array = read(["BlockStored", [1, 2], 9, list(range(8)), 4, None, "GPU", "sql", [["sql", "a"], None]], ["BlockRemoved", [1], "GPU"], ["AllBlocksCleared"])
    short = EngineEvents().read(encode([1.0, [["BlockStored", [1], None, [1, 2, 3, 4], 4, None, "GPU"], ["Unknown", {}, 2]]]))
    assert as_array == as_map
    assert short == [BlocksStored(array("Q", [1]), None, array("Q", [1, 2, 3, 4]), block_size=4)]


@pytest.mark.parametrize("event", [
    {"type": "BlockStored", "nonsense": True}, {"no": "type"}, 7, [], [1, 2], "BlockStored", stored(1, token_ids="text"), stored(1, token_ids=[1, 2.5, 3, 4]),
    stored(1, token_ids=[[1, 2], [2, 3]]), stored("x"),  # type: ignore[arg-type]
    stored(1, token_ids=[1, -2, 3, 4]),
])  # fmt: skip
def test_nonsense_is_an_error_and_nothing_else(event: Any) -> None:
    with pytest.raises((ValueError, OverflowError)):
        read(event)


@pytest.mark.parametrize("message", [b"", b"\xc0", b"\x93", encode([1.0]), encode([1.0, 5, 0]), encode({"a": 1})])
def test_a_message_that_is_no_batch_is_an_error(message: bytes) -> None:
    with pytest.raises(ValueError):
        EngineEvents().read(message)


# ------------------------------------------------------------------ numbers, packed by dynamo-kv-native and plain

NUMBERS = st.integers(0, 2**64 - 1) | st.integers(0, 300) | st.sampled_from([127, 128, 255, 256, 65535, 65536, 2**31, 2**32 - 1, 2**32, 2**63])
ODD = st.none() | st.integers(-(2**63), -1) | st.floats(allow_nan=False) | st.text(max_size=3) | st.binary(max_size=40) | st.lists(st.integers(0, 9), max_size=3)
FIELDS = st.lists(NUMBERS, max_size=40) | st.lists(NUMBERS | ODD, max_size=4) | ODD
STORED = st.builds(
    lambda hashes, parent, tokens, more: {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens, "block_size": 4} | more,
    FIELDS, st.none() | NUMBERS, FIELDS, st.dictionaries(st.sampled_from(["lora_id", "extra_keys", "medium", "token", "x"]), ODD | FIELDS, max_size=2),
)
FINE = st.builds(lambda hashes, tokens: stored(*hashes, token_ids=tokens), st.lists(NUMBERS, max_size=40), st.lists(NUMBERS, max_size=40))
EVENTS = FINE | STORED | STORED.map(lambda event: list(event.values())) | st.builds(lambda hashes: {"type": "BlockRemoved", "block_hashes": hashes}, FIELDS) | FIELDS
MESSAGES = st.builds(lambda events, rest: encode([1.0, events, *rest]), st.lists(FINE, max_size=3) | st.lists(EVENTS, max_size=4), st.lists(ODD, max_size=2))


@pytest.fixture(scope="module")
def pack_numbers():
    return pytest.importorskip("dynamo_kv_native", reason="dynamo-kv-native was not compiled", exc_type=ImportError).pack_numbers


def outcome(message: bytes, pack: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_events, "pack_numbers", pack)
        try:
            events = EngineEvents().read(message)
        except (ValueError, TypeError, OverflowError):
            return "refused"
    return [(type(event), *(list(part) if isinstance(part, array) else part for part in msgspec.structs.astuple(event))) for event in events]


@given(tokens=st.lists(NUMBERS, min_size=4))
def test_numbers_come_as_they_were_sent(tokens: list[int]) -> None:
    (event,) = read(stored(*tokens[: len(tokens) // 4], token_ids=tokens))
    assert isinstance(event, BlocksStored)
    assert (list(event.hashes), list(event.token_ids)) == (tokens[: len(tokens) // 4], tokens)


@given(message=MESSAGES | st.binary(max_size=60) | st.builds(lambda message, cut: message[:cut], MESSAGES, st.integers(1, 200)))
def test_a_message_whose_numbers_are_packed_says_what_it_said_before(pack_numbers: Any, message: bytes) -> None:
    assert outcome(message, pack_numbers) == outcome(message, None)


def test_numbers_are_packed_in_maps_and_in_arrays(pack_numbers: Any) -> None:
    event = {"type": "BlockStored", "block_hashes": [1, 2**63], "parent_block_hash": None, "token_ids": [*range(300)], "block_size": 4}
    wanted = event | {"block_hashes": array("Q", [1, 2**63]).tobytes(), "token_ids": array("Q", range(300)).tobytes()}
    assert msgspec.msgpack.decode(pack_numbers(encode([1.0, [event, [*event.values()]], 7]))) == [1.0, [wanted, [*wanted.values()]], 7]
