"""SOURCE texts of the command line: parses them into frozen specs, and opens them as sources.

Parsing is pure. Opening a source may take long (a CAR without an index is read completely), so each source is
opened in a worker thread.
"""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ipfsfuse.errors import SourceFailed, UsageError
from ipfsfuse.fileio import threads
from ipfsfuse.sources.defaults import CAR, GATEWAY, KUBO, LIBRARY, NETWORK, is_repository
from ipfsfuse.sources.http.origin import Origin, parse_origin, read_origin, repository, unix_origin
from ipfsfuse.sources.http.settings import BoundHeaders, Headers, HttpSettings, is_ours, read_headers

if TYPE_CHECKING:
    from ipfsfuse.sources.base import Source

log = logging.getLogger(__name__)

SourceProgress = Callable[[str, int, int], None]
"""Called in a worker thread while the index of a CAR is built: (name of the CAR file, bytes done, bytes in
all)."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One SOURCE. `name` is shown to people."""

    kind: str
    name: str
    path: Path | None = None
    """For CAR."""
    origin: Origin | None = None
    """For GATEWAY, and for KUBO if an address was given."""


@dataclass(frozen=True, slots=True)
class OpenSettings:
    library: Path
    indexes: Path
    """The folder for indexes of CAR files that contain none."""
    http: HttpSettings = field(default_factory=HttpSettings)
    offline: bool = False
    progress: SourceProgress | None = None
    routers: Sequence[str] = ()
    """URLs of routers, for `network`."""
    allow_private_providers: bool = False
    """Whether `network` may ask providers at private addresses."""


