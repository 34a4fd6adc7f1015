"""IPNS records: those of real nodes, and those that the specification refuses."""

import urllib.request
from pathlib import Path

import libipld
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.errors import WrongRecord
from ipfsfuse.sources.names.record import SIGNATURE_PREFIX, DomainName, KeyName, parse_name, verify
from tests.kubo.fixtures import need_kubo
from tests.kubo.node import Node
from tests.sources.ipns import field, make, name_of, public_key, sign, signed

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
NAME = name_of(KEY)
CID = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"


def key_file(folder: Path, kind: int, private: bytes) -> Path:
    """A key as `ipfs key import -f libp2p-protobuf-cleartext` takes it."""
    path = folder / f"key-{kind}"
    path.write_bytes(field(1, kind) + field(2, private))
    return path


@pytest.mark.kubo
def test_records_of_a_real_node_verify_for_every_kind_of_key(tmp_path: Path) -> None:
    need_kubo()
    secp = ec.generate_private_key(ec.SECP256K1()).private_numbers().private_value.to_bytes(32, "big")
    ecdsa = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    with Node(settings={"Routing": {"Type": "dhtclient"}}) as node:
        node.cmd("key", "gen", "--type=ed25519", "ed25519")
        node.cmd("key", "gen", "--type=rsa", "--size=2048", "rsa")
        for name, kind, private in (("secp256k1", 2, secp), ("ecdsa", 3, ecdsa)):
            path = key_file(tmp_path, kind, private)
            form = ["--allow-any-key-type", "-f", "libp2p-protobuf-cleartext"]
            node.cmd("key", "import", *form, name, str(path))
        cid = node.add(b"hello")
        keys = [line.split() for line in node.cmd("key", "list", "-l").splitlines()]
        old_forms = [line.split() for line in node.cmd("key", "list", "-l", "--ipns-base=b58mh").splitlines()]
        assert len(keys) == 5
        for (name, key_name), (old_name, _) in zip(keys, old_forms, strict=True):
            node.cmd("name", "publish", "--allow-offline", f"--key={key_name}", "--ttl=7s", f"/ipfs/{cid}")
            parsed = parse_name(name)
            assert isinstance(parsed, KeyName)
            assert str(parsed) == name
            assert parse_name(old_name) == parsed
            url = f"{node.gateway_url}/ipns/{name}?format=ipns-record"
            with urllib.request.urlopen(url) as answer:
                found = verify(parsed, answer.read())
            assert (found.value, found.sequence, found.ttl) == (f"/ipfs/{cid}", 0, 7 * 10**9)
            for at in (10, -3):
                broken = bytearray(found.data)
                broken[at] ^= 1
                with pytest.raises(WrongRecord):
                    verify(parsed, bytes(broken))


def test_all_forms_of_a_name_are_the_same_name() -> None:
    rsa_name = "QmSrPmbaUKA3ZodhzPWZnpFgcPMFWF4QsxXbkWfEptTBJd"
    for text in (rsa_name, "k2k4r8l8zgv45qm2sjt7p16l7pvy69l4jr1o50cld4s98wbnanl0zn6t"):
        parsed = parse_name(text)
        assert isinstance(parsed, KeyName)
        assert parse_name(str(parsed)) == parsed
    ed = parse_name("12D3KooWGC6TvWhfajpX6wvJHMYvKpDMPpb3LOqqrFAHxpKaNzbV".replace("LO", "Lo"))
    assert isinstance(ed, KeyName)
    assert str(ed).startswith("k51qzi5uqu5d")
    assert parse_name("En.Wikipedia-on-IPFS.org.") == DomainName("en.wikipedia-on-ipfs.org")
    assert parse_name("bücher.example") == DomainName("xn--bcher-kva.example")


@pytest.mark.parametrize(
    "text", ["", "x", "localhost", CID, "..", "a..b", ".a", "-a.example", "1.2.3.4", "a" * 64 + ".org",
             "k51qzi5uqu5d", "Qm", "12D3", "a.b" * 200, "a b.org", "a/b.org"],
)  # fmt: skip
def test_text_that_is_not_a_name_is_none(text: str) -> None:
    assert parse_name(text) is None


def test_a_record_gives_its_value_sequence_and_time_to_live() -> None:
    found = verify(NAME, make(KEY, f"/ipfs/{CID}", 5, ttl=60))
    assert (found.name, found.value, found.sequence, found.ttl) == (NAME, f"/ipfs/{CID}", 5, 60 * 10**9)
    found = verify(NAME, make(KEY, "/ipfs/x", validity=b"1970-01-01T01:00:00.000000005+01:00"))
    assert found.validity == 5


