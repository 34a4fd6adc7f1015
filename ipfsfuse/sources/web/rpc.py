"""A Kubo node's RPC API: POST /api/v0/<command>, arguments in the query.

Concurrency: any number of tasks; cancelling a call closes its connection, which ends the command at the node.
"""

import json
from collections.abc import Sequence
from urllib.parse import urlencode

from ipfsfuse.errors import NotHere, SourceFailed
from ipfsfuse.sources.web.answer import ERROR_BODY
from ipfsfuse.sources.web.failures import REFUSED
from ipfsfuse.sources.web.http import Headers, Http
from ipfsfuse.sources.web.refusals import refusal

_ABSENT = ("not found", "could not find", "no link named", "block was not found locally")


class Rpc:
    """Commands of one node. `auth_from` names the place its token comes from, for the message when it is refused."""

    def __init__(self, http: Http, name: str, auth_from: str = "") -> None:
        self.http = http
        self.name = name
        self._auth_from = auth_from

    async def call(
        self, command: str, arguments: Sequence[tuple[str, str]] = (), limit: int = ERROR_BODY, body: bytes = b"", headers: Headers = ()
    ) -> bytes:
        """The answer's body, of at most `limit` bytes. Raises NotHere where the node says that it can't find something,
        SourceFailed otherwise; a stream that broke off is one too."""
        query = f"?{urlencode(arguments)}" if arguments else ""
        async with self.http.ask("POST", f"/api/v0/{command}{query}", headers, body) as answer:
            if answer.status == 200:
                return await answer.whole(limit)
            text = (await answer.whole(ERROR_BODY)).decode(errors="replace").strip()
            if answer.status in (401, 403):
                where = self._auth_from or "set IPFSFUSE_KUBO_AUTH_FILE to a file with bearer:TOKEN or basic:USER:PASSWORD"
                raise SourceFailed(f"{self.name} refused us: look at {where}", REFUSED)
            if answer.status == 500:
                self._raise_message(command, text)
            raise refusal(self.name, answer, text)

    def _raise_message(self, command: str, text: str) -> None:
        """Raises what a 500 with a JSON Message says; returns if there is none."""
        try:
            message = str(json.loads(text)["Message"])
        except (ValueError, KeyError, TypeError):
            return
        if any(absent in message for absent in _ABSENT):
            raise NotHere(f"{self.name}: {message}")
        raise SourceFailed(f"{self.name} {command}: {message}", "node")
