"""The commands that a running mount answers: each one call through its control socket, shown to people or as
JSON."""

import argparse
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ipfsfuse import client
from ipfsfuse.cli import console, folders
from ipfsfuse.cli.console import Progress
from ipfsfuse.errors import UsageError

STATUS_SECONDS = 30.0
"""How long a mount may take for an answer that needs no network."""

NAMED = 5
"""Lost blocks that `fsck` names in its last line; all are in its report."""

NOTHING: Mapping[str, object] = MappingProxyType({})


DEGRADED = 3
"""Exit code of `status` where the mount serves, but not as well as it should. 1 says that it does not
answer."""


def status(arguments: argparse.Namespace) -> int:
    if arguments.watch:
        from ipfsfuse.cli import watch  # with rich, 100 ms

        return watch.run(folders.control_socket(arguments))
    answer = _call(arguments, "status", timeout=STATUS_SECONDS)
    _told(arguments, answer, console.status)
    return 0 if answer["health"] == "healthy" else DEGRADED


def ls(arguments: argparse.Namespace) -> int:
    return _told(arguments, _call(arguments, "ls", timeout=STATUS_SECONDS), console.ls)


def pin(arguments: argparse.Namespace) -> int:
    if arguments.cids == ["ls"]:
        answer = _call(arguments, "ls", timeout=STATUS_SECONDS)
        return _told(arguments, {"pinned": answer["pinned"]}, console.show)
    return _each(arguments, "pin")


def unpin(arguments: argparse.Namespace) -> int:
    return _each(arguments, "unpin")


def _each(arguments: argparse.Namespace, command: str) -> int:
    """One command for each CID. What was done before one fails stays done."""
    cids = [_cid(text) for text in arguments.cids]
    if len(cids) == 1:
        return _work(arguments, command, cid=cids[0])
    answers = []
    for cid in cids:
        answers.append(_call(arguments, command, {"cid": cid}))
        if not arguments.json:
            console.show(answers[-1])
    if arguments.json:
        console.values(answers)
    return 0


def prefetch(arguments: argparse.Namespace) -> int:
    depth = {} if arguments.depth is None else {"depth": arguments.depth}
    return _work(arguments, "prefetch", cid=_cid(arguments.cid), **depth)


def evict(arguments: argparse.Namespace) -> int:
    if arguments.all == (arguments.cid is not None):
        raise UsageError("evict takes one CID, or --all")
    return _work(arguments, "evict", **({"all": True} if arguments.all else {"cid": _cid(arguments.cid)}))


def budget(arguments: argparse.Namespace) -> int:
    return _work(arguments, "budget", size=arguments.size)


def fsck(arguments: argparse.Namespace) -> int:
    """1 where something wrong could not be mended."""
    if arguments.file is not None or arguments.check_library:
        from ipfsfuse.cli import library  # it imports what the other commands here do not need

        return library.check(arguments)
    answer = _call(arguments, "fsck")
    _told(arguments, answer, console.show)
    lost = answer["wrong"] - answer["mended"]
    if lost:
        named = ", ".join(answer["lost"][:NAMED]) + (", ..." if lost > NAMED else "")
        console.note(f"ipfsfuse: wrong, removed, and not to be had from any source: {lost} ({named})")
    return 1 if lost else 0


def _work(arguments: argparse.Namespace, command: str, **sent: object) -> int:
    return _told(arguments, _call(arguments, command, sent), console.show)


def _call(
    arguments: argparse.Namespace,
    command: str,
    sent: Mapping[str, object] = NOTHING,
    timeout: float | None = None,
) -> dict[str, Any]:
    path = folders.control_socket(arguments)
    with Progress(command) as progress:
        return client.call(path, command, progress, timeout=timeout, **sent)


def _cid(text: str) -> str:
    """The CID's usual spelling. Raises UsageError, whether or not there is a mount to ask."""
    from ipfsfuse.dag import cid as cids  # with multiformats, 100 ms that `status` needn't wait
    from ipfsfuse.dag.path import cid_alone

    return cids.text(cid_alone(text))


def _told(
    arguments: argparse.Namespace, answer: dict[str, Any], show: Callable[[dict[str, Any]], None]
) -> int:
    if arguments.json:
        console.values(answer)
    else:
        show(answer)
    return 0
