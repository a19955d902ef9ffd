"""The order of training data: every image once an epoch, shuffled by seed and epoch, similar
lengths together."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model_lib import UserError
from model_lib.data import shards
from model_lib.data.shards import SplitReader, read_manifest
from model_lib.io.pixels import Preprocessing


@pytest.fixture()
def reader(data: Path) -> SplitReader:
    return SplitReader(read_manifest(str(data)), "train", Preprocessing(16))


def lengths(reader: SplitReader) -> np.ndarray:
    return np.array([sum(len(text) for text in texts) for texts in reader.captions()])


def ids(reader: SplitReader, plan: shards.BatchOrder) -> list[list[int]]:
    return [batch.image_ids for batch in reader.batches(plan)]


def all_ids(reader: SplitReader, plan: shards.BatchOrder) -> list[int]:
    return [image_id for batch in ids(reader, plan) for image_id in batch]


@pytest.mark.parametrize("window", [5, 30, 4096])
def test_each_image_comes_once_an_epoch(
    reader: SplitReader, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "WINDOW", window)
    for epoch in range(2):
        plan = reader.shuffled(10, 3, epoch, lengths(reader))
        assert sorted(map(len, plan)) == [4] + [10] * 6
        assert sorted(all_ids(reader, plan)) == list(range(1, 65))


def test_order_depends_on_seed_and_epoch_alone(reader: SplitReader) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return ids(reader, reader.shuffled(10, seed, epoch, lengths(reader)))

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(3, 2) and order(3, 1) != order(4, 1)
    assert all_ids(reader, reader.in_order(10)) == list(range(1, 65))


def test_images_with_captions_of_similar_length_come_together(reader: SplitReader) -> None:
    long = lengths(reader)

    def spread(plan: shards.BatchOrder) -> float:
        return float(np.mean([np.ptp(long[batch]) for batch in plan]))

    unsorted = spread(reader.shuffled(8, 0, 0, np.zeros(64)))
    assert spread(reader.shuffled(8, 0, 0, long)) < 0.5 * unsorted


def test_batches_hold_pixels_and_captions_of_their_numbers(reader: SplitReader) -> None:
    batch = next(reader.batches([np.array([5, 3, 60])]))
    assert batch.numbers == [5, 3, 60] and batch.image_ids == [6, 4, 61]
    assert [p.shape for p in batch.pixels] == [(3, 16, 16)] * 3
    assert batch.pixels[0].dtype == np.uint8
    assert batch.captions == [reader.captions()[number] for number in batch.numbers]


def test_a_limit_takes_the_first(data: Path) -> None:
    reader = SplitReader(read_manifest(str(data)), "train", Preprocessing(16), limit=6)
    assert ids(reader, reader.in_order(4)) == [[1, 2, 3, 4], [5, 6]]
    assert len(reader.captions()) == 6
    seen = all_ids(reader, reader.shuffled(4, 0, 0, np.zeros(6)))
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]


def test_an_image_that_cannot_be_read_stops_the_reader_and_nothing_hangs(
    reader: SplitReader,
) -> None:
    def view(image: Image.Image, number: int) -> np.ndarray:
        raise ValueError(f"image {number}")

    with pytest.raises(ValueError, match="image 0"):
        list(reader.pixels(reader.in_order(4), lambda _, pixels: pixels, view))
    next(reader.batches(reader.in_order(4)))  # the rest is not asked for


def test_a_missing_or_changed_shard_is_named(data: Path, tmp_path: Path) -> None:
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00000\.parquet: has"):
        SplitReader(read_manifest(str(tmp_path)), "train", Preprocessing(16))
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00000\.parquet: the manifest names"):
        SplitReader(read_manifest(str(tmp_path)), "train", Preprocessing(16))


@pytest.mark.parametrize("text", ["[]", "{}", '{"format_version": 2}', "no json"])
def test_what_is_not_a_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(str(tmp_path))


def test_a_split_that_is_not_there_is_named(data: Path) -> None:
    with pytest.raises(UserError, match=r"has no test images, only train \(64\), val \(12\)"):
        SplitReader(read_manifest(str(data)), "test", Preprocessing(16))
