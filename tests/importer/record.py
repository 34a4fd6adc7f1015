"""Writes data/kubo-cids.json: the CIDs that a real Kubo gives for all cases. Run it by `python -m
tests.importer.record`. It takes some minutes."""

import json
import tempfile
from pathlib import Path

from ipfsfuse.dag.builder import PROFILES
from tests.importer.repo import Repo
from tests.importer.trees import CASES, Case, write

DATA = Path(__file__).parent / "data" / "kubo-cids.json"


def ask(repo: Repo, case: Case, folder: Path) -> str:
    """The CID that `ipfs add` gives."""
    for name, entry in case.top.items():
        write(entry, folder / name)
    kept = any(option.startswith("--preserve") for option in case.options)
    # To keep modes and times, Kubo needs --raw-leaves=false if its profile has raw leaves. Its --only-hash
    # fails for directories with a mode.
    fixed = ["--raw-leaves=false", "--pin=false"] if kept else ["--only-hash"]
    return repo.run("add", "-r", "-Q", *fixed, *case.options, *(folder / name for name in case.top)).strip()


def main() -> None:
    found: dict[str, dict[str, str]] = {name: {} for name in PROFILES}
    with tempfile.TemporaryDirectory() as top:
        repos = {name: Repo(Path(top) / name, name) for name in PROFILES}
        for (profile, name), case in CASES.items():
            with tempfile.TemporaryDirectory(dir=top) as folder:
                found[profile][name] = ask(repos[profile], case, Path(folder))
                print(found[profile][name], profile, name, flush=True)
    DATA.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
