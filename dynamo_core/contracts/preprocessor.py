"""The conformance kit of preprocessors. Inherit it, provide `preprocessor`, and run pytest.

    class TestMine(PreprocessorContract):
        @pytest.fixture
        def preprocessor(self):
            return Mine(card, tokenizer)

The guarantees, at length in docs/contracts/preprocessor.md: P1 templates, P2 the event loop goes on, P3 incremental text, P4 stop strings.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import ClassVar

import pytest

from dynamo_core.errors import RequestError
from dynamo_core.preprocess.contract import Assembler, Preprocessor
from dynamo_core.types import Delta, FinishReason, Output, TextOptions

TEXTS = (
    "Hello, world. This is a plain sentence.",
    "naïve café — “quoted” 你好，世界 😀👨\u200d👩\u200d👧 e\u0301",
    "def f(x):\n\treturn {'a': [1, 22, 333]}\n\n\n  # done",
    "aabaabaabaab END and more",
)
STOPS: tuple[tuple[str, ...], ...] = (("END",), ("aab", "baa"), ("sentence.", "tence"), ("😀",), ("never there", "\n\n"), ("aabaabaabaab END and moreover",))


class PreprocessorContract:
    """`preprocessor` is a fixture that returns one that is ready to be used. It may have any vocabulary that can write any text."""

    longest_stall: ClassVar[float] = 0.25
    """Seconds for which the event loop may stand still; far above what is promised, since test machines are busy. A longer pause counts
    when it is most of the time that tokenizing took."""
    long_text: ClassVar[int] = 1_000_000
    """Characters; enough to take longer than `longest_stall` when it is done on the event loop."""

    # ------------------------------------------------------------------ templates

    async def test_p1_a_template_sees_messages_tools_and_arguments(self, preprocessor: Preprocessor) -> None:
        template = "{% for m in messages %}\n{{ m.role }}: {{ m.content }}\n{% endfor %}"
        template += "{{ tools | tojson }} {{ word }}{% if add_generation_prompt %} >{% endif %}"
        text = await preprocessor.render([{"role": "user", "content": "é <&>"}], tools=[{"name": "<b>é"}], template=template, arguments={"word": "said"})
        assert text == 'user: é <&>\n[{"name": "<b>é"}] said >', "whitespace, or JSON that is escaped for HTML"

    async def test_p1_the_last_message_can_be_continued(self, preprocessor: Preprocessor) -> None:
        template = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"
        messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        assert await preprocessor.render(messages, template=template, add_generation_prompt=False, continue_final_message=True) == "[one][two"

    @pytest.mark.parametrize("template", ["{{ raise_exception('not like this') }}", "{% for %}", "{{ missing.attribute }}", "{{ 1 / 0 }}"])
    async def test_p1_a_template_error_is_the_clients(self, preprocessor: Preprocessor, template: str) -> None:
        with pytest.raises(RequestError):
            await preprocessor.render([{"role": "user", "content": "x"}], template=template)

    @pytest.mark.parametrize(
        "template",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.append(1) }}",
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        ],
    )
    async def test_p1_a_template_cannot_leave_the_sandbox_nor_run_for_ever(self, preprocessor: Preprocessor, template: str) -> None:
        with pytest.raises(RequestError):
            await asyncio.wait_for(preprocessor.render([{"role": "user", "content": "x"}], template=template), 60)

    # ------------------------------------------------------------------ tokens

    async def test_p2_the_event_loop_goes_on_while_a_long_text_is_tokenized(self, preprocessor: Preprocessor) -> None:
        stalls: list[str] = []
        for attempt in range(5):  # who blocks the loop does so every time; a busy machine may take its core away now and then
            dice = random.Random(attempt)
            text = " ".join(f"{dice.randrange(10**9):x}" for _ in range(self.long_text // 8))
            work = asyncio.create_task(preprocessor.encode(text, add_special_tokens=False))
            worst, start = 0.0, time.perf_counter()
            while not work.done():
                before = time.perf_counter()
                await asyncio.sleep(0.001)
                worst = max(worst, time.perf_counter() - before)
            took = time.perf_counter() - start
            assert preprocessor.decode(await work) == text
            if worst < max(self.longest_stall, took / 2):
                return
            stalls.append(f"{worst:.2f} of {took:.2f} s")
        pytest.fail(f"the event loop stood still for {', '.join(stalls)}")

    async def test_p2_tokens_do_not_depend_on_what_was_tokenized_before(self, preprocessor: Preprocessor) -> None:
        first = [await preprocessor.encode(text * 3, add_special_tokens=False) for text in TEXTS]
        for text in TEXTS:
            await preprocessor.encode(text, add_special_tokens=True)
            longer = await preprocessor.encode(text + " and a tail", add_special_tokens=False)
            assert preprocessor.decode(longer).endswith(" and a tail")
        assert [await preprocessor.encode(text * 3, add_special_tokens=False) for text in TEXTS] == first

    # ------------------------------------------------------------------ text

    @pytest.mark.parametrize("text", TEXTS)
    async def test_p3_text_in_any_chunks_joins_to_the_whole(self, preprocessor: Preprocessor, text: str) -> None:
        ids = await preprocessor.encode(text, add_special_tokens=False)
        for size in (1, 2, 3, 50):
            for reason in (None, "length"):
                whole = drive(preprocessor.assembler(TextOptions()), ids, size, reason)
                assert whole.text == preprocessor.decode(ids), f"{size} tokens at a time"
                assert whole.token_ids == ids

    @pytest.mark.parametrize("text", TEXTS)
    async def test_p3_no_character_is_split_and_none_is_replaced_early(self, preprocessor: Preprocessor, text: str) -> None:
        ids = await preprocessor.encode(text, add_special_tokens=False)
        assembler = preprocessor.assembler(TextOptions())
        for token_id in ids:
            delta = assembler.push(Output([token_id]))
            assert delta is None or "\ufffd" not in delta.text

    async def test_p3_text_joins_on_to_the_prompt(self, preprocessor: Preprocessor) -> None:
        ids = await preprocessor.encode(TEXTS[1], add_special_tokens=False)
        for cut in range(1, len(ids)):
            before = drive(preprocessor.assembler(TextOptions()), ids[:cut], 1)
            after = drive(preprocessor.assembler(TextOptions(), prompt_tail=ids[:cut][-8:]), ids[cut:], 1, "length")
            assert before.text + after.text == preprocessor.decode(ids)

    async def test_p3_logprobs_carry_the_bytes_of_the_text(self, preprocessor: Preprocessor) -> None:
        for text in TEXTS:
            ids = await preprocessor.encode(text, add_special_tokens=False)
            pieces = [preprocessor.logprob(token_id, -1.0, [(token_id, -1.0)]) for token_id in ids]
            assert b"".join(bytes(piece.bytes) for piece in pieces).decode().strip() == preprocessor.decode(ids).strip()
            assert all(piece.top[0].token == piece.token for piece in pieces)

    # ------------------------------------------------------------------ stop strings

    @pytest.mark.parametrize("stops", STOPS)
    @pytest.mark.parametrize("include", [False, True])
    async def test_p4_the_text_ends_at_its_first_stop_string_for_any_chunks(self, preprocessor: Preprocessor, stops: tuple[str, ...], include: bool) -> None:
        for text in TEXTS:
            ids = await preprocessor.encode(text, add_special_tokens=False)
            shown, stop = first_stop(preprocessor.decode(ids), stops, include)
            used = next((n for n in range(1, len(ids)) if first_stop(preprocessor.decode(ids[:n]), stops, include)[1]), len(ids))
            for size in (1, 2, 3, 50):
                assembler = preprocessor.assembler(TextOptions(stop=stops, include_stop=include))
                whole = drive(assembler, ids, size, "length")
                assert (whole.text, whole.finish_reason, whole.stop_reason) == (shown, "stop" if stop else "length", stop), f"{size} tokens at a time"
                assert whole.token_ids == ids[:used], "the tokens that count end with the one that completed the stop string"
                assert assembler.stopped is (stop is not None)

    async def test_p4_nothing_follows_a_stop_string(self, preprocessor: Preprocessor) -> None:
        ids = await preprocessor.encode(TEXTS[0], add_special_tokens=False)
        assembler = preprocessor.assembler(TextOptions(stop=("plain",)))
        assert assembler.push(Output(ids)) is not None
        assert assembler.push(Output(ids)) is None
        assert assembler.push(Output(ids, finish_reason="length")) is None


def drive(assembler: Assembler, ids: Sequence[int], size: int, reason: FinishReason | None = None) -> Delta:
    """All that an assembler says when it gets `size` tokens at a time, as one delta. Every second output is merged by `into`."""
    whole = Delta()
    chunks = [list(ids[start : start + size]) for start in range(0, len(ids), size)] or [[]]
    for n, chunk in enumerate(chunks):
        output = Output(chunk, finish_reason=reason if n == len(chunks) - 1 else None)
        if n % 2:
            assert assembler.push(output, whole) is whole
        elif (delta := assembler.push(output)) is not None:
            whole.text += delta.text
            whole.token_ids = whole.token_ids + delta.token_ids
            whole.finish_reason, whole.stop_reason = delta.finish_reason, delta.stop_reason
        if assembler.stopped:
            break
    return whole


def first_stop(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The text up to its first stop string: the one that is complete first, and the longest of those that end there."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, length, stop = min(ends)
    return text[: end if include else end + length], stop
