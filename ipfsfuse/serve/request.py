"""Parses requests to a trustless gateway into frozen values. Pure.

Source: https://specs.ipfs.tech/http-gateways/trustless-gateway/
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import parse_qs, quote, unquote_to_bytes

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import path as paths
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import IpfsFuseError

RAW: Final = "application/vnd.ipld.raw"
CAR: Final = "application/vnd.ipld.car"
RECORD: Final = "application/vnd.ipfs.ipns-record"
_FORMATS: Final = {"raw": RAW, "car": CAR, "ipns-record": RECORD}
SCOPES: Final = frozenset(("block", "entity", "all"))
MAX_PATH_NAMES: Final = 256
"""The most names in a path: each name can take a block."""

_RANGE = re.compile(r"bytes=(\d*)-(\d*)", re.ASCII)
_ENTITY_BYTES = re.compile(r"(-?\d{1,19}):(\*|-?\d{1,19})", re.ASCII)


class Refused(Exception):
    """The request is answered with an error: `status` and a line of text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class GatewayRequest:
    """What one request asks for."""

    format: str
    """RAW, CAR or RECORD."""
    path: str
    """As in X-Ipfs-Path: `/ipfs/CID/a`."""
    root: Cid = cids.EMPTY
    names: tuple[bytes, ...] = ()
    name: str = ""
    """RECORD: the IPNS name."""
    scope: str = "all"
    first: int = 0
    """First byte of the entity; negative: from its end."""
    last: int | None = None
    """Last byte of the entity; negative: from its end; None for its end."""
    dups: bool = False
    filename: str = ""
    only_if_cached: bool = False
    if_none_match: tuple[str, ...] = ()
    range: tuple[int | None, int | None] | None = None
    """RAW: the first and last wanted byte, as in RFC 9110; None for all."""


def parse(raw_path: bytes, query: bytes, headers: Iterable[tuple[bytes, bytes]]) -> GatewayRequest:
    """Raises Refused."""
    fields: dict[str, str] = {}
    for key, value in headers:
        name = key.decode("latin-1").lower()
        text = value.decode("latin-1")
        fields[name] = f"{fields[name]}, {text}" if name in fields else text
    try:
        asked = {key: values[0] for key, values in parse_qs(query.decode("ascii"), max_num_fields=20).items()}
    except ValueError as exc:
        raise Refused(400, "the query can't be read") from exc
    path = unquote_to_bytes(raw_path).decode("utf-8", "surrogateescape")
    if not path.startswith(("/ipfs/", "/ipns/")):
        raise Refused(404, "only /ipfs and /ipns are here")
    kind, options = _format(asked, fields.get("accept", ""))
    cache = fields.get("cache-control", "").lower().replace(" ", "").split(",")
    tags = fields.get("if-none-match", "")
    wanted = GatewayRequest(
        kind,
        path,
        filename=asked.get("filename", ""),
        only_if_cached="only-if-cached" in cache,
        if_none_match=tuple(tag.strip() for tag in tags.split(",")) if tags else (),
    )
    try:
        if path.startswith("/ipns/"):
            if kind != RECORD:
                raise Refused(400, "names are not resolved here: ask for format=ipns-record, and verify it")
            return replace(wanted, name=path.removeprefix("/ipns/").rstrip("/"))
        found = paths.parse(path)
    except IpfsFuseError as exc:
        raise Refused(400, str(exc)) from exc
    if len(found.names) > MAX_PATH_NAMES:
        raise Refused(400, f"a path of over {MAX_PATH_NAMES} names")
    if kind == RECORD:
        raise Refused(400, "an IPNS record is at /ipns/NAME")
    if kind == RAW:
        if found.names:
            raise Refused(400, "format=raw is one block: ask for it by its own CID, or for a CAR")
        return replace(wanted, root=found.root, range=_range(fields.get("range", "")))
    return _car(replace(wanted, root=found.root, names=found.names), asked, options)


def _format(asked: Mapping[str, str], accept: str) -> tuple[str, dict[str, str]]:
    """The wanted media type, and its parameters in Accept."""
    accepted: dict[str, dict[str, str]] = {}
    for item in accept.split(","):
        kind, *parameters = (part.strip() for part in item.split(";"))
        pairs = (part.partition("=") for part in parameters)
        accepted[kind.lower()] = {key.strip().lower(): value.strip().lower() for key, _, value in pairs}
    if "format" in asked:
        kind = _FORMATS.get(asked["format"], "")
    else:
        kind = next((each for each in accepted if each in _FORMATS.values()), "")
    if not kind:
        raise Refused(
            406 if accept else 400,  # as the specification has it where Accept is missing
            "this is a trustless gateway: ask for format=raw, format=car or format=ipns-record",
        )
    return kind, accepted.get(kind, {})


def _car(wanted: GatewayRequest, asked: Mapping[str, str], options: Mapping[str, str]) -> GatewayRequest:
    """`wanted` with the CAR options of the query and of Accept. Raises Refused."""
    version = asked.get("car-version", options.get("version", "1"))
    order = asked.get("car-order", options.get("order", "dfs"))
    dups = asked.get("car-dups", options.get("dups", "n"))
    scope = asked.get("dag-scope", "all")
    if version != "1" or order not in ("dfs", "unk") or dups not in ("y", "n"):
        raise Refused(400, "CARs are made of version 1, with order=dfs or unk and dups=y or n")
    if scope not in SCOPES:
        raise Refused(400, "dag-scope is block, entity or all")
    first, last = 0, None
    if "entity-bytes" in asked:
        found = _ENTITY_BYTES.fullmatch(asked["entity-bytes"])
        if found is None:
            raise Refused(400, "entity-bytes is FROM:TO, two numbers, TO may be *")
        first, last = int(found[1]), None if found[2] == "*" else int(found[2])
        scope = "entity" if "dag-scope" not in asked else scope
    return replace(wanted, scope=scope, dups=dups == "y", first=first, last=last)


def _range(text: str) -> tuple[int | None, int | None] | None:
    """The range of bytes. None if there is none, or several, which may be ignored (RFC 9110, 14.2)."""
    found = _RANGE.fullmatch(text.replace(" ", ""))
    if found is None or not (found[1] or found[2]) or max(len(found[1]), len(found[2])) > 19:
        return None
    first, last = (int(part) if part else None for part in found.groups())
    return None if first is not None and last is not None and last < first else (first, last)


def slice_of(wanted: tuple[int | None, int | None], size: int) -> tuple[int, int] | None:
    """The start and the end of a range in `size` bytes. None if the range can't be satisfied."""
    first, last = wanted
    if first is None:
        first, last = max(size - (last or 0), 0), size - 1
    end = size if last is None else min(last + 1, size)
    return (first, end) if first < end else None


def disposition(wanted: GatewayRequest, stem: str) -> str:
    """The Content-Disposition: the requested file name, or `stem` with the ending of the format. A name that
    is not ASCII is given twice (RFC 6266)."""
    ending = {RAW: "bin", CAR: "car", RECORD: "ipns-record"}[wanted.format]
    name = (
        "".join(c for c in wanted.filename if c.isprintable() and c not in '"\\/')[:200] or f"{stem}.{ending}"
    )
    plain = "".join(c if c.isascii() else "_" for c in name)
    extended = "" if plain == name else f"; filename*=UTF-8''{quote(name)}"
    return f'attachment; filename="{plain}"{extended}'
