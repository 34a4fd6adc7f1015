"""A library, and a tree to add to it."""

from pathlib import Path

import pytest

from ipfsfuse.sources.local.library import Library
from tests.importer.trees import Bytes, Dir, To, write

MIB = 1 << 20


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    write(
        Dir(
            {
                "a": Bytes(10),
                "b": Dir({"c": Bytes(3 * MIB + 1, 2), ".h": Bytes(1)}),
                "l": To("b/c"),
                "z": Dir(),
            }
        ),
        path,
    )
    return path
