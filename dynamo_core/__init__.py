"""A framework that serves large language models on many machines; every part of it is a plugin."""

__version__ = "0.1.0"

from dynamo_core.hookspecs import hookimpl

__all__ = ["__version__", "hookimpl"]
