"""Files of this machine, buffers and worker threads."""
