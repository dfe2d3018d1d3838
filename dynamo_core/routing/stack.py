"""From a `[router]` table to a stack: presets expanded, components built, every needed fact provided, or every reason why not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from dynamo_core.cards import Role
from dynamo_core.config.schema import Queue, Router, Use
from dynamo_core.errors import ConfigError, PluginError, Problem
from dynamo_core.plugins import Component, Plugins
from dynamo_core.routing.contract import Fact, Policy, Preset
from dynamo_core.routing.decide import Choice, Part, Stack, protocol_of
from dynamo_core.routing.facts import BOOKED_PREFILL_TOKENS, MAX_BATCHED_TOKENS

SAFETY = ("ready", "not-failed", "pinned", "taints")
"""Filters of every stack: what callers demand, and who can serve at all. They come first unless the configuration names them elsewhere."""

QUEUE_NEEDS: tuple[Fact[Any], ...] = (BOOKED_PREFILL_TOKENS, MAX_BATCHED_TOKENS)
"""Facts that tell a queue which workers have room."""

PROVIDED_ELSEWHERE: Mapping[str, str] = {"kv.overlap_tokens": "dynamo-kv-router"}
"""Facts of distributions that may not be installed, so that the error can say what to install."""


def build_stack(router: Router, plugins: Plugins, *, role: Role = "aggregated") -> Stack:
    """The stack that `router` describes for workers of `role`; `round-robin` when it describes none.

    :raises ConfigError: with every problem found.
    """
    return _Builder(plugins).stack(router_for(router, role))


def router_for(router: Router, role: Role) -> Router:
    """The table that counts for `role`: its own where there is one, otherwise the common one."""
    own = {"prefill": router.prefill, "decode": router.decode, "encode": router.encode}.get(role)
    return router if own is None else own


@attrs.define
class _Plan:
    """The lists of a stack by name, before anything is built."""

    filters: list[Use] = attrs.field(factory=list)
    scorers: list[Use] = attrs.field(factory=list)
    picker: Use | None = None
    facts: list[Use] = attrs.field(factory=list)
    policy: Part | None = None
    queue: Queue | None = None


class _Builder:
    def __init__(self, plugins: Plugins) -> None:
        self.plugins = plugins
        self.problems: list[Problem] = []
        self.unloadable: list[str] = []
        self.names: dict[str, int] = {}

    def stack(self, router: Router) -> Stack:
        plan = self.plan(router)
        named = {use.name for use in plan.filters}
        plan.filters = [*(Use(name) for name in SAFETY if name not in named), *plan.filters]
        filters = self.parts("filter", plan.filters)
        scorers = self.parts("scorer", plan.scorers)
        picker = next(iter(self.parts("picker", [plan.picker])), None) if plan.picker else None
        providers = self.parts("facts", plan.facts)
        policies = [*filters, *scorers, *(part for part in (plan.policy, picker) if part is not None)]
        where = {use.name: use.where for use in (*plan.filters, *plan.scorers, *((plan.picker,) if plan.picker else ())) if use.where}
        if plan.policy is not None and router.use is not None:
            where[plan.policy.use] = router.use.where
        shadow = self.shadow(router.shadow) if router.shadow is not None else None
        queue = plan.queue if plan.queue is not None and plan.queue.enabled else None
        providers += self.providers_for(policies, providers, where, QUEUE_NEEDS if queue is not None else ())
        if shadow is not None:
            # What the shadow needs beyond the live stack is provided beside it: it sees the same columns, and perhaps a few more.
            provided = {fact for part in providers for fact in part.component.provides}
            providers += [part for part in shadow.providers if not set(part.component.provides) <= provided]
        if self.problems:
            raise ConfigError(*dict.fromkeys(self.problems))
        return Stack(tuple(filters), tuple(scorers), picker, plan.policy, tuple(providers), queue, shadow)

    def shadow(self, router: Router) -> Stack | None:
        """The stack that decides along; its problems are as serious as those of the live one."""
        try:
            return _Builder(self.plugins).stack(attrs.evolve(router, shadow=None, queue=Queue(enabled=False)))
        except ConfigError as e:
            self.problems += [attrs.evolve(problem, what=f"[router.shadow] {problem.what}") for problem in e.problems]
            return None

    # -------------------------------------------------------------- presets and shorthands

    def plan(self, router: Router) -> _Plan:
        own = bool(router.scorers or router.picker)
        use = router.use or (None if own else Use("round-robin"))
        plan = _Plan() if use is None else self.preset(use)
        if router.use is not None and own:
            what = "scorers" if router.scorers else "a picker"
            self.problem(f"[router] names the policy {router.use.name!r}, which brings its own, and {what}", router.use.where, "remove one of the two")
        plan.filters += router.filters
        plan.scorers += router.scorers
        plan.picker = router.picker or plan.picker
        plan.queue = router.queue or plan.queue
        plan.facts = [*router.facts, *(use for use in plan.facts if use.name not in {own.name for own in router.facts})]
        if router.temperature is not None:
            self.temperature(router.temperature, plan, router)
        return plan

    def preset(self, use: Use) -> _Plan:
        built = self.build(use, "policy")
        if isinstance(built, Preset):
            table = dict(built.stack())
            filters, scorers, facts = ([_use(entry) for entry in table.pop(key, ())] for key in ("filters", "scorers", "facts"))
            plan = _Plan(filters, scorers, facts=facts)
            plan.picker = _use(picker) if (picker := table.pop("picker", None)) else None
            plan.queue = table.pop("queue", None)
            if table:
                self.problem(f"policy {use.name!r}: its stack has unknown keys: {', '.join(table)}", use.where)
            return plan
        if built is not None and not isinstance(built, Policy):
            self.problem(f"policy {use.name!r} has neither `stack` nor `needs` and `choose`", use.where, "see docs/contracts/routing.md")
        return _Plan(policy=None if built is None else Part("policy", self.name("policy", use), built, use.name, plugin=self.plugin("policy", use.name)))

    def temperature(self, temperature: float, plan: _Plan, router: Router) -> None:
        where = router.use.where if router.use else ""
        if router.picker is not None:
            what = "[router] sets a temperature, which is short for the picker `softmax`, and a picker"
            self.problem(what, router.picker.where, "write the temperature in the picker")
        elif plan.policy is not None or (plan.picker is not None and plan.picker.name not in ("best", "softmax")):
            by = f"the policy {plan.policy.name!r}" if plan.policy else f"the picker {plan.picker.name!r}" if plan.picker else ""
            self.problem(f"[router] sets a temperature, which {by} does not use", where, "remove it")
        else:
            plan.picker = Use("softmax", {"temperature": temperature}, where)

    # -------------------------------------------------------------- components

    def parts(self, kind: str, uses: Iterable[Use]) -> list[Part]:
        parts: list[Part] = []
        for use in uses:
            if (component := self.build(use, kind)) is None:
                continue
            if kind != "facts" and not isinstance(component, protocol_of(kind)):
                missing = ", ".join(f"`{name}`" for name in sorted(_members(kind)) if not hasattr(component, name))
                self.problem(f"{kind} {use.name!r} lacks {missing}", use.where, "see docs/contracts/routing.md")
                continue
            parts.append(Part(kind, self.name(kind, use), component, use.name, use.weight, self.plugin(kind, use.name)))
        return parts

    def name(self, kind: str, use: Use) -> str:
        """Unique in the stack, as faults are counted by it."""
        name = f"facts.{use.name}" if kind == "facts" else use.name
        self.names[name] = self.names.get(name, 0) + 1
        return name if self.names[name] == 1 else f"{name}#{self.names[name]}"

    def build(self, use: Use, kind: str) -> Any:
        from dynamo_core.config import build

        try:
            return build(use, kind, self.plugins)
        except ConfigError as e:
            self.problems += e.problems
        except PluginError as e:
            self.problem(str(e), use.where)
        return None

    def plugin(self, kind: str, name: str) -> str:
        found = self.plugins.components.get((kind, name))
        return "" if found is None else str(found.plugin)

    # -------------------------------------------------------------- facts

    def providers_for(self, policies: Sequence[Part], given: Sequence[Part], where: Mapping[str, str], more: Iterable[Fact[Any]] = ()) -> list[Part]:
        """Build what provides the facts that `given` does not. Built-ins are asked first, so that other plugins are imported only when needed."""
        provided = {fact for part in given for fact in part.component.provides}
        wanted = {fact for part in policies for fact in part.needs}.union(more) - provided
        added: list[Part] = []
        taken = {part.use for part in given}
        for component in sorted(self.plugins.of_kind("facts").values(), key=lambda c: (c.plugin.name != "builtin", c.name)):
            if wanted and component.name not in taken and wanted & (offers := self.offers(component)):
                wanted -= offers
                added += self.parts("facts", [Use(component.name)])
        for part in policies:
            for fact in sorted(part.needs & wanted, key=lambda fact: fact.name):
                what = f"{part.kind} {part.name!r} needs the fact {fact.name!r}, and nothing in this stack provides it"
                self.problem(what, where.get(part.use, ""), self.remedy(fact))
        return added

    def offers(self, component: Component) -> frozenset[Fact[Any]]:
        try:
            return frozenset(component.load().provides)
        except (PluginError, AttributeError, TypeError) as e:
            self.unloadable.append(str(e) if isinstance(e, PluginError) else f"facts {component.name!r} of {component.plugin} has no `provides`")
            return frozenset()

    def remedy(self, fact: Fact[Any]) -> str:
        if self.unloadable:
            return "some providers could not be asked: " + "; ".join(self.unloadable)
        if package := PROVIDED_ELSEWHERE.get(fact.name):
            return f"install it: pip install {package}"
        known = sorted(offer.name for component in self.plugins.of_kind("facts").values() for offer in self.offers(component))
        close = difflib.get_close_matches(fact.name, known, 1)
        return f"did you mean {close[0]!r}?" if close else f"facts that are provided: {', '.join(known)}"

    def problem(self, what: str, where: str = "", remedy: str = "") -> None:
        self.problems.append(Problem(what, where, remedy=remedy))


def _members(kind: str) -> set[str]:
    method = {"filter": "reject", "scorer": "score", "picker": "pick", "policy": "choose"}[kind]
    return {method} if kind == "picker" else {"needs", method}


def _use(entry: Any) -> Use:
    """One entry of a preset's table: a name, or `{"use": name, ...}`."""
    if isinstance(entry, Use):
        return entry
    options = {"use": entry} if isinstance(entry, str) else dict(entry)
    return Use(options.pop("use"), options=options, weight=float(options.pop("weight", 1.0)))


__all__ = ["SAFETY", "Choice", "Part", "Stack", "build_stack", "router_for"]
