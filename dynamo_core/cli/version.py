from __future__ import annotations

import json as jsonlib
import platform

from dynamo_core import __version__
from dynamo_core.cli.options import Json
from dynamo_core.plugins import Plugins


def version(*, json: Json = False) -> None:
    """Print the versions of the core, of Python and of every plugin."""
    plugins = {p.distribution: p.version for p in Plugins.load().plugins if p.distribution and p.distribution != "dynamo-core"}
    if json:
        print(jsonlib.dumps({"dynamo-core": __version__, "python": platform.python_version(), "plugins": plugins}))
        return
    print(f"dynamo-core {__version__} (Python {platform.python_version()})")
    for name, number in sorted(plugins.items()):
        print(f"{name} {number}")
