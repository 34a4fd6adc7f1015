"""By what blocks and leaves are fetched: one key for all spellings of a CID. Pure."""

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf


def block_key(cid: Cid) -> bytes:
    """Of a block: a raw one may be a file of its own, others are kept by their multihash."""
    return cids.canonical(cid) if cids.codec(cid) == cids.RAW else cids.multihash(cid)


def leaf_key(leaf: Leaf) -> bytes:
    return cids.canonical(leaf.cid)


def cid_of(key: bytes) -> Cid:
    """What a key asks for: a CID, or a dag-pb block's multihash."""
    return Cid(key) if key[:1] == b"\x01" else cids.make(cids.DAG_PB, key)


def spelled(key: bytes) -> str:
    """A key for messages."""
    return cids.text(cid_of(key))
