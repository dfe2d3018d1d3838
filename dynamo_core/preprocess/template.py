"""Chat templates: messages in, prompt text out, byte for byte as `transformers` renders them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes

from dynamo_core.errors import RequestError
from dynamo_core.preprocess.sandbox import SANDBOX, bounded

_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """One compiled template. Safe to render from several threads."""

    def __init__(self, source: str) -> None:
        """:raises RequestError: this is no Jinja template."""
        self.source = source
        try:
            self._template = SANDBOX.from_string(source)
            self._template.globals = dict(self._template.globals)  # Jinja's is a chain of maps, which each rendering would walk
            self.takes_parts = _iterates_content(SANDBOX.parse(source))
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
        try:
            with bounded():
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


def _iterates_content(tree: nodes.Template) -> bool:
    """Whether it has a loop over a message's content, which tells that content may be a list of parts."""
    known: set[str] = {"content"}

    def is_content(node: nodes.Node | None) -> bool:
        while isinstance(node, nodes.Filter):
            node = node.node
        if isinstance(node, nodes.Name):
            return node.name in known
        if isinstance(node, nodes.Getitem):
            return _says_content(node.arg)
        if isinstance(node, nodes.Call):  # message.get("content")
            return isinstance(node.node, nodes.Getattr) and node.node.attr == "get" and bool(node.args) and _says_content(node.args[0])
        return isinstance(node, nodes.Getattr) and node.attr == "content"

    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and is_content(assignment.node):
            known.add(assignment.target.name)
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))


def _says_content(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and node.value == "content"
