"""Which IP addresses a stranger must not send us to: this machine's, private ones, special ones.

Pure. By the IANA registries (iana-ipv4-special-registry and iana-ipv6-special-registry, RFC 6890), not by
what this Python's `ipaddress` knows of them: that differs between its releases.
"""

import ipaddress
from collections.abc import Sequence
from typing import Final

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
    # IPv6. All that is not in 2000::/3 is special, but for addresses that hold an IPv4 one.
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
"""IPv4-mapped, IPv4-compatible, and NAT64: whoever connects to one connects to the IPv4 address in it."""


def special_purpose(address: str) -> str:
    """What `address` is set aside for, "" for a public one. Raises ValueError for what is not one."""
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
