"""The tree as a file system sees it: child, entries, read, readlink over nodes. No FUSE, no errno, no disk,
no URL."""
