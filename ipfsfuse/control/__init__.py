"""The local socket through which commands reach a running mount.

A Unix socket in the mount's cache folder (`cache.store.folder`; 0600 in 0700; only the mounting user and root
are answered). One JSON object a line, both ways, in UTF-8:

    > {"command": "pin", "cid": "bafy..."}             the arguments stand beside the command
    < {"progress": {"done": 12, "total": 90}}          none or many, as the command goes on
    < {"ok": true, ...}                                the answer, its values beside `ok`
    < {"ok": false, "error": "one line", "kind": "Unavailable"}

The commands of one connection run one after the other. Closing the connection cancels its command.
`{"command": "hold"}` is answered at once. The connection then holds the mount until it is closed.

`server` is the side of the mount (trio). `ipfsfuse.client` is the blocking side, for other processes.
"""

MAX_LINE = 1 << 20
"""Bytes in one line of a request; longer ones end the connection."""
