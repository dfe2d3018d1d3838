"""Files that a model card names, fetched from any worker that has them and kept on disk by digest."""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from pathlib import Path

from dynamo_core.cards import Artifact
from dynamo_core.context import Context
from dynamo_core.errors import ProtocolViolation
from dynamo_core.runtime import names
from dynamo_core.runtime.channels import Channels
from dynamo_core.types import Instance

FETCH_TIMEOUT = 60.0
MAX_BYTES = 256 * 2**20


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamo" / "artifacts"


async def fetch(channels: Channels, instance: Instance, artifact: Artifact) -> bytes:
    """Content of the artifact, verified against its digest. :raises DynamoError: it cannot be had from this worker."""
    path = cache_dir() / artifact.digest
    content = await asyncio.to_thread(_read, path)
    if content is not None and hashlib.sha256(content).hexdigest() == artifact.digest:
        return content
    if artifact.size > MAX_BYTES:
        raise ProtocolViolation(f"{artifact.name} has {artifact.size} bytes; at most {MAX_BYTES} are taken")
    endpoint = f"{instance.namespace}.{instance.component}.{names.ARTIFACT}"
    parts = await channels.call(instance.address, endpoint, artifact.digest.encode(), Context(f"artifact-{artifact.digest[:8]}"), timeout=FETCH_TIMEOUT)
    content = b"".join(part for part in parts if isinstance(part, bytes))
    if hashlib.sha256(content).hexdigest() != artifact.digest:
        raise ProtocolViolation(f"{instance.label} sent {artifact.name} with another digest than its model card names")
    await asyncio.to_thread(_write, path, content)
    return content


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _write(path: Path, content: bytes) -> None:
    """A cache that cannot be written is no cache; the content is in memory all the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        pass
