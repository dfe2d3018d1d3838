"""Both stores of the index."""

from __future__ import annotations

import pytest

from dynamo_kv_router.store import Choice


@pytest.fixture(params=["python", "native"])
def store(request: pytest.FixtureRequest) -> Choice:
    if request.param == "native":
        pytest.importorskip("dynamo_kv_native", reason="dynamo-kv-native is not installed, or was not compiled", exc_type=ImportError)
    return request.param
