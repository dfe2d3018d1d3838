"""`dynamo router` that runs its workers itself: one process, and KV events that never leave it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import httpx
import msgspec

STACK = """
discovery = "memory"
request_plane = "in-process"
event_plane = "in-process"

[router]
use = "kv-plus"

[[workers]]
count = 3
inside = true
engine = { use = "sim", speedup = 0, block_size = 16, total_blocks = 256, context_length = 2048 }
"""


async def test_a_router_with_its_workers_inside_knows_their_caches(tmp_path: Path) -> None:
    path, log = tmp_path / "stack.toml", tmp_path / "log"
    path.write_text(STACK)
    with log.open("wb") as out:
        router = await asyncio.create_subprocess_exec(sys.executable, "-m", "dynamo_core.cli", "router", str(path), "--port", "0", stdout=out, stderr=out)
    try:
        async with asyncio.timeout(60):
            while (found := re.search(r"routing at (http://[\d.:]+)", log.read_text())) is None:
                assert router.returncode is None, log.read_text()
                await asyncio.sleep(0.05)
            async with httpx.AsyncClient(base_url=found[1], timeout=30.0) as http:
                while True:
                    rows = [row for rows in (await http.get("/load")).json().values() for row in rows]
                    if len(rows) == 3 and all(row["proven"] and row["facts"]["kv.index_state"] == "events" for row in rows):
                        break
                    await asyncio.sleep(0.05)
                assert (await http.get("/health")).json() == {"ready": True, "missing": None, "problems": {}}
                prompt = [5 + i % 190 for i in range(200)]
                body = {"id": "r1", "model": "sim", "token_ids": prompt, "stops": {"max_tokens": 6}}
                assert (await http.post("/generate", json=body)).status_code == 200
                while (best := (await http.post("/best_worker", json={"token_ids": prompt})).json())["overlap_tokens"] != 192:
                    await asyncio.sleep(0.05)
                again = (await http.post("/generate", json={**body, "id": "r2"})).text
                assert msgspec.json.decode(again.splitlines()[0])["cached_tokens"] == 192
                done = re.findall(r'^dynamo_component_requests_total\{.*worker="backend-\d"\} ([\d.]+)', (await http.get("/metrics")).text, re.MULTILINE)
                assert done == ["2.0"], f"both went to one worker, {best['worker']}"
            router.send_signal(signal.SIGTERM)
            assert await router.wait() == 0
        assert "Traceback" not in log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(router.pid, signal.SIGKILL)
        await router.wait()
