"""llama.cpp's own server inside this process: runs on slots, each on a thread, whose steps arrive on the event loop.

No HTTP is involved. `handle_completions` blocks its thread and calls back once a token; the callback's answer `True`
cancels the run. Callbacks only decode and append; the loop is woken once for all that arrived since its last turn.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import msgspec
import xllamacpp

from dynamo_core.errors import ConfigError, DynamoError, EngineFailed, Problem, PromptTooLong, RequestError

_xllamacpp: Any = xllamacpp
"""Without types of its own."""

# ------------------------------------------------------------------ what llama.cpp says, as far as we read it


class Candidate(msgspec.Struct, gc=False):
    id: int
    logprob: float


class Position(msgspec.Struct, gc=False):
    id: int
    logprob: float
    top_logprobs: list[Candidate] = []


class _Logprobs(msgspec.Struct):
    content: list[Position] = []


class _Choice(msgspec.Struct):
    text: str = ""
    logprobs: _Logprobs | None = None


class _Verbose(msgspec.Struct):
    tokens: list[int] = []
    tokens_predicted: int = 0
    stop_type: str = ""


class _Progress(msgspec.Struct):
    cache: int = 0
    processed: int = 0


class _Error(msgspec.Struct):
    message: str = ""
    code: int = 500
    type: str = ""


class _Message(msgspec.Struct):
    choices: list[_Choice] = []
    verbose: _Verbose = msgspec.field(default_factory=_Verbose, name="__verbose")
    prompt_progress: _Progress | None = None
    error: _Error | None = None


FIELDS = ("tokens", "tokens_predicted", "stop_type")
"""Of the last message; without a list it would repeat the prompt."""


class Step(msgspec.Struct, gc=False):
    """One message of a run."""

    text: str = ""
    tokens: list[int] = []
    predicted: int = 0
    """Tokens that the run has made so far, whether or not it named them."""
    ended: str = ""
    """`eos` or `limit` in the last message."""
    positions: list[Position] = []
    cached: int | None = None
    """Of a progress message: prompt tokens taken from the slot's cache."""
    processed: int = 0
    error: DynamoError | None = None


_decoder = msgspec.json.Decoder(_Message)


def read_step(raw: bytes) -> Step:
    message = _decoder.decode(raw)
    if message.error is not None:
        return Step(error=_error(message.error))
    if message.prompt_progress is not None:
        return Step(cached=message.prompt_progress.cache, processed=message.prompt_progress.processed)
    choice, verbose = message.choices[0], message.verbose
    return Step(choice.text, verbose.tokens, verbose.tokens_predicted, verbose.stop_type, choice.logprobs.content if choice.logprobs else [])


def _error(error: _Error) -> DynamoError:
    if error.type == "exceed_context_size_error":
        return PromptTooLong(error.message, param="prompt")
    if 400 <= error.code < 500:
        return RequestError(error.message)
    return EngineFailed(f"llama.cpp: {error.message}")


# ------------------------------------------------------------------ one run


class Run:
    """One completion on one slot, read on the event loop. Whoever stops reading early must `close`."""

    __slots__ = ("_failure", "_finished", "_steps", "_stop", "_waiter")

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._waiter: asyncio.Future[None] | None = None
        self._finished = False
        self._stop = False
        self._failure: DynamoError | None = None

    async def read(self) -> list[Step]:
        """Everything that has arrived, at least one step; empty at the end. :raises DynamoError: the run failed."""
        while not self._steps and not self._finished and self._failure is None:
            await self._wait()
        if self._failure is not None:
            raise self._failure
        steps, self._steps = self._steps, []
        for step in steps:
            if step.error is not None:
                raise step.error
        return steps

    async def close(self) -> None:
        """Cancel what is left and wait until the slot is free, which takes at most one step."""
        self._stop = True
        while not self._finished:
            await self._wait()

    def fail(self, error: DynamoError) -> None:
        """Cancel the run and let its reader know why."""
        self._stop = True
        self._failure = error
        self._wake()

    def deliver(self, step: Step | None) -> None:
        """On the loop: a step has arrived, or (`None`) the thread is done."""
        if step is None:
            self._finished = True
        else:
            self._steps.append(step)
        self._wake()

    @property
    def stopping(self) -> bool:
        return self._stop

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


