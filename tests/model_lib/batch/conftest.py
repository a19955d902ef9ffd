"""Images for the tests of captioning them."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture()
def images(scenes: Path, tmp_path: Path) -> Path:
    """A folder of twelve images that a test may change."""
    shutil.copytree(scenes / "val2017", tmp_path / "images")
    return tmp_path / "images"
