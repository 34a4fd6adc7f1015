"""SOURCE texts of the command line, parsed once into frozen specs, and specs opened as sources.

Concurrency: parsing is pure; opening blocks (a CAR without an index is read through) and belongs in a worker
thread.
"""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ipfsfuse.errors import SourceFailed, UsageError
from ipfsfuse.sources.http_settings import HttpSettings
from ipfsfuse.sources.origin import Origin, parse_origin, read_origin, unix_origin
from ipfsfuse.sources.secrets import bind_headers, is_ours

if TYPE_CHECKING:
    from ipfsfuse.sources.base import Source

log = logging.getLogger("ipfsfuse.sources")

Indexing = Callable[[str, int, int], None]
"""Called now and then with (name of the CAR file, bytes passed, bytes in all) while its index is built."""

LIBRARY, CAR, KUBO, GATEWAY = "library", "car", "kubo", "gateway"


@dataclass(frozen=True, slots=True)
class Spec:
    """One SOURCE. `name` is how people know it."""

    kind: str
    name: str
    path: Path | None = None
    """CAR."""
    origin: Origin | None = None
    """GATEWAY; KUBO where an address was given."""


@dataclass(frozen=True, slots=True)
class OpenSettings:
    library: Path
    indexes: Path
    """The folder for indexes of CAR files that have none."""
    http: HttpSettings = field(default_factory=HttpSettings)
    offline: bool = False
    progress: Indexing | None = None


def parse_source(text: str) -> Spec:
    """What `text` asks for. Raises UsageError, one line that says what to write instead."""
    if text in (LIBRARY, KUBO):
        return Spec(text, text)
    scheme, separator, rest = text.partition("://")
    if separator:
        return _parse_url(text, scheme.lower(), rest)
    if not text or "\0" in text:
        raise UsageError(
            "an empty --from; give a CAR file, library, kubo, kubo+http://host:port or https://gateway"
        )
    return _parse_path(text)


def _parse_url(text: str, scheme: str, rest: str) -> Spec:
    if scheme in ("http", "https"):
        origin = parse_origin(text)
        if origin.base.endswith("/ipfs"):
            raise UsageError(f"{text}: leave out the /ipfs at the end")
        if any(part in f"{origin.base}/" for part in ("/ipfs/", "/ipns/")):
            raise UsageError(f"{text}: a gateway's address ends before /ipfs and /ipns")
        return Spec(GATEWAY, origin.text, origin=origin)
    if scheme in ("kubo+http", "kubo+https"):
        origin = parse_origin(f"{scheme.removeprefix('kubo+')}://{rest}")
        return Spec(KUBO, f"kubo+{origin.text}", origin=origin)
    if scheme == "kubo+unix":
        if not rest.startswith("/"):
            raise UsageError(f"{text}: a socket's absolute path is missing; write kubo+unix:///run/ipfs.sock")
        return Spec(KUBO, text, origin=unix_origin(rest))
    raise UsageError(
        f"{text}: {scheme}:// is not known; use https://, http://, kubo+http://, kubo+https:// or "
        "kubo+unix://"
    )


def _parse_path(text: str) -> Spec:
    path = Path(text)
    if path.exists():
        return Spec(CAR, path.name, path=path.absolute())
    head = text.partition("/")[0]
    if text.startswith(("/ipns/", "/ipfs/")):
        raise UsageError(
            f"{text}: content is not a source; mount `kubo` or a gateway, and name it in the mount"
        )
    if text.startswith(("http:", "https:", "kubo+", "kubo:")):
        raise UsageError(
            f"{text}: a typing error? An address is written with ://, as in https://host or "
            "kubo+http://host:port"
        )
    if "/" not in text and text.lower() in (LIBRARY, KUBO):
        raise UsageError(f"{text}: write {text.lower()}")
    if (
        not text.startswith(("/", "."))
        and not text.endswith(".car")
        and ("." in head or ":" in head or head == "localhost")
    ):
        raise UsageError(f"{text}: no such file; if it is a gateway, write https://{text}")
    raise UsageError(
        f"{text}: no such file; a source is a CAR file, library, kubo, kubo+http://host:port or "
        "https://gateway"
    )


