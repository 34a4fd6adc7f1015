"""Settings that all HTTP requests of a mount share, and secrets for servers: headers from files, each bound
to one origin, and the token of a Kubo node.

No message and no repr shows a secret. This is apart from the client, because parsing arguments needs no
httpx.
"""

import functools
import grp
import os
import pwd
import ssl
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import trio

from ipfsfuse.errors import QuotaReached, UsageError
from ipfsfuse.sources.base import current_source_request, held_back
from ipfsfuse.sources.http.origin import Origin

# -- secrets -------------------------------------------------------------------------------------------------

Headers = Sequence[tuple[str, str]]

_NOT_OURS_TO_SET: Final = ("host", "accept-encoding", "content-length", "transfer-encoding", "connection")


@dataclass(frozen=True, slots=True)
class BoundHeaders:
    """Headers, each sent to one origin only."""

    by_origin: Mapping[Origin, Headers] = field(default_factory=dict, repr=False)

    def of(self, origin: Origin) -> Headers:
        return self.by_origin.get(replace(origin, base=""), ())

    def with_token(self, origin: Origin, token: str) -> "BoundHeaders":
        """Adds the Authorization `token` for `origin`, unless it is empty."""
        more = [*self.of(origin), ("Authorization", token)] if token else self.of(origin)
        return BoundHeaders({**self.by_origin, replace(origin, base=""): more})


def read_headers(path: Path) -> Headers:
    """The headers in a file, one `Name: value` a line. Empty lines and lines that begin with # are skipped.

    Raises UsageError, which names the line and shows no value."""
    headers = []
    for number, line in enumerate(_read_secret(path, f"the headers file {path}").splitlines(), 1):
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


def _read_secret(path: Path, what: str) -> str:
    """The text of a file that this user or root owns and no other user may read. `what` is its name in
    messages. Raises UsageError."""
    try:
        with path.open() as file:
            info = os.fstat(file.fileno())
            if info.st_uid not in (os.geteuid(), 0):
                raise UsageError(f"{what} belongs to another user; make one of your own")
            if info.st_mode & 0o077:
                raise UsageError(f"{what} may be read by others; run: chmod 600 {path}")
            return file.read()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{what} can't be read: {exc}") from exc


def kubo_authorization() -> tuple[str, str]:
    """The value of the Authorization header for a Kubo node, and the name of the variable or file that it
    came from; ("", "") if none is set.

    $IPFSFUSE_KUBO_AUTH, or the file that $IPFSFUSE_KUBO_AUTH_FILE names, holds `bearer:TOKEN` or
    `basic:USER:PASSWORD`, as Kubo writes them in API.Authorizations. Raises UsageError."""
    secret, where = os.environ.get("IPFSFUSE_KUBO_AUTH", ""), "IPFSFUSE_KUBO_AUTH"
    path = os.environ.get("IPFSFUSE_KUBO_AUTH_FILE")
    if not secret and path:
        where = path
        secret = _read_secret(Path(path), f"{path}, which IPFSFUSE_KUBO_AUTH_FILE names,").strip()
    if not secret:
        return "", ""
    kind, _, value = secret.partition(":")
    if kind == "bearer" and value and value.isascii() and value.isprintable():
        return f"Bearer {value}", where
    if kind == "basic" and ":" in value:
        return "Basic " + b64encode(value.encode()).decode(), where
    raise UsageError(f"{where} holds neither bearer:TOKEN nor basic:USER:PASSWORD")


def kubo_token(api: Path | None) -> tuple[str, str]:
    """The token for a node ("" for none), and the advice to give if the node refuses a request.

    `api` is the file that names the node; None if the user named it. If another user may have written that
    file, no token is sent to the address in it."""
    token, where = kubo_authorization()
    if not token:
        return "", "set IPFSFUSE_KUBO_AUTH_FILE to a file with bearer:TOKEN or basic:USER:PASSWORD"
    if api is not None and not is_ours(api):
        why = f"because {api} or its folder may be written by another user; name the node by its address"
        return "", f"it was not sent the token in {where}, {why}"
    return token, f"look at the token in {where}"


def is_ours(path: Path) -> bool:
    """Whether `path` and its folder belong to this user or to root, and nobody else may write there."""
    try:
        found = [each.stat() for each in (path, path.parent)]
    except OSError:
        return False
    return all(each.st_uid in (os.geteuid(), 0) and not _others_may_write(each) for each in found)


