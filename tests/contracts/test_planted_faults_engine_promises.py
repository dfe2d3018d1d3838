"""The engine kit, cheated in what its card promises: each engine here breaks one guarantee, and the kit must find it under that guarantee's number."""

import random

import msgspec
import pytest
from honest_engine import Altered, Honest, is_found, planted

from dynamo_core.engines import BlocksRemoved, BlocksStored
from dynamo_core.types import Load, Request, Sampling


class GivesOneChoiceForMany(Altered):
    """G9"""

    def alter(self, request: Request) -> Request:
        return msgspec.structs.replace(request, sampling=Sampling())


class IgnoresLogprobs(Altered):
    """G9"""

    def alter(self, request: Request) -> Request:
        return msgspec.structs.replace(request, logprobs=None, prompt_logprobs=None)


class PromisesLogprobsAndForgets(Honest):
    """G9"""

    promises = {"capabilities": ("logprobs",)}


class PromisesBiasAndForgets(Altered):
    """G9"""

    promises = {"capabilities": ("logit_bias",)}


class TakesAnyAdapter(Altered):
    """G9"""

    def alter(self, request: Request) -> Request:
        return msgspec.structs.replace(request, adapter=None)


class TakesAnySampling(Altered):
    """G9"""

    def alter(self, request: Request) -> Request:
        return msgspec.structs.replace(request, sampling=Sampling(n=max(1, request.sampling.n)))


class ServesAnotherTokenizer(Honest):
    """G9"""

    def artifact(self, digest: str) -> bytes:
        return super().artifact(digest) + b" "


class ServesWhateverDigest(Honest):
    """G9"""

    def artifact(self, digest: str) -> bytes:
        return self._tokenizer


class PromisesEventsAndSendsNone(Honest):
    """G9"""

    promises = {"kv_events": True}


class SendsEventsUnasked(Honest):
    """G9"""

    def moved(self, change: int) -> None:
        super().moved(change)
        self.context.kv_events([BlocksStored([1], None, [0] * 16)], 0)


class RemovesWhatWasNeverStored(PromisesEventsAndSendsNone):
    """G9"""

    def moved(self, change: int) -> None:
        super().moved(change)
        self.context.kv_events([BlocksRemoved([random.randrange(2**60)])], 0)


class NeverSaysThatItIsIdle(Honest):
    """G9"""

    def moved(self, change: int) -> None:
        self.running += change
        if self.running:
            self.context.load(Load(running=self.running))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("engine", planted(__name__), ids=lambda engine: engine.__name__)
def test_a_planted_fault_is_found_under_its_number(engine: type[Honest]) -> None:
    assert is_found(engine)
