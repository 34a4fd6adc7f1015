"""A library that makes our C code's writes to the device fail."""

import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("failing_writev.c")


def build(folder: Path, number: int, failures: int, everywhere: bool = True) -> dict[str, str]:
    """Builds it in `folder`. Returns the environment of a process in which `failures` writes in a row fail
    with the errno `number`, and the next one passes, and so on. If not `everywhere`, only writes of the
    device thread fail; the replies that libfuse writes pass."""
    library = folder / "failing_writev.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-o", library, SOURCE, "-ldl"], check=True)
    preload = ":".join(
        filter(None, (str(library), os.environ.get("LD_PRELOAD")))
    )  # before a sanitizer's own writev
    return {
        "LD_PRELOAD": preload,
        "FAILING_WRITEV": f"{number}:{failures}:{everywhere:d}",
        "FAILING_WRITEV_LIBRARY": str(library),
    }
