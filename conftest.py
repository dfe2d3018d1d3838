"""What holds for every test, of the core and of the plugins."""

from __future__ import annotations

import gc

from hypothesis import settings

# How long an example takes says how busy the machine is, and no more.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")

# Five thousand tests and all that they import are there until the end: the collector need not look at them while they are gathered,
# nor with every test that follows.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()
