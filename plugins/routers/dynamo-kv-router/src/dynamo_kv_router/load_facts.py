"""What the cost functions need to know besides the KV index: blocks in use, work in the queue, and what work costs on an engine."""

from __future__ import annotations

from dynamo_core.routing.contract import Fact

# ------------------------------------------------------------------ provided by `kv-load`: requests in progress, shared blocks counted once

ACTIVE_BLOCKS: Fact[int] = Fact("kv.active_blocks", int, "{block}", "Full prompt blocks of requests in progress; those that requests share count once.")
POTENTIAL_BLOCKS: Fact[int] = Fact("kv.potential_blocks", int, "{block}", "What `kv.active_blocks` would be with this request.")
ACTIVE_OVERLAP_TOKENS: Fact[int] = Fact("kv.active_overlap_tokens", int, "{token}", "Leading prompt tokens that a request in progress has, too.")

# ------------------------------------------------------------------ provided by `engine-model`: bookings priced by what was learned of the engines

BACKLOG: Fact[float] = Fact(
    "engine.backlog", float, "ms",
    "Estimated prefill work that was sent and has not ended, less what the first of it must have got; and what waits in the router's queue for the worker.",
)
RECENT: Fact[float] = Fact(
    "engine.recent", float, "ms", "Estimated prefill of all tokens that were sent of late and not cached, done or not; after a minute a third of it counts."
)
DECODING: Fact[int] = Fact("engine.decoding", int, "{sequence}", "Requests sent by this process that have had their first token.")
CONTEXT: Fact[int] = Fact("engine.context", int, "{token}", "Prompt and output tokens of all requests in progress.")
GENERATED: Fact[int] = Fact("engine.generated", int, "{token}", "Output tokens so far of all requests in progress.")
STEP_MS: Fact[float] = Fact("engine.step_ms", float, "ms", "Learned: a decode step without sequences.")
PASS_MS: Fact[float] = Fact("engine.pass_ms", float, "ms", "Learned: what a prefill costs, however short.")
PREFILL_MS: Fact[float] = Fact("engine.prefill_ms", float, "ms/{token}", "Learned: prefill of one token that is not cached.")
ATTENTION_MS: Fact[float] = Fact("engine.attention_ms", float, "ms", "Learned: one prefilled token looking back on one token of context.")
DECODE_MS: Fact[float] = Fact("engine.decode_ms", float, "ms/{token}", "Learned: what one token of context adds to a decode step.")
SEQUENCE_MS: Fact[float] = Fact("engine.sequence_ms", float, "ms/{sequence}", "Learned: what one more sequence adds to a decode step.")
OUTPUT_TOKENS: Fact[float] = Fact("engine.output_tokens", float, "{token}", "Learned: mean length of an answer.")
SAMPLES: Fact[int] = Fact("engine.samples", int, "{sample}", "Prefills from which the worker's figures were learned; 0 while they are defaults.")
