"""What the fleet serves when nothing runs: frontends that start then must know the models' names, to hold requests for them."""

from __future__ import annotations

import contextlib

import attrs

from dynamo_core.errors import StoreUnavailable
from dynamo_core.runtime import names
from dynamo_core.runtime.demand import ColdModel, ColdModels, cold_models
from dynamo_core.runtime.runtime import Runtime


@attrs.define(eq=False)
class Offering:
    """Offers the planner's model, and whatever it has seen workers of, for as long as the planner lives: it starts them when somebody asks."""

    runtime: Runtime
    model: str | None
    """The only one that this planner is for; None: all."""
    _records: ColdModels = attrs.field(init=False)
    _known: dict[str, ColdModel] = attrs.field(init=False, factory=dict[str, ColdModel])

    def __attrs_post_init__(self) -> None:
        self._records = ColdModels(self.runtime.discovery, self.runtime.config.namespace, self.runtime.config.lease_ttl)
        if self.model is not None:
            self._known[self.model] = ColdModel(name=self.model)

    async def look(self) -> None:
        """Offer what is new. A store that does not answer is asked again the next time."""
        with contextlib.suppress(StoreUnavailable):
            cards = await self.runtime.discovery.items(names.models(self.runtime.config.namespace))
            self._known |= {found.name: found for found in cold_models(cards.values()) if self.model in (None, found.name)}
            await self._records.offer([*self._known.values()])

    async def close(self) -> None:
        await self._records.close()
