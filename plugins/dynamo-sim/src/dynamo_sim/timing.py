"""How long one engine step takes, in milliseconds."""

from __future__ import annotations

from typing import Protocol

import attrs
from attrs import validators as v


class Timing(Protocol):
    def step_ms(self, prefill_tokens: int, decodes: int, used_blocks: int) -> float:
        """Duration of a step that computes `prefill_tokens` of prompts and one token of each of `decodes` sequences."""
        ...


@attrs.frozen
class Polynomial:
    """Polynomials fitted to a large model on one current GPU: quadratic in the prompt tokens of the step, and in the share of the cache in use."""

    total_blocks: int

    def step_ms(self, prefill_tokens: int, decodes: int, used_blocks: int) -> float:
        ms = 0.0
        if prefill_tokens:
            ms += (4.209989e-7 * prefill_tokens + 1.518344e-2) * prefill_tokens + 16.50142
        if decodes:
            share = used_blocks / self.total_blocks
            ms += max(1.0, (-25.75872 * share + 54.01013) * share + 5.74)
        return ms


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
    """Milliseconds for each block in use, in a step that decodes."""

    def step_ms(self, prefill_tokens: int, decodes: int, used_blocks: int) -> float:
        return self.step + self.prefill_token * prefill_tokens + (self.decode * decodes + self.used_block * used_blocks if decodes else 0.0)


@attrs.frozen
class Fixed:
    """Every step takes the same time."""

    ms: float

    def step_ms(self, prefill_tokens: int, decodes: int, used_blocks: int) -> float:
        return self.ms
