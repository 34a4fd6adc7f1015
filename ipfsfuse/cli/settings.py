"""Settings from outside the command line: IPFSFUSE_* variables and the configuration files.

They can set every option in `SETTINGS`. The order of precedence: arguments, the environment, the user's file
($XDG_CONFIG_HOME/ipfsfuse/config.toml), the system's file (/etc/ipfsfuse/config.toml), defaults. A file has
keys for all mounts, and a table [mount.NAME] for each named mount. Keys of a table take precedence over the
others. IPFSFUSE_CONFIG names one file to read instead of both.
"""

import argparse
import os
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ipfsfuse import config, units
from ipfsfuse.cli import console
from ipfsfuse.errors import UsageError
from ipfsfuse.sources import defaults

SYSTEM_CONFIG = Path("/etc/ipfsfuse/config.toml")

SETTINGS: Mapping[str, str] = {
    "from": "a list of sources, in the order to ask them; these two, with the router below, need neither "
    "a node nor a gateway of yours",
    "router": "a list of delegated routers, for `network` and for IPNS records; this public one sees the "
    "CIDs that you ask it for",
    "cache-dir": "the cache folder",
    "library": "the library",
    "budget": "bytes that the cache may use on disk",
    "reserve": "bytes that the cache leaves free on its disk",
    "deadline": "how long a read waits for a block before it fails",
    "offline": "use only local content",
    "bwlimit": "the most bytes to fetch per second, from all sources together",
    "max-fetch": "the most bytes to fetch, from all sources together",
    "pins": "kubo or none",
    "allow": "a list of CIDs, or of files that list some: only these are shown",
    "allow-other": "let other users in",
    "passthrough": "let the kernel read staged files directly (root only)",
    "isolated": "use a new cache folder, which is removed with the mount",
    "record": "write the CID of every block that is used",
    "header-file": "a list of files with HTTP headers, each as URL=FILE",
    "ipns": "a folder in which IPNS names and domains are shown",
    "dns": "a DNS-over-HTTPS server, or system",
    "allow-private-providers": "let `network` also ask providers at private addresses",
    "uid": "the owner that every file is shown with",
    "gid": "the group that every file is shown with",
    "umask": "permissions to remove from every file, in octal",
    "user": "the user as which a daemon started by root continues",
    "unconfined": "switch the daemon's confinement off: it can then reach every file of its user",
    "log-level": "debug, info, warning or error",
    "log-file": "where the daemon logs",
    "log-format": "text, json or journal",
    "listen": "where `serve` listens",
    "allow-host": "a list of host names under which `serve` answers too",
    "fetch": "let `serve` fetch what is not here",
    "cid-version": "of `add`",
    "profile": "of `add`",
}
"""The options that can be set outside the command line, and their descriptions for `config --init`."""

ALLOW_OTHER = (
    "--allow-other: every user of this machine can read what this mount shows: the whole library, "
    "what is pinned, "
    "what was read, and any CID that its sources have"
)

PATHS = frozenset({"cache-dir", "library", "record", "ipns", "log-file", "mountpoint"})


Layer = tuple[str, Mapping[str, object]]
"""An origin of settings, and their values by the names of the options."""


class ConfigFile(NamedTuple):
    path: Path
    values: Mapping[str, object]
    mounts: Mapping[str, Mapping[str, object]]


def user_file() -> Path:
    return config.xdg("XDG_CONFIG_HOME", ".config") / "ipfsfuse" / "config.toml"


def candidates() -> list[Path]:
    """The paths of configuration files, in the order of precedence. They may not exist."""
    named = os.environ.get("IPFSFUSE_CONFIG")
    return [Path(named)] if named else [user_file(), SYSTEM_CONFIG]


def files() -> list[ConfigFile]:
    """The configuration files that exist, in the order of precedence. Raises UsageError, which names the file
    and the key."""
    named = os.environ.get("IPFSFUSE_CONFIG")
    found = []
    for path in candidates():
        try:
            with path.open("rb") as file:
                info = os.fstat(file.fileno())
                if info.st_uid not in (0, os.geteuid()) or info.st_mode & 0o022:
                    raise UsageError(
                        f"{path} can be changed by other users: make it your own (chown), and run chmod go-w"
                    )
                found.append(_parsed(path, file.read().decode()))
        except (FileNotFoundError, NotADirectoryError):
            if named:
                raise UsageError(f"IPFSFUSE_CONFIG: {path} does not exist") from None
        except OSError as exc:
            raise UsageError(f"{path} can't be read: {exc.strerror}") from exc
        except UnicodeDecodeError as exc:
            raise UsageError(f"{path} is not UTF-8: {exc.reason} at byte {exc.start}") from exc
    return found


