"""The order of training data: every picture once an epoch, shuffled by seed and epoch, resumable at any step."""

from pathlib import Path

import numpy as np
import pytest

from model_lib import UserError, shards
from model_lib.shards import SplitReader, read_manifest


@pytest.fixture()
def reader(data: Path) -> SplitReader:
    return SplitReader(read_manifest(str(data)), "train", batch_size=10, size=16)


def ids(reader: SplitReader, **options: int) -> list[list[int]]:
    return [batch.image_ids for batch in reader.batches(**options)]


def test_each_picture_comes_once_an_epoch(reader: SplitReader) -> None:
    for epoch in range(2):
        seen = [image_id for batch in ids(reader, seed=3, epoch=epoch) for image_id in batch]
        assert sorted(seen) == list(range(1, 65))
    assert len(ids(reader, seed=3)) == len(reader) == 7


def test_order_depends_on_seed_and_epoch_alone(reader: SplitReader) -> None:
    assert ids(reader, seed=3, epoch=1) == ids(reader, seed=3, epoch=1)
    assert ids(reader, seed=3, epoch=1) != ids(reader, seed=3, epoch=2)
    assert ids(reader, seed=3, epoch=1) != ids(reader, seed=4, epoch=1)
    assert [image_id for batch in ids(reader) for image_id in batch] == list(range(1, 65))


@pytest.mark.parametrize("window", [5, 4096])
def test_skipping_goes_on_where_it_left_off(reader: SplitReader, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "WINDOW", window)
    whole = ids(reader, seed=3, epoch=1)
    for skip in range(8):
        assert ids(reader, seed=3, epoch=1, skip=skip) == whole[skip:]


def test_batches_hold_pixels_and_captions(reader: SplitReader) -> None:
    batch = next(reader.batches())
    assert batch.pixels.shape == (10, 3, 16, 16) and batch.pixels.dtype == np.uint8
    assert [len(captions) for captions in batch.captions] == [5] * 10


def test_a_limit_takes_the_first(data: Path) -> None:
    reader = SplitReader(read_manifest(str(data)), "train", batch_size=4, size=16, limit=6)
    assert ids(reader) == [[1, 2, 3, 4], [5, 6]]


def test_a_missing_or_changed_shard_is_named(data: Path, tmp_path: Path) -> None:
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00000\.parquet: has"):
        SplitReader(read_manifest(str(tmp_path)), "train", batch_size=4, size=16)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00000\.parquet: the manifest names"):
        SplitReader(read_manifest(str(tmp_path)), "train", batch_size=4, size=16)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format_version": 2}', "no json"])
def test_what_is_not_a_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(str(tmp_path))


def test_a_split_that_is_not_there_is_named(data: Path) -> None:
    with pytest.raises(UserError, match=r"has no test pictures, only train \(64\), val \(12\)"):
        SplitReader(read_manifest(str(data)), "test", batch_size=4, size=16)
