"""The engine contract, on the real llama.cpp: with a tiny model of random weights, and (slow) with SmolLM2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dynamo_core.contracts.engine import EngineContract
from dynamo_core.engines import Engine
from dynamo_llamacpp.engine import LlamaCppEngine


class TestTinyModel(EngineContract):
    reports_load = True

    @pytest.fixture
    def engine_factory(self, tiny: Path) -> Callable[[], Engine]:
        return lambda: LlamaCppEngine(model=str(tiny), slots=3, context=512)

    @pytest.fixture
    def prompt(self) -> Sequence[int]:
        return [300, 17, 402, 99, 5, 611, 350]


@pytest.mark.slow
class TestSmolLm2(EngineContract):
    reports_load = True
    max_tokens = 12
    patience = 120.0

    @pytest.fixture
    def engine_factory(self) -> Callable[[], Engine]:
        return lambda: LlamaCppEngine(context=512)

    @pytest.fixture
    def prompt(self) -> Sequence[int]:
        return [1, 4093, 198, 19556, 28, 638, 359, 346, 47, 2, 198, 1, 520, 9531, 198]
