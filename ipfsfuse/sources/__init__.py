"""Sources of blocks. Only this package knows block files, URLs and nodes. The pool in it verifies every
block."""
