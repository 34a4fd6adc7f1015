"""`ipfsfuse`, and `python -m ipfsfuse`."""

import sys
from signal import SIG_DFL, SIGINT, default_int_handler, getsignal, signal


def main() -> int:
    """Runs one command (`cli.main`). While modules are imported, Ctrl-C ends the process at once. A
    KeyboardInterrupt would show a traceback, or make an import fail."""
    if getsignal(SIGINT) is default_int_handler:
        signal(SIGINT, SIG_DFL)
    from ipfsfuse.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
