"""An etcd and a NATS that want certificates of whoever comes, and certificates that are renewed while everybody works."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Any

import attrs

_NAMES = ("etcd", "nats", "fleet")


@attrs.define
class Certified:
    """Discovery in etcd, the planes through NATS, and mutual TLS to both."""

    etcd: Any
    nats: Any
    authority: Any
    files: dict[str, tuple[Path, Path]]
    """Certificate and key of each server, and of every process of the fleet."""
    generation: int = 1

    @classmethod
    def issued(cls, folder: Path) -> Certified:
        from dynamo_core.testing import servers

        authority = servers.Authority(folder)
        files = {name: (folder / f"{name}.pem", folder / f"{name}.key") for name in _NAMES}
        made = cls(None, None, authority, files)
        made._issue()
        etcd, nats = (servers.ServerTls(authority.cert, *files[name], require_client_cert=True) for name in ("etcd", "nats"))
        made.nats = servers.NatsCluster(folder / "nats", tls=nats)
        try:
            made.etcd = servers.EtcdCluster(folder / "etcd", tls=etcd)
        except BaseException:
            made.nats.kill()
            raise
        return made

    @property
    def planes(self) -> str:
        cert, key = self.files["fleet"]
        tls = f'tls = {{ ca = "{self.authority.cert}", cert = "{cert}", key = "{key}" }}\n'
        through = "".join(f'[{plane}]\nuse = "nats"\nservers = ["{self.nats.servers[0]}"]\n{tls}' for plane in ("request_plane", "event_plane"))
        return f'[discovery]\nuse = "etcd"\nendpoints = ["{self.etcd.endpoints[0]}"]\n{tls}{through}'

    def kill(self) -> None:
        self.etcd.kill()
        self.nats.kill()

    async def renew(self) -> None:
        """New certificates at the old places, then a new connection of everybody. :raises RuntimeError: somebody still shows the old one."""
        await asyncio.to_thread(self._issue)
        self.nats.reload()
        for cluster in (self.nats, self.etcd):  # nobody connects anew for the sake of a certificate: a restart of each server has them
            await asyncio.to_thread(cluster.kill)
            await asyncio.to_thread(cluster.start)
            await asyncio.sleep(5.0)
        if stale := await asyncio.to_thread(self._stale):
            raise RuntimeError(f"certificates of before are still in use: {stale}")

    def _issue(self) -> None:
        for name, paths in self.files.items():
            for new, path in zip(self.authority.issue(f"{name}-{self.generation}"), paths, strict=True):
                aside = path.with_suffix(path.suffix + ".new")
                aside.write_bytes(new.read_bytes())
                aside.rename(path)
        self.generation += 1

    def _stale(self) -> list[str]:
        newest = f"-{self.generation - 1}"
        shown = self.nats.certificates("dynamo")
        return [name for name in (*shown, self._of(self.etcd.endpoints[0])) if not name.endswith(newest)] if shown else ["nobody is connected"]

    def _of(self, url: str) -> str:
        """The name in the certificate that a server shows."""
        host, _, port = url.rpartition("//")[2].rpartition(":")
        context = ssl.create_default_context(cafile=str(self.authority.cert))
        context.load_cert_chain(*self.files["fleet"])
        with socket.create_connection((host, int(port)), timeout=5) as plain, context.wrap_socket(plain, server_hostname=host) as secure:
            subject = secure.getpeercert()["subject"]  # pyright: ignore[reportOptionalSubscript]
        return str(subject[0][0][1])  # pyright: ignore[reportIndexIssue]
