"""What was measured of one engine: a versioned JSON file, and the performance that it stands for."""

from __future__ import annotations

import math
from pathlib import Path

import attrs
import msgspec

from dynamo_core.errors import ConfigError, Problem
from dynamo_planner.performance.surface import Curve, Surface

VERSION = 1


class PrefillPoint(msgspec.Struct, frozen=True):
    """Reading one prompt alone."""

    tokens: float
    """Uncached prompt tokens."""
    seconds: float


class DecodePoint(msgspec.Struct, frozen=True):
    """Decoding some sequences together."""

    context: float
    """Their mean length in tokens, prompt and output."""
    concurrency: float
    itl: float
    """Seconds between tokens."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file that `dynamo profile` writes."""

    version: int = VERSION
    model: str = ""
    engine: str = ""
    made: str = ""
    """Date."""
    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...]
    max_sequences: int | None = None
    """That the engine decodes at once."""
    kv_tokens: int | None = None
    """That fit in the KV cache of a replica."""


@attrs.frozen
class Measured:
    """A profile as functions."""

    profile: Profile
    source: str
    _prefill: Curve
    _itl: Surface

    @classmethod
    def of(cls, profile: Profile, source: str) -> Measured:
        """:raises ValueError: there are no points of one kind."""
        decode = Surface((p.context, p.concurrency, p.itl) for p in profile.decode)
        return cls(profile, source, Curve((p.tokens, p.seconds) for p in profile.prefill), decode)

    def prefill(self, tokens: float) -> float:
        return self._prefill(tokens)

    def itl(self, context: float, concurrency: float) -> float:
        return self._itl(context, concurrency)

    def most_sequences(self, context: float) -> float:
        fitting = self.profile.kv_tokens / max(1.0, context) if self.profile.kv_tokens else math.inf
        most = float(self.profile.max_sequences or math.inf)
        return max(1.0, min(most, fitting, 4 * float(self._itl.y[-1])))  # nobody knows what happens far beyond the grid


def read(path: Path) -> Profile:
    """A profile of ours (a `.json` file), or one of Dynamo's: an `.npz`, or a directory of its profiler.

    :raises ConfigError: it is missing or not understood.
    """
    from dynamo_planner.performance import theirs

    try:
        if path.is_dir() or path.suffix == ".npz":
            return theirs.read(path)
        raw = path.read_bytes()
        if theirs.is_theirs(raw):
            return theirs.read(path.parent)
        profile = msgspec.json.decode(raw, type=Profile)
        if profile.version != VERSION:
            raise ValueError(f"it is of version {profile.version}, and this planner reads version {VERSION}; write it again with `dynamo profile`")
    except OSError as e:
        raise ConfigError(Problem(f"the profile cannot be read: {e.strerror}", str(path), remedy="`dynamo profile` writes one")) from e
    except (msgspec.MsgspecError, ValueError, KeyError) as e:
        raise ConfigError(Problem(f"the profile is not understood: {e}", str(path))) from e
    return profile


def write(profile: Profile, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")


def load(path: Path) -> Measured:
    """:raises ConfigError: it is missing, not understood or empty."""
    try:
        return Measured.of(read(path), f"the profile {path}")
    except ValueError as e:
        raise ConfigError(Problem(f"the profile cannot be used: {e}", str(path))) from e