def parse_sources(texts: Sequence[str]) -> tuple[Spec, ...]:
    """All of them, in order. Raises UsageError, for one that is given twice too."""
    specs = [parse_source(text) for text in texts]
    seen: dict[object, str] = {}
    for spec, text in zip(specs, texts, strict=True):
        what = (spec.kind, spec.path.resolve() if spec.path else None, spec.origin)
        if what in seen:
            raise UsageError(
                f"--from {text} is given twice" + (f" (as {seen[what]} before)" if seen[what] != text else "")
            )
        seen[what] = text
    return tuple(specs)


def open_source(spec: Spec, settings: OpenSettings) -> "Source | None":
    """The source; None for a remote gateway of an offline mount. Blocks. Raises SourceFailed, UsageError."""
    if spec.kind == CAR:
        from ipfsfuse.sources.local.car_source import CarSource

        assert spec.path is not None
        return CarSource.open(
            spec.path, settings.indexes, partial(settings.progress, spec.name) if settings.progress else None
        )
    if spec.kind == LIBRARY:
        from ipfsfuse.sources.local.library import Library, LibrarySource

        return LibrarySource(Library(settings.library))
    if spec.kind == KUBO:
        return _open_kubo(spec, settings)
    from ipfsfuse.sources.http.client import Http
    from ipfsfuse.sources.http.gateway import Gateway

    assert spec.origin is not None
    if settings.offline and not spec.origin.is_local:
        return None
    return Gateway(
        Http(spec.origin, settings.http), spec.name, local=spec.origin.is_local, only_cached=settings.offline
    )


def _open_kubo(spec: Spec, settings: OpenSettings) -> "Source":
    from ipfsfuse.sources.http.kubo import Kubo, repository
    from ipfsfuse.sources.local import kubo_repo
    from ipfsfuse.sources.localkubo import LocalKubo

    place = repository()
    if spec.origin is None and not _is_repository(place):
        raise SourceFailed(
            f"kubo: there is no repository of a Kubo node at {place}: set IPFS_PATH to the node's "
            "repository, or name the node "
            "by its address, as in kubo+http://127.0.0.1:5001",
            "missing",
        )
    blocks = kubo_repo.open_flatfs(place) if spec.origin is None else None
    if blocks is None:
        return Kubo(spec.name, settings.http, spec.origin, offline=settings.offline)
    log.info("%s: what the node holds is read in its repository, %s", spec.name, place)
    return LocalKubo(spec.name, settings.http, blocks, offline=settings.offline)


def _is_repository(place: Path) -> bool:
    """Whether a node keeps its repository there, or an `api` file says where one is; True where that can't be
    told."""
    try:
        names = os.listdir(place)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return not {"api", "config", "datastore_spec"}.isdisjoint(names)


def with_headers(
    settings: HttpSettings, header_files: Sequence[tuple[str, Path]], sources: Sequence[str]
) -> HttpSettings:
    """`settings` with the headers of `header_files`, each bound to the origin of a source. Raises
    UsageError."""
    origins = {spec.origin: spec.name for spec in parse_sources(sources) if spec.origin is not None}
    if header_files and any(spec.kind == KUBO and spec.origin is None for spec in parse_sources(sources)):
        origins |= dict.fromkeys(_addresses_of_node(), KUBO)
    return replace(settings, headers=bind_headers(header_files, origins))


def _addresses_of_node() -> Sequence[Origin]:
    """Where the node listens whose repository is on this machine, if the files that say so are our own."""
    from ipfsfuse.sources.http.kubo import repository

    found = []
    for path in (repository() / "api", repository() / "gateway"):
        if is_ours(path):
            with suppress(OSError, UnicodeDecodeError, UsageError):
                found.append(read_origin(path))
    return found
