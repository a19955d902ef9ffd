"""The cache of the vision tower's results: the same numbers, computed once, refused where there is
no room."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_lib import UserError
from model_lib.data.shards import Batch, SplitReader, read_manifest
from model_lib.train.config import TrainConfig
from model_lib.train.features import FeatureCache
from model_lib.train.training import train
from tests.small import small_model


def reader(data: Path) -> SplitReader:
    return SplitReader(read_manifest(str(data)), "train", size=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_the_tower_says(
    data: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model, images = small_model(), reader(data)
    model.freeze_into(dtype)
    cache = FeatureCache(str(tmp_path), model, images, "fingerprint", batch_size=7)
    numbers = np.array([5, 0, 63])
    (batch,) = images.batches([numbers])
    with torch.no_grad():
        features = model.encode(torch.from_numpy(batch.pixels))
    got = cache.read(numbers)
    assert got.dtype == dtype and got.shape == (3, 17, 24)
    torch.testing.assert_close(
        got, features, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5
    )


def test_it_is_computed_once_for_a_tower_and_its_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, filled = small_model(), []
    fill = FeatureCache._fill
    monkeypatch.setattr(
        FeatureCache, "_fill", lambda self, *rest: filled.append(self.file) or fill(self, *rest)
    )
    for _ in range(2):
        FeatureCache(str(tmp_path), model, reader(data), "fingerprint", batch_size=32)
    assert len(filled) == 1
    next(iter(tmp_path.glob("*.json"))).unlink()  # as if killed in the middle
    FeatureCache(str(tmp_path), model, reader(data), "fingerprint", batch_size=32)
    FeatureCache(str(tmp_path), model, reader(data), "other", batch_size=32)
    FeatureCache(str(tmp_path), small_model(seed=1), reader(data), "fingerprint", batch_size=32)
    assert len(filled) == 4 and len(set(filled)) == 3


class Pausing(SplitReader):
    """A reader that waits after so many batches."""

    def __init__(self, data: Path, after: int) -> None:
        super().__init__(read_manifest(str(data)), "train", size=32)
        self.after, self.begun, self.go_on = after, threading.Event(), threading.Event()

    def batches(self, *plan: Any) -> Iterator[Batch]:
        for number, batch in enumerate(super().batches(*plan)):
            if number == self.after:
                self.begun.set()
                assert self.go_on.wait(60)
            yield batch


def test_two_runs_that_begin_at_once_both_read_what_the_tower_says(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, numbers = small_model(), np.arange(64)
    expected = FeatureCache(
        str(tmp_path / "alone"), model, reader(data), "fingerprint", batch_size=16
    ).read(numbers)

    def fill(images: SplitReader) -> FeatureCache:
        return FeatureCache(str(tmp_path / "both"), model, images, "fingerprint", batch_size=16)

    first, second = Pausing(data, after=1), Pausing(data, after=0)
    with ThreadPoolExecutor(2) as pool:
        filled = pool.submit(fill, first)
        assert first.begun.wait(60)
        late = pool.submit(fill, second)
        while not second.begun.is_set() and "another run fills" not in caplog.text:
            time.sleep(0.01)
        first.go_on.set()
        got = filled.result().read(numbers)
        second.go_on.set()
        assert torch.equal(got, expected) and torch.equal(late.result().read(numbers), expected)
    assert not second.begun.is_set(), "it is filled once"


def test_its_need_is_said_and_refused_where_there_is_no_room(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    FeatureCache(str(tmp_path), small_model(), reader(data), "fingerprint", batch_size=32)
    assert "takes 0.0 GB" in caplog.text
    images = reader(data)
    images.rows = 10**12
    with pytest.raises(
        UserError, match=r"needs 1632000\.00 GB more for the feature cache, and .* are free"
    ):
        FeatureCache(str(tmp_path), small_model(), images, "fingerprint", batch_size=32)


def test_training_from_it_is_training_from_the_images(
    data: Path, tmp_path: Path, parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {
        "data": str(data),
        "vision": str(parts[0]),
        "decoder": str(parts[1]),
        "precision": "float32",
    }
    common |= {
        "epochs": 1,
        "batch_size": 16,
        "augment": "no",
        "dropout": 0.0,
        "ema": 0.0,
        "max_tokens": 20,
    }
    plain = train(TrainConfig(output=str(tmp_path / "plain"), **common))
    read, asked = FeatureCache.read, list[int]()
    monkeypatch.setattr(
        FeatureCache,
        "read",
        lambda self, numbers: asked.append(len(numbers)) or read(self, numbers),
    )
    cached = train(
        TrainConfig(
            output=str(tmp_path / "cached"), feature_cache=str(tmp_path / "cache"), **common
        )
    )
    assert sum(asked) == 64, "each image is read from it"
    assert cached.validation_loss == pytest.approx(plain.validation_loss, rel=1e-5)


def test_it_is_refused_where_views_change_or_the_tower_is_trained() -> None:
    with pytest.raises(
        UserError, match="feature_cache: keeps one view of each image; give --augment no too"
    ):
        TrainConfig(data="data", output="out", feature_cache="cache")
    with pytest.raises(UserError, match=r"feature_cache gs://bucket: is not a local folder"):
        TrainConfig(data="data", output="out", augment="no", feature_cache="gs://bucket")
    with pytest.raises(UserError, match="feature_cache: preset tiny trains its vision tower"):
        TrainConfig(data="data", output="out", preset="tiny", feature_cache="cache")
