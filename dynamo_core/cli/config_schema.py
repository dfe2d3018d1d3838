from __future__ import annotations

import json

from dynamo_core.config.reference import to_json_schema
from dynamo_core.plugins import KINDS, Plugins


def config_schema() -> None:
    """Print a JSON schema of the configuration, with the names of what is installed, for editors."""
    plugins = Plugins.load()
    print(json.dumps(to_json_schema({kind: sorted(plugins.of_kind(kind)) for kind in KINDS}), indent=2))
