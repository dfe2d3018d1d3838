"""The core's own components, registered by the same hook as anybody else's."""

from __future__ import annotations

from dynamo_core.hookspecs import hookimpl
from dynamo_core.plugins import Registry


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.discovery("memory", "dynamo_core.discovery.memory:MemoryDiscovery", summary="inside one process")
    registry.discovery("file", "dynamo_core.discovery.file:FileDiscovery", summary="a directory that the processes share")
    registry.event_plane("in-process", "dynamo_core.events.inprocess:InProcessEvents", summary="inside one process")
    registry.event_plane("zmq", "dynamo_core.events.zmq:ZmqEvents", summary="every publisher binds a socket and advertises it")
    registry.request_plane("in-process", "dynamo_core.transport.inprocess:InProcessPlane", summary="inside one process")
    registry.request_plane("tcp", "dynamo_core.transport.tcp:TcpPlane", summary="one multiplexed connection a pair, step-batched")
    registry.request_plane("http", "dynamo_core.transport.http:HttpPlane", summary="HTTP/1.1 streaming, for networks that allow nothing else")
    registry.engine("echo", "dynamo_core.engines.echo:EchoEngine", summary="answers with the prompt")
    registry.add("authenticator", "api-keys", "dynamo_core.frontend.apikeys:ApiKeys", summary="keys whose hashes are in a file; made by `dynamo keys`")
    registry.add("authenticator", "jwt", "dynamo_core.frontend.jwt:Jwt", summary="tokens of an identity provider; pip install dynamo-core[jwt]")
    registry.add("rate_limiter", "per-tenant", "dynamo_core.frontend.limits:PerTenant", summary="requests and tokens in a time, for each tenant")
    registry.http_server("hypercorn", "dynamo_core.frontend.servers.hypercorn:HypercornServer", summary="HTTP/1.1 and HTTP/2, TLS, mTLS")
    registry.http_server("uvicorn", "dynamo_core.frontend.servers.uvicorn:UvicornServer", summary="HTTP/1.1, the cheapest; pip install dynamo-core[uvicorn]")

    for name, target, summary in (
        ("ready", "filters:Ready", "drops workers that are inhibited, draining or not yet proven"),
        ("not-failed", "filters:NotFailed", "drops workers that failed this request before"),
        ("not-full", "filters:NotFull", "drops workers over a share of their capacity"),
        ("pinned", "filters:Pinned", "keeps only the instance that the caller asked for"),
        ("taints", "filters:Taints", "keeps workers that have the required taints"),
    ):
        registry.filter(name, f"dynamo_core.routing.{target}", summary=summary)
    for name, target, summary in (
        ("turn", "scorers:Turn", "prefers the worker whose turn is longest ago"),
        ("load", "scorers:LeastLoad", "prefers the worker with the fewest requests in progress"),
        ("preferred-taints", "scorers:PreferredTaints", "prefers or avoids workers by taint"),
    ):
        registry.scorer(name, f"dynamo_core.routing.{target}", summary=summary)
    for name, target, summary in (
        ("best", "pickers:Best", "the highest total; ties by the dice"),
        ("softmax", "pickers:Softmax", "by chance, weighted by total; temperature 0 is `best`"),
        ("uniform", "pickers:Uniform", "by chance, all alike"),
        ("power-of-two", "pickers:PowerOfTwo", "the better of two by chance"),
    ):
        registry.picker(name, f"dynamo_core.routing.{target}", summary=summary)
    for name, target, summary in (
        ("round-robin", "presets:RoundRobin", "every worker in turn"),
        ("random", "presets:Random", "any worker"),
        ("least-loaded", "presets:LeastLoaded", "the worker with the fewest requests in progress"),
        ("power-of-two", "presets:PowerOfTwoChoices", "two at random, the less loaded of them"),
        ("direct", "presets:Direct", "the worker that the caller names, or an error"),
    ):
        registry.policy(name, f"dynamo_core.routing.{target}", summary=summary)
    for name, target, summary in (
        ("fleet", "providers:FleetFacts", "who is there: taints, capacity, inhibition, turn"),
        ("bookings", "providers:Bookings", "what this process has sent and not yet seen end"),
        ("engine-load", "providers:EngineLoad", "what the engines report of themselves"),
    ):
        registry.facts(name, f"dynamo_core.routing.{target}", summary=summary)

    for name, summary in (
        ("up", "start a whole stack on this machine: workers, then the frontend"),
        ("frontend", "serve the OpenAI API for the workers of a fleet"),
        ("worker", "serve one engine"),
        ("demo", "start a small real stack, ask it questions, show the answers"),
        ("chat", "talk to a model"),
        ("check", "say everything that is wrong with a configuration"),
        ("config show", "show the configuration in use, and where each value comes from"),
        ("config reference", "print the reference of all settings, as Markdown"),
        ("config schema", "print a JSON schema of the configuration, for editors"),
        ("explain", "say why a request went to the worker it went to"),
        ("replay decisions", "decide recorded requests again by another stack, and list what changes"),
        ("replay", "replay a request trace in virtual time, or recorded decisions against another stack"),
        ("keys new", "make an API key"),
        ("keys list", "list API keys"),
        ("keys revoke", "revoke an API key"),
        ("plugins", "list what is installed, and what is wrong with it"),
        ("plugin new", "write a new plugin that passes its contract tests"),
        ("plugin check", "say how far a plugin has come, and what is missing"),
        ("version", "print versions"),
    ):
        module = name.replace(" ", "_")
        registry.cli(name, f"dynamo_core.cli.{module}:{module}", summary=summary)
