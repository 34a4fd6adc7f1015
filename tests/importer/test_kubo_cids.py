"""Each tree gets the CID that Kubo gave it: from `tests.importer.pure`, from `add`, and again from a real
Kubo."""

import json
import os
from pathlib import Path

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.builder import PROFILES
from ipfsfuse.importer.add import AddOptions, add
from tests.importer.pure import build
from tests.importer.record import DATA, ask
from tests.importer.repo import Repo
from tests.importer.trees import CASES, Case, write
from tests.kubo.fixtures import need_kubo

KNOWN: dict[str, dict[str, str]] = json.loads(DATA.read_text())
ALL = [pytest.param(case, id=f"{profile}-{name}") for (profile, name), case in CASES.items()]
ON_DISK = [
    pytest.param(case, id=f"{profile}-{name}") for (profile, name), case in CASES.items() if not case.large
]


def test_every_case_has_a_recorded_cid() -> None:
    assert {(profile, name) for profile, of in KNOWN.items() for name in of} == set(CASES)


@pytest.mark.parametrize("case", ALL)
def test_the_importer_agrees_with_kubo(case: Case) -> None:
    assert cids.text(build(case)) == KNOWN[case.profile.name][case.name]


@pytest.mark.parametrize("case", ON_DISK)
def test_add_agrees_with_kubo(case: Case, tmp_path: Path) -> None:
    _need_root(case)
    for name, entry in case.top.items():
        write(entry, tmp_path / name)
    options = AddOptions(
        case.profile,
        wrap="-w" in case.options,
        hidden="-H" in case.options,
        preserve_mode="--preserve-mode" in case.options,
        preserve_mtime="--preserve-mtime" in case.options,
    )
    *_others, last = add([str(tmp_path / name) for name in case.top], options, None)
    assert cids.text(last.cid) == KNOWN[case.profile.name][case.name]


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Repo]:
    need_kubo()
    return {name: Repo(tmp_path_factory.mktemp(name), name) for name in PROFILES}


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL)
def test_kubo_still_gives_the_recorded_cids(case: Case, repos: dict[str, Repo], tmp_path: Path) -> None:
    _need_root(case)
    assert ask(repos[case.profile.name], case, tmp_path) == KNOWN[case.profile.name][case.name]


def _need_root(case: Case) -> None:
    if case.only_root and os.geteuid() != 0:
        pytest.skip("only root can read files of mode 0")
