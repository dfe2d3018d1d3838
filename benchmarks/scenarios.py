"""What clients do in each scenario, and how fast the simulated engines go."""

from __future__ import annotations

import attrs


@attrs.frozen
class Scenario:
    name: str
    title: str
    words: int
    """Of each prompt; each is about one token."""
    tokens: int
    """Of each answer."""
    at_once: int
    stream: bool = True
    paced: bool = False
    """Engines give each stream a token every `PACE_MS`, all in step, as a decode batch on a GPU does. Otherwise they go flat out."""
    seconds: float = 5.0
    warm_up: float = 1.5


PACE_MS = 25
"""Milliseconds."""

ALL = {
    scenario.name: scenario
    for scenario in (
        Scenario("short", "short: 20 words in, 16 tokens out, 32 at once", 20, 16, 32),
        Scenario("chat", "chat flat out: 500 in, 128 out, 64 at once", 500, 128, 64, seconds=6.0),
        Scenario("long", "long: 8,000 in, 16 out, 8 at once", 8000, 16, 8),
        Scenario("unary", "short, not streaming, 32 at once", 20, 16, 32, stream=False),
        Scenario("single", "one at a time: 20 in, 16 out", 20, 16, 1),
        Scenario("overload", "overload: 20 in, 16 out, 1,000 at once", 20, 16, 1000, warm_up=0.0),
        Scenario("paced", f"paced chat: 500 in, 128 out, 64 at once, a token each {PACE_MS} ms", 500, 128, 64, paced=True, seconds=9.0, warm_up=3.0),
    )
}