def parse_source(text: str) -> Spec:
    """Raises UsageError with a message that says what to write instead."""
    if text in (LIBRARY, KUBO, NETWORK):
        return Spec(text, text)
    scheme, separator, rest = text.partition("://")
    if separator:
        return _parse_url(text, scheme.lower(), rest)
    if not text or "\0" in text:
        raise UsageError(
            "an empty --from; give a CAR file, library, kubo, kubo+http://host:port, https://gateway, "
            "gateway or network"
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
    if "/" not in text and text.lower() in (LIBRARY, KUBO, GATEWAY, NETWORK):
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
    """The specs of `texts`, in order. Raises UsageError, also if a source is given twice."""
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


def source_files(texts: Sequence[str], library: Path) -> list[Path]:
    """The files and folders that these sources read; some may not exist. Raises UsageError."""
    from ipfsfuse.sources.local import kubo_repo

    files: list[Path] = []
    for spec in parse_sources(texts):
        if spec.kind == LIBRARY:
            files.append(library)
        elif spec.path is not None:
            files.append(spec.path)
        elif spec.kind == KUBO and spec.origin is None:
            files += kubo_repo.files(repository())
    return files


def source_sockets(texts: Sequence[str]) -> list[Path]:
    """The Unix sockets that these sources connect to, or the Kubo repository, which may name one. Raises
    UsageError."""
    found = []
    for spec in parse_sources(texts):
        if spec.origin is not None and spec.origin.unix is not None:
            found.append(Path(spec.origin.unix))
        elif spec.kind == KUBO and spec.origin is None and (folder := repository()).exists():
            found.append(folder)
    return found


def is_remote(spec: Spec) -> bool:
    """Whether the source is known to be on another machine. For `kubo` that is known only when the node's
    repository is read."""
    return spec.kind == NETWORK or (spec.origin is not None and not spec.origin.is_local)


def open_source(spec: Spec, settings: OpenSettings) -> "Source | None":
    """Opens the source. Returns None if the mount is offline and the source is on another machine. Raises
    SourceFailed, UsageError."""
    if settings.offline and is_remote(spec):
        return None
    if spec.kind == CAR:
        from ipfsfuse.sources.local.in_place import CarSource

        assert spec.path is not None
        return CarSource.open(
            spec.path, settings.indexes, partial(settings.progress, spec.name) if settings.progress else None
        )
    if spec.kind == LIBRARY:
        from ipfsfuse.sources.local.in_place import LibrarySource
        from ipfsfuse.sources.local.library import Library

        return LibrarySource(Library(settings.library))
    if spec.kind == KUBO:
        return _open_kubo(spec, settings)
    if spec.kind == NETWORK:
        return _open_network(settings)
    from ipfsfuse.sources.http.client import Http
    from ipfsfuse.sources.http.gateway import Gateway

    assert spec.origin is not None
    return Gateway(
        Http(spec.origin, settings.http), spec.name, local=spec.origin.is_local, only_cached=settings.offline
    )


def _open_kubo(spec: Spec, settings: OpenSettings) -> "Source":
    from ipfsfuse.sources.http.kubo import Kubo
    from ipfsfuse.sources.local import kubo_repo

    folder = repository()
    if spec.origin is None and not is_repository(folder):
        raise SourceFailed(
            f"kubo: there is no repository of a Kubo node at {folder}: set IPFS_PATH to the node's "
            "repository, or name the node by its address, as in kubo+http://127.0.0.1:5001",
            "missing",
        )
    blocks = kubo_repo.open_flatfs(folder) if spec.origin is None else None
    if blocks is not None:
        log.info("%s: blocks that the node has are read in its repository, %s", spec.name, folder)
    return Kubo(spec.name, settings.http, spec.origin, blocks=blocks, offline=settings.offline)


def _open_network(settings: OpenSettings) -> "Source":
    from ipfsfuse.sources.routing import Network, open_routers

    if not settings.routers:
        raise UsageError(
            "--from network: name a router, as in --router https://router.example; "
            "`ipfsfuse config --init` writes a file with a public one in it"
        )
    routers = open_routers(settings.routers, settings.http)
    return Network(routers, settings.http, allow_private=settings.allow_private_providers)


@asynccontextmanager
async def open_sources(texts: Sequence[str], settings: OpenSettings) -> AsyncIterator[list["Source"]]:
    """Opens the sources in their order, without those that an offline mount does not use. Closes them at the
    end. Raises UsageError, SourceFailed."""
    from ipfsfuse.sources.local.in_place import CarSource

    async with AsyncExitStack() as stack:
        sources: list[Source] = []
        for spec in parse_sources(texts):
            source = await threads.run_sync(open_source, spec, settings)
            if source is None:
                continue
            stack.push_async_callback(source.aclose)
            sources.append(source)
            if isinstance(source, CarSource) and not source.whole:
                log.warning(
                    "%s is damaged or cut short: blocks before the damage are used, the others are missing",
                    source.path,
                )
        yield sources


# -- headers -------------------------------------------------------------------------------------------------


def with_headers(
    settings: HttpSettings, header_files: Sequence[tuple[str, Path]], sources: Sequence[str]
) -> HttpSettings:
    """`settings` with the headers of `header_files`, each bound to the origin of a source. A file comes with
    the URL of its source, or with "" if there is only one network source. Raises UsageError."""
    origins = _origins(sources) if header_files else {}
    bound: dict[Origin, Headers] = {}
    for url, path in header_files:
        for origin in _targets(url, path, origins):
            if origin.scheme != "https" and not origin.is_local:
                why = "would get it over plain HTTP, which others can read; use https://"
                raise UsageError(f"--header-file {path}: {origin.text} {why}")
            if origin in bound:
                raise UsageError(f"--header-file is given twice for {origin.text}")
            bound[origin] = read_headers(path)
    return replace(settings, headers=BoundHeaders(bound))


def header_files_of(
    header_files: Sequence[tuple[str, Path]], sources: Sequence[str]
) -> tuple[tuple[str, Path], ...]:
    """Those of `header_files` that are bound to one of `sources`, or to no URL. Raises UsageError."""
    origins = _origins(sources) if header_files else {}
    return tuple(each for each in header_files if not each[0] or _origin_of(each[0]) in origins)


def _origins(sources: Sequence[str]) -> dict[Origin, str]:
    """The origins of sources, each with the source's name."""
    specs = parse_sources(sources)
    origins = {replace(spec.origin, base=""): spec.name for spec in specs if spec.origin is not None}
    if any(spec.kind == KUBO and spec.origin is None for spec in specs):
        origins |= dict.fromkeys(addresses_of_node(), KUBO)
    return origins


def _origin_of(url: str) -> Origin:
    origin = parse_source(url).origin
    if origin is None:
        raise UsageError(f"--header-file {url}=…: not the address of a source")
    return replace(origin, base="")


def _targets(url: str, path: Path, origins: dict[Origin, str]) -> Sequence[Origin]:
    """Those of `origins` that the header file `path` is for."""
    targets = [*origins]
    if url:
        targets = [_origin_of(url)]
        if targets[0] not in origins:
            there = ", ".join(origins.values()) or "none"
            raise UsageError(f"--header-file {url}=...: no source is there; there are {there}")
    if len({origins[origin] for origin in targets}) != 1:
        https = (source for source in origins.values() if source.startswith("http"))
        example = f"--header-file {next(https, 'https://gateway.example')}={path}"
        raise UsageError(f"--header-file {path}: say which source it is for: {example}")
    return targets


def addresses_of_node() -> Sequence[Origin]:
    """The addresses of the node of this machine's repository, if the files that name them are our own."""
    found = []
    for path in (repository() / "api", repository() / "gateway"):
        if is_ours(path):
            with suppress(OSError, UnicodeDecodeError, UsageError):
                found.append(replace(read_origin(path), base=""))
    return found
