"""A sink spares the reader a wake-up, and changes nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from dynamo_core.errors import Disconnected
from dynamo_core.transport.contract import Item, Listening
from dynamo_core.transport.mailbox import Mailbox
from dynamo_core.types import Output


def output(token: int) -> Output:
    return Output([token], 0, None)


def tokens(items: Sequence[Item]) -> list[int]:
    return [token for item in items if isinstance(item, Output) for token in item.token_ids]


async def waiting(mailbox: Mailbox) -> asyncio.Task[Sequence[Item]]:
    reader = asyncio.create_task(mailbox.read())  # pyright: ignore[reportArgumentType]
    await asyncio.sleep(0)
    return reader


class Sink:
    def __init__(self) -> None:
        self.got: list[int] = []
        self.open = True

    def __call__(self, items: Sequence[Item]) -> bool:
        if self.open:
            self.got += tokens(items)
        return self.open


async def test_a_sink_gets_items_while_the_reader_waits_and_the_reader_stays_asleep() -> None:
    mailbox, sink = Mailbox(), Sink()
    assert isinstance(mailbox, Listening)
    mailbox.listen(sink)
    reader = await waiting(mailbox)
    mailbox.put(output(1))
    mailbox.put(output(2))
    assert sink.got == [1, 2]
    await asyncio.sleep(0)
    assert not reader.done()
    mailbox.finish()
    assert await reader == ()


async def test_what_a_sink_declines_is_read_and_what_follows_waits_its_turn() -> None:
    mailbox, sink = Mailbox(), Sink()
    mailbox.listen(sink)
    reader = await waiting(mailbox)
    sink.open = False
    mailbox.put(output(1))
    sink.open = True
    mailbox.put(output(2))
    assert sink.got == []
    assert tokens(await reader) == [1, 2]


async def test_items_that_nobody_waits_for_are_read() -> None:
    mailbox, sink = Mailbox(), Sink()
    mailbox.listen(sink)
    mailbox.put(output(1))
    assert sink.got == []
    assert tokens(await mailbox.read()) == [1]


async def test_an_error_reaches_the_reader_after_all_items() -> None:
    mailbox, sink = Mailbox(), Sink()
    mailbox.listen(sink)
    reader = await waiting(mailbox)
    mailbox.put(output(1))
    mailbox.add(output(2))
    mailbox.finish(Disconnected("gone"))
    assert sink.got == [1]
    assert tokens(await reader) == [2]
    with pytest.raises(Disconnected, match="gone"):
        await mailbox.read()


async def test_a_sink_that_breaks_fails_the_reader_and_not_who_fills_the_mailbox() -> None:
    mailbox = Mailbox()

    def broken(items: Sequence[Item]) -> bool:
        raise LookupError("no such token")

    mailbox.listen(broken)
    reader = await waiting(mailbox)
    mailbox.put(output(1))
    with pytest.raises(LookupError, match="no such token"):
        await reader


async def test_a_reader_that_was_cancelled_is_not_replaced_by_the_sink() -> None:
    mailbox, sink = Mailbox(), Sink()
    mailbox.listen(sink)
    reader = await waiting(mailbox)
    reader.cancel()
    mailbox.put(output(1))
    assert sink.got == []
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert tokens(await mailbox.read()) == [1]
