"""`ipfsfuse status`: the state of a running mount as text, as JSON, as a live view in the terminal
(`--watch`), or as a page for a browser (`--html`)."""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipfsfuse import client
from ipfsfuse.cli import console, folders
from ipfsfuse.errors import UsageError
from ipfsfuse.extras import optional
from ipfsfuse.text import printable
from ipfsfuse.units import human

if TYPE_CHECKING:
    from rich.console import Group

ANSWER_SECONDS = 30.0
"""A mount may take so long for an answer that needs no network."""
WATCH_SECONDS = 1.0
DEGRADED = 3
"""The exit code if the mount serves, but is degraded. 1 means that it does not answer."""


def run(arguments: argparse.Namespace) -> int:
    control = folders.control_socket(arguments)
    if arguments.watch and arguments.html is not None:
        raise UsageError("status takes --watch or --html FILE, not both")
    if arguments.watch:
        return _watch_as_json(control) if arguments.json else _watch(control)
    answer = client.call(control, "status", timeout=ANSWER_SECONDS)
    if arguments.html is not None:
        listed = client.call(control, "ls", timeout=ANSWER_SECONDS)
        samples = client.call(control, "history", timeout=ANSWER_SECONDS)["samples"]
        html = page(answer, listed, samples)
        if arguments.html == "-":
            console.text(html)
        else:
            console.write(arguments.html, html)
        written = [] if arguments.html == "-" else [f"wrote {arguments.html}"]
        console.answer(arguments, {"written": arguments.html, "health": answer["health"]}, *written)
    elif arguments.json:
        console.values(answer)
    else:
        console.status(answer)
    return 0 if answer["health"] == "healthy" else DEGRADED


# -- who reads: from /proc alone, because a mount that does not answer would block us ------------------------


def reading(point: str) -> Iterator[dict[str, Any]]:
    """The open files of processes below the mountpoint, as far as this user may see them, with the position
    of each."""
    for entry in sorted((name for name in os.listdir("/proc") if name.isdigit()), key=int):
        process = Path("/proc", entry)
        try:
            user = process.stat().st_uid
            command = process.joinpath("comm").read_text(errors="replace").strip()
            descriptors = os.listdir(process / "fd")
        except OSError:
            continue  # ended meanwhile, or another user's
        for number in descriptors:
            try:
                path = os.readlink(process / "fd" / number)
                if not path.startswith(f"{point}/"):
                    continue
                position = process.joinpath("fdinfo", number).read_text().split(maxsplit=2)[1]
            except (OSError, IndexError):
                continue
            yield {
                "pid": int(entry), "command": command, "user": folders.user_name(user), "fd": int(number),
                "path": path.removeprefix(point), "position": int(position),
            }  # fmt: skip


# -- --watch -------------------------------------------------------------------------------------------------


def _observed(control: Path) -> dict[str, Any]:
    answer = client.call(control, "status", timeout=ANSWER_SECONDS)
    return {**answer, "reading": list(reading(answer["mountpoint"]))}


def _watch_as_json(control: Path) -> int:
    """Prints a line of JSON each second, until Ctrl-C or until the mount ends."""
    while True:
        console.values(_observed(control), indent=None)
        time.sleep(WATCH_SECONDS)


def _watch(control: Path) -> int:
    """Shows the live view until Ctrl-C or until the mount ends. Raises DaemonFailed, and UsageError without a
    terminal."""
    with optional("watch"):
        from rich.live import Live  # with what it imports, 100 ms
    if not console.is_terminal(sys.stdout):
        raise UsageError("--watch needs a terminal: add --json, or use `ipfsfuse metrics`")
    before = _observed(control)
    with Live(view(before, before, WATCH_SECONDS), refresh_per_second=4) as live:
        while True:
            time.sleep(WATCH_SECONDS)
            now = _observed(control)
            live.update(view(now, before, max(now["uptime"] - before["uptime"], 0.1)))
            before = now


