# ruff: noqa: T201
from __future__ import annotations

import asyncio
import sys
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dynamo_core.cli.options import ConfigFile, Overrides
from dynamo_core.config import load_with_plugins
from dynamo_core.errors import ConfigError, Problem
from dynamo_planner.profiling.measure import Grid


def profile(
    file: ConfigFile = None, /, *,
    out: Annotated[Path, Parameter(help="The file to write.")] = Path("profile.json"),
    url: Annotated[str | None, Parameter(help="Measure whatever answers OpenAI's API here, instead of a worker of the fleet.", show_default=False)] = None,
    key: Annotated[str | None, Parameter(help="API key for it, as env:NAME or file:PATH.", show_default=False)] = None,
    model: Annotated[str | None, Parameter(help="Which model. Default: the only one.", show_default=False)] = None,
    inputs: Annotated[str, Parameter(help="Prompt lengths to read alone.")] = ",".join(map(str, Grid().inputs)),
    contexts: Annotated[str, Parameter(help="Sequence lengths to decode.")] = ",".join(map(str, Grid().contexts)),
    concurrency: Annotated[str, Parameter(help="How many to decode together.")] = ",".join(map(str, Grid().concurrencies)),
    output: Annotated[int, Parameter(help="Tokens that each generates.")] = Grid().output,
    repeat: Annotated[int, Parameter(help="Times that each prompt is read.")] = Grid().repeat,
    overrides: Overrides = (),
) -> int:
    """Measure what one worker can do, alone and with nobody else asking, and write it down for the planner."""
    from dynamo_planner.performance.profile import Profile, write
    from dynamo_planner.profiling.measure import measure
    from dynamo_planner.profiling.targets import Target, url_target, worker_target

    grid = Grid(_numbers("--inputs", inputs), _numbers("--contexts", contexts), _numbers("--concurrency", concurrency), max(8, output), max(1, repeat))
    chosen: AbstractAsyncContextManager[Target]
    if url is not None:
        chosen = url_target(url, model, _secret(key))
    else:
        config, plugins = load_with_plugins(file, overrides=overrides)
        chosen = worker_target(config, plugins, model, wait=15.0)

    async def body() -> Profile:
        async with chosen as target:
            prefill, decode = await measure(target, grid, lambda line: print(line, file=sys.stderr, flush=True))
            return Profile(model=target.name, engine=target.engine, made=time.strftime("%Y-%m-%d"), prefill=prefill, decode=decode,
                           max_sequences=target.max_sequences, kv_tokens=target.kv_tokens)

    found = asyncio.run(body())
    write(found, out)
    print(f"{out}: {len(found.prefill)} prompt lengths, {len(found.decode)} points of decoding; see them: dynamo profile plot {out}")
    return 0


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        numbers = ()
    if not numbers or numbers[0] < 1:
        raise ConfigError(Problem(f"{text!r} is not a list of whole numbers above 0", option, remedy=f"write {option} 128,1024"))
    return numbers


def _secret(reference: str | None) -> str | None:
    import attrs

    from dynamo_core.config import Secret, structure

    if reference is None:
        return None
    holder = attrs.make_class("Key", {"key": attrs.field(type=Secret)}, frozen=True)
    return structure(holder, {"key": reference}, where="--key").key
