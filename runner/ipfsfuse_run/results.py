"""The results of a run in the library: `ipfsfuse import` takes a CAR file that is made of them here, so that
only one walk has to withstand what a guest leaves."""

import os
import subprocess
import sys
from pathlib import Path

from ipfsfuse.dag import cid as cids
from ipfsfuse.errors import StoreFailed
from ipfsfuse_run import mounts, places
from ipfsfuse_run.limits import MAX_OUT
from ipfsfuse_run.options import Options
from ipfsfuse_run.receipts import Writer


def cid_of(options: Options, folder: str) -> str:
    """The CID of the results, as `ipfsfuse add --hidden` gives it. Raises StoreFailed."""
    with open(os.devnull, "wb") as nowhere:
        return cids.text(Writer(nowhere).add_results(folder, _bound(options)).built.cid)


def add(options: Options, folder: str) -> str:
    """Takes the results into the library, and gives their CID. Raises StoreFailed."""
    scratch = places.scratch_folder("add", os.getpid())
    try:
        car = Path(scratch, "results.car")
        with car.open("w+b") as out:
            writer = Writer(out)
            built = writer.add_results(folder, _bound(options)).built
            writer.close(built)
        library = [each for each in options.mount_options if each.startswith("--library=")]
        command = [sys.executable, "-P", "-m", "ipfsfuse", "import", *library, str(car)]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=mounts.child_environment(),
            check=False,
        )
        if done.returncode != 0:
            reason = f"\n{done.stderr.strip()}".rpartition("\nipfsfuse: ")[2]
            raise StoreFailed(f"the results can't be taken into the library: {reason}")
        return cids.text(built.cid)
    except OSError as exc:
        raise StoreFailed(f"the results can't be taken into the library: {exc.strerror}") from exc
    finally:
        places.remove_tree(scratch)


def _bound(options: Options) -> int:
    return MAX_OUT if options.limits.max_out is None else options.limits.max_out
