"""System calls on this machine's files, buffers and worker threads. Knows nothing of blocks."""
