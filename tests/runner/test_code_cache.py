"""The cache of compiled code: it is used again, is bounded, and loads only from the user's own folder."""

import io
import os
from pathlib import Path

import pytest
import wasmtime

from ipfsfuse_run import code_cache, guest
from ipfsfuse_run.code_cache import MODULE, CodeCache
from ipfsfuse_run.guest import Settings
from ipfsfuse_run.limits import COMPILE_MEMORY
from tests.runner.conftest import TOP, Runner

PLAIN = Settings(fuel=False, max_wasm_stack=None, deterministic=False)
CODE = bytes(wasmtime.wat2wasm('(module (func (export "_start")))'))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The guests that were compiled, by their names in messages."""
    names: list[str] = []
    real = code_cache.in_own_process

    def counted(build: code_cache.Build, name: str, memory: int) -> int:
        names.append(name)
        return real(build, name, memory)

    monkeypatch.setattr(code_cache, "in_own_process", counted)
    return names


def load(cache: CodeCache, code: bytes = CODE, settings: Settings = PLAIN) -> guest.Guest:
    engine = guest.make_engine(settings)
    entry = cache.compiled(
        MODULE,
        code,
        "guest",
        COMPILE_MEMORY,
        guest.key(settings),
        lambda: guest.build(engine, MODULE, code, "guest"),
    )
    try:
        return guest.load(engine, entry)
    finally:
        os.close(entry.file)


def kept(cache: CodeCache, file: io.BytesIO, settings: Settings = PLAIN) -> guest.Guest | None:
    code = cache.kept(file, "guest", guest.key(settings))
    return None if code is None else guest.load(guest.make_engine(settings), code)


def test_the_second_start_compiles_nothing(folder: Path, compiled: list[str]) -> None:
    for _ in range(2):
        load(CodeCache(folder), CODE)
    assert len(compiled) == 1
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]


def test_compiled_code_is_found_only_for_a_file_of_the_same_bytes(folder: Path, compiled: list[str]) -> None:
    cache, file = CodeCache(folder), io.BytesIO(CODE)
    assert kept(cache, file) is None
    assert file.read() == CODE
    load(cache)
    again = kept(cache, io.BytesIO(CODE))
    assert again is not None
    assert again.name == "guest"
    assert isinstance(again.compiled, wasmtime.Module)
    assert kept(cache, io.BytesIO(CODE), PLAIN._replace(fuel=True)) is None
    assert kept(cache, io.BytesIO(CODE + b"\0\1\0")) is None
    assert kept(cache, io.BytesIO(b'(module (func (export "_start")))')) is None
    assert len(compiled) == 1


def test_other_content_and_other_settings_are_compiled_separately(folder: Path, compiled: list[str]) -> None:
    other = bytes(wasmtime.wat2wasm('(module (func (export "_start") nop))'))
    for code, settings in [
        (CODE, PLAIN),
        (other, PLAIN),
        (CODE, PLAIN._replace(fuel=True)),
        (CODE, PLAIN._replace(deterministic=True)),
    ]:
        load(CodeCache(folder), code, settings)
    assert len(compiled) == 4


@pytest.mark.parametrize("damage", ["cut short", "writable by others", "a symlink"])
def test_an_entry_that_is_not_ours_or_not_complete_is_compiled_again(
    folder: Path, compiled: list[str], damage: str, tmp_path: Path
) -> None:
    load(CodeCache(folder), CODE)
    (entry,) = folder.iterdir()
    if damage == "cut short":
        entry.write_bytes(entry.read_bytes()[:100])
    elif damage == "writable by others":
        entry.chmod(0o666)
    else:
        entry.rename(tmp_path / "elsewhere")
        entry.symlink_to(tmp_path / "elsewhere")
    load(CodeCache(folder), CODE)
    assert len(compiled) == 2
    load(CodeCache(folder), CODE)
    assert len(compiled) == 2  # the new code replaced the entry


def test_the_entry_that_was_used_longest_ago_is_removed_first(folder: Path, compiled: list[str]) -> None:
    codes = [
        bytes(wasmtime.wat2wasm(f'(module (func (export "_start")) (func (export "f{number}")))'))
        for number in range(3)
    ]
    load(CodeCache(folder), codes[0])
    (size,) = (path.stat().st_size for path in folder.iterdir())
    bound = int(size * 2.5)
    for code in (codes[1], codes[0], codes[2]):  # the second was used longest ago when the third is added
        load(CodeCache(folder, bound), code)
    assert len(list(folder.iterdir())) == 2
    before = len(compiled)
    load(CodeCache(folder, bound), codes[0])
    assert len(compiled) == before


def test_a_guest_is_compiled_without_a_cache_folder(compiled: list[str]) -> None:
    load(CodeCache(None), CODE)
    assert len(compiled) == 1


def test_a_relative_cache_folder_is_ignored(run: Runner, habits: Path, tmp_path: Path) -> None:
    """Otherwise each working directory would get a cache. The mount ignores a relative folder too."""
    run.env |= {"XDG_CACHE_HOME": "relative", "HOME": str(tmp_path)}
    assert run(habits, "args").returncode == 0
    assert not (TOP / "relative").exists()
    assert list((tmp_path / ".cache" / "ipfsfuse-run" / "code").iterdir())


def test_the_command_keeps_code_in_the_users_cache(run: Runner, habits: Path, tmp_path: Path) -> None:
    run(habits, "args")
    folder = tmp_path / "xdg" / "ipfsfuse-run" / "code"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.iterdir())) == 1
