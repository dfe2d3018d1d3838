"""How long one engine step takes, in milliseconds."""

from __future__ import annotations

from typing import Protocol

import attrs
from attrs import validators as v


class Timing(Protocol):
    def step_ms(self, prefill_tokens: int, decodes: int, read_blocks: float, attention: float = 0.0) -> float:
        """Duration of a step that computes `prefill_tokens` of prompts and one token of each of `decodes` sequences.

        :param read_blocks: KV blocks that the decoding sequences read, a shared one once for each of them.
        :param attention: sum over the prompt tokens of the step of how many tokens each attends to.
        """
        ...

    def decode_ms(self, decodes: int, read_blocks: float, growth: float, steps: int) -> float:
        """Duration of `steps` steps that only decode, of which each reads `growth` blocks more than the one before."""
        ...


@attrs.frozen
class Polynomial:
    """Polynomials fitted to a large model on one current GPU: quadratic in the prompt tokens of the step, and in the share of the cache that is read."""

    total_blocks: int

    def step_ms(self, prefill_tokens: int, decodes: int, read_blocks: float, attention: float = 0.0) -> float:
        ms = 0.0
        if prefill_tokens:
            ms += (4.209989e-7 * prefill_tokens + 1.518344e-2) * prefill_tokens + 16.50142
        if decodes:
            share = min(1.0, read_blocks / self.total_blocks)
            ms += (-25.74 * share + 54.01) * share + 5.74
        return ms

    def decode_ms(self, decodes: int, read_blocks: float, growth: float, steps: int) -> float:
        total = self.total_blocks
        full = 0  # steps that read more than there is, as prefixes are shared: the share stays at 1
        if read_blocks + (steps - 1) * growth > total:
            free = 0 if read_blocks >= total or growth <= 0 else min(steps, int((total - read_blocks) / growth) + 1)
            full, steps = steps - free, free
        a, b = read_blocks / total, growth / total
        first, second = steps * (steps - 1) / 2.0, (steps - 1) * steps * (2 * steps - 1) / 6.0
        return -25.74 * (a * a * steps + 2 * a * b * first + b * b * second) + 54.01 * (a * steps + b * first) + 5.74 * steps + 34.01 * full


@attrs.frozen
class Linear:
    """A straight line: a price for the step, for each prompt token, for each sequence that decodes, and for the cache that decoding reads."""

    step: float = attrs.field(default=5.0, validator=v.ge(0))
    """Milliseconds of a step, whatever is in it."""
    prefill_token: float = attrs.field(default=0.02, validator=v.ge(0))
    """Milliseconds for each prompt token."""
    decode: float = attrs.field(default=0.05, validator=v.ge(0))
    """Milliseconds for each sequence that decodes."""
    used_block: float = attrs.field(default=0.001, validator=v.ge(0))
    """Milliseconds for each block that decoding reads."""

    def step_ms(self, prefill_tokens: int, decodes: int, read_blocks: float, attention: float = 0.0) -> float:
        return self.step + self.prefill_token * prefill_tokens + self.decode * decodes + (self.used_block * read_blocks if decodes else 0.0)

    def decode_ms(self, decodes: int, read_blocks: float, growth: float, steps: int) -> float:
        return steps * (self.step + self.decode * decodes + self.used_block * (read_blocks + growth * (steps - 1) / 2.0))


@attrs.frozen
class Roofline:
    """What bounds a dense 8-billion-parameter model on one GPU: reading the weights or computing, then attention, then reading the cache."""

    block_size: int
    overhead: float = attrs.field(default=1.5, validator=v.ge(0))
    """Milliseconds of a step, whatever is in it."""
    weights: float = attrs.field(default=5.97, validator=v.ge(0))
    """Milliseconds to read the weights once: 16 GB at 80 % of 3.35 TB/s."""
    token: float = attrs.field(default=0.032, validator=v.ge(0))
    """Milliseconds to compute one token: 16 GFLOP at 500 TFLOP/s. A step costs the greater of this and `weights`."""
    attended: float = attrs.field(default=1.498e-6, validator=v.ge(0))
    """Milliseconds for each token that a prompt token attends to: 524 kFLOP at 350 TFLOP/s."""
    read_token: float = attrs.field(default=4.891e-5, validator=v.ge(0))
    """Milliseconds for each cached token that decoding reads: 131 kB."""

    def step_ms(self, prefill_tokens: int, decodes: int, read_blocks: float, attention: float = 0.0) -> float:
        if not prefill_tokens and not decodes:
            return 0.0
        computed = max(self.weights, self.token * (prefill_tokens + decodes))
        return self.overhead + computed + self.attended * attention + self.read_token * self.block_size * read_blocks

    def decode_ms(self, decodes: int, read_blocks: float, growth: float, steps: int) -> float:
        read = self.read_token * self.block_size * (read_blocks + growth * (steps - 1) / 2.0)
        return steps * (self.overhead + max(self.weights, self.token * decodes) + read)


@attrs.frozen
class Fixed:
    """Every step takes the same time."""

    ms: float

    def step_ms(self, prefill_tokens: int, decodes: int, read_blocks: float, attention: float = 0.0) -> float:
        return self.ms

    def decode_ms(self, decodes: int, read_blocks: float, growth: float, steps: int) -> float:
        return self.ms * steps
