"""Content in which many paths and spellings lead to one CID, with every kind of CID next to the others."""

import hashlib
from dataclasses import dataclass, field

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, unixfs, varint
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.unixfs import Type, UnixFS
from tests.dagging import Dag

FILE, DIRECTORY, LINK, BAD = "file", "directory", "symlink", "bad"
Path = tuple[bytes, ...]


@dataclass(frozen=True)
class Expected:
    """What a path should lead to."""

    kind: str
    cid: Cid
    content: bytes = b""
    """The bytes of a file, or the target of a symlink."""
    names: tuple[bytes, ...] = ()
    """The names in a directory, in the order in which they are listed."""
    claimed: int | None = None
    """The size that its link claims."""


def v0(cid: Cid) -> Cid:
    return cids.decode(cids.multihash(cid))


def identity(codec: int, block: bytes) -> Cid:
    return cids.make(codec, b"\x00" + varint.put(len(block)) + block)


def dagpb_file(content: bytes) -> bytes:
    return dagpb.encode([], unixfs.encode(UnixFS(type=Type.FILE, data=content, filesize=len(content))))


@dataclass
class Forest:
    dag: Dag = field(default_factory=Dag)
    expected: dict[Path, Expected] = field(default_factory=dict)
    """Every path that can be reached."""
    listed: list[Cid] = field(default_factory=list)
    """The CIDs that the root lists."""

    def __post_init__(self) -> None:
        self._by_cid: dict[Cid, Expected] = {}
        self._links: dict[Cid, dict[bytes, tuple[Cid, int]]] = {}

    def of_kind(self, *kinds: str) -> list[Path]:
        return [path for path, expected in self.expected.items() if expected.kind in kinds]

    def raw(self, content: bytes) -> Cid:
        return self._file(self.dag.block(content), content)

    def v1(self, content: bytes) -> Cid:
        return self._file(self.dag.block(dagpb_file(content), cids.DAG_PB), content)

    def inline(self, content: bytes, codec: int) -> Cid:
        return self._file(identity(codec, content if codec == cids.RAW else dagpb_file(content)), content)

    def large(self, leaves: list[bytes]) -> Cid:
        return self._file(self.dag.file(leaves), b"".join(leaves))

    def symlink(self, target: bytes) -> Cid:
        cid = self.dag.symlink(target)
        self._by_cid[cid] = Expected(LINK, cid, target)
        return cid

    def bad(self, cid: Cid) -> Cid:
        self._by_cid[cid] = Expected(BAD, cid)
        return cid

    def _file(self, cid: Cid, content: bytes) -> Cid:
        self._by_cid[cid] = Expected(FILE, cid, content)
        return cid

    def directory(self, entries: dict[bytes, Cid], false_claims: dict[bytes, int] | None = None) -> Cid:
        claims = {
            name: (false_claims or {}).get(name, len(self._expected(cid).content))
            for name, cid in entries.items()
        }
        links = {name: (cid, claims[name]) for name, cid in entries.items()}
        cid = self.dag.directory(links)
        self._by_cid[cid] = Expected(DIRECTORY, cid, names=tuple(entries))
        self._links[cid] = links
        return cid

    def _expected(self, cid: Cid) -> Expected:
        return self._by_cid[cids.canonical(cid)]

    def root(self, cid: Cid, listed: bool = True) -> None:
        self._plant((cids.text(cid).encode(),), cid, None)
        if listed:
            self.listed.append(cid)

    def _plant(self, path: Path, cid: Cid, claimed: int | None) -> None:
        expected = self._expected(cid)
        self.expected[path] = Expected(expected.kind, cid, expected.content, expected.names, claimed)
        for name, (child, size) in self._links.get(cids.canonical(cid), {}).items():
            self._plant((*path, name), child, size)


def forest(many: int = 12) -> Forest:
    """A forest with `many` small files of each kind."""
    made = Forest()
    text = [f"content {number} ".encode() * (number + 1) for number in range(3 * many + 6)]
    raw = [made.raw(text.pop()) for _ in range(many)]
    of_v0 = [v0(made.v1(text.pop())) for _ in range(many)]
    of_v1 = [made.v1(text.pop()) for _ in range(many)]
    inline = [
        made.inline(f"in {number}".encode(), codec)
        for number in range(many // 2)
        for codec in (cids.RAW, cids.DAG_PB)
    ]
    large = made.large([bytes([number]) * 5000 for number in range(4)])
    link, empty = made.symlink(b"raw-0"), made.directory({})
    malformed = made.bad(made.dag.block(b"\x12\x01no", cids.DAG_PB))
    unshown = made.bad(cids.make(0x51, b"\x12\x20" + hashlib.sha256(b"unshown").digest()))

    def named(kind: str, some: list[Cid]) -> dict[bytes, Cid]:
        return {f"{kind}-{number}".encode(): cid for number, cid in enumerate(some)}

    sub = made.directory(
        named("v0", of_v0[:3]) | named("raw", raw[:3]) | named("inline", inline[:3]) | {b"empty": empty}
    )
    everything = named("raw", raw) | named("v0", of_v0) | named("v1", of_v1) | named("inline", inline)
    tree = made.directory(
        everything | {b"large": large, b"link": link, b"sub": sub, b"bad": malformed, b"unshown": unshown}
    )
    mirrored = {name[::-1]: cid for name, cid in reversed(everything.items())}
    mirror = made.directory(
        mirrored | {b"a": sub, b"b": sub, b"c": v0(sub)}, false_claims={b"0-war": 3, b"1-war": 1 << 40}
    )
    small = made.directory(named("small", raw))
    for cid in (
        tree,
        v0(mirror),
        small,
        of_v0[0],
        of_v1[0],
        inline[0],
        inline[1],
        raw[0],
        cids.canonical(of_v0[1]),
    ):
        made.root(cid)
    for cid in (mirror, v0(of_v1[0]), cids.canonical(of_v0[0]), of_v0[1]):
        made.root(cid, listed=False)
    return made
