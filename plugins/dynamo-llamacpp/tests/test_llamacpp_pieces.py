from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dynamo_llamacpp.pieces import Pieces, unfinished

EMOJI = "😀".encode()
VOCABULARY = [b"", b" ", b"a", *(bytes([byte]) for byte in range(0x80, 0xF8)), EMOJI[:3], EMOJI[2:], EMOJI[1:], b" " + EMOJI[:2]]
ID = {piece: token for token, piece in reversed(list(enumerate(VOCABULARY)))}
PIECES = Pieces(VOCABULARY)


def test_one_hidden_token_is_found() -> None:
    assert PIECES.within("😀", 1, ID[EMOJI[3:]], unique=True) == [ID[EMOJI[:3]]]


def test_two_hidden_tokens_with_one_answer_are_found() -> None:
    assert PIECES.within("é世", 2, ID["世".encode()[2:]], unique=True) is None  # é was a whole character: its token would have been named
    assert PIECES.within("世", 2, ID["世".encode()[2:]], unique=True) == [ID["世".encode()[:1]], ID["世".encode()[1:2]]]


def test_an_ambiguous_cut_is_not_guessed_unless_a_guess_will_do() -> None:
    pieces = Pieces([EMOJI[:1], EMOJI[1:2], EMOJI[2:3], EMOJI[3:], EMOJI[:2], EMOJI[1:3]])
    assert pieces.within("😀", 2, 3, unique=True) is None
    assert pieces.within("😀", 2, 3, unique=False) in ([4, 2], [0, 5])


def test_text_that_does_not_end_with_the_named_token_has_no_answer() -> None:
    assert PIECES.within("\ufffd", 1, ID[b"a"], unique=True) is None


@given(st.text(max_size=3).map(str.encode))
def test_whole_text_is_never_unfinished_and_a_cut_character_always_is(text: bytes) -> None:
    assert not unfinished(text)
    for lead in ("é".encode(), "世".encode(), EMOJI):
        for size in range(1, len(lead)):
            assert unfinished(text + lead[:size])
