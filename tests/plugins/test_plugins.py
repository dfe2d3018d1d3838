"""Listing imports nothing heavy, a bad plugin hurts only itself, and every blame names the culprit."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dynamo_core import __version__
from dynamo_core.errors import ConfigError, PluginError
from dynamo_core.plugins import Deprecated, Plugin, Plugins, Registry

Install = Callable[..., str]
COUNT = itertools.count()

GOOD = """
from dynamo_core import hookimpl

@hookimpl
def dynamo_register(registry):
    registry.scorer("acme", "{module}.heavy:Acme", summary="acme's")
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution with one entry point of group `dynamo` on the path, as an installer would."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def do(name: str, code: str = GOOD, *, requires: tuple[str, ...] = ("dynamo-core>=0.1",), entry: str = "", metadata: str = "") -> str:
        module = f"{name.replace('-', '_')}_package_{next(COUNT)}"
        package = tmp_path / module
        package.mkdir()
        (package / "__init__.py").write_text(code.replace("{module}", module))
        (package / "heavy.py").write_text("class Acme: ...\n")
        info = tmp_path / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        about = metadata or f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n" + "".join(f"Requires-Dist: {r}\n" for r in requires)
        (info / "METADATA").write_text(about)
        (info / "entry_points.txt").write_text(f"[dynamo]\n{entry or name} = {module}\n")
        importlib.invalidate_caches()
        return module

    return do


def problem(name: str) -> str:
    return next(p.problem or "" for p in Plugins.load().plugins if p.name == name)


def test_listing_imports_no_component(install: Install) -> None:
    heavy = install("acme-one") + ".heavy"
    before = set(sys.modules)
    plugins = Plugins.load()
    assert plugins.components["scorer", "acme"].plugin == Plugin("acme-one", "1.2", "acme-one")
    assert heavy not in set(sys.modules) - before
    assert plugins.components["scorer", "acme"].load().__name__ == "Acme"
    assert heavy in sys.modules


def test_a_plugin_says_where_it_is_installed(install: Install, tmp_path: Path) -> None:
    install("acme-where")
    assert next(p.path for p in Plugins.load().plugins if p.name == "acme-where").rstrip("/") == str(tmp_path)


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("import no_such_module_here", "No module named 'no_such_module_here'"),
        ("def (", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit"),
        (GOOD.replace("scorer(", "add('scorrer', "), "there is no kind 'scorrer'; did you mean 'scorer'?"),
        (GOOD.replace("heavy:Acme", "heavy"), "is not of the form 'package.module:Class'"),
        (GOOD.replace('"acme"', '"load"'), "scorer 'load' is already provided by dynamo-core"),
        (GOOD.replace("dynamo_register", "dynamo_registr"), "dynamo_registr"),
        (GOOD + "    raise ValueError('late')", "ValueError: late"),
    ],
)
def test_a_bad_plugin_is_left_out_with_its_reason_and_the_others_work(install: Install, code: str, what: str) -> None:
    install("a-good")
    install("b-bad", code.replace('"acme"', '"acme-b"'))
    install("c-good", GOOD.replace('"acme"', '"acme-c"'))
    assert what in problem("b-bad")
    components = Plugins.load().components
    assert ("scorer", "acme") in components
    assert ("scorer", "acme-c") in components
    assert ("scorer", "acme-b") not in components
    assert components["scorer", "load"].plugin.name == "builtin"


def test_two_plugins_of_one_name_blame_the_second_and_keep_the_first(install: Install) -> None:
    install("one-dist", entry="same")
    install("two-dist", GOOD.replace('"acme"', '"other"'), entry="same")
    plugins = Plugins.load()
    same = [p for p in plugins.plugins if p.name == "same"]
    assert sorted(bool(p.problem) for p in same) == [False, True]
    assert len({("scorer", "acme"), ("scorer", "other")} & set(plugins.components)) == 1
    assert plugins.manager.get_plugin("same") is not None


