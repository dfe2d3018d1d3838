"""What the engine does beyond the contract, on the real vLLM: against vLLM itself, with adapters, asleep, and killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from dynamo_core.cards import ModelCard
from dynamo_core.context import Context
from dynamo_core.contracts.engine_answers import Running, start
from dynamo_core.engines import BlocksCleared, BlocksStored, EngineContext
from dynamo_core.errors import EngineDead, RequestError, WorkerDraining
from dynamo_core.types import Guided, Output, Request, Sampling, Stops

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

PROMPTS = [[(7 * i + 13 * j) % 1000 + 4 for j in range(5 + 3 * i)] for i in range(50)]
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def adapter(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_adapter(tmp_path_factory.mktemp("adapters") / "sql")


@pytest.fixture(scope="module")
def offers() -> list[tuple[ModelCard, ...]]:
    return []


@pytest.fixture(scope="module")
def adapter_offers() -> list[tuple[ModelCard, ...]]:
    return []


async def started(engine: Any, offers: list[tuple[ModelCard, ...]]) -> Running:
    running = Running(engine, ModelCard(name=""))
    context = EngineContext(kv_events=lambda events, rank: running.kv_events.extend(events), load=running.loads.append, died=running.deaths.append,
                            offer=lambda cards: offers.append(tuple(cards)))  # fmt: skip
    running.card = await engine.start(context)
    return running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm(make_engine: Callable[..., Any], offers: list[tuple[ModelCard, ...]]) -> AsyncIterator[Running]:
    running = await started(make_engine(), offers)
    yield running
    await running.engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def adapting(make_engine: Callable[..., Any], adapter: Path, adapter_offers: list[tuple[ModelCard, ...]]) -> AsyncIterator[Running]:
    running = await started(make_engine(adapters={"first": adapter}, args={"max_loras": 2}), adapter_offers)
    yield running
    await running.engine.stop()


def request(prompt: list[int], max_tokens: int = 16, **more: Any) -> Request:
    stops = Stops(max_tokens=max_tokens, ignore_eos=more.pop("ignore_eos", True))
    return Request(id="test", model="tiny", token_ids=prompt, sampling=more.pop("sampling", GREEDY), stops=stops, **more)


async def ask(running: Running, request: Request) -> list[Output]:
    async with asyncio.timeout(120):
        return [output async for output in running.engine.generate(request, Context(request.id))]


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


def kill_newest_core() -> None:
    import psutil  # comes with vLLM

    cores = [child for child in psutil.Process().children(recursive=True) if "EngineCore" in " ".join([child.name(), *child.cmdline()])]
    os.kill(max(cores, key=lambda child: (child.create_time(), child.pid)).pid, signal.SIGKILL)


def text_of(running: Running, outputs: list[Output]) -> str:
    from tokenizers import Tokenizer

    assert running.card.tokenizer is not None
    artifact: bytes = running.engine.artifact(running.card.tokenizer.digest)  # type: ignore[attr-defined]
    ids = [token for token in tokens(outputs) if token not in running.card.eos_token_ids]
    return Tokenizer.from_str(artifact.decode()).decode(ids)


# ------------------------------------------------------------------ against vLLM itself


@pytest.fixture(scope="module")
def by_itself(vllm: Running, tiny: Path) -> list[Any]:
    """What vLLM's own `LLM.generate` says to the prompts."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(tiny), enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=64 << 20, block_size=32, dtype="float32", disable_log_stats=True)
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)


async def test_fifty_greedy_answers_are_those_of_vllms_own_generate(vllm: Running, by_itself: list[Any]) -> None:
    ours = await asyncio.gather(*(ask(vllm, request(prompt)) for prompt in PROMPTS))
    assert [tokens(outputs) for outputs in ours] == [list(one.outputs[0].token_ids) for one in by_itself]


