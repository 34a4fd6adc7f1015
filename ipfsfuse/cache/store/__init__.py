"""The cache folder on disk: who holds it, what lies where, and what to do when the disk is in trouble."""
