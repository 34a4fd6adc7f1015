"""Answers of a running mount, for people: `key: value` lines, and tables of what comes in numbers."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ipfsfuse.cli import console
from ipfsfuse.text import printable
from ipfsfuse.units import human

SIZES = ("budget", "effective_budget", "reserve", "free", "size", "staged", "used", "freed", "pinned")


def show(values: Mapping[str, Any], indent: str = "") -> None:
    """What lies inside a value is indented below its key."""
    for key, inner in values.items():
        label = f"{indent}{_label(key)}:"
        if isinstance(inner, dict):
            console.line(label)
            show(inner, indent + "  ")
        elif isinstance(inner, list):
            console.line(label if inner else f"{label} none")
            for item in inner:
                console.line(f"{indent}  {said('', item)}")
        else:
            console.line(f"{label} {said(key, inner)}")


def table(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same keys, one line each below a line of the keys; numbers to the right."""
    if not rows:
        console.line(f"{name}: none")
        return
    console.line(f"{name}:")
    cells = [
        [_label(key) for key in rows[0]],
        *([printable(said(key, value)) for key, value in row.items()] for row in rows),
    ]
    right = [isinstance(value, int | float | None) for value in rows[0].values()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ]
        console.line(f"  {'  '.join(padded)}".rstrip())


def status(answer: Mapping[str, Any]) -> None:
    """What `status` says."""
    show({key: value for key, value in answer.items() if key not in ("pins", "sources")})
    table("pins", [{"node": name, **values} for name, values in answer["pins"].items()])
    table(
        "sources",
        [
            {**{key: value for key, value in source.items() if key != "why"}, "why": source["why"]}
            for source in answer["sources"]
        ],
    )


def ls(answer: Mapping[str, Any]) -> None:
    """What `ls` says: a line for each staging file, one for all that lies in packs."""
    for each in answer["entries"]:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(each["last_used"]))
        whole = "whole" if each["complete"] else f"{human(each['staged'])} of"
        marks = f"pinned:{each['pinned']}" if each["pinned"] else ""
        console.line(
            f"{each['cid']}  {whole:>12} {human(each['size']):>10}  {used}  {each['source']:10} "
            f"{marks}".rstrip()
        )
    small = answer["small"]
    if small["bytes"]:
        console.line(
            f"and {small['blocks']} small blocks (files up to 64 KiB, directories, links): "
            f"{human(small['bytes'])}"
        )


def said(key: str, value: object) -> str:
    """One value in one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "-"
    if isinstance(value, int) and (key in SIZES or key.endswith("bytes")):
        return human(value)
    if isinstance(value, float):
        return _seconds(value) if key in ("median", "p95") else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{_label(name)} {said(name, inner)}" for name, inner in value.items()) or "none"
    return str(value)


def _seconds(value: float) -> str:
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def _label(key: str) -> str:
    return key.replace("_", " ")
