"""TOML with line numbers: tomllib reads the values, a second look at the text finds where each of them stands."""

from __future__ import annotations

import re
import tomllib

from dynamo_core.config.tree import Key, Origin, Tree
from dynamo_core.errors import ConfigError, Problem

_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_SCALAR = re.compile(r"[^,\]}\n#]+")
_STRINGS = (
    re.compile(r'"""(?:[^\\"]|\\.|"(?!""))*"{3,5}', re.DOTALL),
    re.compile(r"'''(?:[^']|'(?!''))*'{3,5}", re.DOTALL),
    re.compile(r'"(?:[^\\"\n]|\\.)*"'),
    re.compile(r"'[^'\n]*'"),
)


def read_toml(text: str, name: str) -> Tree:
    """:raises ConfigError: a syntax error, with line and column."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    lines = text.split("\n")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        message, place = str(e), _PLACE.search(str(e))
        line = int(place[1]) if place and place[1] else max(1, len(text.rstrip().split("\n")))
        column = f", column {place[2]}" if place and place[2] else ", at the end of the file"
        what = f"this is not TOML: {message[: place.start()] if place else message}{column}"
        raise ConfigError(Problem(what, f"{name}:{line}", lines[line - 1] if line <= len(lines) else "")) from None
    except RecursionError:
        raise ConfigError(Problem("this is nested too deeply to be a configuration", name)) from None
    places = _Places(text).read()
    return Tree(data, {at: Origin("file", f"{name}:{line}", lines[line - 1]) for at, line in places.items()})


class _Places:
    """Finds the line of every key, table and element. The text is known to be valid TOML, so it only looks for the ends of things."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Key, int] = {(): 1}
        self.counts: dict[Key, int] = {}
        """Elements so far of each array of tables."""
        self._counted = (0, 1)

    def read(self) -> dict[Key, int]:
        table: Key = ()
        while True:
            self.skip(_BLANK)
            if self.at >= len(self.text):
                return self.lines
            line = self.line()
            if self.text.startswith("[[", self.at):
                self.at += 2
                table = self.resolve(self.dotted_key())
                index = self.counts.get(table, 0)
                self.counts[table] = index + 1
                self.lines.setdefault(table, line)
                table = (*table, index)
                self.mark(table, line)
                self.at += 2
            elif self.text[self.at] == "[":
                self.at += 1
                key = self.dotted_key()
                table = self.resolve(key)
                self.mark(table, line)
                self.at += 1
            else:
                self.pair(table)

    def resolve(self, key: Key) -> Key:
        """The place that a header names: `[workers.engine]` is in the latest element of `[[workers]]`."""
        place: Key = ()
        for i, part in enumerate(key):
            place = (*place, part)
            if i < len(key) - 1 and place in self.counts:
                place = (*place, self.counts[place] - 1)
        return place

    def mark(self, place: Key, line: int) -> None:
        for length in range(1, len(place)):
            self.lines.setdefault(place[:length], line)
        self.lines[place] = line

    def pair(self, table: Key) -> None:
        line = self.line()
        place = (*table, *self.dotted_key())
        self.mark(place, line)
        self.at += 1  # the equals sign
        self.skip(_SPACE)
        self.value(place)

    def value(self, place: Key) -> None:
        opening = self.text[self.at]
        if opening == "[":
            self.at += 1
            for index in range(len(self.text)):
                self.skip(_BLANK)
                if self.text[self.at] == "]":
                    break
                self.lines[(*place, index)] = self.line()
                self.value((*place, index))
                self.skip_comma()
            self.at += 1
        elif opening == "{":
            self.at += 1
            while True:
                self.skip(_BLANK)
                if self.text[self.at] == "}":
                    break
                self.pair(place)
                self.skip_comma()
            self.at += 1
        elif opening in "\"'":
            self.string()
        else:
            self.skip(_SCALAR)

    def skip_comma(self) -> None:
        self.skip(_BLANK)
        if self.text[self.at] == ",":
            self.at += 1

    def dotted_key(self) -> Key:
        """Leaves the position at what follows the key."""
        parts: list[str] = []
        while True:
            self.skip(_SPACE)
            start = self.at
            if self.text[self.at] in "\"'":
                self.string()
                parts.append(next(iter(tomllib.loads(self.text[start : self.at] + " = 0"))))
            else:
                self.skip(_BARE)
                parts.append(self.text[start : self.at])
            self.skip(_SPACE)
            if self.text[self.at] != ".":
                return tuple(parts)
            self.at += 1

    def string(self) -> None:
        for pattern in _STRINGS:
            if (found := pattern.match(self.text, self.at)) is not None:
                self.at = found.end()
                return

    def skip(self, pattern: re.Pattern[str]) -> None:
        if (found := pattern.match(self.text, self.at)) is not None:
            self.at = found.end()

    def line(self) -> int:
        at, line = self._counted
        line += self.text.count("\n", at, self.at)
        self._counted = (self.at, line)
        return line
