"""Where a redirect may lead: addresses of names, checked before anybody connects.

Concurrency: any number of tasks.
"""

import socket
from collections.abc import Sequence

import trio

from ipfsfuse.errors import SourceFailed
from ipfsfuse.sources.addresses import special_purpose
from ipfsfuse.sources.failures import REDIRECT
from ipfsfuse.sources.origin import Origin, is_address, proxy_for


async def public_host(origin: Origin) -> str:
    """What to connect to where a redirect leads to `origin`: an address, so that a second answer of the
    resolver can't lead elsewhere. All addresses that the name has must be public ones.

    For a proxy, which resolves names itself, the name; one that can't be resolved here is the proxy's to
    judge. Raises SourceFailed, socket.gaierror."""
    proxied = proxy_for(origin) is not None
    addresses = await _addresses(origin.host, origin.port, may_lack=proxied)
    for address in addresses:
        purpose = special_purpose(address)
        if purpose:
            why = f"{address} is for {purpose}"
            raise SourceFailed(f"a redirect to {origin.text} was not followed: {why}", REDIRECT)
    return origin.host if proxied else addresses[0]


async def _addresses(host: str, port: int, *, may_lack: bool) -> Sequence[str]:
    """All of them; none where the name can't be resolved here, and need not be."""
    if is_address(host):
        return [host]
    if f".{host.rstrip('.').lower()}".endswith(".localhost"):  # always this machine (RFC 6761, 6.3)
        return ["127.0.0.1"]
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        if not may_lack:
            raise
        return []
    return [str(address[4][0]) for address in found]
