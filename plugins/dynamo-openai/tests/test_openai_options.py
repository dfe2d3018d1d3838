"""Options, and the files that say how a model reads and writes text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynamo_core.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "gpu1:8000"}, "must be the address of a server"),
        ({"url": "http://user:key@gpu1:8000"}, "must be the address of a server"),
        ({"url": "http://gpu1:80000"}, "must be the address of a server"),
        ({"url": "http://gpu1:port"}, "must be the address of a server"),
        ({"kv_events": "gpu1:5557"}, "'kv_events' must be an address"),
        ({"kv_events": "tcp://*:5557"}, "'kv_events' must be an address to call"),
        ({"kv_events": "tcp://gpu1"}, "'kv_events' must be an address"),
        ({"kv_events": "tcp://gpu1:5557", "kv_replay": "tcp://*:5558"}, "'kv_replay' must be an address"),
        ({"kv_replay": "tcp://gpu1:5558"}, "of no use without 'kv_events'"),
        ({"kv_events": "off", "kv_replay": "tcp://gpu1:5558"}, "of no use without 'kv_events'"),
    ],
)
def test_options_that_make_no_sense_are_told(options: Any, said: str) -> None:
    from dynamo_openai.engine import OpenAIEngine

    with pytest.raises(ValueError, match=said):
        OpenAIEngine(**{"url": "http://gpu1:8000", **options})


def test_a_url_may_end_where_clients_expect_it_to() -> None:
    from dynamo_openai.engine import OpenAIEngine

    assert [OpenAIEngine(url=url).url for url in ("http://gpu1:8000", "http://gpu1:8000/", "http://gpu1:8000/v1/")] == ["http://gpu1:8000"] * 3


def test_each_rank_publishes_on_a_port_of_its_own() -> None:
    from dynamo_openai.meeting import of_rank

    assert [of_rank(endpoint, 2) for endpoint in ("tcp://gpu1:5557", "tcp://gpu1:{rank}5557", "ipc:///run/kv{rank}")] == ["tcp://gpu1:5559", "tcp://gpu1:25557", "ipc:///run/kv2"]


# ------------------------------------------------------------------ tokenizers


def test_a_template_file_and_a_list_of_ends_are_read(folder: Path, tmp_path: Path) -> None:
    from dynamo_openai.tokenizer import read

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 258], "max_new_tokens": 99}))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 512}))
    texts = read(tmp_path)
    assert (texts.chat_template, texts.default_max_tokens, texts.vocab_size) == ("{{ messages }}", 99, 512)
    assert texts.eos_token_ids == tuple(dict.fromkeys((read(folder).eos_token_ids[0], 256, 258)))


def test_a_folder_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    from dynamo_openai.tokenizer import read

    with pytest.raises(ConfigError, match=r"cannot read .*tokenizer\.json: No such file"):
        read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not the tokenizer of a model"):
        read(tmp_path)
