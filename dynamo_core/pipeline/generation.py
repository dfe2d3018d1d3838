"""From tokens to text: one generation as the frontend reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dynamo_core.pipeline.contract import DeltaSink, Pouring
from dynamo_core.pipeline.migrate import TokenStream
from dynamo_core.pipeline.places import extra_tokens
from dynamo_core.preprocess.contract import Assembler, Preprocessor
from dynamo_core.types import Delta, LogprobText, Output, Request, TextOptions, Usage


class TextGeneration(Pouring):
    """Implements `pipeline.contract.Generation` over a token stream."""

    def __init__(self, stream: TokenStream, request: Request, text: TextOptions, preprocessor: Preprocessor,
                 ended: Callable[[BaseException | None], None]) -> None:
        self.usage = Usage(prompt_tokens=len(request.token_ids) + extra_tokens([item.get("runs") for item in request.media or ()]))
        self._asked_tokens = len(request.token_ids)
        self.prompt_logprobs: list[LogprobText | None] | None = None
        self._stream = stream
        self._ended: Callable[[BaseException | None], None] | None = ended
        self._preprocessor = preprocessor
        tail = request.token_ids[-8:]
        self._choices: list[Assembler] = [preprocessor.assembler(text, index=i, prompt_tail=tail) for i in range(request.sampling.n)]
        self._open = request.sampling.n
        self._stops = bool(text.stop)

    @property
    def decisions(self) -> list[str]:
        return self._stream.decisions

    @property
    def workers(self) -> list[str]:
        return self._stream.workers

    async def read(self) -> Sequence[Delta]:
        while True:
            try:
                outputs = await self._stream.read()
            except BaseException as e:
                self._end(e)
                raise
            if not outputs:
                self._end(None)
                return ()
            deltas = self._one(outputs) if len(self._choices) == 1 else self._several(outputs)
            if deltas:
                for delta in deltas:
                    if delta.finish_reason is not None:
                        self._open -= 1
                if not self._open:
                    self._stream.finish()
                return deltas

    def pour(self, sink: DeltaSink) -> None:
        if self._stops:
            return  # a stop string ends a choice in the middle of its tokens

        ready, give, usage, push = sink.ready, sink.take, self.usage, self._choices[0].push

        def take_one(outputs: Sequence[Output]) -> bool:
            if not ready():
                return False
            delta = None
            for output in outputs:
                delta = push(output, delta)
            if delta is not None:
                usage.completion_tokens += len(delta.token_ids)
                give((delta,))
            return True

        def take_several(outputs: Sequence[Output]) -> bool:
            if not ready():
                return False
            if deltas := self._several(outputs):
                give(deltas)
            return True

        self._stream.listen(take_one if len(self._choices) == 1 else take_several)

    def _one(self, outputs: Sequence[Output]) -> Sequence[Delta]:
        choice, delta = self._choices[0], None
        for output in outputs:
            if output.cached_tokens is not None or output.prompt_logprobs is not None:
                self._first(output)
            delta = choice.push(output, delta)
            if output.embedding is not None and delta is not None:
                delta.embedding = output.embedding
        if delta is None:
            return ()
        self.usage.completion_tokens += len(delta.token_ids)
        return (delta,)

    def _several(self, outputs: Sequence[Output]) -> Sequence[Delta]:
        deltas: dict[int, Delta] = {}
        for output in outputs:
            if output.cached_tokens is not None or output.prompt_logprobs is not None:
                self._first(output)
            if (delta := self._choices[output.index].push(output, deltas.get(output.index))) is not None:
                deltas[output.index] = delta
        # Every token comes with some delta, so that counting deltas counts what was read, and nothing after a stop string.
        self.usage.completion_tokens += sum(len(delta.token_ids) for delta in deltas.values())
        return list(deltas.values())

    def _first(self, output: Output) -> None:
        if self._stream.cached_tokens is not None:
            self.usage.cached_tokens = self._stream.cached_tokens
        if output.places is not None:
            self.usage.prompt_tokens = self._asked_tokens + extra_tokens(output.places)
        if output.prompt_logprobs is not None:
            render = self._preprocessor.logprob
            self.prompt_logprobs = [None if p is None else render(p.token_id, p.logprob, p.top) for p in output.prompt_logprobs]

    def cancel(self, reason: str = "client disconnected") -> None:
        self._stream.cancel(reason)
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        self._stream.listen(None)  # it knows this generation: together they would be garbage that only the collector finds
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(error)
