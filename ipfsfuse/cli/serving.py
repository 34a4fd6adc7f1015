"""`ipfsfuse serve`: arguments to a ContentConfig, and one line when requests are answered."""

import argparse
import ipaddress
import logging
import os
from collections.abc import Sequence

from ipfsfuse.cli import console, folders
from ipfsfuse.cli.logs import escape_the_log
from ipfsfuse.cli.mounting import header_file, source
from ipfsfuse.config import ContentConfig
from ipfsfuse.sources import defaults

log = logging.getLogger("ipfsfuse.serve")


def run(arguments: argparse.Namespace) -> int:
    # with trio and hypercorn, 200 ms: only the process that serves needs them
    from ipfsfuse.serve import run as serving
    from ipfsfuse.serve.server import parse_listen

    host, port = parse_listen(arguments.listen)
    config = ContentConfig(
        cache_dir=folders.cache_dir(arguments.cache_dir),
        library=folders.library(arguments.library),
        sources=tuple(source(text) for text in defaults.chosen(arguments.sources)),
        offline=not arguments.fetch,
        budget=arguments.budget,
        reserve=arguments.reserve,
        deadline=arguments.deadline,
        dns=arguments.dns,
        header_files=tuple(header_file(text) for text in arguments.header_files or ()),
        routers=tuple(arguments.routers or ()),
        allow_private_providers=arguments.allow_private_providers,
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    escape_the_log()
    if not _is_loopback(host):
        console.note(
            f"ipfsfuse: {host} is not this machine alone: whoever reaches it can read the whole library, and "
            "all that is staged"
        )

    def ready(urls: Sequence[str]) -> None:
        if arguments.json:
            console.values({"listening": list(urls), "pid": os.getpid()}, indent=None)
        else:
            console.line(f"serving at {', '.join(urls)}")

    serving.run(config, host, port, arguments.fetch, ready)
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
