"""Our C, in front of libfuse's own calls: what pyfuse3 does not offer (`kept_listings.c`) or can't do fast enough (`porter.c`).

It must be loaded before pyfuse3 is imported: calls go to what is loaded first. Without it everything works, with more
requests. Concurrency: none of its own.
"""

import ctypes

from ipfsfuse.fileio.native import load

LIBRARY = load("ipfsfuse.fuse._native", "listings are asked for each time, and each open of a small file", ctypes.RTLD_GLOBAL)
