"""P1: templates render as `transformers` renders them, in a sandbox with bounds; what goes wrong is the client's `RequestError`."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dynamo_core.errors import RequestError
from dynamo_core.preprocess.template import ChatTemplate, compile_template

GOLDENS: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "goldens.json").read_text())
USER = [{"role": "user", "content": "Hi"}]


def render(case: dict[str, Any]) -> str | None:
    try:
        return compile_template(GOLDENS["templates"][case["template"]]).render(
            GOLDENS["conversations"][case["messages"]], tools=GOLDENS["tools"] if case["tools"] else None, add_generation_prompt=case["add_generation_prompt"],
            continue_final_message=case["continue_final_message"], variables=GOLDENS["tokens"] | case["arguments"],
        )  # fmt: skip
    except RequestError:
        return None


@pytest.mark.parametrize("case", GOLDENS["cases"], ids=lambda case: "-".join(str(value) for key, value in case.items() if key != "text"))
def test_p1_the_prompt_is_what_transformers_renders(case: dict[str, Any]) -> None:
    assert render(case) == case["text"]


def test_p1_threads_do_not_disturb_each_other() -> None:
    with ThreadPoolExecutor(8) as pool:
        for case, text in zip(GOLDENS["cases"] * 3, pool.map(render, GOLDENS["cases"] * 3), strict=True):
            assert text == case["text"]


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% set x = ('a' * 1000000) | upper %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 9 ** 999999999 }}",
        "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{{ 'a' | center(10 ** 10) }}",
        "{{ 'x'.ljust(10 ** 10) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 9999999999) }}",
        "{{ range(10 ** 9) }}",
    ],
)
def test_p1_a_template_that_never_ends_or_grows_without_end_is_stopped(source: str) -> None:
    with pytest.raises(RequestError, match=r"too long|too large|without end|Range too big"):
        ChatTemplate(source).render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{% set x = namespace(__init__=1) %}",
        "{{ dict.__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include 'x' %}",
        "{{ (messages | attr('__class__')).__mro__ }}",
    ],
)
def test_p1_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(RequestError):
        print(ChatTemplate(source).render(USER))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for %}", "cannot be compiled"),
        ("{{ raise_exception('no system role, please') }}", "no system role, please"),
        ("{{ missing.attribute }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "breaks on these messages"),
    ],
)
def test_p1_a_template_error_is_a_request_error_that_says_why(source: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        ChatTemplate(source).render(USER)


def test_p1_messages_are_not_changed_by_rendering() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b", "reasoning": "c", "name": None}]
    before = json.dumps(messages)
    compile_template(GOLDENS["templates"]["parts"]).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert json.dumps(messages) == before


def test_parts_are_joined_for_a_template_that_takes_text_only() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "one"}, "two"]}]
    assert ChatTemplate("{{ messages[0].content }}").render(messages) == "one\ntwo"
    with pytest.raises(RequestError, match="'image_url'"):
        ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        ("{{ messages[0]['content'] }}", False),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{% for p in m['content'] %}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% set c = m.content %}{% for p in c %}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% for p in m.get('content') | list %}{% endfor %}{% endfor %}", True),
        ("{% macro r(content) %}{% for p in content %}{% endfor %}{% endmacro %}", True),
    ],
)
def test_a_template_that_loops_over_content_takes_parts(source: str, takes: bool) -> None:
    assert ChatTemplate(source).takes_parts is takes


@pytest.mark.parametrize("messages", [[], [{"role": "assistant"}], [{"role": "assistant", "content": []}]])
def test_messages_that_cannot_be_continued_are_refused(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(RequestError):
        compile_template(GOLDENS["templates"]["parts"]).render(messages, add_generation_prompt=False, continue_final_message=True)


def test_a_prompt_cannot_both_continue_a_message_and_start_one() -> None:
    with pytest.raises(RequestError, match="exclude each other"):
        ChatTemplate("{{ messages[0].content }}").render(USER, continue_final_message=True)
