"""Runs a WASI guest with IPFS at /ipfs: beneath WASI, by a mount that it uses as any process would.

Concurrency rule: the runner's own process forks the guest's before it makes any thread, and never touches the
mount; the guest's process runs one guest and ends with it.
"""