def test_unknown_fields_are_ignored() -> None:
    data = make(KEY, f"/ipfs/{CID}", more={"_own": {"a": [1, b"2", None]}, "zz": True})
    assert verify(NAME, data + field(15, b"later") + field(100, 3)).value == f"/ipfs/{CID}"


@pytest.mark.parametrize("key", [KEY, rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256K1()),
                                 ec.generate_private_key(ec.SECP384R1())])  # fmt: skip
def test_a_record_with_another_key_or_a_wrong_signature_is_refused(
    key: Ed25519PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey,
) -> None:
    good = make(key, f"/ipfs/{CID}")
    assert verify(name_of(key), good).value == f"/ipfs/{CID}"
    with pytest.raises(WrongRecord, match=r"key is another one|signature is wrong"):
        verify(name_of(OTHER), good)
    data = libipld.encode_dag_cbor({"Value": b"/ipfs/x"})
    bad = [
        field(7, public_key(key)) + field(8, sign(key, data)) + field(9, data),  # without the prefix
        field(7, public_key(OTHER)) + field(8, sign(OTHER, SIGNATURE_PREFIX + data)) + field(9, data),
        field(7, public_key(key)) + field(8, b"1") + field(9, data),
    ]
    for each in bad:
        with pytest.raises(WrongRecord, match=r"key is another one|signature is wrong|can't be read"):
            verify(name_of(key), each)


def test_a_record_signed_in_version_1_alone_is_refused() -> None:
    with pytest.raises(WrongRecord, match="no signature of version 2"):
        verify(
            NAME, field(1, b"/ipfs/x") + field(2, sign(KEY, b"/ipfs/x")) + field(4, b"2999-01-01T00:00:00Z")
        )


def test_unsigned_fields_must_equal_the_signed_ones() -> None:
    good = make(KEY, f"/ipfs/{CID}", 3, validity=b"2999-01-01T00:00:00Z")
    same = field(1, f"/ipfs/{CID}".encode()) + field(4, b"2999-01-01T00:00:00Z") + field(5, 3)
    assert verify(NAME, good + same + field(6, 60 * 10**9)).sequence == 3
    for others in (field(1, b"/ipfs/x"), same, field(2, b"s")):
        with pytest.raises(WrongRecord, match="differ"):
            verify(NAME, good + others)


@pytest.mark.parametrize("missing", ["Value", "Validity", "ValidityType", "Sequence", "TTL"])
def test_a_record_that_lacks_a_field_is_refused(missing: str) -> None:
    with pytest.raises(WrongRecord, match="missing"):
        verify(NAME, make(KEY, "/ipfs/x", without=missing))


@pytest.mark.parametrize(
    "data",
    [
        make(KEY, "/ipfs/x", more={"ValidityType": 1}),
        make(KEY, "/ipfs/x", more={"Sequence": -1}),
        make(KEY, "/ipfs/x", more={"Sequence": True}),
        make(KEY, "/ipfs/x", more={"TTL": b"1"}),
        make(KEY, "/ipfs/x", more={"Value": b"\xff"}),
        make(KEY, "/ipfs/x", validity=b"2026-13-01T00:00:00Z"),
        make(KEY, "/ipfs/x", validity=b"tomorrow"),
        make(KEY, "/ipfs/x", more={"pad": b"x" * 10240}),
        signed(KEY, b"\x81" * 9000 + b"\x00"),
        signed(KEY, b"\xa2aaaa\x01aa\x02"),
        signed(KEY, b"\x01"),
        field(8, b"s") + b"\x4a",
        b"\xff" * 20,
        make(rsa.generate_private_key(65537, 1024), "/ipfs/x"),
    ],
)
def test_a_malformed_record_is_refused(data: bytes) -> None:
    with pytest.raises(WrongRecord):
        verify(NAME, data)


def test_an_rsa_key_of_a_size_that_is_not_allowed_is_refused() -> None:
    small = rsa.generate_private_key(65537, 1024)
    with pytest.raises(WrongRecord, match="size that is not allowed"):
        verify(name_of(small), make(small, "/ipfs/x"))


GOOD = make(KEY, f"/ipfs/{CID}", 9)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255), st.integers(0, 3))
def test_a_changed_record_is_refused_or_says_the_same(at: int, difference: int, cut: int) -> None:
    changed = bytearray(GOOD)
    changed[at] ^= difference
    try:
        found = verify(NAME, bytes(changed[: len(changed) - cut]))
    except WrongRecord:
        return
    assert (found.value, found.sequence) == (f"/ipfs/{CID}", 9)
