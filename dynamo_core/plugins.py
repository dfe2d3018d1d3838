"""List eagerly, import lazily, blame precisely.

`Plugins.load()` asks every installed distribution what it provides; nothing is imported beyond its light registration
module. `Plugins.find(kind, name).load()` imports the one component that a configuration selected.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import operator
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import attrs
import pluggy

from dynamo_core import __version__, hookspecs
from dynamo_core.errors import ConfigError, PluginError, Problem

Stability = Literal["alpha", "beta", "stable"]

KINDS: Mapping[str, str] = {
    "engine": "token in, token out (dynamo_core.engines.contract)",
    "filter": "names workers that must not serve a request (dynamo_core.routing.contract)",
    "scorer": "rates workers for a request",
    "picker": "picks a worker from the totals",
    "policy": "a whole policy, or a named preset of a stack",
    "facts": "provides columns of facts about workers",
    "pool_strategy": "which pool serves a request (dynamo_global_router.contract)",
    "discovery": "leased key/value store with prefix watch (dynamo_core.discovery.contract)",
    "event_plane": "publish and subscribe with sequence numbers (dynamo_core.events.contract)",
    "request_plane": "streams to named endpoints (dynamo_core.transport.contract)",
    "preprocessor": "a wrapper around every request (dynamo_core.pipeline.around)",
    "tool_parser": "finds tool calls in generated text, incrementally",
    "reasoning_parser": "separates reasoning from the answer, incrementally",
    "authenticator": "who may call (dynamo_core.frontend.contract)",
    "rate_limiter": "how much a caller may use (dynamo_core.frontend.contract)",
    "http_server": "runs the ASGI application",
    "routes": "more HTTP surface of the frontend (dynamo_core.frontend.extensions)",
    "middleware": "ASGI middleware of the frontend (dynamo_core.frontend.extensions)",
    "planner": "decides how many workers there are",
    "connector": "where the planner scales",
    "predictor": "what load the planner expects",
    "planner_stage": "how the planner decides",
    "cli": "one more `dynamo` command",
}

KNOWN_ELSEWHERE: Mapping[tuple[str, str], str] = {
    ("engine", "global-router"): "dynamo-global-router",
    ("engine", "llamacpp"): "dynamo-llamacpp",
    ("engine", "openai"): "dynamo-openai",
    ("engine", "sim"): "dynamo-sim",
    ("engine", "vllm"): "dynamo-vllm",
    ("engine", "sglang"): "dynamo-sglang",
    ("engine", "trtllm"): "dynamo-trtllm",
    ("discovery", "etcd"): "dynamo-etcd",
    ("connector", "kubernetes"): "dynamo-kubernetes",
    ("connector", "local"): "dynamo-planner",
    ("connector", "virtual"): "dynamo-planner",
    ("connector", "global"): "dynamo-planner",
    ("discovery", "kubernetes"): "dynamo-kubernetes",
    ("discovery", "nats"): "dynamo-nats",
    ("event_plane", "nats"): "dynamo-nats",
    ("request_plane", "nats"): "dynamo-nats",
    ("policy", "kv"): "dynamo-kv-router",
    ("pool_strategy", "grid"): "dynamo-global-router",
    ("pool_strategy", "predicted"): "dynamo-global-router",
    ("policy", "kv-plus"): "dynamo-kv-router",
    ("scorer", "kv-overlap"): "dynamo-kv-router",
    ("http_server", "uvicorn"): "dynamo-core[uvicorn]",
    ("planner", "standard"): "dynamo-planner",
    ("planner", "global"): "dynamo-planner",
}
"""Components of distributions that may not be installed, so that the error can say what to install."""


@attrs.frozen
class Deprecated:
    since: str
    removal: str
    use: str


@attrs.frozen
class Plugin:
    """One entry point of one distribution, or the built-in set."""

    name: str
    version: str = ""
    distribution: str = ""
    problem: str | None = None
    """Why it was left out, if it was."""
    path: str = attrs.field(default="", eq=False)
    """The directory that it is installed in."""

    def __str__(self) -> str:
        return f"{self.distribution or self.name} {self.version}".strip()


@attrs.frozen
class Component:
    kind: str
    name: str
    target: str
    """`package.module:Class`."""
    plugin: Plugin
    summary: str = ""
    stability: Stability = "stable"
    deprecated: Deprecated | None = None

    def load(self) -> Any:
        """Import the component. :raises PluginError: names the plugin, and what is missing."""
        module, _, attribute = self.target.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
            return found
        except ModuleNotFoundError as e:
            raise PluginError(str(self.plugin), f"{self.kind} {self.name!r} needs the module {e.name!r}, which is not installed") from e
        except Exception as e:
            raise PluginError(str(self.plugin), f"{self.kind} {self.name!r} ({self.target}) does not import: {type(e).__name__}: {e}") from e


class Registry:
    """What `dynamo_register` receives: one call per component. Remembers which plugin is calling."""

    def __init__(self) -> None:
        self.components: dict[tuple[str, str], Component] = {}
        self.plugin = Plugin("?")

    def add(self, kind: str, name: str, target: str, *, summary: str = "", stability: Stability = "stable", deprecated: Deprecated | None = None) -> None:
        """:raises PluginError: an unknown kind, a malformed target, or a name that is taken."""
        if kind not in KINDS:
            close = difflib.get_close_matches(kind, KINDS, 1)
            raise PluginError(str(self.plugin), f"there is no kind {kind!r}" + (f"; did you mean {close[0]!r}?" if close else f"; kinds: {', '.join(KINDS)}"))
        if target.count(":") != 1:
            raise PluginError(str(self.plugin), f"{kind} {name!r}: the target {target!r} is not of the form 'package.module:Class'")
        if (taken := self.components.get((kind, name))) is not None:
            raise PluginError(str(self.plugin), f"{kind} {name!r} is already provided by {taken.plugin}")
        self.components[kind, name] = Component(kind, name, target, self.plugin, summary, stability, deprecated)

    def engine(self, name: str, target: str, **about: Any) -> None:
        self.add("engine", name, target, **about)

    def filter(self, name: str, target: str, **about: Any) -> None:
        self.add("filter", name, target, **about)

    def scorer(self, name: str, target: str, **about: Any) -> None:
        self.add("scorer", name, target, **about)

    def picker(self, name: str, target: str, **about: Any) -> None:
        self.add("picker", name, target, **about)

    def policy(self, name: str, target: str, **about: Any) -> None:
        self.add("policy", name, target, **about)

    def facts(self, name: str, target: str, **about: Any) -> None:
        self.add("facts", name, target, **about)

    def discovery(self, name: str, target: str, **about: Any) -> None:
        self.add("discovery", name, target, **about)

    def event_plane(self, name: str, target: str, **about: Any) -> None:
        self.add("event_plane", name, target, **about)

    def request_plane(self, name: str, target: str, **about: Any) -> None:
        self.add("request_plane", name, target, **about)

    def http_server(self, name: str, target: str, **about: Any) -> None:
        self.add("http_server", name, target, **about)

    def preprocessor(self, name: str, target: str, **about: Any) -> None:
        self.add("preprocessor", name, target, **about)

    def routes(self, name: str, target: str, **about: Any) -> None:
        self.add("routes", name, target, **about)

    def middleware(self, name: str, target: str, **about: Any) -> None:
        self.add("middleware", name, target, **about)

    def cli(self, name: str, target: str, **about: Any) -> None:
        self.add("cli", name, target, **about)


@attrs.define
class Plugins:
    """Everything installed, by kind and name."""

    components: Mapping[tuple[str, str], Component]
    plugins: list[Plugin]
    manager: pluggy.PluginManager

    @classmethod
    def load(cls, disabled: Iterable[str] = ()) -> Plugins:
        """Ask the built-in set and every entry point of group `dynamo`. A bad plugin is left out, with its reason kept."""
        off = {*disabled, *filter(None, os.environ.get("DYNAMO_DISABLED_PLUGINS", "").replace(",", " ").split())}
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        registry = Registry()
        core = Plugin("builtin", __version__, "dynamo-core", path=os.path.dirname(os.path.dirname(__file__)))
        found = [_register(manager, registry, core, "dynamo_core.builtin")]
        for entry in sorted(importlib.metadata.entry_points(group=hookspecs.PROJECT), key=lambda e: e.name):
            plugin = _describe(entry)
            if off & {entry.name, plugin.distribution}:
                plugin = attrs.evolve(plugin, problem="disabled by configuration")
            elif plugin.problem is None:
                plugin = _register(manager, registry, plugin, entry.value)
            found.append(plugin)
        return cls(registry.components, found, manager)

    def of_kind(self, kind: str) -> dict[str, Component]:
        return {name: component for (k, name), component in self.components.items() if k == kind}

    def find(self, kind: str, name: str, *, where: str = "", source: str = "") -> Component:
        """:raises ConfigError: nobody provides it; the hint says what is close, or what to install."""
        if (component := self.components.get((kind, name))) is not None:
            return component
        known = self.of_kind(kind)
        spoken = kind.replace("_", " ")
        if package := KNOWN_ELSEWHERE.get((kind, name)):
            left_out = next((p for p in self.plugins if p.problem and p.distribution == package), None)
            if left_out:
                raise ConfigError(Problem(f"{spoken} {name!r} is provided by {left_out}, which was left out: {left_out.problem}", where, source))
            what = f"{spoken} {name!r} is provided by {package}, which is not installed"
            raise ConfigError(Problem(what, where, source, f"install it: pip install {package}"))
        elsewhere = [other for k, other in KNOWN_ELSEWHERE if k == kind and other not in known]
        if others := sorted(k.replace("_", " ") for k, other in self.components if other == name):
            remedy = f"{name!r} is the name of a {' and of a '.join(others)}"
        elif close := difflib.get_close_matches(name, [*known, *elsewhere], 1):
            source_of = f"from {known[close[0]].plugin}" if close[0] in known else f"pip install {KNOWN_ELSEWHERE[kind, close[0]]}"
            remedy = f"did you mean {close[0]!r} ({source_of})?"
        else:
            remedy = f"installed: {', '.join(sorted(known)) or 'none'}"
        if left := "; ".join(f"{plugin}, {plugin.problem}" for plugin in self.plugins if plugin.problem):
            remedy += f" (left out: {left})"
        raise ConfigError(Problem(f"no installed plugin provides {spoken} {name!r}", where, source, remedy))


def _register(manager: pluggy.PluginManager, registry: Registry, plugin: Plugin, module: str) -> Plugin:
    registry.plugin = plugin
    before = dict(registry.components)
    loaded = None
    try:
        if (namesake := manager.get_plugin(plugin.name)) is not None:
            raise PluginError(str(plugin), f"another plugin has the entry point {plugin.name!r}: {getattr(namesake, '__name__', namesake)}")
        loaded = importlib.import_module(module.partition(":")[0])
        manager.register(loaded, plugin.name)
        manager.check_pending()
        caller = manager.subset_hook_caller("dynamo_register", [p for p in manager.get_plugins() if p is not loaded])
        caller(registry=registry)
    except (Exception, SystemExit) as e:
        registry.components.clear()
        registry.components.update(before)
        if loaded is not None and manager.get_plugin(plugin.name) is loaded:
            manager.unregister(name=plugin.name)
        if plugin.name == "builtin":
            raise
        return attrs.evolve(plugin, problem=f"{type(e).__name__}: {e}")
    return plugin


def _describe(entry: importlib.metadata.EntryPoint) -> Plugin:
    if entry.dist is None:
        return Plugin(entry.name)
    path = str(entry.dist.locate_file(""))
    try:
        about = entry.dist.metadata
        plugin = Plugin(entry.name, about["Version"] or "", about["Name"] or "", path=path)
        return attrs.evolve(plugin, problem=_core_mismatch(about.get_all("Requires-Dist") or ()))
    except Exception as e:
        return Plugin(entry.name, problem=f"its package metadata cannot be read: {type(e).__name__}: {e}", path=path)


def _core_mismatch(requires: Iterable[str]) -> str | None:
    """Why this core is not the one that the plugin was made for."""
    for line in requires:
        if not (named := re.match(r"dynamo[-_.]core(?![\w.-])\s*", line, re.IGNORECASE)):
            continue
        plain = _PLAIN_RANGE.fullmatch(line, named.end())
        if not (plain and _PLAIN_VERSION.fullmatch(__version__)):
            from packaging.requirements import Requirement  # a fifth of the time of `dynamo --help`, for rare forms only

            range_ = Requirement(line).specifier
            inside = range_.contains(__version__, prereleases=True)
        else:
            range_ = plain[0]
            inside = all(_COMPARE[op](_number(__version__), _number(bound)) for op, bound in _BOUND.findall(range_))
        if not inside:
            return f"needs dynamo-core{range_}, this is {__version__}"
    return None


_PLAIN_VERSION = re.compile(r"\d+(\.\d+)*")
_BOUND = re.compile(r"(>=|<=|>|<)\s*(\d+(?:\.\d+)*)")
_PLAIN_RANGE = re.compile(rf"{_BOUND.pattern}(\s*,\s*{_BOUND.pattern})*")
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def _number(version: str) -> list[int]:
    """Comparable: `1.0` is `1`."""
    parts = [int(part) for part in version.split(".")]
    while len(parts) > 1 and parts[-1] == 0:
        parts.pop()
    return parts
