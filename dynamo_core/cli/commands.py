"""Which commands there are, and how one of them runs."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynamo_core.plugins import Component, Plugins

_OPTIONS = (
    ("-h, --help", "show this, or the help of a command"),
    ("--version", "print the version"),
    ("--debug", "show where an error came from"),
)


def dispatch(words: Sequence[str]) -> int:
    """Run the command that `words` begin with. Returns the exit code."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(Plugins.load().of_kind("cli")))
        return 0
    if words[0] == "--version":
        words = ["version"]
    commands = Plugins.load().of_kind("cli")
    for length in (2, 1):
        if (component := commands.get(" ".join(words[:length]))) is not None and length <= len(words):
            return run(component, words[length:])
    return _no_such(words, commands)


def run(component: Component, arguments: Sequence[str]) -> int:
    """Import the command and call it with its arguments. A command is a typed function; what it returns is the exit code (`None`: 0)."""
    from cyclopts import App, CycloptsError

    function: Callable[..., Any] = component.load()
    app = App(name=f"dynamo {component.name}", version_flags=[], help_format="plaintext", result_action="return_value", suppress_keyboard_interrupt=False)
    app.default(function)
    try:
        result = app(list(arguments), exit_on_error=False, print_error=False)
    except CycloptsError as e:
        print(f"dynamo {component.name}: {e}\n  hint: dynamo {component.name} --help", file=sys.stderr)
        return 2
    return result if isinstance(result, int) else 0


def overview(commands: Mapping[str, Component]) -> str:
    ours = {name: c for name, c in commands.items() if c.plugin.name == "builtin"}
    theirs = {name: c for name, c in commands.items() if name not in ours}
    width = max((len(name) for name in commands), default=0) + 2
    lines = ["Usage: dynamo COMMAND [ARGUMENTS]", "", "Serve large language models on many machines; every part is a plugin.", "", "Commands:"]
    lines += [f"  {name:<{width}}{c.summary}" for name, c in ours.items()]
    if theirs:
        lines += ["", "From plugins:"]
        lines += [f"  {name:<{width}}{c.summary} ({c.plugin})" for name, c in sorted(theirs.items())]
    lines += ["", "Options:"]
    lines += [f"  {name:<{width}}{what}" for name, what in _OPTIONS]
    return "\n".join(lines)


def _no_such(words: Sequence[str], commands: Mapping[str, Component]) -> int:
    if group := {name: c for name, c in commands.items() if name.startswith(f"{words[0]} ")}:
        if len(words) == 1 or words[1] in ("-h", "--help"):
            stream = sys.stdout if len(words) > 1 else sys.stderr
            print("\n".join(f"  dynamo {name:<20}{c.summary}" for name, c in group.items()), file=stream)
            return 0 if len(words) > 1 else 2
        asked = " ".join(words[:2])
        known = list(group)
    else:
        asked = words[0]
        known = ["--help", "--version", "--debug"] if asked.startswith("-") else sorted({name.partition(" ")[0] for name in commands})
    kind = "option" if asked.startswith("-") else "command"
    close = difflib.get_close_matches(asked, known, 1, 0.5)
    hint = f"did you mean `dynamo {close[0]}`?" if close else "`dynamo --help` lists them all"
    print(f"dynamo: there is no {kind} {asked!r}\n  hint: {hint}", file=sys.stderr)
    return 2
