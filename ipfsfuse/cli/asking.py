"""The commands that a running mount answers: each one call through its control socket, shown to people or as JSON."""

import argparse
import json
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ipfsfuse.cli import folders, values
from ipfsfuse.cli.progress import Progress
from ipfsfuse.control import client
from ipfsfuse.errors import UsageError

STATUS_SECONDS = 30.0
"""How long a mount may take for an answer that needs no network."""

NOTHING: Mapping[str, object] = MappingProxyType({})


def status(arguments: argparse.Namespace) -> int:
    answer = _call(arguments, "status", timeout=STATUS_SECONDS)
    if not _shown_as_json(arguments, answer):
        _show(answer)
    return 0


def ls(arguments: argparse.Namespace) -> int:
    answer = _call(arguments, "ls", timeout=STATUS_SECONDS)
    if _shown_as_json(arguments, answer):
        return 0
    for each in answer["entries"]:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(each["last_used"]))
        whole = "whole" if each["complete"] else f"{values.human(each['staged'])} of"
        marks = f"pinned:{each['pinned']}" if each["pinned"] else ""
        print(f"{each['cid']}  {whole:>12} {values.human(each['size']):>10}  {used}  {each['source']:10} {marks}".rstrip())
    return 0


def pin(arguments: argparse.Namespace) -> int:
    return _work(arguments, "pin", cid=_cid(arguments.cid))


def unpin(arguments: argparse.Namespace) -> int:
    return _work(arguments, "unpin", cid=_cid(arguments.cid))


def prefetch(arguments: argparse.Namespace) -> int:
    depth = {} if arguments.depth is None else {"depth": arguments.depth}
    return _work(arguments, "prefetch", cid=_cid(arguments.cid), **depth)


def evict(arguments: argparse.Namespace) -> int:
    if arguments.all == (arguments.cid is not None):
        raise UsageError("evict takes one CID, or --all")
    return _work(arguments, "evict", **({"all": True} if arguments.all else {"cid": _cid(arguments.cid)}))


def fsck(arguments: argparse.Namespace) -> int:
    return _work(arguments, "fsck")


def _work(arguments: argparse.Namespace, command: str, **sent: object) -> int:
    answer = _call(arguments, command, sent)
    if not _shown_as_json(arguments, answer):
        _show(answer)
    return 0


def _call(arguments: argparse.Namespace, command: str, sent: Mapping[str, object] = NOTHING, timeout: float | None = None) -> dict[str, Any]:
    path = folders.control(arguments.cache_dir, arguments.mount)
    with Progress(command) as progress:
        return client.call(path, command, progress, timeout=timeout, **sent)


def _cid(text: str) -> str:
    """The CID's usual spelling."""
    from ipfsfuse.cli import cidargs  # with multiformats, 100 ms that `status` needn't wait
    from ipfsfuse.dag import cid as cids

    return cids.text(cidargs.one(text))


def _shown_as_json(arguments: argparse.Namespace, answer: dict[str, Any]) -> bool:
    if arguments.json:
        print(json.dumps(answer, indent=2))
    return bool(arguments.json)


def _show(value: dict[str, Any], indent: str = "") -> None:
    """`key: value` lines; what lies inside is indented below its key."""
    for key, inner in value.items():
        label = f"{indent}{key.replace('_', ' ')}:"
        if isinstance(inner, dict):
            print(label)
            _show(inner, indent + "  ")
        elif isinstance(inner, list):
            print(label, *([] if inner else ["none"]))
            _show_list(inner, indent + "  ")
        else:
            print(label, _said(key, inner))


def _show_list(items: list[Any], indent: str) -> None:
    for item in items:
        if isinstance(item, dict):
            print(indent + "  ".join(f"{key.replace('_', ' ')} {_said(key, value)}" for key, value in item.items()))
        else:
            print(f"{indent}{item}")


def _said(key: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, int) and (key in ("budget", "size", "staged", "used", "freed") or key.endswith("bytes")):
        return values.human(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(name, inner)}" for name, inner in value.items()) or "none"
    return str(value)