def _parsed(path: Path, text: str) -> ConfigFile:
    import tomllib  # 10 ms, and only where there is a file

    try:
        values: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:  # a number of 5,000 digits, a list in a thousand others
        raise UsageError(f"{path} is not TOML: {exc}") from exc
    mounts = values.pop("mount", {})
    if not isinstance(mounts, dict) or not all(isinstance(each, dict) for each in mounts.values()):
        raise UsageError(f"{path}: `mount` is not a table: write [mount.NAME]")
    _check_keys(str(path), values, SETTINGS)
    for name, table in mounts.items():
        where = f"{path}, [mount.{name}]"
        if not name or "/" in name or name in (".", ".."):
            raise UsageError(f"{where}: a name has no / and is neither . nor ..")
        _check_keys(where, table, [*SETTINGS, "mountpoint"])
        if not isinstance(table.get("mountpoint"), str):
            raise UsageError(f'{where}: mountpoint is missing: write mountpoint = "/some/folder"')
    return ConfigFile(path, values, mounts)


def _check_keys(where: str, values: Mapping[str, object], known: Collection[str]) -> None:
    for key in values:
        if key not in known:
            todo = console.suggestion(key.replace("_", "-"), known, "`ipfsfuse config` lists the settings")
            raise UsageError(f"{where}: {key} is not a setting: {todo}")


def mounts() -> dict[str, Path]:
    """The named mounts and their mountpoints."""
    found: dict[str, Path] = {}
    for file in files():
        for name, table in file.mounts.items():
            found.setdefault(name, _path(f"{file.path}, [mount.{name}]", str(table["mountpoint"])))
    return found


def mountpoint_of(text: str) -> str:
    """The mountpoint of the named mount `text`, else `text` itself. Write ./NAME for a folder."""
    if "/" in text or text in ("", ".", ".."):
        return text
    return str(mounts().get(text, text))


def _layers(name: str | None) -> list[Layer]:
    """The origins of settings for the mount of that name, in the order of precedence."""
    variables = {key: f"IPFSFUSE_{key.upper().replace('-', '_')}" for key in SETTINGS}
    given = {key: os.environ.get(variable) for key, variable in variables.items()}
    layers: list[Layer] = [(variables[key], {key: text}) for key, text in given.items() if text]
    for file in files():
        if name is not None and name in file.mounts:
            layers.append((f"{file.path} [mount.{name}]", file.mounts[name]))
        layers.append((str(file.path), file.values))
    return layers


def fill(arguments: argparse.Namespace, options: Iterable[tuple[argparse.Action, object]]) -> None:
    """Sets the options that the command line left out. `arguments.origins` gets the origin of each setting.

    Raises UsageError, which names the origin."""
    named = getattr(arguments, "mountpoint", None) if arguments.command in ("mount", "config") else None
    layers = _layers(named)
    arguments.origins = {}
    for action, default in options:
        name = action.option_strings[-1].removeprefix("--")
        origin = "argument"
        if not hasattr(arguments, action.dest):
            built_in: Layer = "built in", {name: default}
            origin, values = next((layer for layer in layers if name in layer[1]), built_in)
            value = default if values is built_in[1] else _converted(action, name, origin, values[name])
            setattr(arguments, action.dest, value)
        if name in SETTINGS:
            arguments.origins[name] = origin
    if named is not None:
        arguments.mountpoint = mountpoint_of(named)


def _converted(action: argparse.Action, name: str, origin: str, value: object) -> object:
    where = f"{origin}: {name}" if not origin.startswith("IPFSFUSE_") else origin
    if isinstance(action, argparse._StoreTrueAction):
        switch = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if str(value).lower() not in switch:
            raise UsageError(f"{where}: {value!r} is not true or false")
        return switch[str(value).lower()]
    if isinstance(action, argparse._AppendAction):
        texts = value if isinstance(value, list) else None
        if isinstance(value, str):
            texts = _words(where, value) if origin.startswith("IPFSFUSE_") else [value]
        if texts is None or not all(isinstance(each, str) for each in texts):
            raise UsageError(f"{where}: not a list of texts")
        return [_text(action, where, name, each) for each in texts]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{where}: {value!r} is not a text or a number")
    if name == "umask" and not isinstance(value, str):  # TOML's 0o022 is the number 18
        raise UsageError(f'{where}: a mode is written in quotes, as "022"')
    return _text(action, where, name, str(value))


