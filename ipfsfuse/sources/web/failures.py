"""What the network's libraries raise, in the domain's words. The one place that translates."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import h11
import trio

from ipfsfuse.errors import SourceFailed

TIMEOUT = "timeout"
CONNECT = "connect"
RESET = "reset"
TLS = "tls"
HOST = "host"
PROTOCOL = "protocol"
SHORT = "short"
LONG = "long"
STATUS = "status"
BUSY = "busy"
REFUSED = "refused"
PAGE = "page"
ENCODING = "encoding"
REDIRECT = "redirect"


@contextmanager
def translated(name: str, late: str = "sent nothing for too long") -> Iterator[None]:
    """Turns library errors into SourceFailed, about the server called `name`; `late` is what a timeout means here."""
    try:
        yield
    except (SourceFailed, trio.Cancelled):
        raise
    except trio.TooSlowError as exc:
        raise SourceFailed(f"{name} {late}", TIMEOUT) from exc
    except socket.gaierror as exc:
        raise SourceFailed(f"{name}: no such host: {exc.strerror}", HOST) from exc
    except h11.ProtocolError as exc:
        raise SourceFailed(f"{name} does not speak HTTP as it should: {exc}", PROTOCOL) from exc
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, EOFError) as exc:
        raise _network(name, exc) from exc


def _network(name: str, exc: Exception) -> SourceFailed:
    cause = exc.__cause__ or exc
    if isinstance(cause, ExceptionGroup):  # several addresses were tried
        cause = cause.exceptions[0]
    if isinstance(cause, ssl.SSLCertVerificationError):
        return SourceFailed(f"{name}: its certificate is not trusted: {cause.verify_message}", TLS)
    if isinstance(cause, ssl.SSLError):
        return SourceFailed(f"{name}: TLS failed: {cause.reason or cause}", TLS)
    if isinstance(cause, ConnectionRefusedError | FileNotFoundError):
        return SourceFailed(f"{name} takes no connections: is it running there?", CONNECT)
    if isinstance(exc, OSError) and not isinstance(exc, ConnectionError):
        return SourceFailed(f"{name}: {exc.strerror or exc}", CONNECT)
    return SourceFailed(f"{name} broke the connection off", RESET)
