"""One gateway sends damaged heads, bodies, redirects, CARs and trailers, another one is good: every read is
right.

The cases are numbered, so that one of them can be repeated. IPFSFUSE_HTTP_CASES is how many there are:
100,000 take some minutes. IPFSFUSE_HTTP_FIRST is the number of the first.
"""

import os
import random
import socket
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.sources.base import Source, Subtree
from ipfsfuse.sources.http import client
from ipfsfuse.sources.http.client import Http, HttpSettings
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.structures import Buffer
from tests.sources.content import raw_blocks, sample, trees
from tests.sources.servers import CAR, RAW, Ask, Server
from tests.sources.streamed import give_each
from tests.sources.timed import Takes

CASES = int(os.environ.get("IPFSFUSE_HTTP_CASES", "2000"))
FIRST = int(os.environ.get("IPFSFUSE_HTTP_FIRST", "0"))
WORKERS = 8
FILE, TREE = sample(81, count=5, size=2000), trees()["nested"]
BLOCKS = raw_blocks(82, 20, size=900) | FILE.blocks | TREE.blocks
FILE_TEXT = cids.text(FILE.root)
FILE_CAR, TREE_CAR = FILE.car(), TREE.car()
BLOCKS_LIST = [*BLOCKS.items()]
HASTY = HttpSettings(connect=1.0, idle=0.1, total=0.2)

STATUSES = (
    ["200 OK"] * 12
    + ["206 Partial Content"] * 4
    + ["302 Found"] * 6
    + ["301", "303 See", "307 T", "308 P", "404 Not", "429 Busy"]
)
STATUSES += [
    "503 Later",
    "504 G",
    "403 No",
    "401 Who",
    "500 Oops",
    "204 None",
    "304 Same",
    "100 Continue",
    "101 Switch",
]
STATUSES += ["999 X", "99999 X", "-1 X", "2 0", ""]
VERSIONS = ["HTTP/1.1"] * 30 + [
    "HTTP/1.0",
    "HTTP/2.0",
    "HTTP/0.9",
    "HTTP/1.",
    "http/1.1",
    "ICY",
    "HTTP/99999.1",
    "\x00",
]
LOCATIONS = [
    "http://[::1/x", "http://[::1]/x", "http://", "//", "/", "", "?", "#", "http://a:99999/", "http://a:b/", "http://a:-1/", "http://a:/",
    "http://user:pw@h.test/", "http://127.0.0.1/", "http://169.254.169.254/", "http://[fe80::1%25eth0]/", "http://[::ffff:127.0.0.1]/",
    "http://2130706433/", "http://0x7f.1/", "http://1.2.3.4.5/", "http://xn--/", "http://xn--a-ecp.test/", "http://\u2603.test/", "http://a..b/",
    "http://" + "a" * 300 + ".test/", "https://x.test/", "ftp://x.test/", "javascript:alert(1)", "data:,x", "http://x.localhost/", "http://%00/",
    "http://x.test/%zz", "http://x.test/a b", "/" + "a" * 9000, "../../..", "http://[v1.x]/", "http://[]/", "http://[1.2.3.4]/", "\\\\x\\y",
    "http://x.test:80:80/", "http:///x", "http:x", "///x", "http://\xff/", "\x00",
]  # fmt: skip
RETRIES = [
    "5", "99999999999999999999999", "-1", "1e309", "nan", "Fri, 31 Dec 99999 23:59:59 GMT", "Fri, 31 Dec 9999 23:59:59 -9999", "\u0663",
    "Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 01 Jan 0001 00:00:00 +2359", "Wed, 21 Oct 2015 07:28:00 +99999999999", "0 0 0 0 0", ",", "\xff",
    "Fri, 99 Foo 2020 99:99:99 GMT", "1 Jan 10000",
]  # fmt: skip
LENGTHS = [
    "-1",
    "0",
    "1e3",
    "9" * 30,
    "9" * 19,
    "\u0663",
    "5, 5",
    "0x10",
    "+5",
    "",
    "5 5",
    "18446744073709551616",
    "1099511627776",
]
NASTY = [
    "Content-Encoding: gzip", "Content-Encoding: br", "Content-Encoding: \x01", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: identity", "Transfer-Encoding: chunked, chunked", "Transfer-Encoding:\tchunked", "Connection: close", "Connection: upgrade",
    "Upgrade: h2c", "Content-Type: text/html", "Content-Type: ", "Content-Type: \xff", "Content-Range: bytes x-y/z", "Content-Range: bytes 0-",
    "Set-Cookie: " + "a=" * 2000, "X: " + "y" * 20_000, "no colon", ": no name", "bad name: x", " folded: x", "X:\x00", "X: \r",
    "X-Stream-Error: broke", "Trailer: X-Stream-Error", "Link: <" + ">" * 100, "Content-Length: 3", "Keep-Alive: timeout=-1",
    "Content-Type: application/json; charset=\x1b[31m",
]  # fmt: skip
TRAILERS = [
    "X-Stream-Error: it broke\r\n",
    "X: " + "y" * 30_000 + "\r\n",
    "no colon\r\n",
    "\x00\r\n",
    "Content-Length: 5\r\n",
    "A: b\r\n" * 3000,
]


