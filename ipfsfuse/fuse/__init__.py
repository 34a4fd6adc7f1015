"""The kernel's side: sessions, requests, inodes and the one table of errnos."""

from ipfsfuse.fuse import native as native  # before anything here imports pyfuse3
