"""One choice of one request, from its slot to its finish reason.

A choice is usually one run of llama.cpp. It takes several where llama.cpp lacks something: `min_tokens` (a first run in which
nothing may end the choice), and the ids of tokens within an unfinished character, which llama.cpp does not stream.
A run continues exactly where the last one stopped: its prompt is all that is there so far, and the slot's cache holds that.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import attrs

from dynamo_core.errors import EngineFailed, RequestError
from dynamo_core.types import FinishReason, Output, Request, TokenLogprob
from dynamo_llamacpp import sampling
from dynamo_llamacpp.native import Native, Position, Step
from dynamo_llamacpp.pieces import Pieces

_IRRESISTIBLE = 1e6
"""A bias that leaves the sampler no other choice."""
_WIDE = 1024
"""How many candidates to look through for the probability of a token that llama.cpp did not report."""


@attrs.frozen
class Model:
    """What choices must know of the model."""

    native: Native
    pieces: Pieces
    ends: tuple[int, ...]
    forbidden: int | None
    """A control token that ends nothing, such as the one that begins a turn: no constrained output contains it."""


@attrs.define(eq=False)
class Choice:
    """A choice that has its slot."""

    model: Model
    request: Request
    body: dict[str, Any]
    """As `sampling.settings` made it."""
    index: int
    limit: int
    """Tokens to generate."""
    slot: int
    reuse: bool
    """Whether the slot's cache may be used."""
    tokens: list[int] = attrs.field(init=False)
    """Prompt and output so far."""
    made: int = attrs.field(default=0, init=False)
    """Tokens of output so far."""
    evaluated: int = attrs.field(default=0, init=False)
    """Tokens known to be in the slot's cache."""
    _finish: FinishReason | None = attrs.field(default=None, init=False)
    _stop_reason: int | None = attrs.field(default=None, init=False)
    _cached: int | None = attrs.field(default=None, init=False)
    """Prompt tokens from the cache, until an output has told."""
    _begun: bool = attrs.field(default=False, init=False)
    _budget: int = attrs.field(default=0, init=False)
    """Tokens that the run at hand may make."""
    _over: bool = attrs.field(default=False, init=False)
    """The run at hand has said that it is over."""
    _lost: int = attrs.field(default=0, init=False)
    """Tokens of this run whose ids nobody told us; the run ends and they are generated again."""

    def __attrs_post_init__(self) -> None:
        self.tokens = list(self.request.token_ids)

    @property
    def held(self) -> Sequence[int]:
        """What the slot's cache holds for certain."""
        return self.tokens[: self.evaluated]

    async def outputs(self) -> AsyncGenerator[Output, None]:
        if self.request.guided is not None:
            await self._check_constraint()
        while True:
            async with aclosing(self._streamed()) as streamed:
                async for output in streamed:
                    yield output
            if self._finish is None and self._lost and (recovered := await self._recovered(self._lost)) is not None:
                yield recovered
            if self._finish is not None:
                return

    # -------------------------------------------------------------- before a constrained run

    async def _check_constraint(self) -> None:
        """A constraint that llama.cpp does not understand it may leave out in silence: offer a token that no constraint allows.

        :raises RequestError: it was taken.
        """
        body = {**self._run_body(), "n_predict": 1, "logit_bias": [(self.model.forbidden, _IRRESISTIBLE)]}
        run = self.model.native.start(self.slot, body)
        try:
            while steps := await run.read():
                for step in steps:
                    if step.cached is not None:
                        self._progress(step)
                    elif self.model.forbidden in step.tokens:
                        raise RequestError("llama.cpp cannot enforce this constraint: it is malformed, or beyond what llama.cpp supports", param="guided")
        finally:
            await run.close()

    # -------------------------------------------------------------- a run that streams

    async def _streamed(self) -> AsyncGenerator[Output, None]:
        """One run, until the choice ends, the run does, or a token is lost."""
        body = self._run_body()
        run = self.model.native.start(self.slot, body)
        self._budget, self._lost, self._over, told = body["n_predict"], 0, False, 0
        try:
            while steps := await run.read():
                output, told = self._take(steps, told)
                if output is not None:
                    yield output
                if self._finish is not None or self._lost:
                    return
            if not self._over:
                raise EngineFailed("llama.cpp ended a run without saying why")
        finally:
            await run.close()

    def _run_body(self) -> dict[str, Any]:
        made, stops = self.made, self.request.stops
        early = made < stops.min_tokens
        banned: list[int] = []
        if early:
            banned = [*self.model.ends, *stops.stop_token_ids]
        elif stops.ignore_eos:
            banned = [token for token in self.model.ends if token not in stops.stop_token_ids]
        body = {**self.body, "prompt": self.tokens, "n_predict": min(stops.min_tokens, self.limit) - made if early else self.limit - made,
                "logit_bias": sampling.logit_bias(self.request, banned)}  # fmt: skip
        if (seed := sampling.seed_of(self.request, self.index, self.request.resumed + made)) is not None:
            body["seed"] = seed
        if not self.reuse and not self.evaluated:
            body["cache_prompt"] = False
        return body

    def _take(self, steps: Sequence[Step], told: int) -> tuple[Output | None, int]:
        """Everything that has arrived, as one output. `told`: how many tokens this run has named."""
        new: list[int] = []
        logprobs: list[TokenLogprob] | None = None if self.request.logprobs is None else []
        ended = ""
        for step in steps:
            if step.cached is not None:
                self._progress(step)
                continue
            ended = step.ended
            self._over = bool(ended)
            hidden = step.predicted - told - (0 if ended else 1)
            if hidden > 0:
                within = self._hidden(step, hidden, logprobs is not None)
                if within is None:
                    self._lost = step.predicted - told
                    break
                new += within
            told = step.predicted
            if ended:
                ended = "" if ended == "limit" and told >= self._budget else ended
                break
            new.append(step.tokens[0])
            if logprobs is not None:
                logprobs.append(_logprob(step.positions[0], self.request.logprobs or 0))
        return self._output(new, logprobs, ended), told

    def _hidden(self, step: Step, count: int, logprobs: bool) -> list[int] | None:
        """Tokens that llama.cpp made before this step without naming them; `None` when they must be made again."""
        constrained = self.request.guided is not None
        if step.ended:
            return [] if constrained else None  # the text ends within a character, and a grammar cannot go back
        within = None if logprobs else self.model.pieces.within(step.text, count, step.tokens[0], unique=not constrained)
        if within is None and constrained:
            raise EngineFailed("llama.cpp did not name every token of a constrained output" + (", as logprobs need" if logprobs else ""))
        return within

    def _progress(self, step: Step) -> None:
        if not self._begun:
            self._begun = True
            self._cached = step.cached if self.index == 0 else None
        self.evaluated = max(self.evaluated, min(step.processed, len(self.tokens)))

    # -------------------------------------------------------------- tokens that llama.cpp did not name

    async def _recovered(self, count: int) -> Output | None:
        """Generate `count` tokens again in a run that does not stream, which names them all when it ends."""
        self._lost = 0
        step = await self._at_once({**self._run_body(), "n_predict": count})
        if not step.ended:
            raise EngineFailed("llama.cpp ended a run without saying why")
        tokens = step.tokens
        logprobs = None
        if self.request.logprobs is not None:
            logprobs = [await self._looked_up(self.tokens + tokens[:i], token) for i, token in enumerate(tokens)]
        return self._output(tokens, logprobs, "" if len(tokens) >= count else step.ended)

    async def _looked_up(self, before: Sequence[int], token: int) -> TokenLogprob:
        """The probability of a token at its place. llama.cpp reports none for part of a character, so let it report that of a
        whole one: the distribution comes from before any bias."""
        body = {**self._run_body(), "prompt": before, "n_predict": 1, "n_probs": _WIDE, "logit_bias": [(self.model.pieces.whole, _IRRESISTIBLE)]}
        for position in (await self._at_once(body)).positions:
            top = [(c.id, c.logprob) for c in position.top_logprobs]
            return TokenLogprob(token, dict(top).get(token, top[-1][1]), top[: self.request.logprobs or 0])
        return TokenLogprob(token, 0.0)

    async def _at_once(self, body: dict[str, Any]) -> Step:
        run = self.model.native.start(self.slot, {**body, "stream": False})
        last = Step()
        try:
            while steps := await run.read():
                last = steps[-1]
        finally:
            await run.close()
        return last

    # -------------------------------------------------------------- tokens become output

    def _output(self, new: list[int], logprobs: list[TokenLogprob] | None, ended: str) -> Output | None:
        """Append what is new, up to the first token that ends the choice."""
        for i, token in enumerate(new):
            self.tokens.append(token)
            self.made += 1
            if self._ends_with(token):
                del new[i + 1 :]
                break
        if new:
            self.evaluated = len(self.tokens) - 1
        if self._finish is None and not self._lost:
            if ended == "eos" and not self.request.stops.ignore_eos and self.made >= self.request.stops.min_tokens:
                self._finish = "stop"
            elif ended == "limit":
                self._finish = "length"  # llama.cpp's own context came to its end before ours
        if not new and self._finish is None:
            return None
        cached, self._cached = self._cached, None
        return Output(new, self.index, self._finish, self._stop_reason, None if logprobs is None else logprobs[: len(new)], cached)

    def _ends_with(self, token: int) -> bool:
        stops = self.request.stops
        if self.made >= stops.min_tokens:
            if token in self.model.ends and not stops.ignore_eos:
                self._finish = "stop"
            elif token in stops.stop_token_ids:
                self._finish, self._stop_reason = "stop", None if token in self.model.ends else token
        if self._finish is None and self.made >= self.limit:
            self._finish = "length"
        return self._finish is not None


def _logprob(position: Position, k: int) -> TokenLogprob:
    return TokenLogprob(position.id, position.logprob, [(c.id, c.logprob) for c in position.top_logprobs[:k]])
