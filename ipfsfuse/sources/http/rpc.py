"""A Kubo node's RPC API: POST /api/v0/<command>, arguments in the query.

Concurrency: any number of tasks; cancelling a call closes its connection, which ends the command at the node.
"""

import json
from typing import Final
from urllib.parse import urlencode

from ipfsfuse.errors import NotHere, SourceFailed
from ipfsfuse.sources.failures import REFUSED, one_line, refused
from ipfsfuse.sources.http.client import ERROR_BODY, Http
from ipfsfuse.sources.secrets import Headers as Pairs

_ABSENT: Final = ("not found", "could not find", "no link named", "block was not found locally")
_REPEATABLE: Final = frozenset(
    [
        "block/get",
        "block/put",
        "block/stat",
        "config",
        "files/read",
        "files/rm",
        "files/stat",
        "ls",
        "routing/get",
    ]
)
"""Commands that do the same when they are done twice."""


class Rpc:
    """Commands of one node. `advice` says what to do where it refuses us."""

    def __init__(self, http: Http, name: str, advice: str = "look at its API.Authorizations") -> None:
        self.http = http
        self.name = name
        self._advice = advice

    async def call(
        self, command: str, arguments: Pairs = (), limit: int = 65536, body: bytes = b"", headers: Pairs = ()
    ) -> bytes:
        """The response's body, of at most `limit` bytes. Raises NotHere where the node can't find
        something, SourceFailed otherwise; a stream that broke off is one too."""
        repeatable = command in _REPEATABLE
        target = f"/api/v0/{command}" + (f"?{urlencode(arguments)}" if arguments else "")
        async with self.http.ask("POST", target, headers, body, repeatable=repeatable) as response:
            if response.status == 200:
                return await response.read(limit)
            said = await response.read(ERROR_BODY)
            if response.status in (401, 403):
                raise SourceFailed(f"{self.name} refused us: {self._advice}", REFUSED)
            if response.status == 500:
                self._raise_message(command, said)
            raise refused(self.name, response.status, response.headers.get("retry-after", ""), said)

    def _raise_message(self, command: str, said: bytes) -> None:
        """Raises what a 500 with a JSON Message says; returns if there is none."""
        try:
            message = one_line(str(json.loads(said)["Message"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if any(absent in message for absent in _ABSENT):
            raise NotHere(f"{self.name}: {message}")
        raise SourceFailed(f"{self.name} {command}: {message}", "node")
