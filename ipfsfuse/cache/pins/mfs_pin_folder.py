"""One mount's folder in a node's MFS: the record of what this mount has pinned there.

    /ipfsfuse/<mount-id>/lease         whose folder this is (`lease`)
                        /staged-<n>    what is staged, in batches (`batches`)
                        /pinned-<n>    what the user pinned, in batches

Anything else in the folder is somebody else's, and left alone. A batch is read back before it counts: anyone
with access to the node may have written it. Concurrency: one task at a time; `KuboPins` sees to that.
"""

import hashlib
import logging
import re
from collections.abc import Mapping

import trio

from ipfsfuse.cache.pins import batches
from ipfsfuse.cache.pins.batches import Batch, BatchPlanner, Round
from ipfsfuse.cache.pins.lease import Lease, MountId, host_name
from ipfsfuse.cache.pins.mfs import Mfs
from ipfsfuse.cache.store.folder import is_mount_id
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.multihash import SHA2_256_PREFIX
from ipfsfuse.errors import SourceFailed
from ipfsfuse.fileio import threads

log = logging.getLogger(__name__)

ROOT = "/ipfsfuse"
LEASE = "lease"
OWNER = "owner"
"""What earlier versions had instead of the lease."""
STAGED = "staged-"
PINNED = "pinned-"
MAX_FOLDERS = 1000
"""Folders of other mounts that are looked at in one start."""

_BATCH = re.compile(f"({STAGED}|{PINNED})([0-9]+)")
_NUMBER = re.compile("[1-9][0-9]{0,8}")


class MfsPinFolder:
    """Every method raises SourceFailed where the node fails or refuses."""

    def __init__(self, mfs: Mfs, mount_id: MountId) -> None:
        self._mfs = mfs
        self._mount_id = mount_id
        self._name = ""  # that of the folder that was claimed
        self._swept = ""  # for which name stale pins were looked for
        self._lease: Lease | None = None
        self._written: dict[str, Cid] = {}  # the batches there, as we wrote them or read them back

    @property
    def path(self) -> str:
        """The folder that was claimed, or will be."""
        return f"{ROOT}/{self._name or self._mount_id.name}"

    @property
    def is_current(self) -> bool:
        """Whether the folder that was claimed has the mount's name: it may have changed since, for another
        node."""
        return self._name == self._mount_id.name

    async def read_back(self, planners: Mapping[str, BatchPlanner]) -> dict[str, list[Cid]]:
        """Claims the folder, renews the lease, and makes each of `planners` (by the prefix of its batches'
        names) agree with what stands there. Returns the members of the batches that were not known, by
        prefix."""
        entries, self._lease = await self._claim()
        await self._sign(resting=False)
        if self._swept != self._name:
            self._swept = self._name
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
        """Writes the step's batches; nothing of the step may count as done before this returned."""
        for batch in step.writes:
            block = await threads.run_sync(batches.directory, batch.members)
            cid = cids.make(cids.DAG_PB, SHA2_256_PREFIX + hashlib.sha256(block).digest())
            entry = f"{prefix}{batch.number}"
            await self._mfs.place(cid, block, f"{self.path}/{entry}")
            self._written[entry] = cid

    async def drop(self, prefix: str, step: Round) -> None:
        """Removes the batches that the step drops."""
        for number in step.drops:
            await self._remove(f"{prefix}{number}")

    async def rest(self) -> None:
        """Leaves everything pinned for the next start of this mount."""
        await self._sign(resting=True)

    async def release(self) -> None:
        """Lets go of everything."""
        if self._name:
            await _release(self._mfs, self.path)

    async def _claim(self) -> tuple[dict[str, Cid], Lease]:
        """The folder's entries and this mount's lease, once the folder is ours. Where another mount may live
        that has the folder, as after a copy of the cache folder, this mount takes a new name."""
        lease = await threads.run_sync(Lease.of, self._mount_id.folder)
        while True:
            name = self._mount_id.name
            entries = await self._mfs.entries(f"{ROOT}/{name}")
            other = await _read_lease(self._mfs, entries)
            if other is None or await threads.run_sync(other.may_be_taken, lease, name):
                break
            await threads.run_sync(self._mount_id.change, name)
            message = "another mount may be using %s/%s, of %s: this one is %s now"
            log.info(message, ROOT, name, other.folder, self._mount_id.name)
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
                planner.adopt(Batch(number, batch))
                members += batch
        return members

    async def _sign(self, *, resting: bool) -> None:
        assert self._lease is not None
        await self._mfs.write(f"{self.path}/{LEASE}", self._lease.renew(resting=resting).encode())

    async def _remove(self, entry: str) -> None:
        self._written.pop(entry, None)
        await self._mfs.remove(f"{self.path}/{entry}")


async def release_stale_pins(mfs: Mfs, lease: Lease, ours: str) -> None:
    """Lets go of what mounts of this host had pinned whose cache folder is gone, or goes by another name;
    never of the folder `ours`, which is that of `lease`. What fails is left to the next start."""
    try:
        names = await mfs.entries(ROOT)
    except SourceFailed as exc:
        log.info("pins of mounts that are gone are not looked for: %s", exc)
        return
    here = [name for name in names if is_mount_id(name) and name.rpartition("-")[0] == host_name()]
    for name in [name for name in here if name != ours][:MAX_FOLDERS]:
        path = f"{ROOT}/{name}"
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
    """Removes a mount's folder; where somebody else has put something into it, what is the mount's."""
    entries = await mfs.entries(path)
    if all(_is_ours(entry) for entry in entries):
        await mfs.remove(path)
        return
    for entry in sorted(filter(_is_ours, entries), key=(LEASE, OWNER).__contains__):  # the lease last
        await mfs.remove(f"{path}/{entry}")


def _is_ours(entry: str) -> bool:
    return entry in (LEASE, OWNER) or _BATCH.fullmatch(entry) is not None