async def test_logprobs_are_those_of_vllms_own_generate(vllm: Running, by_itself: list[Any]) -> None:
    ours = await asyncio.gather(*(ask(vllm, request(prompt, logprobs=3, prompt_logprobs=2)) for prompt in PROMPTS))
    for outputs, theirs in zip(ours, by_itself, strict=True):
        positions = [position for output in outputs for position in output.logprobs or ()]
        assert [position.token_id for position in positions] == list(theirs.outputs[0].token_ids)
        for position, known in zip(positions, theirs.outputs[0].logprobs, strict=True):
            assert position.logprob == pytest.approx(known[position.token_id].logprob, abs=1e-4)
            assert len(position.top) == 3
            for token, logprob in position.top:
                assert logprob == pytest.approx(known[token].logprob, abs=1e-4)
        (prompt_logprobs,) = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
        assert prompt_logprobs[0] is None
        for position, known in zip(prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
            assert position is not None
            assert position.logprob == pytest.approx(known[position.token_id].logprob, abs=1e-4)


# ------------------------------------------------------------------ guided output

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["age", "kind"],
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["cat", "dog"]}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("guided", "holds"),
    [
        (Guided(json_schema=SCHEMA), lambda text: json.loads(text)["kind"] in ("cat", "dog") and 0 <= json.loads(text)["age"] <= 99),
        (Guided(regex="[ab]{3}-[0-9]{2}"), lambda text: re.fullmatch("[ab]{3}-[0-9]{2}", text)),
        (Guided(choice=("yes", "no")), lambda text: text in ("yes", "no")),
        (Guided(grammar='root ::= "hi" [0-9] [0-9]'), lambda text: re.fullmatch("hi[0-9]{2}", text)),
        (Guided(json_object=True), lambda text: text.startswith("{")),
    ],
    ids=["json-schema", "regex", "choice", "grammar", "json-object"],
)
async def test_guided_output_is_what_the_constraint_says(vllm: Running, guided: Guided, holds: Callable[[str], Any]) -> None:
    for seed in range(3):
        asked = request([9, 8, 7], 100, guided=guided, sampling=Sampling(temperature=1.0, seed=seed), ignore_eos=False)
        assert holds(text_of(vllm, await ask(vllm, asked)))


async def test_a_constraint_that_cannot_be_understood_is_the_clients_mistake(vllm: Running) -> None:
    with pytest.raises(RequestError):
        await ask(vllm, request([9, 8, 7], guided=Guided(json_schema={"type": "nonsense"})))
    assert tokens(await ask(vllm, request([9, 8, 7], 2)))


# ------------------------------------------------------------------ the cache


async def test_a_prefix_is_reused_within_a_salt_and_never_across(vllm: Running) -> None:
    prompt = [(3 * i) % 900 + 20 for i in range(100)]

    async def cached(salt: str | None) -> int | None:
        return (await ask(vllm, request(prompt, 2, cache_salt=salt)))[0].cached_tokens

    assert [await cached(None), await cached(None), await cached("a"), await cached("a"), await cached("b")] == [0, 96, 0, 96, 0]
    await until(lambda: {event.cache_salt for event in vllm.kv_events if isinstance(event, BlocksStored)} >= {None, "a", "b"})


async def test_events_name_the_blocks_that_the_next_prompt_finds(vllm: Running) -> None:
    prompt = [(11 * i) % 900 + 30 for i in range(140)]
    before = len(vllm.kv_events)
    await ask(vllm, request(prompt, 1))
    await until(lambda: any(isinstance(event, BlocksStored) for event in vllm.kv_events[before:]))
    told = [token for event in vllm.kv_events[before:] if isinstance(event, BlocksStored) for token in event.token_ids]
    assert told == prompt[: len(told)]
    assert (await ask(vllm, request(prompt, 1)))[0].cached_tokens == len(told) == 128


async def test_a_reset_clears_the_cache_and_says_so(vllm: Running) -> None:
    prompt = [(5 * i) % 900 + 40 for i in range(100)]
    await ask(vllm, request(prompt, 1))
    before = len(vllm.kv_events)
    assert await vllm.engine.controls()["reset_cache"]({}) == {"reset": True}  # type: ignore[attr-defined]
    assert (await ask(vllm, request(prompt, 1)))[0].cached_tokens == 0
    await until(lambda: any(isinstance(event, BlocksCleared) for event in vllm.kv_events[before:]))


