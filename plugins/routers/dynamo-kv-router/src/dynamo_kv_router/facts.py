"""What the index says about each worker. `kv.overlap_tokens` itself is one of the core's facts."""

from __future__ import annotations

from dynamo_core.routing.contract import Fact
from dynamo_core.routing.facts import OVERLAP_TOKENS

HOST_OVERLAP_TOKENS: Fact[int] = Fact("kv.host_overlap_tokens", int, "{token}", "Further prompt tokens, after those on the device, that need host memory.")
DISK_OVERLAP_TOKENS: Fact[int] = Fact("kv.disk_overlap_tokens", int, "{token}", "Further prompt tokens, after those on device and host, that need a disk.")
EXTERNAL_OVERLAP_TOKENS: Fact[int] = Fact("kv.external_overlap_tokens", int, "{token}", "Further prompt tokens that need storage outside of the worker.")
PREDICTED_TOKENS: Fact[int] = Fact(
    "kv.predicted_tokens", int, "{token}", "Of the overlap: tokens that are only believed to be there, because the worker was sent a prompt with them."
)
INDEX_STATE: Fact[str] = Fact(
    "kv.index_state", str, "", "Where the knowledge comes from: `events`, `approximate` (what was sent), `syncing` (a picture is being fetched) or `degraded`."
)
INDEX_PROBLEM: Fact[str] = Fact("kv.index_problem", str, "", "What is wrong with the knowledge of this worker's cache; empty when nothing is.")
INDEX_AGE: Fact[float] = Fact("kv.index_age", float, "s", "Seconds since the worker last said something of its cache; infinite before it did.")

OVERLAPS = (OVERLAP_TOKENS, HOST_OVERLAP_TOKENS, DISK_OVERLAP_TOKENS, EXTERNAL_OVERLAP_TOKENS)
"""By level."""
