"""Where HTTP goes: origins as frozen values, the addresses that are nobody else's business, and proxies.

Pure but for what the environment says about proxies. Concurrency: none.
"""

import functools
import ipaddress
import urllib.request
from base64 import b64encode
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from ipfsfuse.errors import UsageError

DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Origin:
    """A server. `base` is a path before all others, "" or "/like/this"; `unix` a socket's path instead of an address."""

    scheme: str
    host: str
    port: int
    base: str = ""
    unix: str | None = None

    @property
    def authority(self) -> str:
        """The Host header: without the scheme's own port, IPv6 addresses in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def text(self) -> str:
        """For people."""
        return f"unix://{self.unix}{self.base}" if self.unix else f"{self.scheme}://{self.authority}{self.base}"

    @property
    def is_local(self) -> bool:
        """Written as this machine's own loopback or a socket file, without asking a resolver."""
        return self.unix is not None or self.host == "localhost" or (is_address(self.host) and ipaddress.ip_address(self.host).is_loopback)


def parse_origin(url: str) -> Origin:
    """The origin of an http or https URL; its path becomes `base`. Raises UsageError, one line which says what is wrong."""
    parts = _split(url)
    if parts.scheme not in DEFAULT_PORTS:
        raise UsageError(f"{url}: only http:// and https:// are spoken")
    if not parts.hostname:
        raise UsageError(f"{url}: there is no host in it; write {parts.scheme}://host[:port]")
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"{parts.scheme}://{parts.hostname}: no passwords in URLs; put an Authorization line into a file for --header-file")
    if parts.query or parts.fragment:
        raise UsageError(f"{url}: a source has no query and no fragment; end it before the ? or #")
    host = parts.hostname
    if not is_address(host):
        try:
            host = host.encode("idna").decode() if not host.isascii() else host
        except UnicodeError as exc:
            raise UsageError(f"{url}: {host} is no host name") from exc
        if not all(part and len(part) <= 63 and all(c.isalnum() or c in "-_" for c in part) for part in host.rstrip(".").split(".")):
            raise UsageError(f"{url}: {host} is no host name")
    return Origin(parts.scheme, host, parts.port or DEFAULT_PORTS[parts.scheme], parts.path.rstrip("/"))


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for a port that is no number
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


def is_private(address: str) -> bool:
    """True for addresses that a stranger must not send us to: loopback, private, link-local, multicast, unspecified."""
    value = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(value, ipaddress.IPv6Address) and value.ipv4_mapped:
        value = value.ipv4_mapped
    return not value.is_global or value.is_multicast


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy; `authorization` is the value of its header, "" for none."""

    origin: Origin
    authorization: str = ""


@functools.lru_cache(maxsize=256)
def proxy_for(origin: Origin) -> Proxy | None:
    """What http_proxy, https_proxy, all_proxy and no_proxy say about `origin`. Raises UsageError for a proxy we can't use."""
    if origin.unix is not None or urllib.request.proxy_bypass(origin.host):
        return None
    found = urllib.request.getproxies()
    url = found.get(origin.scheme) or found.get("all")
    if not url or origin.is_local:
        return None
    parts = _split(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise UsageError(f"the proxy {parts.scheme}://{parts.hostname} for {origin.text} is not an http:// one; set no_proxy or another")
    authorization = ""
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + b64encode(secret.encode()).decode()
    return Proxy(Origin("http", parts.hostname, parts.port or 3128), authorization)
