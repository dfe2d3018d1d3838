"""The reference of all settings, for people (Markdown) and for editors (JSON schema), written from the schema."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from dynamo_core.config.emit import value_text
from dynamo_core.config.fields import Field, element, fields, limit_text, tables, type_name
from dynamo_core.config.layers import VARIABLES
from dynamo_core.config.schema import Config, Secret, Use

_HEAD = """\
# Configuration

<!-- Written by `dynamo config reference`; change the schema, not this page. -->

One file, TOML or YAML, configures every role. A value comes from the first of these that has one:

1. `--set router.temperature=0.2` on the command line (`--set workers.0.count=4` for elements of arrays),
2. the environment: `DYNAMO__ROUTER__TEMPERATURE=0.2`, with two underscores between the levels,
3. the file,
4. the default.

Nothing is guessed: an unknown key, a value of the wrong type, an environment variable that matches no setting and two settings that
contradict each other are errors, all reported at once. `dynamo check FILE` reports them without starting anything;
`dynamo config show --origin FILE` shows where each value comes from.

A setting that chooses a component is its name (`discovery = "file"`) or a table with `use` and the component's own options
(`discovery = { use = "file", path = "/shared" }`). `dynamo plugins` lists what there is. Seconds are numbers, or strings such as `"500ms"` and `"10m"`.
A secret is written as `"file:/path"` or `"env:NAME"`; it never stands in the file itself, and is never printed.

`dynamo frontend` and `dynamo worker` need the plugins and the secrets of their own part alone, so that one file serves machines that have different ones.
"""


def to_markdown() -> str:
    parts = [_HEAD]
    for at, cls, listed in tables():
        name = at.strip("[]")
        parts.append(f"## `[[{name}]]`\n" if at.startswith("[") else f"## `[{name}]`\n" if name else "## Top level\n")
        doc = inspect.cleandoc(cls.__doc__ or "")
        if doc and not doc.startswith("Method generated"):
            parts.append(doc + "\n")
        parts.append("| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(_row(field) for field in listed) + "\n")
    parts.append("## Environment variables that are not settings\n")
    parts.append("| variable | meaning |\n|---|---|\n" + "\n".join(f"| `{name}` | {what} |" for name, what in VARIABLES.items()) + "\n")
    return "\n".join(parts)


def _row(field: Field) -> str:
    meaning = " ".join(field.doc.split())
    limit = limit_text(field)
    about = f"{meaning} ({limit})" if meaning and limit else meaning or (limit and limit[0].upper() + limit[1:])
    return f"| `{field.key}` | {type_name(field)} | {_default(field)} | {about} |".replace("  ", " ")


def _default(field: Field) -> str:
    default = field.default
    if default is attrs.NOTHING:
        return "required"
    if isinstance(default, Use):
        return f'`"{default.name}"`'
    if default is None or attrs.has(type(default)):
        return ""
    return f"`{value_text(default)}`"


def to_json_schema(names: Mapping[str, list[str]] | None = None) -> dict[str, Any]:
    """`names` are the installed components by kind, which editors then offer."""
    definitions: dict[str, Any] = {}
    _object(Config, definitions, names or {})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Dynamo", "$ref": "#/$defs/Config", "$defs": definitions}


def _object(cls: type[Any], definitions: dict[str, Any], names: Mapping[str, list[str]]) -> dict[str, str]:
    if cls.__name__ not in definitions:
        definition: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": {}}
        definitions[cls.__name__] = definition
        listed = list(fields(cls))
        for field in listed:
            definition["properties"][field.key] = _schema(field, definitions, names)
        if required := [field.key for field in listed if field.default is attrs.NOTHING]:
            definition["required"] = required
    return {"$ref": f"#/$defs/{cls.__name__}"}


def _schema(field: Field, definitions: dict[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    inner, repeated = element(field.type)
    schema: dict[str, Any]
    if inner is Use:
        name = {"type": "string", "examples": names.get(field.kind, [])}
        properties = {"use": name, **({"weight": {"type": "number"}} if field.weighted else {})}
        schema = {"anyOf": [name, {"type": "object", "properties": properties}]}
    elif attrs.has(inner):
        schema = dict(_object(inner, definitions, names))
    elif field.duration:
        schema = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^\d+(\.\d+)?\s*(ms|s|m|h|d)$"}]}
    else:
        schema = {"type": {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", Secret: "string"}[inner]}
    for limit in field.limits:
        schema |= _limit(limit)
    if repeated:
        schema = {"type": "array", "items": schema}
    if field.doc:
        schema["description"] = field.doc
    return schema


def _limit(limit: Any) -> dict[str, Any]:
    if hasattr(limit, "compare_op"):
        return {{">=": "minimum", ">": "exclusiveMinimum", "<=": "maximum", "<": "exclusiveMaximum"}[limit.compare_op]: limit.bound}
    if hasattr(limit, "options"):
        return {"enum": list(limit.options)}
    if hasattr(limit, "pattern"):
        return {"pattern": f"^(?:{limit.pattern.pattern})$"}
    return {}


