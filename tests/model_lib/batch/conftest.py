"""Pictures for the tests of captioning them."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture()
def pictures(scenes: Path, tmp_path: Path) -> Path:
    """A folder of twelve pictures that a test may change."""
    shutil.copytree(scenes / "val2017", tmp_path / "pictures")
    return tmp_path / "pictures"
