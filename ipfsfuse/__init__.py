"""ipfsfuse: IPFS as a read-only directory, fetched lazily and checked against its CIDs."""

__version__ = "0.1.0"
