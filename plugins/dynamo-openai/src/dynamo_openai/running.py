"""A server in use: its streams, its probe, what is seen of it, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from dynamo_core.context import Context
from dynamo_core.ending import ended
from dynamo_core.engines import EngineContext, admit
from dynamo_core.errors import ConfigError, EngineDead, RequestError
from dynamo_core.types import Output, Request
from dynamo_openai.meeting import Met, one_token
from dynamo_openai.server import Model, Slow, Unreachable, cache_of, loads_of

log = logging.getLogger(__name__)


class Running:
    def __init__(self, met: Met, context: EngineContext) -> None:
        self.card = met.card
        """Of the base model, as it is now."""
        self.tokenizer = met.tokenizer
        self._met = met
        self._context = context
        self._adapters: tuple[str, ...] = ()
        self._gone: str | None = None
        """Why the server cannot be used at present."""
        self._stopped = False
        self._look_now = asyncio.Event()
        self._looking = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None

    # -------------------------------------------------------------- requests

    async def generate(self, request: Request, context: Context) -> AsyncGenerator[Output, None]:
        if self._stopped:
            raise EngineDead("the engine was stopped")
        if self._gone is not None:
            raise EngineDead(self._gone)
        card = self.card
        limit = admit(request, card)
        if request.adapter is not None and request.adapter not in self._adapters:
            raise RequestError(f"the server has no adapter {request.adapter!r}; it has: {', '.join(self._adapters) or 'none'}", param="adapter")
        rank = request.hints.dp_rank
        if rank is not None and card.dp_size > 1 and not card.dp_start <= rank < card.dp_start + card.dp_size:
            raise RequestError(f"this worker has no data-parallel rank {rank}", param="dp_rank")
        try:
            async with aclosing(self._met.requests.generate(request, card, limit, context.traceparent)) as outputs:
                async for output in outputs:
                    yield output
        except EngineDead as e:
            self._look_now.set()
            if self._stopped:
                raise EngineDead("the engine was stopped") from e
            raise

    async def probe(self) -> None:
        if self._gone is not None:
            await self.look()
        if self._gone is not None:
            raise EngineDead(self._gone)
        ranks: Sequence[int | None] = range(self.card.dp_start, self.card.dp_start + self.card.dp_size) if self.card.dp_size > 1 else [None]
        await asyncio.gather(*(self._try(rank) for rank in ranks))

    async def _try(self, rank: int | None) -> None:
        async with aclosing(self._met.requests.generate(one_token(rank), self.card, 1)) as outputs:
            async for _ in outputs:
                pass

    # -------------------------------------------------------------- what is seen of it

    def watch(self, interval: float) -> None:
        """Look every `interval` seconds, and at once when a stream breaks."""
        self._watching = asyncio.create_task(self._watch(interval), name=f"watch {self._met.server.url}")

    async def _watch(self, interval: float) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await self._look_now.wait()
            self._look_now.clear()
            await self.look()
            if self._look_now.is_set():
                await asyncio.sleep(interval)  # a stream that breaks may have many companions

    async def look(self) -> None:
        """Is it there, and what it was? Tell what changed."""
        async with self._looking:
            try:
                models = await self._met.server.models()
                page = await self._met.server.metrics()
            except Slow:
                return  # a busy server is not a dead one; the worker's canary tells
            except Unreachable as e:
                self._lost(f"{self._met.server.url} does not answer: {e}")
                return
            except ConfigError as e:
                self._lost(str(e))
                return
            if all(model.id != self._met.model.id for model in models) and (self._met.named or not models):
                self._lost(f"{self._met.server.url} no longer serves {self._met.model.id!r}")
                return
            if (other := self._other(models, page)) is not None:
                self._lost(f"{self._met.server.url} {other}")
                self._context.died(self._gone or other)  # the worker that comes after this one meets it as it is now
                return
            # Adapters name the first of its names as their parent, whichever is used here.
            names = {model.id for model in models if model.parent is None and model.root == self._met.model.root}
            self._there(tuple(model.id for model in models if model.parent in names))
            for load in loads_of(page, self.card.total_blocks or 0):
                self._context.load(load)

    def _other(self, models: Sequence[Model], page: str) -> str | None:
        """What is not as it was when this worker started; `None` when all is."""
        was, size, before = self._met.model, cache_of(page).block_size, self._met.cache.block_size
        now = next((model for model in models if model.id == was.id), None)
        if now is None:
            return f"no longer serves {was.id!r}"
        if (now.root, now.max_model_len) != (was.root, was.max_model_len):
            return f"now serves {now.root!r} with {now.max_model_len} tokens and not {was.root!r} with {was.max_model_len}"
        if None not in (size, before) and size != before:
            return f"now has {size} tokens in a KV block and not {before}"
        return None

    def _lost(self, why: str) -> None:
        if self._gone is None:
            log.warning("%s: this worker leaves discovery", why)
            self._context.offer(())
        self._gone = why

    def _there(self, adapters: tuple[str, ...]) -> None:
        if self._gone is None and adapters == self._adapters:
            return
        if self._gone is not None:
            log.warning("%s answers again", self._met.server.url)
        self._gone, self._adapters = None, adapters
        promised = self._met.card.capabilities
        self.card = msgspec.structs.replace(self._met.card, capabilities=(*promised, "lora") if adapters else promised)
        self._context.offer([self.card, *(msgspec.structs.replace(self.card, name=name, aliases=(), adapter=name) for name in adapters)])

    def problems(self) -> dict[str, str]:
        found = {"server": self._gone} if self._gone is not None else {}
        return found | {f"kv events of rank {feed.rank}": problem for feed in self._met.feeds if (problem := feed.problem())}

    async def stop(self) -> None:
        self._stopped = True
        await ended(self._watching)
        self._met.connections.close()
        for feed in self._met.feeds:
            await feed.close()
        await self._met.server.close()
