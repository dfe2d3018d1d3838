"""A vLLM that runs: its streams, its probe, its controls, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest

from dynamo_core.cards import ModelCard
from dynamo_core.context import Context
from dynamo_core.ending import ended
from dynamo_core.engines import EngineContext, admit
from dynamo_core.errors import DynamoError, EngineDead, EngineFailed, RequestError, WorkerDraining, WorkerOverloaded
from dynamo_core.kv.feed import KvFeed
from dynamo_core.types import Output, Request, Sampling, Stops
from dynamo_vllm import vllm_api
from dynamo_vllm.adapters import Adapters
from dynamo_vllm.fetching import Fetches, NothingComes
from dynamo_vllm.images import MEDIA, opened, places_of
from dynamo_vllm.load import LoadReports
from dynamo_vllm.nodes import OtherNodes
from dynamo_vllm.translate import Reader, sampling_params
from dynamo_vllm.vllm_api import Vllm

log = logging.getLogger(__name__)

_WARM_UP_TOKENS = 128
"""On CPUs with AMX the kernel dies when the very first step of an engine has a single token."""
_WATCH = 0.25
"""Seconds between two looks at an engine that nobody waits for."""
_SHUTDOWN = 2.0
_LETTING_GO = 30.0
"""Seconds that requests in progress have before the engine goes to sleep."""
_SALT = "dynamo-canary"

_serial = itertools.count()


class Running:
    def __init__(self, vllm: Vllm, engine: Any, card: ModelCard, tokenizer: bytes, context: EngineContext, loads: LoadReports,
                 fetches: Fetches | None, feeds: Sequence[KvFeed], others: OtherNodes | None, directory: tempfile.TemporaryDirectory[str]) -> None:  # fmt: skip
        self.card = card
        self.tokenizer = tokenizer
        self.adapters = Adapters(vllm, engine, card, self._offer)
        self._vllm = vllm
        self._engine = engine
        self._context = context
        self._loads = loads
        self._loads.total_blocks = card.total_blocks or 0
        self._fetches = fetches
        self._feeds = feeds
        self._others = others
        self._directory = directory
        self._streams = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._asleep = False
        self._dead: str | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._watching = asyncio.create_task(self._watch(), name="watch vLLM")

    # -------------------------------------------------------------- requests

    async def generate(self, request: Request, context: Context) -> AsyncGenerator[Output, None]:
        if self._dead is not None:
            raise EngineDead(self._dead)
        if self._asleep:
            raise WorkerDraining("this engine sleeps")
        pools = self.card.pooling is not None
        limit = 0 if pools else admit(request, self.card)
        self._streams += 1
        self._quiet.clear()
        try:
            outputs = self._pool(request) if pools else self._encode(request) if self.card.role == "encode" else self._generate(request, limit)
            async with aclosing(outputs):
                async for output in outputs:
                    yield output
        except Exception as e:
            raise self._ours(e) from e
        finally:
            self._streams -= 1
            if not self._streams:
                self._quiet.set()

    async def _generate(self, request: Request, limit: int) -> AsyncGenerator[Output, None]:
        if self.card.role == "prefill" and request.transfer is None:
            request = msgspec.structs.replace(request, transfer=dict(vllm_api.PREFILL_ONLY))
        prompt, places = await self._prompt(request)
        reader = Reader(request, self.card, places)
        async with AsyncExitStack() as stack:
            steps = await stack.enter_async_context(aclosing(self._submit(request, prompt, limit)))
            if self._fetches is not None and request.transfer is not None:
                try:
                    first = await self._fetches.first(steps, request.transfer)
                except NothingComes as e:
                    request = self._alone(request, e)
                    first, steps = None, await stack.enter_async_context(aclosing(self._submit(request, prompt, limit)))
                for output in reader.read(first) if first is not None else ():
                    yield output
            async for step in steps:
                for output in reader.read(step):
                    yield output

    def _submit(self, request: Request, prompt: Any, limit: int) -> AsyncGenerator[Any, None]:
        hints = request.hints
        return self._engine.generate(
            prompt, sampling_params(self._vllm, request, self.card, limit), f"{request.id}-{next(_serial)}",
            lora_request=self.adapters.of(request), priority=-hints.priority, data_parallel_rank=self._rank(hints.dp_rank),
        )  # fmt: skip

    def _alone(self, request: Request, why: NothingComes) -> Request:
        """The request without what another engine has computed for it. :raises EngineFailed: the operator does not want that."""
        peer = request.transfer or {}
        where = f"the KV blocks of request {request.id} at {peer.get('remote_host')}:{peer.get('remote_port')} are given up, because {why} (fetch_timeout)"
        if not vllm_api.recomputes(self._engine):
            raise EngineFailed(f"{where}, and engine.transfer has another kv_load_failure_policy than 'recompute'")
        log.warning("%s: this worker reads the prompt itself", where)
        return msgspec.structs.replace(request, transfer=None)

    async def _encode(self, request: Request) -> AsyncGenerator[Output, None]:
        """Read the images of a prompt, and say where what became of them is. Who reads the prompt needs them too, to know how many tokens they have."""
        prompt, _ = await self._prompt(request)
        params = self._vllm.SamplingParams(max_tokens=1)
        async with aclosing(self._engine.generate(prompt, params, f"{request.id}-{next(_serial)}", priority=-request.hints.priority)) as steps:
            async for step in steps:
                if step.finished:
                    told = step.ec_transfer_params or {}
                    names = [MEDIA + item["digest"] for item in request.media or ()]
                    media = [{"with_data": True, "ec": {name: told[name]} if name in told else {}} for name in names]
                    yield Output([], 0, "stop", transfer={"media": media})

    async def _prompt(self, request: Request) -> tuple[dict[str, Any], list[list[int]] | None]:
        """As vLLM takes it; and what stands for each image, when the request does not know it."""
        if not request.media:
            return vllm_api.tokens_prompt(request.token_ids, request.cache_salt), None
        images = await asyncio.to_thread(lambda: [opened(item) for item in request.media or ()])
        digests = [MEDIA + item["digest"] for item in request.media]
        prompt = await vllm_api.images_prompt(self._engine, request.token_ids, request.cache_salt, images, digests)
        places = places_of(request, *vllm_api.image_places(prompt))
        return prompt, None if places == [item.get("runs") for item in request.media] else places

    async def _pool(self, request: Request) -> AsyncGenerator[Output, None]:
        if not request.token_ids:
            raise RequestError("the input has no tokens", param="input")
        prompt = vllm_api.tokens_prompt(request.token_ids, request.cache_salt)
        task = "embed" if "embeddings" in self.card.surfaces else "classify"
        activation = request.activation if task == "classify" else None
        params = vllm_api.pooling_params(self._vllm, task, activation, request.second_text)
        async with aclosing(self._engine.encode(prompt, params, f"{request.id}-{next(_serial)}", priority=-request.hints.priority)) as steps:
            async for step in steps:
                yield Output([], finish_reason="stop", embedding=step.outputs.data.float().tolist())

    def _rank(self, global_rank: int | None) -> int | None:
        if global_rank is None or self.card.dp_size == 1:
            return None
        rank = global_rank - self.card.dp_start
        if not 0 <= rank < self.card.dp_size:
            raise RequestError(f"this worker has no data-parallel rank {global_rank}", param="dp_rank")
        return rank

    def _ours(self, error: Exception) -> Exception:
        """The same error in the framework's terms."""
        if isinstance(error, DynamoError):
            return error
        if isinstance(error, self._vllm.EngineDeadError):
            self._died("the engine core of vLLM died; the log of the worker says of what")
            return EngineDead(self._dead)
        if isinstance(error, self._vllm.client_errors):
            return RequestError(str(error))
        if isinstance(error, self._vllm.busy_errors):
            return WorkerOverloaded(f"vLLM: {error}")
        log.error("vLLM failed a request", exc_info=error)
        cause = error.__cause__ or error
        return EngineFailed(f"vLLM failed this request ({type(cause).__name__}); the log of the worker has the details")

    # -------------------------------------------------------------- life

    async def warm_up(self) -> None:
        """Run one real prompt on each rank, then forget it."""
        length = max(1, min(_WARM_UP_TOKENS, self.card.context_length - 2))
        vocabulary = self.card.vocab_size or 2
        await asyncio.gather(*(self._try(rank, [i % vocabulary for i in range(length)]) for rank in self._ranks()))
        await self._engine.reset_prefix_cache()
        for feed in self._feeds:
            await feed.open()

    async def probe(self) -> None:
        if self._dead is not None:
            raise EngineDead(self._dead)
        if self._asleep:
            return  # it left discovery, and is as alive as it should be
        await asyncio.gather(*(self._try(rank, [0]) for rank in self._ranks()))

    def _ranks(self) -> range:
        return range(self.card.dp_start, self.card.dp_start + self.card.dp_size)

    async def _try(self, rank: int, prompt: list[int]) -> None:
        stops = Stops(max_tokens=1, ignore_eos=True)
        request = Request(id="canary", model="", token_ids=prompt, cache_salt=_SALT, sampling=Sampling(temperature=0.0), stops=stops)
        try:
            async with aclosing(self._pool(request) if self.card.pooling is not None else self._one_token(request, rank)) as outputs:
                async for _ in outputs:
                    pass
        except Exception as e:
            raise self._ours(e) from e

    async def _one_token(self, request: Request, rank: int) -> AsyncGenerator[Any, None]:
        params = sampling_params(self._vllm, request, self.card, 1)
        prompt = vllm_api.tokens_prompt(request.token_ids, request.cache_salt)
        async with aclosing(self._engine.generate(prompt, params, f"canary-{next(_serial)}", data_parallel_rank=self._rank(rank))) as steps:
            async for step in steps:
                yield step

    async def _watch(self) -> None:
        """See the engine die when nobody waits for it."""
        while not self._engine.errored:  # noqa: ASYNC110 (vLLM says it by a flag only)
            await asyncio.sleep(_WATCH)
        self._died("the engine core of vLLM died; the log of the worker says of what")

    def _died(self, reason: str) -> None:
        if self._dead is None:
            self._dead = reason
            self._context.died(reason)

    def lost(self, reason: str) -> None:
        """The engine is not whole any more. vLLM itself would let requests wait for what is gone."""
        vllm_api.end_streams(self._engine, self._vllm.EngineDeadError())
        self._died(reason)

    def leave(self, reason: str) -> None:
        """Take no more requests, let those in progress end, and then the engine."""
        if self._dead is None and self._leaving is None:
            log.warning("%s: this engine ends with it", reason)
            self._leaving = asyncio.create_task(self._leave(reason), name="leave")

    async def _leave(self, reason: str) -> None:
        self._context.offer(())
        await self._let_go()
        self._died(reason)

    async def drain(self) -> None:
        """Wait until peers have fetched the blocks of every prompt that was computed for them."""
        while self._dead is None and self.card.role == "prefill" and self._loads.used_blocks:  # noqa: ASYNC110 (vLLM only counts them)
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        await ended(self._watching, self._leaving)
        self._dead = self._dead or "vLLM was stopped"
        self._loads.close()
        vllm_api.end_streams(self._engine, self._vllm.EngineDeadError())
        for feed in self._feeds:
            await feed.close()
        await vllm_api.shut_down(self._engine, _SHUTDOWN)
        if self._others is not None:
            await self._others.close()
        self._directory.cleanup()

    def metrics(self) -> bytes:
        """vLLM's own series; what every process exports of itself comes from the worker."""
        return generate_latest(_OnlyVllm())

    # -------------------------------------------------------------- controls

    def controls(self) -> Mapping[str, Callable[[Mapping[str, Any]], Any]]:
        actions: dict[str, Callable[[Mapping[str, Any]], Awaitable[Any]]] = {
            "reset_cache": self._reset_cache, "sleep": self._sleep, "wake": self._wake,
            "start_profile": self._start_profile, "stop_profile": self._stop_profile,
        }  # fmt: skip
        if "lora" in self.card.capabilities:
            actions |= {"load_adapter": self.adapters.load_action, "unload_adapter": self.adapters.unload_action, "list_adapters": self.adapters.list_action}
        return {name: self._guarded(action) for name, action in actions.items()}

    def _guarded(self, action: Callable[[Mapping[str, Any]], Awaitable[Any]]) -> Callable[[Mapping[str, Any]], Awaitable[Any]]:
        async def run(arguments: Mapping[str, Any]) -> Any:
            try:
                return await action(arguments)
            except Exception as e:
                raise self._ours(e) from e

        return run

    async def _reset_cache(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"reset": bool(await self._engine.reset_prefix_cache())}

    async def _sleep(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Leave discovery, let requests in progress end, then free what the level says. `wake` undoes it."""
        if not self._asleep:
            self._context.offer(())
            await self._let_go()
            self._asleep = True
            await self._engine.sleep(int(arguments.get("level", 1)))
        return {"asleep": True}

    async def _let_go(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LETTING_GO):  # wait_for may swallow a cancellation
                await self._quiet.wait()

    async def _wake(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._asleep:
            await self._engine.wake_up()
            self._asleep = False
            self._offer()
        return {"asleep": False}

    async def _start_profile(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        if not vllm_api.profiles(self._engine):
            raise RequestError("profiling is off: give the engine args = { profiler_config = { profiler = \"torch\", torch_profiler_dir = \"/directory\" } }")
        await self._engine.start_profile()
        return {"profiling": True}

    async def _stop_profile(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        if vllm_api.profiles(self._engine):
            await self._engine.stop_profile()
        return {"profiling": False}

    def _offer(self) -> None:
        """Tell the worker which models this engine serves now."""
        if not self._asleep:
            self._context.offer((self.card, *self.adapters.cards()))


class _OnlyVllm(CollectorRegistry):
    """A view of vLLM's registry without the series of the process."""

    def collect(self) -> Any:
        return (family for family in vllm_api.prometheus_registry().collect() if family.name.startswith("vllm:"))
