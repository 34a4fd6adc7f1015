"""`ipfsfuse status --watch`: how a running mount does, again and again, in the terminal."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipfsfuse import client
from ipfsfuse.errors import UsageError
from ipfsfuse.extras import optional
from ipfsfuse.text import printable
from ipfsfuse.units import human

with optional("watch"):
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

SECONDS = 1.0


def run(control: Path) -> int:
    """Until Ctrl-C, or until the mount ends. Raises DaemonFailed, and UsageError without a terminal."""
    before = client.call(control, "status", timeout=30.0)
    with Live(view(before, before, SECONDS), screen=False, refresh_per_second=4) as live:
        if not live.console.is_terminal:
            raise UsageError("--watch needs a terminal: use `ipfsfuse status --json`, or `ipfsfuse metrics`")
        while True:
            time.sleep(SECONDS)
            now = client.call(control, "status", timeout=30.0)
            live.update(view(now, before, max(now["uptime"] - before["uptime"], 0.1)))
            before = now


def view(now: Mapping[str, Any], before: Mapping[str, Any], seconds: float) -> Group:
    """What changed between two answers to `status`, that were so many seconds apart."""
    cache, earlier = now["cache"], before["cache"]
    hits, misses = cache["hits"] - earlier["hits"], cache["misses"] - earlier["misses"]
    rate = f"{hits / (hits + misses):.0%}" if hits + misses else "-"
    head = Text()
    head.append(printable(now["mountpoint"]), "bold")
    head.append(f"  {now['health']}", "green" if now["health"] == "healthy" else "red")
    head.append(f"  {human(cache['used'])} of {human(cache['effective_budget'])}  hit rate {rate}")
    table = Table("source", "state", "per second", "blocks", "median", "in flight", "failures")
    earlier_bytes = {each["name"]: each["bytes"] for each in before["sources"]}
    for each in now["sources"]:
        fetched = (each["bytes"] - earlier_bytes.get(each["name"], 0)) / seconds
        median = "-" if each["median"] is None else f"{each['median'] * 1000:.0f} ms"
        table.add_row(
            *(Text(printable(text)) for text in (each["name"], each["state"], human(fetched))),
            str(each["blocks"]),
            median,
            str(each["in_flight"]),
            str(sum(each["failures"].values())),
        )
    reasons = [Text(printable(reason), "red") for reason in now["reasons"]]
    return Group(head, *reasons, table)
