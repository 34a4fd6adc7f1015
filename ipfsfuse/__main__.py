"""`python -m ipfsfuse`."""

import sys

from ipfsfuse.cli.main import main

sys.exit(main())
