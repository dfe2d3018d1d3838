"""What the engine does beyond the contract, on the real llama.cpp with a tiny model."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import xllamacpp
from tokenizers import Tokenizer

from dynamo_core.context import Context
from dynamo_core.engines import EngineContext
from dynamo_core.errors import ConfigError, EngineDead, PromptTooLong, RequestError
from dynamo_core.types import Guided, Output, Request, Sampling, Stops
from dynamo_llamacpp.engine import LlamaCppEngine
from dynamo_llamacpp.gguf import read_metadata
from dynamo_llamacpp.pieces import unfinished
from dynamo_llamacpp.tokenizer import byte_pieces, vocabulary

GREEDY = Sampling(temperature=0.0)
PROMPT = [300, 17, 402, 99, 5, 611, 350]


@pytest.fixture
async def engine(tiny: Path) -> AsyncIterator[LlamaCppEngine]:
    engine = LlamaCppEngine(model=str(tiny), slots=2, context=512)
    await engine.start(EngineContext())
    yield engine
    await engine.stop()


async def ask(engine: LlamaCppEngine, prompt: Sequence[int] = PROMPT, max_tokens: int = 16, sampling: Sampling = GREEDY, ignore_eos: bool = True,
              **other: Any) -> list[Output]:  # fmt: skip
    stops = Stops(max_tokens=max_tokens, ignore_eos=ignore_eos, min_tokens=other.pop("min_tokens", 0))
    request = Request(id="t", model="t", token_ids=list(prompt), sampling=sampling, stops=stops, **other)
    return [output async for output in engine.generate(request, Context("t"))]


def tokens(outputs: Sequence[Output], index: int = 0) -> list[int]:
    return [token for output in outputs if output.index == index for token in output.token_ids]


def text(engine: LlamaCppEngine, outputs: Sequence[Output]) -> str:
    running: Any = engine._running  # pyright: ignore[reportPrivateUsage]
    return Tokenizer.from_str(running.tokenizer.decode()).decode(tokens(outputs))


# ------------------------------------------------------------------ every token has its name


def named_by_llama_cpp(path: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The same answers from runs that do not stream, in which llama.cpp names every token."""
    p: Any = xllamacpp.CommonParams()  # type: ignore[attr-defined]
    p.model.path, p.n_ctx, p.n_parallel, p.port, p.verbosity, p.cpuparams.n_threads = str(path), 1024, 1, 0, 0, 1
    server: Any = xllamacpp.Server(p)  # type: ignore[attr-defined]
    answers: list[list[int]] = []
    for prompt in prompts:
        body = {"prompt": list(prompt), "n_predict": count, "temperature": 0, "return_tokens": True, "verbose": True, "logit_bias": [[0, False], [2, False]]}
        server.handle_completions(json.dumps(body).encode(), lambda raw: answers.append(json.loads(raw)["__verbose"]["tokens"]))
    return answers


async def test_a_streamed_answer_names_every_token_even_within_a_character(engine: LlamaCppEngine, tiny: Path) -> None:
    prompts = [[3 + (i * 37 + j * 11) % 610 for j in range(8)] for i in range(20)]
    expected = named_by_llama_cpp(tiny, prompts, 48)
    pieces = byte_pieces(vocabulary(read_metadata(tiny)))
    assert any(unfinished(pieces[token]) for answer in expected for token in answer), "random weights make parts of characters"
    for prompt, answer in zip(prompts, expected, strict=True):
        assert tokens(await ask(engine, prompt, 48)) == answer


async def test_logprobs_are_there_for_every_token_and_agree_with_the_greedy_choice(engine: LlamaCppEngine) -> None:
    for prompt in ([3 + (i * 37 + j * 11) % 610 for j in range(8)] for i in range(6)):
        outputs = await ask(engine, prompt, 32, logprobs=3)
        positions = [position for output in outputs for position in output.logprobs or ()]
        assert [position.token_id for position in positions] == tokens(outputs) == tokens(await ask(engine, prompt, 32))
        for position in positions:
            assert len(position.top) == 3
            assert position.logprob <= position.top[0][1] <= 0
            assert sum(math.exp(logprob) for _, logprob in position.top) <= 1 + 1e-5
            if position.token_id not in (0, 2):
                assert position.token_id in dict(position.top) or position.logprob <= position.top[-1][1]


async def test_logprobs_of_zero_alternatives_name_only_the_chosen(engine: LlamaCppEngine) -> None:
    outputs = await ask(engine, logprobs=0)
    assert all(position.top == [] and position.logprob < 0 for output in outputs for position in output.logprobs or ())


