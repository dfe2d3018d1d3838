"""Images before everything else: an encode worker reads them, and what it made of them travels on instead of the bytes.

    frontend --- images ---------------> encode worker               answers with `transfer`: for each image, what the engines need to find its embedding
    frontend --- prompt, `encoded` ----> prefill, decode, aggregated workers

Whatever stands in `encoded` is the engines' own business, but for `with_data`: the bytes travel on as well.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from dynamo_core.context import Context
from dynamo_core.errors import DynamoError, NoWorker, RequestError, StreamError
from dynamo_core.pipeline.dispatch import Dispatcher
from dynamo_core.routing.contract import Worker
from dynamo_core.types import Request, Sampling, Stops

log = logging.getLogger(__name__)


class EncodeStage:
    """The encode workers of one model. `run` takes a request with images, and returns it with what became of them."""

    def __init__(self, dispatcher: Dispatcher, *, attempts: int, fallback: bool, block_size: int) -> None:
        """:param fallback: whoever reads the prompt encodes the images when no encode worker can; otherwise the request fails."""
        self.decisions: list[str] = []
        self.workers: list[str] = []
        self._dispatcher = dispatcher
        self._attempts = attempts
        self._fallback = fallback
        self._block_size = block_size

    async def run(self, request: Request, context: Context) -> Request:
        """:raises DynamoError: the images cannot be encoded."""
        asked = msgspec.structs.replace(
            request, sampling=Sampling(), stops=Stops(max_tokens=1), logprobs=None, prompt_logprobs=None, guided=None,
            hints=msgspec.structs.replace(request.hints, instance=None, prefill_instance=None, dp_rank=None, expected_output_tokens=None),
        )  # fmt: skip
        failed: list[Worker] = []
        problem: DynamoError = NoWorker("the images")
        for _ in range(self._attempts):
            try:
                found = await self._ask(asked, failed, context)
            except RequestError:
                raise
            except (StreamError, NoWorker) as e:
                problem = e
                if isinstance(e, NoWorker) or not e.migratable:
                    break
                continue
            media = [{**item, "encoded": encoded} for item, encoded in zip(request.media or (), found, strict=True)]
            for item in media:
                if not item["encoded"].get("with_data"):
                    item.pop("data", None)
            return msgspec.structs.replace(request, media=media)
        if not self._fallback:
            raise problem
        log.warning("request %s: whoever reads the prompt encodes its images, because no encode worker can: %s", request.id, problem)
        return request

    async def _ask(self, request: Request, failed: list[Worker], context: Context) -> Sequence[Mapping[str, Any]]:
        leg = await self._dispatcher.dispatch(request, self._dispatcher.asked(request, failed, context.tenant), context, self._block_size)
        self.decisions.append(leg.decision.id)
        self.workers.append(self._dispatcher.label(leg.worker))
        outcome = "failed"
        try:
            transfer: dict[str, Any] = {}
            output: Any
            while outputs := await leg.stream.read():
                for output in outputs:
                    transfer = output.transfer or transfer
            found = transfer.get("media", ())
            if len(found) != len(request.media or ()):
                raise StreamError(f"the encode worker told of {len(found)} of {len(request.media or ())} images")
            outcome = "done"
            return found
        except StreamError as e:
            failed.append(leg.worker)
            self._dispatcher.failed(leg.worker, e)
            raise
        finally:
            leg.stream.cancel()
            leg.end(outcome)  # pyright: ignore[reportArgumentType]
