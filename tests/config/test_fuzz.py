"""Whatever is done to a configuration: it loads, or it is a ConfigError whose every problem has a place. Never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_core.config import Config, check, load
from dynamo_core.config.emit import to_toml
from dynamo_core.config.fields import tables
from dynamo_core.errors import ConfigError
from dynamo_core.plugins import Plugins

GOOD = """\
namespace = "prod"
lease_ttl = "10s"
discovery = { use = "file", path = "/x" }

[frontend]
port = 8000
debug_routes = false
http_server = "hypercorn"

[router]
filters = ["not-full"]
scorers = [
  { use = "load", weight = 1.5 },
  "turn",
]
picker = { use = "softmax", temperature = 0.1 }

[router.prefill]
use = "random"

[[workers]]
count = 2
engine = { use = "echo" }

[[workers]]
role = "decode"
[workers.engine]
use = "echo"
"""
LINES = GOOD.split("\n")

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


def loads_or_explains(text: str, plugins: Plugins | None, **more: Any) -> None:
    for problem in check(Path("a.toml"), text=text, environ=more.pop("environ", {}), plugins=plugins, **more):
        assert problem.what
        assert problem.where


def test_the_seed_of_the_mutations_is_good(plugins: Plugins) -> None:
    assert check(text=GOOD, environ={}, plugins=plugins) == []


def test_any_cut_explains_itself() -> None:
    for end in range(len(GOOD)):
        loads_or_explains(GOOD[:end], None)


def test_any_lost_or_repeated_line_explains_itself(plugins: Plugins) -> None:
    for i in range(len(LINES)):
        loads_or_explains("\n".join(LINES[:i] + LINES[i + 1 :]), plugins)
        loads_or_explains("\n".join([*LINES[: i + 1], *LINES[i:]]), plugins)


@settings(patient, max_examples=200)
@given(st.data())
def test_any_few_changed_characters_explain_themselves(data: st.DataObject) -> None:
    text = GOOD
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.text("[]{}=.,\"'#\n\\ a1-é\0", max_size=3)) + text[at + data.draw(st.integers(0, 3)) :]
    loads_or_explains(text, None)


KEYS = sorted({field.key for _, _, listed in tables() for field in listed} | {"use", "weight", "a", "0"})
CORE = Plugins.load()
VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.floats(), st.sampled_from(["load", "file", "10m", "env:X", "file:/", "prefill", ""]), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)),
    max_leaves=12,
)


@settings(patient, max_examples=150)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_data_under_real_keys_explains_itself(data: dict[str, Any]) -> None:
    loads_or_explains(to_toml(data), None)
    loads_or_explains(to_toml(data), CORE)


@settings(patient, max_examples=100)
@given(st.lists(st.tuples(st.lists(st.sampled_from([*KEYS, "1", "-1"]), min_size=1, max_size=4), st.text("[]{}\"'a1.,= ", max_size=4)), max_size=4))
def test_any_overrides_and_variables_explain_themselves(written: list[tuple[list[str], str]]) -> None:
    loads_or_explains(GOOD, None, overrides=[f"{'.'.join(path)}={value}" for path, value in written])
    loads_or_explains(GOOD, None, environ={"DYNAMO__" + "__".join(path).upper(): value for path, value in written})


def test_what_loads_is_a_config_and_what_does_not_is_one_error() -> None:
    assert isinstance(load(text=GOOD, environ={}), Config)
    with pytest.raises(ConfigError):
        load(text=GOOD + "x", environ={})
