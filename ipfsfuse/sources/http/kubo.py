"""A Kubo node: blocks from its repository on this machine, from its gateway port, or over its RPC API.

A block from the repository takes 0.1 ms, and no time of the node. From the gateway port it takes 1 ms, over
the RPC API three times that. The files `api` and `gateway` of the node's repository ($IPFS_PATH, else
~/.ipfs) say where the node listens. They are read again when the node does not answer: it may have been
restarted on other ports.
"""

import base64
import json
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import urlencode

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import IpfsFuseError, NotHere, SourceFailed, UsageError
from ipfsfuse.sources import streams
from ipfsfuse.sources.base import LeafRange, Source, Subtree
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.http.failures import CONNECT, LONG, PAGE, PROTOCOL, REFUSED, one_line, refused
from ipfsfuse.sources.http.gateway import CONNECTIONS_HERE, Gateway
from ipfsfuse.sources.http.origin import Origin, parse_multiaddr, read_origin, repository
from ipfsfuse.sources.http.settings import Headers, HttpSettings, kubo_authorization, kubo_token
from ipfsfuse.sources.local.kubo_repo import Flatfs
from ipfsfuse.sources.streams import Delivery, Hashed, Send
from ipfsfuse.structures import Buffer

NO_GATEWAY = frozenset((CONNECT, REFUSED, PAGE, PROTOCOL))
"""Failures of the gateway port (off, guarded, another program's). The RPC API may still have the block."""


class Kubo(Source):
    """`api` is the RPC address that the user gave; None finds the node by its repository. `blocks` reads the
    blocks in that repository; None if it can't be read."""

    def __init__(
        self,
        name: str,
        settings: HttpSettings,
        api: Origin | None = None,
        *,
        blocks: Flatfs | None = None,
        offline: bool = False,
    ) -> None:
        kubo_authorization()  # reports an unusable secret at once
        self.name, self.blocks = name, blocks
        self._settings, self._api, self._offline = settings, api, offline
        self._repository = repository()
        self._rpc: Rpc | None = None
        self._gateway: Gateway | None = None
        self._asked_for_gateway = False

    async def get(self, cid: Cid) -> bytes:
        block = await self.get_hashed(cid)
        return bytes(block.block if isinstance(block, Hashed) else block)

    async def get_hashed(self, cid: Cid) -> Buffer | Hashed:
        """The block, with its hash if it was hashed while it was read from the repository."""
        if self.blocks is not None and (block := await self.blocks.get(cid)) is not None:
            return block
        if gateway := await self._find_gateway():
            try:
                return await gateway.get(cid)
            except SourceFailed as exc:
                await self._note_gateway(exc)
        arguments = [("arg", cids.text(cid))] + [("offline", "true")] * self._offline
        try:
            return await self.rpc().call("block/get", arguments, cids.MAX_BLOCK)
        except SourceFailed as exc:
            if exc.kind == LONG:
                raise cids.too_large(self.name, cid) from exc
            if exc.kind == CONNECT:
                await self.aclose()
            raise

    async def _note_gateway(self, failure: SourceFailed) -> None:
        """Raises `failure` unless only the gateway port has failed."""
        if failure.kind not in NO_GATEWAY:
            raise failure
        if failure.kind == CONNECT:
            await self.aclose()

    async def ipns_record(self, name: str) -> bytes:
        """The newest record that the node finds of `name`, unverified. Raises NotHere, SourceFailed."""
        arguments = [("arg", f"/ipns/{name}")] + [("offline", "true")] * self._offline
        said = await self.rpc().call("routing/get", arguments)
        try:
            return base64.b64decode(json.loads(said.splitlines()[-1])["Extra"], validate=True)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as exc:
            raise SourceFailed(f"{self.name} routing/get: it answered with no record", PROTOCOL) from exc

    async def send_leaves(self, wanted: LeafRange, send: Send[Delivery]) -> None:
        start = 0 if self.blocks is None else await self.blocks.send_leaves(wanted, send, self.name)
        if start == len(wanted.leaves):
            return
        if start:
            wanted, send = replace(wanted, leaves=wanted.leaves[start:]), streams.Shifted(send, start)
        if gateway := await self._find_gateway():
            await gateway.send_leaves(wanted, send)
        else:
            await streams.send_singly(self.get, wanted.leaves, send, CONNECTIONS_HERE)

    async def send_subtree(self, subtree: Subtree, send: Send[streams.BlockBatch]) -> None:
        """For a listing, asks the gateway port: it sends many small nodes faster than they are read from the
        repository."""
        if subtree.whole and self.blocks is not None and await self.blocks.send_subtree(subtree, send):
            return
        if gateway := await self._find_gateway():
            try:
                await gateway.send_subtree(subtree, send)
            except SourceFailed as exc:
                await self._note_gateway(exc)

    def rpc(self) -> "Rpc":
        """The node's RPC API. Raises SourceFailed if no node is running."""
        if self._rpc is None:
            origin = self._api or self._read("api")
            if self._offline and not origin.is_local:
                raise SourceFailed(f"{origin.text} is not on this machine: this mount is offline", CONNECT)
            token, advice = kubo_token(None if self._api else self._repository / "api")
            headers = self._settings.headers.with_token(origin, token)
            self._rpc = Rpc(Http(origin, replace(self._settings, headers=headers)), self.name, advice)
        return self._rpc

    async def _find_gateway(self) -> Gateway | None:
        """The gateway port that the node names; None if it is not on this machine."""
        if not self._asked_for_gateway:
            found = None
            with suppress(IpfsFuseError, ValueError):
                if self._api is None:
                    found = self._read("gateway")
                elif self._api.is_local:
                    said = await self.rpc().call("config", [("arg", "Addresses.Gateway")])
                    found = parse_multiaddr(said.decode().partition('"Value":"')[2].partition('"')[0])
            self._asked_for_gateway = True
            if found is not None and found.is_local:
                http = Http(found, self._settings)
                self._gateway = Gateway(http, self.name, local=True, only_cached=self._offline)
        return self._gateway

    def _read(self, file: str) -> Origin:
        path = self._repository / file
        try:
            return read_origin(path)
        except FileNotFoundError as exc:
            advice = "start `ipfs daemon` or set IPFS_PATH"
            raise SourceFailed(f"no Kubo node runs: there is no {path}; {advice}", CONNECT) from exc
        except (OSError, UnicodeDecodeError, UsageError) as exc:
            raise SourceFailed(f"{path} can't be used: {exc}", CONNECT) from exc

    async def aclose(self) -> None:
        """Closes the connections to the node. A later request reads the node's addresses again."""
        rpc, gateway = self._rpc, self._gateway
        self._rpc = self._gateway = None
        self._asked_for_gateway = False
        for each in (rpc.http if rpc else None, gateway):
            if each is not None:
                await each.aclose()


