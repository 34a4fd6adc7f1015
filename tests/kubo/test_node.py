"""The harness: a node uses only the loopback network, and survives restarts and crashes."""

import os
from pathlib import Path

from tests.kubo.node import Node

LISTENING = "0A"
UDP_OPEN = "07"


def listening_addresses(pid: int) -> set[str]:
    """The addresses on which a process accepts connections or datagrams, in hexadecimal, as the kernel writes
    them."""
    inodes = set()
    for file in os.listdir(f"/proc/{pid}/fd"):
        try:
            inodes.add(os.readlink(f"/proc/{pid}/fd/{file}").removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:
            continue
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and fields[3] in (LISTENING, UDP_OPEN):
                found.add(fields[1].partition(":")[0])
    return found


def test_a_node_listens_only_on_loopback(two_nodes: tuple[Node, Node]) -> None:
    for node in two_nodes:
        assert node.process is not None
        assert listening_addresses(node.process.pid) == {"0100007F"}


def test_two_nodes_know_only_each_other(two_nodes: tuple[Node, Node]) -> None:
    one, other = two_nodes
    for node, peer in ((one, other), (other, one)):
        assert [peers["Peer"] for peers in node.rpc("swarm/peers")["Peers"]] == [peer.rpc("id")["ID"]]
        assert node.rpc("bootstrap/list")["Peers"] in (None, [])


def test_content_and_addresses_survive_restarts_and_crashes(own_node: Node) -> None:
    addresses = own_node.api_url, own_node.gateway_url
    cid = own_node.add(b"stays")
    own_node.restart()
    assert own_node.cmd("cat", cid) == "stays"
    own_node.kill()
    own_node.start()
    assert own_node.cmd("cat", cid, text=False) == b"stays"
    assert (own_node.repo / "api").read_text() == "/ip4/127.0.0.1/tcp/" + own_node.api_url.rpartition(":")[2]
    assert (own_node.api_url, own_node.gateway_url) == addresses