# ------------------------------------------------------------------ the server


@attrs.frozen
class Settings:
    path: Path
    slots: int
    context: int
    """Tokens of one slot, prompt plus output."""
    threads: int
    batch: int
    """Prompt tokens in one step."""


class Native:
    """The loaded model. Made and closed off the loop (both block); used on the loop that it was given."""

    def __init__(self, settings: Settings, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._arrived: deque[tuple[Run, Step | None]] = deque()
        self._wake_pending = False
        self._runs: set[Run] = set()
        self._stepped = asyncio.Event()
        self._closed: DynamoError | None = None
        self._threads = ThreadPoolExecutor(settings.slots, thread_name_prefix="llamacpp")
        try:
            self._server: Any = _xllamacpp.Server(_parameters(settings))
        except RuntimeError as e:
            self._threads.shutdown()
            remedy = "llama.cpp's own log says more: start the worker with log level `debug`"
            raise ConfigError(Problem(f"llama.cpp cannot load {settings.path}: {e}", remedy=remedy)) from e

    def start(self, slot: int, body: Mapping[str, Any]) -> Run:
        """Begin a completion on a slot that nobody else uses."""
        if self._closed is not None:
            raise self._closed
        run = Run()
        self._runs.add(run)
        request = msgspec.json.encode({**body, "id_slot": slot, "cache_prompt": body.get("cache_prompt", True), "verbose": True,
                                       "return_tokens": True, "return_progress": True, "response_fields": FIELDS})  # fmt: skip
        self._threads.submit(self._work, run, request)
        return run

    async def next_step(self) -> None:
        """Wait until any run makes progress."""
        self._stepped.clear()
        await self._stepped.wait()

    def fail(self, error: DynamoError) -> None:
        """End every run with this error, and start no more."""
        self._closed = error
        for run in self._runs:
            run.fail(error)

    def close(self) -> None:
        """Free the model, once every thread is back: llama.cpp aborts the process when it is freed under a reader."""
        self._threads.shutdown(wait=True)
        self._server = None

    @property
    def address(self) -> str:
        return self._server.listening_address

    def _work(self, run: Run, request: bytes) -> None:
        def on_message(raw: bytes) -> bool:
            if run.stopping:
                return True
            try:
                return self._arrive(run, read_step(raw))
            except Exception as e:  # whatever leaves a callback is lost
                return self._arrive(run, Step(error=EngineFailed(f"llama.cpp sent what cannot be read: {e}"))) or True

        try:
            if not run.stopping:
                self._server.handle_completions(request, on_message)
        finally:
            self._arrive(run, None)

    def _arrive(self, run: Run, step: Step | None) -> bool:
        """Hand over from a thread; `True` when the loop is gone."""
        self._arrived.append((run, step))
        if not self._wake_pending:  # a race wakes the loop twice, which does no harm
            self._wake_pending = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                return True
        return False

    def _deliver(self) -> None:
        self._wake_pending = False
        self._stepped.set()
        while self._arrived:
            run, step = self._arrived.popleft()
            if step is None:
                self._runs.discard(run)
            run.deliver(step)


def _parameters(settings: Settings) -> Any:
    p: Any = _xllamacpp.CommonParams()
    p.model.path = str(settings.path)
    p.n_parallel = settings.slots
    # llama.cpp ends a choice a little before its own limit; ours is the one that counts, so leave it some room
    p.n_ctx = settings.slots * -(-(settings.context + 8) // 256) * 256
    p.n_batch = p.n_ubatch = settings.batch
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = settings.threads
    p.cache_ram_mib = 0  # a second cache in RAM would make what a slot holds unknown
    p.cache_idle_slots = False
    p.fit_params = False
    p.ctx_shift = False
    p.endpoint_slots = False
    p.ui = False
    # its HTTP server cannot be left out: keep it on loopback, on any port, behind a key that nobody knows
    p.hostnames = ["127.0.0.1"]
    p.port = 0
    p.n_threads_http = 1
    p.api_keys = [secrets.token_urlsafe(32)]
    p.verbosity = 4 if logging.getLogger(__name__).isEnabledFor(logging.DEBUG) else 0
    return p
