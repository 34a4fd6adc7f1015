"""The kernel's side: sessions, requests, inodes and the one table of errnos."""
