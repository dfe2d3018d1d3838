"""API keys: hashed at rest, several per tenant, reloaded without a restart."""

from __future__ import annotations

import asyncio
import json
import stat
import time

import pytest

from dynamo_core.contracts import AuthenticatorContract
from dynamo_core.errors import ConfigError, Unauthorized
from dynamo_core.frontend import keyfile
from dynamo_core.frontend.apikeys import ApiKeys


def header(key):
    return {"authorization": f"Bearer {key}"}


class TestApiKeys(AuthenticatorContract):
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "keys.json"

    @pytest.fixture
    def callers(self, path):
        return {tenant: header(keyfile.add(path, tenant)[0]) for tenant in ("acme", "other")}

    @pytest.fixture
    def authenticator(self, path, callers):
        return ApiKeys(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "keys.json"


def test_the_file_holds_no_key_and_nobody_else_may_read_it(path):
    key, record = keyfile.add(path, "acme", note="batch")
    text = path.read_text()
    assert key not in text
    assert key.split("_", 2)[2] not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(text)["keys"][0]["tenant"] == "acme"
    assert record.id in key


def test_the_same_secret_has_another_hash_in_another_file(tmp_path):
    first, second = (keyfile.add(tmp_path / name, "acme") and keyfile.read(tmp_path / name) for name in ("a", "b"))
    assert first.salt != second.salt
    assert keyfile.hash_of(first.salt, "id", "secret") != keyfile.hash_of(second.salt, "id", "secret")


async def test_a_tenant_may_have_several_keys_and_one_can_be_revoked(path):
    keys = [keyfile.add(path, "acme")[0] for _ in range(3)]
    authenticator = ApiKeys(path, look_every=0.01)
    assert {(await authenticator.authenticate(header(key))).tenant for key in keys} == {"acme"}
    keyfile.revoke(path, keys[1])
    await asyncio.sleep(0.02)
    with pytest.raises(Unauthorized):
        await authenticator.authenticate(header(keys[1]))
    assert (await authenticator.authenticate(header(keys[2]))).tenant == "acme"


async def test_a_new_key_counts_without_a_restart(path):
    keyfile.add(path, "acme")
    authenticator = ApiKeys(path, look_every=0.01)
    key, _ = keyfile.add(path, "late", admin=True)
    await asyncio.sleep(0.02)
    principal = await authenticator.authenticate(header(key))
    assert (principal.tenant, principal.admin) == ("late", True)
    assert (await authenticator.authenticate({"x-api-key": key})).tenant == "late"


@pytest.mark.parametrize("harm", ["delete", "garbage"])
async def test_a_file_that_cannot_be_read_changes_nothing_and_is_logged_once(path, harm, caplog):
    key, _ = keyfile.add(path, "acme")
    authenticator = ApiKeys(path, look_every=0.01)
    if harm == "delete":
        path.unlink()
    else:
        path.write_text("{")
    for _ in range(3):
        await asyncio.sleep(0.02)
        assert (await authenticator.authenticate(header(key))).tenant == "acme"
    assert caplog.text.count("former keys stay valid") == 1


async def test_a_key_expires(path):
    key, record = keyfile.add(path, "acme", days=1)
    authenticator = ApiKeys(path)
    assert (await authenticator.authenticate(header(key))).subject == record.id
    assert keyfile.Keyring(keyfile.read(path)).find(key, time.time() + 2 * 86400) is None


@pytest.mark.parametrize("tenant", ["", "a b", "../x", "x" * 65, "a\n"])
def test_a_tenant_needs_a_name(path, tenant):
    with pytest.raises(ConfigError):
        keyfile.add(path, tenant)


def test_many_writers_lose_no_key(path):
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda i: keyfile.add(path, f"tenant{i}")[0], range(24)))
    ring = keyfile.Keyring(keyfile.read(path))
    assert all(ring.find(key, time.time()) for key in keys)


def test_a_missing_file_is_told_at_start(tmp_path):
    with pytest.raises(ConfigError, match="dynamo keys new"):
        ApiKeys(tmp_path / "none.json")


def test_the_commands(path, capsys):
    from dynamo_core.cli import main

    assert main(["keys", "new", "acme", "--file", str(path), "--note", "for batch"]) == 0
    key = capsys.readouterr().out.strip()
    assert main(["keys", "list", "--file", str(path)]) == 0
    listed = capsys.readouterr().out
    assert "acme" in listed
    assert "for batch" in listed
    assert key not in listed
    assert main(["keys", "list", "--file", str(path), "--json"]) == 0
    assert "hash" not in json.loads(capsys.readouterr().out)[0]
    assert main(["keys", "revoke", key.split("_")[1], "--file", str(path)]) == 0
    assert keyfile.read(path).keys == ()
    assert main(["keys", "revoke", "00000000", "--file", str(path)]) == 2
