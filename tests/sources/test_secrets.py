"""Secrets come from a file that only the user may read, go to one origin, and are never shown or logged."""

import grp
import logging
import os
import pwd
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from ipfsfuse.errors import SourceFailed, UsageError
from ipfsfuse.sources.http import client
from ipfsfuse.sources.http.client import Http, HttpSettings
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.kubo import Kubo
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.http.settings import BoundHeaders, kubo_token
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.sources.spec import with_headers
from tests.mounting import NOBODY
from tests.sources.authority import Authority
from tests.sources.content import raw_blocks
from tests.sources.servers import Ask, Server, answer_well

BLOCKS = raw_blocks(71, 2)
CID, BLOCK = next(iter(BLOCKS.items()))
SECRET = "s3cret-value"
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "headers"
    path.touch(0o600)
    path.write_text(f"Authorization: Bearer {SECRET}\n")
    return path


def bound_headers(files: Sequence[tuple[str, Path]], *sources: str) -> BoundHeaders:
    return with_headers(HttpSettings(), files, sources).headers


def test_a_header_goes_only_to_the_origin_it_is_bound_to(file: Path) -> None:
    with Server({}) as first, Server(BLOCKS) as other:
        settings = with_headers(HttpSettings(), [(first.url, file)], [first.url, other.url])

        async def main() -> None:
            chain = SourcePool(
                [Gateway(Http(parse_origin(server.url), settings), server.url) for server in (first, other)]
            )
            assert (await chain.get(CID)).block == BLOCK
            await chain.aclose()

        trio.run(main)
        assert {ask.headers.get("authorization") for ask in first.asked} == {f"Bearer {SECRET}"}
        assert {ask.headers.get("authorization") for ask in other.asked} == {None}


@pytest.mark.parametrize("mode", [0o640, 0o644, 0o604, 0o620, 0o602])
def test_a_file_that_others_may_read_or_write_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(UsageError, match=f"run: chmod 600 {file}"):
        bound_headers([("https://a.example", file)], "https://a.example")


@pytest.mark.parametrize(
    ("mode", "folder", "private", "taken"),
    [
        (0o644, 0o755, False, True),
        (0o664, 0o755, False, False),
        (0o664, 0o775, True, True),
        (0o644, 0o775, False, False),
        (0o646, 0o755, True, False),
        (0o644, 0o757, True, False),
    ],
)
def test_a_token_is_not_sent_to_a_node_that_another_user_may_have_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, folder: int, private: bool, taken: bool
) -> None:
    """With umask 0002 Kubo's files are group-writable. That is allowed if the group has only one user."""
    monkeypatch.setenv("IPFSFUSE_KUBO_AUTH", f"bearer:{SECRET}")
    (tmp_path / "repository").mkdir()
    api = tmp_path / "repository" / "api"
    api.write_text("/ip4/127.0.0.1/tcp/5001")
    api.chmod(mode)
    api.parent.chmod(folder)
    user = pwd.getpwuid(os.geteuid())
    name = user.pw_name if private else "staff"
    monkeypatch.setattr(grp, "getgrgid", lambda number: grp.struct_group((name, "x", number, [user.pw_name])))
    token, advice = kubo_token(api)
    assert token == (f"Bearer {SECRET}" if taken else "")
    assert taken or "may be written by another user" in advice


@as_root
def test_a_file_of_another_user_is_refused(file: Path) -> None:
    os.chown(file, NOBODY, NOBODY)
    with pytest.raises(UsageError, match="belongs to another user"):
        bound_headers([("https://a.example", file)], "https://a.example")


def test_a_secret_goes_only_over_https_or_to_this_machine(file: Path) -> None:
    with pytest.raises(UsageError, match="over plain HTTP, which others can read; use https://"):
        bound_headers([("http://a.example", file)], "http://a.example")
    for url in (
        "https://a.example",
        "http://127.0.0.1:8080",
        "http://localhost:8080",
        "http://[::1]:8080",
        "kubo+http://127.0.0.1:5001",
    ):
        found = bound_headers([(url, file)], url, "https://b.example")
        assert list(found.by_origin.values()) == [(("Authorization", f"Bearer {SECRET}"),)]
        assert found.of(parse_origin(url.removeprefix("kubo+"))) == (("Authorization", f"Bearer {SECRET}"),)
        assert found.of(parse_origin("https://b.example")) == ()


