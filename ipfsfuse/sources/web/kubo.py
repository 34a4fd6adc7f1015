"""A Kubo node: blocks from its gateway port where it has one (three times as fast), else over its RPC API.

Where the node listens stands in its repository ($IPFS_PATH, else ~/.ipfs): `api`, a multiaddr, and `gateway`, a URL,
each written when its daemon starts. They are read again when the node does not answer: it may have been restarted on
other ports.

Concurrency: as every source. Nothing is verified here.
"""

import os
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotHere, SourceFailed, UsageError
from ipfsfuse.sources import runs
from ipfsfuse.sources.base import Deliver, DeliverBlocks, Run, Subtree
from ipfsfuse.sources.web.failures import CONNECT, PAGE, PROTOCOL, REFUSED
from ipfsfuse.sources.web.gateway import MAX_BLOCK, Gateway
from ipfsfuse.sources.web.http import Http, HttpSettings
from ipfsfuse.sources.web.origin import Origin, parse_origin
from ipfsfuse.sources.web.rpc import Rpc

CONNECTIONS = 2
"""Requests of one run side by side: on 2 cores a second one gained 5 to 25 % on runs of over 64 MiB, a third nothing."""

NO_GATEWAY = frozenset((CONNECT, REFUSED, PAGE, PROTOCOL))
"""Failures that tell of the gateway port (off, guarded, something else's), not of the block: RPC may have it."""


def repository() -> Path:
    return Path(os.environ.get("IPFS_PATH") or Path.home() / ".ipfs")


def parse_multiaddr(text: str) -> Origin:
    """/ip4|ip6|dns.../HOST/tcp/PORT[/http|/https] or /unix/PATH. Raises UsageError."""
    parts = text.strip().split("/")
    if len(parts) > 2 and parts[1] == "unix":
        return unix_origin("/" + "/".join(parts[2:]).lstrip("/"))
    if len(parts) < 5 or parts[1] not in ("ip4", "ip6", "dns", "dns4", "dns6") or parts[3] != "tcp" or not parts[4].isdigit():
        raise UsageError(f"{text.strip()[:200]!r} is no address of a node: /ip4/HOST/tcp/PORT or /unix/PATH was expected")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(parts[2], parts[2])
    scheme = "https" if "https" in parts[5:] else "http"
    return parse_origin(f"{scheme}://[{host}]:{parts[4]}" if ":" in host else f"{scheme}://{host}:{parts[4]}")


def unix_origin(path: str) -> Origin:
    return Origin("http", "localhost", 80, unix=path)


def authorization() -> tuple[str, str]:
    """The Authorization header's value and where it came from; ("", "") where none is set. Raises UsageError.

    From $IPFSFUSE_KUBO_AUTH or the file that $IPFSFUSE_KUBO_AUTH_FILE names: `bearer:TOKEN` or `basic:USER:PASSWORD`,
    as Kubo itself writes them in API.Authorizations."""
    secret, where = os.environ.get("IPFSFUSE_KUBO_AUTH", ""), "IPFSFUSE_KUBO_AUTH"
    path = os.environ.get("IPFSFUSE_KUBO_AUTH_FILE")
    if not secret and path:
        where = path
        try:
            secret = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise UsageError(f"IPFSFUSE_KUBO_AUTH_FILE: {path} can't be read: {exc}") from exc
    if not secret:
        return "", ""
    kind, _, value = secret.partition(":")
    if kind == "bearer" and value and value.isascii() and value.isprintable():
        return f"Bearer {value}", where
    if kind == "basic" and ":" in value:
        return "Basic " + b64encode(value.encode()).decode(), where
    raise UsageError(f"{where} holds neither bearer:TOKEN nor basic:USER:PASSWORD")


