"""A test class that has a `loop_factory` runs on that event loop."""

import asyncio
from collections.abc import Callable, Mapping

import pytest


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    factory = getattr(getattr(item, "cls", None), "loop_factory", asyncio.new_event_loop)
    return {factory.__module__.partition(".")[0]: factory}
