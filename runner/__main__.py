"""`python -m runner` is `ipfsfuse-run`."""

from runner.cli import main

if __name__ == "__main__":
    main()
