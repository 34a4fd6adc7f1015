"""The kernel's side: sessions, requests, inodes and the one table of errnos."""

from ipfsfuse.fuse import kernellists as kernellists  # before anything here imports pyfuse3
