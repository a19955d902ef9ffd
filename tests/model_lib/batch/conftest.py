"""Images for the tests of captioning them."""

import shutil
from pathlib import Path

import pytest

from model_lib.batch.config import BatchConfig
from tests.helpers.batches import batch_config


@pytest.fixture()
def images(scenes: Path, tmp_path: Path) -> Path:
    """A folder of twelve images that a test may change."""
    shutil.copytree(scenes / "val2017", tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture()
def config(images: Path, saved_model: Path, tmp_path: Path) -> BatchConfig:
    """To caption these images into the folder `out`."""
    return batch_config(images, tmp_path / "out", saved_model)
