"""Pure code over blocks: bytes in, values out. No I/O and nothing asynchronous lives here."""