async def test_a_thousand_cancelled_requests_leave_no_block_in_use(vllm: Running) -> None:
    async def leave(i: int) -> None:
        stream = vllm.engine.generate(request([(i + j) % 900 + 4 for j in range(40)], 400), Context("test"))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]

    for batch in range(0, 1000, 50):
        await asyncio.gather(*(leave(batch + i) for i in range(50)))
    await until(lambda: vllm.loads[-1].running == vllm.loads[-1].waiting == vllm.loads[-1].kv_used_blocks == 0)
    assert tokens(await ask(vllm, request([9, 8, 7], 4)))


async def test_a_probe_leaves_no_trace_in_anybodys_cache(vllm: Running) -> None:
    before = len(vllm.kv_events)
    await vllm.engine.probe()  # type: ignore[attr-defined]
    await asyncio.sleep(0.3)
    assert all(event.cache_salt == "dynamo-canary" for event in vllm.kv_events[before:] if isinstance(event, BlocksStored))


# ------------------------------------------------------------------ adapters


async def test_an_adapter_answers_otherwise_than_its_base_and_comes_and_goes(adapting: Running, adapter: Path, adapter_offers: list[tuple[ModelCard, ...]]) -> None:
    controls: Any = adapting.engine.controls()  # type: ignore[attr-defined]
    assert [(card.name, card.adapter) for card in adapter_offers[-1]] == [("tiny", None), ("first", "first")]
    base = tokens(await ask(adapting, request([9, 8, 7])))
    first = tokens(await ask(adapting, request([9, 8, 7], adapter="first")))
    assert first != base
    await controls["load_adapter"]({"name": "org/second", "path": str(adapter)})
    assert [card.name for card in adapter_offers[-1]] == ["tiny", "first", "org/second"]
    assert tokens(await ask(adapting, request([9, 8, 7], adapter="org/second"))) == first
    with pytest.raises(RequestError, match="loaded already"):
        await controls["load_adapter"]({"name": "org/second", "path": str(adapter)})
    assert set((await controls["unload_adapter"]({"name": "org/second"}))["adapters"]) == {"first"}
    assert [card.name for card in adapter_offers[-1]] == ["tiny", "first"]
    with pytest.raises(RequestError, match="not loaded"):
        await ask(adapting, request([9, 8, 7], adapter="org/second"))


async def test_an_adapter_that_cannot_be_loaded_harms_nobody(adapting: Running, tmp_path: Path) -> None:
    controls: Any = adapting.engine.controls()  # type: ignore[attr-defined]
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "peft_type": "LORA", "lora_alpha": 8, "target_modules": ["q_proj"]}')
    for path, why in ((tmp_path / "nowhere", "no adapter_config.json"), (tmp_path, "cannot load the adapter")):
        with pytest.raises(RequestError, match=why):
            await controls["load_adapter"]({"name": "broken", "path": str(path)})
    assert tokens(await ask(adapting, request([9, 8, 7], 2)))
    assert not adapting.deaths


async def test_blocks_of_an_adapter_carry_its_name(adapting: Running) -> None:
    await ask(adapting, request([(17 * i) % 900 + 4 for i in range(70)], 1, adapter="first"))
    await until(lambda: any(isinstance(event, BlocksStored) and event.adapter == "first" for event in adapting.kv_events))


async def test_what_would_kill_vllm_on_cpu_beside_adapters_is_refused(adapting: Running) -> None:
    with pytest.raises(RequestError, match="does not support prompt_logprobs"):
        await ask(adapting, request([9, 8, 7], prompt_logprobs=1))


# ------------------------------------------------------------------ operators


async def test_an_engine_asleep_leaves_discovery_refuses_and_wakes_as_it_was(vllm: Running, offers: list[tuple[ModelCard, ...]]) -> None:
    controls: Any = vllm.engine.controls()  # type: ignore[attr-defined]
    before = tokens(await ask(vllm, request([9, 8, 7])))
    working = asyncio.create_task(ask(vllm, request([9, 8, 7], 64)))
    await asyncio.sleep(0.01)
    assert await controls["sleep"]({"level": 1}) == {"asleep": True}
    assert len(tokens(await working)) == 64, "what was in progress may end"
    assert offers[-1] == ()
    with pytest.raises(WorkerDraining):
        await ask(vllm, request([9, 8, 7]))
    await vllm.engine.probe()  # type: ignore[attr-defined]
    assert await controls["wake"]({}) == {"asleep": False}
    assert [card.name for card in offers[-1]] == ["tiny"]
    assert tokens(await ask(vllm, request([9, 8, 7]))) == before


