"""The default sources of a command, and the gateways in the machine's configuration (IPIP-280).

Imports nothing that takes long, because the command line uses it before it starts a daemon.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ipfsfuse.errors import UsageError
from ipfsfuse.sources.http.origin import parse_origin, repository

LIBRARY, CAR, KUBO, GATEWAY, NETWORK = "library", "car", "kubo", "gateway", "network"
MAX_GATEWAYS_FILE: Final = 64 * 1024
"""Bytes of a file that names gateways."""


def is_repository(folder: Path) -> bool:
    """Whether the folder `place` is a Kubo repository, or has an `api` file that names a node. True if it
    can't be read."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return not {"api", "config", "datastore_spec"}.isdisjoint(names)


def gateways() -> Sequence[str]:
    """The gateways in this machine's configuration: $IPFS_GATEWAY, else the first file that exists of
    $XDG_CONFIG_HOME/ipfs/gateway (~/.config/ipfs/gateway) and /etc/ipfs/gateway. URLs are separated by
    spaces, commas or line ends; lines that begin with # are skipped. Raises UsageError.

    The source `kubo` reads the file `gateway` in a Kubo repository."""
    text, where = os.environ.get("IPFS_GATEWAY", ""), "IPFS_GATEWAY"
    for path in () if text.strip() else _files():
        try:
            with path.open() as file:
                text, where = file.read(MAX_GATEWAYS_FILE), str(path)
            break
        except (FileNotFoundError, NotADirectoryError):  # the home of a system's user may be /dev/null
            continue
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else exc
            raise UsageError(f"{path}, which names gateways, can't be read: {reason}") from exc
    found = []
    for line in text.splitlines():
        if not line.strip().startswith("#"):
            found += [url for url in re.split(r"[\s,]+", line) if url]
    return tuple(dict.fromkeys(_checked(url, where) for url in found))


def _files() -> Sequence[Path]:
    config = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(config) if os.path.isabs(config) else Path(os.path.expanduser("~/.config"))
    return folder / "ipfs" / "gateway", Path("/etc/ipfs/gateway")


def _checked(url: str, where: str) -> str:
    """A gateway's URL as a SOURCE, without /ipfs at the end. Raises UsageError."""
    try:
        return parse_origin(re.sub(r"/ip[fn]s/?$", "", url)).text
    except UsageError as exc:
        raise UsageError(f"{where} names a gateway that can't be used: {exc}") from exc


def chosen(given: Sequence[str] | None) -> tuple[str, ...]:
    """The SOURCE texts that the user gave, with `gateway` replaced by the configured gateways. If the user
    gave none: the library, the Kubo node of this machine if it has one, and the configured gateways. Raises
    UsageError."""
    if not given:
        node = [KUBO] if is_repository(repository()) else []
        return (LIBRARY, *node, *gateways())
    texts: list[str] = []
    for text in given:
        found = gateways() if text == GATEWAY else [text]
        if not found:
            raise UsageError(
                "--from gateway: this machine's configuration names no gateway; set IPFS_GATEWAY, or write "
                f"a URL into {_files()[0]}"
            )
        texts += found
    return tuple(texts)


def described(texts: Sequence[str], *, by_default: bool, offline: bool, remote: Sequence[str] = ()) -> str:
    """One line that says where blocks come from. `remote`: those of `texts` that are not on this machine."""
    used = [text for text in texts if not (offline and text in remote)]
    named = [f"kubo ({repository()})" if text == KUBO else text for text in used]
    line = f"blocks come from {', then '.join(named) or 'the cache alone'}"
    if offline:
        left_out = f"{', '.join(remote)} is not asked, and " if remote else ""
        line += f"; --offline: {left_out}a node or gateway on this machine only for what it has"
    elif by_default and list(texts) == [LIBRARY]:
        line += (
            f" alone: there is no Kubo node at {repository()}, and no gateway is configured; "
            "name other sources with --from"
        )
    return line