def test_a_plugin_for_another_core_is_left_out(install: Install) -> None:
    install("acme-old", requires=("numpy", "dynamo_core<0.1",))
    assert problem("acme-old").startswith("needs dynamo-core<0.1, this is ")


SPECIFIERS = [">=0.1", ">=0.1.0,<1", ">0.1", "<0.1.0", "<=0.1", "<0.1.0.1", ">= 0.0.9 , < 0.2", "==0.1.*", "~=0.1", "!=0.1.0", ">=0.1rc1", ">=2",
              "[testing]>=0.1", " (>=0.2)", "", "[x]"]


@pytest.mark.parametrize("specifier", SPECIFIERS)
def test_version_ranges_mean_what_they_mean_to_installers(specifier: str, install: Install) -> None:
    install("acme-range", requires=(f"dynamo-core{specifier}",))
    fits = Requirement(f"dynamo-core{specifier}").specifier.contains(__version__, prereleases=True)
    assert (problem("acme-range") == "") is fits


def test_another_package_with_a_similar_name_is_not_the_core(install: Install) -> None:
    install("acme-similar", requires=("dynamo-core-extras>=99", "dynamo.corex>=99"))
    assert problem("acme-similar") == ""


@pytest.mark.parametrize("requires", [("dynamo-core>=",), ("dynamo-core !!",)])
def test_unreadable_requirements_leave_the_plugin_out(install: Install, requires: tuple[str, ...]) -> None:
    install("acme-odd", requires=requires)
    assert "metadata cannot be read" in problem("acme-odd")
    assert "acme" not in Plugins.load().of_kind("scorer")


@pytest.mark.parametrize("name", ["acme-entry", "acme-dist"])
def test_a_plugin_is_disabled_by_entry_point_or_distribution(install: Install, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme-dist", entry="acme-entry")
    assert ("scorer", "acme") not in Plugins.load(disabled=[name]).components
    monkeypatch.setenv("DYNAMO_DISABLED_PLUGINS", f"other, {name}")
    assert problem("acme-entry") == "disabled by configuration"


def test_a_component_that_does_not_import_names_its_plugin(install: Install) -> None:
    install("acme-lazy", GOOD.replace("heavy:Acme", "heavy:Acne"))
    with pytest.raises(PluginError, match=r"acme-lazy 1.2: scorer 'acme' .* does not import"):
        Plugins.load().components["scorer", "acme"].load()


def test_what_nobody_provides_suggests_what_is_close(install: Install) -> None:
    install("acme-close")
    with pytest.raises(ConfigError, match=r"no installed plugin provides scorer 'acm'(.|\n)*did you mean 'acme' \(from acme-close 1.2\)"):
        Plugins.load().find("scorer", "acm", where="a.toml:1", source="x")


def test_a_component_that_nobody_provides_may_be_that_of_a_plugin_that_was_left_out(install: Install) -> None:
    install("acme-broken", "raise RuntimeError('boom')")
    with pytest.raises(ConfigError, match=r"no installed plugin provides scorer 'broken'(.|\n)*\(left out: acme-broken 1\.2, RuntimeError: boom\)"):
        Plugins.load().find("scorer", "broken")


def test_what_a_left_out_plugin_provides_says_so(install: Install) -> None:
    install("dynamo-etcd", "raise RuntimeError('boom')")
    with pytest.raises(ConfigError, match=r"provided by dynamo-etcd 1\.2, which was left out: RuntimeError: boom"):
        Plugins.load().find("discovery", "etcd")


def test_stability_and_deprecation_are_data() -> None:
    registry = Registry()
    registry.scorer("old", "a:B", stability="beta", deprecated=Deprecated("1.0", "2.0", "new"))
    assert registry.components["scorer", "old"].stability == "beta"
    assert registry.components["scorer", "old"].deprecated == Deprecated("1.0", "2.0", "new")
