"""Chat templates, as `transformers` renders them, in a sandbox.

What is bounded: the size of the prompt, and so of every text that the template builds on the way; the number of loop rounds and
calls; the length of `range`. What is not: the memory of one single operation (a format width, one join) before its result
is looked at, and the time of one single filter over data that the request brought along.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dynamo_core.errors import RequestError

MAX_CHARACTERS = 32 * 2**20
"""Of one prompt, and of any text that a template builds."""
MAX_STEPS = 2_000_000
"""Loop rounds and calls in one rendering: a few seconds. A conversation of a thousand messages takes about ten thousand."""

_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """One compiled template. Safe to render from several threads."""

    def __init__(self, source: str) -> None:
        """:raises RequestError: this is no Jinja template."""
        self.source = source
        try:
            self._template = _ENVIRONMENT.from_string(source)
            self.takes_parts = _iterates_content(_ENVIRONMENT.parse(source))
            """The template itself handles message content that is a list of parts."""
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template cannot be compiled: {error}", param="chat_template") from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None,
               add_generation_prompt: bool = True, continue_final_message: bool = False, variables: Mapping[str, Any] | None = None) -> str:
        """:raises RequestError: the template refuses these messages, breaks on them or goes on for too long."""
        if not messages:
            raise RequestError("there are no messages", param="messages")
        if continue_final_message and add_generation_prompt:
            raise RequestError("continue_final_message and add_generation_prompt exclude each other: the prompt ends either inside "
                               "the last message or with the start of a new one", param="continue_final_message")
        chat = [self._message(message) for message in messages]
        final = self._mark_end(chat[-1]) if continue_final_message else ""
        values = {"tools": None, "documents": None, **(variables or {})}
        if tools is not None:
            values["tools"] = list(tools)
        values.update(messages=chat, add_generation_prompt=add_generation_prompt)
        _work.steps = 0
        try:
            text = self._template.render(values)
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from error
        except RecursionError as error:
            raise RequestError("the chat template calls itself without end", param="messages") from error
        except Exception as error:  # whatever a template does with data of another shape than it expects
            raise RequestError(f"the chat template breaks on these messages: {type(error).__name__}: {error}", param="messages") from error
        return _cut_at_end(text, final) if continue_final_message else text

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """As the template sees it: without nulls, reasoning under each of its names, parts joined where lists are not understood."""
        fields = {key: value for key, value in message.items() if value is not None}
        reasoning = next((fields[name] for name in _REASONING if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        content = fields.get("content")
        if isinstance(content, list) and not self.takes_parts:
            fields["content"] = _joined(content)
        return fields

    def _mark_end(self, message: dict[str, Any]) -> str:
        """Put a mark behind the text of the last message; returns that text."""
        content = message.get("content")
        if content is None or "content" not in self.source:
            raise RequestError("continue_final_message: the last message has no content to continue", param="continue_final_message")
        if isinstance(content, str):
            message["content"] = content + _CONTINUE
            return content
        parts = [dict(part) for part in content]
        for part in reversed(parts):
            if "text" in part:
                text = part["text"]
                part["text"] = text + _CONTINUE
                message["content"] = parts
                return text
        raise RequestError("continue_final_message: the last message has no text to continue", param="continue_final_message")


@lru_cache(maxsize=64)
def compile_template(source: str) -> ChatTemplate:
    """The template compiled, from a small cache. :raises RequestError: this is no Jinja template."""
    return ChatTemplate(source)


def _cut_at_end(text: str, final: str) -> str:
    mark = _CONTINUE.strip()
    if final.strip() not in text or mark not in text:
        raise RequestError("continue_final_message: the chat template changes the last message, so it cannot be continued", param="continue_final_message")
    at = text.rindex(mark)
    if text[at : at + len(_CONTINUE)] == _CONTINUE:
        return text[:at]
    return text[:at].rstrip()  # the template trims messages


def _joined(parts: list[Any]) -> str:
    texts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RequestError(f"this model's chat template takes text only, but a message holds a part of type {kind!r}", param="messages")
    return "\n".join(texts)


# ------------------------------------------------------------------ the sandbox


class _Work(threading.local):
    steps = 0


_work = _Work()
"""Of the rendering that goes on in this thread."""


def _step() -> None:
    _work.steps += 1
    if _work.steps > MAX_STEPS:
        raise jinja2.TemplateRuntimeError(f"it takes more than {MAX_STEPS:,} steps")


def _bounded(value: Any) -> Any:
    if isinstance(value, (str, list, tuple)) and len(value) > MAX_CHARACTERS:
        raise jinja2.TemplateRuntimeError(f"it builds a value of more than {MAX_CHARACTERS:,} characters")
    return value


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _step()
        yield item


def _concat(parts: Iterable[str]) -> str:
    kept: list[str] = []
    size = 0
    for part in parts:
        kept.append(part)
        size += len(part)
        if size > MAX_CHARACTERS:
            raise jinja2.TemplateRuntimeError(f"it writes more than {MAX_CHARACTERS:,} characters")
    return "".join(kept)


class _Bounds(Extension):
    """`{% generation %}` (a mark for training, without effect here)."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    concat = staticmethod(_concat)
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and (isinstance(left, (str, list, tuple)) or isinstance(right, (str, list, tuple))):
            size, count = (len(left), right) if isinstance(right, int) else (len(right), left)
            if isinstance(count, int) and size * count > MAX_CHARACTERS:
                raise jinja2.TemplateRuntimeError(f"it builds a value of more than {MAX_CHARACTERS:,} characters")
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 4096:
            raise jinja2.TemplateRuntimeError("it computes a number of more than 4096 bits")
        elif operator == "%" and isinstance(left, str):
            _check_width(left)
        return _bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _step()
        if isinstance(getattr(obj, "__self__", None), str) and any(isinstance(arg, int) and arg > MAX_CHARACTERS for arg in args):
            raise jinja2.TemplateRuntimeError(f"it builds a value of more than {MAX_CHARACTERS:,} characters")
        return _bounded(super().call(context, obj, *args, **kwargs))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        return tree


def _check_width(form: str) -> None:
    if re.search(r"\d{6}|\*", form):
        raise jinja2.TemplateRuntimeError(f"it formats with a width that is too large: {form!r}")


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _Dict:
    """`dict(...)`, and nothing of `dict` that a template could climb out by."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Bounds, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.filters["_counted"] = _counted
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict())
    return environment


_ENVIRONMENT = _environment()


# ------------------------------------------------------------------ what a template understands


def _iterates_content(tree: nodes.Template) -> bool:
    """Whether it has a loop over a message's content, which tells that content may be a list of parts."""
    known: set[str] = {"content"}

    def is_content(node: nodes.Node | None) -> bool:
        while isinstance(node, nodes.Filter):
            node = node.node
        if isinstance(node, nodes.Name):
            return node.name in known
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Getattr) and node.attr == "content"

    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and is_content(assignment.node):
            known.add(assignment.target.name)
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))
