"""The only file that a plugin author must read: every hook, grouped by phase.

A plugin is a Python package with an entry point in the group `dynamo` that names a *light* module:

    [project.entry-points.dynamo]
    shortest-queue = "dynamo_shortest_queue"

That module implements some of these hooks. pluggy registers; plain objects run: a component is announced by an import
string and imported only when a configuration selects it, so that listing plugins never imports an engine.

Each docstring has the same five parts: what it is for, when it is called, its parameters, what the result does, and
in which processes it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from dynamo_core.cards import ModelCard
    from dynamo_core.plugins import Registry
    from dynamo_core.routing.record import Decision
    from dynamo_core.types import Instance

PROJECT = "dynamo"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# ------------------------------------------------------------------ start-up


@hookspec
def dynamo_register(registry: Registry) -> None:
    """Announce the components that this plugin provides.

    Called: once per process, before the configuration is read. Must not import engines or touch the network.
    :param registry: takes one call per component, by kind and name: `registry.scorer("mine", "my_package.policy:Mine")`.
    Result: ignored. Errors: the plugin is left out, and `dynamo plugins` and every later error name it and the reason.
    Processes: all.
    """


# ------------------------------------------------------------------ the fleet, rare events only


@hookspec
def dynamo_worker_joined(instance: Instance, card: ModelCard) -> None:
    """A worker became routable.

    Called: once for each instance, after its card was loaded and before the first request goes to it.
    :param instance: where it is. :param card: what it serves.
    Result: ignored. Errors: logged under the plugin's name, once; the worker is used all the same.
    Processes: frontend, router.
    """


@hookspec
def dynamo_worker_left(instance: Instance, reason: str) -> None:
    """A worker is no longer routable.

    Called: once for each instance that had joined.
    :param instance: which. :param reason: `left`; whether it said so or its lease ran out, discovery does not tell.
    Result: ignored. Errors: logged under the plugin's name, once.
    Processes: frontend, router.
    """


@hookspec
def dynamo_decision(decision: Decision) -> None:
    """A routing decision was made.

    Called: once per decision, after the request was dispatched. Keep it short: it runs on the event loop.
    :param decision: the whole record; do not write to it.
    Result: ignored. Errors: logged under the plugin's name, once.
    Processes: frontend, router.
    """


@hookspec
def dynamo_request_finished(request_id: str, model: str, status: int, usage: dict[str, int], seconds: float) -> None:
    """A request ended, well or badly.

    Called: once per request, after the last byte was handed to the HTTP server.
    :param status: the HTTP status, or what it would have been had the error come before the first byte.
    :param usage: `prompt_tokens`, `completion_tokens`, `cached_tokens`. :param seconds: from arrival to end.
    Result: ignored. Errors: logged under the plugin's name, once.
    Processes: frontend.
    """
