"""`ipfsfuse-run`, and `python -m ipfsfuse_run`."""

from signal import SIG_DFL, SIGINT, default_int_handler, getsignal, signal
from typing import NoReturn


def main() -> NoReturn:
    """Runs the command line (`cli`). While modules are imported, Ctrl-C ends the process at once: as an
    exception it would be a traceback, or a failure of whatever was being imported."""
    if getsignal(SIGINT) is default_int_handler:
        signal(SIGINT, SIG_DFL)
    from ipfsfuse_run.cli import main

    main()


if __name__ == "__main__":
    main()
