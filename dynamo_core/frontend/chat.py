"""`POST /v1/chat/completions`: messages to a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from dynamo_core.errors import RequestError
from dynamo_core.frontend.answers import ChatAnswer
from dynamo_core.frontend.chunks import ChatChunks
from dynamo_core.frontend.convert import convert, extension
from dynamo_core.frontend.exchange import Exchange
from dynamo_core.frontend.fields import ChatBody, Extension
from dynamo_core.frontend.job import Job
from dynamo_core.frontend.media import MediaFetcher
from dynamo_core.frontend.parse import check_nesting
from dynamo_core.pipeline.contract import Model

_TOOLS = 'tool calling is not supported yet; leave out `tools`, or send `tool_choice`: "none"'


class Chat:
    """The API family of chat completions."""

    name = "chat_completions"
    surface = "chat"
    decoder = msgspec.json.Decoder(ChatBody)

    def __init__(self, fetcher: MediaFetcher | None = None) -> None:
        """:param fetcher: gets the images that messages name; without it they are not taken."""
        self._fetcher = fetcher

    async def prepare(self, body: ChatBody, model: Model, exchange: Exchange, *, direct_routing: bool) -> Job:
        """:raises RequestError: the request cannot be served by this model."""
        ext = extension(body)
        _refuse_unsupported(body)
        logprobs = None
        if body.logprobs:
            logprobs = body.top_logprobs or 0
        elif body.top_logprobs:
            raise RequestError("top_logprobs needs `logprobs`: true", param="top_logprobs")
        limit, limit_name = (body.max_completion_tokens, "max_completion_tokens") if body.max_completion_tokens is not None else (body.max_tokens, "max_tokens")
        if limit == 0:
            raise RequestError(f"{limit_name} must be at least 1", param=limit_name)
        wanted = convert(body, model.card, exchange, max_tokens=limit, logprobs=logprobs, prompt_logprobs=body.prompt_logprobs, direct_routing=direct_routing)
        urls: list[str] = []
        prompt, token_ids = await _prompt(body, ext, model, urls if self._fetcher is not None else None)
        request = wanted.request(exchange.unique_id, model.card, token_ids)
        if (media := await self._media(urls, token_ids, model)) is not None:
            request = msgspec.structs.replace(request, media=media)
        body.messages = []  # a stream may last minutes, and a thousand long conversations are a lot of memory
        return Job(
            id=f"chatcmpl-{exchange.unique_id}",
            body=body,
            model=model,
            requests=[request],
            text=wanted.text,
            prompts=[prompt if "formatted_prompt" in ext.annotations else ""],
            echo=False,
            annotations=ext.annotations,
            dry_run=ext.dry_run,
            chunks=ChatChunks,
            answer=ChatAnswer,
        )


    async def _media(self, urls: list[str], token_ids: list[int], model: Model) -> list[dict[str, Any]] | None:
        """The images, with the prompt tokens that depend on each. :raises RequestError: they are not to be had, or the prompt has other places for them."""
        starts = [0] * len(urls)
        if model.card.image_placeholder:
            mark = await model.preprocessor.encode(model.card.image_placeholder, add_special_tokens=False)
            if len(mark) == 1 and len(starts := [at for at, token in enumerate(token_ids) if token == mark[0]]) != len(urls):
                raise RequestError(f"the prompt has {len(starts)} places for {len(urls)} images; {model.card.image_placeholder!r} may not stand in a text",
                                   param="messages")  # fmt: skip
        if not urls or self._fetcher is None:
            return None
        images = await self._fetcher.images(urls)
        return [{**image, "start": start, "length": len(token_ids) - start} for image, start in zip(images, starts, strict=True)]


async def _prompt(body: ChatBody, ext: Extension, model: Model, urls: list[str] | None) -> tuple[str, list[int]]:
    """The prompt as text (empty when it came as tokens) and as tokens. :param urls: those of images are added; `None` when none are taken."""
    if ext.token_ids is not None:
        return "", ext.token_ids
    if not body.messages:
        raise RequestError("messages must not be empty", param="messages")
    if "media" not in model.card.capabilities:
        urls = None
    messages = [_message(message, index, urls, model.card.image_placeholder or "") for index, message in enumerate(body.messages)]
    if ext.use_raw_prompt:
        text = "".join(message["content"] for message in messages if isinstance(message["content"], str))
        return text, await model.preprocessor.encode(text, add_special_tokens=False)
    if body.add_generation_prompt and body.continue_final_message:
        raise RequestError("add_generation_prompt and continue_final_message exclude each other", param="continue_final_message")
    continued = bool(body.continue_final_message)
    generation_prompt = not continued if body.add_generation_prompt is None else body.add_generation_prompt
    text = await model.preprocessor.render(
        messages, add_generation_prompt=generation_prompt, continue_final_message=continued, template=body.chat_template, arguments=_arguments(body)
    )
    return text, await model.preprocessor.encode(text, add_special_tokens=False)


def _arguments(body: ChatBody) -> dict[str, Any] | None:
    if body.chat_template_args is not None and body.chat_template_kwargs is not None:
        raise RequestError("`chat_template_args` and `chat_template_kwargs` are two names of one object; send one of them", param="chat_template_kwargs")
    arguments = body.chat_template_args if body.chat_template_args is not None else body.chat_template_kwargs
    if arguments:
        check_nesting(arguments, "chat_template_args")
    if body.reasoning_effort is not None:
        arguments = {"reasoning_effort": body.reasoning_effort, **(arguments or {})}
    return arguments


def _message(message: dict[str, Any], index: int, urls: list[str] | None, placeholder: str) -> Mapping[str, Any]:
    """One message, checked; a content of parts stays a list, because templates differ in how they join them.

    Keys beyond OpenAI's are the template's business and pass.
    """
    if not isinstance(role := message.get("role"), str) or not role:
        raise RequestError(f"messages[{index}]: `role` is required and must be a string", param=f"messages[{index}].role")
    content = message.get("content")
    if isinstance(content, str):
        if len(message) == 2:
            return message
    elif isinstance(content, list):
        for number, part in enumerate(content):
            where = f"messages[{index}].content[{number}]"
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise RequestError(f"{where}: a part must be an object with a `type`", param=where)
            if part["type"] == "image_url" and urls is not None:
                urls.append(_image_url(part, where))
                content[number] = {"type": "image", "text": placeholder}  # templates either ask for the type, or join the texts
                continue
            if part["type"] not in ("text", "refusal"):
                reads = "text" if urls is None else "text and images"
                raise RequestError(f"{where}: parts of type {part['type'][:64]!r} are not supported; this model reads {reads}", param=where)
            if not isinstance(part.get(part["type"]), str):
                raise RequestError(f"{where}: `{part['type']}` must be a string", param=where)
    elif content is not None:
        raise RequestError(f"messages[{index}]: `content` must be a string or a list of parts", param=f"messages[{index}].content")
    elif role != "assistant":
        raise RequestError(f"messages[{index}]: `content` is required for role {role[:64]!r}", param=f"messages[{index}].content")
    if len(message) > 2 or not isinstance(content, str):
        check_nesting(message, f"messages[{index}]")
    return message if "content" in message else {**message, "content": None}


def _image_url(part: dict[str, Any], where: str) -> str:
    """As OpenAI has it, or the bare string that some clients send. `detail` is ignored."""
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str) or not url:
        raise RequestError(f"{where}: `image_url` must be an object with a `url`", param=where)
    return url


def _refuse_unsupported(body: ChatBody) -> None:
    if body.functions or (body.function_call is not None and body.function_call != "none"):
        raise RequestError(_TOOLS, param="functions")
    if body.tools and body.tool_choice != "none":
        raise RequestError(_TOOLS, param="tools")
    if body.tool_choice not in (None, "none", "auto"):
        raise RequestError(_TOOLS, param="tool_choice")
    if body.modalities and body.modalities != ["text"]:
        raise RequestError("modalities: this server answers with text", param="modalities")
