"""The pytest plugin that comes with the core: one fixture, and nothing imported until it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dynamo_core.testing.cluster import Cluster


@pytest.fixture
def dynamo() -> type[Cluster]:
    """`async with dynamo.up(workers=4, engine="sim") as cluster:` — a fleet in one process."""
    from dynamo_core.testing.cluster import Cluster

    return Cluster
