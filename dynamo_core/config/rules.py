"""Settings that contradict each other. A rule looks at one table and says what is wrong, and where."""

from __future__ import annotations

from collections.abc import Iterator

from dynamo_core.config.schema import Config, Router
from dynamo_core.config.tree import Key, dotted

Conflict = tuple[Key, str, str]
"""Place, what, remedy."""

_ROLES = ("prefill", "decode", "encode")


def conflicts(table: object, at: Key) -> Iterator[Conflict]:
    """`table` may be incomplete: fields that are themselves wrong have their defaults."""
    if isinstance(table, Config):
        yield from _config(table)
    elif isinstance(table, Router):
        yield from _router(table, at)


def _config(config: Config) -> Iterator[Conflict]:
    frontend, status = config.frontend, config.status
    if frontend.port and status.enabled and frontend.port == status.port:
        yield ("status", "port"), f"status.port and frontend.port are both {frontend.port}", "leave status.port out: any free port is taken"
    if frontend.admin is not None and frontend.port and frontend.admin.port == frontend.port:
        yield ("frontend", "admin", "port"), f"frontend.admin.port and frontend.port are both {frontend.port}", "leave admin.port out: any free port is taken"
    if frontend.processes > 1:
        for name, use in (("discovery", config.discovery), ("request_plane", config.request_plane), ("event_plane", config.event_plane)):
            if use.name in ("memory", "in-process"):
                yield ("frontend", "processes"), f"frontend.processes is {frontend.processes}, but the {name} {use.name!r} stays inside one process", ""
        for index, worker in enumerate(config.workers):
            if worker.inside and worker.count:
                what = f"frontend.processes is {frontend.processes}, and each of them would run workers[{index}], which is inside"
                yield ("workers", index, "inside"), what, "keep frontend.processes at 1, or leave `inside` out: `dynamo up` then starts a process for it"


def _router(router: Router, at: Key) -> Iterator[Conflict]:
    if router.use is not None:
        for field in ("scorers", "picker"):  # filters may be added to those of a policy
            if getattr(router, field):
                yield (*at, field), f"{dotted(at)} names the policy {router.use.name!r} and has {field} of its own", f"keep either `use` or `{field}`"
    if router.picker is not None and router.temperature is not None:
        what = f"{dotted(at)}.temperature is short for the picker 'softmax', and there is a picker: {router.picker.name!r}"
        yield (*at, "temperature"), what, "write the temperature in the picker" if router.picker.name == "softmax" else "keep one of the two"
    if at and at[-1] in _ROLES:
        for role in _ROLES:
            if getattr(router, role) is not None:
                yield (*at, role), f"{dotted(at)} is already the table of a role, and roles do not nest", f"write [{dotted((*at[:-1], role))}]"
