"""The conformance kit for pool strategies: inherit `StrategyContract`, say how to build one, and run pytest.

    class TestMyStrategy(StrategyContract):
        @pytest.fixture
        def strategy_factory(self):
            return lambda: MyStrategy(limit=5.0)

The guarantees have their numbers from `docs/contracts/pool-strategy.md`.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence

import attrs
import pytest

from dynamo_core.cards import Role
from dynamo_core.errors import ConfigError
from dynamo_global_router.contract import Choice, Estimate, PoolFacts, PoolName, PoolRequest, Strategy

POOLS = (PoolName("fast", 0, 4.0), PoolName("middle", 1, 2.0), PoolName("slow", 2, 1.0), PoolName("spare", 2, 1.0))


class StrategyContract:
    """Inherit, and provide `strategy_factory`."""

    pools: Sequence[PoolName] = POOLS
    """What the strategy is bound to."""
    role: Role = "aggregated"
    examples = 200
    """Requests that tests ask about."""
    misfit: Sequence[PoolName] | None = None
    """Pools that the strategy cannot work with, if there are such."""

    @pytest.fixture
    def strategy_factory(self) -> Callable[[], Strategy]:
        """Returns a function that makes a fresh strategy, always with the same options."""
        raise NotImplementedError("provide the fixture `strategy_factory`")

    @pytest.fixture
    def strategy(self, strategy_factory: Callable[[], Strategy]) -> Strategy:
        strategy = strategy_factory()
        strategy.bind(self.pools, self.role)
        return strategy

    # ------------------------------------------------------------------ what is asked

    def cases(self) -> Iterator[tuple[PoolRequest, tuple[PoolFacts, ...]]]:
        """Requests of every kind before pools in every state, always the same ones."""
        rng = random.Random(7)
        for number in range(self.examples):
            there = rng.sample(list(self.pools), rng.randint(1, len(self.pools)))
            yield self._request(rng, number), tuple(self._facts(rng, pool) for pool in there)

    def _request(self, rng: random.Random, number: int) -> PoolRequest:
        def target(low: float, high: float) -> float | None:
            return rng.choice([None, rng.uniform(low, high)])

        return PoolRequest(f"r{number}", self.role, rng.choice([0, 1, 500, 10**5]), rng.choice([0, 0, -5, 3, 100]), target(1, 5000), target(1, 200),
                           rng.choice([None, 1, 4000]))

    def _facts(self, rng: random.Random, pool: PoolName) -> PoolFacts:
        # Few different values, so that ties happen.
        estimate = Estimate(rng.choice([0.0, 50.0, 50.0, 2000.0]), rng.choice([5.0, 5.0, 80.0]), rng.choice([0.0, 0.3]), rng.choice([0.0, 0.3]),
                            rng.choice([0, 1, 1000]), rng.choice([0.0, 1000.0, float("inf")]))
        return PoolFacts(pool.name, pool.rank, pool.cost, rng.choice([1, 50]), rng.choice([0, 1, 10**5]), rng.choice([0, 10**6]), rng.choice([0, 300]),
                         rng.choice([0, 256]), estimate)

    # ------------------------------------------------------------------ S1 bind

    def test_s1_it_takes_the_pools_that_it_was_made_for(self, strategy_factory: Callable[[], Strategy]) -> None:
        strategy_factory().bind(self.pools, self.role)

    def test_s1_it_refuses_pools_that_it_cannot_work_with(self, strategy_factory: Callable[[], Strategy]) -> None:
        if self.misfit is not None:
            with pytest.raises(ConfigError) as refusal:
                strategy_factory().bind(self.misfit, self.role)
            assert str(refusal.value), "an error must say what is wrong"

    # ------------------------------------------------------------------ S2 the answer

    def test_s2_the_answer_names_given_pools_none_twice(self, strategy: Strategy) -> None:
        for request, pools in self.cases():
            answer = strategy.choose(request, pools)
            assert answer.order, f"nobody for {request}"
            assert all(isinstance(row, int) and 0 <= row < len(pools) for row in (*answer.order, *answer.notes)), "a row that was not given"
            assert len({*answer.order}) == len(answer.order), "a pool named twice"

    def test_s2_the_answer_says_how_and_why(self, strategy: Strategy) -> None:
        answers = [strategy.choose(request, pools) for request, pools in self.cases()]
        assert all(answer.why and answer.kind and " " not in answer.kind for answer in answers)
        assert len({answer.kind for answer in answers}) <= 12, "kinds are labels of metrics: there must be few"

    # ------------------------------------------------------------------ S3 purity

    def test_s3_the_same_question_has_the_same_answer(self, strategy: Strategy, strategy_factory: Callable[[], Strategy]) -> None:
        cases = list(self.cases())
        first = [strategy.choose(*case) for case in cases]
        assert [strategy.choose(*case) for case in reversed(cases)] == first[::-1], "it depends on what was asked before"
        other = strategy_factory()
        other.bind(self.pools, self.role)
        assert [other.choose(*case) for case in cases] == first, "two of the same options differ"

    def test_s3_nothing_is_written_to(self, strategy: Strategy) -> None:
        for request, pools in self.cases():
            given = list(pools)
            before = copy.deepcopy(given)
            strategy.choose(request, given)
            assert given == before, "the pools were changed"

    # ------------------------------------------------------------------ S4 order

    def test_s4_the_order_of_pools_means_nothing(self, strategy: Strategy) -> None:
        rng = random.Random(11)
        for request, pools in self.cases():
            turn = rng.sample(range(len(pools)), len(pools))
            plain, turned = strategy.choose(request, pools), strategy.choose(request, [pools[row] for row in turn])
            assert _by_name(plain, pools) == _by_name(turned, [pools[row] for row in turn])


def _by_name(answer: Choice, pools: Sequence[PoolFacts]) -> Choice:
    """The answer with names for rows, which do not change with their order."""
    return attrs.evolve(answer, order=[pools[row].name for row in answer.order],  # pyright: ignore[reportArgumentType]
                        notes={pools[row].name: note for row, note in answer.notes.items()})  # pyright: ignore[reportArgumentType]
