"""Pure code over blocks: bytes in, values out. It has no I/O and is synchronous."""
