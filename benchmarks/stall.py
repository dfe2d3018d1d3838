"""How long the event loop stands still while a prompt of 200,000 characters is tokenized, as the frontend tokenizes it."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from pathlib import Path
from statistics import median

import uvloop

from benchmarks.model import words
from dynamo_core.cards import ModelCard
from dynamo_core.preprocess.text import TextPreprocessor

CHARACTERS = 200_000
ROUNDS = 9


async def worst_ms(preprocessor: TextPreprocessor, text: str) -> float:
    """Of a task that wakes every millisecond."""
    work = asyncio.create_task(preprocessor.encode(text, add_special_tokens=False))
    worst = 0.0
    while not work.done():
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        worst = max(worst, time.perf_counter() - before - 0.001)
    await work
    return worst * 1000


async def measure(model: Path) -> float:
    """The median of several texts that were never seen."""
    sys.modules["fastokens"] = None  # pyright: ignore[reportArgumentType]
    preprocessor = TextPreprocessor(ModelCard(name="bench", context_length=10**6), (model / "tokenizer.json").read_bytes())
    dice, vocabulary, found = random.Random(1), words(), list[float]()
    for _ in range(ROUNDS):
        found.append(await worst_ms(preprocessor, " ".join(dice.choices(vocabulary, k=CHARACTERS // 6))[:CHARACTERS]))
    return median(found)


if __name__ == "__main__":
    print(uvloop.run(measure(Path(sys.argv[1]))))
