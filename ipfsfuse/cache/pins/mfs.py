"""The MFS of a Kubo node, as far as pins need it: some commands of the RPC API (`Mfs`), and the folder that
records what one mount has pinned at the node (`MfsPinFolder`).

The node's garbage collection keeps everything that MFS links, as far as the node has it. `Mfs` never makes
the node fetch anything. Any number of tasks may use it, and one try of a command ends within
`REQUEST_TIMEOUT`. Only one task at a time may use a `MfsPinFolder`; `KuboPins` ensures that.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import trio

from ipfsfuse.cache.pins import batches
from ipfsfuse.cache.pins.batches import BatchPlanner, PinBatch, Round
from ipfsfuse.cache.pins.lease import Lease, MountId, host_name
from ipfsfuse.cache.store.folder import is_mount_id
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.multihash import SHA2_256_PREFIX
from ipfsfuse.errors import NotACid, NotHere, SourceFailed, Unsupported, WrongBlock
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import SourceRequest

REQUEST_TIMEOUT = 10.0
"""Seconds for one try of a command. Commands are local to the node and take milliseconds, so a node that
takes longer hangs."""
PAUSES = (0.2, 1.0)
"""Seconds between the three tries of a command."""
COLLECTIONS = 30
"""How often garbage collection may remove a block before it is linked."""
MAX_RPC_ANSWER = 64 << 10
MAX_LISTING = 4 << 20
"""Bytes of a folder's listing, about 35,000 entries. A mount with a million pins has 1,000 to 6,000."""
MAX_BATCH_BLOCK = 1 << 20
"""Bytes of a batch's block: twice the size of 1,000 links to the longest CIDs."""
_NO_ENTRY = "does not exist"

Pairs = Sequence[tuple[str, str]]


class NodeRpc(Protocol):
    """POST /api/v0/`command`, with the arguments percent-encoded in the query (`sources.http.kubo`).

    Raises NotHere if the node answers that it can't find something. Raises SourceFailed otherwise: of the
    kind "node" if the node answered with an error, and of the kind "long" for an answer of more than `limit`
    bytes."""

    async def call(
        self, command: str, arguments: Pairs = (), limit: int = ..., file: bytes | None = None
    ) -> bytes: ...


