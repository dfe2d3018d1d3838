"""What engines check alike: a sound request passes with its room for tokens, anything else is refused by the name of its field."""

from typing import Any

import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.engines import admit
from dynamo_core.errors import PromptTooLong, RequestError
from dynamo_core.types import Guided, Request, Sampling, Stops

CARD = ModelCard(name="m", context_length=100, engine="test")


def request(length: int = 10, **fields: Any) -> Request:
    return Request(id="1", model="m", token_ids=list(range(length)), **fields)


@pytest.mark.parametrize(
    ("length", "wanted", "default", "resumed", "expected"),
    [
        (10, None, None, 0, 90),
        (10, 5, None, 0, 5),
        (10, 500, None, 0, 90),
        (99, 5, None, 0, 1),
        (10, None, 20, 0, 20),
        (10, 30, 20, 0, 30),
        (10, None, 20, 4, 16),
        (40, None, 20, 30, 1),
        (10, 5, 20, 4, 5),
    ],
)
def test_the_room_is_what_was_asked_for_or_the_default_within_the_context(
    length: int, wanted: int | None, default: int | None, resumed: int, expected: int
) -> None:
    card = ModelCard(name="m", context_length=100, default_max_tokens=default)
    assert admit(request(length, resumed=resumed, stops=Stops(max_tokens=wanted)), card) == expected


def test_a_prompt_that_fills_the_context_is_too_long() -> None:
    with pytest.raises(PromptTooLong, match="the prompt has 100 tokens; the model's context of 100"):
        admit(request(100), CARD)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"sampling": Sampling(temperature=-0.1)}, "temperature"),
        ({"sampling": Sampling(temperature=float("nan"))}, "temperature"),
        ({"sampling": Sampling(top_p=1.1)}, "top_p"),
        ({"sampling": Sampling(frequency_penalty=2.5)}, "frequency_penalty"),
        ({"sampling": Sampling(top_k=-2)}, "top_k"),
        ({"sampling": Sampling(n=0)}, "n"),
        ({"sampling": Sampling(n=100_000_000)}, "n"),
        ({"stops": Stops(max_tokens=0)}, "max_tokens"),
        ({"stops": Stops(min_tokens=-1)}, "min_tokens"),
        ({"stops": Stops(max_tokens=3, min_tokens=4)}, "min_tokens"),
        ({"resumed": 10}, "prompt"),
        ({"resumed": -1}, "prompt"),
    ],
)
def test_an_unsound_request_is_refused_by_the_name_of_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refusal:
        admit(request(**fields), CARD)
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("capability", "fields"),
    [
        ("n", {"sampling": Sampling(n=2)}),
        ("logprobs", {"logprobs": 0}),
        ("prompt_logprobs", {"prompt_logprobs": 1}),
        ("logit_bias", {"sampling": Sampling(logit_bias={1: 1.0})}),
        ("guided", {"guided": Guided(json_object=True)}),
        ("lora", {"adapter": "x"}),
        ("media", {"media": [{"type": "image"}]}),
    ],
)
def test_what_is_not_promised_is_refused_and_what_is_promised_passes(capability: str, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"does not support {capability}"):
        admit(request(**fields), CARD)
    assert admit(request(**fields), ModelCard(name="m", context_length=100, capabilities=(capability,))) == 90


def test_the_adapter_that_the_card_is_for_needs_no_promise() -> None:
    assert admit(request(adapter="x"), ModelCard(name="m", context_length=100, adapter="x")) == 90