def _others_may_write(info: os.stat_result) -> bool:
    """Kubo leaves the modes of its files to the umask. Where each user has a group of their own, that is
    often 0002: such a group may write, as pam_umask(8) with `usergroups` has it."""
    if not info.st_mode & 0o020:
        return bool(info.st_mode & 0o002)
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(info.st_gid)
    except KeyError:
        return True
    is_private = user.pw_gid == group.gr_gid and user.pw_name == group.gr_name
    return not is_private or bool(set(group.gr_mem) - {user.pw_name}) or bool(info.st_mode & 0o002)


# -- settings ------------------------------------------------------------------------------------------------

BYTES_IN_FLIGHT = 64 << 20


class BodyBudget:
    """Bytes of response bodies that may be in memory at a time, over all sources together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.freed = trio.Event()


class BodyShare:
    """One source's part of a `BodyBudget`, first come, first served.

    A source always gets GUARANTEED bytes, even if stalled bodies of other sources fill the budget. A body
    that is larger than the whole budget is received alone."""

    GUARANTEED = 4 << 20
    """Bytes: two of the largest blocks."""

    def __init__(self, budget: BodyBudget) -> None:
        self.used = 0
        self._budget = budget
        self._turn = trio.Lock()

    async def take(self, size: int) -> None:
        async with self._turn:
            while (
                self.used
                and self.used + size > self.GUARANTEED
                and self._budget.used + size > self._budget.limit
            ):
                await self._budget.freed.wait()
            self.used += size
            self._budget.used += size

    def give(self, size: int) -> None:
        budget = self._budget
        self.used -= size
        budget.used -= size
        budget.freed.set()
        budget.freed = trio.Event()


class RateLimit:
    """Bounds bytes a second: after bytes have come, their receiver waits until they fit. Concurrency: any
    number of tasks.

    While other requests use up the limit, each wait is long, and a source is not blamed for sending nothing
    meanwhile (`SourceRequest`). So the receiver of a body waits only after TOGETHER_SECONDS' worth of pieces,
    and at its end: else a source that sends slowly would never be blamed."""

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._paid_until = float("-inf")

    async def spend(self, count: int, ended: bool = True) -> None:
        """`ended`: these are the last bytes of a response, or all of it."""
        now = trio.current_time()
        self._paid_until = max(self._paid_until, now) + count / self._per_second
        request = current_source_request.get()
        if request is not None:
            count = request.unpaid = request.unpaid + count
            if count < (1 if ended else TOGETHER_SECONDS * self._per_second):
                return
            request.unpaid = 0
        if self._paid_until - now > MIN_SLEEP_SECONDS:
            with held_back():
                await trio.sleep_until(self._paid_until)


class FetchQuota:
    """Bounds the bytes of all bodies together. At the bound, bodies that are being received break off, and no
    more requests are sent. Concurrency: any number of tasks."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.fetched = 0
        self.reached = trio.Event()

    def check(self) -> None:
        """Raises QuotaReached."""
        if self.reached.is_set():
            raise QuotaReached(
                f"this mount has fetched {self.fetched} bytes: more than --max-fetch {self.bound} allows",
                "quota",
            )

    def spend(self, count: int) -> None:
        """Raises QuotaReached."""
        self.fetched += count
        if self.fetched > self.bound:
            self.reached.set()
        self.check()


MIN_SLEEP_SECONDS = 0.01
"""Shorter waits are saved up until they are worth a sleep."""
TOGETHER_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class HttpSettings:
    headers: BoundHeaders = field(default_factory=BoundHeaders, repr=False)
    """Each is sent to the origin that it is bound to, never to the target of a redirect."""
    connect: float = 10.0
    """Seconds for a connection, and as many for TLS."""
    idle: float = 40.0
    """Seconds without a byte: longer than the 30 s after which a node gives up a block with 504."""
    total: float = 60.0
    """Seconds for a head, and for a body that is read whole. A server that takes longer has failed."""
    budget: BodyBudget = field(default_factory=lambda: BodyBudget(BYTES_IN_FLIGHT), repr=False, compare=False)
    """For large bodies. All requests with these settings, or a copy of them, share it."""
    public_only: bool = False
    """Whether requests go to public addresses only: for servers that the user did not name."""
    rate: RateLimit | None = None
    """For all bodies of all sources together."""
    quota: FetchQuota | None = None
    """For all bodies of all sources together."""
    idle_connections: int = 32
    idle_seconds: float = 60.0


@functools.cache
def tls_context() -> ssl.SSLContext:
    """TLS 1.2 and later, with host names checked and this system's authorities. SSL_CERT_FILE and
    SSL_CERT_DIR apply."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