async def test_vllms_own_series_are_exported_and_those_of_the_process_are_not(vllm: Running) -> None:
    text = vllm.engine.metrics().decode()  # type: ignore[attr-defined]
    assert 'vllm:generation_tokens_total{engine="0",model_name="tiny"}' in text
    assert "process_" not in text


async def test_an_option_of_vllm_that_is_not_known_is_refused(vllm: Running) -> None:
    with pytest.raises(RequestError, match="vllm has no option 'best_off'"):
        await ask(vllm, request([9, 8, 7], extra={"vllm": {"best_off": 3}}))
    allowed = await ask(vllm, request([9, 8, 7], 8, extra={"vllm": {"allowed_token_ids": [44, 45]}}))
    assert set(tokens(allowed)) <= {44, 45}


# ------------------------------------------------------------------ other engines


async def test_the_urgent_request_overtakes_those_that_wait(make_engine: Callable[..., Any]) -> None:
    running = await start(make_engine(args={"max_num_seqs": 1, "structured_outputs_config": {"reasoning_parser": "granite"}}))
    try:
        assert running.card.reasoning_parser == "granite"
        order: list[int] = []

        async def one(priority: int) -> None:
            from dynamo_core.types import Hints

            await ask(running, request([9, 8, 7, 10 + priority], 24, hints=Hints(priority=priority)))
            order.append(priority)

        first = asyncio.create_task(one(0))
        await asyncio.sleep(0.02)
        await asyncio.gather(first, *(one(priority) for priority in (1, 2, 9)))
        assert order[1:] == [9, 2, 1] or order == [9, 2, 1, 0]
    finally:
        await running.engine.stop()


async def test_each_data_parallel_rank_is_addressed_and_reports_by_itself(make_engine: Callable[..., Any]) -> None:
    from dynamo_core.types import Hints

    engine = make_engine(args={"data_parallel_size": 2, "distributed_executor_backend": "mp"})
    events: list[tuple[int, Any]] = []
    loads: set[int] = set()
    context = EngineContext(kv_events=lambda new, rank: events.extend((rank, event) for event in new), load=lambda load: loads.add(load.dp_rank))
    card = await engine.start(context)
    running = Running(engine, card)
    try:
        assert card.dp_size == 2
        prompt = [(11 * i) % 900 + 30 for i in range(70)]
        events.clear()
        for rank in (0, 1):
            assert (await ask(running, request(prompt, 2, hints=Hints(dp_rank=rank))))[0].cached_tokens == 0, "each rank has a cache of its own"
        assert (await ask(running, request(prompt, 2, hints=Hints(dp_rank=1))))[0].cached_tokens == 64
        await until(lambda: {rank for rank, event in events if isinstance(event, BlocksStored)} == {0, 1})
        await until(lambda: loads == {0, 1})
        with pytest.raises(RequestError, match="no data-parallel rank 2"):
            await ask(running, request(prompt, 2, hints=Hints(dp_rank=2)))
    finally:
        await engine.stop()


async def test_an_engine_core_that_is_killed_is_seen_at_once_and_every_stream_can_move(make_engine: Callable[..., Any]) -> None:
    running = await start(make_engine())
    try:
        streams = [asyncio.create_task(ask(running, request([9, 8, 7 + i], 400))) for i in range(8)]
        await until(lambda: running.loads and running.loads[-1].running)
        kill_newest_core()
        ends = await asyncio.gather(*streams, return_exceptions=True)
        assert all(isinstance(end, EngineDead) and end.migratable for end in ends), ends
        assert len(running.deaths) == 1
        for again in (ask(running, request([9, 8, 7])), running.engine.probe()):  # type: ignore[attr-defined]
            with pytest.raises(EngineDead):
                await again
    finally:
        await running.engine.stop()


async def test_a_death_that_nobody_waits_for_is_seen_too(make_engine: Callable[..., Any]) -> None:
    running = await start(make_engine())
    try:
        kill_newest_core()
        await until(lambda: running.deaths)
    finally:
        await running.engine.stop()
