"""A Kubo node: blocks from its gateway port where it has one (three times as fast), else over its RPC API.

Where the node listens stands in its repository ($IPFS_PATH, else ~/.ipfs), in `api` and `gateway`, read
again when the node does not answer: it may have been restarted on other ports. Concurrency: as every source.
"""

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import IpfsFuseError, SourceFailed, UsageError
from ipfsfuse.sources import runs
from ipfsfuse.sources.base import Deliver, DeliverBlocks, Run, Subtree, too_large
from ipfsfuse.sources.failures import CONNECT, LONG, PAGE, PROTOCOL, REFUSED
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.rpc import Rpc
from ipfsfuse.sources.http_settings import HttpSettings
from ipfsfuse.sources.origin import Origin, parse_multiaddr, read_origin
from ipfsfuse.sources.secrets import kubo_authorization, kubo_token

CONNECTIONS = 2
"""Requests of one run at a time: on 2 cores a second gained 5 to 25 % over 64 MiB, a third nothing."""
NO_GATEWAY = frozenset((CONNECT, REFUSED, PAGE, PROTOCOL))
"""Failures that tell of the gateway port (off, guarded, another's), not of the block: RPC may have it."""


def repository() -> Path:
    return Path(os.environ.get("IPFS_PATH") or Path.home() / ".ipfs")


class Kubo:
    """`api` is the RPC address that was asked for; None finds the node by its repository."""

    in_place = False

    def __init__(
        self, name: str, settings: HttpSettings, api: Origin | None = None, *, offline: bool = False
    ) -> None:
        kubo_authorization()  # a secret that can't be used is told at once
        self.name = name
        self._settings, self._named, self._offline = settings, api, offline
        self._repository = repository()
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
        arguments = [("arg", cids.text(cid))] + [("offline", "true")] * self._offline
        try:
            return await self.rpc().call("block/get", arguments, cids.MAX_BLOCK)
        except SourceFailed as exc:
            if exc.kind == LONG:
                raise too_large(self.name, cid) from exc
            if exc.kind == CONNECT:
                await self._forget()
            raise

    async def ipns_record(self, name: str) -> bytes:
        """The newest record the node finds of the IPNS name `name`, unverified. Raises NotHere,
        SourceFailed."""
        arguments = [("arg", f"/ipns/{name}")] + [("offline", "true")] * self._offline
        said = await self.rpc().call("routing/get", arguments)
        try:
            return base64.b64decode(json.loads(said.splitlines()[-1])["Extra"], validate=True)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as exc:
            raise SourceFailed(f"{self.name} routing/get: it answered with no record", PROTOCOL) from exc

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
            token, advice = kubo_token(None if self._named else self._repository / "api")
            headers = self._settings.headers.with_token(origin, token)
            self._rpc = Rpc(Http(origin, replace(self._settings, headers=headers)), self.name, advice)
        return self._rpc

    async def _find_gateway(self) -> Gateway | None:
        if not self._asked_for_gateway:
            origin = await self._gateway_of()
            self._asked_for_gateway = True
            if origin is not None:
                http = Http(origin, self._settings)
                ways = {"local": True, "only_cached": self._offline}
                self._gateway = Gateway(http, self.name, **ways, connections=CONNECTIONS)
        return self._gateway

    async def _gateway_of(self) -> Origin | None:
        """What a node on this machine says about its gateway port; never a port of another host."""
        try:
            if self._named is None:
                return self._read("gateway")
            if not self._named.is_local:
                return None
            said = await self.rpc().call("config", [("arg", "Addresses.Gateway")])
            found = parse_multiaddr(said.decode().partition('"Value":"')[2].partition('"')[0])
        except (IpfsFuseError, ValueError):
            return None
        return found if found.is_local else None

    def _read(self, file: str) -> Origin:
        path = self._repository / file
        try:
            return read_origin(path)
        except FileNotFoundError as exc:
            advice = "start `ipfs daemon` or set IPFS_PATH"
            raise SourceFailed(f"no Kubo node runs: there is no {path}; {advice}", CONNECT) from exc
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
