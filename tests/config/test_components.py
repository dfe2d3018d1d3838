"""Options of components: their attrs class is their schema."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
from attrs import validators as v

from dynamo_core.config import Secret, Use, build, check, choice, load, origins, structure
from dynamo_core.config.emit import nested, to_toml
from dynamo_core.errors import ConfigError, Problem
from dynamo_core.plugins import Plugins, Registry


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@attrs.frozen
class Peer:
    host: str
    port: int = 1


@attrs.frozen
class Rich:
    """Every type that an option may have."""

    size: int = attrs.field(default=1, validator=v.ge(1))
    ratio: float = 0.5
    token: Secret | None = None
    tokens: Mapping[str, Secret] = attrs.field(factory=dict)
    mode: Literal["fast", "slow", 3] = "fast"
    colour: Colour = Colour.RED
    path: Path | None = None
    peers: Sequence[Peer] = ()
    pair: tuple[int, str] = (1, "a")
    names: frozenset[str] = frozenset()
    either: int | str = 0
    wait: timedelta = timedelta(seconds=1)
    anything: Any = None
    inner: Use | None = choice("discovery")
    low: int = 0
    high: int = attrs.field(default=10)
    _private: int = 5
    made: int = attrs.field(init=False, default=7)

    @high.validator
    def _above_low(self, _: object, value: int) -> None:
        if value < self.low:
            raise ValueError(f"must not be below low, which is {self.low}")

    def __attrs_post_init__(self) -> None:
        if self.size == 13:
            raise ValueError("thirteen is not a size")
        if self.size == 14:
            raise ConfigError(Problem("fourteen is taken", "sizes.txt", remedy="take fifteen"), Problem("and so is twelve"))


class Plain:
    """Not an attrs class: it takes no options."""


@attrs.frozen
class Required:
    address: str


@attrs.frozen
class Unresolved:
    odd: NoSuchType = None  # type: ignore[name-defined]
    even: int = 2


@pytest.fixture
def plugins() -> Plugins:
    registry = Registry()
    for name, target in (("rich", "Rich"), ("plain", "Plain"), ("required", "Required"), ("unresolved", "Unresolved"), ("absent", "Nothing")):
        registry.engine(name, f"{__name__}:{target}")
        registry.discovery(name, f"{__name__}:{target}")
    registry.engine("needs-torch", "no_such_module_at_all.x:Y")
    found = Plugins.load()
    return Plugins({**found.components, **registry.components}, found.plugins, found.manager)


def engine(options: str, plugins: Plugins, env: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    text = f'[[workers]]\n[workers.engine]\nuse = "rich"\n{options}'
    return [(p.where.rpartition(":")[2], p.what) for p in check(text=text, environ=env or {}, plugins=plugins)]


def made(options: str, plugins: Plugins, env: Mapping[str, str] | None = None) -> Rich:
    config = load(text=f'[[workers]]\n[workers.engine]\nuse = "rich"\n{options}', environ=env or {}, plugins=plugins)
    return build(config.workers[0].engine, "engine", plugins, environ=env or {})


def test_every_type_is_structured(plugins: Plugins, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("s3cret\n")
    rich = made(
        f'size = 2\nratio = 1\ntoken = "file:{tmp_path}/t"\ntokens = {{ a = "env:A" }}\nmode = 3\ncolour = "blue"\npath = "/x"\npeers = [{{ host = "h" }}]\n'
        'pair = [2, "b"]\nnames = ["n"]\neither = "e"\nwait = "2m"\nanything = { x = [1] }\ninner = "plain"\nprivate = 6\n',
        plugins, {"A": "b"},
    )
    assert rich == Rich(2, 1.0, "s3cret", {"a": "b"}, 3, Colour.BLUE, Path("/x"), (Peer("h"),), (2, "b"), frozenset({"n"}), "e", timedelta(minutes=2),
                        {"x": [1]}, Use("plain"), private=6)
    assert isinstance(rich.ratio, float)


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ('size = "1"', "workers[0].engine.size must be a whole number"),
        ("size = 0", "workers[0].engine.size must be >= 1"),
        ("size = 13", "engine 'rich': thirteen is not a size"),
        ("made = 7", "engine 'rich' has no key 'made'"),
        ("_private = 7", "engine 'rich' has no key '_private'"),
        ('mode = "fats"', "mode must be one of 'fast', 'slow', 3"),
        ("mode = 3.0", "mode must be one of"),
        ('colour = "green"', "colour must be one of 'red', 'blue'"),
        ("path = 3", "path must be a path"),
        ("peers = { host = 'h' }", "peers must be an array of tables"),
        ("peers = [{ port = 2 }]", "needs 'host'"),
        ("peers = [{ host = 'h', prot = 2 }]", "has no key 'prot'"),
        ("pair = [1]", "pair must have 2 elements, it has 1"),
        ("pair = [1, 2]", "pair[1] must be a string"),
        ("either = 1.5", "either must be a whole number or a string, is 1.5"),
        ('wait = "later"', "wait must be a number of seconds"),
        ("low = 11", "must not be below low, which is 11"),
        ("low = 4\nhigh = 3", "must not be below low"),
        ('inner = "plan"', "no installed plugin provides discovery 'plan'"),
        ('inner = { use = "plain", x = 1 }', "discovery 'plain' has no key 'x'"),
        ('inner = "required"', "discovery 'required' needs 'address'"),
        ("token = 'hunter2'", "token is a secret and must not stand in the configuration"),
        ("token = 'file:/no/such/file'", "the file /no/such/file cannot be read: No such file"),
        ("token = 'env:NO_SUCH'", "the environment variable NO_SUCH is not set"),
        ("token = 'env:'", "is a secret"),
        ("token = 'env:EMPTY'", "the environment variable EMPTY is empty"),
        ("token = 'file:/dev/null'", "the file /dev/null is empty"),
        ("tokens = { a = 'hunter2' }", "tokens.a is a secret"),
    ],
)
def test_a_wrong_option_is_found(option: str, what: str, plugins: Plugins) -> None:
    found = engine(option, plugins, {"EMPTY": ""})
    ((line, said),) = found
    assert what in said
    whole_table = option in ("size = 13", "low = 11")  # refused by the constructor, not by the option's own rule
    assert line == ("2" if whole_table else str(3 + len(option.split("\n"))))


def test_a_type_that_does_not_resolve_harms_only_who_sets_it(plugins: Plugins) -> None:
    assert check(text='[[workers]]\nengine = { use = "unresolved", even = 4 }', environ={}, plugins=plugins) == []
    (problem,) = check(text='[[workers]]\nengine = { use = "unresolved", odd = 4 }', environ={}, plugins=plugins)
    assert "cannot be resolved" in problem.what


@pytest.mark.parametrize(("name", "what"), [("absent", "does not import"), ("needs-torch", "needs the module 'no_such_module_at_all', which is not installed")])
def test_a_component_that_does_not_import_is_a_problem_on_its_line(name: str, what: str, plugins: Plugins) -> None:
    text = f'[[workers]]\nengine = "{name}"\n[frontend]\nport = "x"'
    first, second = check(text=text, environ={}, plugins=plugins)
    assert what in first.what
    assert first.where.endswith(":2")
    assert "port" in second.what


def test_a_plain_class_takes_no_options_and_is_called(plugins: Plugins) -> None:
    assert isinstance(build(Use("plain"), "engine", plugins), Plain)
    with pytest.raises(ConfigError, match="no key 'x'"):
        build(Use("plain", {"x": 1}, "a.toml:3"), "engine", plugins)


def test_build_knows_the_line_of_each_option(plugins: Plugins) -> None:
    config = load(Path("a.toml"), text='[[workers]]\n[workers.engine]\nuse = "rich"\nratio = 1\nsize = "x"\n', environ={})
    with pytest.raises(ConfigError) as raised:
        build(config.workers[0].engine, "engine", plugins)
    assert [p.where for p in raised.value.problems] == ["a.toml:5"]


def test_tables_of_presets_are_structured_by_the_same_rules() -> None:
    assert structure(Peer, {"host": "h"}) == Peer("h")
    with pytest.raises(ConfigError, match=r"preset 'x'.*must be a string"):
        structure(Peer, {"host": 1}, where="preset 'x'")


def test_problems_that_a_constructor_found_keep_their_words_and_remedies(plugins: Plugins) -> None:
    found = check(text='[[workers]]\n[workers.engine]\nuse = "rich"\nsize = 14', environ={}, plugins=plugins)
    assert [(p.what, p.remedy) for p in found] == [
        ("engine 'rich': sizes.txt: fourteen is taken", "take fifteen"), ("engine 'rich': and so is twelve", ""),
    ]  # fmt: skip


# ------------------------------------------------------------------ secrets


def test_a_secret_is_itself_for_its_user_and_masked_for_everyone_else(plugins: Plugins) -> None:
    rich = made('token = "env:A"', plugins, {"A": "hunter2"})
    assert rich.token == "hunter2"
    assert isinstance(rich.token, Secret)
    for shown in (repr(rich), repr(rich.token), repr([rich.token]), repr({"a": rich}), f"{rich}"):
        assert "hunter2" not in shown
        assert "env:A" in shown


def test_a_literal_secret_appears_in_no_problem(plugins: Plugins) -> None:
    text = '[[workers]]\nengine = { use = "rich", token = "hunter2", sizee = 1, size = "hunter2" }'
    overrides = ["workers.0.engine.tokens.a=hunter2"]
    found = check(text=text, overrides=overrides, environ={"DYNAMO__WORKERS__0__ENGINE__TOKENS__B": "hunter2"}, plugins=plugins)
    assert len(found) == 5
    assert "hunter2" not in "\n".join(map(str, found))


def test_settings_show_where_a_secret_is_and_not_what_it_is(plugins: Plugins) -> None:
    listed = origins(text='[[workers]]\nengine = { use = "rich", token = "env:A" }', environ={"A": "hunter2"}, plugins=plugins)
    assert {s.name: s.value for s in listed}["workers[0].engine.token"] == "env:A"
    assert "hunter2" not in repr(listed)


# ------------------------------------------------------------------ origins


def test_every_setting_says_where_it_comes_from(plugins: Plugins) -> None:
    text = 'discovery = "memory"\n[router]\nscorers = [\n  "load",\n  { use = "turn", weight = 2 }]\n[[workers]]\nengine = { use = "rich", size = 3 }'
    listed = origins(Path("a.toml"), text=text, overrides=["workers.0.count=4"], environ={"DYNAMO__ROUTER__SEED": "5"}, plugins=plugins)
    found = {s.name: (s.value, s.origin) for s in listed}
    assert found["discovery.use"] == ("memory", "a.toml:1")
    assert found["router.scorers[0].use"] == ("load", "a.toml:4")
    assert found["router.scorers[0].weight"] == (1.0, "default")
    assert found["router.scorers[1].weight"] == (2.0, "a.toml:5")
    assert found["router.seed"] == (5, "environment variable DYNAMO__ROUTER__SEED")
    assert found["workers[0].count"] == (4, "--set workers.0.count")
    assert found["workers[0].engine.size"] == (3, "a.toml:7")
    assert found["workers[0].engine.ratio"][1].startswith("default (")
    assert found["workers[0].name"] == ("backend", "default")
    assert found["frontend.tls"] == (None, "default")


def test_the_shown_configuration_loads_to_the_same() -> None:
    text = '[frontend.tls]\ncert = "a"\nkey = "b"\n[router.prefill]\n'
    text += 'scorers = [{ use = "x", weight = 2, "odd key" = { a = [1, "\\"\\u007f"] } }]\n[[workers]]\ncount = 2\n[[workers]]\nengine = "y"'
    shown = to_toml(nested(origins(text=text, environ={})))
    assert load(text=shown, environ={}) == load(text=text, environ={})