def _words(where: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as exc:
        raise UsageError(f"{where}: {exc}: write words, with spaces in quotes") from exc


def _text(action: argparse.Action, where: str, name: str, text: str) -> object:
    if text.startswith("~/") or name in PATHS:
        text = str(_path(where, text))
    value: object = text
    if callable(action.type):
        try:
            value = action.type(text)
        except argparse.ArgumentTypeError as exc:
            raise UsageError(f"{where}: {exc}") from exc
        except ValueError as exc:
            raise UsageError(f"{where}: {text!r} can't be used") from exc
    if action.choices is not None and value not in action.choices:
        raise UsageError(f"{where}: {text!r} is not one of {', '.join(map(str, action.choices))}")
    return value


def _path(where: str, text: str) -> Path:
    if "\0" in text:
        raise UsageError(f"{where}: {text!r} can't be a path")
    path = Path(text)
    if text.startswith("~/"):
        path = config.home() / text[2:]
    if not path.is_absolute() and not where.startswith("IPFSFUSE_"):
        raise UsageError(f"{where}: {text!r} is not an absolute path")
    return path


# -- `ipfsfuse config` ---------------------------------------------------------------------------------------


def show(arguments: argparse.Namespace) -> int:
    """Prints the settings for a mount with their origins, or writes a template."""
    if arguments.init and arguments.mountpoint is not None:
        raise UsageError("config takes a NAME or --init, not both")
    if arguments.init:
        return _write_template(arguments)
    named = {name: str(point) for name, point in mounts().items()}
    if arguments.mountpoint is not None and arguments.mountpoint not in named.values():
        todo = console.suggestion(arguments.mountpoint, named, "write [mount.NAME]")
        raise UsageError(f"{arguments.mountpoint} is not a mount that the configuration names: {todo}")
    values = {name: _in_force(arguments, name) for name in arguments.origins}
    shown = {name: {"value": values[name], "origin": each} for name, each in arguments.origins.items()}
    if arguments.json:
        console.values({"files": [str(each.path) for each in files()], "settings": shown, "mounts": named})
        return 0
    rows = [{"setting": name, **each, "value": _as_typed(name, values[name])} for name, each in shown.items()]
    console.table("settings", rows)
    console.table("mounts", [{"name": name, "mountpoint": point} for name, point in named.items()])
    return 0


def value(arguments: argparse.Namespace, name: str) -> Any:
    """The parsed value of the setting `name`."""
    return getattr(arguments, _DESTINATIONS.get(name, name.replace("-", "_")))


_DESTINATIONS = {"from": "sources", "header-file": "header_files", "router": "routers"}


def _in_force(arguments: argparse.Namespace, name: str) -> object:
    """The value in effect: the default if nothing sets it."""
    found = value(arguments, name)
    if name == "from":
        return list(defaults.chosen(found))
    if found is None and name in ("cache-dir", "library"):
        found = config.cache_dir(None) if name == "cache-dir" else config.library(None)
    return found if found is None or isinstance(found, int | float | str | list) else str(found)


def _as_typed(name: str, value: object) -> str:
    """The value as on the command line."""
    if name == "reserve" and value is None:
        return "a twentieth of the disk, at most 2GiB"
    if value is None or value == []:
        return "-"
    if name in ("budget", "reserve", "bwlimit", "max-fetch") and isinstance(value, int):
        return units.size_text(value)
    if name == "deadline" and isinstance(value, float):
        return units.duration_text(value)
    if name == "umask" and isinstance(value, int):
        return f"{value:03o}"
    return " ".join(map(str, value)) if isinstance(value, list) else console.formatted(name, value)


def _write_template(arguments: argparse.Namespace) -> int:
    path = user_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as exc:
        raise UsageError(f"{path} exists already: edit it, or move it away first") from exc
    with open(file, "w", encoding="utf-8") as out:
        out.write(template())
    return console.answer(arguments, {"written": str(path)}, f"wrote {path}")


_EXAMPLES = {
    "from": '["library", "network"]', "router": '["https://delegated-ipfs.dev"]',
    "cache-dir": '"~/.cache/ipfsfuse"', "library": '"~/.local/share/ipfsfuse/library"', "budget": '"10GiB"',
    "reserve": '"2GiB"', "deadline": '"30s"', "offline": "false", "bwlimit": '"10MiB"',
    "max-fetch": '"1GiB"', "pins": '"kubo"',
    "allow": "[]", "allow-other": "false", "passthrough": "false", "isolated": "false",
    "record": '"/tmp/blocks.jsonl"',
    "header-file": '["https://gateway.example=/etc/ipfsfuse/headers"]', "ipns": '"~/ipns"', "dns": '"system"',
    "allow-private-providers": "false",
    "uid": "1000", "gid": "1000",
    "user": '"nobody"', "unconfined": "false", "umask": '"022"',
    "log-level": '"info"', "log-file": '"/var/log/ipfsfuse/mount.log"',
    "log-format": '"text"', "listen": '"127.0.0.1:8080"', "allow-host": '["ipfs.example"]', "fetch": "false",
    "cid-version": "1", "profile": '"unixfs-v1-2025"',
}  # fmt: skip


def template() -> str:
    """A configuration file with all settings as comments."""
    lines = [
        "# Settings of ipfsfuse. `ipfsfuse config` shows what holds, and where it comes from.",
        "# Arguments and IPFSFUSE_* variables take precedence over this file.",
        "",
    ]
    for name, about in SETTINGS.items():
        lines += [f"# {about}", f"#{name} = {_EXAMPLES[name]}", ""]
    lines += [
        "# A named mount: `ipfsfuse mount media`. It may have any of the settings above.",
        "#[mount.media]",
        '#mountpoint = "~/media"',
        '#from = ["kubo"]',
        "",
    ]
    return "\n".join(lines)
