"""Frontend processes behind one address: whichever of them is scraped tells the numbers of all, each with the name of its process, and whichever is asked
for a decision finds it.

They meet in a folder that their supervisor made: each listens on a socket there, and answers one question, a line, to whoever connects.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

VARIABLE = "DYNAMO_SIBLINGS"
"""Where the supervisor says in which folder, and under which name."""
_PATIENCE = 2.0
"""Seconds in which a sibling must have answered. One that hangs costs a scrape no more than that."""
_LABEL = "process"
_METRICS = "metrics"

Explained = Callable[[str], Awaitable[Mapping[str, Any] | None]]
"""The record of a decision, by its id."""


class _Family(msgspec.Struct, array_like=True):
    name: str
    documentation: str
    type: str
    unit: str
    samples: list[tuple[str, dict[str, str], float]]


_Answer = TypeVar("_Answer")
_families = msgspec.msgpack.Decoder(list[_Family])
_record = msgspec.msgpack.Decoder(dict[str, Any] | None)


class Together(Collector):
    """Series of several processes, as one registry has them."""

    def __init__(self, processes: Mapping[str, Iterable[_Family]]) -> None:
        self._metrics: dict[str, Metric] = {}
        for process, families in processes.items():
            for family in families:
                if (metric := self._metrics.get(family.name)) is None:
                    metric = self._metrics[family.name] = Metric(family.name, family.documentation, family.type, family.unit)
                for name, labels, value in family.samples:
                    metric.add_sample(name, {**labels, _LABEL: process}, value)
        answered = self._metrics["dynamo_frontend_processes"] = Metric("dynamo_frontend_processes", "Processes whose numbers these are", "gauge")
        answered.add_sample("dynamo_frontend_processes", {}, len(processes))

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics.values())


class Siblings:
    """An async context manager: while it is entered, the others hear our numbers and decisions."""

    def __init__(self, registry: CollectorRegistry, path: Path, explained: Explained) -> None:
        """:param path: of our socket; the others have theirs beside it. :param explained: finds our own decisions."""
        self._registry = registry
        self._explained = explained
        self._path = path
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Siblings:
        self._path.unlink(missing_ok=True)  # of a predecessor that was killed
        try:
            self._server = await asyncio.start_unix_server(self._tell, self._path)
        except OSError as e:
            log.warning("other processes will not see the metrics of this one: %s", e)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def together(self) -> Together:
        """What all who answer have counted."""
        others = self._others()
        heard = await asyncio.gather(*(_ask(path, _METRICS, _families) for path in others))
        found = [(self._path, _own(self._registry)), *zip(others, heard, strict=True)]
        return Together({path.stem: families for path, families in sorted(found, key=lambda pair: pair[0]) if families is not None})

    async def decision(self, id: str) -> Mapping[str, Any] | None:
        """One that another process has made."""
        answers = await asyncio.gather(*(_ask(path, f"decision {id}", _record) for path in self._others())) if id.isprintable() else ()
        return next(filter(None, answers), None)

    def _others(self) -> list[Path]:
        return sorted(path for path in self._path.parent.glob("*.sock") if path != self._path)

    async def _tell(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                asked, _, about = (await reader.readline()).decode().rstrip("\n").partition(" ")
            answer = _own(self._registry) if asked == _METRICS else await self._explained(about)
            writer.write(msgspec.msgpack.encode(answer))
            await writer.drain()
        writer.close()


def siblings(registry: CollectorRegistry, explained: Explained) -> Siblings | None:
    """As the supervisor of this process wants it; `None`: this process is alone."""
    path = os.environ.get(VARIABLE)
    return Siblings(registry, Path(path), explained) if path else None


@contextlib.contextmanager
def meeting_place(names: Sequence[str]) -> Generator[list[dict[str, str]]]:
    """For a supervisor: the variables that each of its frontend processes needs. Nothing for one that is alone."""
    if len(names) < 2:
        yield [{} for _ in names]
        return
    folder = Path(tempfile.mkdtemp(prefix="dynamo-"))  # nobody else may read it
    try:
        yield [{VARIABLE: str(folder / f"{name}.sock")} for name in names]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _own(registry: CollectorRegistry) -> list[_Family]:
    return [
        _Family(metric.name, metric.documentation, metric.type, metric.unit, [(sample.name, dict(sample.labels), sample.value) for sample in metric.samples])
        for metric in registry.collect()
    ]


async def _ask(path: Path, question: str, decoder: msgspec.msgpack.Decoder[_Answer]) -> _Answer | None:
    try:
        async with asyncio.timeout(_PATIENCE):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                writer.write(question.encode() + b"\n")
                return decoder.decode(await reader.read(-1))
            finally:
                writer.close()
    except (OSError, TimeoutError, msgspec.DecodeError) as e:
        log.debug("%s does not answer: %r", path.stem, e)
        return None
