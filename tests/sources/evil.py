"""All ways we know in which a gateway can misbehave. Each function gives one wrong answer to a request."""

import gzip
import itertools
import threading

from tests.sources.servers import Ask, Behaviour, answer_well


def wrong_bytes(ask: Ask) -> None:
    block = ask.block or b"nothing"
    ask.send(200, bytes([block[0] ^ 1]) + block[1:])


def another_block(ask: Ask) -> None:
    others = [block for cid, block in ask.server.blocks.items() if cid != ask.cid]
    ask.send(200, others[0])


def short_body(ask: Ask) -> None:
    block = ask.block or b"nothing"
    ask.send(200, block[: len(block) // 2], length=len(block))
    ask.hang_up()


def long_body(ask: Ask) -> None:
    """Sends bytes behind the end. The next answer on the connection must not begin with them."""
    block = ask.block or b"nothing"
    ask.send(200, block + b"HTTP/1.1 200 OK\r\n\r\n", length=len(block))


def announced_too_long(ask: Ask) -> None:
    ask.send(200, b"x" * 1000, length=1 << 40)
    ask.stall()


def endless_body(ask: Ask) -> None:
    ask.connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    piece = b"%x\r\n%s\r\n" % (65536, bytes(65536))
    while not ask.server.stopping.is_set():
        ask.connection.sendall(piece)


def drips(ask: Ask) -> None:
    """Sends one byte at a time, for longer than any client waits."""
    block = ask.block or b"nothing"
    ask.send(200, b"", length=len(block))
    for byte in block:
        if ask.server.stopping.wait(0.05):
            break
        ask.connection.sendall(bytes([byte]))
    ask.hang_up()


def no_head(ask: Ask) -> None:
    ask.stall()


def half_a_head(ask: Ask) -> None:
    ask.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Le")
    ask.stall()


def endless_head(ask: Ask) -> None:
    ask.connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while not ask.server.stopping.is_set():
        ask.connection.sendall(b"X-Filler: " + b"y" * 1000 + b"\r\n")


def reset_in_the_middle(ask: Ask) -> None:
    block = ask.block or b"nothing"
    ask.send(200, block[: len(block) // 2], length=len(block))
    ask.reset()


def html_page(ask: Ask) -> None:
    ask.send(200, b"<!doctype html><h1>Something went wrong</h1>", "text/html; charset=utf-8")


def gzip_bomb(ask: Ask) -> None:
    ask.send(200, BOMB, Content_Encoding="gzip")


BOMB = gzip.compress(bytes(64 << 20))


def redirect_loop(ask: Ask) -> None:
    ask.send(302, b"", Location=f"/ipfs/{ask.target.rpartition('/')[2].partition('?')[0]}?format=raw&again=1")


def not_http(ask: Ask) -> None:
    ask.connection.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
    ask.hang_up()


def server_error(ask: Ask) -> None:
    ask.send(502, b"bad gateway\n", "text/plain")


def one_in_three_fails() -> Behaviour:
    """Fails one request in three. Each server counts for itself, so that a test can be repeated."""
    count, lock = itertools.count(), threading.Lock()

    def behave(ask: Ask) -> None:
        with lock:
            turn = next(count) * 7919 % 3
        if turn:
            answer_well(ask)
        else:
            server_error(ask)

    return behave
