"""Choosing decoding options on validation images."""

from pathlib import Path

import pytest

from model_lib import Captioner, UserError
from model_lib.data.shards import SplitReader, read_manifest
from model_lib.evaluate.config import TuneConfig
from model_lib.evaluate.tuning import tune
from model_lib.io.images import decode_image
from model_lib.scores.cider import corpus_cider


def test_each_combination_has_the_cider_of_its_captions(data: Path, saved_model: Path) -> None:
    options = {"model": str(saved_model), "data": str(data), "limit": 5, "max_new_tokens": 8}
    options |= {"num_beams": (1, 3), "length_penalty": (0.5, 2.0), "no_repeat_ngram_size": (0, 1)}
    rows = tune(TuneConfig(**options, batch_size=2))
    assert len(rows) == 2 + 4
    assert [row["CIDEr"] for row in rows] == sorted((row["CIDEr"] for row in rows), reverse=True)
    model = Captioner.from_pretrained(str(saved_model))
    reader = SplitReader(read_manifest(str(data)), "val", model.preprocess, limit=5)
    (batch,) = reader.batches(reader.in_order(5))
    images = [decode_image(content) for content in batch.files]
    names = ("num_beams", "length_penalty", "no_repeat_ngram_size")
    for row in rows:
        chosen = {name: row[name] for name in names}
        captions = model.caption(images, max_new_tokens=8, **chosen)
        texts = dict(enumerate(caption.text for caption in captions))
        assert row["CIDEr"] == pytest.approx(corpus_cider(texts, dict(enumerate(batch.captions))))


def test_options_are_not_chosen_on_test_images() -> None:
    with pytest.raises(UserError, match="split test: choose options on val"):
        TuneConfig(model="m", data="d", split="test")
    with pytest.raises(UserError, match="nothing to choose from"):
        TuneConfig(
            model="m", data="d", num_beams=(1,), length_penalty=(1.0,), no_repeat_ngram_size=(0,)
        )
