"""Plain completions: prompts in all their forms, echo, the legacy logprobs."""

from __future__ import annotations

import json

import pytest
from fake_catalog import FakeModel, logprob, words

from dynamo_core.errors import NoWorker
from dynamo_core.types import Delta


async def test_a_whole_answer_has_openais_shape(each):
    body = (await each.complete()).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": "Hello, world", "logprobs": None, "finish_reason": "stop"}]


async def test_a_stream_ends_with_an_empty_text_and_the_reason(each):
    response = await each.complete(stream=True)
    frames = [json.loads(f[6:]) for f in response.text.split("\n\n")[:-2]]
    assert [(f["choices"][0]["text"], f["choices"][0]["finish_reason"]) for f in frames] == [("Hello", None), (",", None), (" world", None), ("", "stop")]


@pytest.mark.parametrize(
    ("prompt", "tokens"), [("ab", [[1, 353, 354]]), ([5, 6], [[5, 6]]), ([[5], [6, 7]], [[5], [6, 7]]), (["a", "b"], [[1, 353], [1, 354]])]
)
async def test_prompts_come_as_text_or_tokens_one_or_several(start, prompt, tokens):
    async with start(model=FakeModel("m", add_bos=True)) as site:
        body = (await site.complete(prompt=prompt)).json()
        assert [request.token_ids for request, _, _ in site.model.starts] == tokens
        assert [choice["index"] for choice in body["choices"]] == list(range(len(tokens)))
        assert body["usage"]["prompt_tokens"] == sum(map(len, tokens))
        assert body["usage"]["completion_tokens"] == 3 * len(tokens)


async def test_several_prompts_with_n_count_choices_as_openai_does(site):
    site.model.script = lambda request: [*words(*request.id[-2:], index=1), *words("a", index=0)]
    body = (await site.complete(prompt=["x", "y"], n=2)).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "a"), (1, "-0"), (2, "a"), (3, "-1")]
    frames = [json.loads(f[6:]) for f in (await site.complete(prompt=["x", "y"], n=2, stream=True)).text.split("\n\n")[:-2]]
    text = {index: "".join(f["choices"][0]["text"] for f in frames if f["choices"][0]["index"] == index) for index in range(4)}
    assert text == {0: "a", 1: "-0", 2: "a", 3: "-1"}


async def test_one_prompt_that_cannot_start_cancels_the_others(site):
    def script(request):
        if request.id.endswith("-1"):
            raise NoWorker("this request")
        return words("a")

    site.model.script = script
    assert (await site.complete(prompt=["a", "b"])).status_code == 503
    assert site.model.generations[0].cancelled


async def test_one_prompt_that_fails_on_the_way_cancels_the_others(site):
    site.model.script = lambda request: [0.05, NoWorker("this request")] if request.id.endswith("-1") else [Delta(text="a", token_ids=[1]), 30.0]
    assert (await site.complete(prompt=["a", "b"])).status_code == 503
    assert all(generation.cancelled for generation in site.model.generations)


async def test_echo_puts_the_prompt_before_the_text(site):
    assert (await site.complete(prompt="say: ", echo=True)).json()["choices"][0]["text"] == "say: Hello, world"
    assert (await site.complete(prompt=[0, 1, 2], echo=True)).json()["choices"][0]["text"] == "abcHello, world"
    frames = [json.loads(f[6:]) for f in (await site.complete(prompt=["p", "q"], echo=True, stream=True)).text.split("\n\n")[:-2]]
    for index, prompt in enumerate("pq"):
        assert "".join(f["choices"][0]["text"] for f in frames if f["choices"][0]["index"] == index) == prompt + "Hello, world"


async def test_legacy_logprobs_count_offsets_in_the_text(site):
    site.model.script = [
        Delta(text="Hel", token_ids=[1], logprobs=[logprob("Hel", 1)]),
        Delta(text="lo", token_ids=[2], logprobs=[logprob("lo", 2)]),
        Delta(finish_reason="stop"),
    ]
    expected = {"tokens": ["Hel", "lo"], "token_logprobs": [-0.5, -0.5], "top_logprobs": [{"Hel": -0.5}, {"lo": -0.5}], "text_offset": [0, 3]}
    assert (await site.complete(logprobs=1)).json()["choices"][0]["logprobs"] == expected
    frames = [json.loads(f[6:]) for f in (await site.complete(logprobs=1, stream=True)).text.split("\n\n")[:-2]]
    assert [f["choices"][0]["logprobs"] and f["choices"][0]["logprobs"]["text_offset"] for f in frames] == [[0], [3], None]


async def test_echo_with_logprobs_begins_with_those_of_the_prompt(site):
    site.model.script = [Delta(text="x", token_ids=[1], logprobs=[logprob("x", 1)]), Delta(finish_reason="stop")]
    for stream in (False, True):
        response = await site.complete(prompt=[3, 4], echo=True, logprobs=0, stream=stream)
        body = json.loads(response.text.split("\n\n")[0][6:]) if stream else response.json()
        logprobs = body["choices"][0]["logprobs"]
        assert logprobs["tokens"] == ["d", "p4", "x"]
        assert logprobs["token_logprobs"] == [None, -0.5, -0.5]
        assert logprobs["text_offset"] == [0, 1, 3]
    assert site.model.starts[0][0].prompt_logprobs == 0


async def test_prompt_logprobs_are_reported_by_token_id(site):
    body = (await site.complete(prompt=[3, 4], prompt_logprobs=1)).json()
    assert body["prompt_logprobs"] == [None, {"4": {"logprob": -0.5, "decoded_token": "p4"}}]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 3}, "best_of", "must equal n"),
        ({"prompt": []}, "prompt", "must not be empty"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": ["a", [1]]}, "prompt", "not a mixture"),
        ({"prompt": ["a", 1]}, "prompt", "not a mixture"),
        ({"prompt": ["a"] * 129}, "prompt", "more than 128"),
        ({"prompt": ["a"] * 100, "n": 3}, "prompt", "more than 256 choices"),
        ({"prompt": [1000]}, "prompt", "vocabulary"),
        ({"prompt": [-1]}, "prompt[0]", ">= 0"),
        ({"prompt": ["a", "b"], "echo": True, "logprobs": 1}, "prompt", "one prompt at a time"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"logprobs": 21}, "logprobs", "<= 20"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(site, fields, param, says):
    response = await site.complete(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert says in error["message"]
    assert not site.model.starts


async def test_an_empty_suffix_and_an_equal_best_of_are_fine(site):
    assert (await site.complete(suffix="", best_of=2, n=2)).status_code == 200
