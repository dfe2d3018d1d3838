"""Engines: token in, token out. The contract is in `contract.py`; `echo` is built in."""

from dynamo_core.engines.admission import admit
from dynamo_core.engines.contract import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    Checks,
    Controls,
    Drains,
    Engine,
    EngineContext,
    HasArtifacts,
    HasMetrics,
    KvEvent,
    Probes,
    Reports,
)

__all__ = [
    "BlocksCleared", "BlocksRemoved", "BlocksStored", "Checks", "Controls", "Drains", "Engine", "EngineContext", "HasArtifacts", "HasMetrics",
    "KvEvent", "Probes", "Reports", "admit",
]
