"""The file system's operations on nodes: child, entries, read, readlink. No FUSE, no errno, no disk, no
URL."""
