"""The `dynamo` command: finds the command that was asked for, imports that one, and turns errors into sentences.

Importing cyclopts costs more than everything else at start-up (120 ms of CPU against 60), so it is used to run one command and not
to list them: `dynamo --help` reads the registrations of kind `cli` alone, those of plugins included.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from dynamo_core.errors import ConfigError, DynamoError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 it failed, 2 the operator's mistake, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = _take(words, "--debug")
    try:
        from dynamo_core.cli.commands import dispatch

        code = dispatch(words)
        sys.stdout.flush()
        return code
    except ConfigError as e:
        return _fail(e, 2, debug)
    except DynamoError as e:
        return _fail(e, 1, debug)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere, quietly
        return 141


def _take(words: list[str], flag: str) -> bool:
    """Remove a flag that every command has; what stands after `--` is not ours."""
    ours = words[: words.index("--")] if "--" in words else words
    if flag not in ours:
        return False
    words.remove(flag)
    return True


def _fail(error: DynamoError, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    else:
        print(error if isinstance(error, ConfigError) else f"dynamo: {error}", file=sys.stderr)
    return code
