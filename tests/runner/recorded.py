"""Recorded runs that a test makes itself: CAR files with right blocks, any receipt and any files."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, unixfs
from ipfsfuse.dag.builder import Built
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Link
from ipfsfuse.dag.unixfs import Type, UnixFS
from ipfsfuse_run.record import RecordWriter

GUEST = b"""(module
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 1000))
    (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 16)))
    (i32.store (i32.const 4) (i32.load (i32.const 16)))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))))"""
"""Copies up to 1,000 bytes of standard input to standard output."""
STDIN = b"some input\n"


def digest(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def receipt(guest: bytes, stdin: bytes = STDIN, **changed: Any) -> dict[str, Any]:
    """A valid receipt of format 1, with the fields `changed` replaced."""
    return {
        "kind": "ipfsfuse-run receipt",
        "format": 1,
        "guest": {
            "cid": cids.text(RecordWriter(io.BytesIO()).add_file(io.BytesIO(guest)).cid),
            "name": "guest.wat",
        },
        "argv": ["guest.wat"],
        "env": [["A", "1"]],
        "cwd": None,
        "limits": {"timeout": 60.0, "fuel": 1000000},
        "dirs": [],
        "deterministic": True,
        "versions": {"wasmtime": "50"},
        "read": [],
        "missing": [],
        "ahead": [],
        "stdin": digest(stdin),
        "stdout": digest(stdin),
        "stderr": digest(b""),
        "exit_code": 0,
        "trapped": False,
        "started": "2026-01-01T00:00:00.000+00:00",
        "seconds": 0.25,
        "differs": ["device numbers", "the attributes of /"],
    } | changed


def receipt_2(guest: bytes, out: Cid, stdin: bytes = STDIN, **changed: Any) -> dict[str, Any]:
    """The receipt of the same run in format 2. `out` is the folder of results."""
    fields = receipt(guest, stdin) | {
        "format": 2,
        "root": None,
        "tmp": 1 << 20,
        "engine": "library",
        "paths": [],
    }
    streams = {name: fields.pop(name) for name in ("stdin", "stdout", "stderr")}
    for name, data in (("stdin", stdin), ("stdout", stdin), ("stderr", b"")):
        streams[name]["cid"] = cids.text(RecordWriter(io.BytesIO()).add_file(io.BytesIO(data)).cid)
    salt = "00" * 16
    hashed = hashlib.sha256(bytes(16) + b"A=1").hexdigest()
    exit_code, trapped = fields.pop("exit_code"), fields.pop("trapped")
    return (
        fields
        | {
            "env": {"salt": salt, "variables": [{"name": "A", "sha256": hashed, "value": "1"}]},
            "stdin": streams["stdin"],
            "results": {
                "out": cids.text(out),
                "stdout": streams["stdout"],
                "stderr": streams["stderr"],
                "exit_code": exit_code,
                "trapped": trapped,
                "limit": None,
            },
        }
        | changed
    )


class Blocks:
    """Builds nodes that no importer makes, for a record."""

    def __init__(self) -> None:
        self.all: dict[Cid, bytes] = {}

    def put(self, data: bytes, codec: int = cids.RAW) -> Built:
        cid = cids.make(codec, b"\x12\x20" + hashlib.sha256(data).digest())
        self.all[cid] = data
        return Built(cid, len(data), len(data))

    def file(self, children: Sequence[tuple[Cid, int]]) -> Built:
        """A file of these children. The file claims the given size for each."""
        sizes = [size for _cid, size in children]
        links = [Link(cid, b"", size) for cid, size in children]
        data = dagpb.encode(
            links, unixfs.encode(UnixFS(type=Type.FILE, filesize=sum(sizes), blocksizes=sizes))
        )
        return self.put(data, cids.DAG_PB)._replace(size=sum(sizes))

    def folder(self, children: Sequence[tuple[bytes, Cid]]) -> Built:
        links = [Link(cid, name, 1) for name, cid in sorted(children)]
        return self.put(dagpb.encode(links, unixfs.encode(UnixFS(type=Type.DIRECTORY))), cids.DAG_PB)

    def doubled(self, leaf: bytes, times: int) -> Built:
        """A file that repeats `leaf` 2**times times, in few blocks."""
        node = self.put(leaf)
        for _ in range(times):
            node = self.file([(node.cid, node.size), (node.cid, node.size)])
        return node


def write(
    target: Path,
    data: bytes | Built | Mapping[str, Any],
    blocks: Blocks | None = None,
    **files: bytes | Built,
) -> Path:
    """Writes a record to `target`. `data` is its receipt. The names of `files` have no extension: `guest`,
    `stdin`, `ipfs`, `dir`."""
    named = {"guest": "guest.wasm"}
    with target.open("w+b") as out:
        writer = RecordWriter(out)
        children = [
            ("receipt.json", _built(writer, json.dumps(data).encode() if isinstance(data, Mapping) else data))
        ]
        children += [(named.get(name, name), _built(writer, content)) for name, content in files.items()]
        for cid, block in (blocks or Blocks()).all.items():
            writer.put(cid, block)
        writer.close(writer.add_folder(children))
    return target


def _built(writer: RecordWriter, content: bytes | Built) -> Built:
    return writer.add_file(io.BytesIO(content)) if isinstance(content, bytes) else content
