"""The commands for a running mount. Each sends a command to the mount's control socket and prints the answer
as text or JSON."""

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ipfsfuse import client
from ipfsfuse.cli import console, folders
from ipfsfuse.cli.console import ProgressBar
from ipfsfuse.cli.status import ANSWER_SECONDS
from ipfsfuse.errors import IpfsFuseError, NotACid, UsageError

NAMED = 5
"""The most lost blocks in the last line of `fsck`. Its report has all of them."""


def ls(arguments: argparse.Namespace) -> int:
    answer = _call(folders.control_socket(arguments), "ls", timeout=ANSWER_SECONDS, tree=arguments.tree)
    return _show(arguments, answer, console.tree if arguments.tree else console.ls)


def pin(arguments: argparse.Namespace) -> int:
    if arguments.items == ["ls"]:
        answer = _call(folders.control_socket(arguments), "ls", timeout=ANSWER_SECONDS)
        return _show(arguments, {key: answer[key] for key in ("pinned", "paths")}, console.pins)
    return _each(arguments, "pin")


def unpin(arguments: argparse.Namespace) -> int:
    return _each(arguments, "unpin")


def prefetch(arguments: argparse.Namespace) -> int:
    return _each(arguments, "prefetch", depth=arguments.depth)


def evict(arguments: argparse.Namespace) -> int:
    if arguments.all == bool(arguments.items):
        raise UsageError("evict takes CIDs or paths, or --all")
    return _ask(arguments, "evict", all=True) if arguments.all else _each(arguments, "evict")


def budget(arguments: argparse.Namespace) -> int:
    return _ask(arguments, "budget", size=arguments.size)


def fsck(arguments: argparse.Namespace) -> int:
    """Returns 1 if an error could not be repaired."""
    if arguments.file is not None or arguments.check_library:
        from ipfsfuse.cli import library  # it imports what the other commands here do not need

        return library.check(arguments)
    answer = _call(folders.control_socket(arguments), "fsck")
    _show(arguments, answer, console.show)
    lost = answer["wrong"] - answer["mended"]
    if lost:
        named = ", ".join(answer["lost"][:NAMED]) + (", ..." if lost > NAMED else "")
        console.note(f"ipfsfuse: wrong, removed, and not to be had from any source: {lost} ({named})")
    return 1 if lost else 0


# -- what is named by a CID, by a path below one, or by a path in a mount ------------------------------------


def _each(arguments: argparse.Namespace, command: str, **sent: Any) -> int:
    """Sends the command for each argument. All arguments are checked first. If the command fails for one, it
    is still sent for the others, and the exit code is 1."""
    targets = [_target(arguments, text) for text in arguments.items]
    if len(targets) == 1:
        [(control, path)] = targets
        return _show(arguments, _call(control, command, path=path, **sent), console.show)
    answers, code = list[Mapping[str, Any]](), 0
    for text, (control, path) in zip(arguments.items, targets, strict=True):
        try:
            answers.append(_call(control, command, path=path, **sent))
        except IpfsFuseError as exc:
            code = 1
            console.failure(exc)
            answers.append({"item": text, **console.failure_values(exc, code)})
        else:
            if not arguments.json:
                console.show(answers[-1])
    if arguments.json:
        console.values(answers)
    return code


def _target(arguments: argparse.Namespace, text: str) -> tuple[Path, str]:
    """The control socket of the mount to ask, and the path `/ipfs/CID/a/b` or `/ipns/NAME/a/b`. Raises
    UsageError for a wrong path even if there is no mount."""
    from ipfsfuse.dag import path as paths  # slow to import, and other commands do without

    try:
        if paths.split_ipns(text) is None:
            text = paths.parse(text).text
        path = text
    except (UsageError, NotACid) as exc:
        text = os.fsdecode(text.encode("utf-8", "surrogateescape"))  # it may be a path of this machine
        found = folders.in_mount(text)
        if found is None:
            where = ", nor is it in a mount of ipfsfuse" if os.path.lexists(text) else ""
            raise UsageError(f"{exc}{where}") from exc
        if not found.below:
            raise UsageError(f"{text} is a mountpoint: name something in it") from exc
        control = folders.control(folders.last_daemon(None, str(found.mountpoint)))
        live = folders.live_mount(found.mountpoint, None)
        main = client.call(control, "status", timeout=ANSWER_SECONDS)["mountpoint"]
        top = "ipfs" if live is None or str(live.mountpoint) == main else "ipns"
        path = f"/{top}/{os.fsencode(found.below).decode('utf-8', 'surrogateescape')}"
        if arguments.mount is None and arguments.origins.get("cache-dir") != "argument":
            return control, path
    return folders.control_socket(arguments), path


def _ask(arguments: argparse.Namespace, command: str, **sent: Any) -> int:
    return _show(arguments, _call(folders.control_socket(arguments), command, **sent), console.show)


def _call(control: Path, command: str, timeout: float | None = None, **sent: Any) -> dict[str, Any]:
    with ProgressBar(command) as progress:
        return client.call(control, command, lambda values: progress(**values), timeout=timeout, **sent)


def _show(
    arguments: argparse.Namespace, answer: dict[str, Any], show: Callable[[dict[str, Any]], None]
) -> int:
    if arguments.json:
        console.values(answer)
    else:
        show(answer)
    return 0
