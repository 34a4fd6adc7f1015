"""Compiled code is kept, found again, bounded, and loaded from no place but the user's own."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import wasmtime

from runner import guest
from runner.codecache import CodeCache
from runner.guest import MODULE, Settings
from tests.runner.conftest import TOP, Runner

PLAIN = Settings(fuel=False, max_wasm_stack=None, deterministic=False)
CODE = bytes(wasmtime.wat2wasm('(module (func (export "_start")))'))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was compiled, in order."""
    seen: list[bytes] = []
    real: Callable[..., guest.Guest] = guest.compile_guest

    def counted(engine: wasmtime.Engine, kind: str, code: bytes, name: str) -> guest.Guest:
        seen.append(code)
        return real(engine, kind, code, name)

    monkeypatch.setattr(guest, "compile_guest", counted)
    return seen


def test_the_second_start_compiles_nothing(folder: Path, compiled: list[bytes]) -> None:
    for _ in range(2):
        CodeCache(folder).load(MODULE, CODE, "guest", PLAIN)
    assert compiled == [CODE]
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]


def test_what_was_compiled_is_found_by_a_file_of_the_same_bytes_alone(folder: Path, compiled: list[bytes]) -> None:
    cache, file = CodeCache(folder), io.BytesIO(CODE)
    assert cache.kept(file, "guest", PLAIN) is None
    assert file.read() == CODE
    cache.load(MODULE, CODE, "guest", PLAIN)
    again = cache.kept(io.BytesIO(CODE), "guest", PLAIN)
    assert again is not None
    assert (again.name, again.kind) == ("guest", MODULE)
    assert cache.kept(io.BytesIO(CODE), "guest", PLAIN._replace(fuel=True)) is None
    assert cache.kept(io.BytesIO(CODE + b"\0\1\0"), "guest", PLAIN) is None
    assert cache.kept(io.BytesIO(b'(module (func (export "_start")))'), "guest", PLAIN) is None
    assert compiled == [CODE]


def test_other_content_and_other_settings_are_other_code(folder: Path, compiled: list[bytes]) -> None:
    other = bytes(wasmtime.wat2wasm('(module (func (export "_start") nop))'))
    for code, settings in [(CODE, PLAIN), (other, PLAIN), (CODE, PLAIN._replace(fuel=True)), (CODE, PLAIN._replace(deterministic=True))]:
        CodeCache(folder).load(MODULE, code, "guest", settings)
    assert len(compiled) == 4


@pytest.mark.parametrize("spoil", ["cut short", "writable by others", "a link"])
def test_what_is_not_ours_or_not_whole_is_compiled_anew(folder: Path, compiled: list[bytes], spoil: str, tmp_path: Path) -> None:
    CodeCache(folder).load(MODULE, CODE, "guest", PLAIN)
    (kept,) = folder.iterdir()
    if spoil == "cut short":
        kept.write_bytes(kept.read_bytes()[:100])
    elif spoil == "writable by others":
        kept.chmod(0o666)
    else:
        kept.rename(tmp_path / "elsewhere")
        kept.symlink_to(tmp_path / "elsewhere")
    CodeCache(folder).load(MODULE, CODE, "guest", PLAIN)
    assert len(compiled) == 2
    CodeCache(folder).load(MODULE, CODE, "guest", PLAIN)
    assert len(compiled) == 2  # and put in its place


def test_what_was_used_longest_ago_goes_first(folder: Path, compiled: list[bytes]) -> None:
    codes = [bytes(wasmtime.wat2wasm(f'(module (func (export "_start")) (func (export "f{number}")))')) for number in range(3)]
    CodeCache(folder).load(MODULE, codes[0], "guest", PLAIN)
    (size,) = (path.stat().st_size for path in folder.iterdir())
    bound = int(size * 2.5)
    for code in (codes[1], codes[0], codes[2]):  # the second was used longest ago when the third comes
        CodeCache(folder, bound).load(MODULE, code, "guest", PLAIN)
    assert len(list(folder.iterdir())) == 2
    before = len(compiled)
    CodeCache(folder, bound).load(MODULE, codes[0], "guest", PLAIN)
    assert len(compiled) == before


def test_without_a_folder_it_still_runs(compiled: list[bytes]) -> None:
    CodeCache(None).load(MODULE, CODE, "guest", PLAIN)
    assert compiled == [CODE]


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