class Kubo:
    """`api` is the RPC address that was asked for; None finds the node by its repository."""

    in_place = False

    def __init__(self, name: str, settings: HttpSettings, api: Origin | None = None, *, offline: bool = False) -> None:
        self.name = name
        self._settings = settings
        self._named = api
        self._offline = offline
        self._repository = repository()
        self._auth, self._auth_from = authorization()
        self._rpc: Rpc | None = None
        self._gateway: Gateway | None = None
        self._asked_for_gateway = False

    async def get(self, cid: Cid) -> bytes:
        gateway = await self._find_gateway()
        if gateway is not None:
            try:
                return await gateway.get(cid)
            except SourceFailed as exc:
                await self._note_gateway(exc)
        return await self._get_by_rpc(cid)

    async def _note_gateway(self, failure: SourceFailed) -> None:
        """Raises `failure` where it tells of more than the gateway port."""
        if failure.kind not in NO_GATEWAY:
            raise failure
        if failure.kind == CONNECT:
            await self._forget()

    async def _get_by_rpc(self, cid: Cid) -> bytes:
        arguments = [("arg", cids.text(cid))] + ([("offline", "true")] if self._offline else [])
        try:
            return await self.rpc().call("block/get", arguments, MAX_BLOCK)
        except SourceFailed as exc:
            if exc.kind == CONNECT:
                await self._forget()
            raise

    async def stream(self, run: Run, deliver: Deliver) -> None:
        gateway = await self._find_gateway()
        if gateway is not None:
            await gateway.stream(run, deliver)
        else:
            await runs.by_blocks(self.get, run, deliver, CONNECTIONS)

    async def subtree(self, subtree: Subtree, deliver: DeliverBlocks) -> None:
        gateway = await self._find_gateway()
        if gateway is not None:
            try:
                await gateway.subtree(subtree, deliver)
            except SourceFailed as exc:
                await self._note_gateway(exc)

    def rpc(self) -> Rpc:
        """The node's RPC API, for its pins too. Raises SourceFailed where no node is running."""
        if self._rpc is None:
            origin = self._named or self._read("api")
            headers = [*self._settings.headers, *([("Authorization", self._auth)] if self._auth else [])]
            self._rpc = Rpc(Http(origin, replace(self._settings, headers=headers)), self.name, self._auth_from)
        return self._rpc

    async def _find_gateway(self) -> Gateway | None:
        if not self._asked_for_gateway:
            origin = await self._gateway_of_named() if self._named else self._read_gateway()
            self._asked_for_gateway = True
            if origin is not None:
                http = Http(origin, self._settings)
                self._gateway = Gateway(http, self.name, local=True, only_cached=self._offline, connections=CONNECTIONS)
        return self._gateway

    def _read_gateway(self) -> Origin | None:
        try:
            return self._read("gateway")
        except SourceFailed:
            return None

    async def _gateway_of_named(self) -> Origin | None:
        """What a node on this machine says about its gateway port; never a port of another host than its own."""
        assert self._named is not None
        if not self._named.is_local:
            return None
        try:
            answer = await self.rpc().call("config", [("arg", "Addresses.Gateway")])
            found = parse_multiaddr(answer.decode().partition('"Value":"')[2].partition('"')[0])
        except (NotHere, SourceFailed, UsageError, UnicodeDecodeError):
            return None
        return found if found.is_local else None

    def _read(self, file: str) -> Origin:
        path = self._repository / file
        try:
            text = path.read_text().strip()
            return parse_multiaddr(text) if text.startswith("/") else parse_origin(text)
        except FileNotFoundError as exc:
            raise SourceFailed(f"no Kubo node runs: there is no {path}; start `ipfs daemon` or set IPFS_PATH", CONNECT) from exc
        except (OSError, UnicodeDecodeError, UsageError) as exc:
            raise SourceFailed(f"{path} can't be used: {exc}", CONNECT) from exc

    async def _forget(self) -> None:
        """The node did not answer where it was: read anew where it is."""
        rpc, gateway = self._rpc, self._gateway
        self._rpc = self._gateway = None
        self._asked_for_gateway = False
        for open_one in (rpc.http if rpc else None, gateway):
            if open_one is not None:
                await open_one.aclose()

    def roots(self) -> Sequence[Cid]:
        return ()

    async def aclose(self) -> None:
        await self._forget()
