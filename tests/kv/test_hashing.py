import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.kv import hashing
from dynamo_core.kv.hashing import MAX_DEPTH, Hasher, content_of, depth_of, digest_of

HASHER = Hasher(b"secret", 4)
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=200)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=100), st.integers(1, 20), st.integers(0, 2**64 - 1), st.booleans())
def test_the_compiled_names_are_the_plain_ones(ids: list[int], width: int, parent: int, root: bool):
    if hashing.name_blocks is None:
        pytest.skip("dynamo-kv-native was not compiled")
    hasher, parent = Hasher(b"secret", width), 0 if root else parent
    compiled = hasher.keys(ids, parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "name_blocks", None)
        assert hasher.keys(ids, parent).tolist() == compiled.tolist()


@given(tokens, st.integers(0, 60))
def test_a_chain_can_be_continued_from_any_of_its_keys(ids: list[int], cut: int):
    whole = HASHER.keys(ids)
    cut = min(cut, len(whole))
    rest = HASHER.keys(ids[cut * 4 :], int(whole[cut - 1]) if cut else 0)
    assert np.array_equal(whole, np.concatenate([whole[:cut], rest]))


@given(tokens)
def test_a_key_tells_its_depth_and_partial_blocks_have_none(ids: list[int]):
    assert [depth_of(int(key)) for key in HASHER.keys(ids)] == list(range(1, len(ids) // 4 + 1))


@given(tokens, st.data())
def test_a_changed_token_changes_its_block_and_all_after_it_and_none_before(ids: list[int], data: st.DataObject):
    ids = [*ids, 0, 0, 0, 0]
    at = data.draw(st.integers(0, len(ids) // 4 * 4 - 1))
    changed = [*ids[:at], ids[at] + 1, *ids[at + 1 :]]
    same = HASHER.keys(ids) == HASHER.keys(changed)
    assert same.tolist() == [block < at // 4 for block in range(len(ids) // 4)]


def test_swapped_and_repeated_blocks_have_keys_of_their_own():
    block = [1, 2, 3, 4]
    other = [4, 3, 2, 1]
    assert len({*HASHER.keys(block * 5).tolist()}) == 5
    assert not {*HASHER.keys(block + other).tolist()} & {*HASHER.keys(other + block).tolist()}


def test_another_secret_gives_other_keys_and_says_so():
    other = Hasher(b"another", 4)
    assert other.fingerprint != HASHER.fingerprint == Hasher(b"secret", 16).fingerprint
    assert not {*other.keys(list(range(400))).tolist()} & {*HASHER.keys(list(range(400))).tolist()}


def test_adapters_and_salts_share_nothing():
    ids = list(range(64))
    seen = [{*HASHER.keys(ids, HASHER.root(adapter, salt)).tolist()} for adapter in (None, "a", "b", "") for salt in (None, "a", "b", "")]
    assert len(set().union(*seen)) == len(seen) * 16


def test_an_image_changes_the_blocks_that_it_reaches_into_and_those_after():
    ids = [7] * 40
    cat = HASHER.keys(ids, 0, content_of([{"digest": "cat", "start": 6, "length": 7}], 4))
    dog = HASHER.keys(ids, 0, content_of([{"digest": "dog", "start": 6, "length": 7}], 4))
    assert (cat == dog).tolist() == [True, *[False] * 9]
    assert content_of([{"digest": "cat", "start": 6, "length": 7}], 4) == [(1, digest_of("cat")), (2, digest_of("cat")), (3, digest_of("cat"))]
    assert content_of([{"url": "https://example.org/cat.png"}], 4) == []


def test_the_order_of_images_in_one_block_does_not_matter():
    first = HASHER.keys([7] * 8, 0, [(0, 5), (0, 9)])
    assert np.array_equal(first, HASHER.keys([7] * 8, 0, [(0, 9), (0, 5)]))
    assert not np.array_equal(first, HASHER.keys([7] * 8, 0, [(0, 5), (1, 9)]))


def test_lists_arrays_and_tuples_of_tokens_are_alike():
    ids = list(range(100))
    for form in (tuple(ids), np.array(ids, np.uint32), np.array(ids, np.int64)):
        assert np.array_equal(HASHER.keys(form), HASHER.keys(ids))


@pytest.mark.parametrize("ids", [[-1] * 4, [2**64] * 4])
def test_what_is_no_token_id_is_refused(ids: list[int]):
    with pytest.raises(OverflowError):
        HASHER.keys(ids)


def test_chains_end_where_their_depth_cannot_be_counted_any_more():
    hasher = Hasher(b"s", 1)
    keys = hasher.keys([1] * (MAX_DEPTH + 10))
    assert len(keys) == MAX_DEPTH
    assert len(hasher.keys([1], int(keys[-1]))) == 0


def test_blocks_that_differ_a_little_do_not_collide():
    rng = random.Random(1)
    hasher = Hasher(b"s", 2)
    start = [rng.randrange(128000) for _ in range(40)]
    seen = {int(hasher.keys([*start, a, b])[-1]) for a in range(300) for b in range(300)}
    assert len(seen) == 300 * 300