# ------------------------------------------------------------------ sampling


async def test_a_seed_repeats_and_another_seed_does_not(engine: LlamaCppEngine) -> None:
    answers = [tokens(await ask(engine, sampling=Sampling(temperature=1.0, seed=seed))) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


async def test_choices_of_one_request_differ_and_repeat_with_the_seed(engine: LlamaCppEngine) -> None:
    first, again = [await ask(engine, sampling=Sampling(temperature=1.0, seed=3, n=4)) for _ in range(2)]
    answers = [tokens(first, i) for i in range(4)]
    assert answers == [tokens(again, i) for i in range(4)]
    assert len({tuple(answer) for answer in answers}) == 4


async def test_penalties_change_the_answer(engine: LlamaCppEngine) -> None:
    plain = tokens(await ask(engine, max_tokens=48))
    punished = tokens(await ask(engine, max_tokens=48, sampling=Sampling(temperature=0.0, frequency_penalty=2.0, repetition_penalty=1.8)))
    assert len(set(punished)) >= len(set(plain))
    assert punished != plain


@pytest.mark.parametrize("bad", [{"prompt": [3, 9999]}, {"prompt": [-1]}, {"sampling": Sampling(logit_bias={9999: 1.0})}, {"logprobs": 5000}])
async def test_what_is_not_in_the_vocabulary_is_refused(engine: LlamaCppEngine, bad: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        await ask(engine, **bad)
    assert await ask(engine)


async def test_a_prompt_that_is_too_long_is_refused_before_it_reaches_llama_cpp(engine: LlamaCppEngine) -> None:
    with pytest.raises(PromptTooLong):
        await ask(engine, PROMPT * 100)


@pytest.mark.parametrize("room", [1, 2, 5])
async def test_the_whole_training_context_can_be_used(tiny: Path, room: int) -> None:
    engine = LlamaCppEngine(model=str(tiny), slots=1, context=2048)
    await engine.start(EngineContext())
    try:
        answer = await ask(engine, [PROMPT[i % len(PROMPT)] for i in range(2048 - room)], 100)
    finally:
        await engine.stop()
    assert len(tokens(answer)) in (room, max(1, room - 1))
    assert answer[-1].finish_reason == "length"


# ------------------------------------------------------------------ constraints


@pytest.mark.parametrize("pattern", [r"[a-c]{3}/\d+x", r"(yes|no), \"quoted\"", "a\\/b\n", r"é+[^a-z]"])
async def test_a_regex_holds(engine: LlamaCppEngine, pattern: str) -> None:
    outputs = await ask(engine, max_tokens=200, ignore_eos=False, guided=Guided(regex=pattern), sampling=Sampling(temperature=1.0, seed=5))
    said = text(engine, outputs)
    if outputs[-1].finish_reason == "stop":
        assert re.fullmatch(pattern, said), said


@pytest.mark.parametrize("options", [("yes", "no"), ('"quoted"', "back\\slash", "line\nbreak"), ("\x08\x0c\x01", "tab\t"), ("日本", "é")])
async def test_a_choice_is_one_of_its_options(engine: LlamaCppEngine, options: tuple[str, ...]) -> None:
    outputs = await ask(engine, max_tokens=64, ignore_eos=False, guided=Guided(choice=options), sampling=Sampling(temperature=1.0, seed=5))
    assert outputs[-1].finish_reason == "stop"
    assert text(engine, outputs) in options


async def test_a_json_schema_holds(engine: LlamaCppEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 22]}, "b": {"type": "boolean"}}, "required": ["a", "b"], "additionalProperties": False}
    punished = Sampling(temperature=0.0, frequency_penalty=1.0)
    outputs = await ask(engine, max_tokens=400, ignore_eos=False, guided=Guided(json_schema=schema), sampling=punished)
    assert outputs[-1].finish_reason == "stop"
    assert text(engine, outputs) in [f'{{"a": {a}, "b": {b}}}' for a in (1, 22) for b in ("true", "false")]  # and no white space without end


async def test_a_grammar_holds(engine: LlamaCppEngine) -> None:
    outputs = await ask(engine, max_tokens=64, ignore_eos=False, guided=Guided(grammar='root ::= "a" [0-9] "z"'))
    assert re.fullmatch("a[0-9]z", text(engine, outputs))


