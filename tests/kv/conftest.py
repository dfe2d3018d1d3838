from __future__ import annotations

import pytest

from dynamo_core.kv import blocks, chains


@pytest.fixture(params=["plain", "compiled"])
def make_blocks(request: pytest.FixtureRequest):
    """What makes `Blocks`: of the core, and of `dynamo-kv-native`."""
    if request.param == "plain":
        return blocks.Blocks
    return pytest.importorskip("dynamo_kv_native", reason="dynamo-kv-native was not compiled", exc_type=ImportError).Blocks


@pytest.fixture
def either_blocks(make_blocks: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Chains` take these."""
    monkeypatch.setattr(chains, "Blocks", make_blocks)
