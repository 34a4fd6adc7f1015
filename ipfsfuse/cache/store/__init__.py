"""The cache folder on disk: its lock, its files, and how to go on when the disk fails."""
