"""Where blocks come from. Only this package knows files of blocks, URLs and nodes; nothing above it trusts a
byte."""
