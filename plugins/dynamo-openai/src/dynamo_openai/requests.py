"""One request to a server: sent, read, and broken off when its reader leaves."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator

import attrs

from dynamo_core.cards import ModelCard
from dynamo_core.errors import EngineDead
from dynamo_core.types import Output, Request
from dynamo_openai.answers import Reader, refusal
from dynamo_openai.asking import body_of
from dynamo_openai.connection import Connection, Connections, Lost

_PATH = "/v1/completions"
_LONGEST_ERROR = 1 << 16


@attrs.define(eq=False)
class Requests:
    connections: Connections
    url: str
    model: str
    """The base model's name, as the server has it."""
    priorities: bool = True
    """The server's scheduler knows priorities."""
    _serial: itertools.count[int] = attrs.field(factory=itertools.count, init=False)

    async def generate(self, request: Request, card: ModelCard, limit: int, traceparent: str | None = None) -> AsyncGenerator[Output, None]:
        """:param limit: tokens to generate. :raises EngineDead: the server does not answer, or no longer does. :raises DynamoError: what it said instead."""
        model = request.adapter or self.model
        body = body_of(request, card, model, limit, id=f"{request.id}-{next(self._serial)}", priorities=self.priorities)
        headers = {} if traceparent is None else {"traceparent": traceparent}
        if request.hints.dp_rank is not None and card.dp_size > 1:
            headers["x-data-parallel-rank"] = str(request.hints.dp_rank - card.dp_start)
        try:
            connection = await self.connections.post(_PATH, body, headers)
        except Lost as e:
            raise EngineDead(f"{self.url} does not answer: {e}") from e
        reader = Reader(request, card)
        try:
            if connection.status != 200:
                raise refusal(connection.status, await _all(connection, _LONGEST_ERROR))
            if request.prompt_logprobs is not None:
                for output in reader.whole(await _all(connection)):
                    yield output
                return
            while data := await connection.read():
                for output in reader.events(data):
                    yield output
            if reader.unfinished:
                raise Lost("it ended in the middle")
            if not reader.over:
                for output in reader.end({}):
                    yield output
        except Lost as e:
            if not reader.over:
                raise EngineDead(f"{self.url} broke the stream: {e}") from e
        finally:
            self.connections.done(connection)


async def _all(connection: Connection, most: int | None = None) -> bytes:
    parts: list[bytes] = []
    size = 0
    while data := await connection.read():
        parts.append(data)
        size += len(data)
        if most is not None and size > most:
            break
    return b"".join(parts)


