"""The trustless cases of the gateway-conformance suite (github.com/ipfs/gateway-conformance).

They use its fixtures. Without the fixtures (../shared/fixtures) these tests are skipped.
"""

from collections.abc import Iterator

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, nodes
from tests.dag.blocks import FIXTURES
from tests.faults.gateway import blocks_of
from tests.mounting import Home
from tests.serve.conftest import Server, serving

CARS = {path.stem: path for path in sorted(FIXTURES.glob("gateway-conformance/*.car"))}
pytestmark = pytest.mark.skipif(not CARS, reason=f"no conformance fixtures at {FIXTURES}")

RAW_DIR = "bafybeie72edlprgtlwwctzljf6gkn2wnlrddqjbkxo3jomh4n7omwblxly"
RAW_FILE = "bafkreihhpc5y2pqvl5rbe5uuyhqjouybfs3rvlmisccgzue2kkt5zq6upq"
NESTED = "bafybeibfevfxlvxp5vxobr5oapczpf7resxnleb7tkqmdorc4gl5cdva3y"
DUPLICATES = "bafybeihchr7vmgjaasntayyatmp5sv6xza57iy2h4xj7g46bpjij6yhrmy"
ASCII = "bafkreifkam6ns4aoolg3wedr4uzrs3kvq66p4pecirz6y2vlrngla62mxm"
HELLO = "bafkreifjjcie6lypi6ny7amxnfftagclbuxndqonfipmb64f2km2devei4"
MULTI = "bafybeigcisqd7m5nf3qmuvjdbakl5bdnh4ocrmacaqkpuh77qjvggmt2sa"
CHUNKS = [
    "bafkreie5noke3mb7hqxukzcy73nl23k6lxszxi5w3dtmuwz62wnvkpsscm",
    "bafkreih4ephajybraj6wnxsbwjwa77fukurtpl7oj7t7pfq545duhot7cq",
    "bafkreigu7buvm3cfunb35766dn7tmqyh2um62zcio63en2btvxuybgcpue",
    "bafkreicll3huefkc3qnrzeony7zcfo7cr3nbx64hnxrqzsixpceg332fhe",
    "bafkreifst3pqztuvj57lycamoi7z34b4emf7gawxs74nwrc2c7jncmpaqm",
]
HAMT = "bafybeidbclfqleg2uojchspzd4bob56dqetqjsj27gy2cq3klkkgxtpn4i"
MISSING = "QmYhmPjhFjYFyaoiuNzYv8WGavpSRDwdHWe5B4M5du5Rtk"
CBOR = "bafireif3aymeikgfbofx533yf5vlx4kimzq6zmzmpra2mnzfsfnmv4hchm"
CAR_TYPE = "application/vnd.ipld.car"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = Home(tmp_path_factory.mktemp("conformance") / "home")
    with serving(home, *(part for path in CARS.values() for part in ("--from", path))) as server:
        yield server


def block(cid: str) -> bytes:
    wanted = cids.multihash(cids.parse(cid))
    return next(found[wanted] for path in CARS.values() if wanted in (found := blocks_of(path)))


# -- blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cid", [RAW_DIR, RAW_FILE, CBOR])
def test_a_raw_block_is_given_by_query_and_by_header(server: Server, cid: str) -> None:
    for answer in (
        server.ask(f"/ipfs/{cid}?format=raw"),
        server.ask(f"/ipfs/{cid}", Accept="application/vnd.ipld.raw"),
    ):
        assert (answer.status, answer.body) == (200, block(cid))


def test_the_headers_of_a_raw_block(server: Server) -> None:
    answer = server.ask(f"/ipfs/{RAW_FILE}", Accept="application/vnd.ipld.raw")
    assert answer.headers["content-type"] == "application/vnd.ipld.raw"
    assert answer.headers["content-length"] == str(len(block(RAW_FILE)))
    assert answer.headers["content-disposition"].startswith("attachment;")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-ipfs-path"] == f"/ipfs/{RAW_FILE}"
    assert answer.headers["x-ipfs-roots"] == RAW_FILE
    assert answer.headers["etag"]
    assert answer.headers["cache-control"] == "public, max-age=29030400, immutable"
    named = server.ask(f"/ipfs/{RAW_FILE}?format=raw&filename=foobar.bin")
    assert 'attachment; filename="foobar.bin"' in named.headers["content-disposition"]
    named = server.ask(f"/ipfs/{RAW_FILE}?format=raw&filename=test%D1%82%D0%B5%D1%81%D1%82.bin")
    assert "filename=\"test____.bin\"; filename*=UTF-8''test%D1%82" in named.headers["content-disposition"]


