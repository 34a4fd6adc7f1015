"""Tells public addresses from local, private and special ones. A server that the user did not name (a
redirect, a router) may send requests to public addresses only.

The table follows the IANA registries (iana-ipv4-special-registry, iana-ipv6-special-registry; RFC 6890) and
not Python's `ipaddress`, whose list differs between releases. Concurrency: any number of tasks.
"""

import ipaddress
import socket
from collections.abc import Sequence
from typing import Final

import trio

from ipfsfuse.errors import SourceFailed
from ipfsfuse.sources.http.failures import REDIRECT
from ipfsfuse.sources.http.origin import Origin, is_address, proxy_for

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_SPECIAL: Final = {
    # IPv4
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private use",
    "100.64.0.0/10": "a provider's shared network",
    "127.0.0.0/8": "loopback",
    "169.254.0.0/16": "link-local use",
    "172.16.0.0/12": "private use",
    "192.0.0.0/24": "protocol assignments",
    "192.0.2.0/24": "documentation",
    "192.31.196.0/24": "AS112",
    "192.52.193.0/24": "AMT",
    "192.88.99.0/24": "6to4 relays",
    "192.168.0.0/16": "private use",
    "192.175.48.0/24": "AS112",
    "198.18.0.0/15": "benchmarks",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved use",
    # IPv6. Everything outside 2000::/3 is special, except addresses that contain an IPv4 address.
    "::1/128": "loopback",
    "64:ff9b:1::/48": "a local NAT64",
    "100::/64": "discarding",
    "2001::/32": "Teredo",
    "2001::/23": "protocol assignments",
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4",
    "2620:4f:8000::/48": "AS112",
    "3fff::/20": "documentation",
    "5f00::/16": "segment routing",
    "fc00::/7": "private use",
    "fe80::/10": "link-local use",
    "fec0::/10": "site-local use",
    "ff00::/8": "multicast",
}
_NETWORKS: Final[Sequence[tuple[Network, str]]] = [
    (ipaddress.ip_network(text), purpose) for text, purpose in _SPECIAL.items()
]
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
_EMBEDDING: Final = [ipaddress.IPv6Network(text) for text in ("::ffff:0:0/96", "::/96", "64:ff9b::/96")]
"""IPv4-mapped, IPv4-compatible and NAT64: a connection to one goes to the IPv4 address in it."""


def special_purpose(address: str) -> str:
    """What `address` is reserved for; "" for a public one. Raises ValueError if it is not an address."""
    value = ipaddress.ip_address(address.partition("%")[0])
    for network, purpose in _NETWORKS:
        if value.version == network.version and value in network:
            return purpose
    if isinstance(value, ipaddress.IPv6Address):
        if any(value in network for network in _EMBEDDING):
            return special_purpose(str(ipaddress.IPv4Address(int(value) & 0xFFFFFFFF)))
        if value not in _GLOBAL_UNICAST:
            return "reserved use"
    return ""


async def public_host(origin: Origin) -> str:
    """The address to connect to for an `origin` that the user did not name. All addresses of its host must be
    public. Returns an address, not the name: a second look-up of the name could give another address.

    For a proxy, returns the name, since a proxy resolves names itself. If the name can't be resolved here,
    the proxy decides. Raises SourceFailed, socket.gaierror."""
    proxied = proxy_for(origin) is not None
    addresses = await _addresses(origin.host, origin.port, may_lack=proxied)
    for address in addresses:
        if purpose := special_purpose(address):
            why = f"{address} is for {purpose}"
            raise SourceFailed(f"{origin.text} is not asked, because a stranger named it and {why}", REDIRECT)
    return origin.host if proxied else addresses[0]


async def _addresses(host: str, port: int, *, may_lack: bool) -> Sequence[str]:
    """All addresses of `host`. With `may_lack`, none if it can't be resolved."""
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
