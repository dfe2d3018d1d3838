"""Who we are to an API server, and how its connection is secured: a service account in a pod, or an entry of a kubeconfig file."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import tempfile
import time
from base64 import b64decode, b64encode
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import attrs
from ruamel.yaml import YAML, YAMLError

from dynamo_core.errors import ConfigError, Problem

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds the token, the CA and the namespace of its service account."""
_REREAD = 60.0
"""Seconds after which a token file is read again: the kubelet renews it while we run."""
_EXEC_SECONDS = 30.0
_EARLY = 60.0
"""Seconds before its end at which a token of a credential plugin is asked for anew."""

Json = Mapping[str, Any]


class Credentials:
    """What a request to the API server carries. `server` and `namespace` never change; token and certificates do."""

    server: str
    namespace: str
    server_name: str | None = None
    """Name in the server's certificate, where it is not that of the URL."""

    async def headers(self) -> dict[str, str]:
        raise NotImplementedError

    def renew(self) -> bool:
        """The server does not take us for who we say we are: forget the token. False when there is nothing to ask anew."""
        return False

    def tls(self) -> ssl.SSLContext | bool:
        raise NotImplementedError


class ServiceAccount(Credentials):
    """In a pod: token, CA and namespace in files that the kubelet keeps fresh."""

    def __init__(self, folder: Path, server: str) -> None:
        self.server = server
        self._folder = folder
        self.namespace = (folder / "namespace").read_text().strip() or "default"
        self._token = _TokenFile(folder / "token")
        self._ca = _FileContext(folder / "ca.crt")

    async def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token.read()}"}

    def renew(self) -> bool:
        self._token.forget()
        return True

    def tls(self) -> ssl.SSLContext | bool:
        return self._ca.context()


class KubeConfig(Credentials):
    """One context of a kubeconfig file: token, token file, client certificate, password, or a credential plugin (`exec`)."""

    def __init__(self, context: Json, cluster: Json, user: Json, folder: Path) -> None:
        self.server = str(cluster["server"]).rstrip("/")
        self.namespace = str(context.get("namespace") or "default")
        self.server_name = cluster.get("tls-server-name")
        self._cluster, self._user, self._folder = cluster, user, folder
        self._token = _TokenFile(self._path(user["tokenFile"])) if user.get("tokenFile") else None
        self._plugin = _Plugin(user["exec"], folder) if user.get("exec") else None
        self._ca = _FileContext(self._path(cluster["certificate-authority"])) if cluster.get("certificate-authority") else None
        self._fixed = self._context() if self._ca is None and self.server.startswith("https:") else None

    async def headers(self) -> dict[str, str]:
        user = self._user
        if self._token is not None:
            return {"Authorization": f"Bearer {self._token.read()}"}
        if user.get("token"):
            return {"Authorization": f"Bearer {user['token']}"}
        if self._plugin is not None:
            return {"Authorization": f"Bearer {await self._plugin.token()}"}
        if user.get("username"):
            return {"Authorization": "Basic " + b64encode(f"{user['username']}:{user.get('password', '')}".encode()).decode()}
        return {}

    def renew(self) -> bool:
        for source in (self._token, self._plugin):
            if source is not None:
                source.forget()
                return True
        return False

    def tls(self) -> ssl.SSLContext | bool:
        if self._ca is not None:
            return self._ca.context(self._present_certificate)
        return self._fixed if self._fixed is not None else True

    def _context(self) -> ssl.SSLContext:
        data = self._cluster.get("certificate-authority-data")
        context = ssl.create_default_context(cadata=b64decode(data).decode() if data else None)
        if self._cluster.get("insecure-skip-tls-verify"):
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        self._present_certificate(context)
        return context

    def _present_certificate(self, context: ssl.SSLContext) -> None:
        user = self._user
        if user.get("client-certificate"):
            context.load_cert_chain(self._path(user["client-certificate"]), self._path(user["client-key"]) if user.get("client-key") else None)
        elif user.get("client-certificate-data"):
            with tempfile.TemporaryDirectory() as folder:  # ssl reads files only; the folder is for our eyes alone
                cert, key = Path(folder, "cert"), Path(folder, "key")
                cert.write_bytes(b64decode(user["client-certificate-data"]))
                key.write_bytes(b64decode(user.get("client-key-data", "")))
                context.load_cert_chain(cert, key)

    def _path(self, written: str) -> Path:
        return self._folder / written


def find(kubeconfig: Path | None, context: str | None, namespace: str | None, *, environ: Mapping[str, str] | None = None,
         service_account: Path | None = None) -> Credentials:
    """The file that is named; else the service account of this pod; else `$KUBECONFIG` or `~/.kube/config`.

    :raises ConfigError: there is none, or it cannot be used; says why.
    """
    environ = os.environ if environ is None else environ
    service_account = service_account or SERVICE_ACCOUNT
    host = environ.get("KUBERNETES_SERVICE_HOST")
    try:
        if kubeconfig is None and context is None and host and (service_account / "token").exists():
            host = f"[{host}]" if ":" in host else host
            found: Credentials = ServiceAccount(service_account, f"https://{host}:{environ.get('KUBERNETES_SERVICE_PORT', '443')}")
        else:
            files = [kubeconfig] if kubeconfig is not None else [Path(f) for f in environ.get("KUBECONFIG", "").split(os.pathsep) if f]
            found = _from_files(files or [Path.home() / ".kube" / "config"], context)
    except (OSError, ValueError, ssl.SSLError) as e:
        raise ConfigError(Problem(f"the credentials for Kubernetes cannot be read: {e}", remedy="check the files that they name")) from e
    if namespace:
        found.namespace = namespace
    return found


