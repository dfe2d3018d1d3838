from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
from cyclopts import Parameter
from rich.text import Text

from dynamo_core.cli.local_stack import LocalStack
from dynamo_core.cli.options import Overrides
from dynamo_core.cli.screen import Screen
from dynamo_core.config import load_with_plugins
from dynamo_core.config.schema import Config
from dynamo_core.errors import Unavailable
from dynamo_core.plugins import Plugins

QUESTIONS = ("What is 2 + 2?", "Write one sentence about the sea.", "Name three kinds of fruit.")


def demo(
    file: Annotated[Path, Parameter(name="FILE", help="The stack to show.")] = Path("samples/quickstart.toml"), /, *,
    max_tokens: Annotated[int, Parameter(help="Of each answer.")] = 64,
    timeout: Annotated[float, Parameter(help="Seconds to wait until everything is ready.")] = 600.0,
    verbose: Annotated[bool, Parameter(negative=(), help="Show the log lines of the roles.")] = False,
    overrides: Overrides = (),
) -> int:
    """Start a stack, ask it real questions, show how fast it answers and why each request went where it went.

    On a terminal it then keeps serving until Ctrl-C; otherwise it ends by itself.
    """
    from dynamo_core.runtime.process import run_role

    config, plugins = load_with_plugins(file, overrides=overrides)
    screen = Screen(sys.stdout, verbose=verbose)
    return run_role(lambda stop: _demo(file, overrides, config, plugins, screen, verbose, max_tokens, timeout, stop))


async def _demo(file: Path, overrides: tuple[str, ...], config: Config, plugins: Plugins, screen: Screen, verbose: bool, max_tokens: int, timeout: float,
                stop: asyncio.Event) -> int:
    engines = ", ".join(f"{worker.count} x {worker.engine.name}" for worker in config.workers)
    screen.say(f"starting {file}: a frontend and {engines}")
    async with LocalStack.open(file, overrides, config, plugins, screen.line) as stack:
        stopping = asyncio.create_task(stop.wait())
        showing = asyncio.create_task(_show(stack, screen, max_tokens, timeout))
        await asyncio.wait((stopping, showing), return_when=asyncio.FIRST_COMPLETED)
        if showing.done():
            if showing.exception() is not None and not verbose:
                screen.say_tail()
            url = showing.result()
            if sys.stdout.isatty():
                screen.say(f"\nserving until Ctrl-C:\n  {url}/v1/chat/completions\n  {url}/v1/models   {url}/metrics   {url}/debug/fleet\n"
                           f"  dynamo chat --url {url}")
                await stopping
        for task in (stopping, showing):
            task.cancel()
        await asyncio.gather(stopping, showing, return_exceptions=True)
        screen.say("stopping")
    screen.say("stopped")
    return 0


async def _show(stack: LocalStack, screen: Screen, max_tokens: int, timeout: float) -> str:
    url = await stack.wait_ready(screen.progress, timeout)
    try:
        await _talk(stack, screen, url, max_tokens)
    except httpx.HTTPError as e:
        raise Unavailable(f"the frontend at {url} does not answer: {type(e).__name__} {e}".rstrip()) from e
    return url


async def _talk(stack: LocalStack, screen: Screen, url: str, max_tokens: int) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        screen.say(f"{stack.wanted} workers serve {model} at {url}\n")
        decision = ""
        for question in QUESTIONS:
            decision = await _ask(client, screen, model, question, max_tokens)
        screen.say(f"\n$ dynamo explain {decision}")
        answer = await client.get(f"/debug/decisions/{decision}")
        answer.raise_for_status()
        screen.say(answer.json()["text"])


async def _ask(client: httpx.AsyncClient, screen: Screen, model: str, question: str, max_tokens: int) -> str:
    """Stream one answer to the screen. Returns the id of its routing decision."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}
    console = screen.console
    console.print(Text(f"> {question}", style="bold"))
    started, first, usage = time.perf_counter(), 0.0, dict[str, Any]()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise Unavailable(f"the frontend answered {response.status_code}: {response.text}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = msgspec.json.decode(line[6:])
            if "error" in event:
                raise Unavailable(f"the stream broke: {event['error']['message']}")
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    first = first or time.perf_counter()
                    console.print(Text(text), end="")
    seconds = time.perf_counter() - first
    tokens = usage["completion_tokens"]
    rate = f", {(tokens - 1) / seconds:.0f} tokens/s" if tokens > 1 and seconds > 0 else ""
    console.print(Text(f"\n  TTFT {(first - started) * 1e3:.0f} ms, {tokens} tokens{rate}\n", style="dim"))
    return response.headers["x-dynamo-decision"].rpartition(",")[2]  # the last one: who generated