def view(now: Mapping[str, Any], before: Mapping[str, Any], seconds: float) -> "Group":
    """The changes between two observations, `seconds` apart."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    cache, earlier = now["cache"], before["cache"]
    hits, misses = cache["hits"] - earlier["hits"], cache["misses"] - earlier["misses"]
    rate = f"{hits / (hits + misses):.0%}" if hits + misses else "-"
    head = Text()
    head.append(printable(now["mountpoint"]), "bold")
    head.append(f"  {now['health']}", console.COLOURS.get(now["health"], ""))
    head.append(f"  {human(cache['used'])} of {human(cache['effective_budget'])}  hit rate {rate}")
    sources = Table("source", "state", "per second", "blocks", "median", "in flight", "failures")
    earlier_bytes = {each["name"]: each["bytes"] for each in before["sources"]}
    for each in now["sources"]:
        fetched = (each["bytes"] - earlier_bytes.get(each["name"], 0)) / seconds
        median = "-" if each["median"] is None else f"{each['median'] * 1000:.0f} ms"
        sources.add_row(
            Text(printable(each["name"])),
            Text(each["state"], console.COLOURS.get(each["state"], "")),
            human(max(fetched, 0)),
            str(each["blocks"]),
            median,
            str(each["in_flight"]),
            str(sum(each["failures"].values())),
        )
    reasons = [Text(printable(reason), "red") for reason in now["reasons"]]
    files = Table("who", "reads", "at", "per second")
    earlier = {(each["pid"], each["fd"], each["path"]): each["position"] for each in before["reading"]}
    for each in now["reading"]:
        at = each["position"]
        read = (at - earlier.get((each["pid"], each["fd"], each["path"]), at)) / seconds
        who = f"{each['command']} {each['pid']} ({each['user']})"
        files.add_row(Text(printable(who)), Text(printable(each["path"])), human(at), human(max(read, 0)))
    return Group(head, *reasons, sources, files if files.row_count else Text("no file is open"))


# -- --html --------------------------------------------------------------------------------------------------

AGES = (("the last hour", 3600), ("the last day", 86400), ("the last week", 7 * 86400))
SIZE_CLASSES = (("up to 1 MiB", 1 << 20), ("up to 16 MiB", 16 << 20), ("up to 256 MiB", 256 << 20))
OLDER, LARGER = "earlier", "larger"
LARGEST = 30
"""The most files in the page."""

_STYLE = """
:root { color-scheme: light dark; --line: #8886;
  --ink: #1b6ac9; --good: #1a7f37; --warn: #9a6700; --bad: #cf222e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #6cb6ff; --good: #57ab5a; --warn: #c69026; --bad: #f47067 }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse }
th, td { padding: .25rem .6rem; border: 1px solid var(--line); text-align: left }
td.number { text-align: right; white-space: nowrap }
.scroll { overflow-x: auto } .path { overflow-wrap: anywhere }
svg { width: 100%; height: auto; max-width: 60rem } svg text { font-size: 11px; fill: currentColor }
.good { color: var(--good) } .warn { color: var(--warn) } .bad { color: var(--bad) }
meter { width: 20rem; max-width: 100% }
"""
_CLASSES = {"green": "good", "yellow": "warn", "red": "bad"}


def page(status: Mapping[str, Any], listed: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """A complete page, without scripts and without links to other files."""
    cache = status["cache"]
    share = f"{human(cache['used'])} of {human(cache['effective_budget'])}, {human(cache['pinned'])} pinned"
    reasons = "".join(f'<li class="bad">{_text(each)}</li>' for each in status["reasons"])
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>ipfsfuse {_text(status["mountpoint"])}</title><style>{_STYLE}</style></head><body>
<h1>{_text(status["mountpoint"])}
<span class="{_class(status["health"])}">{_text(status["health"])}</span></h1>
<p>ipfsfuse {_text(status["version"])}, process {status["pid"]}, since {_text(status["since"])}.
As of {_text(samples[-1]["time"])}.</p>
<ul>{reasons}</ul>
<h2>Cache</h2>
<p><meter min="0" max="{cache["effective_budget"]}" value="{cache["used"]}">{share}</meter> {share}</p>
<h3>Staged files by size, and by when they were last used</h3>
<div class="scroll">{_by_size_and_age(listed["entries"], samples[-1]["time"])}</div>
<p>And {listed["small"]["blocks"]} small blocks (files up to 64 KiB, directories, links):
{human(listed["small"]["bytes"])}.</p>
<h2>Hit rate</h2>
{_hit_rate(samples)}
<h2>Sources</h2>
<div class="scroll">{_sources(status["sources"])}</div>
<h2>Largest files</h2>
<div class="scroll">{_largest(listed["entries"])}</div>
</body></html>
"""


def _text(value: object) -> str:
    return escape(printable(str(value)))


def _class(state: str) -> str:
    return _CLASSES.get(console.COLOURS.get(state, ""), "")


def _table(identity: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    heads = "".join(f'<th scope="col">{escape(each)}</th>' for each in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<table id="{identity}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def _cell(value: object, kind: str = "number") -> str:
    return f'<td class="{kind}">{_text(value)}</td>'


def _by_size_and_age(entries: Sequence[Mapping[str, Any]], now: str) -> str:
    """Bytes on disk and numbers of files. The darker, the more bytes."""
    ages, sizes = [*(name for name, _ in AGES), OLDER], [*(name for name, _ in SIZE_CLASSES), LARGER]
    cells = {(age, size): (0, 0) for age in ages for size in sizes}
    until = datetime.fromisoformat(now)
    for each in entries:
        seconds = (until - datetime.fromisoformat(each["last_used"])).total_seconds()
        age = next((name for name, most in AGES if seconds <= most), OLDER)
        size = next((name for name, most in SIZE_CLASSES if each["size"] <= most), LARGER)
        count, staged = cells[age, size]
        cells[age, size] = count + 1, staged + each["staged"]
    most = max(staged for _count, staged in cells.values()) or 1
    rows = []
    for age in ages:
        row = [f'<th scope="row">{escape(age)}</th>']
        for size in sizes:
            count, staged = cells[age, size]
            shade = f"background: color-mix(in srgb, var(--ink) {staged * 70 // most}%, transparent)"
            shown = f"{human(staged)}, {count} {'file' if count == 1 else 'files'}" if count else ""
            row.append(f'<td class="number" style="{shade}">{shown}</td>')
        rows.append(row)
    return _table("cache", ["last used", *sizes], rows)


WIDTH, HEIGHT, LEFT, BOTTOM = 720, 200, 44, 24


def _hit_rate(samples: Sequence[Mapping[str, Any]]) -> str:
    """A chart with a point for each span with requests to the cache."""
    times = [datetime.fromisoformat(each["time"]).timestamp() for each in samples]
    begin, span = times[0], max(times[-1] - times[0], 1.0)
    points = []
    for before, after, moment in zip(samples, samples[1:], times[1:], strict=False):
        hits, misses = after["hits"] - before["hits"], after["misses"] - before["misses"]
        if hits + misses:
            x = LEFT + (moment - begin) / span * (WIDTH - LEFT)
            y = (HEIGHT - BOTTOM) * misses / (hits + misses)
            points.append((x, y, hits / (hits + misses)))
    if not points:
        return "<p>Nothing was asked of the cache yet.</p>"
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _rate in points)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{rate:.0%}</title></circle>'
        for x, y, rate in points
    )
    levels = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y}" y2="{y}" stroke="var(--line)"/>'
        f'<text x="0" y="{y + 4}">{percent}%</text>'
        for percent in (0, 50, 100)
        for y in [(HEIGHT - BOTTOM) * (100 - percent) // 100]
    )
    first, last = (
        datetime.fromtimestamp(each, UTC).strftime("%Y-%m-%d %H:%M UTC") for each in times[:: len(times) - 1]
    )
    overall = samples[-1]["hits"] / max(samples[-1]["hits"] + samples[-1]["misses"], 1)
    return f"""<svg id="hits" viewBox="-4 -8 {WIDTH + 8} {HEIGHT + 16}" role="img"
aria-label="Hit rate over time, {overall:.0%} since the mount began">{levels}
<polyline points="{line}" fill="none" stroke="var(--ink)" stroke-width="2"/><g fill="var(--ink)">{dots}</g>
<text x="{LEFT}" y="{HEIGHT}">{first}</text>
<text x="{WIDTH}" y="{HEIGHT}" text-anchor="end">{last}</text></svg>
<p>{overall:.0%} since the mount began: {samples[-1]["hits"]} blocks and leaves from the disk,
{samples[-1]["misses"]} asked of sources, {samples[-1]["evictions"]} evictions.</p>"""


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            _cell(each["name"], "path"),
            _cell(each["state"], _class(each["state"])),
            _cell(each["blocks"]),
            _cell(human(each["bytes"])),
            _cell("" if each["median"] is None else f"{each['median'] * 1000:.0f} ms"),
            _cell("" if each["p95"] is None else f"{each['p95'] * 1000:.0f} ms"),
            _cell(sum(each["failures"].values())),
            _cell(each["why"], "path"),
        ]
        for each in sources
    ]
    return _table(
        "sources", ["source", "state", "blocks", "fetched", "median", "95 %", "failures", "why"], rows
    )


def _largest(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            _cell(human(each["staged"])),
            _cell("whole" if each["complete"] else f"of {human(each['size'])}"),
            _cell(console.local_time(each["last_used"])),
            _cell(each["pinned"], ""),
            _cell((each["paths"] or [each["cid"]])[0], "path"),
        ]
        for each in sorted(entries, key=lambda each: -each["staged"])[:LARGEST]
    ]
    return _table("largest", ["on disk", "", "last used", "pinned", "opened as"], rows)
