"""Performance learned from the fleet that serves: times seen, against what was in progress, by least squares with prices that are never negative."""

from __future__ import annotations

from collections import deque

import attrs
import numpy as np
from attrs import validators as v
from scipy.optimize import nnls

from dynamo_planner.contract import Load, Performance


@attrs.frozen
class Linear:
    """A price for a step, for each sequence in it, and for each token that it reads."""

    step: float
    sequence: float
    read: float
    prompt: float
    prompt_token: float
    seen: float
    """The greatest concurrency of a replica that was seen."""
    source: str

    def prefill(self, tokens: float) -> float:
        return self.prompt + self.prompt_token * tokens

    def itl(self, context: float, concurrency: float) -> float:
        return self.step + concurrency * (self.sequence + self.read * context)

    def most_sequences(self, context: float) -> float:
        return max(1.0, 2 * self.seen)


@attrs.define
class Live:
    """Learns from each interval. Knows nothing until it has seen enough different ones."""

    samples: int = attrs.field(default=8, validator=v.ge(4))
    """Intervals with traffic that are needed before it says anything."""
    window: int = attrs.field(default=500, validator=v.ge(8))
    """Intervals that are remembered."""
    _seen: deque[tuple[float, float, float, float, float]] = attrs.field(init=False, factory=deque[tuple[float, float, float, float, float]])

    def learn(self, load: Load, replicas: int, readers: int) -> None:
        """An interval without a first token or without a second one teaches nothing. :param replicas: that decode. :param readers: that read prompts."""
        if load.ttft is None or load.itl is None or not replicas:
            return
        # In an overload all first tokens are late, and that is the queue. Who reads ten prompts a second takes a tenth of a second for each, at most.
        ttft = min(load.ttft, max(1, readers) / load.rate) if load.rate > 0 else load.ttft
        context = load.prompt_tokens + load.output_tokens / 2
        uncached = load.prompt_tokens * (1 - load.cached_share)
        concurrency = load.rate * load.output_tokens * load.itl / replicas  # Little's law: what was decoding, on average
        self._seen.append((context, concurrency, load.itl, uncached, ttft))
        while len(self._seen) > self.window:
            self._seen.popleft()

    def problem(self) -> str | None:
        """What is missing before `performance` says anything."""
        if len(self._seen) < self.samples:
            return f"the performance of the engine is being learned: {len(self._seen)} of {self.samples} intervals with traffic were seen"
        return None

    def performance(self) -> Performance | None:
        if self.problem() is not None:
            return None
        context, concurrency, itl, uncached, ttft = np.array(self._seen).T
        (step, sequence, read), _ = nnls(np.column_stack([np.ones_like(itl), concurrency, concurrency * context]), itl)
        quiet = ttft <= np.quantile(ttft / np.maximum(uncached, 1.0), 0.5) * np.maximum(uncached, 1.0)  # the others waited in a queue
        (prompt, prompt_token), _ = nnls(np.column_stack([np.ones_like(ttft), uncached])[quiet], ttft[quiet])
        most = float(concurrency.max())
        return Linear(float(step), float(sequence), float(read), float(prompt), float(prompt_token), most, f"learned from {len(self._seen)} intervals")
