"""Positions in TOML and YAML: every value of the data has a place, and it is the right one."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_core.config import check, load
from dynamo_core.config.emit import to_toml
from dynamo_core.config.toml import read_toml
from dynamo_core.config.yaml import read_yaml
from dynamo_core.errors import ConfigError

AWKWARD = '''\
# [not.a.table]
top = 1 # = [
"quoted key" = "a # no comment" # comment
'lit.eral'."x\\ty" = 'C:\\'
a.b . c = true
text = """
[in.a.string]
key = 1 \\"""
"""
lit = \'\'\'
x = "
\'\'\'
ends = """two quotes"""""
list = [ # comment ]
  1, [2,
  3], # 4
  { x = 1, y.z = [ "}" ] },
  "],",
]
[t]
when = 1979-05-27 07:32:00
[t . "u"]
k = {}
[[arr]]
n = 1
[arr.sub]
deep = 1
[[arr.inner]]
q = 1
[[arr.inner]]
q = 2
[[arr]]
[arr.sub]
deep = 2
'''


def paths(data: Any, at: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    found = {at}
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found |= paths(value, (*at, key))
    return found


def line(tree: Any, *at: str | int) -> int:
    return int(tree.marks[at].where.rpartition(":")[2])


def test_awkward_toml_has_a_place_for_each_value_and_no_other() -> None:
    tree = read_toml(AWKWARD, "x")
    assert set(tree.marks) == paths(tomllib.loads(AWKWARD))


def test_places_in_awkward_toml_are_right() -> None:
    tree, lines = read_toml(AWKWARD, "x"), AWKWARD.split("\n")
    assert lines[line(tree, "quoted key") - 1].startswith('"quoted key"')
    assert lines[line(tree, "a", "b", "c") - 1].startswith("a.b")
    assert lines[line(tree, "list", 1, 1) - 1].strip().startswith("3]")
    assert lines[line(tree, "list", 2, "y", "z", 0) - 1].strip().startswith("{ x")
    assert lines[line(tree, "list", 3) - 1].strip() == '"],",'
    assert line(tree, "arr", 0, "sub", "deep") + 7 == line(tree, "arr", 1, "sub", "deep")
    assert lines[line(tree, "arr", 0, "inner", 1, "q") - 1] == "q = 2"
    assert lines[line(tree, "t", "u", "k") - 1] == "k = {}"


def test_windows_line_ends_and_a_byte_order_mark_change_nothing() -> None:
    assert read_toml("\ufeff" + AWKWARD.replace("\n", "\r\n"), "x").marks.keys() == read_toml(AWKWARD, "x").marks.keys()


patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

keys = st.text("ab_-.\"'[]= #é\n", min_size=1, max_size=4)
leaves = st.one_of(st.booleans(), st.integers(-9, 9), st.text("ab\"'\\[]{}=,# \n", max_size=6))
values = st.recursive(leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)), max_leaves=8)


@patient
@given(st.dictionaries(keys, values, max_size=4))
def test_every_value_of_any_toml_has_a_place(data: dict[str, Any]) -> None:
    text = to_toml(data)
    assert tomllib.loads(text) == data
    assert set(read_toml(text, "x").marks) == paths(data)


@patient
@given(st.text("[]{}=.,\"'#\n\\ ab1_", max_size=30))
def test_any_text_is_toml_with_places_or_an_error_with_a_line(text: str) -> None:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        with pytest.raises(ConfigError, match=r"^x:\d+: this is not TOML"):
            read_toml(text, "x")
    else:
        assert set(read_toml(text, "x").marks) == paths(data)


@pytest.mark.parametrize("text", ["[" * 5000, "a = " + "[" * 5000, "a = " + "{b=" * 3000])
def test_toml_that_is_too_deep_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError):
        read_toml(text, "x")


# ------------------------------------------------------------------ YAML

YAML = """\
namespace: "dynamo"
router:
  scorers:
    - load
    - use: turn
      weight: 2
    - {use: load,
       weight: 3}
workers:
- count: 2
  engine: {use: echo}
"""


def test_yaml_and_toml_say_the_same() -> None:
    toml = 'router.scorers = ["load", {use="turn", weight=2}, {use="load", weight=3}]\nworkers = [{count=2, engine={use="echo"}}]'
    assert load(Path("a.yaml"), text=YAML, environ={}) == load(text=toml, environ={})


def test_yaml_has_places() -> None:
    tree = read_yaml(YAML, "x")
    assert (line(tree, "router", "scorers", 1, "weight"), line(tree, "router", "scorers", 2, "weight"), line(tree, "workers", 0)) == (6, 8, 10)
    assert set(tree.marks) == paths(tree.data)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("frontend:\n  port: 'x'\n", 2, "frontend.port must be a whole number"),
        ("frontend:\n  prot: 1\n", 2, "no key 'prot'"),
        ("frontend:\n", 1, "frontend must be a table, is empty"),
        ("frontend:\n  debug_routes: yes\n", 2, 'must be true or false, is the string "yes"'),
        ("frontend: {port: 1\n", 2, "this is not YAML"),
        ("a: b: c\n", 1, "this is not YAML"),
        ("namespace: a\nnamespace: b\n", 2, "this is not YAML"),
        ("\tnamespace: a\n", 1, "this is not YAML"),
        ("- a\n- b\n", 1, "must be a table"),
        ("just words\n", 1, "must be a table"),
        ("1: 2\n", 1, "the key '1' must be a string"),
        ("? [a]\n: 1\n", 1, "keys must be strings"),
        ("host: &x [*x]\n", 1, "contains itself"),
        ("host: !!python/object:os.system x\n", 1, "this is not YAML"),
        ("host: 2020-01-01\n", 1, "host must be a string"),
    ],
)
def test_a_mistake_in_yaml_is_found_on_its_line(text: str, line: int, what: str) -> None:
    (problem,) = check(Path("a.yaml"), text=text, environ={})
    assert what in problem.what
    assert problem.where == f"a.yaml:{line}"


def test_two_documents_are_an_error() -> None:
    assert check(Path("a.yaml"), text="a: 1\n---\nb: 1\n", environ={})


def test_an_empty_yaml_file_is_a_configuration() -> None:
    assert check(Path("a.yaml"), text="# nothing\n", environ={}) == []


def test_aliases_of_aliases_do_not_fill_the_memory() -> None:
    text = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(f"{y}: &{y} [{','.join(['*' + x] * 10)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True))
    assert "more than" in check(Path("a.yaml"), text=text, environ={})[0].what


@patient
@given(st.text("ab:-[]{}&*!|>'\"# \n\t,?%@`", max_size=30))
def test_any_text_is_yaml_or_an_error(text: str) -> None:
    check(Path("a.yaml"), text=text, environ={})
