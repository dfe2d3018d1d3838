from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated, Any

import attrs
from cyclopts import Parameter

from dynamo_core.errors import ConfigError, PluginError, Problem
from dynamo_core.plugins import KINDS, Component, Plugin, Plugins

Verdict = str | None
"""`None`: done. Otherwise what is missing."""

_HEAVY = ("httpx", "numpy", "sglang", "tensorrt_llm", "torch", "transformers", "vllm", "xllamacpp", "zmq")
_LIGHT = f"""
import sys, importlib
before = set(sys.modules)
importlib.import_module(sys.argv[1])
heavy = {{m.partition(".")[0] for m in set(sys.modules) - before}} & {set(_HEAVY)}
loaded = [m for m in sys.argv[2:] if m in sys.modules]
print(", ".join(sorted(heavy) + loaded))
"""


@attrs.frozen
class Subject:
    """The plugin that is looked at."""

    plugin: Plugin
    components: list[Component]
    module: str
    project: Path | None
    """Its source directory, where it is known."""
    requires: list[str]
    readme: str


def plugin_check(what: Annotated[str, Parameter(name="DIR_OR_NAME", help="A project directory, or the name of an installed plugin.")], /) -> int:
    """Say how far a plugin has come, and what is missing. Exit code 1 when the first rung is not complete."""
    subject = _subject(what)
    bronze = True
    print(f"{subject.plugin}")
    for tier, rules in LADDER.items():
        for name, rule in rules.items():
            missing = rule(subject)
            bronze = bronze and (missing is None or tier != "bronze")
            print(f"  {tier:<7} {'ok  ' if missing is None else 'todo'} {name}" + (f": {missing}" if missing else ""))
    return 0 if bronze else 1


def _subject(what: str) -> Subject:
    path = Path(what)
    project = path if (path / "pyproject.toml").is_file() else None
    name = what
    if project is not None:
        try:
            name = tomllib.loads((project / "pyproject.toml").read_text("utf-8"))["project"]["name"]
        except (tomllib.TOMLDecodeError, KeyError, UnicodeDecodeError) as e:
            raise ConfigError(Problem(f"is not a project: {e}", str(project / "pyproject.toml"))) from e
    found = Plugins.load()
    plugin = next((p for p in found.plugins if name in (p.name, p.distribution)), None)
    if plugin is None:
        remedy = f"install it first: pip install -e {what}" if project else f"installed: {', '.join(p.name for p in found.plugins)}"
        raise ConfigError(Problem(f"no plugin {name!r} is installed", remedy=remedy))
    try:
        dist = distribution(plugin.distribution)
    except PackageNotFoundError as e:
        raise ConfigError(Problem(f"{plugin} has no package metadata")) from e
    entry = next((e.value for e in dist.entry_points if e.group == "dynamo" and e.name == plugin.name), "dynamo_core.builtin")
    about: Any = dist.metadata
    readme = str(about.get_payload() or about.get("Description") or "")
    return Subject(plugin, [c for c in found.components.values() if c.plugin == plugin], entry.partition(":")[0], project, dist.requires or [], readme)


# ------------------------------------------------------------------ rules


def _registers(s: Subject) -> Verdict:
    if s.plugin.problem:
        return s.plugin.problem
    return None if s.components else "it announces no component: implement dynamo_register"


def _light(s: Subject) -> Verdict:
    targets = [c.target.partition(":")[0] for c in s.components]
    done = subprocess.run([sys.executable, "-c", _LIGHT, s.module, *targets], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return f"{s.module} does not import: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return f"importing {s.module} also imports {done.stdout.strip()}" if done.stdout.strip() else None


def _loads(s: Subject) -> Verdict:
    for component in s.components:
        try:
            component.load()
        except PluginError as e:
            return str(e)
    return None


def _configured_strictly(s: Subject) -> Verdict:
    loose = [c.name for c in s.components if c.kind != "cli" and not _is_attrs(c)]
    return f"not an attrs class, so it takes no options: {', '.join(loose)}" if loose else None


def _is_attrs(component: Component) -> bool:
    try:
        return attrs.has(component.load())
    except PluginError:
        return False


def _summaries(s: Subject) -> Verdict:
    bare = [c.name for c in s.components if not c.summary]
    return f"without a summary: {', '.join(bare)}" if bare else None


def _range(s: Subject) -> Verdict:
    from packaging.requirements import Requirement

    for requirement in map(Requirement, s.requires):
        if requirement.name.replace("_", "-") == "dynamo-core" and requirement.marker is None:
            bounded = any(spec.operator in ("<", "<=", "==", "~=") for spec in requirement.specifier)
            return None if bounded else "the dependency on dynamo-core has no upper bound, such as dynamo-core>=0.1,<1"
    return "it does not depend on dynamo-core"


def _readme(s: Subject) -> Verdict:
    text = (s.project / "README.md").read_text("utf-8") if s.project and (s.project / "README.md").is_file() else s.readme
    missing = [c.name for c in s.components if c.kind in KINDS and c.name not in text]
    return ("it does not mention " + ", ".join(missing) if text.strip() else "there is none") if missing or not text.strip() else None


def _contract_tests(s: Subject) -> Verdict:
    if s.project is None:
        return "unknown: give the project's directory"
    tests = list((s.project / "tests").glob("**/test_*.py"))
    if not any("dynamo_core.contracts" in test.read_text("utf-8") for test in tests):
        return "no test inherits a contract of dynamo_core.contracts"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=s.project, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"the tests fail: {(done.stdout.strip().splitlines() or ['?'])[-1]}"


def _typed(s: Subject) -> Verdict:
    if s.project is None:
        return "unknown: give the project's directory"
    return None if list(s.project.glob("src/*/py.typed")) else "no py.typed in the package"


def _stable(s: Subject) -> Verdict:
    young = [f"{c.name} ({c.stability})" for c in s.components if c.stability != "stable"]
    return ", ".join(young) or None


LADDER: dict[str, dict[str, Callable[[Subject], Verdict]]] = {
    "bronze": {
        "registers its components": _registers,
        "entry point imports nothing heavy": _light,
        "components import": _loads,
        "passes its contract tests": _contract_tests,
        "dependency range on dynamo-core": _range,
    },
    "silver": {"strict options": _configured_strictly, "README names every component": _readme, "summaries": _summaries},
    "gold": {"typed": _typed, "stable": _stable},
}
