"""Parsing of SOURCE arguments, header files, proxies, and the address at which a node listens."""

from pathlib import Path

import pytest

from ipfsfuse.errors import UsageError
from ipfsfuse.sources.http.origin import parse_multiaddr, parse_origin, proxy_for
from ipfsfuse.sources.http.settings import kubo_authorization, read_headers
from ipfsfuse.sources.spec import parse_source, parse_sources

GOOD = {
    "library": ("library", "library", None),
    "kubo": ("kubo", "kubo", None),
    "kubo+http://127.0.0.1:5001": ("kubo", "kubo+http://127.0.0.1:5001", 5001),
    "kubo+unix:///run/ipfs.sock": ("kubo", "kubo+unix:///run/ipfs.sock", 80),
    "https://Gateway.Example": ("gateway", "https://gateway.example", 443),
    "https://gateway.example:8443/base/": ("gateway", "https://gateway.example:8443/base", 8443),
    "http://[::1]:8080": ("gateway", "http://[::1]:8080", 8080),
}


@pytest.mark.parametrize(("text", "expected"), GOOD.items())
def test_source_arguments_are_parsed(text: str, expected: tuple[str, str, int | None]) -> None:
    spec = parse_source(text)
    assert (spec.kind, spec.name, spec.origin.port if spec.origin else None) == expected


BAD = {
    "": "an empty --from",
    "gateway.example": "write https://gateway.example",
    "localhost:8080": "write https://localhost:8080",
    "https:/gateway.example": "written with ://",
    "htps://gateway.example": "htps:// is not known",
    "https://": "no host",
    "https://gate way.example": "space",
    "https://gateway..example": "not a host name",
    "https://gateway.example:http": "not a URL",
    "https://me:secret@gateway.example": "no passwords in URLs",
    "https://gateway.example/?x=1": "no query",
    "https://gateway.example/ipfs": "leave out the /ipfs",
    "https://gateway.example/ipns/docs.ipfs.tech": "ends before /ipfs and /ipns",
    "/ipns/docs.ipfs.tech": "content is not a source",
    "kubo+unix://run/ipfs.sock": "absolute path",
    "Library": "write library",
    "/no/such/file.car": "no such file",
    "missing.car": "no such file",
}


@pytest.mark.parametrize(("text", "expected"), BAD.items())
def test_bad_sources_get_one_clear_line(text: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_source(text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_path_to_a_car_file_is_a_source(tmp_path: Path) -> None:
    path = tmp_path / "data.car"
    path.write_bytes(b"")
    assert parse_source(str(path)).path == path


def test_a_source_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.car"
    path.write_bytes(b"")
    (tmp_path / "b.car").symlink_to(path)
    twice = (["kubo", "kubo"], ["https://a", "https://A:443/"], [str(path), str(tmp_path / "b.car")])
    for texts in twice:
        with pytest.raises(UsageError, match="given twice"):
            parse_sources(texts)
    assert len(parse_sources(["library", "kubo", "https://a", "https://b", str(path)])) == 5


def test_a_headers_file_is_parsed_and_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "headers"
    path.touch(0o600)
    path.write_text("# mine\nAuthorization: Bearer s3cret\n\nX-Thing:  yes \n")
    assert read_headers(path) == (("Authorization", "Bearer s3cret"), ("X-Thing", "yes"))
    for text in (
        "Authorization Bearer s3cret",
        "Bad name: s3cret",
        "X: s3cret\x7f",
        "Host: s3cret",
        ": s3cret",
    ):
        path.write_text("A: b\n" + text)
        with pytest.raises(UsageError, match="line 2") as caught:
            read_headers(path)
        assert "s3cret" not in str(caught.value)
    with pytest.raises(UsageError, match="can't be read"):
        read_headers(tmp_path / "none")


def test_multiaddrs_are_parsed() -> None:
    assert parse_multiaddr("/ip4/127.0.0.1/tcp/5001\n").text == "http://127.0.0.1:5001"
    assert parse_multiaddr("/ip4/0.0.0.0/tcp/5001").text == "http://127.0.0.1:5001"
    assert parse_multiaddr("/ip6/::1/tcp/5001").text == "http://[::1]:5001"
    assert parse_multiaddr("/dns4/node.example/tcp/443/https").text == "https://node.example"
    assert parse_multiaddr("/unix/run/ipfs.sock").unix == "/run/ipfs.sock"
    for text in ("", "/ip4/127.0.0.1", "/ip4/127.0.0.1/udp/4001/quic", "rubbish"):
        with pytest.raises(UsageError):
            parse_multiaddr(text)


def test_authorization_comes_from_the_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IPFSFUSE_KUBO_AUTH", raising=False)
    monkeypatch.delenv("IPFSFUSE_KUBO_AUTH_FILE", raising=False)
    assert kubo_authorization() == ("", "")
    path = tmp_path / "token"
    path.write_text("basic:me:pass\n")
    monkeypatch.setenv("IPFSFUSE_KUBO_AUTH_FILE", str(path))
    path.chmod(0o640)
    with pytest.raises(UsageError, match=f"{path}, .* may be read by others; run: chmod 600 {path}"):
        kubo_authorization()
    path.chmod(0o600)
    assert kubo_authorization() == ("Basic bWU6cGFzcw==", str(path))
    monkeypatch.setenv("IPFSFUSE_KUBO_AUTH", "bearer:tok")
    assert kubo_authorization() == ("Bearer tok", "IPFSFUSE_KUBO_AUTH")
    monkeypatch.setenv("IPFSFUSE_KUBO_AUTH", "tok")
    with pytest.raises(UsageError, match="IPFSFUSE_KUBO_AUTH holds neither"):
        kubo_authorization()


def test_proxies_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://user:p%40ss@proxy.example:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    proxy_for.cache_clear()
    found = proxy_for(parse_origin("https://gateway.example"))
    assert found is not None
    assert (found.origin.text, found.auth) == ("http://proxy.example:3128", ("user", "p@ss"))
    assert proxy_for(parse_origin("https://inside.example")) is None
    assert proxy_for(parse_origin("https://127.0.0.1")) is None
    proxy_for.cache_clear()