def test_a_header_file_without_a_source_needs_exactly_one_network_source(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPFS_PATH", str(tmp_path / "none"))
    assert bound_headers([("", file)], "library", "https://a.example").of(parse_origin("https://a.example"))
    with pytest.raises(
        UsageError, match=f"say which source it is for: --header-file https://a.example={file}"
    ):
        bound_headers([("", file)], "https://a.example", "https://b.example")
    for sources in (("library",), ("kubo",)):  # no network source; a node that does not run
        with pytest.raises(UsageError, match=r"--header-file https://gateway\.example="):
            bound_headers([("", file)], *sources)


def test_a_header_file_without_a_source_applies_to_both_ports_of_a_node(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPFS_PATH", str(tmp_path))
    (tmp_path / "api").write_text("/ip4/127.0.0.1/tcp/5001")
    (tmp_path / "gateway").write_text("http://127.0.0.1:8080")
    found = bound_headers([("", file)], "kubo")
    assert {origin.text for origin in found.by_origin} == {"http://127.0.0.1:5001", "http://127.0.0.1:8080"}
    with pytest.raises(UsageError, match="say which source"):
        bound_headers([("", file)], "kubo", "https://a.example")


def test_a_header_for_no_source_or_twice_is_an_error(file: Path) -> None:
    with pytest.raises(UsageError, match=r"no source is there; there are https://b\.example"):
        bound_headers([("https://a.example", file)], "https://b.example")
    with pytest.raises(UsageError, match=r"given twice for https://a\.example"):
        bound_headers([("https://a.example", file), ("https://A.example:443", file)], "https://a.example")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IPFS_PATH", str(tmp_path / "repo"))
    monkeypatch.setenv("IPFSFUSE_KUBO_AUTH", f"bearer:{SECRET}")
    (tmp_path / "repo").mkdir()
    return tmp_path / "repo"


def guarded(ask: Ask) -> None:
    if ask.headers.get("authorization") == f"Bearer {SECRET}":
        answer_well(ask)
    else:
        ask.send(403, b"Forbidden", "text/plain")


def get_from_node(source: Kubo) -> bytes:
    async def main() -> bytes:
        try:
            return await source.get(CID)
        finally:
            await source.aclose()

    return trio.run(main)


def test_the_token_goes_to_the_node_of_the_users_own_repository(repository: Path) -> None:
    with Server(BLOCKS, guarded) as server:
        (repository / "api").write_text(f"/ip4/127.0.0.1/tcp/{server.port}")
        assert get_from_node(Kubo("kubo", HttpSettings())) == BLOCK


@as_root
@pytest.mark.parametrize("planted", ["api", "repository", "writable"])
def test_the_token_does_not_go_to_a_node_that_another_users_repository_names(
    repository: Path, planted: str
) -> None:
    with Server(BLOCKS, guarded) as server:
        api = repository / "api"
        api.write_text(f"/ip4/127.0.0.1/tcp/{server.port}")
        if planted == "writable":
            repository.chmod(0o777)
        else:
            os.chown(api if planted == "api" else repository, NOBODY, NOBODY)
        with pytest.raises(
            SourceFailed, match=r"was not sent the token in IPFSFUSE_KUBO_AUTH, because .* another user"
        ):
            get_from_node(Kubo("kubo", HttpSettings()))
        assert {ask.headers.get("authorization") for ask in server.asked} == {None}
        assert get_from_node(Kubo("kubo", HttpSettings(), parse_origin(server.url))) == BLOCK, (
            "a node that the user named gets the token"
        )


def test_a_node_that_demands_a_token_fails_with_advice_if_there_is_none(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IPFSFUSE_KUBO_AUTH")
    with Server(BLOCKS, guarded) as server:
        (repository / "api").write_text(f"/ip4/127.0.0.1/tcp/{server.port}")
        with pytest.raises(SourceFailed, match="kubo refused us: set IPFSFUSE_KUBO_AUTH_FILE to a file with"):
            get_from_node(Kubo("kubo", HttpSettings()))


@pytest.mark.parametrize("own", [True, False], ids=["own", "httpx"])
def test_secrets_are_never_logged(
    own: bool, file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "OWN_TRANSPORT", own)
    caplog.set_level(logging.DEBUG)
    with Server(BLOCKS) as server:
        settings = with_headers(HttpSettings(), [(server.url, file)], [server.url])
        assert SECRET not in repr(settings)

        async def main() -> None:
            source = Gateway(Http(parse_origin(server.url), settings), server.url)
            assert await source.get(CID) == BLOCK
            await source.aclose()

        trio.run(main)
        assert server.asked[0].headers["authorization"] == f"Bearer {SECRET}"
    assert SECRET not in caplog.text
    assert not [
        record
        for record in caplog.records
        if record.name.partition(".")[0] in ("httpx", "httpcore", "hpack", "h2")
    ]


def test_cookies_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    client.tls_context.cache_clear()

    def set_cookie(ask: Ask) -> None:
        ask.send(200, ask.block or b"", Set_Cookie="who=you; Path=/")

    with Server(BLOCKS, set_cookie, tls=authority.server_context("IP:127.0.0.1")) as server:

        async def main() -> None:
            source = Gateway(Http(parse_origin(server.url)), server.url)
            for cid, block in BLOCKS.items():
                assert await source.get(cid) == block
            await source.aclose()

        trio.run(main)
        assert [ask.headers.get("cookie") for ask in server.asked] == [None, None]
    client.tls_context.cache_clear()
