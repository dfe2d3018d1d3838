"""What a finished generation leaves behind: nothing that waits for the garbage collector, since a prompt of 8,000 tokens is a third of a megabyte."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest

from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.types import Delta


class Sink:
    def __init__(self) -> None:
        self.text = ""

    def ready(self) -> bool:
        return True

    def take(self, deltas: Sequence[Delta]) -> None:
        self.text += "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("end", ["length", "stop", "cancel"])
async def test_a_generation_that_was_poured_goes_at_once(end: str) -> None:
    async with Cluster.up(workers=1, options={"delay": 0.005}) as cluster:
        gc.collect()
        gc.disable()
        try:
            generation = await cluster.generate("one two three four", max_tokens=14, stop=["thr"] if end == "stop" else ())
            sink = Sink()
            generation.pour(sink)
            if end == "cancel":
                await generation.read()
                generation.cancel()
            else:
                await read_all(generation)
                assert await generation.read() == ()
            left = weakref.ref(generation)
            del generation
            assert left() is None
        finally:
            gc.enable()
