"""Every mistake is found on its line, and the remedy is the right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_core.config import Config, check, load
from dynamo_core.errors import ConfigError, Problem
from dynamo_core.plugins import KINDS, Plugins, Registry

NAME = Path("stack.toml")

# text; line; part of what is said; part of the hint
MISTAKES: list[tuple[str, int, str, str]] = [
    ('namespce = "a"', 1, "no key 'namespce'", "'namespace'"),
    ('namespace = "A B"', 1, "namespace must match regex", ""),
    ("namespace = 5", 1, "namespace must be a string, is 5", 'write "5", in quotes'),
    ("namespace = true", 1, "namespace must be a string, is true", 'write "true", in quotes'),
    ("\n\nlease_ttl = 0", 3, "lease_ttl must be > 0", ""),
    ('lease_ttl = "soon"', 1, "lease_ttl must be a number of seconds", "10m"),
    ("lease_ttl = true", 1, "lease_ttl must be a number", ""),
    ("lease_ttl = nan", 1, "lease_ttl must be > 0", ""),
    ("[frontend]\nprot = 1", 2, "[frontend] has no key 'prot'", "'port'"),
    ("[frontent]\nport = 1", 1, "no key 'frontent'", "'frontend'"),
    ("[frontend]\nport = 70000", 2, "frontend.port must be <= 65535", ""),
    ("[frontend]\nport = -1", 2, "frontend.port must be >= 0", ""),
    ('[frontend]\nport = "8000"', 2, 'frontend.port must be a whole number, is the string "8000"', "write 8000, without quotes"),
    ("[frontend]\nport = 8000.0", 2, "frontend.port must be a whole number, is 8000.0", ""),
    ('[frontend]\ndebug_routes = "false"', 2, "frontend.debug_routes must be true or false", "write false, without quotes"),
    ("[frontend]\ndebug_routes = 0", 2, "frontend.debug_routes must be true or false, is 0", ""),
    ("[frontend]\nprocesses = 0", 2, "frontend.processes must be >= 1", ""),
    ("frontend = 8000", 1, "frontend must be a table, is 8000", ""),
    ("frontend.prot = 8000", 1, "no key 'prot'", "'port'"),
    ("frontend = { port = 1, prot = 2 }", 1, "no key 'prot'", "'port'"),
    ("[frontend]\nmax-requests = 3", 2, "no key 'max-requests'", "'max_requests'"),
    ("[frontend]\nPort = 3", 2, "no key 'Port'", "'port'"),
    ('[frontend]\nhttp_server = "hypercron"', 2, "no installed plugin provides http server 'hypercron'", "'hypercorn'"),
    ('[frontend.tls]\ncert = "a.pem"', 1, "[frontend.tls] needs 'key'", ""),
    ('[frontend.tls]\ncert = "a.pem"\nkey = 5', 3, "frontend.tls.key must be a path", "in quotes"),
    ('discovery = "fil"', 1, "provides discovery 'fil'", "'file'"),
    ("discovery = 5", 1, "discovery must name a discovery", 'use = "NAME"'),
    ('discovery = ["file"]', 1, "discovery must name a discovery, is an array", ""),
    ('discovery = ""', 1, "must be the name of a discovery", ""),
    ('[discovery]\nuse = "etcd"', 2, "discovery 'etcd' is provided by dynamo-etcd, which is not installed", "pip install dynamo-etcd"),
    ("[discovery]\nuse = 5", 2, "discovery.use must be the name of a discovery", ""),
    ('[router]\nscorer = ["load"]', 2, "[router] has no key 'scorer'", "'scorers'"),
    ('[router]\nscorers = "load"', 2, "router.scorers must be an array", "[ ]"),
    ('[router]\nscorers = [\n  "load",\n  # a comment with a ] in it\n  { use = "laod" },\n]', 5, "scorer 'laod'", "'load'"),
    ('[router]\nscorers = [{ weight = 1 }]', 2, "router.scorers[0] does not say which scorer to use", 'use = "NAME"'),
    ('[router]\nscorers = [{ name = "load" }]', 2, "router.scorers[0] does not say which scorer to use", ""),
    ('[router]\nscorers = [{ use = "load", weight = "2" }]', 2, "router.scorers[0].weight must be a number", "write 2, without quotes"),
    ('[router]\nscorers = [{ use = "load", weight = inf }]', 2, "weight must be finite", ""),
    ('[[router.scorers]]\nuse = "load"\n[[router.scorers]]\nuse = "turn"\nwieght = 2', 5, "scorer 'turn' has no key 'wieght'", ""),
    ('[router]\npicker = { use = "softmax", temprature = 1 }', 2, "picker 'softmax' has no key 'temprature'", "'temperature'"),
    ('[router]\npicker = { use = "softmax", temperature = -1 }', 2, "temperature must be >= 0", ""),
    ('[router]\ntemperature = "hot"', 2, "router.temperature must be a number", ""),
    ('[router]\nuse = "least-loadet"', 2, "policy 'least-loadet'", "'least-loaded'"),
    ('[router]\nuse = "random"\nscorers = ["load"]', 3, "names the policy 'random' and has scorers of its own", "keep either"),
    ('[router]\nuse = "random"\npicker = "best"', 3, "has picker of its own", "keep either"),
    ('[router]\npicker = "best"\ntemperature = 1', 3, "short for the picker 'softmax'", "keep one"),
    ('[router.prefill]\nuse = "random"\n[router.prefill.decode]\nuse = "random"', 3, "roles do not nest", "[router.decode]"),
    ('[router.prefil]\nuse = "random"', 1, "[router] has no key 'prefil'", "'prefill'"),
    ('[workers]\ncount = 2', 1, "workers must be an array of tables", "[[workers]]"),
    ('[[workers]]\ncount = "2"', 2, "workers[0].count must be a whole number", "write 2"),
    ('[[workers]]\ncount = 1\n\n[[workers]]\ncuont = 1', 5, "[workers[1]] has no key 'cuont'", "'count'"),
    ('[[workers]]\nrole = "prefil"', 2, "workers[0].role must be one of", "'prefill'"),
    ('[[workers]]\nengine = { use = "ecco" }', 2, "engine 'ecco'", "'echo'"),
    ('[[workers]]\n[workers.engine]\nuse = "vllm"', 3, "engine 'vllm' is provided by dynamo-vllm", "pip install dynamo-vllm"),
    ('[[workers]]\nengine = "vlm"', 2, "provides engine 'vlm'", "did you mean 'vllm' (pip install dynamo-vllm)?"),
    ('[router]\nscorers = ["ready"]', 2, "provides scorer 'ready'", "'ready' is the name of a filter"),
    ('[router]\npicker = "zzz"', 2, "provides picker 'zzz'", "installed: best, power-of-two"),
    ('[observability]\nlog_level = "inof"', 2, "log_level must be one of", "'info'"),
    ("[observability]\ntrace_ratio = 2", 2, "trace_ratio must be <= 1", ""),
    ('[plugins]\ndisabled = "a"', 2, "plugins.disabled must be an array", "[ ]"),
    ("[plugins]\ndisabled = [\n  1\n]", 3, "plugins.disabled[0] must be a string", '"1"'),
    ("[frontend]\nport = 9\n[status]\nport = 9", 4, "status.port and frontend.port are both 9", ""),
    ('discovery = "memory"\n[frontend]\nprocesses = 2', 3, "discovery 'memory' stays inside one process", ""),
    ("[frontend]\nport = \n", 2, "this is not TOML", ""),
    ('[frontend]\nport = 1\nport = 2', 3, "this is not TOML", ""),
    ('namespace = "a', 1, "this is not TOML", ""),
    ("[frontend\nport = 1", 1, "this is not TOML", ""),
    ("migration.limit = 1979-05-27", 1, "migration.limit must be a whole number", ""),
]


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    """The core alone, so that what else is installed here changes nothing."""
    from dynamo_core import builtin

    registry = Registry()
    builtin.dynamo_register(registry)
    found = Plugins.load()
    return Plugins(registry.components, found.plugins[:1], found.manager)


def problems(text: str, plugins: Plugins | None) -> list[Problem]:
    return check(NAME, text=text, environ={}, plugins=plugins)


@pytest.mark.parametrize(("text", "line", "what", "hint"), MISTAKES)
def test_a_mistake_is_found_on_its_line_with_its_remedy(text: str, line: int, what: str, hint: str, plugins: Plugins) -> None:
    found = problems(text, plugins)
    assert len(found) == 1, "\n".join(map(str, found))
    assert what in found[0].what
    assert found[0].where == f"stack.toml:{line}"
    assert found[0].source == (text.split("\n")[line - 1])
    assert hint in found[0].remedy
    assert bool(hint) <= bool(found[0].remedy)


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(plugins: Plugins) -> None:
    text = '[frontend]\nprot = 1\nport = -1\n[router]\nuse = "x"\n[[workers]]\ncount = -2\nengine = "ecco"\n'
    with pytest.raises(ConfigError) as raised:
        load(NAME, text=text, environ={}, plugins=plugins)
    assert [problem.where for problem in raised.value.problems] == [f"stack.toml:{n}" for n in (2, 3, 5, 7, 8)]
    assert "   2 | prot = 1" in str(raised.value)


def test_a_missing_package_hides_no_other_mistake(plugins: Plugins) -> None:
    found = problems('[discovery]\nuse = "etcd"\nendpoints = ["a"]\n[frontend]\nport = "x"\n', plugins)
    assert [(p.where, "dynamo-etcd" in p.what) for p in found] == [("stack.toml:2", True), ("stack.toml:5", False)]


def test_names_of_components_are_not_checked_without_plugins() -> None:
    assert problems('discovery = { use = "anything", goes = 1 }', None) == []


def test_a_syntax_error_has_a_column() -> None:
    assert "column 8" in problems("[frontend]\nport = \n", None)[0].what


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "stack.toml").write_text("")
    (found,) = check(tmp_path / "stak.toml", environ={})
    assert "No such file" in found.what
    assert str(tmp_path / "stack.toml") in found.remedy


def test_a_directory_bytes_and_another_extension_are_problems(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(b'\nnamespace = "\xff"')
    (tmp_path / "dir.toml").mkdir()
    assert "0xff is not UTF-8" in check(tmp_path / "bad.toml", environ={})[0].what
    assert check(tmp_path / "bad.toml", environ={})[0].where.endswith(":2")
    assert "directory" in check(tmp_path / "dir.toml", environ={})[0].what
    assert ".toml, .yaml or .yml" in check(tmp_path / "stack.json", environ={})[0].what


def test_nothing_at_all_is_a_configuration() -> None:
    assert load(environ={}) == Config() == load(text="", environ={})


def test_durations_are_numbers_or_strings_with_a_unit() -> None:
    frontend = load(text='[frontend]\nrequest_timeout = "10m"\ndrain_timeout = "500ms"\nfirst_token_timeout = 3\n', environ={}).frontend
    assert (frontend.request_timeout, frontend.drain_timeout, frontend.first_token_timeout) == (600.0, 0.5, 3.0)


def test_a_name_is_short_for_a_table_with_use() -> None:
    short = load(text='discovery = "memory"\n[router]\nscorers = ["load"]\npicker = "best"', environ={})
    long = load(text='discovery = { use = "memory" }\n[router]\nscorers = [{ use = "load" }]\npicker = { use = "best" }', environ={})
    assert short == long


def test_options_without_use_go_to_the_default_component() -> None:
    discovery = load(text='[discovery]\npath = "/x"', environ={}).discovery
    assert (discovery.name, discovery.options) == ("file", {"path": "/x"})


def test_kinds_in_the_schema_exist() -> None:
    from dynamo_core.config.fields import tables

    assert {field.kind for _, _, listed in tables() for field in listed if field.kind} <= set(KINDS)
