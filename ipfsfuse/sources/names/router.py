"""A delegated router, asked for IPNS records (https://specs.ipfs.tech/routing/http-routing-v1/).

Concurrency: any number of tasks. Nothing is verified here.
"""

from ipfsfuse.errors import UsageError
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.http.gateway import ask_for_record
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.http.settings import HttpSettings

API = "/routing/v1"


class Router:
    def __init__(self, url: str, settings: HttpSettings) -> None:
        """Raises UsageError for a URL that can't be used."""
        try:
            origin = parse_origin(url.rstrip("/").removesuffix(API))
        except UsageError as exc:
            raise UsageError(f"--router {exc}") from exc
        self.name = url
        self._http = Http(origin, settings)

    async def ipns_record(self, name: str) -> bytes:
        """The newest record it has of `name`, unverified. Raises NotHere, SourceFailed."""
        return await ask_for_record(self._http, self.name, f"{API}/ipns/{name}")

    async def aclose(self) -> None:
        await self._http.aclose()
