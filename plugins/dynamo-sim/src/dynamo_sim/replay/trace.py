"""Request traces: columns instead of objects, so that a million requests fit in memory, and one compact reader.

The format is the one that the Mooncake project publishes: JSON lines with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`,
one id for each block of 512 prompt tokens (the last may be partly filled). Equal ids mean equal content after equal predecessors. A line may
carry `session_id`, and `delay` (ms): it is a later turn, which begins that long after the turn before it ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import attrs
import msgspec
import numpy as np
from numpy.typing import NDArray

from dynamo_core.errors import ConfigError, Problem

BLOCK = 512
"""Tokens of one hash id, unless a trace says otherwise."""
SHOWN = 10
"""Problems of a trace that are reported, the first ones."""


class Line(msgspec.Struct):
    """One request of a trace file."""

    input_length: int
    output_length: int
    hash_ids: list[int]
    timestamp: float | None = None
    session_id: str | int | None = None
    delay: float | None = None


@attrs.frozen(eq=False)
class Trace:
    """Requests in order of arrival; row i of every column is request i."""

    arrival: NDArray[np.float64]
    """Milliseconds from the first; of a later turn (`after` is set), milliseconds from the end of the turn before."""
    prompt: NDArray[np.int64]
    """Prompt tokens."""
    output: NDArray[np.int64]
    """Tokens to generate, at least 1."""
    start: NDArray[np.int64]
    """The blocks of request i are `ids[start[i]:start[i + 1]]`."""
    ids: NDArray[np.int64]
    block: int = BLOCK
    """Tokens of one id."""
    after: NDArray[np.int64] | None = None
    """The request whose end this one waits for; -1 for none."""
    session: NDArray[np.int64] | None = None
    """Number of the session; -1 for none."""
    name: str = "trace"

    def __len__(self) -> int:
        return len(self.prompt)

    def keys(self, i: int, block_size: int) -> NDArray[np.uint64]:
        """Keys of the full engine blocks of request i. A key stands for the block and all before it, whatever the ids promise."""
        per = self.block // block_size
        count = int(self.prompt[i]) // block_size
        ids = self.ids[self.start[i] : self.start[i] + -(-count // per)].astype(np.uint64)
        names = (ids[:, None] * np.uint64(per) + np.arange(1, per + 1, dtype=np.uint64)).ravel()[:count]
        # Two rounds of splitmix64, so that sums of names that follow each other have nothing in common.
        names = names * np.uint64(0x9E3779B97F4A7C15)
        names = (names ^ (names >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        names = (names ^ (names >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.cumsum(names ^ (names >> np.uint64(31)), dtype=np.uint64)

    def head(self, count: int) -> Trace:
        """The first `count` requests."""
        cut = slice(0, count)
        start = self.start[: count + 1]
        return attrs.evolve(
            self, arrival=self.arrival[cut], prompt=self.prompt[cut], output=self.output[cut], start=start, ids=self.ids[: start[-1]],
            after=None if self.after is None else self.after[cut], session=None if self.session is None else self.session[cut],
        )


def build(lines: Iterable[Line], block: int = BLOCK, name: str = "trace") -> Trace:
    """Columns of `lines`, in order of arrival. Lines must be valid (`problems` says whether)."""
    arrival: list[float] = []
    prompt: list[int] = []
    output: list[int] = []
    start: list[int] = [0]
    ids: list[NDArray[np.int64]] = []
    sessions: dict[str | int, int] = {}
    last: dict[str | int, int] = {}
    after: list[int] = []
    session: list[int] = []
    for i, line in enumerate(lines):
        again = line.session_id is not None and line.session_id in last and (line.delay is not None or line.timestamp is None)
        arrival.append((line.delay or 0.0) if again else (line.timestamp or 0.0))
        prompt.append(line.input_length)
        output.append(max(1, line.output_length))
        ids.append(np.array(line.hash_ids, np.int64))
        start.append(start[-1] + len(line.hash_ids))
        after.append(last[line.session_id] if again and line.session_id is not None else -1)
        session.append(-1 if line.session_id is None else sessions.setdefault(line.session_id, len(sessions)))
        if line.session_id is not None:
            last[line.session_id] = i
    trace = Trace(
        np.array(arrival), np.array(prompt, np.int64), np.array(output, np.int64), np.array(start, np.int64),
        np.concatenate(ids) if ids else np.empty(0, np.int64), block, np.array(after, np.int64) if any(a >= 0 for a in after) else None,
        np.array(session, np.int64) if sessions else None, name,
    )
    return _in_order(trace)


def _in_order(trace: Trace) -> Trace:
    """Requests that wait for nobody, by arrival, start at 0; the columns of a file that is in order already stay as they are."""
    first = np.ones(len(trace), bool) if trace.after is None else trace.after < 0
    if len(trace) and first.any():
        trace.arrival[first] -= trace.arrival[first].min()
    if trace.after is not None or bool(np.all(np.diff(trace.arrival) >= 0)):
        return trace  # with sessions, the order of lines stays: the replay orders arrivals itself
    order = np.argsort(trace.arrival, kind="stable")
    lengths = np.diff(trace.start)[order]
    start = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([trace.ids[trace.start[i] : trace.start[i + 1]] for i in order])
    return attrs.evolve(
        trace, arrival=trace.arrival[order], prompt=trace.prompt[order], output=trace.output[order], start=start, ids=ids,
        session=None if trace.session is None else trace.session[order],
    )


def read(path: Path, *, block: int = BLOCK, limit: int | None = None) -> Trace:
    """A trace file.

    :param limit: read this many requests. :raises ConfigError: with the line of every problem, the first ones.
    """
    decode = msgspec.json.Decoder(Line).decode
    found: list[Problem] = []

    def lines() -> Iterable[Line]:
        count = 0
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                if limit is not None and count >= limit:
                    return
                try:
                    line = decode(raw)
                    if why := _wrong(line, block):
                        raise ValueError(why)
                except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as e:
                    found.append(Problem(str(e), f"{path}:{number}", raw[:120].decode("utf-8", "replace")))
                    if len(found) >= SHOWN:
                        return
                    continue
                count += 1
                yield line

    try:
        trace = build(lines(), block, path.stem)
    except OSError as e:
        raise ConfigError(Problem(f"it cannot be read: {e.strerror}", str(path))) from e
    if not found and not len(trace):
        found.append(Problem("the trace has no requests", str(path), remedy="one JSON object a line: timestamp, input_length, output_length, hash_ids"))
    if found:
        raise ConfigError(*found)
    return trace


def _wrong(line: Line, block: int) -> str:
    """Why this line is no request; empty when it is one."""
    if line.input_length < 1:
        return f"input_length is {line.input_length}, and a prompt has at least one token"
    if line.output_length < 0:
        return f"output_length is {line.output_length}"
    if line.timestamp is None and line.session_id is None:
        return "there is neither a timestamp nor a session_id"
    if not _is_time(line.timestamp) or not _is_time(line.delay):
        return "timestamp and delay are milliseconds, 0 or more"
    blocks = -(-line.input_length // block)
    if len(line.hash_ids) != blocks:
        return f"{line.input_length} tokens are {blocks} blocks of {block}, and there are {len(line.hash_ids)} hash_ids (see --trace-block-size)"
    if line.hash_ids and not 0 <= min(line.hash_ids) <= max(line.hash_ids) < 2**48:
        return "hash_ids are whole numbers from 0 to 2**48"
    return ""


def _is_time(value: float | None) -> bool:
    return value is None or 0 <= value < float("inf")


def write(trace: Trace, path: Path) -> None:
    """Write the trace in the format that `read` reads."""
    encode = msgspec.json.Encoder().encode
    with path.open("wb") as file:
        for i in range(len(trace)):
            ids = trace.ids[trace.start[i] : trace.start[i + 1]].tolist()
            line: dict[str, object] = {"input_length": int(trace.prompt[i]), "output_length": int(trace.output[i]), "hash_ids": ids}
            waits = trace.after is not None and trace.after[i] >= 0
            line["delay" if waits else "timestamp"] = float(trace.arrival[i])
            if trace.session is not None and trace.session[i] >= 0:
                line["session_id"] = int(trace.session[i])
            file.write(encode(line) + b"\n")


__all__: Sequence[str] = ["BLOCK", "Line", "Trace", "build", "read", "write"]