# -- the RPC API ---------------------------------------------------------------------------------------------

_ABSENT: Final = ("not found", "could not find", "no link named", "block was not found locally")
_REPEATABLE: Final = {
    *("block/get", "block/put", "block/stat", "config"),
    *("files/read", "files/rm", "files/stat", "ls", "routing/get"),
}
"""Commands that have the same effect when they are repeated."""


@dataclass(slots=True)
class Rpc:
    """Sends commands to one node, by POST /api/v0/<command>.

    A call that is cancelled closes its connection, which ends the command at the node."""

    http: Http
    name: str
    _advice: str = "look at its API.Authorizations"  # what to do if the node refuses us

    async def call(
        self, command: str, arguments: Headers = (), limit: int = 65536, file: bytes | None = None
    ) -> bytes:
        """Sends a command, with `file` as the file of a form. Returns the response's body, of at most `limit`
        bytes. Raises NotHere if the node can't find something, SourceFailed otherwise."""
        repeatable = command in _REPEATABLE
        target = f"/api/v0/{command}" + (f"?{urlencode(arguments)}" if arguments else "")
        async with self.http.ask("POST", target, file=file, repeatable=repeatable) as response:
            if response.status == 200:
                return await response.read(limit)
            said = await response.read_error()
            if response.status in (401, 403):
                raise SourceFailed(f"{self.name} refused us: {self._advice}", REFUSED)
            if response.status == 500:
                with suppress(ValueError, KeyError, TypeError, RecursionError):  # not JSON with a Message
                    message = one_line(str(json.loads(said)["Message"]))
                    if any(absent in message for absent in _ABSENT):
                        raise NotHere(f"{self.name}: {message}")
                    raise SourceFailed(f"{self.name} {command}: {message}", "node")
            raise refused(self.name, response.status, response.headers.get("retry-after", ""), said)
