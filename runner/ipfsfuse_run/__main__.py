"""`python -m ipfsfuse_run` is `ipfsfuse-run`."""

from ipfsfuse_run.cli import main

if __name__ == "__main__":
    main()
