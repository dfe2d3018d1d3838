"""What text costs: templates, tokens, incremental text. Prints a table; `--tokenizer PATH` measures a real `tokenizer.json`.

    python benchmarks/preprocess.py --tokenizer tokenizer.json [--without-fastokens]

CPU time of the whole process, so threads inside the tokenizer count.
"""

from __future__ import annotations

import argparse
import asyncio
import pydoc_data.topics
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dynamo_core.cards import ModelCard
from dynamo_core.preprocess.text import TextPreprocessor
from dynamo_core.types import Output, TextOptions, TokenLogprob

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROSE = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
WORDS = sorted({word for word in PROSE.split() if word.isalpha()})
DICE = random.Random(0)


def small_tokenizer() -> bytes:
    """Byte-level BPE trained here: real enough for ratios; its vocabulary of 8,000 makes more tokens than a real one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    return tokenizer.to_str().encode()


def prose(characters: int) -> str:
    start = DICE.randrange(max(1, len(PROSE) - characters))
    return (PROSE[start:] + " " + PROSE * (characters // len(PROSE) + 1))[:characters]


def cost(action: Callable[[], object], times: int) -> float:
    """CPU seconds of one call: the least of five rounds, so that what else runs on the machine counts little."""
    rounds: list[float] = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(times):
            action()
        rounds.append((time.process_time() - start) / times)
    return min(rounds)


def row(what: str, seconds: float, note: str = "") -> None:
    value = f"{seconds * 1e6:10.2f} us" if seconds < 1e-3 else f"{seconds * 1e3:10.2f} ms"
    print(f"| {what:<64} | {value} | {note}")


async def stall(preprocessor: TextPreprocessor, text: str) -> tuple[float, float]:
    """The longest time for which a task that wakes every millisecond had to wait, while `text` is tokenized, and how long that took."""
    worst, start = 0.0, time.perf_counter()
    work = asyncio.create_task(preprocessor.encode(text, add_special_tokens=False))
    while not work.done():
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        worst = max(worst, time.perf_counter() - before - 0.001)
    await work
    return worst, time.perf_counter() - start


async def measure(content: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    preprocessor = TextPreprocessor(ModelCard(name="bench", chat_template=CHATML, context_length=10**6, eos_token_ids=(2,)), content)
    row("load", time.process_time() - start, f"+{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024} MiB peak")
    tokenizer = preprocessor._tokenizer
    reference = tokenizer.reference

    def fresh() -> None:
        tokenizer._cache._pieces.clear()
        tokenizer._cache._size = 0

    def template(messages: list[dict[str, str]]) -> None:
        preprocessor._template.render(messages)  # pyright: ignore[reportOptionalMemberAccess]

    row("render 1 message", cost(lambda: template([{"role": "user", "content": "Hi"}]), 500))
    row("render 40 messages", cost(lambda: template([{"role": "user", "content": "Hi"}] * 40), 50))

    for name, make in (
        ("20 words", lambda: " ".join(DICE.choices(WORDS, k=20))),
        ("500 words", lambda: " ".join(DICE.choices(WORDS, k=500))),
        ("8,000 words at random", lambda: " ".join(DICE.choices(WORDS, k=8000))),
        ("8,000 words of prose (48,000 characters)", lambda: prose(48_000)),
        ("200,000 characters of prose", lambda: prose(200_000)),
    ):
        texts = [make() for _ in range(5)]
        times = max(1, 20_000 // len(texts[0]))

        def new(texts: list[str] = texts) -> None:
            fresh()
            tokenizer.encode_now(texts[DICE.randrange(5)])

        row(f"tokenize {name}, new", cost(new, times), f"{len(tokenizer.encode_now(texts[0]))} tokens")
        tokenizer.encode_now(texts[0])
        row(f"tokenize {name}, seen before", cost(lambda texts=texts: tokenizer.encode_now(texts[0]), times))
        row(f"  tokenizers alone, encode_batch_fast of {name}", cost(lambda texts=texts: reference.encode_batch_fast([texts[0]])[0].ids, times))

    turns = [f"<|im_start|>user\n{prose(800)}<|im_end|>\n" for _ in range(40)]
    fresh()
    grown = iter("".join(turns[:n]) for n in range(1, 41))
    row("tokenize a conversation of 40 turns, one turn longer each time", cost(lambda: tokenizer.encode_now(next(grown)), 8))

    stalls: list[tuple[float, float]] = []
    for _ in range(9):
        fresh()
        stalls.append(await stall(preprocessor, prose(200_000)))
    worst, took = sorted(stalls)[4]
    row("event loop held up by 200,000 characters, median of nine", worst, f"tokenized in {took * 1e3:.1f} ms")

    ids = reference.encode(prose(4000), add_special_tokens=False).ids
    single = [Output([token_id]) for token_id in ids]
    for name, options, outputs in (
        ("plain", TextOptions(), single),
        ("with two stop strings", TextOptions(stop=("\n\nUser:", "<END>")), single),
        ("with 5 logprobs", TextOptions(logprobs=True), [Output([t], logprobs=[TokenLogprob(t, -1.0, [(t + k, -2.0) for k in range(5)])]) for t in ids]),
        ("16 tokens an output", TextOptions(), [Output(ids[n : n + 16]) for n in range(0, len(ids), 16)]),
    ):

        def run(options: TextOptions = options, outputs: list[Output] = outputs) -> None:
            assembler = preprocessor.assembler(options)
            for output in outputs:
                assembler.push(output)

        row(f"assembler, a token, {name}", cost(run, 10) / len(ids))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tokenizer", type=Path)
    arguments.add_argument("--without-fastokens", action="store_true")
    chosen = arguments.parse_args()
    if chosen.without_fastokens:
        sys.modules["fastokens"] = None  # pyright: ignore[reportArgumentType]
    asyncio.run(measure(chosen.tokenizer.read_bytes() if chosen.tokenizer else small_tokenizer()))


if __name__ == "__main__":
    main()
