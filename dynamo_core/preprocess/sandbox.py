"""The Jinja environment for chat templates: what `transformers` gives them, and bounds on what they may use up.

Bounded: the prompt, and every text or list that is built on the way (32 Mi characters or entries); the work of one
rendering, counted in loop rounds, calls and characters produced by filters and operators; its time (checked at each of these). Not bounded:
the time and memory of one single operation before its result can be looked at, such as one comparison or slice of a
very long text; these are at most in proportion to the request.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 32 * 2**20
MAX_WORK = 500_000
"""One for each loop round and call, and one for each 100 characters that a filter or operator makes. A conversation
of a thousand messages takes about ten thousand."""
MAX_SECONDS = 5.0
MAX_BITS = 4096
"""Of a number."""


class _Work(threading.local):
    done = 0
    deadline = 0.0


_work = _Work()
"""Of the rendering that goes on in this thread."""


@contextmanager
def bounded() -> Generator[None]:
    """Around one rendering. :raises jinja2.TemplateError: out of it, when the template uses up too much."""
    _work.done, _work.deadline = 0, time.monotonic() + MAX_SECONDS
    yield


def _spend(amount: int) -> None:
    _work.done += amount
    if _work.done > MAX_WORK or (not _work.done & 63 and time.monotonic() > _work.deadline):
        raise jinja2.TemplateRuntimeError("it goes on for too long")


def _too_large() -> jinja2.TemplateError:
    return jinja2.TemplateRuntimeError(f"it builds a value that is too large: at most {MAX_CHARACTERS:,} characters or entries, and numbers of {MAX_BITS} bits")


def _checked(value: Any) -> Any:
    if isinstance(value, (str, list, tuple)):
        size = len(value)
        if size > 100:
            if size > MAX_CHARACTERS:
                raise _too_large()
            _spend(size // 100)
    return value


def _rounds(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _spend(1)
        yield item


def _concat(parts: Iterable[str]) -> str:
    kept: list[str] = []
    size = 0
    for part in parts:
        kept.append(part)
        size += len(part)
        if size > MAX_CHARACTERS:
            raise _too_large()
    return "".join(kept)


class _Sandbox(ImmutableSandboxedEnvironment):
    concat = staticmethod(_concat)
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for items, count in ((left, right), (right, left)):
                if isinstance(items, (str, list, tuple)) and isinstance(count, int) and len(items) * count > MAX_CHARACTERS:
                    raise _too_large()
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_BITS:
            raise _too_large()
        elif operator == "%":
            _check_width(left)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_BITS:
            raise _too_large()
        return _checked(result)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _spend(1)
        if isinstance(getattr(obj, "__self__", None), str) and any(isinstance(arg, int) and arg > MAX_CHARACTERS for arg in args):
            raise _too_large()  # "x".ljust(10 ** 9)
        return _checked(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and re.search(r":[^{}]*(\d{6}|\{)", value.__self__):
            raise _too_large()
        return wrapped

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "_rounds", [], [], None, None, lineno=loop.lineno)
        for joined in list(tree.find_all(nodes.Concat)):
            joined.nodes = [nodes.Filter(nodes.List(joined.nodes, lineno=joined.lineno), "_tilde", [], [], None, None, lineno=joined.lineno)]
        return tree


class _Generation(Extension):
    """`{% generation %}`: marks for training what the model said; nothing to a prompt."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dict:
    """`dict(...)`, and nothing of `dict` that a template could climb out by."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=1)` is allowed
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attributes must not begin with an underscore: {name!r}")


def _check_width(form: Any) -> None:
    if isinstance(form, str) and re.search(r"%[^%a-zA-Z]*(\d{6}|\*)", form):
        raise _too_large()


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    # Jinja's own writes <, > and & as escapes, which models have not seen in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _tilde(parts: list[Any]) -> str:
    return _checked("".join(map(str, parts)))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _limited(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    pads = name in ("center", "indent", "batch", "slice", "wordwrap", "tojson")

    @wraps(apply)  # keeps the marks by which Jinja knows what to pass
    def limited(*args: Any, **kwargs: Any) -> Any:
        if pads and any(isinstance(arg, int) and arg > 100_000 for arg in (*args[1:], *kwargs.values())):
            raise _too_large()
        if name == "format":
            _check_width(args[0])
        return _checked(apply(*args, **kwargs))

    return limited


def _sandbox() -> _Sandbox:
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    sandbox.filters["tojson"] = _tojson
    sandbox.filters = {name: _limited(name, apply) for name, apply in sandbox.filters.items()}
    sandbox.filters["_rounds"] = _rounds
    sandbox.filters["_tilde"] = _tilde
    provided: dict[str, Any] = sandbox.globals
    provided.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace)
    return sandbox


SANDBOX = _sandbox()
