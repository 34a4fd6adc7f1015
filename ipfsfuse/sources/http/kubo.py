"""A Kubo node: blocks from its gateway port where it has one (three times as fast), else over its RPC API.

Where the node listens stands in its repository ($IPFS_PATH, else ~/.ipfs): `api`, a multiaddr, and `gateway`, a URL,
each written when its daemon starts. They are read again when the node does not answer: it may have been restarted on
other ports. Concurrency: as every source. Nothing is verified here.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import IpfsFuseError, SourceFailed, UsageError
from ipfsfuse.sources import runs
from ipfsfuse.sources.base import Deliver, DeliverBlocks, Run, Subtree
from ipfsfuse.sources.http.client import CONNECT, PAGE, PROTOCOL, REFUSED, Http, HttpSettings
from ipfsfuse.sources.http.gateway import MAX_BLOCK, Gateway
from ipfsfuse.sources.http.rpc import Rpc
from ipfsfuse.sources.origin import Origin, parse_multiaddr, parse_origin
from ipfsfuse.sources.secrets import BoundHeaders, is_trusted, kubo_authorization

CONNECTIONS: Final = 2
"""Requests of one run side by side: on 2 cores a second one gained 5 to 25 % on runs of over 64 MiB, a third nothing."""
NO_GATEWAY: Final = frozenset((CONNECT, REFUSED, PAGE, PROTOCOL))
"""Failures that tell of the gateway port (off, guarded, something else's), not of the block: RPC may have it."""
SET_A_TOKEN: Final = "set IPFSFUSE_KUBO_AUTH_FILE to a file with bearer:TOKEN or basic:USER:PASSWORD"


def repository() -> Path:
    return Path(os.environ.get("IPFS_PATH") or Path.home() / ".ipfs")


class Kubo:
    """`api` is the RPC address that was asked for; None finds the node by its repository."""

    in_place = False

    def __init__(self, name: str, settings: HttpSettings, api: Origin | None = None, *, offline: bool = False) -> None:
        self.name = name
        self._settings = settings
        self._named = api
        self._offline = offline
        self._repository = repository()
        self._token, self._token_from = kubo_authorization()
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
            token, advice = self._token, f"look at the token in {self._token_from}" if self._token else SET_A_TOKEN
            if token and self._named is None and not is_trusted(self._repository / "api"):
                token = ""
                advice = f"it was not sent the token in {self._token_from}, because {self._repository} belongs to another user"
            settings = self._settings_for(origin, "api")
            headers = [*settings.headers.of(origin), *([("Authorization", token)] if token else [])]
            self._rpc = Rpc(Http(origin, replace(settings, headers=BoundHeaders({replace(origin, base=""): headers}))), self.name, advice)
        return self._rpc

    def _settings_for(self, origin: Origin, file: str) -> HttpSettings:
        """With the headers that are for the one node found here, if the user's own repository says where it is."""
        headers = self._settings.headers.for_node
        may = self._named is None and is_trusted(self._repository / file) and (origin.scheme == "https" or origin.is_local)
        if not headers or not may:
            return self._settings
        return replace(self._settings, headers=BoundHeaders({replace(origin, base=""): headers}))

    async def _find_gateway(self) -> Gateway | None:
        if not self._asked_for_gateway:
            origin = await self._gateway_of_named() if self._named else self._read_gateway()
            self._asked_for_gateway = True
            if origin is not None:
                http = Http(origin, self._settings_for(origin, "gateway"))
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
        except (IpfsFuseError, ValueError):
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
