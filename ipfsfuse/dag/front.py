"""The core of every walk: wanting nodes, and opening a tree from its front.

A `Walk` yields a sequence of CIDs, none twice and none of identity, to be fetched side by side, and must be sent
their nodes (`nodes.parse` of the verified blocks: who drives it may have them parsed already) in the same order; it
returns its result. A walk that has much to do between two wants yields an empty sequence: others may go first. A walk
keeps no state between calls and can be dropped at any yield.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Generic, NamedTuple, TypeVar

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Node, parse

T = TypeVar("T")
Ready = TypeVar("Ready")
State = TypeVar("State")

Walk = Generator[Sequence[Cid], Sequence[Node], T]


def nodes(wanted: Sequence[Cid]) -> Walk[list[Node]]:
    """The nodes of `wanted`; identity CIDs are answered from themselves. Raises Malformed, Unsupported."""
    found: dict[Cid, Node] = {}
    ask: list[Cid] = []
    for cid in dict.fromkeys(wanted):
        held = cids.inline(cid)
        if held is None:
            ask.append(cid)
        else:
            found[cid] = parse(cid, held)
    if ask:
        found.update(zip(ask, (yield ask), strict=True))
    return [found[cid] for cid in wanted]


def node(cid: Cid) -> Walk[Node]:
    """The node that `cid` names."""
    return (yield from nodes([cid]))[0]


class Unopened(NamedTuple, Generic[State]):
    """A node in a front that has not been fetched yet, with what its opener must know of its place."""

    cid: Cid
    state: State


BREATH = 4000
"""Parts of a front that are made before others may go first: some 10 ms."""
NODE = 100
"""Parts that a node counts for beside its own: what was looked at, and left out."""

Front = list[Ready | Unopened[State]]
"""Consecutive parts of a tree, in order: those that are known, and nodes yet to open."""


def open_first(front: Front[Ready, State], count: int, opener: Callable[[Unopened[State], Node], Front[Ready, State]]) -> Walk[None]:
    """Fetches the first `count` unopened nodes side by side, and puts what they hold in their places."""
    chosen = [index for index, part in enumerate(front) if isinstance(part, Unopened)][:count]
    unopened = [part for part in (front[index] for index in chosen) if isinstance(part, Unopened)]
    held = yield from nodes([part.cid for part in unopened])
    left = BREATH
    for index, part, node in reversed(list(zip(chosen, unopened, held, strict=True))):
        parts = opener(part, node)
        front[index : index + 1] = parts
        left -= len(parts) + NODE
        if left <= 0:
            left = BREATH
            yield ()


def known(front: Front[Ready, State]) -> list[Ready]:
    """The parts before the first node that is not open."""
    parts: list[Ready] = []
    for part in front:
        if isinstance(part, Unopened):
            break
        parts.append(part)
    return parts
