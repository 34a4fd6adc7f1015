"""`inspect`: prints a receipt as a table or as JSON, a recorded run's output, and who signed it."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.nodes import Directory
from ipfsfuse.errors import UsageError
from ipfsfuse.text import printable
from ipfsfuse_run import host_folders, limits, options, read_paths, receipts
from ipfsfuse_run.errors import ReceiptRefused, say
from ipfsfuse_run.read_paths import Row, Walk
from ipfsfuse_run.receipts import Receipt
from ipfsfuse_run.record import Record, check_content, check_signature, open_record, receipt_alone

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_PARTS = (receipts.STDOUT, receipts.STDERR, "signature", receipts.OUT)


def main(argv: Sequence[str]) -> int:
    """`inspect RUN.car [stdout|stderr|signature|out DIR] [--json] [--key PUB]`. Raises UsageError,
    ReceiptRefused, StoreFailed."""
    parser = options.Parser(
        prog="ipfsfuse-run inspect",
        allow_abbrev=False,
        description="What a recorded run read, by path; or one part of its record.",
    )
    parser.add_argument("record", metavar="RUN.car|RUN.json")
    parser.add_argument("part", nargs="?", choices=_PARTS, help="print this part, or write out into DIR")
    parser.add_argument("folder", nargs="?", metavar="DIR", help="a new or empty folder")
    parser.add_argument("--json", action="store_true", help="print the receipt")
    parser.add_argument("--key", metavar="PUB", help="exit with 1 if this Ed25519 key did not sign")
    parser.add_argument(
        "-W", action="append", default=[], metavar="max-out=SIZE", help="how large results may be (1 GiB)"
    )
    asked: argparse.Namespace = parser.parse_args(list(argv))
    if (asked.part == receipts.OUT) != (asked.folder is not None):
        raise UsageError("inspect RUN.car out DIR writes the results into DIR, a new or empty folder")
    most = limits.parse(asked.W).out_bytes
    path = Path(asked.record)
    alone = receipt_alone(path)
    if alone is not None:
        return _inspect_alone(path, alone, asked)
    key = None
    if asked.key is not None:
        from ipfsfuse_run import signatures

        key = signatures.public_key(asked.key)
    with open_record(path) as (record, receipt):
        if key is not None:
            check_signature(record, receipt, key, most)
        if asked.part == receipts.OUT:
            _write_results(record, receipt, asked.folder, most)
            return 0
        if asked.part is not None:
            _print_part(record, receipt, asked.part)
            return 0
        found, left_out = checked_rows(record, receipt)
        if asked.json:
            _print_json(record, receipt, found)
        else:
            _show(receipt, found)
            print(_signed_by(record, key))
    if left_out:
        say(f"{path}: more paths than these lead to what was read; the rest is left out")
    return 0


def checked_rows(record: Record, receipt: Receipt) -> tuple[list[Row], bool]:
    """What was read, by path, and whether there are more paths. Raises ReceiptRefused if the recorded streams
    or paths differ from the blocks."""
    for name in receipt.contents or [receipts.STDIN]:
        check_content(record, receipt, name)
    walk = Walk(record.node, _roots(record, receipt), receipt.read)
    try:
        found = list(walk.rows())
    except ReceiptRefused as exc:
        raise ReceiptRefused(f"{record.path}: {exc}") from exc
    if receipt.format > 1 and [*receipt.paths] != found:
        raise ReceiptRefused(f"{record.path}: the paths in its receipt are not those of its blocks")
    return found, walk.left_out


def _print_json(record: Record, receipt: Receipt, rows: Sequence[Row]) -> None:
    """Prints the receipt with the paths, which a receipt of format 1 does not have."""
    cid = record.find(receipts.RECEIPT)
    assert cid is not None
    fields = json.loads(record.receipt(cid))
    print(json.dumps(fields | {"paths": [each._asdict() for each in rows]}, indent=1))


def _inspect_alone(path: Path, receipt: Receipt, asked: argparse.Namespace) -> int:
    if asked.part is not None or asked.key is not None:
        what = asked.part or "signature"
        raise ReceiptRefused(f"{path} is a receipt alone and holds no {what}: record to a .car for that")
    if asked.json:
        print(json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=1))
    else:
        _show(receipt, receipt.paths)
        if receipt.format == 1:
            say(f"{path}: a receipt of format 1 alone does not say what was read by path")
    return 0


def _show(receipt: Receipt, rows: Iterable[Row]) -> None:
    print(printable(" ".join(receipt.argv)))
    print(
        f"  {printable(receipt.name)} ended with {receipt.exit_code} at "
        f"{printable(receipt.started)}, {receipt.seconds} s"
    )
    for name in (receipts.STDOUT, receipts.STDERR):
        print(f"  {name}: {getattr(receipt, name)}")
    if receipt.out is not None:
        print(f"  out: {cids.text(receipt.out)}")
    print(f"{'TYPE':<10} {'SIZE':>14} {'READ':>14}  PATH")
    for each in rows:
        print(f"{printable(each.type):<10} {each.size:>14,} {each.read:>14,}  {printable(each.path)}")


def _signed_by(record: Record, key: "Ed25519PublicKey | None") -> str:
    cid = record.find(receipts.SIGNATURE)
    if cid is None:
        return "not signed"
    from ipfsfuse_run import signatures

    if key is not None:
        return f"signed by {signatures.fingerprint(key)}"
    names = signatures.signers(b"".join(record.content(cid, min(signatures.MAX_ENVELOPE, record.size))))
    return f"says it is signed by {', '.join(map(printable, names))}: check it with --key PUB"


def _roots(record: Record, receipt: Receipt) -> list[cids.Cid]:
    if receipt.format > 1:
        roots = read_paths.Roots()
        for cid in receipt.read:
            roots.add(cid, record.block(cid))
        return roots.found
    folder = record.find(receipts.IPFS)
    node = None if folder is None else record.node(folder)
    read = {cids.multihash(each) for each in receipt.read}
    links = node.links if isinstance(node, Directory) else ()
    return [
        each.cid
        for each in links
        if cids.multihash(each.cid) in read or cids.inline_block(each.cid) is not None
    ]


def _print_part(record: Record, receipt: Receipt, part: str) -> None:
    if part == "signature":
        cid = record.find(receipts.SIGNATURE)
        if cid is None:
            raise ReceiptRefused(f"{record.path} has no signature")
        content = record.content(cid, record.size)
    else:
        cid = record.find(part)
        if cid is None:
            raise ReceiptRefused(f"{record.path} holds no {part}: a receipt of format 1 has its hash alone")
        check_content(record, receipt, part)
        content = record.content(cid, record.size + (64 << 20))
    sys.stdout.flush()
    for data in content:
        sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _write_results(record: Record, receipt: Receipt, folder: str, most: int) -> None:
    if receipt.out is None:
        raise ReceiptRefused(f"{record.path}: the recorded run had no /out")
    results = host_folders.results_folder(folder)
    try:
        record.extract(receipt.out, results.path, most)
    except ReceiptRefused:
        for each in os.listdir(results.path):
            host_folders.remove_tree(os.path.join(results.path, each))
        results.discard()
        raise
