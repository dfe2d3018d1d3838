"""What there is to say about each setting, read from the schema itself: its type, default, limits and the string below it."""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
from attrs import validators as v

from dynamo_core.config.schema import Config, Router, Secret, Use

_OPTIONAL: type = type(v.optional(v.gt(0)))


@attrs.frozen
class Field:
    key: str
    type: Any
    """`T | None` as `T`."""
    optional: bool
    default: Any
    """`attrs.NOTHING` when the setting is required."""
    doc: str
    kind: str
    """The kind of component to choose, or empty."""
    weighted: bool
    duration: bool
    limits: tuple[Any, ...]
    """Validators."""


def fields(cls: type[Any]) -> Iterator[Field]:
    hints, docs = typing.get_type_hints(cls), _docs(cls)
    for a in attrs.fields(cls):
        if not a.init:
            continue
        wanted = hints.get(a.name, Any)
        args = typing.get_args(wanted)
        optional = type(None) in args and typing.get_origin(wanted) is not tuple
        if optional:
            wanted = next(arg for arg in args if arg is not type(None))
        default = a.default.factory() if isinstance(a.default, attrs.Factory) else a.default  # pyright: ignore
        yield Field(
            key=a.alias,
            type=wanted,
            optional=optional,
            default=default,
            doc=docs.get(a.name, ""),
            kind=str(a.metadata.get("kind", "")),
            weighted="weight" in a.metadata.get("reserved", ()),
            duration=bool(a.metadata.get("duration")),
            limits=tuple(_flat(a.validator)),
        )


def tables(cls: type[Any] = Config, at: str = "") -> Iterator[tuple[str, type[Any], list[Field]]]:
    """Every table of the configuration, outermost first. A role's router table is the router's own."""
    listed = list(fields(cls))
    yield at, cls, listed
    for field in listed:
        inner, repeated = element(field.type)
        if attrs.has(inner) and inner is not Use and not (cls is Router and inner is Router):
            name = f"{at}.{field.key}" if at else field.key
            yield from tables(inner, f"[{name}]" if repeated else name)


def element(wanted: Any) -> tuple[Any, bool]:
    """The type of an element and `True`, for arrays; the type itself and `False` otherwise."""
    if typing.get_origin(wanted) in (tuple, list):
        return typing.get_args(wanted)[0], True
    return wanted, False


def type_name(field: Field) -> str:
    inner, repeated = element(field.type)
    if inner is Use:
        name = f"{field.kind.replace('_', ' ')}"
    elif attrs.has(inner):
        name = "table"
    elif field.duration:
        name = "seconds"
    else:
        name = {bool: "true or false", int: "whole number", float: "number", str: "string", Path: "path", Secret: "secret"}.get(inner, str(inner))
    return f"array of {name.removesuffix('s')}s" if repeated else name


def limit_text(field: Field) -> str:
    said: list[str] = []
    for limit in field.limits:
        if hasattr(limit, "compare_op"):
            said.append(f"{limit.compare_op} {limit.bound}")
        elif hasattr(limit, "options"):
            said.append("one of " + ", ".join(f"`{option}`" for option in limit.options))
        elif hasattr(limit, "pattern"):
            said.append(f"matches `{limit.pattern.pattern}`")
    return ", ".join(said)


def _flat(validator: Any) -> Iterator[Any]:
    if validator is None:
        return
    inner = getattr(validator, "_validators", None) or ([validator.validator] if isinstance(validator, _OPTIONAL) else None)
    if inner is None:
        yield validator
    else:
        for one in inner:
            yield from _flat(one)


def _docs(cls: type[Any]) -> dict[str, str]:
    """The string that follows a field, by field."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[field.target.id] = inspect.cleandoc(str(below.value.value))
    return docs