class Case:
    """One response. It depends on nothing but the number of the case."""

    def __init__(self, number: int) -> None:
        self.chance = random.Random(number)

    def respond(self, ask: Ask, right: bytes, type_: str) -> None:
        chance = self.chance
        data = self._head_and_body(right, type_)
        if chance.random() < 0.3:
            data = self._flipped(data)
        if chance.random() < 0.15:
            data = data[: chance.randrange(len(data) + 1)]
        if chance.random() < 0.05:
            data += b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad"
        for at in range(0, len(data), size := chance.choice((7, *[900] * 4, *[1 << 20] * 15))):
            ask.connection.sendall(data[at : at + size])
            if at > 100 * size:
                break
        end = chance.random()
        if end < 0.1:
            ask.reset()
        elif end < 0.12:
            ask.stall()
        elif end < 0.5:
            ask.hang_up()

    def _head_and_body(self, right: bytes, type_: str) -> bytes:
        chance = self.chance
        lines = [f"{chance.choice(VERSIONS)} {chance.choice(STATUSES)}"]
        if chance.random() < 0.8:
            lines.append(f"Content-Type: {type_}")
        body = self._body(right)
        chunked = chance.random() < 0.4
        if chunked:
            lines.append("Transfer-Encoding: chunked")
            body = self._chunked(body)
        elif chance.random() < 0.9:
            wrong = chance.random() < 0.15
            lines.append(
                "Content-Length: "
                f"{chance.choice([*LENGTHS, str(len(body) + 1), str(max(0, len(body) - 1))]) if wrong else len(body)}"
            )
        if chance.random() < 0.4 or lines[0][9:12] in ("301", "302", "303", "307", "308"):
            lines.append(f"Location: {chance.choice(LOCATIONS)}")
        if chance.random() < 0.2:
            lines.append(f"Retry-After: {chance.choice(RETRIES)}")
        if chance.random() < 0.3:
            lines.append(f"Content-Range: bytes 0-{len(body) - 1}/{len(body)}")
        lines[1:1] = chance.sample(NASTY, k=chance.choice((0, 0, 0, 1, 1, 2, 5)))
        end = chance.choice(["\r\n"] * 20 + ["\n", "\r", "\r\n "])
        return (end.join(lines) + end + end).encode("utf-8", "surrogatepass") + body

    def _body(self, right: bytes) -> bytes:
        way = self.chance.random()
        if way < 0.4:
            return right
        if way < 0.6:
            return self._flipped(right)
        if way < 0.7:
            return right[: self.chance.randrange(len(right) + 1)]
        if way < 0.8:
            return self.chance.randbytes(self.chance.choice((0, 1, 100, 100_000)))
        if way < 0.9:
            return right + self.chance.randbytes(10)
        at = self.chance.randrange(len(right) + 1)
        return right[:at] + right[at // 2 : at] + right[at:]

    def _chunked(self, body: bytes) -> bytes:
        chance, parts, at = self.chance, list[bytes](), 0
        while at < len(body):
            size = chance.choice((1, 10, 1000, 100_000))
            piece = body[at : at + size]
            size_text: Any = f"{len(piece):x}"
            if chance.random() < 0.02:
                size_text = chance.choice(
                    ["", "-1", "zz", "f" * 20, size_text + ";x=" + "y" * 20_000, " " + size_text, "0x1"]
                )
            parts.append(f"{size_text}\r\n".encode() + piece + b"\r\n")
            at += size
            if len(parts) > 300:
                break
        last = b"0\r\n" + (chance.choice(TRAILERS).encode() if chance.random() < 0.3 else b"") + b"\r\n"
        return b"".join(parts) + (last if chance.random() < 0.9 else b"")

    def _flipped(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self.chance.choice((1, 1, 2, 10))):
            if changed:
                changed[self.chance.randrange(len(changed))] = self.chance.randrange(256)
        return bytes(changed)


class NoNames(trio.abc.HostnameResolver):
    """No name has an address, so redirects lead nowhere."""

    async def getaddrinfo(self, *_args: object, **_options: object) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "no such host")

    async def getnameinfo(self, *_args: object) -> Any:
        raise AssertionError


