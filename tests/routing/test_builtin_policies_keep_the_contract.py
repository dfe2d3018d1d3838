"""The built-in filters, scorers and pickers inherit the same kits as anybody else's."""

import pytest

from dynamo_core.contracts import FilterContract, PickerContract, ScorerContract
from dynamo_core.routing import filters, pickers, scorers


class TestReady(FilterContract):
    @pytest.fixture
    def filter(self):
        return filters.Ready()


class TestNotFailed(FilterContract):
    @pytest.fixture
    def filter(self):
        return filters.NotFailed()


class TestNotFull(FilterContract):
    @pytest.fixture
    def filter(self):
        return filters.NotFull()


class TestPinned(FilterContract):
    @pytest.fixture(params=[False, True])
    def filter(self, request):
        return filters.Pinned(required=request.param)


class TestTaints(FilterContract):
    @pytest.fixture
    def filter(self):
        return filters.Taints()


class TestTurn(ScorerContract):
    @pytest.fixture
    def scorer(self):
        return scorers.Turn()


class TestLeastLoad(ScorerContract):
    @pytest.fixture
    def scorer(self):
        return scorers.LeastLoad()


class TestPreferredTaints(ScorerContract):
    @pytest.fixture
    def scorer(self):
        return scorers.PreferredTaints()


class TestBest(PickerContract):
    @pytest.fixture
    def picker(self):
        return pickers.Best()


class TestSoftmax(PickerContract):
    @pytest.fixture(params=[0.0, 0.1, 1.0, 1e-300, 1e300])
    def picker(self, request):
        return pickers.Softmax(temperature=request.param)


class TestUniform(PickerContract):
    @pytest.fixture
    def picker(self):
        return pickers.Uniform()


class TestPowerOfTwo(PickerContract):
    @pytest.fixture
    def picker(self):
        return pickers.PowerOfTwo()
