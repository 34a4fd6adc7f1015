"""The kernel's side: sessions, requests, inodes and the one table of errnos."""

from ipfsfuse.fuse import device as device  # this must come before anything here imports pyfuse3
