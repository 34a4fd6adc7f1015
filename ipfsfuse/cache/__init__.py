"""The pinset cache: keeps what was read on disk, within one budget. Only this package knows the cache
folder."""
