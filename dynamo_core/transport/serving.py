"""The serving side of one stream, the same on every plane: ask the handler's iterator, and close it whatever happens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection

from dynamo_core.context import Context
from dynamo_core.errors import Cancelled, DynamoError
from dynamo_core.transport.contract import Handler, Item

log = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds for which a server that closes waits for handlers that do not let themselves be cancelled."""


async def relay(handler: Handler, endpoint: str, payload: bytes, context: Context, send: Callable[[Item], Awaitable[None] | None]) -> BaseException | None:
    """Send each item of one stream, and return the error that ended it, or `None` for a proper end. Never raises.

    `send` returns something to wait for when the handler must not be asked for more yet, and raises when nobody listens
    any more: a handler that swallows its cancellation is closed all the same.
    """
    iterator: AsyncIterator[Item] | None = None
    try:
        iterator = handler(endpoint, payload, context)
        async for item in iterator:
            if (room := send(item)) is not None:
                await room
    except asyncio.CancelledError:
        return Cancelled(context.cancel_reason or "the stream was cancelled on the serving side")
    except DynamoError as e:
        return e
    except Exception as e:
        log.exception("endpoint %s broke on request %s", endpoint, context.id)
        return e
    finally:
        await _close(iterator, endpoint, context)
    return None


async def _close(iterator: AsyncIterator[Item] | None, endpoint: str, context: Context) -> None:
    aclose = getattr(iterator, "aclose", None)
    if aclose is None:
        return
    try:
        await aclose()
    except asyncio.CancelledError:
        pass
    except Exception:
        log.exception("endpoint %s broke while it was closing request %s", endpoint, context.id)


async def ended(tasks: Collection[asyncio.Task[None]]) -> None:
    """Wait until the cancelled streams have closed their iterators."""
    if tasks:
        _, stubborn = await asyncio.wait(tasks, timeout=PATIENCE)
        for task in stubborn:
            log.warning("%s is still running %g s after it was cancelled", task.get_name(), PATIENCE)
