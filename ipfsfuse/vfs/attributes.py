"""What `stat` is told: the one place that turns a node, or a link's claim, into attributes. Pure."""

import stat
from typing import NamedTuple

from ipfsfuse.dag.nodes import NO_META, Directory, File, Meta, Node, Shard, Symlink


class Attributes(NamedTuple):
    """Of one file, directory or symlink."""

    mode: int
    """Type and permission bits, as in st_mode."""
    size: int
    """Content bytes."""
    mtime: int
    """Nanoseconds since 1970."""
    exact: bool = True
    """False while the size is only its link's claim."""

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


def of_node(node: Node) -> Attributes:
    """The attributes of a node, from its own verified block."""
    match node:
        case File():
            return _with(stat.S_IFREG, 0o444, node.size, node.meta)
        case Symlink():
            return _with(stat.S_IFLNK, 0o777, len(node.target), node.meta)
        case Directory() | Shard():
            return _with(stat.S_IFDIR, 0o555, 0, node.meta)


def claimed(tsize: int) -> Attributes:
    """Of a raw child by its link's word: surely a file, of that size if the publisher told the truth."""
    return Attributes(stat.S_IFREG | 0o444, tsize, 0, exact=False)


def _with(kind: int, mode: int, size: int, meta: Meta) -> Attributes:
    return Attributes(kind | (mode if meta.mode is None else meta.mode), size, meta.mtime or 0)


ROOT = _with(stat.S_IFDIR, 0o555, 0, NO_META)
