"""Conformance kits: inherit one, provide its fixture, and pytest tells you whether your plugin keeps the contract.

    from dynamo_core.contracts import ScorerContract

    class TestMine(ScorerContract):
        @pytest.fixture
        def scorer(self):
            return Mine()

Each kit has a page in `docs/contracts/`; each test carries the number of the guarantee that it checks.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

try:
    import hypothesis  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import pytest
except ModuleNotFoundError as e:
    raise ModuleNotFoundError(f"the conformance kits need {e.name}: pip install 'dynamo-core[testing]'", name=e.name) from None

if TYPE_CHECKING:
    from dynamo_core.contracts.authenticator import AuthenticatorContract
    from dynamo_core.contracts.connector import ConnectorContract
    from dynamo_core.contracts.discovery import DiscoveryContract
    from dynamo_core.contracts.engine import EngineContract
    from dynamo_core.contracts.events import EventPlaneContract
    from dynamo_core.contracts.filter import FilterContract
    from dynamo_core.contracts.picker import PickerContract
    from dynamo_core.contracts.preprocessor import PreprocessorContract
    from dynamo_core.contracts.rate_limiter import RateLimiterContract
    from dynamo_core.contracts.scorer import ScorerContract
    from dynamo_core.contracts.transport import RequestPlaneContract

_MODULES = {
    "AuthenticatorContract": "authenticator",
    "ConnectorContract": "connector",
    "DiscoveryContract": "discovery",
    "EngineContract": "engine",
    "EventPlaneContract": "events",
    "FilterContract": "filter",
    "PickerContract": "picker",
    "PreprocessorContract": "preprocessor",
    "RateLimiterContract": "rate_limiter",
    "RequestPlaneContract": "transport",
    "ScorerContract": "scorer",
}

__all__ = [
    "AuthenticatorContract",
    "ConnectorContract",
    "DiscoveryContract",
    "EngineContract",
    "EventPlaneContract",
    "FilterContract",
    "PickerContract",
    "PreprocessorContract",
    "RateLimiterContract",
    "RequestPlaneContract",
    "ScorerContract",
]

# So that a failing assertion inside a kit shows its values, as one in a test file would.
pytest.register_assert_rewrite(__name__)


def __getattr__(name: str) -> Any:
    """Import a kit when it is asked for: a plugin's tests need not have what the other kits need."""
    if (module := _MODULES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
