"""The conformance kit for engines: inherit `EngineContract`, say how to build one, and run pytest.

    class TestMyEngine(EngineContract):
        @pytest.fixture
        def engine_factory(self):
            return lambda: MyEngine(model="tiny")

        @pytest.fixture
        def prompt(self):
            return [1, 15, 27, 3]

The guarantees have their numbers from `docs/contracts/engine.md`. Whatever a test asks for, the answer is held against
everything that the contract says of answers (`engine_answers.Answer.check`).
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, cast

import msgspec
import pytest

from dynamo_core.context import Context
from dynamo_core.contracts.engine_answers import Answer, Running, replay_kv_events, start
from dynamo_core.engines import Engine, HasArtifacts
from dynamo_core.errors import EngineDead, RequestError
from dynamo_core.types import Guided, Output, Request, Sampling, Stops

GREEDY = Sampling(temperature=0.0)


class EngineContract:
    """Inherit, and provide `engine_factory` and `prompt`. The attributes size the tests for slow engines, and say what the card cannot."""

    max_tokens = 24
    """Length of the answers that tests ask for; at least 8."""
    crowd = 6
    """Requests at once."""
    cancel_every = 3
    """Streams are closed after 0, this many, twice as many... outputs."""
    patience = 60.0
    """Seconds after which an answer, a start or a stop counts as hanging."""
    reports_load = False
    """The engine calls `EngineContext.load`."""
    natural_tokens: int | None = None
    """Within so many tokens the engine ends its answer to `prompt` by end of sequence; `None`: it may not end by itself."""
    batch_invariant = True
    """False: the arithmetic of the engine depends on what else is in the batch, so greedy answers may part at a near tie. Then only their form is compared."""

    @pytest.fixture
    def engine_factory(self) -> Callable[[], Engine]:
        """Returns a function that makes a fresh engine, not started, always with the same options."""
        raise NotImplementedError("provide the fixture `engine_factory`")

    @pytest.fixture
    def prompt(self) -> Sequence[int]:
        """A prompt of a few tokens, from the vocabulary of the model."""
        raise NotImplementedError("provide the fixture `prompt`")

    @pytest.fixture
    async def running(self, engine_factory: Callable[[], Engine]) -> AsyncIterator[Running]:
        """A started engine. An engine that takes long to start overrides this with a wider scope."""
        async with asyncio.timeout(self.patience):
            running = await start(engine_factory())
        yield running
        await asyncio.wait_for(running.engine.stop(), self.patience)

    # ------------------------------------------------------------------ asking

    def request(self, prompt: Sequence[int], max_tokens: int | None = None, *, sampling: Sampling = GREEDY, ignore_eos: bool = True, **other: Any) -> Request:
        """A greedy request for exactly `max_tokens` tokens, unless told otherwise."""
        stops: dict[str, Any] = {"max_tokens": max_tokens or self.max_tokens, "ignore_eos": ignore_eos, **other.pop("stops", {})}
        return Request(id=f"contract-{next(_ids)}", model="contract", token_ids=list(prompt), sampling=sampling, stops=Stops(**stops), **other)

    async def ask(self, running: Running, request: Request) -> Answer:
        """The whole answer, checked."""
        answer = Answer(request)
        async with asyncio.timeout(self.patience):
            async for output in running.engine.generate(request, Context(request.id)):
                answer.outputs.append(msgspec.structs.replace(output, token_ids=list(output.token_ids)))
        answer.check(running.card)
        return answer

    async def refuses(self, running: Running, request: Request) -> RequestError:
        """The request is refused, and the next one is served."""
        with pytest.raises(RequestError) as refusal:
            await self.ask(running, request)
        await self.ask(running, self.request([*request.token_ids[:4]] or [0], 2))
        return refusal.value

    def prompts(self, prompt: Sequence[int]) -> list[list[int]]:
        """As many prompts as the crowd has members, all different, of growing length."""
        return [[*prompt, *(prompt[(i + j) % len(prompt)] for j in range(i))] for i in range(self.crowd)]

    def agrees(self, one: Answer, other: Answer) -> None:
        assert len(one.tokens()) == len(other.tokens())
        if self.batch_invariant:
            assert one.tokens() == other.tokens()

    # ------------------------------------------------------------------ G1 start

    async def test_g1_an_engine_that_started_generates_at_once(self, running: Running, prompt: Sequence[int]) -> None:
        assert running.card.name
        assert running.card.context_length > len(prompt) + self.max_tokens
        assert (await self.ask(running, self.request(prompt, 1))).tokens()

    async def test_g1_progress_is_reported_at_least_every_ten_seconds(self, running: Running) -> None:
        gaps = [after - before for before, after in zip(running.progress, running.progress[1:], strict=False)]
        assert max(gaps) <= 11, f"silent for {max(gaps):.0f} s"

    # ------------------------------------------------------------------ G2 outputs

    async def test_g2_each_output_has_only_new_tokens_and_the_last_a_finish_reason(self, running: Running, prompt: Sequence[int]) -> None:
        answer = await self.ask(running, self.request(prompt))
        assert len(answer.tokens()) == self.max_tokens
        assert all(output.token_ids or output.finish_reason for output in answer.outputs), "an output that says nothing"

    # ------------------------------------------------------------------ G3 cancellation

    async def test_g3_a_stream_can_be_closed_at_any_output(self, running: Running, prompt: Sequence[int]) -> None:
        whole = await self.ask(running, self.request(prompt))
        for k in range(0, self.max_tokens, self.cancel_every):
            await self._read_and_leave(running, self.request(prompt), k)
            self.agrees(whole, await self.ask(running, self.request(prompt)))

    async def test_g3_a_task_that_is_cancelled_while_it_waits_for_a_token_stops_the_work(self, running: Running, prompt: Sequence[int]) -> None:
        for _ in range(self.crowd):
            task = asyncio.create_task(self.ask(running, self._long(running, prompt)))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self._idle(running)
        await self.ask(running, self.request(prompt))

    async def test_g3_what_was_closed_leaves_its_place_to_others(self, running: Running, prompt: Sequence[int]) -> None:
        places = min(running.card.max_sequences or self.crowd, 64)
        for _ in range(-(-2 * places // self.crowd)):
            await asyncio.gather(*(self._read_and_leave(running, self._long(running, p), 2) for p in self.prompts(prompt)))
        await self._idle(running)
        await asyncio.gather(*(self.ask(running, self.request(p)) for p in self.prompts(prompt)))

    def _long(self, running: Running, prompt: Sequence[int]) -> Request:
        return self.request(prompt, running.card.context_length - len(prompt) - self.crowd - 1)

    async def _read_and_leave(self, running: Running, request: Request, outputs: int) -> None:
        stream = cast(Any, running.engine.generate(request, Context(request.id)))
        async with asyncio.timeout(self.patience):
            for _ in range(outputs):
                if (await anext(stream)).finish_reason is not None:
                    break
            await stream.aclose()

    async def _idle(self, running: Running) -> None:
        """Wait until the engine says that it has nothing to do, if it says so at all."""
        if self.reports_load:
            deadline = time.monotonic() + self.patience
            while not running.loads or (running.loads[-1].running, running.loads[-1].waiting) != (0, 0):
                assert time.monotonic() < deadline, f"still busy, with nobody listening: {running.loads[-1:]}"
                await asyncio.sleep(0.01)

    # ------------------------------------------------------------------ G4 when it ends

    async def test_g4_max_tokens_is_exact(self, running: Running, prompt: Sequence[int]) -> None:
        for count in (1, 2, self.max_tokens):
            answer = await self.ask(running, self.request(prompt, count))
            assert (len(answer.tokens()), answer.finish().finish_reason) == (count, "length")

    async def test_g4_a_stop_token_ends_the_answer_and_is_named(self, running: Running, prompt: Sequence[int]) -> None:
        tokens = (await self.ask(running, self.request(prompt))).tokens()
        stop, at = self._late_token(tokens)
        answer = await self.ask(running, self.request(prompt, stops={"stop_token_ids": (stop,)}))
        if self.batch_invariant:
            assert answer.tokens() == tokens[: at + 1]
            assert (answer.finish().finish_reason, answer.finish().stop_reason) == ("stop", stop)

    async def test_g4_min_tokens_come_before_any_stop(self, running: Running, prompt: Sequence[int]) -> None:
        tokens = (await self.ask(running, self.request(prompt))).tokens()
        stop, at = self._late_token(tokens)
        answer = await self.ask(running, self.request(prompt, stops={"stop_token_ids": (stop,), "min_tokens": at + 2}))
        assert len(answer.tokens()) >= at + 2

    async def test_g4_end_of_sequence_ends_the_answer_unless_it_is_ignored(self, running: Running, prompt: Sequence[int]) -> None:
        count = self.natural_tokens or self.max_tokens
        answer = await self.ask(running, self.request(prompt, count, ignore_eos=False))
        if self.natural_tokens is not None:
            assert answer.finish().finish_reason == "stop"
            assert answer.tokens()[-1] in running.card.eos_token_ids
        ignoring = await self.ask(running, self.request(prompt, count))
        assert (len(ignoring.tokens()), ignoring.finish().finish_reason) == (count, "length")

    async def test_g4_the_context_length_ends_the_answer(self, running: Running, prompt: Sequence[int]) -> None:
        room = 4
        answer = await self.ask(running, self.request(_stretch(prompt, running.card.context_length - room), 10 * room))
        assert len(answer.tokens()) in (room - 1, room)

    def _late_token(self, tokens: list[int]) -> tuple[int, int]:
        """A token of the answer, and its place: the latest first occurrence before the last two tokens."""
        at = max(i for i, token in enumerate(tokens[:-2]) if tokens.index(token) == i)
        return tokens[at], at

    # ------------------------------------------------------------------ G5 what does not fit

    @pytest.mark.parametrize("excess", [0, 1, 1000], ids=["no-room-for-output", "one-too-many", "far-too-long"])
    async def test_g5_a_prompt_that_does_not_fit_is_refused_and_the_next_is_served(self, running: Running, prompt: Sequence[int], excess: int) -> None:
        await self.refuses(running, self.request(_stretch(prompt, running.card.context_length + excess)))

    async def test_g5_an_empty_prompt_is_refused(self, running: Running, prompt: Sequence[int]) -> None:
        with pytest.raises(RequestError):
            await self.ask(running, self.request([]))
        await self.ask(running, self.request(prompt, 2))

    # ------------------------------------------------------------------ G6 the same request, the same tokens

    async def test_g6_an_answer_is_the_same_alone_and_in_a_crowd(self, running: Running, prompt: Sequence[int]) -> None:
        alone = [await self.ask(running, self.request(p)) for p in self.prompts(prompt)]
        together = await asyncio.gather(*(self.ask(running, self.request(p)) for p in self.prompts(prompt)))
        for one, other in zip(alone, together, strict=True):
            self.agrees(one, other)

    async def test_g6_tokens_of_another_worker_are_continued_as_if_nothing_had_happened(self, running: Running, prompt: Sequence[int]) -> None:
        whole = (await self.ask(running, self.request(prompt))).tokens()
        for k in (1, self.max_tokens // 2, self.max_tokens - 1):
            rest = await self.ask(running, self.request([*prompt, *whole[:k]], self.max_tokens - k, resumed=k))
            assert len(rest.tokens()) == self.max_tokens - k
            if self.batch_invariant:
                assert whole[:k] + rest.tokens() == whole

    async def test_g6_an_engine_made_anew_answers_the_same(self, running: Running, engine_factory: Callable[[], Engine], prompt: Sequence[int]) -> None:
        first = await self.ask(running, self.request(prompt))
        async with asyncio.timeout(self.patience):
            other = await start(engine_factory())
        try:
            assert other.card.checksum() == running.card.checksum(), "two workers of one model must render and tokenize alike"
            self.agrees(first, await self.ask(other, self.request(prompt)))
        finally:
            await asyncio.wait_for(other.engine.stop(), self.patience)

    # ------------------------------------------------------------------ G7 no disturbance

    async def test_g7_requests_that_fail_leave_or_dawdle_change_no_other_answer(self, running: Running, prompt: Sequence[int]) -> None:
        prompts = self.prompts(prompt)
        alone = [await self.ask(running, self.request(p)) for p in prompts]
        slow_request = self.request(prompt)
        slow = running.engine.generate(slow_request, Context(slow_request.id))
        read_by_slow = Answer(slow_request, [await asyncio.wait_for(anext(slow), self.patience)])
        results = await asyncio.gather(
            self.ask(running, self.request(_stretch(prompt, running.card.context_length + 1))),
            self._read_and_leave(running, self._long(running, prompt), 2),
            *(self.ask(running, self.request(p)) for p in prompts),
            return_exceptions=True,
        )
        assert isinstance(results[0], RequestError)
        assert results[1] is None
        for one, other in zip(alone, results[2:], strict=True):
            assert isinstance(other, Answer), other
            self.agrees(one, other)
        async with asyncio.timeout(self.patience):
            read_by_slow.outputs += [output async for output in slow]
        read_by_slow.check(running.card)
        self.agrees(alone[0], read_by_slow)
        assert not running.deaths

    # ------------------------------------------------------------------ G8 stop

    async def test_g8_stop_ends_every_stream(self, engine_factory: Callable[[], Engine], prompt: Sequence[int]) -> None:
        async with asyncio.timeout(self.patience):
            running = await start(engine_factory())
            unread = running.engine.generate(self._long(running, prompt), Context("contract"))
            await anext(unread)
            flowing = asyncio.Event()
            reading = [asyncio.create_task(_drain(running.engine.generate(self._long(running, p), Context("contract")), flowing)) for p in self.prompts(prompt)]
            await flowing.wait()
            await running.engine.stop()
            reading.append(asyncio.create_task(_drain(unread, flowing)))
            for end in await asyncio.gather(*reading, return_exceptions=True):
                assert isinstance(end, (EngineDead, Output)), f"a stream ended with {end!r}"
                assert isinstance(end, EngineDead) or end.finish_reason is not None, "a stream ended without a finish reason"

    async def test_g8_after_stop_requests_are_refused_and_a_second_stop_is_silent(self, engine_factory: Callable[[], Engine], prompt: Sequence[int]) -> None:
        async with asyncio.timeout(self.patience):
            running = await start(engine_factory())
            await running.engine.stop()
            with pytest.raises(EngineDead):
                await self.ask(running, self.request(prompt))
            await running.engine.stop()

    async def test_g8_stop_leaves_no_task_and_no_thread(self, engine_factory: Callable[[], Engine], prompt: Sequence[int]) -> None:
        tasks = asyncio.all_tasks()
        threads: list[int] = []
        for _ in range(3):
            async with asyncio.timeout(self.patience):
                running = await start(engine_factory())
                await self.ask(running, self.request(prompt, 2))
                await running.engine.stop()
            assert asyncio.all_tasks() <= tasks, f"left running: {asyncio.all_tasks() - tasks}"
            threads.append(sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate()))
        # A library may keep threads of its own; a leak grows.
        assert not threads[0] < threads[1] < threads[2], f"threads after each stop: {threads}"

    # ------------------------------------------------------------------ G9 promises

    async def test_g9_artifacts_of_the_card_are_served_by_digest(self, running: Running) -> None:
        if running.card.tokenizer is not None:
            assert isinstance(running.engine, HasArtifacts)
            content = running.engine.artifact(running.card.tokenizer.digest)
            assert type(running.card.tokenizer).of(running.card.tokenizer.name, content) == running.card.tokenizer
            with pytest.raises(KeyError):
                running.engine.artifact("0" * 64)

    @pytest.mark.parametrize("capability", ["n", "logprobs", "prompt_logprobs", "logit_bias", "guided"])
    async def test_g9_a_capability_works_or_is_refused(self, running: Running, prompt: Sequence[int], capability: str) -> None:
        first = (await self.ask(running, self.request(prompt, 1))).tokens()[0]
        request = {
            "n": self.request(prompt, sampling=Sampling(temperature=1.0, seed=7, n=3)),
            "logprobs": self.request(prompt, logprobs=2),
            "prompt_logprobs": self.request(prompt, 2, prompt_logprobs=1),
            "logit_bias": self.request(prompt, 1, sampling=Sampling(temperature=0.0, logit_bias={first: -100.0})),
            "guided": self.request(prompt, ignore_eos=False, guided=Guided(json_schema={"type": "object"})),
        }[capability]
        if capability not in running.card.capabilities:
            await self.refuses(running, request)
            return
        answer = await self.ask(running, request)
        if capability == "n":
            assert [len(answer.tokens(i)) for i in range(3)] == [self.max_tokens] * 3
        elif capability == "logprobs":
            for output in answer.outputs:
                positions = output.logprobs or []
                assert [position.token_id for position in positions] == output.token_ids
                assert all(position.logprob <= 1e-6 and len(position.top) == 2 and position.top[0][1] >= position.top[1][1] for position in positions)
        elif capability == "prompt_logprobs":
            assert [len(output.prompt_logprobs) for output in answer.outputs if output.prompt_logprobs is not None] == [len(prompt)]
        elif capability == "logit_bias":
            assert answer.tokens() != [first]

    @pytest.mark.parametrize(
        "sampling",
        [Sampling(temperature=-1.0), Sampling(top_p=2.0), Sampling(min_p=-0.5), Sampling(n=0), Sampling(repetition_penalty=-1.0)],
        ids=["temperature", "top_p", "min_p", "n", "repetition_penalty"],
    )
    async def test_g9_sampling_out_of_range_is_refused(self, running: Running, prompt: Sequence[int], sampling: Sampling) -> None:
        await self.refuses(running, self.request(prompt, sampling=sampling))

    async def test_g9_an_unknown_adapter_is_refused(self, running: Running, prompt: Sequence[int]) -> None:
        await self.refuses(running, self.request(prompt, adapter="no-such-adapter"))

    async def test_g9_kv_events_tell_what_the_cache_holds_when_they_are_promised(self, running: Running, prompt: Sequence[int]) -> None:
        card = running.card
        longer = _stretch(prompt, min(3 * card.block_size + 1, card.context_length - self.max_tokens - 1))
        await asyncio.gather(*(self.ask(running, self.request([*longer, *p])) for p in self.prompts(prompt)))
        if not card.kv_events:
            assert not running.kv_events
            return
        chains = replay_kv_events(running.kv_events, card.block_size)
        assert any(chain == longer[: len(chain)] for chain in chains if len(chain) == len(longer) // card.block_size * card.block_size)

    async def test_g9_load_is_busy_while_it_works_and_idle_when_it_does_not(self, running: Running, prompt: Sequence[int]) -> None:
        running.loads.clear()
        await asyncio.gather(*(self.ask(running, self.request(p)) for p in self.prompts(prompt)))
        if self.reports_load:
            deadline = time.monotonic() + self.patience
            while not any(load.running or load.waiting for load in running.loads):  # some look at it only now and then
                assert time.monotonic() < deadline, "it works, and never says so"
                await asyncio.gather(*(self.ask(running, self.request(p)) for p in self.prompts(prompt)))
        await self._idle(running)
        assert self.reports_load == bool(running.loads), "reports_load says otherwise"
        if self.reports_load:
            assert all(load.kv_used_blocks <= load.kv_total_blocks for load in running.loads)


# ------------------------------------------------------------------ small print


_ids = itertools.count(1)


def _stretch(prompt: Sequence[int], length: int) -> list[int]:
    return [prompt[i % len(prompt)] for i in range(length)]


async def _drain(stream: AsyncIterator[Output], flowing: asyncio.Event) -> Output:
    last = Output()
    async for output in stream:
        last = output
        flowing.set()
    return last
