"""What servers are told in secret: headers from files, each bound to one origin, and a Kubo node's token.

Nothing here shows a secret in a message or a repr. Concurrency: none; small files are read at the start.
"""

import os
import stat
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from ipfsfuse.errors import UsageError
from ipfsfuse.sources.origin import Origin

Headers = Sequence[tuple[str, str]]

_NOT_OURS_TO_SET: Final = ("host", "accept-encoding", "content-length", "transfer-encoding", "connection")


@dataclass(frozen=True, slots=True)
class BoundHeaders:
    """Headers by the origin that they go to, and to no other."""

    by_origin: Mapping[Origin, Headers] = field(default_factory=dict, repr=False)

    def of(self, origin: Origin) -> Headers:
        return self.by_origin.get(replace(origin, base=""), ())

    def with_token(self, origin: Origin, token: str) -> "BoundHeaders":
        """With `token`, where there is one, as the Authorization of `origin`."""
        more = [*self.of(origin), ("Authorization", token)] if token else self.of(origin)
        return BoundHeaders({**self.by_origin, replace(origin, base=""): more})


def bind_headers(files: Sequence[tuple[str, Path]], sources: Mapping[Origin, str]) -> BoundHeaders:
    """What stands in `files`. Each has the URL of the source that it is for, "" where there is only one
    network source.

    `sources` are the network sources by origin. Raises UsageError."""
    origins = {replace(origin, base=""): source for origin, source in sources.items()}
    bound: dict[Origin, Headers] = {}
    for url, path in files:
        targets = [replace(_origin(url), base="")] if url else list(origins)
        if url and targets[0] not in origins:
            there = ", ".join(origins.values()) or "none"
            raise UsageError(f"--header-file {url}=...: no source is there; there are {there}")
        if len({origins[origin] for origin in targets}) != 1:
            https = (source for source in origins.values() if source.startswith("http"))
            example = f"--header-file {next(https, 'https://gateway.example')}={path}"
            raise UsageError(f"--header-file {path}: say which source it is for: {example}")
        for origin in targets:
            if origin.scheme != "https" and not origin.is_local:
                why = "would get it over plain HTTP, which others can read; use https://"
                raise UsageError(f"--header-file {path}: {origin.text} {why}")
            if origin in bound:
                raise UsageError(f"--header-file is given twice for {origin.text}")
            bound[origin] = read_headers(path)
    return BoundHeaders(bound)


def _origin(url: str) -> Origin:
    from ipfsfuse.sources.parse import parse_source

    origin = parse_source(url).origin
    if origin is None:
        raise UsageError(f"--header-file {url}=…: not the address of a source")
    return origin


def read_headers(path: Path) -> Headers:
    """The headers in a file that is ours alone, one `Name: value` a line; empty lines and those with #
    at their beginning are left out.

    Raises UsageError, which names the line and never shows a value: it may be a secret."""
    try:
        with path.open() as file:
            found = os.fstat(file.fileno())
            if found.st_uid not in (os.geteuid(), 0):
                raise UsageError(f"the headers file {path} belongs to another user; make one of your own")
            if stat.S_IMODE(found.st_mode) & 0o077:
                raise UsageError(f"the headers file {path} may be read by others; run: chmod 600 {path}")
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"the headers file {path} can't be read: {exc}") from exc
    headers = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, separator, value = line.partition(":")
        if not separator or not name or not all(c.isascii() and (c.isalnum() or c in "-_") for c in name):
            raise UsageError(f"{path}, line {number}: not a header; write Name: value")
        if not value.strip().isascii() or not value.strip().isprintable():
            raise UsageError(f"{path}, line {number}: the value has characters that a header can't have")
        if name.lower() in _NOT_OURS_TO_SET:
            raise UsageError(f"{path}, line {number}: {name} is not yours to set")
        headers.append((name, value.strip()))
    return tuple(headers)


def kubo_authorization() -> tuple[str, str]:
    """The Authorization header's value and where it came from; ("", "") where none is set. Raises UsageError.

    From $IPFSFUSE_KUBO_AUTH or the file that $IPFSFUSE_KUBO_AUTH_FILE names: `bearer:TOKEN` or
    `basic:USER:PASSWORD`, as Kubo itself writes them in API.Authorizations."""
    secret, where = os.environ.get("IPFSFUSE_KUBO_AUTH", ""), "IPFSFUSE_KUBO_AUTH"
    path = os.environ.get("IPFSFUSE_KUBO_AUTH_FILE")
    if not secret and path:
        where = path
        try:
            secret = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise UsageError(f"IPFSFUSE_KUBO_AUTH_FILE: {path} can't be read: {exc}") from exc
    if not secret:
        return "", ""
    kind, _, value = secret.partition(":")
    if kind == "bearer" and value and value.isascii() and value.isprintable():
        return f"Bearer {value}", where
    if kind == "basic" and ":" in value:
        return "Basic " + b64encode(value.encode()).decode(), where
    raise UsageError(f"{where} holds neither bearer:TOKEN nor basic:USER:PASSWORD")


def kubo_token(api: Path | None) -> tuple[str, str]:
    """The token to send to a node, "" for none, and what to do where the node refuses us.

    `api` is the file that says where the node is; None where the user said it. A file that another user may
    have written must not say where a secret goes."""
    token, where = kubo_authorization()
    if not token:
        return "", "set IPFSFUSE_KUBO_AUTH_FILE to a file with bearer:TOKEN or basic:USER:PASSWORD"
    if api is not None and not is_ours(api):
        why = f"because {api} belongs to another user; name the node by its address"
        return "", f"it was not sent the token in {where}, {why}"
    return token, f"look at the token in {where}"


def is_ours(path: Path) -> bool:
    """Whether `path` and its folder belong to this user or to root, and nobody else may write there."""
    try:
        found = [each.stat() for each in (path, path.parent)]
    except OSError:
        return False
    return all(each.st_uid in (os.geteuid(), 0) and not each.st_mode & 0o002 for each in found)