def _from_files(files: list[Path], context: str | None) -> KubeConfig:
    """Of several files, the first that has an entry counts, as for kubectl."""
    entries: dict[tuple[str, str], tuple[Json, Path]] = {}
    current = context
    for file in files:
        if not file.exists() and len(files) > 1:
            continue
        if not file.exists():
            raise ConfigError(Problem(f"there is no kubeconfig {file}, and this is not a pod with a service account",
                                      remedy="set `kubeconfig`, or let the pod mount its service account's token"))
        try:
            content: Any = YAML(typ="safe", pure=True).load(file.read_text())  # pyright: ignore[reportUnknownMemberType]
        except YAMLError as e:
            raise ConfigError(Problem(f"the kubeconfig is not YAML: {e}", where=str(file))) from e
        if not isinstance(content, Mapping):
            raise ConfigError(Problem("this is no kubeconfig", where=str(file)))
        content = cast(Json, content)
        current = current or content.get("current-context")
        for kind, plural in (("context", "contexts"), ("cluster", "clusters"), ("user", "users")):
            for entry in content.get(plural) or ():
                entries.setdefault((kind, str(entry.get("name"))), (entry.get(kind) or {}, file))
    where = ", ".join(map(str, files))

    def named(kind: str, name: str | None) -> tuple[Json, Path]:
        if not name or (kind, name) not in entries:
            known = ", ".join(sorted(n for k, n in entries if k == kind)) or "none"
            raise ConfigError(Problem(f"the kubeconfig has no {kind} {name!r}", where=where, remedy=f"it has: {known}"))
        return entries[kind, name]

    chosen, _ = named("context", current)
    cluster, file = named("cluster", chosen.get("cluster"))
    user, of_user = named("user", chosen["user"]) if chosen.get("user") else ({}, file)
    if not cluster.get("server"):
        raise ConfigError(Problem(f"the cluster {chosen.get('cluster')!r} has no server", where=where))
    if cluster.get("proxy-url") or user.get("auth-provider"):
        raise ConfigError(Problem("`proxy-url` and `auth-provider` of a kubeconfig are not supported", where=where, remedy="use `exec` for credentials"))
    folder = of_user.parent
    absolute = {key: str(file.parent / cluster[key]) for key in ("certificate-authority",) if cluster.get(key)}
    return KubeConfig(chosen, {**cluster, **absolute}, user, folder)


class _TokenFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._token = ""
        self._until = 0.0

    def read(self) -> str:
        if time.monotonic() >= self._until:
            try:
                self._token = self._path.read_text().strip()
            except OSError:
                if not self._token:
                    raise
            self._until = time.monotonic() + _REREAD
        return self._token

    def forget(self) -> None:
        self._until = 0.0


class _FileContext:
    """Trust in the CA of a file, made again when the file has changed."""

    def __init__(self, ca: Path) -> None:
        self._ca = ca
        self._stamp = 0
        self._made: ssl.SSLContext | None = None

    def context(self, more: Any = None) -> ssl.SSLContext:
        try:
            stamp = self._ca.stat().st_mtime_ns
            if self._made is None or stamp != self._stamp:
                made = ssl.create_default_context(cafile=self._ca)
                if more is not None:
                    more(made)
                self._made, self._stamp = made, stamp
        except (OSError, ssl.SSLError):
            if self._made is None:
                raise
        return self._made


@attrs.define
class _Plugin:
    """A command that prints an `ExecCredential`, as clouds install for their clusters."""

    _spec: Json
    _folder: Path
    _token: str = attrs.field(init=False, default="")
    _until: float = attrs.field(init=False, default=0.0)

    def forget(self) -> None:
        self._token = ""

    async def token(self) -> str:
        if not self._token or time.time() > self._until:
            status = await self._ask()
            self._token = str(status["token"])
            end = status.get("expirationTimestamp")
            self._until = datetime.fromisoformat(end.replace("Z", "+00:00")).timestamp() - _EARLY if end else float("inf")
        return self._token

    async def _ask(self) -> Json:
        version = str(self._spec.get("apiVersion", "client.authentication.k8s.io/v1"))
        command = [str(self._spec["command"]), *map(str, self._spec.get("args") or ())]
        if "/" in command[0]:
            command[0] = str(self._folder / command[0])
        info = {"apiVersion": version, "kind": "ExecCredential", "spec": {"interactive": False}}
        environ = {**os.environ, **{str(e["name"]): str(e["value"]) for e in self._spec.get("env") or ()}, "KUBERNETES_EXEC_INFO": json.dumps(info)}
        process = await asyncio.create_subprocess_exec(*command, env=environ, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                                                       stderr=asyncio.subprocess.PIPE)
        try:
            async with asyncio.timeout(_EXEC_SECONDS):
                said, complained = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode:
            raise OSError(f"the credential plugin {command[0]} ended with {process.returncode}: {complained.decode(errors='replace').strip()[:200]}")
        try:
            status: Any = json.loads(said)["status"]
            if not status.get("token"):
                raise ValueError("it gave no token")
            return status
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise OSError(f"the credential plugin {command[0]} did not print a usable ExecCredential: {e}") from e
