"""The FUSE file system: session, requests, inodes and the table of errnos."""

from ipfsfuse.fuse import device as device  # this must come before anything here imports pyfuse3
