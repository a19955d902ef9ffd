"""Captioning a folder with another project's captioner."""

from dataclasses import replace
from pathlib import Path

import pytest

from model_lib import UserError
from model_lib.batch.batching import batch
from model_lib.cli import CaptionConfig, caption
from model_lib.model.captioning import caption_images
from model_lib.model.rivals import load_captioner
from tests.helpers.batches import batch_config, file_times, read_rows
from tests.helpers.rivals import git


def test_a_folder_is_captioned_once(images: Path, tmp_path: Path) -> None:
    git(tmp_path / "git")
    options = {"precision": "float32", "prompt": "a photo of", "max_new_tokens": 8}
    config = batch_config(images, tmp_path / "out", f"hf:{tmp_path}/git", **options)
    summary = batch(config)
    rows = read_rows(summary)
    model = load_captioner(f"hf:{tmp_path}/git", "cpu", "float32", "a photo of")
    captions = caption_images(model, sorted(images.iterdir()), max_new_tokens=8)
    assert [row["caption"] for row in rows] == [caption.text for caption in captions]
    assert {row["model"] for row in rows} == {f"hf:{tmp_path}/git"}
    times = file_times(summary)
    assert file_times(batch(config)) == times
    git(tmp_path / "git")  # other weights
    assert batch(config).captions != summary.captions


def test_the_command_takes_a_rival_and_explains_none(images: Path, tmp_path: Path) -> None:
    git(tmp_path / "git")
    file = str(min(images.iterdir()))
    config = CaptionConfig(files=(file,), model=f"hf:{tmp_path}/git", prompt="a photo of")
    (line,) = caption(config).lines
    assert line.startswith(f"{file}: ")
    with pytest.raises(UserError, match="shows no attention"):
        caption(replace(config, explain=str(tmp_path / "page.html")))
