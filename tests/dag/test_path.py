"""Paths as users write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import path
from ipfsfuse.dag.path import IpfsPath
from ipfsfuse.errors import IpfsFuseError, NameTooLong, NotACid, UsageError

ROOT = "bafybeihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
CID = cids.parse(ROOT)
AB = IpfsPath(CID, (b"a", b"b c"))


@pytest.mark.parametrize(
    "text",
    [
        "/ipfs/{}/a/b c",
        "{}/a/b c",
        "ipfs://{}/a/b%20c",
        "IPFS://{}/a/b c",
        "/ipfs/{}//a/./b c/",
        "//ipfs//{}/a/b c",
        "{}/a//b c///",
    ],
)
def test_all_forms_of_one_path_are_equal(text: str) -> None:
    assert path.parse(text.format(ROOT)) == AB


@pytest.mark.parametrize("text", ["/ipfs/{}", "{}", "ipfs://{}", "{}/", "/ipfs/{}/.", "ipfs://{}/"])
def test_a_root_alone_is_a_path(text: str) -> None:
    assert path.parse(text.format(ROOT)) == IpfsPath(CID)


def test_names_are_bytes() -> None:
    assert path.parse(ROOT + "/é").names == ("é".encode(),)
    assert path.parse(ROOT + "/\udcff").names == (b"\xff",)  # as Python passes an argument that is not UTF-8
    assert path.parse(f"ipfs://{ROOT}/%FF%25").names == (b"\xff%",)
    assert path.parse(ROOT + "/%41").names == (b"%41",)
    assert path.parse(ROOT + "/a:b?c#d").names == (b"a:b?c#d",)
    assert path.parse("QmdfTbBqBPQ7VNxZEYEj14VmRuZBkqFbiwReogJgS1zR1n/x").root == cids.parse(
        "QmdfTbBqBPQ7VNxZEYEj14VmRuZBkqFbiwReogJgS1zR1n"
    )


def test_a_printed_path_can_be_parsed_again() -> None:
    assert str(AB) == f"/ipfs/{ROOT}/a/b c"
    assert path.parse(str(AB)) == AB


REFUSED = [
    ("", UsageError, "no CID"),
    ("/", UsageError, "not a path below /ipfs"),
    ("/ipfs", UsageError, "no CID"),
    ("/ipfs/", UsageError, "no CID"),
    ("ipfs://", UsageError, "no CID"),
    ("/home/x", UsageError, "below /ipfs"),
    ("/ipns/k51/x", UsageError, "IPNS"),
    ("ipns://docs.ipfs.tech/x", UsageError, "IPNS"),
    ("https://ipfs.io/ipfs/" + ROOT, UsageError, "only ipfs://"),
    (f"ipfs://{ROOT}/a?x=1", UsageError, "query"),
    (f"ipfs://{ROOT}/a#x", UsageError, "fragment"),
    (ROOT + "/..", UsageError, "'..' is not the name"),
    (ROOT + "/a/../b", UsageError, "'..' is not the name"),
    (f"ipfs://{ROOT}/%2e%2e/a", UsageError, "'%2e%2e' is not the name"),
    (f"ipfs://{ROOT}/a%2Fb", UsageError, "not the name"),
    (f"ipfs://{ROOT}/a%00b", UsageError, "not the name"),
    (ROOT + "/a\0b", UsageError, "not the name"),
    (ROOT + "/" + "n" * 256, NameTooLong, "256 bytes"),
    (ROOT + "/" + "é" * 128, NameTooLong, "256 bytes"),
    ("nonsense/a", NotACid, "'nonsense' is not a CID"),
    ("../" + ROOT, NotACid, "'..' is not a CID"),
    ("~/x", NotACid, "not a CID"),
]


@pytest.mark.parametrize(("text", "error", "words"), REFUSED)
def test_text_that_is_not_a_path_is_refused_in_one_line(
    text: str, error: type[IpfsFuseError], words: str
) -> None:
    with pytest.raises(error, match=words) as refused:
        path.parse(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["/ipns/docs.ipfs.tech", "ipns://docs.ipfs.tech", "ipns/k51", "//ipns/k51/a"]
)
def test_an_ipns_name_in_place_of_a_cid_is_refused_as_an_ipns_name(text: str) -> None:
    for read in (path.parse, path.cid_alone):
        with pytest.raises(UsageError, match="IPNS names are not resolved here; ask `ipfs resolve"):
            read(text)


@given(
    st.text(max_size=60)
    | st.text(max_size=60).map(f"/ipfs/{ROOT}/".__add__)
    | st.text(alphabet="%./az2EF0\0?#", max_size=30).map(f"ipfs://{ROOT}/".__add__)
)
def test_any_text_is_refused_or_a_path_of_names_that_can_be_held(text: str) -> None:
    try:
        found = path.parse(text)
    except IpfsFuseError:
        return
    assert all(path.can_hold(name) for name in found.names)


@pytest.mark.parametrize("name", [b"a", b"...", b"a" * 255, b"\xff", b"\n", b" ", b"..a"])
def test_names_that_can_be_held(name: bytes) -> None:
    assert path.can_hold(name)


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/", b"a\0", b"a" * 256])
def test_names_that_can_not_be_held(name: bytes) -> None:
    assert not path.can_hold(name)
