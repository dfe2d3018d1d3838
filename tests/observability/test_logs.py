"""Log lines: structured, with ids, and without what must not be there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import attrs
import pytest

from dynamo_core.config.schema import Secret
from dynamo_core.observability import logs


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]):
    """`setup`, and what it has written since; everything is as before at the end."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level

    def start(style: str, **options: str) -> Callable[[], str]:
        logs.setup("info", style, **options)
        return lambda: capsys.readouterr().err

    yield start
    root.handlers[:] = before
    root.setLevel(level)


def test_json_lines_carry_the_role_and_the_ids(written) -> None:
    read = written("json", role="frontend")
    logging.getLogger("acme").warning("request %s moved", "r-1", extra={"request_id": "r-1"})
    line = json.loads(read())
    assert (line["event"], line["level"], line["logger"], line["role"], line["request_id"]) == ("request r-1 moved", "warning", "acme", "frontend", "r-1")
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_traceback_shows_no_local_variable(written, style: str) -> None:
    read = written(style)
    prompt = " ".join(["the prompt that", "nobody", "may", "read"])  # a traceback quotes source lines, and this one has it in pieces
    try:
        len(prompt) / 0
    except ZeroDivisionError:
        logging.getLogger("acme").exception("request broke")
    said = read()
    assert "ZeroDivisionError" in said
    assert "nobody may read" not in said


def test_a_secret_is_never_written(written) -> None:
    read = written("json")
    logging.getLogger("acme").info("configured", extra={"key": [Secret("hunter2", "env:KEY")]})
    logging.getLogger("acme").info("connecting with %s", Secret("hunter2", "env:KEY"))
    said = read()
    assert "hunter2" not in said
    assert said.count("<secret env:KEY>") == 2


def test_lines_below_the_level_are_not_written(written) -> None:
    read = written("json")
    logging.getLogger("acme").debug("detail")
    logging.getLogger("httpx").info("HTTP Request: GET ...")
    assert read() == ""


def test_what_json_cannot_say_is_written_all_the_same(written) -> None:
    read = written("json")
    logging.getLogger("acme").info("kept", extra={"keys": {(1, 2): "pair"}, "bytes": b"raw"})
    line = json.loads(read())
    assert line["bytes"] == "b'raw'"
    assert "pair" in line["keys"]


def test_an_object_that_holds_a_secret_is_written_as_it_shows_itself(written) -> None:
    @attrs.frozen
    class Account:
        name: str
        key: Secret

    read = written("json")
    logging.getLogger("acme").info("configured", extra={"account": Account("a", Secret("hunter2", "env:KEY"))})
    said = read()
    assert "hunter2" not in said
    assert "<secret env:KEY>" in said
