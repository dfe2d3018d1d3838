"""How much a caller's preferred taints change the cost of a worker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def taint_factor(preferred: Mapping[str, float], taints: Sequence[Sequence[str]]) -> Any:
    """`exp(-tanh(sum of the weights of its taints))` for each worker: between 0.37 and 2.7."""
    return np.array([math.exp(-math.tanh(sum(weight for taint, weight in preferred.items() if taint in its))) for its in taints])
