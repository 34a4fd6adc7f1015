"""Which addresses are public: every block of the IANA registries of special-purpose addresses is not; the
addresses next to the blocks are."""

import ipaddress

import pytest

from ipfsfuse.sources.http.addresses import special_purpose

# iana-ipv4-special-registry, and the multicast and reserved space
IPV4 = {
    "0.0.0.0/8": "this network", "10.0.0.0/8": "private use", "100.64.0.0/10": "a provider's shared network",
    "127.0.0.0/8": "loopback", "169.254.0.0/16": "link-local use", "172.16.0.0/12": "private use",
    "192.0.0.0/24": "protocol assignments", "192.0.0.0/29": "protocol assignments", "192.0.0.8/32": "protocol assignments",
    "192.0.0.9/32": "protocol assignments", "192.0.0.170/31": "protocol assignments", "192.0.2.0/24": "documentation",
    "192.31.196.0/24": "AS112", "192.52.193.0/24": "AMT", "192.88.99.0/24": "6to4 relays", "192.168.0.0/16": "private use",
    "192.175.48.0/24": "AS112", "198.18.0.0/15": "benchmarks", "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation", "224.0.0.0/4": "multicast", "240.0.0.0/4": "reserved use", "255.255.255.255/32": "reserved use",
}  # fmt: skip

# iana-ipv6-special-registry, and site-local and multicast space
IPV6 = {
    "::1/128": "loopback", "::/128": "this network", "64:ff9b:1::/48": "a local NAT64", "100::/64": "discarding",
    "100:0:0:1::/64": "reserved use", "2001::/23": "protocol assignments", "2001::/32": "Teredo", "2001:1::1/128": "protocol assignments",
    "2001:2::/48": "protocol assignments", "2001:3::/32": "protocol assignments", "2001:4:112::/48": "protocol assignments",
    "2001:20::/28": "protocol assignments", "2001:30::/28": "protocol assignments", "2001:db8::/32": "documentation",
    "2002::/16": "6to4", "2620:4f:8000::/48": "AS112", "3fff::/20": "documentation", "5f00::/16": "segment routing",
    "fc00::/7": "private use", "fe80::/10": "link-local use", "fec0::/10": "site-local use", "ff00::/8": "multicast",
}  # fmt: skip

# a connection to such an IPv6 address ends at the IPv4 address in it
EMBEDDED = {
    "::ffff:127.0.0.1": "loopback", "::ffff:10.0.0.1": "private use", "::ffff:169.254.169.254": "link-local use",
    "::127.0.0.1": "loopback", "::192.168.0.1": "private use", "::2": "this network", "64:ff9b::127.0.0.1": "loopback",
    "64:ff9b::10.1.2.3": "private use", "64:ff9b::169.254.169.254": "link-local use", "2002:7f00:1::": "6to4",
    "2002:c000:204::": "6to4", "fe80::1%eth0": "link-local use", "::ffff:192.0.0.8": "protocol assignments",
}  # fmt: skip

PUBLIC = [
    "93.184.216.34", "1.1.1.1", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0",
    "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "191.255.255.255", "192.0.1.0", "192.0.3.0", "192.167.255.255",
    "192.169.0.0", "198.17.255.255", "198.20.0.0", "223.255.255.255", "2606:2800:220:1::1", "2001:200::1", "2001:4860:4860::8888",
    "2003::1", "2a00::1", "3ffe::1", "2620:4f:7fff::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8",
]  # fmt: skip


@pytest.mark.parametrize(("block", "purpose"), [*IPV4.items(), *IPV6.items()])
def test_the_first_middle_and_last_address_of_each_special_block_are_not_public(
    block: str, purpose: str
) -> None:
    network = ipaddress.ip_network(block)
    found = {special_purpose(str(network[at])) for at in (0, network.num_addresses // 2, -1)}
    assert "" not in found
    assert purpose in found


@pytest.mark.parametrize(("address", "purpose"), EMBEDDED.items())
def test_the_ipv4_address_in_an_ipv6_address_decides_its_purpose(address: str, purpose: str) -> None:
    assert special_purpose(address) == purpose


@pytest.mark.parametrize("address", PUBLIC)
def test_all_others_are_public(address: str) -> None:
    assert special_purpose(address) == ""


def test_text_that_is_not_an_address_is_an_error() -> None:
    for text in ("", "localhost", "127.1", "1.2.3.4.5"):
        with pytest.raises(ValueError, match="does not appear to be"):
            special_purpose(text)
