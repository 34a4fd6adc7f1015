"""Origins (the addresses of servers), the targets of redirects, and proxies.

Pure, except that the proxies and the Kubo repository come from the environment, and the node's addresses from
files of the repository.
"""

import functools
import ipaddress
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from ipfsfuse.errors import UsageError

_URL_CHARACTERS = "%/:?#[]@!$&'()*+,;=-._~"
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Origin:
    """The address of a server. `base` is a prefix of all paths, "" or "/like/this". `unix` is the path of a
    socket that is used instead of host and port."""

    scheme: str
    host: str
    port: int
    base: str = ""
    unix: str | None = None
    authority: str = field(init=False, repr=False, compare=False)
    """The Host header: without the scheme's default port, IPv6 addresses in brackets."""
    text: str = field(init=False, repr=False, compare=False)
    """For messages."""

    def __post_init__(self) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        authority = host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"
        server = f"unix://{self.unix}" if self.unix else f"{self.scheme}://{authority}"
        object.__setattr__(self, "authority", authority)
        object.__setattr__(self, "text", server + self.base)

    @property
    def is_local(self) -> bool:
        """Whether it is a socket file, `localhost` or a loopback address. No resolver is asked."""
        return (
            self.unix is not None
            or self.host == "localhost"
            or (is_address(self.host) and ipaddress.ip_address(self.host).is_loopback)
        )


def parse_origin(url: str) -> Origin:
    """The origin of an http or https URL; its path becomes `base`. Raises UsageError."""
    parts = _split(url)
    if parts.scheme not in DEFAULT_PORTS:
        raise UsageError(f"{url}: only http:// and https:// are supported")
    if not parts.hostname:
        raise UsageError(f"{url}: there is no host in it; write {parts.scheme}://host[:port]")
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            f"{parts.scheme}://{parts.hostname}: no passwords in URLs; put an Authorization line into "
            "a file for --header-file"
        )
    if parts.query or parts.fragment:
        raise UsageError(f"{url}: a source has no query and no fragment; end it before the ? or #")
    host = parts.hostname
    if not is_address(host):
        try:
            host = host.encode("idna").decode() if not host.isascii() else host
        except UnicodeError as exc:
            raise UsageError(f"{url}: {host} is not a host name") from exc
        if not all(
            part and len(part) <= 63 and all(c.isalnum() or c in "-_" for c in part)
            for part in host.rstrip(".").split(".")
        ):
            raise UsageError(f"{url}: {host} is not a host name")
    return Origin(parts.scheme, host, parts.port or DEFAULT_PORTS[parts.scheme], parts.path.rstrip("/"))


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for a port that is not a number
    except ValueError as exc:
        raise UsageError(f"{url}: not a URL: {exc}") from exc
    if any(c.isspace() or not c.isprintable() for c in url):
        raise UsageError(f"{url!r}: a space or control character in a URL")
    return parts


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def redirected(origin: Origin, path: str, location: str) -> tuple[Origin, str]:
    """The origin and the path that a redirect from `path` at `origin` leads to. Raises UsageError if it leads
    to another scheme or is not a valid URL."""
    try:
        url = quote(urljoin(f"{origin.scheme}://{origin.authority}{path}", location), safe=_URL_CHARACTERS)
        bare, _, query = url.partition("#")[0].partition("?")
        target = parse_origin(bare)
    except (UsageError, ValueError) as exc:
        raise UsageError(f"redirects to what is not an address: {exc}") from exc
    if target.scheme != origin.scheme:
        raise UsageError(f"redirects to {target.scheme}://{target.authority}; if that is right, name it")
    return replace(target, base=""), (urlsplit(bare).path or "/") + (f"?{query}" if query else "")


def parse_multiaddr(text: str) -> Origin:
    """/ip4|ip6|dns.../HOST/tcp/PORT[/http|/https] or /unix/PATH. Raises UsageError."""
    parts = text.strip().split("/")
    if len(parts) > 2 and parts[1] == "unix":
        return unix_origin("/" + "/".join(parts[2:]).lstrip("/"))
    if (
        len(parts) < 5
        or parts[1] not in ("ip4", "ip6", "dns", "dns4", "dns6")
        or parts[3] != "tcp"
        or not parts[4].isdigit()
    ):
        expected = "/ip4/HOST/tcp/PORT or /unix/PATH was expected"
        raise UsageError(f"{text.strip()[:200]!r} is not an address of a node: {expected}")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(parts[2], parts[2])
    scheme = "https" if "https" in parts[5:] else "http"
    return parse_origin(f"{scheme}://[{host}]:{parts[4]}" if ":" in host else f"{scheme}://{host}:{parts[4]}")


def repository() -> Path:
    """The folder of this machine's Kubo repository: $IPFS_PATH with `~` expanded, else ~/.ipfs."""
    try:
        return Path(os.environ.get("IPFS_PATH") or "~/.ipfs").expanduser()
    except RuntimeError as exc:
        raise UsageError("there is no home folder with a .ipfs in it: set HOME or IPFS_PATH") from exc


def read_origin(path: Path) -> Origin:
    """The address that a node wrote into a file of its repository: a multiaddr or a URL.

    Raises OSError, ValueError, UsageError."""
    text = path.read_text().strip()
    return parse_multiaddr(text) if text.startswith("/") else parse_origin(text)


def unix_origin(path: str) -> Origin:
    return Origin("http", "localhost", 80, unix=path)


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy. `auth` is (user, password) or None."""

    origin: Origin
    auth: tuple[str, str] | None = field(default=None, repr=False)


@functools.lru_cache(maxsize=256)
def proxy_for(origin: Origin) -> Proxy | None:
    """The proxy for `origin` according to http_proxy, https_proxy, all_proxy and no_proxy. Raises UsageError
    for a proxy that is not an HTTP proxy."""
    import urllib.request  # takes 13 ms, and many commands send no request

    if origin.unix is not None or urllib.request.proxy_bypass(origin.host):
        return None
    found = urllib.request.getproxies()
    url = found.get(origin.scheme) or found.get("all")
    if not url or origin.is_local:
        return None
    parts = _split(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise UsageError(
            f"the proxy {parts.scheme}://{parts.hostname} for {origin.text} is not an http:// one; set "
            "no_proxy or another"
        )
    auth = None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))
    return Proxy(Origin("http", parts.hostname, parts.port or 3128), auth)
