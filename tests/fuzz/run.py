"""Runs one target under atheris: `python -m tests.fuzz.run TARGET FOLDER [libFuzzer options]`. `scripts/fuzz`
calls it."""

import hashlib
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ipfsfuse"]):
    from tests.fuzz import targets


def main() -> None:
    target, folder, *options = sys.argv[1:]
    corpus = Path(folder) / target
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in targets.seeds(target):
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    finds = f"-artifact_prefix={folder}/{target}-"
    atheris.Setup([sys.argv[0], finds, *options, str(corpus)], lambda data: targets.feed(target, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
