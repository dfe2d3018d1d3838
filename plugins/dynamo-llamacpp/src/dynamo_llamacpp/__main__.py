"""`python -m dynamo_llamacpp fetch [MODEL]`: get a model before it is needed, and print where it lies."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dynamo_core.engines import EngineContext
from dynamo_core.errors import ConfigError
from dynamo_llamacpp.resolve import BUNDLED, resolve


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dynamo_llamacpp", description="Models of the llama.cpp engine.")
    commands = parser.add_subparsers(required=True)
    fetch = commands.add_parser("fetch", help="get a model and print the path of its file")
    fetch.add_argument("model", nargs="?", default=BUNDLED, help=f"as in the engine's option `model` (default: {BUNDLED})")
    fetch.add_argument("--cache-dir", type=Path, default=EngineContext().cache_dir)
    options = parser.parse_args(arguments)
    try:
        print(resolve(options.model, options.cache_dir, _show))  # noqa: T201
    except ConfigError as e:
        print(e, file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _show(phase: str, fraction: float | None) -> None:
    if sys.stderr.isatty():
        print(f"\r{phase} {'' if fraction is None else f'{fraction:.0%}'}\033[K", end="\r", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
