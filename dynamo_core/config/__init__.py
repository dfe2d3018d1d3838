"""The configuration: one attrs schema, TOML or YAML, strict, with the origin of every value.

    config = load(Path("stack.toml"), overrides=["router.temperature=0.2"], plugins=plugins)
    discovery = build(config.discovery, "discovery", plugins)
"""

from dynamo_core.config.load import build, check, load, load_with_plugins, plugins_for, structure
from dynamo_core.config.origins import Setting, origins
from dynamo_core.config.schema import (
    Admin,
    Config,
    Frontend,
    Migration,
    Observability,
    PluginSettings,
    Router,
    Secret,
    Status,
    Tls,
    Use,
    Worker,
    choice,
)

__all__ = [
    "Admin",
    "Config",
    "Frontend",
    "Migration",
    "Observability",
    "PluginSettings",
    "Router",
    "Secret",
    "Setting",
    "Status",
    "Tls",
    "Use",
    "Worker",
    "build",
    "check",
    "choice",
    "load",
    "load_with_plugins",
    "origins",
    "plugins_for",
    "structure",
]
