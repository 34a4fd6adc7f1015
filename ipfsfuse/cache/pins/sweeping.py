"""Where pins stand in a node's file tree, and the left-overs of dead mounts there.

Concurrency: one sweep at a time per mount; sweeps of several mounts may meet, removing twice does no harm.
"""

import logging

from ipfsfuse.cache.pins.nodefiles import NodeFiles
from ipfsfuse.cache.pins.owners import Owner, host_name
from ipfsfuse.errors import SourceFailed

log = logging.getLogger(__name__)

ROOT = "/ipfsfuse"
OWNER = "owner"
STAGED = "staged-"
PINNED = "pinned-"


async def sweep(node: NodeFiles, ours: str) -> None:
    """Removes what this host's dead mounts left, but nothing in the folder `ours`. What fails is left to the next start.

    A mount that ended as it should is at rest while its own folder on this machine still names its pins; one that was
    killed loses what was held for its staging (its next start holds that again), and keeps what is pinned for good."""
    try:
        names = await node.entries(ROOT)
    except SourceFailed as exc:
        log.info("pins of dead mounts are not looked for: %s", exc)
        return
    for name in names:
        if name != ours and name.rpartition("-")[0] == host_name():
            try:
                await _sweep_one(node, name)
            except SourceFailed as exc:
                log.info("%s/%s is left as it is: %s", ROOT, name, exc)


async def _sweep_one(node: NodeFiles, name: str) -> None:
    path = f"{ROOT}/{name}"
    owner = Owner.parse(await node.read(f"{path}/{OWNER}"))
    if owner is None or not owner.proved_dead():
        return
    if not owner.still_keeps(name):
        log.info("pins of a mount that is no more are let go: %s", path)
        await node.remove(path)
    elif not owner.stopped:
        for entry in await node.entries(path):
            if entry.startswith(STAGED):
                await node.remove(f"{path}/{entry}")
