"""Compiled code is kept, found again, bounded, and loaded from no place but the user's own."""

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
    seen: list[str] = []
    real = code_cache.in_own_process

    def counted(build: code_cache.Build, name: str, memory: int) -> int:
        seen.append(name)
        return real(build, name, memory)

    monkeypatch.setattr(code_cache, "in_own_process", counted)
    return seen


def load(cache: CodeCache, code: bytes = CODE, settings: Settings = PLAIN) -> guest.Guest:
    engine = guest.make_engine(settings)
    made = cache.compiled(
        MODULE,
        code,
        "guest",
        COMPILE_MEMORY,
        guest.key(settings),
        lambda: guest.build(engine, MODULE, code, "guest"),
    )
    try:
        return guest.load(engine, made)
    finally:
        os.close(made.file)


def kept(cache: CodeCache, file: io.BytesIO, settings: Settings = PLAIN) -> guest.Guest | None:
    found = cache.kept(file, "guest", guest.key(settings))
    return None if found is None else guest.load(guest.make_engine(settings), found)


def test_the_second_start_compiles_nothing(folder: Path, compiled: list[str]) -> None:
    for _ in range(2):
        load(CodeCache(folder), CODE)
    assert len(compiled) == 1
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]


def test_what_was_compiled_is_found_by_a_file_of_the_same_bytes_alone(
    folder: Path, compiled: list[str]
) -> None:
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


def test_other_content_and_other_settings_are_other_code(folder: Path, compiled: list[str]) -> None:
    other = bytes(wasmtime.wat2wasm('(module (func (export "_start") nop))'))
    for code, settings in [
        (CODE, PLAIN),
        (other, PLAIN),
        (CODE, PLAIN._replace(fuel=True)),
        (CODE, PLAIN._replace(deterministic=True)),
    ]:
        load(CodeCache(folder), code, settings)
    assert len(compiled) == 4


@pytest.mark.parametrize("spoil", ["cut short", "writable by others", "a link"])
def test_what_is_not_ours_or_not_whole_is_compiled_anew(
    folder: Path, compiled: list[str], spoil: str, tmp_path: Path
) -> None:
    load(CodeCache(folder), CODE)
    (kept,) = folder.iterdir()
    if spoil == "cut short":
        kept.write_bytes(kept.read_bytes()[:100])
    elif spoil == "writable by others":
        kept.chmod(0o666)
    else:
        kept.rename(tmp_path / "elsewhere")
        kept.symlink_to(tmp_path / "elsewhere")
    load(CodeCache(folder), CODE)
    assert len(compiled) == 2
    load(CodeCache(folder), CODE)
    assert len(compiled) == 2  # and put in its place


def test_what_was_used_longest_ago_goes_first(folder: Path, compiled: list[str]) -> None:
    codes = [
        bytes(wasmtime.wat2wasm(f'(module (func (export "_start")) (func (export "f{number}")))'))
        for number in range(3)
    ]
    load(CodeCache(folder), codes[0])
    (size,) = (path.stat().st_size for path in folder.iterdir())
    bound = int(size * 2.5)
    for code in (codes[1], codes[0], codes[2]):  # the second was used longest ago when the third comes
        load(CodeCache(folder, bound), code)
    assert len(list(folder.iterdir())) == 2
    before = len(compiled)
    load(CodeCache(folder, bound), codes[0])
    assert len(compiled) == before


def test_without_a_folder_it_still_runs(compiled: list[str]) -> None:
    load(CodeCache(None), CODE)
    assert len(compiled) == 1


def test_a_relative_cache_folder_is_none(run: Runner, habits: Path, tmp_path: Path) -> None:
    """Else each folder that a user stands in would get one; the mount's own is handled the same."""
    run.env |= {"XDG_CACHE_HOME": "relative", "HOME": str(tmp_path)}
    assert run(habits, "args").returncode == 0
    assert not (TOP / "relative").exists()
    assert list((tmp_path / ".cache" / "ipfsfuse-run" / "code").iterdir())


def test_the_command_keeps_code_in_the_users_cache(run: Runner, habits: Path, tmp_path: Path) -> None:
    run(habits, "args")
    folder = tmp_path / "xdg" / "ipfsfuse-run" / "code"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.iterdir())) == 1
