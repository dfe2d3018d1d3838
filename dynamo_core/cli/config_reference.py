from __future__ import annotations

from dynamo_core.config.reference import to_markdown


def config_reference() -> None:
    """Print the reference of all settings, as Markdown; `docs/reference/configuration.md` is this."""
    print(to_markdown(), end="")
