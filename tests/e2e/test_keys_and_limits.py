"""Keys and limits on a real stack, as OpenAI's own client library meets them."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import openai
import pytest

from dynamo_core.cli.local_stack import LocalStack
from dynamo_core.config import load
from dynamo_core.frontend import keyfile
from dynamo_core.plugins import Plugins

STACK = """
[discovery]
use = "file"
path = "{folder}/discovery"

[frontend]
port = 0
drain_timeout = 2
tenant_cache_salt = true
authenticator = {{ use = "api-keys", file = "{folder}/keys.json", look_every = 0.1 }}

[frontend.admin]
key = "file:{folder}/admin-key"

[frontend.rate_limiter]
use = "per-tenant"
[frontend.rate_limiter.tenants.small]
requests = "2/2 seconds"
[frontend.rate_limiter.tenants.frugal]
tokens = "100/hour"

[[workers]]
engine = "echo"
drain_timeout = 2
"""


@pytest.fixture
async def stack(tmp_path: Path):
    (tmp_path / "admin-key").write_text("open sesame\n")
    keyfile.add(tmp_path / "keys.json", "root", admin=True)
    path = tmp_path / "stack.toml"
    path.write_text(STACK.format(folder=tmp_path))
    plugins = Plugins.load()
    said: list[str] = []
    async with LocalStack.open(path, (), load(path, plugins=plugins), plugins, lambda name, line: said.append(f"{name} | {line}")) as stack:
        try:
            stack.url = await stack.wait_ready(lambda _: None, 90.0)
        except BaseException:
            print("\n".join(said[-40:]))
            raise
        stack.keys = tmp_path / "keys.json"
        yield stack


async def ask(client: openai.AsyncOpenAI, **more):
    return await client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "one two three"}], **{"max_tokens": 5} | more)


@pytest.mark.slow
async def test_keys_limits_and_the_operators_address(stack):
    def client(tenant: str, **more) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=keyfile.add(stack.keys, tenant)[0], **more)

    # Strangers
    stranger = openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="dk_00000000_" + "A" * 43)
    with pytest.raises(openai.AuthenticationError) as refused:
        await ask(stranger)
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        await stranger.models.list()

    # A new key counts without a restart, and a revoked one no more
    small, frugal = client("small"), client("frugal", max_retries=0)
    leaver = client("leaver", max_retries=0)
    async with httpx.AsyncClient() as http:
        for _ in range(100):
            if (await http.get(f"{stack.url}/v1/models", headers={"authorization": f"Bearer {leaver.api_key}"})).status_code == 200:
                break
    assert (await ask(leaver)).usage is not None
    keyfile.revoke(stack.keys, leaver.api_key)

    # The library waits as it is told, and then succeeds
    await ask(small)
    await ask(small)
    started = time.monotonic()
    assert (await ask(small)).choices
    assert time.monotonic() - started > 0.9, "Retry-After says at least a second"
    impatient = small.with_options(max_retries=0)
    with pytest.raises(openai.RateLimitError) as limited:
        for _ in range(5):
            await ask(impatient)
    assert limited.value.code == "rate_limit_exceeded"
    assert int(limited.value.response.headers["retry-after"]) >= 1

    # Tokens: never more than the whole limit, and streams are charged for what they used
    with pytest.raises(openai.RateLimitError) as never:
        await ask(frugal.with_options(max_retries=5), max_tokens=500)
    assert (never.value.code, never.value.response.headers["x-should-retry"]) == ("insufficient_quota", "false")
    used = 0
    with pytest.raises(openai.RateLimitError, match="too many tokens"):
        for _ in range(50):
            stream = await ask(frugal, stream=True, stream_options={"include_usage": True}, max_tokens=3)
            async for chunk in stream:
                used += chunk.usage.total_tokens if chunk.usage else 0
    assert 70 <= used <= 100

    with pytest.raises(openai.AuthenticationError):
        await ask(leaver)

    # The operators' side
    urls = await stack.status_urls("frontend-admin")
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{stack.url}/metrics")).status_code == 404
        assert (await http.get(f"{urls[0]}/metrics")).status_code == 401
        key = {"authorization": "Bearer open sesame"}
        metrics = (await http.get(f"{urls[0]}/metrics", headers=key)).text
        assert 'dynamo_frontend_tenant_requests_total{status="429",tenant="small"}' in metrics
        listed = (await http.get(f"{urls[0]}/debug/decisions", headers=key)).json()["decisions"]
        assert {"small", "frugal", "leaver"} <= {decision["tenant"] for decision in listed}
