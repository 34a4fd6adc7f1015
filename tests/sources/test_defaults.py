"""The default sources, and the line that tells the user which sources are asked."""

from pathlib import Path

import pytest

from ipfsfuse.errors import UsageError
from ipfsfuse.sources import defaults


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("IPFS_PATH", "IPFS_GATEWAY", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_library_is_asked_first_then_the_node_then_the_gateways(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert defaults.chosen(None) == ("library",)
    monkeypatch.setenv("IPFS_GATEWAY", "https://one.example/\nhttp://127.0.0.1:8080/ipfs/")
    gateways = ("https://one.example", "http://127.0.0.1:8080")
    assert defaults.chosen(None) == ("library", *gateways)
    (home / "repo").mkdir()
    (home / "repo" / "config").touch()
    monkeypatch.setenv("IPFS_PATH", "~/repo")
    assert defaults.chosen([]) == ("library", "kubo", *gateways)
    assert defaults.chosen(["a.car"]) == ("a.car",)
    assert defaults.chosen(["kubo", "gateway"]) == ("kubo", *gateways)


def test_the_users_file_of_gateways_goes_before_the_machines(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's file goes before the machine's, and the variable before both."""
    file = home / ".config" / "ipfs" / "gateway"
    monkeypatch.setattr(defaults, "_files", lambda files=defaults._files: (*files()[:1], home / "etc"))
    (home / "etc").write_text("https://machine.example\n")
    assert defaults.gateways() == ("https://machine.example",)
    file.parent.mkdir(parents=True)
    file.write_text("# mine\nhttps://mine.example https://two.example/base\n\nhttps://mine.example/ipfs\n")
    assert defaults.gateways() == ("https://mine.example", "https://two.example/base")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "xdg"))
    assert defaults.gateways() == ("https://machine.example",)
    monkeypatch.setenv("IPFS_GATEWAY", "https://said.example")
    assert defaults.gateways() == ("https://said.example",)


def test_a_bad_entry_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPFS_GATEWAY", "gateway.example")
    with pytest.raises(
        UsageError, match=r"IPFS_GATEWAY names a gateway that can't be used: gateway\.example"
    ):
        defaults.chosen(None)
    monkeypatch.delenv("IPFS_GATEWAY")
    with pytest.raises(UsageError, match=r"set IPFS_GATEWAY, or write a URL into /.*/\.config/ipfs/gateway"):
        defaults.chosen(["gateway"])
    file = home / ".config" / "ipfs" / "gateway"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=f"{file}, which names gateways, can't be read"):
        defaults.chosen(None)


def test_one_line_says_which_sources_are_asked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = defaults.described(["library"], by_default=True, offline=False)
    assert alone == (
        f"blocks come from library alone: there is no Kubo node at {home}/.ipfs, and no gateway is configured; "
        "name other sources with --from"
    )
    several = defaults.described(["library", "kubo", "https://a.example"], by_default=True, offline=False)
    assert several == f"blocks come from library, then kubo ({home}/.ipfs), then https://a.example"
    far = ["https://a.example", "kubo+http://192.0.2.1:5001"]
    offline = defaults.described(["library", "kubo", *far], by_default=False, offline=True, remote=far)
    assert offline.startswith(f"blocks come from library, then kubo ({home}")
    assert f"--offline: {', '.join(far)} is not asked, and a node or gateway on this machine" in offline
