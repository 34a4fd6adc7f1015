"""Files of this machine, by system calls: what sources and the cache need of them. Knows nothing of
blocks."""
