"""Writes `goldens.json`: what `transformers` renders for the templates and conversations here.

    uv venv /tmp/goldens && uv pip install --python /tmp/goldens/bin/python transformers jinja2 tokenizers
    /tmp/goldens/bin/python tests/preprocess/golden/make_goldens.py
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models

TEMPLATES = {
    "chatml": """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{% endif %}
""",
    "headers, tools, trimmed": """{{- bos_token }}
{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|header|>system<|end|>\n\n' ~ system }}
{%- if tools is not none %}
    {{- '\nTools:\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\n\n' }}
    {%- endfor %}
{%- endif %}
{{- eos_token }}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one tool call at a time') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|header|>' + message.role + '<|end|>\n\n' }}{{- {'name': call.name, 'parameters': call.arguments} | tojson }}{{- eos_token }}
    {%- elif message.role in ('tool', 'ipython') %}
        {{- '<|header|>ipython<|end|>\n\n' }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- eos_token }}
    {%- else %}
        {{- '<|header|>' + message.role + '<|end|>\n\n' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|end|>\n\n' }}{%- endif %}
""",
    "alternating": """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant/user/...') }}{% endif %}
{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]{% else %}{{ message['content'] ~ eos_token }}{% endif %}{% endfor %}
""",
    "parts": """{% macro render(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}
{%- if part.type == 'text' %}{{ part.text }}{% elif part.type in ['image', 'image_url'] %}<image>{% else %}{% continue %}{% endif %}
{%- endfor %}{% endif %}{% endmacro %}
{% for m in messages %}<{{ m.role }}>{{ render(m.content) }}{% generation %}</{{ m.role }}>{% endgeneration %}
{% endfor %}
""",
    "namespace, reasoning": """{%- set ns = namespace(last=-1, seen=[]) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if loop.first %}first {% endif %}{{ loop.index }}/{{ loop.length }}{{ ' ' if not loop.last }}
    {%- if m.reasoning_content is defined and m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}
    {%- if enable_thinking is defined and enable_thinking is false %}<no think>{% endif %}
    {{- m.role | upper }}: {{ (m.content or '') | replace('\n', '\\n') }}
    {%- for key, value in m | dictsort if key not in ('role', 'content') %} {{ key }}={{ value | string | length }}{% endfor %}
    {%- if loop.index0 >= 3 %}{% break %}{% endif %}
{% endfor %}
{{- dict(a=1) | tojson(separators=(',', ':'), sort_keys=true) }}{{ dict.fromkeys(['x']) }}
{%- for d in documents or [] %}{{ d.title }}{% endfor %}
{%- set joined %}{{ messages | map(attribute='role') | join(',') }}{% endset %}
{{ joined }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ '%05.1f' % 2.25 }} {{ '{:>4}'.format('x') }} {{ 'é<&>' | e }}
""",
}

WEATHER = {"type": "function", "function": {"name": "weather", "description": "Get <b>weather</b> & 'more'",
           "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "où"}}, "required": ["city"]}}}  # fmt: skip
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln <x>"}}}
CONVERSATIONS = {
    "one": [{"role": "user", "content": "Hi <there> & 'you', é 你好 😀"}],
    "system": [
        {"role": "system", "content": "  Be brief. \n"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! "},
        {"role": "user", "content": "  more  "},
    ],
    "turns": [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}],
    "ends with the assistant": [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one, two, "}],
    "tools": [
        {"role": "user", "content": "w?", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
        {"role": "user", "content": "thanks"},
    ],
    "reasoning": [{"role": "user", "content": "q"}, {"role": "assistant", "reasoning": "hmm", "content": "a"}, {"role": "user", "content": "r"}],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "two"}]}
    ],
    "five": [{"role": "user", "content": str(n)} for n in range(5)],
}  # fmt: skip
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def main() -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **TOKENS)
    cases = []
    for (template, source), (name, messages) in product(TEMPLATES.items(), CONVERSATIONS.items()):
        if name == "parts" and template != "parts":
            continue  # lists are joined for templates that take none, which transformers does not do
        for tools, (generate, go_on), arguments in product((None, [WEATHER]), ((True, False), (False, False), (False, True)), ({}, {"enable_thinking": False})):
            if arguments and template != "namespace, reasoning":
                continue
            if tools and "tools" not in source:
                continue
            try:
                text = tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=source, add_generation_prompt=generate, continue_final_message=go_on, tokenize=False, **arguments
                )
            except Exception:
                text = None
            cases.append({"template": template, "messages": name, "tools": tools is not None, "add_generation_prompt": generate,
                          "continue_final_message": go_on, "arguments": arguments, "text": text})  # fmt: skip
    written = {"transformers": transformers.__version__, "tokens": TOKENS, "tools": [WEATHER], "templates": TEMPLATES,
               "conversations": CONVERSATIONS, "cases": cases}  # fmt: skip
    Path(__file__).with_name("goldens.json").write_text(json.dumps(written, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
