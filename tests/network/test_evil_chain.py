"""One good gateway among many bad ones, in a real mount: every read is right, and `status` names the bad
gateways."""

import random
from contextlib import ExitStack

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from tests.dagging import Dag
from tests.mounting import Home
from tests.sources import evil
from tests.sources.servers import Behaviour, Server

LIARS: list[Behaviour] = [evil.wrong_bytes, evil.another_block]
FAILING: list[Behaviour] = [
    evil.short_body, evil.reset_in_the_middle, evil.html_page, evil.gzip_bomb, evil.redirect_loop, evil.not_http, evil.server_error,
    evil.no_head, evil.endless_body,
]  # fmt: skip
FILES = 250


@pytest.mark.slow
def test_hundreds_of_reads_are_right_with_one_good_gateway_among_many_bad_ones(home: Home) -> None:
    dice, dag, blocks = random.Random(5), Dag(), dict[Cid, bytes]()
    contents = {f"{number:03}": dice.randbytes(dice.randrange(1, 4000)) for number in range(FILES)}
    entries = {name.encode(): (dag.block(content), len(content)) for name, content in contents.items()}
    root = dag.directory(entries)
    for cid in (root, *(cid for cid, _size in entries.values())):
        blocks[cid] = dag.blocks[cids.multihash(cid)]
    with ExitStack() as stack:
        bad = {stack.enter_context(Server(blocks, behave)).url: behave for behave in LIARS + FAILING}
        doubtful, good = (
            stack.enter_context(Server(blocks, evil.one_in_three_fails())),
            stack.enter_context(Server(blocks)),
        )
        options = [word for url in (*bad, doubtful.url, good.url) for word in ("--from", url)]
        mount = stack.enter_context(home.mounted(*options))
        for name in sorted(contents, key=lambda _name: dice.random()):
            assert (mount.path / cids.text(root) / name).read_bytes() == contents[name]
        sources = {source["name"]: source for source in mount.status()["sources"]}
        for url, behave in bad.items():
            assert sources[url]["blocks"] == 0, behave.__name__
            if behave in LIARS:  # gateways on this machine are not quarantined: a lie affects only its block
                assert sources[url]["wrong"] > 0, behave.__name__
                assert f"{url} has wrong bytes for" in mount.log(), behave.__name__
            else:
                assert sources[url]["state"] in ("open", "half_open"), behave.__name__
                assert sources[url]["why"], behave.__name__
                assert sources[url]["failures"], behave.__name__
        assert sources[good.url]["state"] == "good"
        assert sources[good.url]["wrong"] == sources[doubtful.url]["wrong"] == 0
        assert sources[good.url]["blocks"] + sources[doubtful.url]["blocks"] >= FILES + 1
