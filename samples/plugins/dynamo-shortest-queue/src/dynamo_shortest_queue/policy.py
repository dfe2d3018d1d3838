"""Send work to the shortest queue."""

from collections.abc import Sequence

import attrs

from dynamo_core.routing.contract import Fleet, RoutingRequest
from dynamo_core.routing.facts import ENGINE_WAITING, IN_FLIGHT


@attrs.frozen
class ShortestQueue:
    """Scores 1 for the shortest queue and 0 for the longest."""

    floor: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    """Queues up to this length count as equally short."""
    needs = (ENGINE_WAITING, IN_FLIGHT)

    def score(self, request: RoutingRequest, fleet: Fleet) -> Sequence[float]:
        queues = [max(self.floor, waiting + sent) for waiting, sent in zip(fleet[ENGINE_WAITING], fleet[IN_FLIGHT], strict=True)]
        longest = max(queues)
        span = longest - min(queues)
        return [(longest - queue) / span if span else 1.0 for queue in queues]