@pytest.mark.parametrize(
    ("wanted", "start", "end"), [("bytes=6-16", 6, 17), ("bytes=0-", 0, 31), ("bytes=-5", 26, 31), ("bytes=3-99", 3, 31)]
)  # fmt: skip
def test_a_range_of_a_raw_block(server: Server, wanted: str, start: int, end: int) -> None:
    answer = server.ask(f"/ipfs/{RAW_FILE}?format=raw", Range=wanted)
    assert (answer.status, answer.body) == (206, block(RAW_FILE)[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/31"


def test_several_ranges_may_be_ignored_and_a_range_past_the_end_is_416(server: Server) -> None:
    assert server.ask(f"/ipfs/{RAW_FILE}?format=raw", Range="bytes=0-1,4-5").body == block(RAW_FILE)
    answer = server.ask(f"/ipfs/{RAW_FILE}?format=raw", Range="bytes=31-")
    assert (answer.status, answer.headers["content-range"]) == (416, "bytes */31")


# -- CARs ----------------------------------------------------------------------------------------------------


def cars(server: Server, path: str, query: str = "") -> list[str]:
    """The blocks of a CAR. Asserts that a request by query and one by header give the same blocks."""
    by_query = server.ask(f"/ipfs/{path}?format=car{query}")
    by_header = server.ask(f"/ipfs/{path}?{query.removeprefix('&')}", Accept=CAR_TYPE)
    assert by_query.status == by_header.status == 200
    assert by_query.headers["content-type"].startswith(CAR_TYPE)
    assert by_query.blocks() == by_header.blocks()
    return by_query.blocks()


def nested() -> tuple[str, str, str]:
    """The name and the CID of the directory in `NESTED`, and the CID of the file in it."""
    outer = nodes.parse(cids.parse(NESTED), block(NESTED))
    assert isinstance(outer, nodes.Directory)
    (link,) = outer.links
    inner = nodes.parse(link.cid, block(cids.text(link.cid)))
    assert isinstance(inner, nodes.Directory)
    (file,) = inner.links
    return link.name.decode(), cids.text(link.cid), cids.text(file.cid)


def test_a_car_of_a_path_has_the_blocks_of_the_path_and_its_target(server: Server) -> None:
    name, inner, _file = nested()
    whole = list(
        dict.fromkeys(
            cids.text(cids.make(cids.DAG_PB, key)) for key in blocks_of(CARS["path_gateway_tar_inside-root"])
        )
    )
    assert len(cars(server, NESTED)) == len(whole)
    assert cars(server, f"{NESTED}/{name}")[:2] == [NESTED, inner]
    assert server.ask(f"/ipfs/{NESTED}/{name}/i-do-not-exist?format=car").status == 404
    assert cars(server, f"{NESTED}/{name}", "&dag-scope=block") == [NESTED, inner]
    assert cars(server, f"{NESTED}/{name}", "&dag-scope=entity") == [NESTED, inner]


def test_a_car_of_a_file_in_a_directory_has_the_blocks_of_its_scope(server: Server) -> None:
    assert cars(server, DUPLICATES, "&dag-scope=entity") == [DUPLICATES]
    assert cars(server, f"{DUPLICATES}/ascii.txt") == [DUPLICATES, ASCII]
    assert cars(server, f"{DUPLICATES}/ascii.txt", "&dag-scope=block") == [DUPLICATES, ASCII]
    assert cars(server, f"{DUPLICATES}/multiblock.txt", "&dag-scope=block") == [DUPLICATES, MULTI]
    for scope in ("entity", "all"):
        found = cars(server, f"{DUPLICATES}/multiblock.txt", f"&dag-scope={scope}")
        assert found == [DUPLICATES, MULTI, *CHUNKS]


def shards(cid: str = HAMT) -> list[str]:
    """The inner nodes of the HAMT below `cid`, depth first."""
    node = nodes.parse(cids.parse(cid), block(cid))
    assert isinstance(node, nodes.Shard)
    inner = [cids.text(link.cid) for link in node.links if len(link.name) == 2]
    return [found for each in inner for found in (each, *shards(each))]


def test_a_car_through_a_hamt_has_only_the_nodes_on_the_path(server: Server) -> None:
    block_only = cars(server, f"{HAMT}/1.txt", "&dag-scope=block")
    assert block_only[0] == HAMT
    assert block_only[-1] == MULTI
    assert set(block_only[1:-1]) <= set(shards())
    assert len(block_only) <= 3
    deep = cars(server, f"{HAMT}/685.txt")
    assert deep[0] == HAMT
    assert deep[-len(CHUNKS) - 1 :] == [MULTI, *CHUNKS]
    assert cars(server, HAMT, "&dag-scope=entity") == [HAMT, *shards()]
    assert cars(server, HAMT, "&dag-scope=block") == [HAMT]


@pytest.mark.parametrize(
    ("span", "first", "end"),
    [
        ("0:*", 0, 5), ("0:0", 0, 1), ("0:255", 0, 1), ("0:256", 0, 2), ("512:*", 2, 5), ("512:767", 2, 3), ("512:-256", 2, 4),
        ("-5:*", 3, 5), ("-9999:*", 0, 5), ("-9999:-3", 0, 4), ("0:-1", 0, 5), ("1024:9999", 4, 5), ("2000:3000", 5, 5),
    ],
)  # fmt: skip
def test_entity_bytes_give_the_fewest_blocks(server: Server, span: str, first: int, end: int) -> None:
    expected = [MULTI, *CHUNKS[first:end]]
    assert cars(server, MULTI, f"&dag-scope=entity&entity-bytes={span}") == expected
    assert cars(server, f"{DUPLICATES}/multiblock.txt", f"&entity-bytes={span}") == [DUPLICATES, *expected]


def test_entity_bytes_give_the_blocks_of_a_file_although_another_is_missing(server: Server) -> None:
    root = dagpb.decode(block(MISSING))
    held = [cids.text(link.cid) for link in root.links]
    have = {cids.multihash(cids.parse(cid)) for cid in held} & set(
        blocks_of(CARS["trustless_gateway_car_file-3k-and-3-blocks-missing-block"])
    )
    assert len(have) == 2
    assert cars(server, MISSING, "&dag-scope=entity&entity-bytes=0:1000") == [MISSING, held[0]]
    assert cars(server, MISSING, "&dag-scope=entity&entity-bytes=2200:*") == [MISSING, held[2]]


def test_order_and_duplicates_are_as_the_client_asks(server: Server) -> None:
    def ask(query: str, accept: str) -> tuple[str, list[str]]:
        answer = server.ask(f"/ipfs/{DUPLICATES}{query}", Accept=accept)
        assert answer.status == 200
        return answer.headers["content-type"], answer.blocks()

    once = [DUPLICATES, ASCII, HELLO, MULTI, *CHUNKS]
    kind, found = ask("", f"{CAR_TYPE}; version=1; order=dfs; dups=y")
    assert "order=dfs" in kind
    assert "dups=y" in kind
    assert found == [DUPLICATES, ASCII, ASCII, HELLO, MULTI, *CHUNKS]
    kind, found = ask("", f"{CAR_TYPE}; version=1; order=dfs; dups=n")
    assert "dups=n" in kind
    assert found == once
    kind, found = ask("", f"{CAR_TYPE}; version=1; order=unk")
    assert "order=" in kind
    assert set(found) == set(once)
    assert "dups=y" in ask("?format=car", f"{CAR_TYPE}; order=dfs; dups=y")[0]
    assert "order=dfs" in ask("?format=car&car-order=dfs", f"{CAR_TYPE}; order=unk")[0]
    assert "dups=y" in ask("?format=car&car-dups=y", f"{CAR_TYPE}; dups=n")[0]


def test_an_identity_cid_is_never_among_the_blocks(server: Server) -> None:
    answer = server.ask("/ipfs/bafkqaf3imvwgy3zaneqgc3janfxgy2lomvscay3jmqfa", Accept=f"{CAR_TYPE}; dups=y")
    assert (answer.status, answer.blocks()) == (200, [])
    assert "dups=y" in answer.headers["content-type"]


def test_format_takes_precedence_over_accept(server: Server) -> None:
    as_car = server.ask(f"/ipfs/{RAW_DIR}?format=car", Accept="application/vnd.ipld.raw")
    assert as_car.headers["content-type"].startswith(CAR_TYPE)
    as_raw = server.ask(f"/ipfs/{RAW_DIR}?format=raw", Accept=CAR_TYPE)
    assert as_raw.headers["content-type"] == "application/vnd.ipld.raw"