async def read_block(pool: SourcePool, chance: random.Random) -> None:
    cid, block = chance.choice(BLOCKS_LIST)
    assert (await pool.get(cid)).block == block


async def read_range(pool: SourcePool, _chance: random.Random) -> None:
    got: dict[int, Buffer] = {}

    async def deliver(index: int, blocks: Sequence[Buffer], _source: Source) -> None:
        assert got.keys().isdisjoint(range(index, index + len(blocks)))
        got.update({index + at: bytes(block) for at, block in enumerate(blocks)})

    await give_each(pool.stream(FILE.run), deliver)
    assert got == FILE.expected


async def read_directory(pool: SourcePool, chance: random.Random) -> None:
    takes = Takes()
    whole = chance.random() < 0.5
    await give_each(pool.subtree(Subtree(TREE.root, whole, 1 << 20), takes), takes.take)
    assert takes.blocks.items() <= TREE.blocks.items()


READS: list[Callable[[SourcePool, random.Random], Any]] = [read_block, read_block, read_range, read_directory]


@pytest.mark.logs("sent wrong bytes for", "has wrong bytes for")
@pytest.mark.parametrize("own", [True, False], ids=["own", "httpx"])
def test_every_read_is_right_whatever_one_gateway_sends(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "OWN_TRANSPORT", own)
    cases: dict[str, Case] = {}
    asked = 0

    def behave(ask: Ask) -> None:
        nonlocal asked
        asked += 1
        ask.server.asked.clear()  # there may be 100,000 of them, and the test does not need them
        worker, _, path = ask.path[1:].partition("/ipfs/")
        case = cases.get(worker) or next(iter(cases.values()))  # a redirect may have led anywhere
        if ask.query.get("format") == "car":
            right, type_ = FILE_CAR if path.startswith(FILE_TEXT) else TREE_CAR, CAR
        elif "range" in ask.headers:
            right, type_ = FILE.data, "application/octet-stream"
        else:
            ask.target = f"/ipfs/{path}?format=raw"
            right, type_ = ask.block or BLOCKS_LIST[0][1], RAW
        case.respond(ask, right, type_)

    numbers = iter(range(FIRST + int(own), FIRST + CASES, 2))  # half of the cases for each transport

    async def worker(name: str, bad: str, good: str) -> None:
        bad_gateways = [
            Gateway(Http(parse_origin(f"{bad}/{name}"), HASTY), "bad", local=local) for local in (True, False)
        ]
        good_gateway = Gateway(Http(parse_origin(good)), "good", local=True)
        for number in numbers:
            cases[name] = case = Case(number)
            first = bad_gateways[number // 2 % 2]
            first._ranges, first._cars = first.local, True  # a case may offer what an earlier one did not
            with trio.fail_after(30):
                try:
                    await READS[number // 4 % len(READS)](
                        SourcePool([first, good_gateway], rng=random.Random(1)), case.chance
                    )
                except BaseException as exc:
                    exc.add_note(f"IPFSFUSE_HTTP_FIRST={number}")
                    raise
        for source in (*bad_gateways, good_gateway):
            await source.aclose()

    async def main() -> None:
        trio.socket.set_custom_hostname_resolver(NoNames())
        with Server(BLOCKS, behave) as bad, Server({}, files=(FILE,), trees=(TREE,)) as good:
            good.blocks.update(BLOCKS)
            async with trio.open_nursery() as nursery:
                for number in range(WORKERS):
                    nursery.start_soon(worker, f"w{number}", bad.url, good.url)

    trio.run(main)
    assert asked > CASES * 0.4, "too few cases asked the bad gateway"