@pytest.mark.parametrize(
    "guided",
    [Guided(regex="["), Guided(regex=r"(?=ahead)x"), Guided(json_schema={"type": "nonsense"}),
     Guided(json_schema={"type": "array", "uniqueItems": True}),
     Guided(grammar="root ::= ("), Guided(grammar="%llguidance {}\nx: ["), Guided(choice=())],
    ids=["regex", "lookahead", "schema", "schema-beyond-it", "grammar", "lark", "no-choice"],
)  # fmt: skip
async def test_a_constraint_that_cannot_be_enforced_is_refused_and_never_ignored(engine: LlamaCppEngine, guided: Guided) -> None:
    with pytest.raises(RequestError):
        await ask(engine, guided=guided, ignore_eos=False)
    assert await ask(engine)


@pytest.mark.parametrize("other", [{"min_tokens": 4}, {"prompt": [*PROMPT, 300], "resumed": 1}], ids=["min_tokens", "resumed"])
async def test_what_a_constraint_cannot_be_combined_with_is_refused(engine: LlamaCppEngine, other: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="constrained"):
        await ask(engine, guided=Guided(regex="a+"), **other)


# ------------------------------------------------------------------ the cache


def cached(outputs: Sequence[Output]) -> int | None:
    assert all(output.cached_tokens is None for output in outputs[1:])
    return outputs[0].cached_tokens


async def test_a_repeated_prompt_comes_from_the_cache_within_its_salt(engine: LlamaCppEngine) -> None:
    prompt = PROMPT * 10
    assert cached(await ask(engine, prompt, cache_salt="a")) == 0
    assert cached(await ask(engine, prompt, cache_salt="a")) == len(prompt) - 1
    assert cached(await ask(engine, prompt, cache_salt="b")) == 0
    assert cached(await ask(engine, prompt, cache_salt="c")) == 0  # takes the oldest slot, which held it for another salt


async def test_a_constrained_answer_tells_what_came_from_the_cache_before_it(engine: LlamaCppEngine) -> None:
    prompt = PROMPT * 10
    assert cached(await ask(engine, prompt, guided=Guided(regex="[a-z]+"))) == 0


async def test_a_probe_does_real_work_and_leaves_the_caches_as_they_are(engine: LlamaCppEngine) -> None:
    await engine.probe()
    prompt = PROMPT * 10
    answer = await ask(engine, prompt)
    for _ in range(3):
        await engine.probe()
    again = await ask(engine, prompt)
    assert cached(again) == len(prompt) - 1
    assert tokens(again) == tokens(answer)


async def test_a_probe_of_a_busy_engine_is_answered_by_its_progress(engine: LlamaCppEngine) -> None:
    busy = [asyncio.create_task(ask(engine, max_tokens=450)) for _ in range(2)]
    await asyncio.sleep(0.02)
    await asyncio.wait_for(engine.probe(), 30)
    await asyncio.gather(*busy)


# ------------------------------------------------------------------ start and end


def test_a_file_that_llama_cpp_cannot_load_is_a_configuration_error(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes()[:-100_000])
    with pytest.raises(ConfigError, match=r"broken\.gguf"):
        asyncio.run(LlamaCppEngine(model=str(broken)).start(EngineContext()))


async def test_a_context_beyond_the_training_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="2048"):
        await LlamaCppEngine(model=str(tiny), context=4096).start(EngineContext())


async def test_an_engine_that_was_not_started_says_so() -> None:
    engine = LlamaCppEngine()
    with pytest.raises(EngineDead):
        await ask(engine)
    with pytest.raises(EngineDead):
        await engine.probe()
    await engine.stop()


async def test_its_own_port_answers_nobody(engine: LlamaCppEngine) -> None:
    running: Any = engine._running  # pyright: ignore[reportPrivateUsage]
    address = running._model.native.address
    assert address.startswith("http://127.0.0.1:")
    async with httpx.AsyncClient(base_url=address) as client:
        assert (await client.post("/completion", json={"prompt": "x"})).status_code == 401


PROGRAM = """
import asyncio, sys
from dynamo_core.context import Context
from dynamo_core.engines import EngineContext
from dynamo_core.types import Request, Stops
from dynamo_llamacpp.engine import LlamaCppEngine

async def main():
    engine = LlamaCppEngine(model=sys.argv[1], context=2048)
    await engine.start(EngineContext())
    request = Request(id="t", model="t", token_ids=[300, 17], stops=Stops(ignore_eos=True))
    stream = engine.generate(request, Context("t"))
    await anext(stream)
    if sys.argv[2] == "stop":
        await engine.stop()

asyncio.run(main())
print("over", flush=True)
"""


@pytest.mark.parametrize("way", ["stop", "leave"])
def test_the_process_ends_cleanly_and_llama_cpp_says_nothing(tiny: Path, way: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tiny), way], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")
