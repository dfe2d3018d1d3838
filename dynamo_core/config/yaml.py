"""YAML with line numbers, for those who keep their configuration in a ConfigMap."""

from __future__ import annotations

from typing import Any

from dynamo_core.config.tree import Key, Origin, Tree
from dynamo_core.errors import ConfigError, Problem

_LIMIT = 100_000
"""Values in one file, aliases counted each time: a few lines of aliases of aliases would otherwise fill the memory."""


def read_yaml(text: str, name: str) -> Tree:
    """:raises ConfigError: a syntax error with line and column, or what YAML allows and a configuration does not."""
    from ruamel.yaml import YAML  # imported here: most configurations are TOML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    lines = text.splitlines() or [""]
    yaml = YAML(typ="safe", pure=True)

    def problem(what: str, line: int) -> ConfigError:
        return ConfigError(Problem(what, f"{name}:{line}", lines[line - 1] if line <= len(lines) else ""))

    try:
        root: Any = yaml.compose(text)
        if root is None:
            return Tree({}, {(): Origin("file", f"{name}:1")})
        places: dict[Key, int] = {}
        _walk(root, (), places, set(), problem)
        data: Any = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise problem(f"this is not YAML: {e.problem or e.context}, column {column}", line) from None
    except (YAMLError, ValueError) as e:
        raise ConfigError(Problem(f"this is not YAML: {str(e).splitlines()[0] if str(e) else type(e).__name__}", name)) from None
    except RecursionError:
        raise ConfigError(Problem("this is nested too deeply to be a configuration", name)) from None
    if not isinstance(data, dict):
        raise problem("the configuration must be a table of settings", 1)
    return Tree(data, {at: Origin("file", f"{name}:{line}", lines[line - 1] if line <= len(lines) else "") for at, line in places.items()})


def _walk(node: Any, at: Key, places: dict[Key, int], above: set[int], problem: Any) -> None:
    from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

    line = node.start_mark.line + 1
    places.setdefault(at, line)
    if id(node) in above:
        raise problem("this alias contains itself", line)
    if len(places) > _LIMIT:
        raise problem(f"more than {_LIMIT} values, with each alias counted where it is used", line)
    above.add(id(node))
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if not isinstance(key, ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                what = f"the key {key.value!r} must be a string, in quotes" if isinstance(key, ScalarNode) else "keys must be strings"
                raise problem(what, key.start_mark.line + 1)
            places[(*at, key.value)] = key.start_mark.line + 1
            _walk(value, (*at, key.value), places, above, problem)
    elif isinstance(node, SequenceNode):
        for i, item in enumerate(node.value):
            _walk(item, (*at, i), places, above, problem)
    above.discard(id(node))
