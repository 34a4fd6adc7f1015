"""The pinset cache: what was read stays on disk under one budget. Only this package knows the cache
folder."""