class Mfs:
    """The MFS of one node. `rpc` is called for each try, because a node may be restarted at another address.

    Each command is tried three times. Every method raises SourceFailed if the node does not answer, refuses,
    or sends an answer that can't be parsed."""

    def __init__(self, rpc: Callable[[], NodeRpc]) -> None:
        self._rpc = rpc
        self.requests = 0

    async def put(self, cid: Cid, block: bytes) -> None:
        """Stores a block at the node. Garbage collection may remove it until it is linked."""
        codec = "raw" if cids.codec(cid) == cids.RAW else "dag-pb"
        arguments = [("cid-codec", codec), ("mhtype", "sha2-256"), ("pin", "false")]
        answer = await self._call("block/put", arguments, file=block)
        with _parse_errors("block/put"):
            if cids.canonical(cids.parse(json.loads(answer)["Key"])) != cid:
                raise SourceFailed("the node stored another block than it was sent", "node")

    async def has(self, cid: Cid) -> bool:
        """Whether the node itself has the block. It asks no other node."""
        try:
            await self._call("block/stat", [("arg", cids.text(cid)), ("offline", "true")])
            return True
        except NotHere:
            return False

    async def block(self, cid: Cid) -> bytes | None:
        """A verified block that the node itself has; None if it has none, or one of more than
        `MAX_BATCH_BLOCK` bytes."""
        try:
            block = await self._call(
                "block/get", [("arg", cids.text(cid)), ("offline", "true")], MAX_BATCH_BLOCK
            )
            cids.verify(cid, block)
        except (NotHere, WrongBlock, Unsupported):
            return None
        except SourceFailed as exc:
            if exc.kind == "long":
                return None
            raise
        return block

    async def read(self, cid: Cid) -> bytes | None:
        """The first 64 KiB of a file; None if it is not a file, or if the node itself does not have it."""
        arguments = [("arg", f"/ipfs/{cids.text(cid)}"), ("length", str(MAX_RPC_ANSWER)), ("offline", "true")]
        try:
            return await self._call("cat", arguments)
        except NotHere:
            return None
        except SourceFailed as exc:
            if exc.kind == "node":
                return None
            raise

    async def write(self, path: str, data: bytes) -> None:
        """Writes `data` to the file `path`. Replaces what is there; creates missing folders above it."""
        arguments = [("arg", path), ("create", "true"), ("truncate", "true"), ("parents", "true")]
        try:
            await self._call("files/write", arguments, file=data)
        except (NotHere, SourceFailed):  # it is a folder, or a file whose block the node has lost
            await self.remove(path)
            try:
                await self._call("files/write", arguments, file=data)
            except NotHere as exc:
                raise SourceFailed(str(exc), "node") from exc

    async def place(self, cid: Cid, block: bytes, path: str) -> None:
        """Stores a directory's block and links it at `path`. The node need not have the blocks that it
        links."""
        tries, collections = len(PAUSES), COLLECTIONS
        while True:
            try:
                await self.put(cid, block)
                await self._once(
                    "files/cp", [("arg", f"/ipfs/{cids.text(cid)}"), ("arg", path), ("offline", "true")]
                )
                return
            except NotHere as exc:  # a garbage collection delayed the link and removed the block meanwhile
                if not collections or _NO_ENTRY in str(exc):  # _NO_ENTRY: the folder is gone
                    raise SourceFailed(str(exc), "node") from exc
                collections -= 1
            except SourceFailed:
                if not tries:
                    raise
                await trio.sleep(PAUSES[-tries])
                tries -= 1
                await self.remove(path)  # that try may have succeeded, with only its answer lost

    async def remove(self, path: str) -> None:
        """Removes the entry and everything below it, if it exists."""
        with suppress(NotHere):
            await self._call("files/rm", [("arg", path), ("force", "true")])

    async def entries(self, path: str) -> dict[str, Cid]:
        """The names and CIDs in a folder; empty if the folder does not exist."""
        try:
            answer = await self._call("files/stat", [("arg", path), ("offline", "true")])
            with _parse_errors("files/stat"):
                found = json.loads(answer)
                root, kind = str(found["Hash"]), str(found["Type"])
            if kind != "directory":
                raise SourceFailed(f"{path} is not a directory", "node")
            options = [("resolve-type", "false"), ("size", "false"), ("offline", "true")]
            answer = await self._call("ls", [("arg", f"/ipfs/{root}"), *options], MAX_LISTING)
        except NotHere:
            return {}
        except SourceFailed as exc:
            if exc.kind == "long":
                why = f"{path} in the node's MFS has too many entries: look who else writes there"
            elif exc.kind == "node" and "ot a directory" in str(exc):
                why = f"{path} in the node's MFS, or its parent, is a file: move it away with `ipfs files mv`"
            else:
                raise
            raise SourceFailed(why, exc.kind) from exc
        with _parse_errors("ls"):
            return await threads.run_sync(_links, answer)

    async def _call(
        self, command: str, arguments: Pairs, limit: int = MAX_RPC_ANSWER, file: bytes | None = None
    ) -> bytes:
        for pause in PAUSES:
            try:
                return await self._once(command, arguments, limit, file)
            except SourceFailed as exc:
                if exc.kind == "long":  # it will be the same the next time
                    raise
                await trio.sleep(pause)
        return await self._once(command, arguments, limit, file)

    async def _once(
        self, command: str, arguments: Pairs, limit: int = MAX_RPC_ANSWER, file: bytes | None = None
    ) -> bytes:
        self.requests += 1
        request = SourceRequest()
        with request.current(), request.patience(REQUEST_TIMEOUT):
            try:
                return await self._rpc().call(command, arguments, limit, file)
            except SourceFailed as exc:
                if _NO_ENTRY in str(exc) and exc.kind == "node":
                    raise NotHere(str(exc)) from exc
                raise
        raise SourceFailed(f"the node did not answer {command} within {REQUEST_TIMEOUT:g} s", "timeout")


