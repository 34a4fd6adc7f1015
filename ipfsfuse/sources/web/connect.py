"""Opens connections: TCP or a socket file, through a proxy where the environment names one, with verified TLS.

Concurrency: any number of tasks; a cancelled call leaves nothing open.
"""

import functools
import socket
import ssl

import h11
import trio

from ipfsfuse.errors import SourceFailed
from ipfsfuse.sources.web.failures import CONNECT, REDIRECT, translated
from ipfsfuse.sources.web.origin import Origin, Proxy, is_private, proxy_for
from ipfsfuse.sources.web.wire import Threads, Wire


@functools.cache
def tls_context() -> ssl.SSLContext:
    """This system's trusted authorities (SSL_CERT_FILE and SSL_CERT_DIR are heeded), names checked, no old protocols."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


async def connect(origin: Origin, threads: Threads, patience: float, *, public_only: bool) -> Wire:
    """A connection to `origin`. With `public_only` (a stranger sent us there) never to a private address.

    Raises SourceFailed: host, connect, tls, timeout, redirect."""
    with translated(origin.text, f"took no connection within {patience:g} s"):
        proxy = proxy_for(origin)
        with trio.fail_after(patience):
            base = await _open(proxy.origin if proxy else origin, public_only and proxy is None)
            try:
                base.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1) if origin.unix is None else None
                if proxy and origin.scheme == "https":
                    await _tunnel(base, origin, proxy)
                stream: trio.abc.Stream = base
                if origin.scheme == "https":
                    tls = trio.SSLStream(base, tls_context(), server_hostname=origin.host, https_compatible=True)
                    await tls.do_handshake()
                    stream = tls
                return Wire(base, stream, threads)
            except BaseException:
                base.socket.close()
                raise


async def _open(origin: Origin, public_only: bool) -> trio.SocketStream:
    if origin.unix is not None:
        return await trio.open_unix_socket(origin.unix)
    host = await _public_address(origin) if public_only else origin.host
    return await trio.open_tcp_stream(host, origin.port)


async def _public_address(origin: Origin) -> str:
    """One checked address to connect to, so that a second answer of the resolver can't lead elsewhere."""
    found = await trio.socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    addresses = [str(address[4][0]) for address in found]
    if not addresses or any(is_private(address) for address in addresses):
        raise SourceFailed(f"a redirect to {origin.text}, a private address, was not followed", REDIRECT)
    return addresses[0]


async def _tunnel(base: trio.SocketStream, origin: Origin, proxy: Proxy) -> None:
    """Asks the proxy to pass everything on to `origin`."""
    target = f"{origin.host}:{origin.port}"
    headers = [("Host", target)]
    if proxy.authorization:
        headers.append(("Proxy-Authorization", proxy.authorization))
    protocol = h11.Connection(h11.CLIENT)
    await base.send_all(protocol.send(h11.Request(method="CONNECT", target=target, headers=headers)) or b"")
    await base.send_all(protocol.send(h11.EndOfMessage()) or b"")
    while True:
        event = protocol.next_event()
        if event is h11.NEED_DATA:
            protocol.receive_data(await base.receive_some(4096))
        elif isinstance(event, h11.Response):
            if event.status_code // 100 == 2:
                return
            raise SourceFailed(f"the proxy {proxy.origin.text} refused the way to {origin.text}: status {event.status_code}", CONNECT)
