"""Override above environment above file above default, and mistakes in each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from dynamo_core.config import check, load, plugins_for
from dynamo_core.config.layers import parse_value
from dynamo_core.errors import Problem

FILE = """
[router]
seed = 1
decisions = 1
temperature = 1.0
scorers = ["load", { use = "turn", weight = 2 }]

[[workers]]
count = 1
engine = "echo"
"""


def problems(*overrides: str, env: Mapping[str, str] | None = None) -> Sequence[Problem]:
    return check(Path("stack.toml"), text=FILE, overrides=overrides, environ=env or {})


def test_the_closest_word_counts() -> None:
    env = {"DYNAMO__ROUTER__SEED": "2", "DYNAMO__ROUTER__DECISIONS": "2"}
    router = load(text=FILE, overrides=["router.seed=3"], environ=env).router
    assert (router.seed, router.decisions, router.temperature, router.filters) == (3, 2, 1.0, ())


def test_the_last_override_counts() -> None:
    assert load(text=FILE, overrides=["router.seed=3", "router.seed=4"], environ={}).router.seed == 4


@pytest.mark.parametrize("key", ["workers.0.count", "workers[0].count"])
def test_numbers_index_arrays(key: str) -> None:
    assert load(text=FILE, overrides=[f"{key}=4"], environ={}).workers[0].count == 4
    assert load(text=FILE, environ={"DYNAMO__WORKERS__0__COUNT": "4"}).workers[0].count == 4


def test_the_next_element_may_be_added_but_no_later_one() -> None:
    config = load(text=FILE, overrides=["workers.1.count=3", "router.scorers.2=preferred-taints"], environ={})
    assert [worker.count for worker in config.workers] == [1, 3]
    assert [use.name for use in config.router.scorers] == ["load", "turn", "preferred-taints"]
    (problem,) = problems("workers.2.count=3")
    assert "workers has 1 elements, so there is none at 2" in problem.what
    assert "workers.1" in problem.remedy


def test_an_array_can_begin_in_the_environment() -> None:
    config = load(text="", environ={"DYNAMO__WORKERS__0__ENGINE": "echo", "DYNAMO__WORKERS__0__COUNT": "2"})
    assert (config.workers[0].engine.name, config.workers[0].count) == ("echo", 2)


def test_an_option_can_be_added_to_a_component_that_is_written_as_a_name() -> None:
    engine = load(text=FILE, overrides=["workers.0.engine.delay=5", "router.scorers.0.weight=7"], environ={}).workers[0].engine
    assert (engine.name, engine.options) == ("echo", {"delay": 5})


def test_replacing_a_component_drops_the_options_of_the_one_before() -> None:
    text = 'discovery = { use = "file", path = "/x" }'
    assert load(text=text, overrides=["discovery=memory"], environ={}).discovery.options == {}


def test_values_are_toml_and_bare_words_are_strings() -> None:
    assert parse_value("1") == 1
    assert parse_value("true") is True
    assert parse_value("[1, 2]") == [1, 2]
    assert parse_value('"1"') == "1"
    assert parse_value("least-loaded") == "least-loaded"
    assert parse_value("10.0.0.1") == "10.0.0.1"
    assert parse_value("") == ""
    assert parse_value("1\nb = 2") == "1\nb = 2"
    with pytest.raises(ValueError, match="not a TOML value"):
        parse_value("[1,")


def test_a_string_setting_takes_what_looks_like_a_number() -> None:
    assert load(text=FILE, overrides=["workers.0.served_name=7"], environ={}).workers[0].served_name == "7"
    assert load(text=FILE, environ={"DYNAMO__WORKERS__0__SERVED_NAME": "1e3"}).workers[0].served_name == "1e3"
    assert load(text=FILE, overrides=['workers.0.served_name="7"'], environ={}).workers[0].served_name == "7"


@pytest.mark.parametrize(
    ("override", "what", "hint"),
    [
        ("router.sed=1", "[router] has no key 'sed'", "'seed'"),
        ("routr.seed=1", "has no key 'routr'", "'router'"),
        ("router.seed", "not of the form KEY=VALUE", "router.temperature=0.2"),
        ("=1", "not of the form KEY=VALUE", ""),
        ("router..seed=1", "not of the form KEY=VALUE", ""),
        ("router.seed=x", 'router.seed must be a whole number, is the string "x"', ""),
        ("router.seed=[1", "cannot be read", ""),
        ("workers.count=4", "workers is a list, and 'count' is not a position in it", "workers.0.count"),
        ("router.scorers.0.weight=heavy", "weight must be a number", ""),
        ("namespace.x=1", "namespace must be a string", ""),
    ],
)
def test_a_mistake_in_an_override_names_it(override: str, what: str, hint: str) -> None:
    (problem,) = problems(override)
    assert what in problem.what
    assert hint in problem.remedy
    assert "--set" in problem.where
    assert problem.source == override


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("DYNAMO__ROUTR__SEED", "DYNAMO__ROUTR__SEED matches no setting", "DYNAMO__ROUTER__SEED?"),
        ("DYNAMO__ROUTER__SED", "DYNAMO__ROUTER__SED matches no setting", "DYNAMO__ROUTER__SEED?"),
        ("DYNAMO__WORKERS__0__COUMT", "matches no setting", "DYNAMO__WORKERS__0__COUNT?"),
        ("DYNAMO_ROUTER__SEED", "matches no setting", "DYNAMO__ROUTER__SEED?"),
        ("DYNAMO_DISABLED_PLUGIN", "means nothing", "DYNAMO_DISABLED_PLUGINS?"),
        ("DYNAMO__", "matches no setting", "double underscores"),
        ("DYNAMO__ROUTER__", "matches no setting", "double underscores"),
    ],
)
def test_a_mistake_in_a_variable_names_it(name: str, what: str, hint: str) -> None:
    (problem,) = problems(env={name: "1"})
    assert what in problem.what
    assert hint in problem.remedy
    assert problem.where == f"environment variable {name}"


def test_variables_of_others_are_left_alone() -> None:
    assert problems(env={"DYNAMO_FRONTEND_SERVICE_HOST": "10.0.0.1", "DYNAMO_TABLE": "x", "DYNAMO_CONFIG_PORT": "1", "DYNAMO_DISABLED_PLUGINS": "a"}) == []


def test_dynamo_config_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "it.toml").write_text("[router]\nseed = 9\n")
    assert load(environ={"DYNAMO_CONFIG": str(tmp_path / "it.toml")}).router.seed == 9


def test_the_configuration_can_disable_plugins_and_never_fails_at_that() -> None:
    assert plugins_for(text="[plugins]\ndisabled = [\n", environ={}).components
    assert plugins_for(text="plugins = 5", environ={}).components
    assert plugins_for(text="[plugins]\ndisabled = [5]", environ={}).components