def _links(answer: bytes) -> dict[str, Cid]:
    links = json.loads(answer)["Objects"][0]["Links"] or []
    return {str(link["Name"]): cids.canonical(cids.parse(link["Hash"])) for link in links}


@contextmanager
def _parse_errors(command: str) -> Iterator[None]:
    try:
        yield
    except (NotACid, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as exc:
        raise SourceFailed(f"the node's answer to {command} can't be understood", "node") from exc


# -- the folder of one mount ---------------------------------------------------------------------------------

#     /ipfsfuse/<mount-id>/lease         the mount that this folder belongs to (`lease`)
#                         /staged-<n>    batches of what is staged (`batches`)
#                         /pinned-<n>    batches of what the user pinned
#
# Other entries in the folder are not ours and are never changed. A batch is read back and checked before it
# counts, because anyone with access to the node may have written it.

log = logging.getLogger(__name__)

MFS_ROOT = "/ipfsfuse"
LEASE = "lease"
OWNER = "owner"
"""The name of the lease in earlier versions."""
STAGED_PREFIX = "staged-"
PINNED_PREFIX = "pinned-"
MAX_FOLDERS = 1000
"""Folders of other mounts that are checked at one start."""

_BATCH = re.compile(f"({STAGED_PREFIX}|{PINNED_PREFIX})([0-9]+)")
_NUMBER = re.compile("[1-9][0-9]{0,8}")


class MfsPinFolder:
    """The folder of one mount in a node's MFS. Every method raises SourceFailed if the node fails or
    refuses."""

    def __init__(self, mfs: Mfs, mount_id: MountId) -> None:
        self._mfs = mfs
        self._mount_id = mount_id
        self._name = ""  # the name of the claimed folder
        self._released_stale_for = ""  # the name under which stale pins were last released
        self._lease: Lease | None = None
        self._written: dict[str, Cid] = {}  # the batches there, as written or read back

    @property
    def path(self) -> str:
        """The path of the claimed folder, or of the one that will be claimed."""
        return f"{MFS_ROOT}/{self._name or self._mount_id.name}"

    @property
    def is_current(self) -> bool:
        """Whether the claimed folder still has the mount's name. The name may have changed since, because of
        a conflict at another node."""
        return self._name == self._mount_id.name

    async def read_back(self, planners: Mapping[str, BatchPlanner]) -> dict[str, list[Cid]]:
        """Claims the folder, renews the lease, and updates `planners` (by the prefix of their batches' names)
        to what is there. Returns the members of newly found batches, by prefix."""
        entries, self._lease = await self._claim()
        await self.renew_lease(resting=False)
        if self._released_stale_for != self._name:
            self._released_stale_for = self._name
            await release_stale_pins(self._mfs, self._lease, self._name)
        if OWNER in entries:
            await self._remove(OWNER)
        found: dict[str, dict[int, Cid]] = {prefix: {} for prefix in planners}
        for entry, cid in entries.items():
            if named := _BATCH.fullmatch(entry):
                if named[1] in found and _NUMBER.fullmatch(named[2]):
                    found[named[1]][int(named[2])] = cid
                else:
                    await self._remove(entry)
        return {
            prefix: await self._agree(prefix, planner, found[prefix]) for prefix, planner in planners.items()
        }

    async def write(self, prefix: str, step: Round) -> None:
        """Writes the batches of `step`. None of them counts as written before this returns."""
        for batch in step.writes:
            block = await threads.run_sync(batches.directory, batch.members)
            cid = cids.make(cids.DAG_PB, SHA2_256_PREFIX + hashlib.sha256(block).digest())
            entry = f"{prefix}{batch.number}"
            await self._mfs.place(cid, block, f"{self.path}/{entry}")
            self._written[entry] = cid

    async def drop(self, prefix: str, step: Round) -> None:
        """Removes the batches that `step` drops."""
        for number in step.drops:
            await self._remove(f"{prefix}{number}")

    async def release(self) -> None:
        """Removes the folder, which releases everything."""
        if self._name:
            await _release(self._mfs, self.path)

    async def _claim(self) -> tuple[dict[str, Cid], Lease]:
        """Claims the folder. Returns its entries and this mount's lease. If another running mount may use the
        folder, because the cache folder was copied, this mount gets a new name."""
        lease = await threads.run_sync(Lease.of, self._mount_id.folder)
        while True:
            name = self._mount_id.name
            entries = await self._mfs.entries(f"{MFS_ROOT}/{name}")
            other = await _read_lease(self._mfs, entries)
            if other is None or await threads.run_sync(other.may_be_claimed, lease, name):
                break
            await threads.run_sync(self._mount_id.change, name)
            message = "another mount may be using %s/%s, of %s: this one is %s now"
            log.info(message, MFS_ROOT, name, other.folder, self._mount_id.name)
        if name != self._name:
            self._name = name
            self._written.clear()
        return entries, lease

    async def _agree(self, prefix: str, planner: BatchPlanner, found: Mapping[int, Cid]) -> list[Cid]:
        for number in list(planner.batches):
            known = self._written.get(f"{prefix}{number}")
            if known is None or found.get(number) != known:
                planner.lose(number)
                await trio.lowlevel.checkpoint()
        planner.skip(max(found, default=0))
        members: list[Cid] = []
        for number in sorted(found.keys() - planner.batches.keys()):
            block = await self._mfs.block(found[number])
            batch = None if block is None else await threads.run_sync(batches.members_of, block)
            if batch is None:
                await self._remove(f"{prefix}{number}")
            else:
                self._written[f"{prefix}{number}"] = found[number]
                planner.adopt(PinBatch(number, batch))
                members += batch
        return members

    async def renew_lease(self, *, resting: bool) -> None:
        """Writes the lease with the time now. `resting`: the mount ends, and its pins are for its next
        start."""
        assert self._lease is not None
        await self._mfs.write(f"{self.path}/{LEASE}", self._lease.renew(resting=resting).encode())

    async def _remove(self, entry: str) -> None:
        self._written.pop(entry, None)
        await self._mfs.remove(f"{self.path}/{entry}")


async def release_stale_pins(mfs: Mfs, lease: Lease, ours: str) -> None:
    """Releases the pins of mounts of this host whose cache folder is gone or has another mount-id. Never
    touches the folder `ours`, which belongs to `lease`. What fails is tried again at the next start."""
    try:
        names = await mfs.entries(MFS_ROOT)
    except SourceFailed as exc:
        log.info("pins of mounts that are gone are not looked for: %s", exc)
        return
    here = [name for name in names if is_mount_id(name) and name.rpartition("-")[0] == host_name()]
    for name in [name for name in here if name != ours][:MAX_FOLDERS]:
        path = f"{MFS_ROOT}/{name}"
        try:
            other = await _read_lease(mfs, await mfs.entries(path))
            if other is not None and await threads.run_sync(other.is_stale, lease, name):
                await _release(mfs, path)
                log.info("the pins of a mount that is gone are released: %s, of %s", path, other.folder)
        except SourceFailed as exc:
            log.info("%s is left as it is: %s", path, exc)


async def _read_lease(mfs: Mfs, entries: Mapping[str, Cid]) -> Lease | None:
    found = entries.get(LEASE) or entries.get(OWNER)
    return None if found is None else Lease.parse(await mfs.read(found))


async def _release(mfs: Mfs, path: str) -> None:
    """Removes a mount's folder. If it contains entries that are not ours, removes only ours."""
    entries = await mfs.entries(path)
    if all(_is_ours(entry) for entry in entries):
        await mfs.remove(path)
        return
    for entry in sorted(filter(_is_ours, entries), key=(LEASE, OWNER).__contains__):  # the lease last
        await mfs.remove(f"{path}/{entry}")


def _is_ours(entry: str) -> bool:
    return entry in (LEASE, OWNER) or _BATCH.fullmatch(entry) is not None
