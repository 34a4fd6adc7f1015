"""Recorded runs made by hand: a CAR whose blocks are right, and whose receipt and files are what a test
wants."""

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
    """The receipt of a run that did what it should."""
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
    """The same run in format 2, with the results `out`."""
    told = receipt(guest, stdin) | {
        "format": 2,
        "root": None,
        "tmp": 1 << 20,
        "engine": "library",
        "paths": [],
    }
    streams = {name: told.pop(name) for name in ("stdin", "stdout", "stderr")}
    for name, data in (("stdin", stdin), ("stdout", stdin), ("stderr", b"")):
        streams[name]["cid"] = cids.text(RecordWriter(io.BytesIO()).add_file(io.BytesIO(data)).cid)
    salt = "00" * 16
    hashed = hashlib.sha256(bytes(16) + b"A=1").hexdigest()
    exit_code, trapped = told.pop("exit_code"), told.pop("trapped")
    return (
        told
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
    """Nodes that no importer makes, for a record."""

    def __init__(self) -> None:
        self.all: dict[Cid, bytes] = {}

    def put(self, data: bytes, codec: int = cids.RAW) -> Built:
        cid = cids.make(codec, b"\x12\x20" + hashlib.sha256(data).digest())
        self.all[cid] = data
        return Built(cid, len(data), len(data))

    def file(self, children: Sequence[tuple[Cid, int]]) -> Built:
        """A file of these children, each with the size that its parent claims."""
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
        """A file of `leaf`, 2**times times, in few blocks."""
        held = self.put(leaf)
        for _ in range(times):
            held = self.file([(held.cid, held.size), (held.cid, held.size)])
        return held


def write(
    target: Path,
    told: bytes | Built | Mapping[str, Any],
    blocks: Blocks | None = None,
    **files: bytes | Built,
) -> Path:
    """A record of `files`, named without their extension: `guest`, `stdin`, `ipfs`, `dir`."""
    named = {"guest": "guest.wasm"}
    with target.open("w+b") as out:
        writer = RecordWriter(out)
        children = [
            ("receipt.json", _built(writer, json.dumps(told).encode() if isinstance(told, Mapping) else told))
        ]
        children += [(named.get(name, name), _built(writer, held)) for name, held in files.items()]
        for cid, block in (blocks or Blocks()).all.items():
            writer.put(cid, block)
        writer.close(writer.add_folder(children))
    return target


def _built(writer: RecordWriter, held: bytes | Built) -> Built:
    return writer.add_file(io.BytesIO(held)) if isinstance(held, bytes) else held
