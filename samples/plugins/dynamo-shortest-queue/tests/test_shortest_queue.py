import pytest
from dynamo_shortest_queue.policy import ShortestQueue

from dynamo_core.contracts import ScorerContract


class TestShortestQueue(ScorerContract):
    @pytest.fixture(params=[0, 3])
    def scorer(self, request):
        return ShortestQueue(floor=request.param)
