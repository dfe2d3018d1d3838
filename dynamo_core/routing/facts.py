"""The facts that the core knows about workers. Policies name them in `needs`; providers fill their columns.

Plugins may use these, and define their own: a fact is known by its name, so that a policy and a provider from different
packages agree without importing each other.
"""

from __future__ import annotations

from dynamo_core.routing.contract import Fact

AGE_SUFFIX = "_age"
"""Facts with such a name say how old others are, in seconds; `dynamo explain` shows them."""
PROBLEM_SUFFIX = "_problem"
"""Facts with such a name say what is wrong with what is known of a worker, empty when nothing is; `dynamo explain` shows it."""

# ------------------------------------------------------------------ provided by `fleet`: who is there

INHIBITED: Fact[float] = Fact("worker.inhibited", float, "s", "Seconds for which the worker is still avoided after a failure; 0 when it is not.")
INHIBITED_WHY: Fact[str] = Fact("worker.inhibited_why", str, "", "What the failure was; empty when the worker is not inhibited.")
DRAINING: Fact[bool] = Fact("worker.draining", bool, "", "The worker is leaving and takes no new requests.")
PROVEN: Fact[bool] = Fact("worker.proven", bool, "", "A canary request has come back from the worker.")
TAINTS: Fact[tuple[str, ...]] = Fact("worker.taints", tuple, "", "Labels that the worker put on its card, such as `gpu=h200`.")
MAX_SEQUENCES: Fact[int] = Fact("worker.max_sequences", int, "{sequence}", "How many sequences its engine runs at once; 0 when the card does not say.")
MAX_BATCHED_TOKENS: Fact[int] = Fact("worker.max_batched_tokens", int, "{token}", "Tokens that its engine takes in one step; 0 when the card does not say.")
TOTAL_BLOCKS: Fact[int] = Fact("worker.total_blocks", int, "{block}", "KV blocks that its engine holds; 0 when the card does not say.")
BLOCK_SIZE: Fact[int] = Fact("worker.block_size", int, "{token}", "Tokens in one KV block.")
TURN: Fact[int] = Fact("worker.turn", int, "", "Number of the last decision of this router that chose the worker; -1 when none did.")

# ------------------------------------------------------------------ provided by `bookings`: what this process sent

IN_FLIGHT: Fact[int] = Fact("bookings.in_flight", int, "{request}", "Requests that this process sent to the worker and has not seen end.")
BOOKED_PREFILL_TOKENS: Fact[int] = Fact("bookings.prefill_tokens", int, "{token}", "Of those: prompt tokens that were not cached and are not prefilled yet.")
BOOKED_BLOCKS: Fact[int] = Fact("bookings.blocks", int, "{block}", "Of those requests: KV blocks of prompt and output so far.")

# ------------------------------------------------------------------ provided by `engine-load`: what engines report

ENGINE_RUNNING: Fact[int] = Fact("engine.running", int, "{sequence}", "Sequences that the engine is running, by its last report; 0 before the first.")
ENGINE_WAITING: Fact[int] = Fact("engine.waiting", int, "{sequence}", "Sequences that wait in the engine's queue, by its last report; 0 before the first.")
ENGINE_KV_USAGE: Fact[float] = Fact("engine.kv_usage", float, "1", "Share of KV blocks in use, 0 to 1, by the engine's last report; 0 before the first.")
ENGINE_REPORT_AGE: Fact[float] = Fact("engine.report_age", float, "s", "Age of the engine's last report; infinite before the first.")

# ------------------------------------------------------------------ provided by KV index plugins

OVERLAP_TOKENS: Fact[int] = Fact("kv.overlap_tokens", int, "{token}", "Leading prompt tokens that are believed to be in the worker's KV cache.")

ALL: tuple[Fact[object], ...] = tuple(value for value in dict(globals()).values() if isinstance(value, Fact))
"""Every fact above, in order."""
